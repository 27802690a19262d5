"""Writes a model as GGUF, for llama.cpp: of one shape for all layers, or of several where ``deci`` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.checkpoint.companions import TOKENIZER_FILES, copy_companions, parent_folder
from hf_elastic.errors import CheckpointError, ExportError
from hf_elastic.files import whole_folder
from hf_elastic.runtimes.gguf_layouts import GgufLayout, gguf_layout, rope_of
from hf_elastic.runtimes.gguf_modules import gguf_pooling
from hf_elastic.runtimes.gguf_tensors import tensors_of
from hf_elastic.runtimes.gguf_vocabulary import Vocabulary, vocabulary_of
from hf_elastic.runtimes.opening import GGUF_FILE, first_line, open_model, require_package
from hf_elastic.supernet_folder import save_generation_config

Precision = Literal["f32", "f16", "q8_0"]
_BLOCK = 32  # weights that share a scale in q8_0; a row holds whole blocks


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        directory: the folder.
        architecture: llama.cpp's name.
        precision: of matrices; vectors are of 32 bits.
        vocabulary: llama.cpp's kind of tokenizer; ``none``: the file takes token ids alone.
        layers: that the file holds.
        finer: matrices that are of 16 bits instead, as their rows do not divide into blocks.
        notes: what a user has to know.
        size: bytes of the file.
    """

    directory: Path
    architecture: str
    precision: Precision
    vocabulary: str
    layers: int
    finer: tuple[str, ...]
    notes: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        tokens = "token ids alone" if self.vocabulary == "none" else f"tokenizer {self.vocabulary}"
        head = f"{self.directory / GGUF_FILE}: {self.architecture}, {self.layers} layers, {self.precision}, {tokens}"
        rest = [f"{len(self.finer)} matrices are f16: their rows are no multiple of {_BLOCK}"] if self.finer else []
        return "\n  ".join([f"{head}, {self.size / 1e6:.1f} MB", *rest, *self.notes])


def export_gguf(
    source: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    precision: Precision = "f16",
    vocabulary: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    parent: str | Path | None = None,
    overwrite: bool = False,
) -> GgufReport:
    """Writes a model as ``model.gguf``, with config and tokenizer beside it; every tensor is read back and compared.

    Args:
        source: folder of a checkpoint, stock or remote-code, or a plain model.
        output: a folder that does not exist or is empty.
        precision: of matrices.
        vocabulary: whether the tokenizer is written, so that llama.cpp takes text.
        tokenizer: instead of that of the parent's folder.
        parent: folder that the tokenizer is read from; by default ``source``.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        ExportError: the package is missing, llama.cpp has no architecture that holds the model, none that holds its
            tokenizer or pools tokens so, or there is no tokenizer; nothing is written.
        CheckpointError: the folder cannot be read or written.
    """
    require_package("gguf", extra="gguf")
    if precision not in get_args(Precision):
        raise ExportError(f"precision={precision!r} is not one of {', '.join(get_args(Precision))}")
    model = open_model(source)
    layout = gguf_layout(model.config, type(model).__name__)
    origin = str(parent or (model.config._name_or_path if isinstance(source, PreTrainedModel) else source) or "")
    pooling = gguf_pooling(parent_folder(origin)) if layout.architecture == "bert" else None
    words = _vocabulary(model, origin, tokenizer=tokenizer) if vocabulary else Vocabulary("none")
    with whole_folder(output, overwrite=overwrite) as folder:
        model.config.save_pretrained(folder)
        save_generation_config(model, folder)
        copy_companions(origin, folder, tokenizer=tokenizer)
        finer = _write(
            folder / GGUF_FILE, model, layout, words=words, precision=precision, origin=origin, pooling=pooling
        )  # fmt: skip
        _read_back(folder / GGUF_FILE, model, layout)
        size = (folder / GGUF_FILE).stat().st_size
    return GgufReport(
        Path(output), layout.architecture, precision, words.model, len(layout.layers), finer,
        (*layout.notes, *words.notes), size,
    )  # fmt: skip


def _vocabulary(model: PreTrainedModel, origin: str, *, tokenizer: PreTrainedTokenizerBase | None) -> Vocabulary:
    folder = parent_folder(origin)
    if tokenizer is None and (folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES[:1])):
        raise ExportError(
            f"no tokenizer.json in {origin or 'the parent, which was not loaded from a folder'}; pass tokenizer= or "
            "parent=, or vocabulary=False for a file that takes token ids alone"
        )
    try:
        found = tokenizer or AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has a tokenizer that cannot be loaded: {first_line(error)}") from error
    return vocabulary_of(found, size=int(model.config.vocab_size))


def _write(
    path: Path,
    model: PreTrainedModel,
    layout: GgufLayout,
    *,
    words: Vocabulary,
    precision: Precision,
    origin: str,
    pooling: str | None,
) -> tuple[str, ...]:
    """Writes the file; names of the matrices that are finer than asked for."""
    import gguf

    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_name(Path(origin).name or type(model).__name__)
    kinds = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kinds.get(precision, gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, model, layout)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType[pooling])
    _add_vocabulary(writer, words, size=int(model.config.vocab_size))
    finer = []
    for name, tensor in tensors_of(model, layout):
        kind = _kind(tensor, precision)
        finer += [name] if kind == "f16" and precision == "q8_0" else []
        stored = getattr(gguf.GGMLQuantizationType, kind.upper())
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tuple(finer)


def _kind(tensor: np.ndarray, precision: Precision) -> Precision:
    if tensor.ndim < 2:
        return "f32"
    return "f16" if precision == "q8_0" and tensor.shape[-1] % _BLOCK else precision


def _add_sizes(writer: Any, model: PreTrainedModel, layout: GgufLayout) -> None:
    config = model.config
    writer.add_block_count(len(layout.layers))
    writer.add_context_length(layout.context)
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(layout.sizes("width"))
    writer.add_head_count(layout.sizes("heads"))
    if layout.architecture in ("gpt2", "bert"):
        writer.add_layer_norm_eps(float(getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps))
    else:
        writer.add_head_count_kv(layout.sizes("groups"))
        writer.add_key_length(layout.head_dim)
        writer.add_value_length(layout.head_dim)
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
        writer.add_rope_dimension_count(layout.head_dim)
        writer.add_vocab_size(int(config.vocab_size))
        _add_rope(writer, rope_of(config))
    if layout.architecture == "bert":
        writer.add_causal_attention(False)
        writer.add_token_type_count(int(config.type_vocab_size))


def _add_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    import gguf

    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_vocabulary(writer: Any, words: Vocabulary, *, size: int) -> None:
    writer.add_tokenizer_model("no_vocab" if words.model == "none" else words.model)
    if words.model == "none":
        if writer.arch in ("gpt2", "bert"):
            writer.add_vocab_size(size)
        return
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.kinds))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    for name, number in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in words.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _read_back(path: Path, model: PreTrainedModel, layout: GgufLayout) -> None:
    """Checks that the file holds every tensor, each as near as its kind allows.

    Raises:
        ExportError: it does not.
    """
    import gguf

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    allowed = {"F32": 0.0, "F16": 1e-3, "Q8_0": 1 / 127}
    for name, wanted in tensors_of(model, layout):
        found = read.pop(name)
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(wanted.shape)
        limit = allowed[found.tensor_type.name] * max(float(np.abs(wanted).max(initial=0.0)), 1e-6)
        if not float(np.abs(values - wanted).max(initial=0.0)) <= limit:
            raise ExportError(f"{name} was written as something else; please report this with the model's config")
    if read:
        raise ExportError(f"the file holds {', '.join(sorted(read))} twice or by mistake")
