"""One run that is killed again and again, beside one that is not: what ``killed_compress`` and ``killed_elm`` share.

Every attempt is a fork of this process, which itself only imports.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from hf_elastic import CompressOptions, ElmOptions

Options = TypeVar("Options", CompressOptions, ElmOptions)
Point = tuple[str, str, int]
"""Where an attempt kills itself: module, object in it, and at which call."""


def kill_at(module: str, name: str, calls: int) -> None:
    """Makes the named function kill this process at its ``calls``-th call."""
    *owners, last = name.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    function, left = getattr(owner, last), [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, last, counted)


def attempt(run: Callable[[Options], object], given: Options, point: Point | None) -> str:
    """Runs once in a fork; returns how that ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            if point is not None:
                kill_at(*point)
            run(given)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "finished" if not os.WEXITSTATUS(status) else "failed"


def tell_ends(
    run: Callable[[Options], object], options: Sequence[Options], *, points: Mapping[str, Point], names: Sequence[str]
) -> None:
    """Prints how each attempt ended and what was in the output folder then.

    Args:
        run: one attempt.
        options: of the run that is not killed, and of the one that is.
        points: by their names.
        names: where the attempts are killed, in turn; a last one is not.
    """
    whole, killed = options
    ends = [("whole", attempt(run, whole, None), [])]
    for name in [*names, None]:
        end = attempt(run, killed, None if name is None else points[name])
        output = killed.output_folder
        ends.append((name or "last", end, sorted(file.name for file in output.iterdir()) if output.exists() else []))
    print("\n" + json.dumps(ends))
