"""Writes a subnet as a Hugging Face checkpoint folder: whole or not at all, checked before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_elastic import costs
from hf_elastic.checkpoint.companions import MODULES, TOKENIZER_FILES, copy_companions
from hf_elastic.checkpoint.extraction import extract
from hf_elastic.checkpoint.router_extraction import Decisions, check_calibrated, routers_in_use
from hf_elastic.errors import ExportError
from hf_elastic.files import whole_folder, write_json
from hf_elastic.layers import evaluating, without_autocast
from hf_elastic.models import MODEL_TYPES
from hf_elastic.models.elastic_routers import routers_of
from hf_elastic.packed_format import integer_bits, quantised_layers, write_weights
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Loadability, Supernet
from hf_elastic.supernet_folder import parent_of, save_generation_config, write_code

ARCHITECTURE_FILE = "architecture.json"
_ROUNDED_AGAIN = 10  # W + s B A is rounded where W x + s B A x was not; stock peft's merge differs as much
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}

NOTES: Mapping[Loadability, str] = {
    "stock": "ordinary checkpoint of the stock class",
    "stock-padded": "stock class, padded with zeros: same logits, no speed gain (loadability='remote-code' is compact)",
    "remote-code": "loads with trust_remote_code=True, or after `import hf_elastic`",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        directory: the folder.
        loadability: how it loads.
        note: the same in a sentence, and that there is no tokenizer where none was found.
        snippet: Python that loads it.
        files: names of the files copied from the parent (tokenizer, chat template, sentence-transformers
            modules).
        max_difference: largest |difference| of outputs between the extracted model and the supernet, on token
            ids; where routers of the two decide otherwise about tokens that are as good as equal, with one's decisions.
        macs: of one forward over ``macs_seq_len`` tokens; ``None`` in a report that was put together from records.
        macs_seq_len: tokens at which MACs are stated everywhere, also beyond the positions of the model.
        sparsity: share of zeros in the linear layers, the output head left out.
        bits: of the integers that the linear layers inside the blocks are stored as; ``None``: as floats.
    """

    directory: Path
    loadability: Loadability
    note: str
    snippet: str
    files: tuple[str, ...]
    max_difference: float
    macs: int | None = None
    macs_seq_len: int = costs.LATENCY_TOKENS
    sparsity: float = 0.0
    bits: int | None = None

    def __str__(self) -> str:
        indented = self.snippet.replace("\n", "\n  ")
        kept = f"; {self.bits}-bit integers" if self.bits else ""
        kept += f"; {self.sparsity:.1%} of the linear layers' weights are zero" if self.sparsity >= 0.005 else ""
        return f"{self.directory}: {self.note}{kept}\n  {indented}"


