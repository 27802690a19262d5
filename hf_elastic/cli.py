"""``hf-elastic``: compress a checkpoint, make a small one, search or export a step at a time, describe any folder."""

# ruff: noqa: E402

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# peft imports bitsandbytes, which on some processors warns of a kernel that nobody asked for, on the stream where an
# error is to be the only line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from hf_elastic.architecture import read_json_object
from hf_elastic.checkpoint import export as export_subnet
from hf_elastic.compression.quantization import QuantizationMethod
from hf_elastic.compression.sparsity import Pattern, SparsityMethod
from hf_elastic.declaration import ElasticConfig, Loadability
from hf_elastic.errors import ArchitectureError, ElasticError, SpaceError
from hf_elastic.pipeline import CompressOptions as Default
from hf_elastic.pipeline import CompressRun, ElmRun, LoraRun, export_family, front_row, open_for_export, search_run
from hf_elastic.pipeline import ElmOptions as Elm
from hf_elastic.pipeline.compressed_base import Compression, compress_checkpoint, merge_adapter
from hf_elastic.pipeline.elm_data import require_stock
from hf_elastic.pipeline.elm_options import Distilled, Fused, Start, in_words_of_options
from hf_elastic.pipeline.elm_run import require_no_elm_run
from hf_elastic.pipeline.options import Device, Precision, Recipe, TaskName
from hf_elastic.pipeline.reproduction import reproduce
from hf_elastic.pipeline.scoring import RankingOptions, score_source
from hf_elastic.pipeline.tasks import one_line
from hf_elastic.proxies import Setting
from hf_elastic.report import describe_folder
from hf_elastic.supernet import Loadability as Form
from hf_elastic.tables.timing import Phase

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make Hugging Face language models elastic.",
)

_WITHIN_HELP = (
    "Limit such as parameters=0.6 or macs=0.7 (at 128 tokens): up to 1 a fraction of the parent's, above 1 absolute. "
    "May be repeated."
)
Within = Annotated[list[str], typer.Option(help=_WITHIN_HELP)]
Data = Annotated[list[str], typer.Option(help=".txt, .jsonl or .csv file to calibrate on, or data set. Repeatable.")]
Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or its name on the Hub.")]
Output = Annotated[str, typer.Option(help="Folder to write.")]
Task = Annotated[TaskName, typer.Option(help="What the model is for.")]
SequenceLength = Annotated[int, typer.Option(help="Longest sequence in tokens.")]
TextColumn = Annotated[str, typer.Option(help="Column of rows that holds text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of rows that holds labels.")]


