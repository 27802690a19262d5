"""A bar on a terminal for measurements that report how many they have done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(name: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call with the measurements done and to be done; shows nothing where there is no terminal.

    Args:
        name: of what is measured.
        shown: whether there is anything to measure.
    """
    with tqdm(desc=name, disable=None if shown else True, dynamic_ncols=True) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
