"""LoRA layers with a rank to choose, on any base that peft's LoRA serves with two linear maps.

peft makes its own layer; afterwards its class is swapped for one with :class:`ElasticLoraLayer` before it, and its two
``nn.Linear`` become elastic (:class:`~hf_elastic.layers.ElasticLinear`). So forward passes are peft's, with several
adapters, mixed batches, disabled ones and quantised bases; only what merging adds is computed here, and the forward of
SparsePEFT, which is one product with the merged weight (:mod:`hf_elastic.adapters.masked`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.adapters.lora_part import LoraPart, RankedConfig, choice_name, merged_output
from hf_elastic.adapters.recognition import check_variants, check_weight
from hf_elastic.errors import ElasticError, UnsupportedModelError
from hf_elastic.layers import ElasticProjection, PartHolder, as_elastic_linear
from hf_elastic.models.elastic_mixins import with_mixin
from hf_elastic.packed_format import is_quantised
from hf_elastic.quantgrid import grid_of


class ElasticLoraLayer(PartHolder):
    """Mixin that :class:`LayerFactory` puts before a peft LoRA layer; holds a :class:`LoraPart` for each adapter."""

    elastic_parts: list[LoraPart]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter, as peft does, and makes it elastic."""
        name = kwargs.get("target_name", "")
        ranked = config if isinstance(config, RankedConfig) else None
        try:
            check_variants(config)
            group, ranks = ranked.ranks_of(name) if ranked else ("", (r,))
            kind = weight_kind(ranked, self.get_base_layer(), name=name)  # type: ignore[operator]
        except ElasticError:  # peft keeps what it has added to the modules before this one
            models = models_around(self, module_parents()).values()
            for module in {id(inner): inner for model in models for inner in model.modules()}.values():
                held = module.elastic_parts if isinstance(module, ElasticLoraLayer) else []
                if any(part.adapter == adapter_name for part in held):
                    module.delete_adapter(adapter_name)  # type: ignore[operator]
            raise
        stock = ranked.plain() if ranked else config
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=stock, **kwargs)  # type: ignore[misc]
        choice = choice_name(name, adapter_name, group=group, share=ranked.share if ranked else "layer")
        self.add_part(adapter_name, module_name=name, choice_name=choice, ranks=ranks, **kind)

    def add_part(self, adapter_name: str, **about: Any) -> None:
        """Makes an adapter that peft has added elastic; ``about`` goes to its :class:`LoraPart`."""
        layer: Any = self
        base = layer.get_base_layer()
        as_elastic_linear(layer.lora_A[adapter_name])
        as_elastic_linear(
            layer.lora_B[adapter_name], fused=base.fused if isinstance(base, ElasticProjection) else 1
        )
        part = LoraPart(adapter_name, self, base, **about)
        self.elastic_parts = [*(p for p in self.elastic_parts if p.adapter != adapter_name), part]

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, as peft does, and its part."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.elastic_parts = [part for part in self.elastic_parts if part.adapter != adapter_name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base's weight, of its full shape: of the active rank, zero outside active slices."""
        part = self.part(adapter)
        if not part.in_weight:
            return part.delta()["weight"]
        given = {name: part.base.get_parameter(name).data for name in part.targets}
        return part.merged_into(given)["weight"] - given["weight"]

    def part(self, adapter: str) -> LoraPart:
        """The part of an adapter."""
        return next(part for part in self.elastic_parts if part.adapter == adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes as peft does; with adapters of SparsePEFT in use, one product with the weight that they make."""
        names = kwargs.get("adapter_names")
        layer: Any = self
        used = layer.active_adapters if names is None else names
        if layer.disable_adapters or layer.merged or not self._in_weight(used):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if names is None:
            return self._merged_forward(x, [name for name in layer.active_adapters if name in layer.lora_A])
        layer._check_forward_args(x, *args, **kwargs)
        return self._mixed_forward(x, names)

    def _in_weight(self, names: Sequence[str]) -> bool:
        return any(part.in_weight and part.adapter in names for part in self.elastic_parts)

    def _mixed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Rows of a batch through the adapters that they name."""
        layer: Any = self
        pieces: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            known = name in layer.lora_A
            found = self._merged_forward(x[rows], [name]) if known else layer.base_layer(x[rows])
            pieces |= dict(zip(rows, found, strict=True))
        return torch.stack([pieces[row] for row in range(len(names))])

    def _merged_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        parts = [self.part(name) for name in names]
        for part in parts:
            part.observe(x)
        return merged_output(parts, x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters as peft does; those of SparsePEFT write the weight that their forward computes with."""
        layer: Any = self
        if not self._in_weight([part.adapter for part in self.elastic_parts]):
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        names = check_adapters_to_merge(layer, adapter_names)
        if layer.merged_adapters and self._in_weight(names):
            raise ValueError(
                f"{layer.merged_adapters[0]} is merged already, which hides the zeros and the grid that {names} are to "
                "keep; unmerge first, and merge them together"
            )
        # Those in the weight come first: what they keep is of the base as it is, not of one with another adapter in it.
        for name in sorted(names, key=lambda name: not self._in_weight([name])):
            part = next((part for part in self.elastic_parts if part.adapter == name), None)
            if part is None or not part.in_weight:
                super().merge(safe_merge, [name])  # type: ignore[misc]
            else:
                part.merge(safe=safe_merge)
                layer.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged adapters out again, the last one first; the base's weight is then what it was before those of
        SparsePEFT, bit for bit."""
        layer: Any = self
        if not any(part.kept is not None for part in self.elastic_parts):
            super().unmerge()  # type: ignore[misc]
            return
        while layer.merged_adapters:
            name = layer.merged_adapters.pop()
            before, part = list(layer.merged_adapters), self.part(name)
            if part.kept is not None:
                part.unmerge()
                continue
            layer.merged_adapters[:] = [name]
            super().unmerge()  # type: ignore[misc]
            layer.merged_adapters[:] = before


def weight_kind(config: RankedConfig | None, base: nn.Module, *, name: str) -> dict[str, bool]:
    """Whether an adapter keeps the zeros of its base, and its grid, which a head beside quantised layers has not."""
    sparse, aware = config is not None and config.sparse, config is not None and config.quantization_aware
    check_weight(base, name=name, in_weight=sparse or aware)
    grid = grid_of(base, name=name) if aware else None
    if aware and grid is None and is_quantised(base):
        raise UnsupportedModelError(
            f"{name} is quantised to no integers of 2 to 8 bits, which quantization_aware=True needs; leave it out"
        )
    return {"sparse": sparse, "quantization_aware": grid is not None}


class LayerFactory:
    """Makes elastic LoRA layers for peft, and undoes what it made when it has to refuse a module.

    peft replaces one module after another and keeps what it has replaced when one fails, which would leave the user's
    model half adapted. It shows a factory neither the model nor the module's parent, so that both are looked for, among
    all modules in memory, where one has to be refused.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[LayerFactory], tuple[()]]:
        return LayerFactory, ()  # of a copy or a pickle, nothing was made yet

    def __call__(self, target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
        name = kwargs["target_name"]
        try:
            layer = _elastic_layer(target, adapter_name, config, **kwargs)
        except (ElasticError, ValueError, TypeError) as error:
            self._undo(target)
            if isinstance(error, ElasticError):
                raise
            raise UnsupportedModelError(f"{name} cannot be adapted: {' '.join(str(error).split())}") from error
        self._made.add(layer)
        return layer

    def _undo(self, refused: nn.Module) -> None:
        """Puts back what stands in the model of the refused module; the configuration may have served others before."""
        parents = module_parents()
        models = models_around(refused, parents)
        for layer in [made for made in self._made if models_around(made, parents).keys() & models]:
            for parent, name in parents.get(id(layer), ()):
                parent._modules[name] = layer.get_base_layer()  # type: ignore[operator]
            self._made.discard(layer)


Parents = Mapping[int, Sequence[tuple[nn.Module, str]]]


def module_parents() -> Parents:
    """The parents of all modules in memory, and what they call them, by ``id``."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            for name, child in (vars(thing).get("_modules") or {}).items():
                found.setdefault(id(child), []).append((thing, name))
    return found


def models_around(module: nn.Module, parents: Parents) -> dict[int, nn.Module]:
    """The transformers models that a module stands in, by ``id``; where there is none, what it stands in at all."""
    above: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        for parent, _ in parents.get(id(waiting.pop()), ()):
            if id(parent) not in above:
                above[id(parent)] = parent
                waiting.append(parent)
    models: dict[int, nn.Module] = {key: found for key, found in above.items() if isinstance(found, PreTrainedModel)}
    return models or above


def _elastic_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
    name = kwargs["target_name"]
    check_variants(config)
    group, ranks = config.ranks_of(name)
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    kind = weight_kind(config, base, name=name)
    config.fan_in_fan_out = isinstance(base, Conv1D)
    layer: Any = LoraModel._create_new_module(config.plain(), adapter_name, target, **kwargs)
    down = dict(layer.lora_A.named_children()).get(adapter_name)
    if type(down) is not nn.Linear or isinstance(base, nn.MultiheadAttention):
        raise UnsupportedModelError(
            f"{name} is a {type(base).__name__}, whose adapters have no rank to choose; target linear layers only "
            "(nn.Linear, Conv1D, and quantised ones)"
        )
    layer.__class__ = with_mixin(type(layer), ElasticLoraLayer)
    layer.elastic_parts = []
    choice = choice_name(name, adapter_name, group=group, share=config.share)
    layer.add_part(adapter_name, module_name=name, choice_name=choice, ranks=ranks, **kind)
    return layer
