"""Which runtimes take an architecture: known before search and training, and told of any folder.

What a config can say decides, no weights are read. The rows about vLLM and llama.cpp follow rules that were read in
their sources (see :mod:`hf_elastic.runtimes.vllm_rules` and :mod:`hf_elastic.runtimes.gguf_layouts`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from hf_elastic.checkpoint.companions import MODULES, parent_folder
from hf_elastic.checkpoint.extraction import extract, extract_shapes
from hf_elastic.errors import CheckpointError, ElasticError, ExportError
from hf_elastic.files import read_json
from hf_elastic.models import MODEL_TYPES
from hf_elastic.models.elastic_layers import skipped_sublayers
from hf_elastic.packed_format import stated_quantisation
from hf_elastic.parts import Loadability
from hf_elastic.runtimes.gguf_layouts import gguf_layout
from hf_elastic.runtimes.gguf_modules import gguf_pooling
from hf_elastic.runtimes.graph_folder import RUNTIME_FILE, read_runtime_record
from hf_elastic.runtimes.opening import ADAPTER_FILE, gguf_file, open_config, routed_kinds
from hf_elastic.runtimes.vllm_rules import OWN_CLASSES, known_integers
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet
from hf_elastic.supernet_folder import SPACE_FILE

Answer = Literal["yes", "if", "no", "unknown"]
_EMBEDDED = ("BertModel", "RobertaModel", "ElasticBertModel", "DistilBertModel")
_TRUST = "trust_remote_code=True, or import hf_elastic first"


@dataclass(frozen=True)
class RuntimeRow:
    """What one runtime says.

    Attributes:
        runtime: its name.
        answer: ``if``: under the condition that ``reason`` names; ``unknown``: nothing that was read says so.
        reason: one line.
    """

    runtime: str
    answer: Answer
    reason: str


@dataclass(frozen=True)
class RunsWhere:
    """Where an architecture runs, a row for each runtime."""

    rows: tuple[RuntimeRow, ...]

    def __getitem__(self, runtime: str) -> RuntimeRow:
        return next(row for row in self.rows if row.runtime == runtime)

    def __str__(self) -> str:
        widest = max(len(row.runtime) for row in self.rows)
        longest = max(len(row.answer) for row in self.rows)
        return "\n".join(
            f"  {row.runtime.ljust(widest)}  {row.answer.ljust(longest)}  {row.reason}" for row in self.rows
        )  # fmt: skip

    def in_short(self) -> str:
        """One line: the answers, without their reasons."""
        return ", ".join(f"{row.runtime} {row.answer}" for row in self.rows)


@dataclass(frozen=True)
class _Form:
    """What decides where a checkpoint runs.

    Attributes:
        config: of it.
        class_name: of the model.
        form: how transformers loads it.
        folder: of it or its parent, where tokenizer and sentence-transformers modules are; ``None``: in none.
        stock_name: of the class that holds it padded; that of the model else.
        routed: kinds that are chosen while the model runs.
        quantised: what its config says of quantised weights; empty where they are floats.
    """

    config: PreTrainedConfig
    class_name: str
    form: Loadability
    folder: Path | None
    stock_name: str
    routed: tuple[str, ...] = ()
    quantised: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> bool:
        return self.folder is not None and (self.folder / MODULES).is_file()

    @property
    def remote(self) -> bool:
        return self.form == "remote-code"

    @property
    def causal(self) -> bool:
        return self.class_name.endswith(("ForCausalLM", "LMHeadModel"))

    def per_layer(self) -> set[str]:
        """What differs between layers: ``widths``, ``heads``, ``skips``, ``blocks``."""
        if self.config.model_type not in MODEL_TYPES:
            return set()
        layers: list[Any] = list(self.config.per_layer_config)
        names = type(self.config).per_layer_names  # type: ignore[attr-defined]
        width = names["intermediate_size"]
        heads = [name for key, name in names.items() if key != "intermediate_size"]
        skips = {part for layer in layers for part in skipped_sublayers(layer)}
        found = {"widths"} if len({getattr(layer, width) for layer in layers}) > 1 else set()
        found |= {"heads"} if len({tuple(getattr(layer, n) for n in heads) for layer in layers}) > 1 else set()
        found |= {"skips"} if "attention" in skips else set()
        found |= {"blocks"} if {getattr(layer, "block", "standard") for layer in layers} != {"standard"} else set()
        return found


def runs_where(supernet: Supernet, architecture: Architecture | Mapping[str, Value]) -> RunsWhere:
    """Says which runtimes take an architecture once it is exported; needs no training and no export.

    An architecture that a stock class holds only padded is judged padded for what loads checkpoints, and in its compact
    form for what is converted (ONNX, OpenVINO, GGUF).

    Args:
        supernet: unchanged.
        architecture: of it; adapters are taken to be merged.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    point = supernet.point(architecture)
    form = supernet.loadability(point)
    parent = parent_folder(str(supernet.base.config._name_or_path or ""))
    kinds = {choice.name.rsplit(".", 1)[-1] for part in supernet.router_parts for choice in part.choices}
    routed = tuple(sorted(kinds)) if any(part.routes(point) for part in supernet.router_parts) else ()
    config, name = _compact(supernet, point)
    made = _Form(config, name, form, parent, type(supernet.base).__name__, routed)
    return RunsWhere(tuple(_rows(made, padded=form == "stock-padded")))


