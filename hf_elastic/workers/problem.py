"""What a worker evaluates: the trained supernet of a run, or what a function of the user returns."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_elastic.errors import ElasticError, SearchError
from hf_elastic.search.objective import Objective, check_objectives
from hf_elastic.space import SearchSpace


@dataclass(frozen=True)
class Problem:
    """A space and what to optimise in it.

    Attributes:
        space: where to search.
        objectives: what to optimise, the first one first in tables.
        kind: ``run`` or ``function``.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    kind: str


def problem_of(source: str, *, within: Mapping[str, float] | None = None) -> Problem:
    """Opens what a worker is started with.

    Args:
        source: ``OUTPUT.run`` of ``compress --recipe best``: its trained supernet and its validation data, quality
            against the first cost that ``within`` names (MACs else). Or ``module:function``: a function without
            arguments that returns a space and a sequence of objectives; the module is looked for in the working
            folder too.
        within: limits of the search.

    Raises:
        SearchError: the source is neither, its module cannot be imported, or the function raises or returns something
            else.
        CheckpointError: the run has no trained supernet, or its data is gone or another.
    """
    if Path(source).is_dir():
        return _of_run(Path(source), within or {})
    module, colon, function = source.partition(":")
    if not (colon and function and all(part.isidentifier() for part in module.split("."))):
        raise SearchError(f"{source!r} is neither a run folder nor module:function; give the OUTPUT.run of compress")
    return _of_function(module, function)


def objectives_of(source: str, within: tuple[tuple[str, float], ...]) -> tuple[Objective, ...]:
    """The objectives of :func:`problem_of`, for a process of its own."""
    return problem_of(source, within=dict(within)).objectives


def _of_run(folder: Path, within: Mapping[str, float]) -> Problem:
    from hf_elastic.pipeline.elm_run import require_no_elm_run
    from hf_elastic.pipeline.kept import require_run
    from hf_elastic.pipeline.steps import search_of_run

    require_no_elm_run(folder)
    require_run(folder)
    supernet, goals, _ = search_of_run(folder, within)
    return Problem(supernet.space, goals, "run")


def _of_function(module: str, function: str) -> Problem:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # a console script has its own folder there, not the user's
    try:
        made: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's: what it does while it is imported may go wrong in any way
        raise SearchError(f"{module}:{function} cannot be imported: {_said(error)}") from error
    if not callable(made):
        raise SearchError(f"{module}:{function} is a {type(made).__name__}, not a function")
    try:
        returned = made()
    except ElasticError:
        raise
    except Exception as error:
        raise SearchError(f"{module}:{function} raised {_said(error)}") from error
    pair = tuple(returned) if isinstance(returned, Sequence) else ()
    if len(pair) != 2 or not isinstance(pair[0], SearchSpace) or not isinstance(pair[1], Iterable):
        raise SearchError(
            f"{module}:{function} returned a {type(returned).__name__}, not (space, objectives): a SearchSpace, "
            "such as supernet.space, and a list of objectives"
        )
    return Problem(pair[0], check_objectives(tuple(pair[1])), "function")


def _said(error: Exception) -> str:
    """The kind of an error, its first line, and where in the user's code it was raised."""
    text = str(error).split("\n", 1)[0]
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if Path(frame.filename).is_relative_to(os.getcwd())]
    place = f" ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""
    return f"{type(error).__name__}: {text}{place}"
