"""``hf-elastic``: compress a checkpoint, make a small one, search or export a step at a time, describe any folder."""

# ruff: noqa: E402

from __future__ import annotations

import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

# peft imports bitsandbytes, which on some processors warns of a kernel that nobody asked for, on the stream where an
# error is to be the only line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from hf_elastic.checkpoint import export as export_subnet
from hf_elastic.commands.arguments import (
    WITHIN_HELP,
    LabelColumn,
    Model,
    SequenceLength,
    Task,
    TextColumn,
    Within,
    given_architecture,
    given_space,
    parse_limits,
    resumable,
)
from hf_elastic.commands.compression import merge_command, quantize_command, sparsify_command
from hf_elastic.commands.elm import elm_command
from hf_elastic.commands.strict import StrictCommand
from hf_elastic.declaration import Loadability
from hf_elastic.errors import ElasticError, ExportError
from hf_elastic.evaluation.command import evaluate_command
from hf_elastic.hub.command import push_command
from hf_elastic.pipeline import CompressOptions as Default
from hf_elastic.pipeline import CompressRun, LoraRun, export_family, front_row, open_for_export, search_run
from hf_elastic.pipeline.elm_data import require_stock
from hf_elastic.pipeline.elm_run import require_no_elm_run
from hf_elastic.pipeline.options import Device, Precision, Recipe
from hf_elastic.pipeline.reproduction import reproduce
from hf_elastic.pipeline.scoring import RankingOptions, score_source
from hf_elastic.pipeline.tasks import one_line
from hf_elastic.proxies import Setting
from hf_elastic.report import describe_folder
from hf_elastic.reporting.command import report_command, try_command
from hf_elastic.runtimes.command import (
    DataOption,
    Format,
    Int8Option,
    LengthOption,
    PastOption,
    PrecisionOption,
    VocabularyOption,
    convert_command,
    convert_folder,
)
from hf_elastic.supernet import Loadability as Form
from hf_elastic.tables.timing import Phase
from hf_elastic.workers.command import worker_command

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make Hugging Face language models elastic.",
)