@app.command("compress")
def compress_command(
    model: Model,
    *,
    data: Annotated[list[str], typer.Option(help=".txt, .jsonl or .csv file, or data set name[:split]. Repeatable.")],
    output: Annotated[str, typer.Option(help="Folder of the smaller model; the work is kept in OUTPUT.run.")],
    within: Annotated[
        list[str] | None,
        typer.Option(help=f"{_WITHIN_HELP} parameters=0.6 unless another budget is given."),
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
        space=_space(space, loadability),
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
    with _resumable():
        run = (CompressRun if lora is None else LoraRun)(options, say=typer.echo)
        if dry_run:
            typer.echo(run.dry_run())
        else:
            run.run()


@app.command("elm")
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
    with _named_as_options(), _resumable():
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


@contextmanager
def _resumable() -> Iterator[None]:
    """Says of an interrupted command that it goes on."""
    try:
        yield
    except KeyboardInterrupt:  # typer would end without a word
        typer.echo("hf-elastic: interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


@app.command("family")
def family_command(
    run: Annotated[str, typer.Argument(help="Run folder that compress made (OUTPUT.run), of any recipe.")],
    *,
    speedup: Annotated[list[str], typer.Option(help="Times faster, such as 1.7 or 1.7@16x128. Repeat it.")],
    output: Annotated[str | None, typer.Option(help="Holds a folder for each; OUTPUT.family of the run else.")] = None,
    phase: Annotated[Phase | None, typer.Option(help="What speed-ups are of; as the run was told else.")] = None,
) -> None:
    """Export several nested sizes of a finished run, with one table. Interrupted, the same command goes on."""
    require_no_elm_run(Path(run))
    with _resumable():
        export_family(run, speedup, output=output, phase=phase, say=typer.echo)


@app.command("info")
def info_command(
    folder: Annotated[str, typer.Argument(help="A checkpoint, an export, a supernet or a run.")],
) -> None:
    """Describe any checkpoint, search space or run."""
    typer.echo(describe_folder(Path(folder)))


@app.command("search")
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


@app.command("export")
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
) -> None:
    """Write one architecture of a supernet as a checkpoint."""
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
        point = handle.space.canonical(_architecture(architecture))
    report = export_subnet(handle, point, output, loadability=loadability, source=parent, overwrite=overwrite)
    typer.echo(str(report))


@app.command("sparsify")
def sparsify_command(
    model: Model,
    *,
    data: Data,
    output: Output,
    sparsity: Annotated[float, typer.Option(help="Share of zeros.")] = 0.5,
    pattern: Annotated[Pattern, typer.Option(help="2:4: two of every four inputs.")] = "unstructured",
    method: Annotated[SparsityMethod, typer.Option(help="What weights are ranked by.")] = "wanda",
    override: Annotated[list[str] | None, typer.Option(help="Another share for layers: down_proj=0.4. Repeat.")] = None,
    task: Task = Default.task,
    sequence_length: SequenceLength = Default.sequence_length,
    text_column: TextColumn = Default.text_column,
    label_column: LabelColumn = Default.label_column,
) -> None:
    """Set the least important weights to zero and print what that cost. Shapes, and so speed, stay."""
    overrides = parse_limits(override) if override else None
    settings = {"sparsity": sparsity, "pattern": pattern, "method": method, "overrides": overrides}
    options = Default(
        model=model, data=tuple(data), output=output, task=task, sequence_length=sequence_length,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    compress_checkpoint(options, Compression("sparsify", settings), say=typer.echo)


@app.command("quantize")
def quantize_command(
    model: Model,
    *,
    data: Data,
    output: Output,
    bits: Annotated[int, typer.Option(help="From 2 to 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = Default.group_size,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Finer, but files are of 8 bits.")] = False,
    method: Annotated[
        QuantizationMethod, typer.Option(help="rtn rounds without text (the table needs some), but costs quality.")
    ] = "gptq",
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave, by the end of their name. Repeat.")] = None,
    task: Task = Default.task,
    sequence_length: SequenceLength = Default.sequence_length,
    text_column: TextColumn = Default.text_column,
    label_column: LabelColumn = Default.label_column,
) -> None:
    """Round the linear layers to integers and print what that cost; sparse models stay sparse."""
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": not asymmetric}
    settings |= {"method": method, "skip": tuple(skip or ())}
    options = Default(
        model=model, data=tuple(data), output=output, task=task, sequence_length=sequence_length,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    compress_checkpoint(options, Compression("quantize", settings), say=typer.echo)


@app.command("merge")
def merge_command(
    adapter: Annotated[str, typer.Argument(help="Folder of elastic adapters that save_pretrained wrote.")],
    *,
    base: Annotated[str, typer.Option(help="Folder or Hub name of what they were trained on.")],
    output: Output,
    architecture: Annotated[str, typer.Option(help="largest, midpoint, smallest, JSON or a file of it.")] = "largest",
    allow_dense: Annotated[bool, typer.Option("--allow-dense", help="Fill zeros of the base.")] = False,
    float_base: Annotated[
        str | None, typer.Option(help="What the base was rounded from, where the adapters saw that.")
    ] = None,
    task: Task = Default.task,
) -> None:
    """Merge elastic adapters into their base; what was sparse or of integers stays so, or the command fails."""
    named = architecture in ("largest", "midpoint", "smallest")
    point = architecture if named else _architecture(architecture)
    report = merge_adapter(
        base, adapter, output, architecture=point, allow_dense=allow_dense, float_base=float_base, task=task
    )
    typer.echo(str(report))


@app.command("reproduce")
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
    with _resumable():
        settings = {"model": model, "steps": steps, "evaluations": evaluations, "seed": seed}
        typer.echo(reproduce(name, output=output, scale=scale, data=data, say=typer.echo, **settings))


@app.command("score")
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


def _json_or_file(text: str, *, what: str, error: type[ElasticError]) -> dict[str, Any]:
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


def _space(text: str | None, loadability: Loadability) -> ElasticConfig | None:
    """The space that was given; how it may load is said there, or else by ``--loadability``."""
    if text is None:
        return None
    return ElasticConfig.from_dict({"loadability": loadability, **_json_or_file(text, what="space", error=SpaceError)})


def _architecture(text: str) -> dict[str, int | str]:
    data = _json_or_file(text, what="architecture", error=ArchitectureError)
    found = data.get("architecture", data)  # an exported model's architecture.json holds more
    if not isinstance(found, dict):
        raise ArchitectureError(f"architecture must be a JSON object of choices, got {type(found).__name__}")
    return found


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
