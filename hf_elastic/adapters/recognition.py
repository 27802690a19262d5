"""Recognises what adapters were made for: the modules that their configuration names, and the base they stand on."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn

from hf_elastic.errors import CheckpointError, CompressionError, SpaceError, UnsupportedModelError
from hf_elastic.packed_format import is_packed, is_quantised
from hf_elastic.parts import LayerPart, join_choices
from hf_elastic.quantgrid import grid_of
from hf_elastic.space import SearchSpace

_MODULES, _ENTRIES = 8, 16
_INTEGERS = 4096  # of each layer that are digested
_NEW_ZEROS = 0.001
FLOAT_BASE = "float_base"  # what is noted of the weights that the base was rounded from
_LARGEST = 1e38  # entry of a weight in any precision
_TOLERANCE = 0.01  # rounding a weight to bf16 moves it by at most .004


_INITIAL = (True, False, "gaussian", "orthogonal")
_REFUSED = {
    "use_dora": "DoRA's magnitudes are learnt for one rank",
    "use_qalora": "QA-LoRA pools the inputs of the adapter",
    "layer_replication": "replicated layers share one base",
    "target_parameters": "adapters on bare parameters have no rank to choose",
    "megatron_config": "Megatron's parallel layers have adapters of their own",
}


class Patterns(Protocol):
    """What of a LoRA configuration names modules."""

    ranks: Any
    rank_pattern: Any
    alpha_pattern: Any


class Kept(Protocol):
    """What of a LoRA configuration says what merging keeps."""

    sparse: bool
    quantization_aware: bool


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern names a module, as peft matches the keys of ``rank_pattern``."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_patterns(config: Patterns, modules: Sequence[str]) -> None:
    """Refuses patterns with typos.

    Raises:
        SpaceError: a pattern matches none of the adapted modules.
    """
    entries = {"ranks": config.ranks if isinstance(config.ranks, dict) else {}}
    entries |= {"rank_pattern": config.rank_pattern or {}, "alpha_pattern": config.alpha_pattern or {}}
    for what, patterns in entries.items():
        check_matched(what, patterns, modules)


def check_matched(what: str, patterns: Iterable[str], modules: Sequence[str]) -> None:
    """Raises a :class:`SpaceError` unless every pattern matches a module."""
    parts = [part for pattern in patterns for part in _alternatives(pattern)]
    if lost := sorted(part for part in parts if not any(matches(part, name) for name in modules)):
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
        raise SpaceError(f"{what} names {', '.join(map(repr, lost))}, but the adapted modules end in {leaves}")


def _alternatives(pattern: str) -> list[str]:
    """What a pattern such as ``q_proj|k_proj`` offers, so that a typo in one of them is noticed."""
    return pattern.split("|") if not re.search(r"[()\[\]\\]", pattern) else [pattern]


def described_base(
    bases: Mapping[str, nn.Module],
    *,
    layers: Sequence[LayerPart] = (),
    model: nn.Module | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Writes down what adapters are trained on, so that another base is noticed.

    Entries of some adapted weights, from the first to the last, and of the embeddings; their precision; the base's
    space; and of what a merge is to keep, how many zeros the adapted weights have, and a digest of scales and integers.

    Args:
        bases: adapted modules by name.
        layers: elastic layers of the base.
        model: what they stand in.
        kept: says what merging is to keep.
    """
    names = list(bases)
    chosen = sorted({round(i * (len(names) - 1) / max(1, _MODULES - 1)) for i in range(_MODULES)} if names else ())
    weights = {name: bases[name].get_parameter("weight") for name in names}
    floats = [w for w in weights.values() if w.is_floating_point() and not w.is_meta]
    return {
        "space": _space(layers),
        "weights": {names[place]: _sample(weights[names[place]]) for place in chosen},
        "embeddings": {} if model is None else {n: _sample(m.weight) for n, m in _embeddings(model).items()},
        "dtype": str(floats[0].dtype).removeprefix("torch.") if floats else None,
        "zeros": sum(int((w == 0).sum()) for w in floats) if kept is not None and kept.sparse else None,
        "integers": _digest(bases) if kept is not None and kept.quantization_aware else None,
    }