def runs_where_space(supernet: Supernet, *, samples: int = 16, seed: int = 0) -> RunsWhere:
    """Says of a whole space where its architectures run, before anything is searched: shares of a sample.

    Args:
        supernet: unchanged.
        samples: drawn beside the largest and the smallest architecture; a space of fewer is looked at whole.
        seed: of the draws.
    """
    space = supernet.space
    if space.size <= samples + 2:
        points = list(space.architectures())
    else:
        rng = random.Random(seed)
        points = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(samples))]
    found = [runs_where(supernet, point).rows for point in dict.fromkeys(points)]
    return RunsWhere(tuple(_shared(rows) for rows in zip(*found, strict=True)))


def _shared(rows: Sequence[RuntimeRow]) -> RuntimeRow:
    """One row of what a runtime says of several architectures, the most frequent reason of each answer beside it."""
    counts = Counter(row.answer for row in rows)
    if len(counts) == 1 and len({row.reason for row in rows}) == 1:
        return rows[0]
    parts = []
    for answer, number in counts.most_common():
        reason = Counter(row.reason for row in rows if row.answer == answer).most_common(1)[0][0]
        parts.append(f"{answer} for {number / len(rows):.0%}, such as: {reason}")
    overall: Answer = rows[0].answer if len(counts) == 1 else "if"
    return RuntimeRow(rows[0].runtime, overall, "; ".join(parts))


def _compact(supernet: Supernet, point: Architecture) -> tuple[PreTrainedConfig, str]:
    """Config and class of the compact form, without copying weights where layers are cut."""
    if any(part.routes(point) for part in supernet.router_parts):
        return supernet.base.config, type(supernet.base).__name__  # that it routes decides
    if supernet.block_parts or (supernet.router_parts and supernet.loadability(point) != "stock"):
        model = extract(supernet, point, merge=False if supernet.adapter_parts else None)
        return model.config, type(model).__name__
    if not supernet.layer_parts or supernet.router_parts:
        return supernet.base.config, type(supernet.base).__name__
    try:
        model = extract_shapes(supernet, supernet.layer_shapes(point))
    except ExportError:  # a user's family without a static class: padded is all there is
        return supernet.base.config, type(supernet.base).__name__
    return model.config, type(model).__name__


def runs_where_folder(folder: str | Path) -> RunsWhere:
    """Says which runtimes take a folder: a checkpoint, an export, an adapter, or what was written for a runtime.

    Raises:
        CheckpointError: it is none of these, or its config is broken.
        ExportError: it holds a supernet, of which architectures are asked (:func:`runs_where`), or code of others.
    """
    path = Path(folder)
    try:
        return _of_folder(path)
    except ElasticError:
        raise
    except Exception as error:  # configs of transformers raise whatever their parts raise
        raise CheckpointError(f"the config in {path} is not what peft or transformers writes: {error!r}") from error


