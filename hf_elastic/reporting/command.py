"""``hf-elastic report`` and ``hf-elastic try``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

_PAIR_HELP = "Two sentences: both models tell how alike they are (embeddings), or the label of the two together."


def report_command(
    run: Annotated[str, typer.Argument(help="Run folder (OUTPUT.run), of any command, finished or not.")],
    *,
    output: Annotated[str | None, typer.Option(help="HTML file to write; report.html in the run else.")] = None,
    figures: Annotated[str | None, typer.Option(help="Folder for every chart as a file of its own, too.")] = None,
    figure_format: Annotated[Literal["svg", "png"], typer.Option(help="Of these files.")] = "svg",
) -> None:
    """Write one HTML file that shows what a run did and found; it needs no network."""
    from hf_elastic.reporting.writing import write_figures, write_report

    path = write_report(run, output)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    if figures is not None:
        written = write_figures(run, figures, format=figure_format)
        typer.echo(f"{figures}: {len(written)} {figure_format} files")


def try_command(
    folder: Annotated[str, typer.Argument(help="What a run exported: a checkpoint or an adapter.")],
    *,
    parent: Annotated[str | None, typer.Option(help="Folder or Hub name; as the export says else.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on with, with a [MASK], to classify or to embed. Repeatable.")
    ] = None,
    pair: Annotated[tuple[str, str] | None, typer.Option(help=_PAIR_HELP)] = None,
    tokens: Annotated[int, typer.Option(help="That a causal model generates.", min=1)] = 32,
) -> None:
    """Put a smaller model beside its parent: what both make of a prompt, how fast, and how large."""
    from hf_elastic.reporting.trying import try_models

    prompts = [*(prompt or ()), *([pair] if pair else ())]
    typer.echo(try_models(folder, parent=parent, prompts=prompts, new_tokens=tokens))
