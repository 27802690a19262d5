"""One line of progress: evaluations done, time left, and the best so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from hf_elastic.search.objective import Objective


class SearchProgress:
    """Show a bar on standard error.

    Args:
        objectives: Objectives of the search; the best feasible value of each is shown.
        total: Architectures to evaluate in all.
        shown: Whether to show anything.
    """

    def __init__(self, objectives: Sequence[Objective], *, total: int, shown: bool) -> None:
        self._objectives = tuple(objectives)
        self._best: dict[str, float] = {}
        # disable=None would hide the bar whenever the output is no terminal, notebooks and logs included.
        self._bar = tqdm(total=total, desc="search", unit="arch", disable=not shown, dynamic_ncols=True)

    def resume(self) -> None:
        """Start the clock: what an earlier run or other processes did says nothing about our speed."""
        self._bar.unpause()
        self._bar.initial = self._bar.n
        self._bar.start_t = self._bar.last_print_t = time.time()

    def advance(self, values: Sequence[float] | None, *, feasible: bool) -> None:
        """Count one evaluation."""
        if values is not None and feasible:
            for objective, value in zip(self._objectives, values, strict=True):
                best = self._best.get(objective.name, value)
                better = min(objective.sign * best, objective.sign * value)
                self._best[objective.name] = objective.sign * better
            text = ", ".join(f"best {name} {value:.5g}" for name, value in self._best.items())
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)

    def say(self, name: str, values: Sequence[float] | None) -> None:
        """Print a line above the bar about an architecture that is always evaluated."""
        if self._bar.disable:
            return
        if values is None:
            text = "failed"
        else:
            pairs = zip(self._objectives, values, strict=True)
            text = ", ".join(f"{o.name} {value:.5g}{' ' + o.unit if o.unit else ''}" for o, value in pairs)
        self._bar.write(f"{name}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()