def _of_folder(path: Path) -> RunsWhere:
    if (path / ADAPTER_FILE).is_file():
        return RunsWhere(tuple(_adapter_rows(read_json(path / ADAPTER_FILE))))
    if (path / RUNTIME_FILE).is_file():
        record = read_runtime_record(path)
        loads = f"open_runtime, or any program with {record['runtime']}"
        return RunsWhere((RuntimeRow("ONNX / OpenVINO", "yes", f"as {record['model_file']}: {loads}"),))
    if found := gguf_file(path):
        return RunsWhere((RuntimeRow("GGUF / llama.cpp", "yes", f"as {found}: llama.cpp, or what is built on it"),))
    if (path / SPACE_FILE).is_file():
        raise ExportError(f"{path} holds a supernet: runs_where(supernet, architecture) says it of each architecture")
    config = open_config(path)
    name = next(iter(config.architectures or ()), "")
    if not name:
        raise CheckpointError(f"{path / 'config.json'} names no class in architectures")
    form: Loadability = "remote-code" if config.model_type in MODEL_TYPES else "stock"
    made = _Form(config, name, form, path, name, tuple(routed_kinds(config)), stated_quantisation(path) or {})
    return RunsWhere(tuple(_rows(made, padded=False)))


def _rows(made: _Form, *, padded: bool) -> Iterator[RuntimeRow]:
    yield _transformers(made, padded=padded)
    yield _peft(made)
    yield _sentence_transformers(made)
    yield _vllm(made, padded=padded)
    yield _graphs(made)
    yield _gguf(made)


def _transformers(made: _Form, *, padded: bool) -> RuntimeRow:
    if padded:
        reason = "padded with zeros to one shape, no faster; compact with loadability='remote-code'"
        return RuntimeRow("transformers", "yes", reason)
    if made.quantised:
        method = made.quantised.get("quant_method") or "what its quantisation needs"
        return RuntimeRow("transformers", "if", f"{method} is installed{f'; {_TRUST}' if made.remote else ''}")
    if made.remote:
        return RuntimeRow("transformers", "if", _TRUST)
    return RuntimeRow("transformers", "yes", "its own class, hf_elastic is not needed")


def _peft(made: _Form) -> RuntimeRow:
    if made.remote:
        return RuntimeRow("PEFT", "if", f"as the base of adapters, {_TRUST}")
    return RuntimeRow("PEFT", "yes", "as the base of adapters")


def _sentence_transformers(made: _Form) -> RuntimeRow:
    name = "sentence-transformers"
    if made.class_name.endswith("ForSequenceClassification") and not made.causal:
        reason = "as a CrossEncoder" + (", trust_remote_code=True" if made.remote else "")
        return RuntimeRow(name, "if", reason)
    if made.class_name not in _EMBEDDED:
        return RuntimeRow(name, "no", f"a {made.class_name} gives no sentence embeddings")
    if not made.sentences:
        return RuntimeRow(name, "if", "you say how tokens are pooled: no modules.json comes with it")
    if made.remote:
        return RuntimeRow(name, "if", f"SentenceTransformer(folder, {_TRUST})")
    return RuntimeRow(name, "yes", "SentenceTransformer(folder)")


def _vllm(made: _Form, *, padded: bool) -> RuntimeRow:
    """Read in vLLM's sources and documentation, not run."""
    if made.routed:
        return RuntimeRow(
            "vLLM", "no", f"it chooses {', '.join(made.routed)} while it runs, from rows vLLM packs together"
        )
    served = made.causal or made.class_name.endswith(("ForSequenceClassification", "Model"))
    if not served:
        return RuntimeRow(
            "vLLM", "no", f"it generates, embeds and classifies sequences, which a {made.class_name} does not"
        )
    if made.quantised and not known_integers(made.quantised):
        stated = ", ".join(str(made.quantised[name]) for name in ("quant_method", "format") if made.quantised.get(name))
        reason = "of weights of integers, symmetric ones of 4 or 8 bits packed by compressed-tensors are known to run"
        return RuntimeRow("vLLM", "unknown", f"{reason}; this is {stated or 'something else'}")
    if made.remote and not padded:
        return _vllm_remote(made)
    if made.stock_name.startswith("DistilBert"):
        return RuntimeRow("vLLM", "no", "it has no DistilBERT")
    if made.stock_name not in OWN_CLASSES:
        return RuntimeRow("vLLM", "unknown", f"a {made.stock_name} is not among its classes that are known here")
    if padded:
        return RuntimeRow("vLLM", "yes", "as padded, no faster; for the compact form see info of its export")
    return RuntimeRow("vLLM", "yes", "its own class")