def _space(layers: Sequence[LayerPart]) -> str | None:
    choices = join_choices(part.choices for part in layers)
    return SearchSpace(choices).digest if choices else None  # layers may leave nothing to choose, or there are none


def check_base(
    known: Mapping[str, Any],
    bases: Mapping[str, nn.Module],
    *,
    layers: Sequence[LayerPart] = (),
    model: nn.Module | None = None,
    kept: Kept | None = None,
) -> None:
    """Checks that adapters stand on what they were trained on; a base in another precision is the same one, unless they
    are rounded to its grid.

    Args:
        known: as :func:`described_base` wrote it.
        bases: modules by name, the adapted ones among them; with ``kept`` these alone.
        layers: elastic layers of the base.
        model: what they stand in.
        kept: says what merging is to keep.

    Raises:
        CheckpointError: it is another base, or another space of it.
    """
    weighted = {name for name, module in bases.items() if "weight" in dict(module.named_parameters(recurse=False))}
    if lost := sorted(known["weights"].keys() - weighted):
        raise CheckpointError(f"the adapters were trained on another base: it had a module {lost[0]}")
    samples = {name: bases[name].get_parameter("weight") for name in known["weights"]}
    tables = {} if model is None else {name: module.weight for name, module in _embeddings(model).items()}
    samples |= {name: tables[name] for name in known.get("embeddings", {}) if name in tables}
    for name, theirs in {**known["weights"], **known.get("embeddings", {})}.items():
        ours = _sample(samples[name]) if name in samples else []
        other = len(ours) != len(theirs) or math.dist(ours, theirs) > _TOLERANCE * math.hypot(*theirs)
        if theirs and ours and other:
            raise CheckpointError(f"the adapters were trained on another base: its {name} has other weights")
    if kept is not None and (kept.sparse or kept.quantization_aware):
        _check_what_is_kept(known, bases, kept)
    if known["space"] != _space(layers):
        raise CheckpointError(
            "the adapters were trained in another space of their base; make the base elastic with the ElasticConfig "
            "that they were trained with, before they are put onto it"
        )


def check_description(known: Any, *, kept: Kept, where: str) -> None:
    """Checks the form of what :func:`described_base` wrote, once it is read from a file.

    Raises:
        CheckpointError: it is not what was written.
    """
    sound = (
        isinstance(known, Mapping)
        and all(_are_samples(known.get(name, {})) for name in ("weights", "embeddings", FLOAT_BASE))
        and {"weights", "space"} <= known.keys()
        and all(isinstance(known.get(name), str | None) for name in ("space", "dtype", "integers"))
        and (type(known.get("zeros")) is int or not kept.sparse)
    )
    if not sound:
        raise CheckpointError(f"the adapter in {where} says nothing usable about its base (trained_on); copy it again")


def _are_samples(entries: Any) -> bool:
    return isinstance(entries, Mapping) and all(
        isinstance(values, list) and all(type(v) in (int, float) and abs(v) < _LARGEST for v in values)
        for values in entries.values()
    )


def _check_what_is_kept(known: Mapping[str, Any], bases: Mapping[str, nn.Module], kept: Kept) -> None:
    """Refuses a base with other zeros, other integers or, where it is rounded, of another precision."""
    weights = [module.get_parameter("weight") for module in bases.values()]
    if any(weight.is_meta for weight in weights):
        return
    found = described_base(bases, kept=kept)
    # In half precision the smallest weights may become zero.
    if kept.sparse and abs(found["zeros"] - known["zeros"]) > _NEW_ZEROS * sum(w.numel() for w in weights):
        raise CheckpointError(
            f"the adapters were trained on a base with {known['zeros']} zeros, this one has {found['zeros']}; they are "
            "to be merged into the very base that they saw"
        )
    if kept.quantization_aware and found["dtype"] != known["dtype"]:
        raise CheckpointError(
            f"the adapters were trained on the base in {known['dtype']}, and in {found['dtype']} would round to other "
            f"integers; load the base with dtype=torch.{known['dtype']}"
        )
    if kept.quantization_aware and found["integers"] != known["integers"]:
        raise CheckpointError(
            "the adapters were trained on a base of other integers or scales; they are to be merged into the very base "
            "that they saw"
        )