def export(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    directory: str | Path,
    *,
    loadability: Loadability | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
    model: PreTrainedModel | None = None,
    merge: bool | None = None,
    allow_dense: bool = False,
) -> ExportReport:
    """Writes a subnet to a folder that ``from_pretrained`` loads.

    The folder holds ``config.json``, safetensors, the generation config, ``architecture.json``, and what the
    parent's folder (or its copy in the Hub cache) held of tokenizer, chat template and sentence-transformers
    modules.

    Args:
        supernet: where from; unchanged.
        architecture: what.
        directory: a folder that does not exist or is empty.
        loadability: form; by default that of ``model``, or else the one :meth:`Supernet.loadability` says.
        tokenizer: saved instead of the parent's tokenizer files.
        source: the parent's folder or Hub name; by default what it was loaded from.
        overwrite: whether a non-empty folder may be replaced.
        model: written instead of the supernet's own weights: a model of this architecture in this form that was made
            better, as :func:`hf_elastic.refit` and :func:`hf_elastic.recover` return it.
        merge, allow_dense: what becomes of adapters, see :func:`hf_elastic.extract`. A model of integers is written in
            the format of compressed-tensors, which stock transformers loads where that package is installed.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        ExportError: the form cannot hold it, the written model would not equal the subnet, ``model`` is of another
            class or of other shapes, or a causal model's routers of tokens were not calibrated.
        CheckpointError: the folder cannot be written, or transformers refuses to write the generation config;
            nothing is left half-written.
    """
    point = supernet.point(architecture)
    form = loadability or _form_of(model, supernet) or supernet.loadability(point)
    if loadability is None and merge is False and form == "stock-padded":
        form = "remote-code"  # the form that the extracted adapter fits
    check_calibrated(supernet, point)
    parent = str(source or supernet.base.config._name_or_path or "")
    with whole_folder(directory, overwrite=overwrite) as folder:
        save_generation_config(supernet.base, folder)
        extracted = extract(supernet, point, loadability=form, merge=merge, allow_dense=allow_dense)
        difference = _check_parity(supernet, point, extracted, merged=bool(merge))
        written = extracted if model is None else _like(extracted, model)
        write_weights(written, folder)
        write_code(written, folder)
        names = copy_companions(parent, folder, tokenizer=tokenizer)
        record = _record(supernet, point, form)
        write_json(folder / ARCHITECTURE_FILE, record)
    path, has_tokenizer = Path(directory), _has_tokenizer(names)
    shapes = supernet.layer_shapes(point)
    cut = form == "stock" and any(s != p.full for p, s in zip(supernet.layer_parts, shapes, strict=True))
    note = f"{NOTES[form]}, smaller and faster" if cut else NOTES[form]
    note = note if has_tokenizer else f"{note}; {_no_tokenizer(parent)}"
    snippet = _snippet(written, path, form, tokenizer=has_tokenizer, sentences=MODULES in names)
    macs, zeros, bits = record["macs"], zero_share(written), integer_bits(written)
    return ExportReport(path, form, note, snippet, names, difference, macs, sparsity=zeros, bits=bits)


def save_quantized(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model that :func:`hf_elastic.quantize_` made in the format of compressed-tensors.

    Stock ``from_pretrained`` loads it exactly where compressed-tensors is installed. Symmetric integers, which vLLM
    serves, are packed; asymmetric ones are stored as 8 bits each, as stock transformers does not load packed
    zero-points. (``model.save_pretrained`` would write floats, and so does stock transformers of a packed checkpoint
    that it has loaded.)

    Args:
        model: whose layers carry grids; unchanged.
        directory: a folder that does not exist or is empty.
        tokenizer: saved instead of the parent's tokenizer files.
        source: the parent's folder or Hub name; by default what the model was loaded from.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        ExportError: no layer carries a grid, a weight is not on its grid any more, or the model has adapters.
        CheckpointError: the folder cannot be written; nothing is left half-written.
    """
    wrapped = [name for name, module in model.named_modules() if "base_layer" in dict(module.named_children())]
    if wrapped or not isinstance(model, PreTrainedModel):
        where = wrapped[0] if wrapped else type(model).__name__
        raise ExportError(
            f"{where} has an adapter: export(supernet, ..., merge=True) writes the merged model, inside "
            "supernet.plain() save_quantized writes the base"
        )
    if not quantised_layers(model):
        raise ExportError(f"no layer of the {type(model).__name__} carries a grid; call hf_elastic.quantize_ first")
    parent = str(source or model.config._name_or_path or "")
    with whole_folder(directory, overwrite=overwrite) as folder:
        save_generation_config(model, folder)
        write_weights(model, folder)
        names = copy_companions(parent, folder, tokenizer=tokenizer)
    path, note = Path(directory), "ordinary checkpoint of the stock class, of integers (compressed-tensors)"
    has_tokenizer = _has_tokenizer(names)
    note = note if has_tokenizer else f"{note}; {_no_tokenizer(parent)}"
    snippet = _snippet(model, path, "stock", tokenizer=has_tokenizer, sentences=MODULES in names)
    return ExportReport(path, "stock", note, snippet, names, 0.0, sparsity=zero_share(model), bits=integer_bits(model))


def _has_tokenizer(names: tuple[str, ...]) -> bool:
    return any(name in TOKENIZER_FILES and not name.startswith("chat_template") for name in names)


def _no_tokenizer(parent: str) -> str:
    where = parent or "the parent, which was not loaded from a folder"
    return f"no tokenizer found in {where}; pass tokenizer= or source="


def _form_of(model: PreTrainedModel | None, supernet: Supernet) -> Loadability | None:
    """The form that a model has already, where that is not for the architecture to say."""
    if model is not None and supernet.block_parts:
        return "remote-code" if model.config.model_type in MODEL_TYPES else None
    compact = model is not None and supernet.layer_parts and model.config.model_type == supernet.family.static_type
    return "remote-code" if compact else None


def _like(extracted: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it is of the class and the shapes of the extracted one."""
    if type(model) is not type(extracted):
        raise ExportError(
            f"model is a {type(model).__name__}, in this form the architecture is a {type(extracted).__name__}; pass "
            "the loadability that the model was made with"
        )
    ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (extracted, model))
    if other := sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        name = other[0]
        raise ExportError(
            f"model has {name} of {theirs.get(name)}, this architecture of {ours.get(name)}; pass the architecture "
            "that the model was made for"
        )
    return model


