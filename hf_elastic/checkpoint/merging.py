"""Weights of a supernet's base, with adapters merged into them: what may be merged, and what a merge must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from hf_elastic.errors import ExportError
from hf_elastic.layers import PartHolder
from hf_elastic.packed_format import is_quantised
from hf_elastic.parts import AdapterPart
from hf_elastic.quantgrid import pruned_share
from hf_elastic.supernet import Supernet

SPARSE = 0.01
"""Share of zeros from which on a weight counts as sparse: a few zeros are there by chance."""


def check_merge(supernet: Supernet, merge: bool | None, *, form: str, allow_dense: bool) -> None:
    """Refuses an extraction that would do something else with adapters than is meant.

    Raises:
        ExportError: it would.
    """
    _check_wrappers(supernet)
    parts = supernet.adapter_parts
    if not parts:
        if merge:
            raise ExportError("merge=True, but the model has no adapters; leave it out")
        return
    if merge is None:
        raise ExportError(
            "the model has adapters: say merge=True (into the weights) or merge=False (the base alone; "
            "extract_adapter gives the adapter)"
        )
    supernet.require_unmerged()
    packed = [part.base for part in parts if not part.base.get_parameter("weight").is_floating_point()]
    if packed:
        raise ExportError(
            f"the base is quantised ({type(packed[0]).__name__}): it cannot be copied so, and merging would round the "
            "sum again; use extract_adapter, or merge into the float model that it was made from"
        )
    if not merge and form == "stock-padded":
        raise ExportError(
            "an adapter does not fit a base that is padded with zeros; write the base with loadability='remote-code', "
            "or merge=True"
        )
    names = {id(module): name for name, module in supernet.base.named_modules()}
    for part in parts if merge else ():
        if part.in_use:
            _check_kept(part, names[id(part.base)], allow_dense=allow_dense)


def _check_wrappers(supernet: Supernet) -> None:
    """Refuses a model with adapters that are no elastic parts, of which an extraction knows nothing."""
    for name, module in supernet.base.named_modules():
        if "base_layer" in dict(module.named_children()) and not isinstance(module, PartHolder):
            raise ExportError(
                f"{name} is a stock {type(module).__name__}, which no extraction carries; call merge_and_unload() first"
            )


def _check_kept(part: AdapterPart, name: str, *, allow_dense: bool) -> None:
    """Refuses a merge that would lose the integers or the zeros of its base."""
    if part.quantization_aware:  # zeros that are there by rounding are not the user's
        pruned = 0.0 if part.sparse or allow_dense else pruned_share(part.base, name=name)
        if pruned >= SPARSE:
            raise ExportError(
                f"{name} had {pruned:.0%} zeros before it was quantised and its adapter was trained without "
                "sparse=True: merging fills them; train with sparse=True too, or say allow_dense=True"
            )
        return
    if is_quantised(part.base):
        raise ExportError(
            f"{name} is quantised and its adapter was trained without quantization_aware=True: the sum is not on the "
            "grid, so merging would round it again; use extract_adapter, or train with quantization_aware=True"
        )
    weight = part.base.get_parameter("weight")
    zeros = float((weight == 0).float().mean())
    if not part.sparse and not allow_dense and zeros >= SPARSE:
        raise ExportError(
            f"{name} has {zeros:.0%} zeros and its adapter was trained without sparse=True: merging would fill them; "
            "use extract_adapter, train with sparse=True, or say allow_dense=True"
        )


def _check_target(base: nn.Module, name: str, *, path: str, shared: Mapping[int, int]) -> None:
    """Refuses to merge into a parameter that is not there, or that another module has too."""
    parameter = dict(base.named_parameters(recurse=False)).get(name)
    if parameter is None:
        raise ExportError(f"{path} has no {name} to merge the adapter's into (lora_bias=True); use extract_adapter")
    if shared[id(parameter)] > 1:
        raise ExportError(
            f"{path} shares its {name} with another module (tied embeddings), which merging would change too; use "
            "extract_adapter, or leave it out of target_modules"
        )


def base_weights(supernet: Supernet, *, merge: bool) -> dict[str, Tensor]:
    """Weights of the model without adapters, or with those in use merged, as far as they are active.

    Raises:
        ExportError: a parameter to merge into is not there or is shared, or a merge that is to keep zeros lost some.
    """
    weights = dict(supernet.base.state_dict())
    if not merge:
        return weights
    names = {id(module): name for name, module in supernet.base.named_modules()}
    shared = Counter(id(p) for _, p in supernet.base.named_parameters(remove_duplicate=False))
    # Those that keep zeros come first: their mask is of the base as it is, not of one with another adapter in it.
    for part in sorted(supernet.adapter_parts, key=lambda part: not part.sparse):
        if not part.in_use:
            continue
        path = names[id(part.base)]
        for name in part.targets:
            _check_target(part.base, name, path=path, shared=shared)
        given = {name: weights[f"{path}.{name}"] for name in part.targets}
        merged = part.merged_into(given)
        filled = bool(((given["weight"] == 0) & (merged["weight"] != 0)).any())
        # A weight that is zero by rounding may be another integer where the float one is known (float_base).
        if filled and part.sparse and not is_quantised(part.base):
            raise ExportError(f"merging filled zeros of {path}; please report this with the adapter's configuration")
        weights.update({f"{path}.{name}": tensor for name, tensor in merged.items()})
    return weights