def _embeddings(model: nn.Module) -> dict[str, Any]:
    """Embedding tables by the name that they have without adapters; not the copies that are trained."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    plain = {n: m for n, m in found.items() if ".modules_to_save." not in n and not m.weight.is_meta}
    return {
        re.sub(r"(^|\.)(base_layer|original_module)(?=\.|$)", "", n.removeprefix("base_model.model.")): module
        for n, module in plain.items()
    }


def _digest(bases: Mapping[str, nn.Module]) -> str | None:
    """Hexadecimal SHA-256 of the scales, the zero-points and many integers of layers that carry grids."""
    digest, seen = hashlib.sha256(), False
    for name in sorted(bases):
        grid = None if bases[name].get_parameter("weight").is_meta else grid_of(bases[name], name=name, checked=False)
        if grid is None:
            continue
        seen = True
        integers = grid.integers(bases[name].get_parameter("weight").detach()).flatten()
        digest.update(name.encode() + _spread(integers, _INTEGERS).cpu().numpy().tobytes())
        digest.update(grid.scale.float().cpu().numpy().tobytes() + grid.zero.cpu().numpy().tobytes())
    return digest.hexdigest() if seen else None


def _spread(flat: Tensor, count: int) -> Tensor:
    """Entries of a tensor ``(N,)`` from its first to its last, in every column of the matrix that it was."""
    places = torch.linspace(0, len(flat) - 1, min(count, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)]


def _sample(weight: Tensor) -> list[float]:
    """A few entries of a weight; none of a quantised one, whose entries say nothing by themselves."""
    if not weight.is_floating_point() or weight.is_meta:
        return []
    entries = _spread(weight.detach().flatten(), _ENTRIES).float()
    return [float(f"{value:.5g}") for value in entries.tolist()]


def check_weight(base: nn.Module, *, name: str, in_weight: bool) -> None:
    """Refuses a base that an adapter cannot be part of the weight of.

    Raises:
        UnsupportedModelError: it is packed, or has no float weight; the message says what to do.
    """
    if is_packed(base):
        raise UnsupportedModelError(
            f"{name} was loaded packed from a compressed-tensors checkpoint; call hf_elastic.unpack_(model) first, or "
            "use hf_elastic.add_lora, which does"
        )
    weight = dict(base.named_parameters(recurse=False)).get("weight")
    if in_weight and (weight is None or not weight.is_floating_point()):
        raise UnsupportedModelError(
            f"{name} is a {type(base).__name__}, whose weight is not there as floats: sparse=True and "
            "quantization_aware=True need a float base, or one that hf_elastic.quantize_ made; adapters kept apart "
            "need neither"
        )


def check_kept(config: Kept, bases: Iterable[nn.Module]) -> None:
    """Refuses adapters that are to keep what no base has.

    Raises:
        CompressionError: ``sparse`` and no weight is zero, or ``quantization_aware`` and no weight has a grid.
    """
    modules = list(bases)
    if config.sparse and not any(bool((module.get_parameter("weight") == 0).any()) for module in modules):
        raise CompressionError(
            "sparse=True, but none of the targeted weights is zero; call hf_elastic.sparsify_(model, ...) before the "
            "adapters, or leave sparse out"
        )
    if config.quantization_aware and not any(map(is_quantised, modules)):
        raise CompressionError(
            "quantization_aware=True, but no targeted layer has a grid of integers; call hf_elastic.quantize_(model, "
            "...) before the adapters, load a compressed-tensors checkpoint, or leave it out"
        )


def check_variants(config: LoraConfig) -> None:
    """Refuses what would ignore ranks, or what an extracted adapter would not fit.

    Raises:
        UnsupportedModelError: the configuration asks for such a variant of LoRA.
    """
    refused = dict(_REFUSED)
    for entry in fields(LoraConfig):
        if entry.metadata.get("is_lora_variant"):
            refused.setdefault(entry.name, "this variant computes with the full rank")
    for name, why in refused.items():
        if getattr(config, name, None):
            raise UnsupportedModelError(f"{name} cannot be combined with elastic ranks: {why}; leave it out")
    if config.init_lora_weights not in _INITIAL:
        raise UnsupportedModelError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights or the ranks, so that an "
            "extracted adapter would not fit its base; use True, False, 'gaussian' or 'orthogonal'"
        )
