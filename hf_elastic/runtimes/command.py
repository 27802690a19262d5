"""The command ``hf-elastic convert``, and what ``hf-elastic export --format`` does behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_elastic.errors import DataError, ExportError


class Format(StrEnum):
    """What a checkpoint is converted to."""

    onnx = "onnx"
    openvino = "openvino"
    gguf = "gguf"


class Rounding(StrEnum):
    """How weights become integers."""

    dynamic = "dynamic"
    static = "static"


Precision = Literal["f32", "f16", "q8_0"]
_BATCH, _MOST_TEXTS = 8, 256

# Options of a runtime's form, as ``convert`` and ``export --format`` take them.
Int8Option = Annotated[
    Rounding | None, typer.Option(help="Integers, by the runtime's own quantisation; static reads --data.")
]
DataOption = Annotated[list[str] | None, typer.Option(help=".txt file to calibrate on. Repeatable.")]
LengthOption = Annotated[int, typer.Option(help="Longest text of --data in tokens.")]
PastOption = Annotated[
    bool, typer.Option("--with-past", help="A decoder's KV cache goes in and comes out (ONNX, OpenVINO).")
]
PrecisionOption = Annotated[str, typer.Option(help="Of GGUF: f32, f16 or q8_0.")]
VocabularyOption = Annotated[bool, typer.Option(help="Of GGUF: write the tokenizer.")]


def convert_command(
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint: an export, or any other.")],
    *,
    format: Annotated[Format, typer.Option(help="What to write.")],
    output: Annotated[str, typer.Option(help="Folder to write.")],
    int8: Int8Option = None,
    data: DataOption = None,
    sequence_length: LengthOption = 128,
    with_past: PastOption = False,
    precision: PrecisionOption = "f16",
    vocabulary: VocabularyOption = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
) -> None:
    """Write a checkpoint for ONNX Runtime, OpenVINO or llama.cpp, compared with torch before it is there."""
    report = convert_folder(
        folder,
        output,
        format=format.value,
        int8=None if int8 is None else int8.value,
        data=data or (),
        sequence_length=sequence_length,
        with_past=with_past,
        precision=precision,
        vocabulary=vocabulary,
        overwrite=overwrite,
    )
    typer.echo(str(report))


def convert_folder(
    folder: str | Path,
    output: str | Path,
    *,
    format: str,
    int8: str | None = None,
    data: Sequence[str] = (),
    sequence_length: int = 128,
    with_past: bool = False,
    precision: str = "f16",
    vocabulary: bool = True,
    overwrite: bool = False,
) -> Any:
    """Converts a checkpoint folder.

    Args:
        folder: of a checkpoint that stands for itself.
        output: a folder that does not exist or is empty.
        format: ``onnx``, ``openvino`` or ``gguf``.
        int8: ``dynamic`` or ``static``, of the first two; GGUF has ``precision="q8_0"``, which ``int8`` also means.
        data: text files that ``static`` is calibrated on, with the folder's tokenizer.
        sequence_length: longest text of these in tokens.
        with_past: whether a decoder's KV cache goes in and comes out.
        precision: of GGUF's matrices.
        vocabulary: whether GGUF holds the tokenizer.
        overwrite: whether a non-empty folder may be replaced.

    Returns:
        A :class:`GraphReport` or a :class:`GgufReport`.

    Raises:
        ExportError: the format is unknown, an option is not one of the format's, or see the format's own function.
        DataError: text for the calibration is missing or cannot be read.
    """
    if format not in list(Format):
        raise ExportError(f"format={format!r} is not one of {', '.join(Format)}")
    if format == Format.gguf:
        if with_past:
            raise ExportError("llama.cpp has its own KV cache; leave --with-past")
        if int8 == Rounding.static or data:
            raise ExportError("GGUF's integers are calibrated on nothing: --precision q8_0, without --data")
        from hf_elastic.runtimes.gguf_export import export_gguf

        kind: Any = "q8_0" if int8 else precision
        return export_gguf(folder, output, precision=kind, vocabulary=vocabulary, overwrite=overwrite)
    if precision != "f16" or not vocabulary:
        raise ExportError(f"--precision and --no-vocabulary are GGUF's; of {format} there is --int8")
    if data and int8 != Rounding.static:
        raise ExportError("--data is what --int8 static is calibrated on; add that, or leave --data")
    batches = None
    if int8 == Rounding.static:
        batches = list(calibration_batches(folder, data, sequence_length=sequence_length))
    options: Any = {"int8": int8, "calibration": batches, "with_past": with_past, "overwrite": overwrite}
    if format == Format.onnx:
        from hf_elastic.runtimes.onnx_export import export_onnx

        return export_onnx(folder, output, **options)
    from hf_elastic.runtimes.openvino_export import export_openvino

    return export_openvino(folder, output, **options)


def calibration_batches(folder: str | Path, files: Sequence[str], *, sequence_length: int) -> Iterator[Any]:
    """Yields batches of token ids of the first lines of text files.

    Raises:
        DataError: there is no file, it cannot be read, or the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    if not files:
        raise DataError("--int8 static is calibrated on text: give --data FILE.txt (or --int8 dynamic)")
    texts: list[str] = []
    for file in files:
        try:
            texts += [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read text from {file}: {error}") from error
    if not texts:
        raise DataError(f"{', '.join(files)} hold no line of text")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} has no tokenizer for the text of --data") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, min(len(texts), _MOST_TEXTS), _BATCH):
        chosen = texts[start : start + _BATCH]
        yield dict(tokenizer(chosen, padding=True, truncation=True, max_length=sequence_length, return_tensors="pt"))
