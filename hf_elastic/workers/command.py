"""``hf-elastic worker``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from hf_elastic.errors import ElasticError, SearchError


def worker_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="OUTPUT.run of compress --recipe best, or module:function that returns (space, objectives).",
        ),
    ],
    *,
    storage: Annotated[str, typer.Option(help="postgresql://USER@HOST/DATABASE, or sqlite:///FILE for one machine.")],
    name: Annotated[str | None, typer.Option(help="Of the study in the database; that of SOURCE else.")] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(help="Limit such as macs=0.7; up to 1 a fraction of the largest, above 1 absolute. Repeatable."),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Architectures that all workers together evaluate.")] = 200,
    algorithm: Annotated[str, typer.Option(help="nsga2, tpe, random or exhaustive.")] = "nsga2",
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    processes: Annotated[
        int, typer.Option(help="Evaluate in so many child processes, which may crash or hang; 0: in the worker.")
    ] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which an evaluation has failed.")] = None,
    lease: Annotated[
        float, typer.Option(help="Seconds after which a worker that fell silent has lost its evaluation.")
    ] = 600.0,
    result: Annotated[str | None, typer.Option(help="JSON file for the result, of which export takes rows.")] = None,
) -> None:
    """Evaluate a search together with other workers, started alike. Exit code 143: SIGTERM, evaluation handed back."""
    from hf_elastic.search.interruption import PREEMPTED
    from hf_elastic.workers.worker import WorkerOptions, work

    if algorithm == "exact":
        raise SearchError("--algorithm exact takes seconds on one machine; use hf_elastic.search_subnets for it")
    options = WorkerOptions(
        source=source, storage=storage, name=name, within=_limits(within or []),
        evaluations=evaluations, algorithm=algorithm, seed=seed, processes=processes, timeout=timeout, lease=lease,
        result=result,
    )  # fmt: skip
    try:
        found = work(options, say=typer.echo)
    except ElasticError as error:
        raise type(error)(_in_words_of_options(str(error))) from error
    except KeyboardInterrupt:
        typer.echo("hf-elastic: interrupted; the evaluation was handed back", err=True)
        raise typer.Exit(130) from None
    except SystemExit as ended:
        if ended.code == PREEMPTED:
            typer.echo("hf-elastic: SIGTERM; the evaluation was handed back", err=True)
        raise
    from hf_elastic.pipeline.steps import front_table  # which needs torch, as a search of functions does not

    typer.echo(front_table(found))
    if result is not None and Path(source).is_dir():
        typer.echo(f"write a row: hf-elastic export {source} '{result}#ROW' --output DIR")


def _limits(texts: list[str]) -> dict[str, float]:
    if not texts:
        return {}
    from hf_elastic.commands.arguments import parse_limits

    return parse_limits(texts)


_OPTIONS = {
    "study_name": "--name",
    "lease_seconds": "--lease",
    **{name: f"--{name}" for name in ("storage", "within", "evaluations", "algorithm", "seed", "processes", "timeout")},
}


def _in_words_of_options(text: str) -> str:
    """Names options as the command line does where an error names them as Python does."""
    names = "|".join(_OPTIONS)
    return re.sub(rf"\b({names})=(?=(\S?))", lambda found: _OPTIONS[found[1]] + (" " if found[2].strip() else ""), text)
