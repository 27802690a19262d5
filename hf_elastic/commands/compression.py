"""``hf-elastic sparsify``, ``quantize`` and ``merge``: zeros and integers, and adapters merged so that both stay."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_elastic.commands.arguments import (
    Data,
    LabelColumn,
    Model,
    Output,
    SequenceLength,
    Task,
    TextColumn,
    given_architecture,
    parse_limits,
)
from hf_elastic.compression.quantization import QuantizationMethod
from hf_elastic.compression.sparsity import Pattern, SparsityMethod
from hf_elastic.pipeline import CompressOptions as Default
from hf_elastic.pipeline.compressed_base import Compression, compress_checkpoint, merge_adapter


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
    point = architecture if named else given_architecture(architecture)
    report = merge_adapter(
        base, adapter, output, architecture=point, allow_dense=allow_dense, float_base=float_base, task=task
    )
    typer.echo(str(report))