@app.command("compress", cls=StrictCommand)
def compress_command(
    model: Model,
    *,
    data: Annotated[list[str], typer.Option(help=".txt, .jsonl or .csv file, or data set name[:split]. Repeatable.")],
    output: Annotated[str, typer.Option(help="Folder of the smaller model; the work is kept in OUTPUT.run.")],
    within: Annotated[
        list[str] | None,
        typer.Option(help=f"{WITHIN_HELP} parameters=0.6 unless another budget is given."),
    ] = None,
    speedup: Annotated[str | None, typer.Option(help="Times faster, such as 1.7 or 1.7@16x128 (1x128 else).")] = None,
    latency: Annotated[str | None, typer.Option(help="Of a forward, such as 8ms or 8ms@16x128.")] = None,
    memory: Annotated[str | None, typer.Option(help="Weights and KV cache, such as 6GB or 6GB@8x2048.")] = None,
    phase: Annotated[Phase, typer.Option(help="What speed-up and latency are of.")] = Default.phase,
    task: Task = Default.task,
    recipe: Annotated[
        Recipe, typer.Option(help="fast: no training; balanced: trains its answer; best: searches a supernet.")
    ] = Default.recipe,
    minutes: Annotated[float, typer.Option(help="Training time, unless fast.")] = Default.minutes,
    evaluations: Annotated[int, typer.Option(help="Architectures to evaluate.")] = Default.evaluations,
    loadability: Annotated[Loadability, typer.Option(help="any may need trust_remote_code.")] = Default.loadability,
    space: Annotated[
        str | None, typer.Option(help="ElasticConfig as JSON, or a file of it; else a default one.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="Ranks of elastic adapters, r=32,24,16; with --space the frozen base is cut too.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="With --lora: share of zeros in the base, which the merged model keeps.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="With --lora: of the base's integers, which the merged model keeps.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="With --bits: inputs that share a scale.")] = Default.group_size,
    apart: Annotated[bool, typer.Option("--apart", help="Write the compressed base and a plain adapter.")] = False,
    sequence_length: SequenceLength = Default.sequence_length,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = Default.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = Default.learning_rate,
    text_column: TextColumn = Default.text_column,
    label_column: LabelColumn = Default.label_column,
    precision: Annotated[Precision, typer.Option(help="auto: whichever is faster here.")] = Default.precision,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Default.device,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = Default.seed,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show space, limits, loadability and time.")] = False,
) -> None:
    """Make a checkpoint smaller and print what that gained and cost. Interrupted, the same command goes on."""
    require_stock(model, command="compress")
    options = Default(
        model=model,
        data=tuple(data),
        output=output,
        within=parse_limits(within) if within else None,
        speedup=speedup,
        latency=latency,
        memory=memory,
        phase=phase,
        task=task,
        recipe=recipe,
        minutes=minutes,
        evaluations=evaluations,
        loadability=loadability,
        space=given_space(space, loadability),
        lora=lora,
        sparsity=sparsity,
        bits=bits,
        group_size=group_size,
        apart=apart,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        text_column=text_column,
        label_column=label_column,
        precision=precision,
        device=device,
        seed=seed,
    )
    with resumable():
        run = (CompressRun if lora is None else LoraRun)(options, say=typer.echo)
        if dry_run:
            typer.echo(run.dry_run())
        else:
            run.run()


app.command("elm", cls=StrictCommand)(elm_command)


@app.command("family", cls=StrictCommand)
def family_command(
    run: Annotated[str, typer.Argument(help="Run folder that compress made (OUTPUT.run), of any recipe.")],
    *,
    speedup: Annotated[list[str], typer.Option(help="Times faster, such as 1.7 or 1.7@16x128. Repeat it.")],
    output: Annotated[str | None, typer.Option(help="Holds a folder for each; OUTPUT.family of the run else.")] = None,
    phase: Annotated[Phase | None, typer.Option(help="What speed-ups are of; as the run was told else.")] = None,
) -> None:
    """Export several nested sizes of a finished run, with one table. Interrupted, the same command goes on."""
    require_no_elm_run(Path(run))
    with resumable():
        export_family(run, speedup, output=output, phase=phase, say=typer.echo)


@app.command("info", cls=StrictCommand)
def info_command(
    folder: Annotated[str, typer.Argument(help="A checkpoint, an export, a supernet or a run.")],
) -> None:
    """Describe any checkpoint, search space or run."""
    typer.echo(describe_folder(Path(folder)))


@app.command("search", cls=StrictCommand)
def search_command(
    run: Annotated[str, typer.Argument(help="Run folder that compress made (OUTPUT.run).")],
    *,
    within: Within,
    evaluations: Annotated[int, typer.Option(help="Architectures the search may evaluate.")] = 80,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
) -> None:
    """Search the trained supernet of a run again, under other limits; prints the front."""
    require_no_elm_run(Path(run))
    typer.echo(search_run(Path(run), within=parse_limits(within), evaluations=evaluations, seed=seed))


@app.command("export", cls=StrictCommand)
def export_command(
    supernet: Annotated[
        str, typer.Argument(help="Folder of a supernet, or run folder (its trained supernet is taken).")
    ],
    architecture: Annotated[
        str, typer.Argument(help="largest, midpoint, smallest, JSON or a file of it, or FILE#ROW.")
    ],
    *,
    output: Annotated[str, typer.Option(help="Folder to write.")],
    loadability: Annotated[Form | None, typer.Option(help="By default what the architecture needs.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
    format: Annotated[Format | None, typer.Option(help="For a runtime, in the place of a checkpoint.")] = None,
    int8: Int8Option = None,
    data: DataOption = None,
    sequence_length: LengthOption = 128,
    with_past: PastOption = False,
    precision: PrecisionOption = "f16",
    vocabulary: VocabularyOption = True,
) -> None:
    """Write one architecture of a supernet as a checkpoint, or for a runtime."""
    given = {"--int8": int8, "--data": data, "--with-past": with_past, "--no-vocabulary": not vocabulary}
    given |= {"--precision": precision != "f16", "--sequence-length": sequence_length != 128}
    if format is None and any(given.values()):
        names = ", ".join(name for name, value in given.items() if value)
        raise ExportError(f"{names} is of a runtime's form; add --format onnx, openvino or gguf")
    require_no_elm_run(Path(supernet))
    handle, parent = open_for_export(Path(supernet))
    points = {
        "largest": handle.space.largest,
        "midpoint": handle.space.midpoint,
        "smallest": handle.space.smallest,
    }
    if architecture in points:
        point = points[architecture]()
    elif re.fullmatch(r".+\.json#\d+", architecture):
        point = handle.space.canonical(front_row(architecture))
    else:
        point = handle.space.canonical(given_architecture(architecture))
    if format is None:
        written = export_subnet(handle, point, output, loadability=loadability, source=parent, overwrite=overwrite)
        typer.echo(str(written))
        return
    with tempfile.TemporaryDirectory() as aside:
        compact: Form | None = "remote-code" if handle.loadability(point) == "stock-padded" else None
        export_subnet(handle, point, f"{aside}/model", loadability=loadability or compact, source=parent)
        typer.echo(
            str(
                convert_folder(
                    f"{aside}/model", output, format=format.value, int8=None if int8 is None else int8.value,
                    data=data or (), sequence_length=sequence_length, with_past=with_past, precision=precision,
                    vocabulary=vocabulary, overwrite=overwrite,
                )
            )
        )  # fmt: skip


app.command("sparsify", cls=StrictCommand)(sparsify_command)
app.command("quantize", cls=StrictCommand)(quantize_command)
app.command("merge", cls=StrictCommand)(merge_command)


@app.command("reproduce", cls=StrictCommand)
def reproduce_command(
    name: Annotated[str, typer.Argument(help="Of a published result: lonas-bert or elm.")],
    *,
    output: Annotated[str, typer.Option(help="Folder that keeps what was measured.")],
    scale: Annotated[str, typer.Option(help="small: minutes on a CPU; full: the paper's own size.")] = "small",
    data: Annotated[str | None, typer.Option(help="Folder of the data; else HF_ELASTIC_DATA.")] = None,
    model: Annotated[str | None, typer.Option(help="Another checkpoint than the scale's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Of the search.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Run a published experiment again: what the paper has, what we have, what differs."""
    with resumable():
        settings = {"model": model, "steps": steps, "evaluations": evaluations, "seed": seed}
        typer.echo(reproduce(name, output=output, scale=scale, data=data, say=typer.echo, **settings))


@app.command("score", cls=StrictCommand)
def score_command(
    source: Annotated[
        str, typer.Argument(help="Benchmark file: FlexiBERT, LiteTransformerSearch or CSV; or folder of a checkpoint.")
    ],
    *,
    setting: Annotated[Setting | None, typer.Option(help="Of FlexiBERT; specified unless given.")] = None,
    truth: Annotated[str | None, typer.Option(help="GLUE task, perplexity, or column of the CSV.")] = None,
    smaller_is_better: Annotated[bool, typer.Option("--smaller-is-better", help="Of the truth in a CSV.")] = False,
    labelled: Annotated[int, typer.Option(help="Rows that alpha is fitted to.")] = RankingOptions.labelled,
    draws: Annotated[int, typer.Option(help="Of labelled rows.")] = RankingOptions.draws,
    seed: Annotated[int, typer.Option(help="Of draws and intervals.")] = RankingOptions.seed,
    resamples: Annotated[int, typer.Option(help="Of the intervals.")] = RankingOptions.resamples,
    json_file: Annotated[str | None, typer.Option("--json", help="File to write all numbers to.")] = None,
) -> None:
    """Show how well zero-cost proxies rank a benchmark's architectures, or score a checkpoint without loading it."""
    options = RankingOptions(
        setting=setting, truth=truth, smaller_is_better=smaller_is_better, labelled=labelled, draws=draws, seed=seed,
        resamples=resamples,
    )  # fmt: skip
    typer.echo(str(score_source(source, options, json_file=json_file)))


app.command("report", cls=StrictCommand)(report_command)
app.command("try", cls=StrictCommand)(try_command)
app.command("evaluate", cls=StrictCommand)(evaluate_command)
app.command("convert", cls=StrictCommand)(convert_command)
app.command("push", cls=StrictCommand)(push_command)
app.command("worker", cls=StrictCommand)(worker_command)


def main() -> None:
    """Entry point: errors a user can cause are one line, an interrupted run says how it goes on."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except ElasticError as error:
        typer.echo(f"hf-elastic: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"hf-elastic: {one_line(error)}", err=True)
        sys.exit(2)