def zero_share(model: PreTrainedModel) -> float:
    """Share of zeros in the weights of linear layers, the output head left out."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    count = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / count if count else 0.0


def _check_parity(supernet: Supernet, architecture: Architecture, model: PreTrainedModel, *, merged: bool) -> float:
    """Compares the extracted model with the supernet on token ids before anything is written.

    Where rounding lets routers decide otherwise about tokens that are as good as equal, the extracted model is asked
    again with the decisions of the supernet.
    """
    inputs = costs.default_inputs(supernet, seq_len=32)
    decisions = Decisions()
    handle = supernet.model
    with evaluating(handle), without_autocast(handle), torch.inference_mode(), supernet.activate(architecture):
        with nullcontext() if merged else supernet.plain(), decisions.noted(routers_in_use(supernet, architecture)):
            wanted = supernet.base(**inputs)[0]
        got = model(**inputs)[0]
        scale, allowed = float(wanted.abs().max()), _TOLERANCE.get(wanted.dtype, 5e-2)
        limit = allowed * (_ROUNDED_AGAIN if merged else 1) * max(scale, 1e-6)
        difference = float((wanted - got).abs().max())
        if decisions.known and not difference <= limit:
            with decisions.repeated(routers_of(model)):
                difference = float((wanted - model(**inputs)[0]).abs().max())
    if not (difference <= limit and decisions.agree):
        raise ExportError(
            f"the extracted model differs from the subnet by {difference:.2e} (outputs up to {scale:.2e}), "
            "nothing was written; please report this with the model's config"
        )
    return difference


def _record(supernet: Supernet, architecture: Architecture, form: Loadability) -> dict[str, Any]:
    shapes = supernet.block_shapes(architecture) or supernet.layer_shapes(architecture)
    return {
        "architecture": dict(architecture),
        "digest": architecture.digest,
        "space_digest": supernet.space.digest,
        "loadability": form,
        "family": supernet.base.config.model_type,
        "parent": parent_of(supernet.base),
        "layer_order": list(supernet.layer_order),
        "layers": [asdict(shape) for shape in shapes],
        "parameters": costs.parameters(supernet, architecture),
        "total_parameters": costs.total_parameters(supernet, architecture),
        "macs": costs.macs(supernet, architecture, seq_len=costs.LATENCY_TOKENS) if shapes else None,
        "macs_seq_len": costs.LATENCY_TOKENS,
        "versions": {name: version(name) for name in ("transformers", "torch")},
    }


def _snippet(model: PreTrainedModel, path: Path, form: Loadability, *, tokenizer: bool, sentences: bool) -> str:
    remote = form == "remote-code"
    names = [next(iter(_auto_class(model)), "AutoModel") if remote else type(model).__name__]
    names += ["AutoTokenizer"] if tokenizer and remote else []
    given = json.dumps(str(path)) + (", trust_remote_code=True" if remote else "")
    lines = [f"transformers.{name}.from_pretrained({given})" for name in names]
    return "\n".join([*lines, *([f"sentence_transformers.SentenceTransformer({given})"] if sentences else [])])


def _auto_class(model: PreTrainedModel) -> list[str]:
    mapping = getattr(model.config, "auto_map", None) or {}
    return [auto for auto, target in mapping.items() if str(target).endswith("." + type(model).__name__)]
