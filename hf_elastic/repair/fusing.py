"""``fuse_heads``: a finished model with fewer heads, where heads of a layer write alike."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_elastic.blocks import ROLES
from hf_elastic.checkpoint import extract
from hf_elastic.checkpoint.static_form import static_class, static_config, static_state_dict
from hf_elastic.conversion import make_elastic
from hf_elastic.errors import UnsupportedModelError
from hf_elastic.fusion import FusionMode, FusionReport, fuse_heads_
from hf_elastic.head_similarity import Samples
from hf_elastic.layers import PartHolder
from hf_elastic.streams import Batch
from hf_elastic.supernet import Supernet

_STOCK = ("bert", "roberta", "distilbert", "gpt2")


def fuse_heads(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    mode: FusionMode = "merge",
    threshold: float = 0.9,
    samples: Samples = "tokens",
    min_heads: int = 2,
) -> tuple[PreTrainedModel, FusionReport]:
    """Fuses the heads of a finished model that write alike (CKA head fusion of ELM, arXiv 2510.27037).

    Args:
        model: a BERT, RoBERTa, DistilBERT or GPT-2 model, or an ``elastic_bert`` or ``elastic_gpt2`` one with one block
            per layer; unchanged.
        batches: dicts of tensors for the model, with an ``attention_mask`` where there is padding; with labels for the
            losses in the report.
        mode, threshold, samples, min_heads: see :func:`hf_elastic.fusion.fuse_heads_`.

    Returns:
        A model without the heads that went, in evaluation mode: an ``elastic_bert`` or ``elastic_gpt2`` one, whose
        layers may differ (written by ``export(make_elastic(it), ...)`` where it is to load without hf_elastic), or a
        copy of the model where no heads are alike; and what was done.

    Raises:
        UnsupportedModelError: the model's type has no heads to fuse (those of LLaMA-like models are rotated by position
            and share keys, so they cannot be aligned), a layer has no attention or no FFN, it is a supernet, or it has
            adapters.
        ExportError: its class has no static one.
        CompressionError, DataError: as :func:`hf_elastic.fusion.fuse_heads_`.
    """
    _check_model(model)
    static = _static_twin(model) if model.config.model_type in _STOCK else copy.deepcopy(model)
    supernet = make_elastic(static)
    report = fuse_heads_(supernet, batches, mode=mode, threshold=threshold, samples=samples, min_heads=min_heads)
    if all(entry.after == entry.before for entry in report.layers):
        return copy.deepcopy(model).eval(), report
    return extract(supernet, supernet.space.largest()), report


def _check_model(model: PreTrainedModel) -> None:
    if isinstance(model, Supernet):
        raise UnsupportedModelError(
            "fuse_heads takes a finished model, got a Supernet; extract a subnet first: "
            "fuse_heads(hf_elastic.extract(supernet, architecture), batches)"
        )
    if not isinstance(model, PreTrainedModel) or any("base_layer" in dict(m.named_children()) for m in model.modules()):
        raise UnsupportedModelError(
            f"fuse_heads takes a transformers model without adapters, got a {type(model).__name__} that has some or is "
            "none; merge them first (peft: merge_and_unload())"
        )
    blocks = getattr(model.config, "candidate_blocks", None)
    if blocks is not None or any(isinstance(module, PartHolder) for module in model.modules()):
        raise UnsupportedModelError(
            "fuse_heads takes a finished model, got that of a supernet; extract a subnet first: "
            "fuse_heads(hf_elastic.extract(supernet, architecture), batches)"
        )
    kind = model.config.model_type
    if kind not in (*ROLES, *_STOCK):
        raise UnsupportedModelError(
            f"model type {kind!r} has no heads that could be fused; those of {', '.join((*_STOCK, *ROLES))} can "
            "(LLaMA's are rotated by position and share keys)"
        )


def _static_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as a static one, with weights of its own."""
    config = static_config(copy.deepcopy(model.config), {}, parent=model)
    config._attn_implementation = model.config._attn_implementation
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if any(model.get_parameter(a) is not model.get_parameter(b) for a, b in pairs.items()):
        config.tie_word_embeddings = False  # untied by hand, whatever the config says
    state = {name: tensor.clone() for name, tensor in static_state_dict(model, model.state_dict()).items()}
    with no_init_weights():
        twin = static_class(model)(config)
    twin.load_state_dict(state, strict=True, assign=True)
    twin.tie_weights()
    if model.can_generate() and twin.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval()
