"""``hf-elastic elm``: a teacher distilled into a small model of candidate blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hf_elastic.commands.arguments import LabelColumn, Model, Task, TextColumn, parse_limits, resumable
from hf_elastic.errors import ElasticError
from hf_elastic.pipeline import ElmOptions as Elm
from hf_elastic.pipeline import ElmRun
from hf_elastic.pipeline.elm_options import Distilled, Fused, Start, in_words_of_options
from hf_elastic.pipeline.options import Device, Precision
from hf_elastic.tables.timing import Phase


def elm_command(
    teacher: Model,
    *,
    data: Annotated[list[str], typer.Option(help=".txt, .jsonl or .csv file, or data set name[:split]. Repeatable.")],
    output: Annotated[str, typer.Option(help="Folder of the small model; the work is kept in OUTPUT.run.")],
    size: Annotated[str, typer.Option(help="small (15.7 M), tiny (10 M) or micro (5 M, with BERT's vocabulary).")] = (
        Elm.size
    ),
    layers: Annotated[int | None, typer.Option(help="Of the student; the teacher's are a multiple.")] = None,
    task: Task = Elm.task,
    epochs: Annotated[float, typer.Option(help="Of the supernet.")] = Elm.epochs,
    steps: Annotated[int | None, typer.Option(help="At most so many for the supernet.")] = None,
    retrain_epochs: Annotated[
        float | None,
        typer.Option(
            help="Of the found path; as many else, 0: none. Where --steps ends sooner, of STEPS/EPOCHS steps."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = Elm.batch_size,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = Elm.sequence_length,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = Elm.learning_rate,
    dropout: Annotated[float, typer.Option(help="Of the student.")] = Elm.dropout,
    distill: Annotated[Distilled, typer.Option(help="How states of student and teacher are compared.")] = Elm.distill,
    growth: Annotated[bool, typer.Option(help="Whether FFNs grow by their PCA scores.")] = Elm.growth,
    total_parameters: Annotated[float | None, typer.Option(help="That the mean path grows to.")] = None,
    growth_every: Annotated[int | None, typer.Option(help="Steps between growths; an eleventh else.")] = None,
    calc_freq: Annotated[int | None, typer.Option(help="Steps between PCA scores.")] = None,
    fusion: Annotated[Fused, typer.Option(help="What becomes of heads that write alike.")] = Elm.fusion,
    threshold: Annotated[
        float, typer.Option(help="CKA above which heads are alike, up to 1; two heads of a block stay.")
    ] = Elm.threshold,
    weights: Annotated[Start, typer.Option(help="That the found path is trained from.")] = Elm.weights,
    evaluations: Annotated[int, typer.Option(help="Paths to evaluate.")] = Elm.evaluations,
    within: Annotated[
        list[str] | None,
        typer.Option(help="Limit of the search such as total_parameters=5e6 or macs=0.7; up to 1 of the largest path."),
    ] = None,
    speedup: Annotated[str | None, typer.Option(help="Times faster than the teacher: 1.7 or 1.7@16x128.")] = None,
    latency: Annotated[str | None, typer.Option(help="Of a forward, such as 8ms or 8ms@16x128.")] = None,
    phase: Annotated[Phase, typer.Option(help="What speed-up and latency are of.")] = Elm.phase,
    finetune: Annotated[list[str] | None, typer.Option(help="Rows with labels to fine-tune on. Repeatable.")] = None,
    finetune_epochs: Annotated[float, typer.Option(help="Of that.")] = Elm.finetune_epochs,
    finetune_learning_rate: Annotated[float, typer.Option(help="Of that.")] = Elm.finetune_learning_rate,
    text_column: TextColumn = Elm.text_column,
    label_column: LabelColumn = Elm.label_column,
    stream: Annotated[bool, typer.Option("--stream", help="Read data while training; needs --steps.")] = Elm.stream,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 on a GPU.")] = Elm.precision,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Elm.device,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = Elm.seed,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show space, budget, growth and steps.")] = False,
) -> None:
    """Distil a teacher into a small model by ELM: supernet of blocks, growth, search, head fusion, retraining."""
    with _named_as_options(), resumable():
        options = Elm(
            teacher=teacher, data=tuple(data), output=output, size=size, layers=layers, task=task, epochs=epochs,
            steps=steps, retrain_epochs=retrain_epochs, batch_size=batch_size, sequence_length=sequence_length,
            learning_rate=learning_rate, dropout=dropout, distill=distill, growth=growth,
            total_parameters=total_parameters, growth_every=growth_every, calc_freq=calc_freq, fusion=fusion,
            threshold=threshold, weights=weights, evaluations=evaluations,
            within=parse_limits(within) if within else None, speedup=speedup, latency=latency, phase=phase,
            finetune=tuple(finetune or ()), finetune_epochs=finetune_epochs,
            finetune_learning_rate=finetune_learning_rate, text_column=text_column, label_column=label_column,
            stream=stream, precision=precision, device=device, seed=seed,
        )  # fmt: skip
        run = ElmRun(options, say=typer.echo)
        if dry_run:
            typer.echo(run.dry_run())
        else:
            run.run()


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Lets errors name options as they are typed."""
    try:
        yield
    except ElasticError as error:
        raise type(error)(in_words_of_options(str(error))) from error
