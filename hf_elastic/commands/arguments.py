"""What the commands share: arguments they all take, texts that stand for limits, spaces and architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_elastic.architecture import read_json_object
from hf_elastic.declaration import ElasticConfig, Loadability
from hf_elastic.errors import ArchitectureError, ElasticError, SpaceError
from hf_elastic.pipeline.options import TaskName

WITHIN_HELP = (
    "Limit such as parameters=0.6 or macs=0.7 (at 128 tokens): up to 1 a fraction of the parent's, above 1 absolute. "
    "May be repeated."
)
Within = Annotated[list[str], typer.Option(help=WITHIN_HELP)]
Data = Annotated[list[str], typer.Option(help=".txt, .jsonl or .csv file to calibrate on, or data set. Repeatable.")]
Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or its name on the Hub.")]
Output = Annotated[str, typer.Option(help="Folder to write.")]
Task = Annotated[TaskName, typer.Option(help="What the model is for.")]
SequenceLength = Annotated[int, typer.Option(help="Longest sequence in tokens.")]
TextColumn = Annotated[str, typer.Option(help="Column of rows that holds text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of rows that holds labels.")]


@contextmanager
def resumable() -> Iterator[None]:
    """Says of an interrupted command that it goes on."""
    try:
        yield
    except KeyboardInterrupt:  # typer would end without a word
        typer.echo("hf-elastic: interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def parse_limits(texts: list[str]) -> dict[str, float]:
    """Turns ``name=number`` into limits; numbers up to 1 are fractions.

    Raises:
        SpaceError: a text is not of that form, or two name the same.
    """
    limits: dict[str, float] = {}
    for text in texts:
        for entry in text.split(","):
            name, _, number = (part.strip() for part in entry.partition("="))
            try:
                limit = float(number)
            except ValueError:
                name = ""
            if not name:
                raise SpaceError(f"within {entry!r} is not of the form name=number, such as parameters=0.6")
            if name in limits:
                raise SpaceError(f"within names {name!r} twice, with {limits[name]:g} and {limit:g}")
            limits[name] = limit
    return limits


def json_or_file(text: str, *, what: str, error: type[ElasticError]) -> dict[str, Any]:
    """Reads a JSON object given as such or as a file.

    Raises:
        ElasticError: of the class ``error``; it is neither.
    """
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise error(f"{what} {text[:80]!r} is neither a JSON object nor a readable file") from None
    return read_json_object(text, what=what, error=error)


def given_space(text: str | None, loadability: Loadability) -> ElasticConfig | None:
    """The space that was given; how it may load is said there, or else by ``--loadability``."""
    if text is None:
        return None
    return ElasticConfig.from_dict({"loadability": loadability, **json_or_file(text, what="space", error=SpaceError)})


def given_architecture(text: str) -> dict[str, int | str]:
    data = json_or_file(text, what="architecture", error=ArchitectureError)
    found = data.get("architecture", data)  # an exported model's architecture.json holds more
    if not isinstance(found, dict):
        raise ArchitectureError(f"architecture must be a JSON object of choices, got {type(found).__name__}")
    return found
