"""Benchmarks of trained architectures, on which scores are ranked.

Read are the FlexiBERT benchmark (JSON lines with ``encoder_layers``), LiteTransformerSearch (JSON lines with ``arch``
and ``params``), and any CSV that has a column of the truth. Whatever else a file holds is named in one line.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hf_elastic.errors import DataError
from hf_elastic.proxies.shapes import Floats, ShapeBatch

Setting = Literal["published", "specified", "trained"]
_FORMATS = (
    "known: FlexiBERT's JSON lines (hidden_size, encoder_layers, scores), LiteTransformerSearch's (arch, params, ppl), "
    "and CSV with a line of column names"
)


@dataclass(frozen=True)
class BenchmarkRows:
    """Architectures of a benchmark, ``N`` of them.

    Attributes:
        name: of the benchmark and how it was read.
        truth: ``(N,)``, what they reached once trained; larger is better.
        truth_name: of the truth in the file, with a minus where that was turned round.
        shapes: sizes of the architectures, where the file has them.
        published: ``(N,)`` each, other numbers of the rows by their names in the file, as stored.
        left_out: rows without a truth.
        causal: whether they are causal language models; ``None`` where the file does not say.

    Raises:
        DataError: numbers or shapes are not of as many architectures as the truth.
    """

    name: str
    truth: Floats
    truth_name: str
    shapes: ShapeBatch | None
    published: Mapping[str, Floats]
    left_out: int = 0
    causal: bool | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.published.items()}
        lengths |= {"shapes": len(self.shapes)} if self.shapes is not None else {}
        for name, length in lengths.items():
            if length != len(self.truth):
                raise DataError(f"{name} is of {length} architectures, but the truth of {len(self.truth)}")


def read_benchmark(
    path: str | Path, *, setting: Setting | None = None, truth: str | None = None, smaller_is_better: bool = False
) -> BenchmarkRows:
    """Reads a benchmark of whichever format its fields tell.

    Args:
        path: the file.
        setting: of FlexiBERT, see :func:`read_flexibert`; by default as specified.
        truth: what counts as the truth: a GLUE task, a perplexity, or the column of a CSV, which has no default.
        smaller_is_better: of the truth in a CSV; the other formats know.

    Raises:
        DataError: the file cannot be read, is empty, of another format, or an option does not fit its format.
    """
    path = Path(path)
    start = next((line for line in _text(path).splitlines() if line.strip()), "").strip()
    fields = set(_Row.parsed(start, where=f"{path}, first line").data) if start.startswith("{") else set()
    unfit = {"setting": setting is not None, "smaller_is_better": smaller_is_better}
    if {"hidden_size", "encoder_layers", "scores"} <= fields:
        _refuse(unfit, ("smaller_is_better",), path=path, kind="FlexiBERT")
        return read_flexibert(path, setting=setting or "specified", truth=truth or "glue")
    if {"arch", "params"} <= fields:
        _refuse(unfit, ("setting", "smaller_is_better"), path=path, kind="LiteTransformerSearch")
        return read_lts(path, truth=truth or "valid_ppl")
    if fields or start.startswith(("{", "[")):
        raise DataError(f"{path} is no benchmark (fields: {', '.join(sorted(fields)) or 'none'}); {_FORMATS}")
    _refuse(unfit, ("setting",), path=path, kind="CSV")
    if truth is None:
        raise DataError(f"{path} is read as CSV: say which of its columns is the truth ({start[:200]})")
    return read_csv(path, truth=truth, smaller_is_better=smaller_is_better)


def _refuse(given: Mapping[str, bool], names: Sequence[str], *, path: Path, kind: str) -> None:
    for name in names:
        if given[name]:
            raise DataError(f"{name} does not apply to {path}, which is of the format {kind}")


# -- FlexiBERT ---------------------------------------------------------------------------------------------------------

_PUBLISHED_HIDDEN, _PUBLISHED_FFN = 256, 1024
_VOCABULARY, _POSITIONS, _TYPES, _EMBEDDING = 30522, 512, 2, 128


def read_flexibert(path: str | Path, *, setting: Setting = "specified", truth: str = "glue") -> BenchmarkRows:
    """Reads the FlexiBERT benchmark (Serianni & Kalita 2023; the data is CC BY 4.0).

    Its files say one thing, the published metrics were computed on another, and a third was trained:

    * ``published``: every row has hidden size 256 and FFNs of 1024, as the models of the published metrics had. The
      parameters are the published "Number of Parameters" to the last one.
    * ``specified``: the sizes and operators of the row.
    * ``trained``: every operator is plain attention, and the first FFN matrix widens to four times the hidden size; the
      row's ``feed_forward_dimension`` holds for those after it. So does the training code that the scores come from.

    Matrices count as they are in the source's PyTorch layers, where each is an ``nn.Linear``. Attention: query, key and
    value; one more where it is multiplicative (``WMA``); of a span-based dynamic convolution (``DSC``) query, key,
    value and convolution output to half the hidden size, and the generator of kernels; of a linear transform none. All
    have one more, the output (of a linear transform the input). The depthwise and pointwise convolutions of ``DSC`` are
    parameters but no matrices here. FFN: ``num_feed_forward`` widths between the hidden size, so one matrix more than
    that. Embeddings are of 128, with a projection to the hidden size where that differs; ``decoder_parameters`` are
    without all of these.

    Args:
        path: JSON lines.
        setting: see above.
        truth: one of the row's ``scores``.

    Raises:
        DataError: the file cannot be read, is empty, a field is missing or of another kind.
    """
    if setting not in get_args(Setting):
        raise DataError(f"setting={setting!r} is not one of {', '.join(get_args(Setting))}")
    rows = _json_rows(Path(path))
    sizes = [_flexibert_sizes(row, setting) for row in rows]
    metrics = [row.part("published_metrics") for row in rows] if "published_metrics" in rows[0].data else []
    published = _columns(metrics, list(metrics[0].data) if metrics else [])
    published |= _columns(rows, [name for name in ("train_seconds",) if name in rows[0].data])
    scores = np.array([row.part("scores").number(truth) for row in rows])
    return BenchmarkRows(f"FlexiBERT as {setting}", scores, truth, _batch(sizes), published, causal=False)


@dataclass(frozen=True)
class _Sizes:
    """One candidate of a :class:`ShapeBatch`."""

    attention: list[tuple[int, int]]
    ffn: list[tuple[int, int]]
    depth: int
    width: int
    parameters: float
    decoder_parameters: float


def _batch(sizes: Sequence[_Sizes]) -> ShapeBatch:
    return ShapeBatch.padded(
        attention=[one.attention for one in sizes],
        ffn=[one.ffn for one in sizes],
        depth=[one.depth for one in sizes],
        width=[one.width for one in sizes],
        parameters=[one.parameters for one in sizes],
        decoder_parameters=[one.decoder_parameters for one in sizes],
    )


def _flexibert_sizes(row: _Row, setting: Setting) -> _Sizes:
    hidden = row.size("hidden_size") if setting != "published" else _PUBLISHED_HIDDEN
    attention: list[tuple[int, int]] = []
    ffn: list[tuple[int, int]] = []
    others = 0
    layers = row.parts("encoder_layers")
    for layer in layers:
        found, more = _operator(layer, hidden) if setting != "trained" else _attention_operator(hidden, matrices=3)
        attention += [*found, (hidden, hidden)]
        neurons = _PUBLISHED_FFN if setting == "published" else layer.size("feed_forward_dimension")
        widths = [neurons] * layer.size("num_feed_forward")
        if setting == "trained":
            widths[0] = 4 * hidden
        ffn += list(zip([hidden, *widths], [*widths, hidden], strict=True))
        # Biases of the operator's output and of the FFN, and the scale and shift of the layer's norm.
        others += more + hidden + sum(widths) + hidden + 2 * hidden
    decoder = others + sum(n * m for n, m in [*attention, *ffn])
    rows = _VOCABULARY + _POSITIONS + _TYPES + 2  # the tables, and the scale and shift of their norm
    projection = hidden * (_EMBEDDING + 1) if hidden != _EMBEDDING else 0
    return _Sizes(attention, ffn, len(layers), hidden, decoder + rows * _EMBEDDING + projection, decoder)


def _attention_operator(hidden: int, *, matrices: int) -> tuple[list[tuple[int, int]], int]:
    """Square matrices, three of them with a bias, and a norm."""
    return [(hidden, hidden)] * matrices, 3 * hidden + 2 * hidden


def _operator(layer: _Row, hidden: int) -> tuple[list[tuple[int, int]], int]:
    """Matrices of a layer's operator without its output, and its parameters beside them.

    Raises:
        DataError: there is no such operator.
    """
    kind, option = layer.data.get("operation_type"), layer.data.get("operation_parameter")
    if kind == "SA" and option in ("SDP", "WMA"):
        return _attention_operator(hidden, matrices=4 if option == "WMA" else 3)
    if kind == "LT" and option in ("DFT", "DCT"):
        return [], 0
    if kind != "DSC":
        raise DataError(f"{layer.where}: operator {kind!r} with {option!r} is none of SA SDP|WMA, LT DFT|DCT, DSC size")
    half = hidden // 2
    kernel = layer.size("operation_parameter")
    taps = max(1, layer.size("num_operation_heads") // 2) * kernel
    separable = hidden * kernel + half * hidden + half
    return [(half, hidden)] * 4 + [(taps, half)], 4 * half + taps + separable + 2 * hidden


# -- LiteTransformerSearch ---------------------------------------------------------------------------------------------


def read_lts(path: str | Path, *, truth: str = "valid_ppl") -> BenchmarkRows:
    """Reads LiteTransformerSearch (Javaheripi et al. 2022; the data is MIT licensed): decoders and their perplexity.

    A GPT-2 layer has four matrices of attention, query, key and value apart although they are stored as one, and two of
    the FFN; Transformer-XL has a fifth, of relative positions. Which of them a row is, its own count of attention
    parameters says: the half of LM1B's GPT-2 rows at hand counts five, whatever its name. Parameters are those of the
    file, where ``decoder_parameters`` are ``nonembedding``. The truth is ``-perplexity``. Rows off the grid of the
    published space are read as all others.

    Args:
        path: JSON lines.
        truth: which perplexity, where the file has several; rows without it are left out and counted.

    Raises:
        DataError: the file cannot be read, is empty, has no perplexity, a field is missing or of another kind.
    """
    rows = _json_rows(Path(path))
    kept = [(row, value) for row in rows if (value := _perplexity(row, truth)) is not None]
    if not kept:
        known = ", ".join(sorted({name for row in rows for name in _named(row.data.get("ppl"))}))
        raise DataError(f"{path} has no row with ppl {truth!r}; its rows have {known or 'none by name'}")
    trained = [row for row, _ in kept]
    published = _columns([row.part("params") for row in trained], ["AdaEmb", "Attn", "FFN"])
    published |= _columns(trained, [name for name in ("latency", "memory") if name in trained[0].data])
    if isinstance(trained[0].data["ppl"], dict) and "train_elapsed" in trained[0].data["ppl"]:
        published |= _columns([row.part("ppl") for row in trained], ["train_elapsed"])
    return BenchmarkRows(
        name=f"LiteTransformerSearch {trained[0].data.get('space', '')}".strip(),
        truth=-np.array([value for _, value in kept]),
        truth_name=f"-{truth}" if isinstance(trained[0].data["ppl"], dict) else "-ppl",
        shapes=_batch([_lts_sizes(row) for row in trained]),
        published=published,
        left_out=len(rows) - len(kept),
        causal=True,
    )


_ONE_PERPLEXITY = "valid_ppl"  # what the one number of a row is


def _perplexity(row: _Row, name: str) -> float | None:
    held = row.data.get("ppl")
    if isinstance(held, dict):
        if "ppl" not in name:
            raise DataError(f"truth {name!r} is no perplexity; there are {', '.join(k for k in held if 'ppl' in k)}")
        return row.part("ppl").number(name) if held.get(name) is not None else None
    if held is not None and name not in (_ONE_PERPLEXITY, "ppl"):
        raise DataError(f"{row.where}: ppl is one number, so there is no truth {name!r}; leave it out")
    return row.number("ppl") if held is not None else None


def _named(held: object) -> Sequence[str]:
    return list(held) if isinstance(held, dict) else []


def _lts_sizes(row: _Row) -> _Sizes:
    arch, counted = row.part("arch"), row.part("params")
    depth, width = arch.size("n_layer"), arch.size("d_model")
    attention: list[tuple[int, int]] = []
    given = arch.data.get("d_head", -1)
    for heads in arch.sizes("n_head", depth):
        inner = heads * given if isinstance(given, int) and given > 0 else width  # -1: heads share the width
        attention += [(inner, width)] * 4
    square = sum(n * m for n, m in attention) // 4
    if counted.number("Attn") >= 5 * square:  # noqa: PLR2004
        attention += attention[::4]
    ffn = [size for neurons in arch.sizes("d_inner", depth) for size in ((neurons, width), (width, neurons))]
    return _Sizes(attention, ffn, depth, width, counted.number("total"), counted.number("nonembedding"))


# -- CSV ---------------------------------------------------------------------------------------------------------------


def read_csv(path: str | Path, *, truth: str, smaller_is_better: bool = False) -> BenchmarkRows:
    """Reads architectures from a CSV with a line of column names.

    All columns of numbers beside the truth are published metrics; columns without a number, such as names, are not
    used.

    Args:
        path: the file, comma-separated.
        truth: the column of what was measured.
        smaller_is_better: of the truth, as of a perplexity.

    Raises:
        DataError: the file cannot be read or is empty, there is no such column, a row has more or fewer cells than
            there are columns, or a number is missing or not finite.
    """
    columns = _csv_columns(Path(path))
    if truth not in columns:
        raise DataError(f"{path} has no column {truth!r}; its columns: {', '.join(columns)}")
    found = {name: _csv_numbers(cells, f"{path}, column {name!r}") for name, cells in columns.items()}
    measured = found.pop(truth)
    if measured is None:
        raise DataError(f"{path}, column {truth!r} holds no numbers, such as {columns[truth][0][1][:40]!r}")
    published = {name: values for name, values in found.items() if values is not None}
    named = f"-{truth}" if smaller_is_better else truth
    return BenchmarkRows(Path(path).name, -measured if smaller_is_better else measured, named, None, published)


def _csv_columns(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Cells of each column with their line numbers."""
    reader = csv.reader(io.StringIO(_text(path)), strict=True, skipinitialspace=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no CSV: {error}; {_FORMATS}") from error
    if len(lines) < 2:  # noqa: PLR2004
        raise DataError(f"{path} holds no rows; {_FORMATS}")
    names = [name.strip() for name in lines[0][1]]
    if "" in names or len(set(names)) != len(names):
        raise DataError(f"{path}: column names are empty or occur twice: {', '.join(map(repr, names))}")
    for number, cells in lines[1:]:
        if len(cells) != len(names):
            raise DataError(f"{path}, line {number} has {len(cells)} cells, but there are {len(names)} columns")
    return {name: [(number, cells[i].strip()) for number, cells in lines[1:]] for i, name in enumerate(names)}


def _csv_numbers(cells: Sequence[tuple[int, str]], where: str) -> Floats | None:
    """Cells as numbers, or ``None`` where none is one.

    Raises:
        DataError: some are and some are not, or one is not finite.
    """
    found = [_float(text) for _, text in cells]
    if all(value is None for value in found):
        return None
    for (number, text), value in zip(cells, found, strict=True):
        if value is None or not math.isfinite(value):
            raise DataError(f"{where}, line {number}: {text[:40]!r} is no finite number")
    return np.array(found, dtype=np.float64)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# -- JSON lines --------------------------------------------------------------------------------------------------------


_LARGEST = 1e300  # whole numbers of JSON may be beyond what a float holds


@dataclass(frozen=True)
class _Row:
    """A JSON object and where it stands. What is not as asked for raises :class:`DataError`."""

    data: Mapping[str, Any]
    where: str

    @classmethod
    def parsed(cls, line: str, *, where: str) -> _Row:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON object of one line: {error}") from error
        return cls.of(data, where=where)

    @classmethod
    def of(cls, data: object, *, where: str) -> _Row:
        if not isinstance(data, dict):
            raise DataError(f"{where} is a {type(data).__name__}, expected an object")
        return cls(data, where)

    def number(self, name: str) -> float:
        value = self._held(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise DataError(f"{self.where}: {name} is {str(value)[:40]!r}, expected a finite number")
        return float(value)

    def size(self, name: str) -> int:
        return _size(self._held(name), f"{self.where}: {name}")

    def sizes(self, name: str, count: int) -> list[int]:
        """A list of ``count`` sizes, or one that holds for all."""
        held = self._held(name)
        values = held if isinstance(held, list) else [held] * count
        if len(values) != count:
            raise DataError(f"{self.where}: {name} has {len(values)} entries for {count} layers")
        return [_size(value, f"{self.where}: {name}") for value in values]

    def part(self, name: str) -> _Row:
        return _Row.of(self._held(name), where=f"{self.where}: {name}")

    def parts(self, name: str) -> list[_Row]:
        held = self._held(name)
        if not isinstance(held, list) or not held:
            raise DataError(f"{self.where}: {name} is no list of at least one")
        return [_Row.of(one, where=f"{self.where}: {name}[{index}]") for index, one in enumerate(held)]

    def _held(self, name: str) -> Any:
        if name not in self.data:
            raise DataError(f"{self.where} has no field {name!r}; it has {', '.join(self.data) or 'none'}")
        return self.data[name]


def _size(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise DataError(f"{where} is {str(value)[:40]!r}, expected a positive whole number")
    return value


def _json_rows(path: Path) -> list[_Row]:
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    return [_Row.parsed(line, where=f"{path}, line {number}") for number, line in lines]


def _columns(rows: Sequence[_Row], names: Sequence[str]) -> dict[str, Floats]:
    return {name: np.array([row.number(name) for row in rows]) for name in names}


def _text(path: Path) -> str:
    """All of a file.

    Raises:
        DataError: it cannot be read, is no text, or has nothing in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is no text file: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty; {_FORMATS}")
    return text
