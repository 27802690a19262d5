"""LoRA layers with a rank to choose, on any base that peft's LoRA serves with two linear maps.

peft makes its own layer; afterwards its class is swapped for one with :class:`ElasticLoraLayer` before it, and its two
``nn.Linear`` become elastic (:class:`~hf_elastic.layers.ElasticLinear`). So forward passes are peft's, with several
adapters, mixed batches, disabled ones and quantised bases; only what merging adds is computed here.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.adapters.recognition import check_base, check_patterns, check_variants, described_base
from hf_elastic.errors import ElasticError, SpaceError, UnsupportedModelError
from hf_elastic.layers import ElasticProjection, PartHolder, Region, as_elastic_linear, rebuild, with_mixin
from hf_elastic.parts import ElasticPart, LayerPart
from hf_elastic.space import Choice, Value


@runtime_checkable
class RankedConfig(Protocol):
    """A LoRA configuration that knows which ranks a module may have."""

    share: str
    ranks: Any
    rank_pattern: Any
    alpha_pattern: Any
    trained_on: dict[str, Any] | None

    def plain(self) -> LoraConfig:
        """The same without choices, of peft's own class."""

    def ranks_of(self, module: str) -> tuple[str, tuple[int, ...]]:
        """The entry that a module follows, and its ranks, ascending."""


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
        self.add_part(adapter_name, module_name=name, choice_name=choice, ranks=ranks)

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
        return next(part for part in self.elastic_parts if part.adapter == adapter).delta()["weight"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (self.__class__.__bases__[1], ElasticLoraLayer), self.__getstate__()


def choice_name(module: str, adapter: str, *, group: str, share: str) -> str:
    """Name of the choice of rank that a module follows.

    ``layers.3.r`` of all modules of layer 3, ``layers.3.q_proj|v_proj.r`` of those that follow one pattern,
    ``layers.3.self_attn.q_proj.r`` of one module; modules outside the layers have one each. That of an adapter which is
    not called ``default`` begins with its name. In a model with two stacks of layers, those of equal number share.
    """
    layer, inner = split_name(module)
    if share == "module" or not layer:
        name = f"{layer}.{inner}" if layer else inner
    else:
        name = f"{layer}.{group}" if group else layer
    return f"{name}.r" if adapter == "default" else f"{adapter}.{name}.r"


_STACKS = ("layers", "layer", "h", "block", "blocks")  # what transformers calls its lists of layers


def split_name(module: str) -> tuple[str, str]:
    """Splits ``model.layers.3.self_attn.q_proj`` into ``layers.3`` and ``self_attn.q_proj``; no layer gives ``""``."""
    pieces = module.split(".")
    numbers = [place for place, piece in enumerate(pieces) if piece.isdecimal()]
    place = next((place for place in numbers if place and pieces[place - 1] in _STACKS), None)
    if place is None:
        return "", module
    return f"layers.{pieces[place]}", ".".join(pieces[place + 1 :])


@dataclass(eq=False)
class LoraPart:
    """One adapter on one projection: its rank is a choice, its other sizes follow the projection.

    Attributes:
        adapter: name of the adapter.
        wrapper: the LoRA layer in the model.
        base: the projection inside.
        module_name: name of the projection in the model that peft adapted.
        choice_name: name of the choice that the rank follows, if there are several ranks.
        ranks: those it may have, ascending; the last is the one it was made with.
        layer: the elastic layer that it stands in, if the model has such.
    """

    adapter: str
    wrapper: Any
    base: nn.Module
    module_name: str = field(kw_only=True)
    choice_name: str = field(kw_only=True)
    ranks: tuple[int, ...] = field(kw_only=True)
    layer: LayerPart | None = field(default=None, init=False)
    choices: tuple[Choice, ...] = field(default=(), init=False)
    _sublayer: str | None = field(default=None, init=False)
    _path: str | None = field(default=None, init=False)  # of the base among the projections of its layer

    @property
    def down(self) -> Any:
        """``A``, an elastic linear of weight ``(R, in)``."""
        return self.wrapper.lora_A[self.adapter]

    @property
    def up(self) -> Any:
        """``B``, an elastic linear of weight ``(out, R)``."""
        return self.wrapper.lora_B[self.adapter]

    @property
    def in_use(self) -> bool:
        """Whether forwards run the adapter: it is active, and adapters are not disabled."""
        return self.adapter in self.wrapper.active_adapters and not self.wrapper.disable_adapters

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the base's weights now."""
        return self.adapter in self.wrapper.merged_adapters

    @property
    def attached(self) -> bool:
        """Whether the adapter is still in its wrapper: peft may have deleted it."""
        return self.adapter in self.wrapper.lora_A

    def link(self, parts: Sequence[ElasticPart], model: nn.Module) -> None:
        """Finds the elastic layer it stands in, on whose presence its choice depends."""
        layers = [part for part in parts if isinstance(part, LayerPart)]
        self.layer = next((p for p in layers if any(m is self.wrapper for m in p.layer.modules())), None)
        if self.layer is not None:
            self._sublayer = self.layer.sublayer_of(self.wrapper)
            paths = self.layer.projections().items()
            self._path = next((path for path, module in paths if module is self.base), None)
        adapters = [part for part in parts if isinstance(part, LoraPart)]
        self.choices = self._linked_choices(adapters)
        mates = [part for part in adapters if part.adapter == self.adapter]
        if mates[0] is self:
            _recognise(self.adapter, mates, layers=layers, model=model)

    def _linked_choices(self, adapters: Sequence[LoraPart]) -> tuple[Choice, ...]:
        if len(self.ranks) < 2:
            return ()
        sharing = [part for part in adapters if part.choice_name == self.choice_name and len(part.ranks) > 1]
        if other := next((part for part in sharing if part.ranks != self.ranks), None):
            raise SpaceError(
                f"{self.module_name} and {other.module_name} share {self.choice_name!r}, but have ranks "
                f"{list(self.ranks)} and {list(other.ranks)} (rank_pattern); use share='module' or "
                "ranks={pattern: [...]}"
            )
        if self.layer is None:
            return (Choice(self.choice_name, self.ranks),)
        when = self.layer.presence({self.layer.sublayer_of(part.wrapper) for part in sharing})
        needed = {condition.choice for condition in when}
        return (*(c for c in self.layer.choices if c.name in needed or needed and c.name == self.layer.names.depth),
                Choice(self.choice_name, self.ranks, when=when))  # fmt: skip

    def rank(self, architecture: Mapping[str, Value]) -> int:
        """Rank in an architecture, 0 where the sublayer is skipped."""
        if not self._present(architecture):
            return 0
        return int(architecture[self.choice_name]) if len(self.ranks) > 1 else self.ranks[-1]

    def _present(self, architecture: Mapping[str, Value]) -> bool:
        if self.layer is None:
            return True
        shape = self.layer.shape(architecture)
        return {"attention": shape.attention, "mlp": shape.mlp, None: not shape.skipped}[self._sublayer]

    def set(self, architecture: Mapping[str, Value]) -> None:
        """Makes the adapter of its rank, and as wide as its base is now; layers are set before what they hold."""
        rank = int(architecture[self.choice_name]) if len(self.ranks) > 1 else self.ranks[-1]
        down, up = self.down.__dict__, self.up.__dict__
        down["active_out_features"] = up["active_in_features"] = rank
        if isinstance(self.base, ElasticProjection):
            down["active_in_features"] = self.base.active_in_features
            up["active_out_features"] = self.base.active_out_features

    def regions(self) -> dict[int, Region]:
        """Active boxes of both factors, by ``id`` of the parameter."""
        return {
            id(parameter): linear.active_region()[name]
            for linear in (self.down, self.up)
            for name, parameter in linear.named_parameters(recurse=False)
        }

    @property
    def _measured_name(self) -> str:
        return choice_name(self.module_name, self.adapter, group="", share="module")

    def expected(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """The rank in an architecture, 0 where the sublayer is skipped; nothing while the adapter is not in use."""
        return {self._measured_name: self.rank(architecture)} if self.in_use else {}

    @contextmanager
    def watch(self) -> Iterator[dict[str, int]]:
        """Reads the rank off the tensors that enter ``B``."""
        seen = {self._measured_name: 0} if self.in_use else {}

        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[self._measured_name] = inputs[0].shape[-1]

        handle = self.up.register_forward_pre_hook(record)
        try:
            yield seen
        finally:
            handle.remove()

    def delta(self) -> dict[str, Tensor]:
        r"""What merging adds: :math:`s B_{:o, :r} A_{:r, :i}`, and of a bias of ``B`` :math:`s b_{:o}`."""
        down, up, scaling = self.down, self.up, self.wrapper.scaling[self.adapter]
        rank, outputs = down.active_out_features, up.active_region()
        dtype = up.weight.dtype
        # Some CPUs multiply slowly in half precision: peft merges in fp32 there, too.
        wide = torch.float32 if up.weight.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype
        rows = torch.cat([up.weight[box] for box in outputs["weight"]]).to(wide)  # (o, r)
        product = rows @ down.weight[:rank, : down.active_in_features].to(wide)  # (o, i)
        whole = (up.out_features, down.in_features)
        found = {"weight": _placed(product, outputs["weight"], whole)}
        if up.bias is not None:
            found["bias"] = _placed(torch.cat([up.bias[box] for box in outputs["bias"]]), outputs["bias"], whole[:1])
        if getattr(self.wrapper, "fan_in_fan_out", False):
            found["weight"] = found["weight"].t()
        return {name: (value * scaling).to(dtype) for name, value in found.items()}

    def sizes(self, architecture: Mapping[str, Value]) -> tuple[int, int]:
        """Inputs and outputs of the projection in an architecture."""
        if self.layer is None or self._path is None:
            return self.down.in_features, self.up.out_features
        return self.layer.projection_sizes(self._path, self.layer.shape(architecture))

    def parameters(self, architecture: Mapping[str, Value]) -> int:
        """``r (in + out)``, and the outputs of a bias; 0 where the sublayer is skipped."""
        inputs, outputs = self.sizes(architecture)
        rank = self.rank(architecture)
        return rank * (inputs + outputs) + (outputs if self.up.bias is not None and rank else 0)

    def macs(self, architecture: Mapping[str, Value], *, seq_len: int) -> int:
        """``T r (in + out)``."""
        return seq_len * self.rank(architecture) * sum(self.sizes(architecture))


def _placed(values: Tensor, region: Region, shape: tuple[int, ...]) -> Tensor:
    """Values of the active rows in a tensor of the full shape, zero elsewhere."""
    if values.shape == shape:
        return values
    whole, start = values.new_zeros(shape), 0
    for rows, *_ in region:
        count = rows.stop - rows.start
        part = values[start : start + count]
        whole[(rows, *(slice(0, size) for size in part.shape[1:]))] = part
        start += count
    return whole


def _recognise(
    adapter: str, parts: Sequence[LoraPart], *, layers: Sequence[LayerPart], model: nn.Module
) -> None:
    """Checks what the parts of one adapter stand on, or notes it in the model's own copy of the configuration.

    The user's configuration stays as it was given: it may serve another model.
    """
    configs = vars(model).get("peft_config") or {}
    config = configs.get(adapter)
    if not isinstance(config, RankedConfig) or any(part.merged for part in parts):
        return
    bases = {part.module_name: part.base for part in parts}
    check_patterns(config, list(bases))
    if config.trained_on is not None:
        check_base(config.trained_on, bases, layers=layers)
        return
    configs[adapter] = copy.copy(config)
    configs[adapter].trained_on = described_base(bases, layers=layers)


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
    layer.add_part(adapter_name, module_name=name, choice_name=choice, ranks=ranks)
    return layer