def _vllm_remote(made: _Form) -> RuntimeRow:
    differs = made.per_layer()
    if "blocks" in differs:
        return RuntimeRow("vLLM", "no", "its backend has one size of head for all layers, blocks have several")
    conditions = ["trust_remote_code=True"]
    if made.config.model_type == "elastic_gpt2":
        conditions.append("on one GPU and in floats, as GPT-2's Conv1D is no nn.Linear")
    if "heads" in differs:
        conditions.append("a vLLM that reads heads from per_layer_config (its pull request 49797)")
    if "skips" in differs:
        conditions.append("layers without attention still hold KV memory")
    return RuntimeRow("vLLM", "if", "by its Transformers backend: " + "; ".join(conditions))


def _graphs(made: _Form) -> RuntimeRow:
    name = "ONNX / OpenVINO"
    if made.routed:
        kinds = ", ".join(made.routed)
        return RuntimeRow(name, "no", f"it chooses {kinds} while it runs, of sizes that depend on the data")
    kept = "; integers become floats, --int8 rounds anew" if made.quantised else ""
    return RuntimeRow(name, "yes", f"hf-elastic convert --format onnx or openvino{kept}")


def _gguf(made: _Form) -> RuntimeRow:
    name = "GGUF / llama.cpp"
    if made.routed:
        return RuntimeRow(name, "no", "llama.cpp has no routers")
    try:
        layout = gguf_layout(made.config, made.class_name)
        if layout.architecture == "bert":
            gguf_pooling(made.folder)
    except ExportError as error:
        return RuntimeRow(name, "no", str(error).removeprefix("no GGUF: ").splitlines()[0])
    notes = "; ".join(layout.notes)
    answer: Answer = "if" if layout.notes else "yes"
    return RuntimeRow(
        name, answer, f"hf-elastic convert --format gguf, as {layout.architecture}{'; ' if notes else ''}{notes}"
    )


def _adapter_rows(config: Mapping[str, Any]) -> Iterator[RuntimeRow]:
    in_weight = config.get("sparse") or config.get("quantization_aware")
    ranks, base = config.get("ranks"), config.get("base_model_name_or_path") or "its base"
    merge = "merged into its base first: hf-elastic merge, or merge_and_unload"
    if in_weight:
        part = "it is part of the weight: hf_elastic.load_adapter, then export(..., merge=True)"
        yield RuntimeRow("transformers", "no", part)
        yield RuntimeRow("PEFT", "no", part)
    elif ranks:
        yield RuntimeRow("transformers", "if", "through PEFT, at the largest rank")
        yield RuntimeRow("PEFT", "if", "at the largest rank; extract_adapter writes another one plain")
    else:
        yield RuntimeRow("transformers", "if", "model.load_adapter(folder), with PEFT installed")
        yield RuntimeRow("PEFT", "yes", f"PeftModel.from_pretrained(model, folder), onto {base}")
    yield RuntimeRow("sentence-transformers", "if", f"{merge}, or model.load_adapter of an encoder's")
    yield _vllm_adapter(config, plain=not in_weight and not ranks)
    yield RuntimeRow("ONNX / OpenVINO", "if", merge)
    yield RuntimeRow("GGUF / llama.cpp", "if", merge)


def _vllm_adapter(config: Mapping[str, Any], *, plain: bool) -> RuntimeRow:
    if not plain:
        return RuntimeRow("vLLM", "no", "it is no plain LoRA; extract_adapter(..., hotswap=True), or merge it")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reason = "vLLM reads one rank and alpha for all modules; extract_adapter(..., hotswap=True) writes it so"
        return RuntimeRow("vLLM", "no", reason)
    return RuntimeRow("vLLM", "if", f"--enable-lora --max-lora-rank {config.get('r')}")
