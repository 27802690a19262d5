"""One adapter on one projection: which ranks it may have, what of it is active, and what merging it writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_elastic.adapters.masked import MergedWeight, merged_linear, wide_dtype
from hf_elastic.adapters.recognition import check_base, check_kept, check_patterns, described_base
from hf_elastic.errors import SpaceError, TrainingError, UnsupportedModelError
from hf_elastic.layers import ElasticConv1D, ElasticLinear, ElasticProjection, Region
from hf_elastic.parts import ElasticPart, LayerPart
from hf_elastic.quantgrid import grid_of
from hf_elastic.space import Choice, Value


@runtime_checkable
class RankedConfig(Protocol):
    """A LoRA configuration that knows which ranks a module may have."""

    share: str
    sparse: bool
    quantization_aware: bool
    ranks: Any
    rank_pattern: Any
    alpha_pattern: Any
    trained_on: dict[str, Any] | None

    def plain(self) -> LoraConfig:
        """The same without choices, of peft's own class."""

    def ranks_of(self, module: str) -> tuple[str, tuple[int, ...]]:
        """The entry that a module follows, and its ranks, ascending."""


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
        sparse: whether its product keeps the zeros of the base (SparsePEFT).
        quantization_aware: whether the sum is rounded to the base's grid (QA-SparsePEFT).
        start: ``(out, in)``, what the product is added to where that is not the base's weight but the float one that
            the base was rounded from.
        kept: the base's weight and bias as they were before the adapter was merged by its own :meth:`merge`.
        layer: the elastic layer that it stands in, if the model has such.
    """

    adapter: str
    wrapper: Any
    base: nn.Module
    module_name: str = field(kw_only=True)
    choice_name: str = field(kw_only=True)
    ranks: tuple[int, ...] = field(kw_only=True)
    sparse: bool = field(default=False, kw_only=True)
    quantization_aware: bool = field(default=False, kw_only=True)
    start: Tensor | None = field(default=None, init=False)
    kept: tuple[Tensor, Tensor | None] | None = field(default=None, init=False)
    layer: LayerPart | None = field(default=None, init=False)
    choices: tuple[Choice, ...] = field(default=(), init=False)
    _sublayer: str | None = field(default=None, init=False)
    _path: str | None = field(default=None, init=False)  # of the base among the projections of its layer
    _observers: int = field(default=0, init=False)

    @property
    def down(self) -> Any:
        """``A``, an elastic linear of weight ``(R, in)``."""
        return self.wrapper.lora_A[self.adapter]

    @property
    def up(self) -> Any:
        """``B``, an elastic linear of weight ``(out, R)``."""
        return self.wrapper.lora_B[self.adapter]

    @property
    def in_weight(self) -> bool:
        """Whether the adapter is part of the weight while it is trained, rather than added to what the base gives."""
        return self.sparse or self.quantization_aware

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

    @property
    def _chosen(self) -> bool:
        """Whether the rank is a choice; one that is part of the weight is one of a single value, so as to be merged."""
        return len(self.ranks) > 1 or self.in_weight

    def _linked_choices(self, adapters: Sequence[LoraPart]) -> tuple[Choice, ...]:
        if not self._chosen:
            return ()
        sharing = [part for part in adapters if part.choice_name == self.choice_name and part._chosen]
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

        with self.observed():
            handle = self.up.register_forward_pre_hook(record)
            try:
                yield seen
            finally:
                handle.remove()

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Lets hooks on :attr:`up` see the components inside the block, also where the adapter is in the weight."""
        self._observers += 1
        try:
            yield
        finally:
            self._observers -= 1

    def observe(self, x: Tensor) -> None:
        """Shows hooks on :attr:`up` what its components are for inputs ``(..., in)``, while somebody observes."""
        if self._observers and self.in_weight:
            down, _ = self.factors()
            self.up(nn.functional.linear(x.detach().to(down.dtype), down.detach()))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The active ``A`` (r, i) and ``B`` (o, r)."""
        rank, down, up = self.down.active_out_features, self.down.weight, self.up
        return down[:rank, : self.down.active_in_features], taken(up.weight, up.active_region()["weight"])

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the base's parameters that merging changes."""
        return ("weight", "bias") if self.up.bias is not None else ("weight",)

    def merge(self, *, safe: bool = False) -> None:
        """Writes the weight of the training forward into the base, of the whole rank or what is active.

        Args:
            safe: whether to check that it is finite before anything is written.
        """
        base: Any = self.base
        whole = self.merged_into({name: base.get_parameter(name).data for name in self.targets})
        if safe and not all(bool(torch.isfinite(tensor).all()) for tensor in whole.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {self.adapter} seems to be broken")
        self.kept = (base.weight.data, None if base.bias is None else base.bias.data)
        base.weight.data = whole["weight"]
        if "bias" in whole:
            base.bias.data = whole["bias"]

    def unmerge(self) -> None:
        """Gives the base the weights back that it had before :meth:`merge`."""
        base: Any = self.base
        assert self.kept is not None
        base.weight.data = self.kept[0]
        if base.bias is not None and self.kept[1] is not None:
            base.bias.data = self.kept[1]
        self.kept = None

    def merged_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the base with the adapter merged; those given stay as they are.

        Args:
            parameters: of the base, by name, of their full shapes.
        """
        if not self.in_weight:
            delta = self.delta()
            return {name: tensor + delta[name].to(tensor.dtype) for name, tensor in parameters.items()}
        found = dict(parameters)
        if (shift := _shift(self)) is not None:
            bias, rows = parameters["bias"].clone(), self.up.active_region()["bias"]
            _write(bias, taken(bias, rows) + shift.to(bias.dtype), rows)
            found["bias"] = bias
        transposed = bool(getattr(self.wrapper, "fan_in_fan_out", False))
        whole = (parameters["weight"].t() if transposed else parameters["weight"]).clone()  # (out, in)
        region = self.up.active_region()["weight"]
        inputs = slice(0, self.down.active_in_features)
        rule = merged_weight([self], taken(whole, tuple((rows, inputs) for rows, *_ in region)))
        with torch.autocast(whole.device.type, enabled=False):  # as in the forward
            _write(whole, rule(self.factors(), rule.zeros), region)
        found["weight"] = whole.t() if transposed else whole
        return found

    def delta(self) -> dict[str, Tensor]:
        r"""What merging adds: :math:`s B_{:o, :r} A_{:r, :i}`, and of a bias of ``B`` :math:`s b_{:o}`.

        Not of adapters that are part of the weight, see :meth:`merged_into`.
        """
        down, up, scaling = self.down, self.up, self.wrapper.scaling[self.adapter]
        rank, outputs = down.active_out_features, up.active_region()
        dtype, wide = up.weight.dtype, wide_dtype(up.weight)
        rows = torch.cat([up.weight[box] for box in outputs["weight"]]).to(wide)  # (o, r)
        with torch.autocast(rows.device.type, enabled=False):
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


def lora_parts(parts: Iterable[object], adapter: str | None = None) -> list[LoraPart]:
    """The elastic adapters among the parts of a supernet: of one name, or of all."""
    found = [part for part in parts if isinstance(part, LoraPart)]
    return found if adapter is None else [part for part in found if part.adapter == adapter]


def _placed(values: Tensor, region: Region, shape: tuple[int, ...]) -> Tensor:
    """Values of the active rows in a tensor of the full shape, zero elsewhere."""
    if values.shape == shape:
        return values
    whole = values.new_zeros(shape)
    _write(whole, values, region)
    return whole


def _write(whole: Tensor, values: Tensor, region: Region) -> None:
    """Writes values of the active rows into a tensor of the full shape."""
    start = 0
    for rows, *_ in region:
        count = rows.stop - rows.start
        part = values[start : start + count]
        whole[(rows, *(slice(0, size) for size in part.shape[1:]))] = part
        start += count


def taken(tensor: Tensor, region: Region) -> Tensor:
    """The rows of a region side by side, a view where it is one box."""
    return tensor[region[0]] if len(region) == 1 else torch.cat([tensor[box] for box in region])


def active_weight(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What is active of a projection's weight, as ``(o, i)``, and of its bias ``(o,)``."""
    weight, bias = base.get_parameter("weight"), dict(base.named_parameters(recurse=False)).get("bias")
    if isinstance(base, ElasticConv1D):
        region = base.active_region()
        turned = tuple((columns, rows) for rows, columns in region["weight"])
        return taken(weight.t(), turned), None if bias is None else taken(bias, region["bias"])
    if isinstance(base, ElasticLinear):
        region = base.active_region()
        return taken(weight, region["weight"]), None if bias is None else taken(bias, region["bias"])
    return (weight.t() if isinstance(base, Conv1D) else weight), bias


def merged_weight(parts: Sequence[LoraPart], weight: Tensor, *, alone: bool = False) -> MergedWeight:
    """How the weight ``(o, i)`` of a projection and its adapters make the one that it computes with.

    Args:
        parts: adapters on one projection.
        weight: active part of the projection's own.
        alone: leave the projection's own weight out of the sum.

    Raises:
        UnsupportedModelError: one of several adapters is rounded to the grid.
    """
    aware = next((part for part in parts if part.quantization_aware), None)
    if aware is not None and len(parts) > 1:
        raise UnsupportedModelError(
            f"{aware.module_name}: an adapter with quantization_aware=True decides the integers of its base, so it is "
            "used alone; activate one adapter at a time"
        )
    weight = weight.detach()
    if aware is not None and aware.start is not None and aware.start.device != weight.device:
        aware.start = aware.start.to(weight.device)  # the model was moved since
    start = weight if aware is None or aware.start is None else aware.start
    return MergedWeight(
        base=start, start=None if alone else start,
        scalings=tuple(float(part.wrapper.scaling[part.adapter]) for part in parts),
        masked=tuple(part.sparse for part in parts),
        grid=grid_of(aware.base, name=aware.module_name, checked=False) if aware is not None else None,
    )  # fmt: skip


def merged_output(parts: Sequence[LoraPart], x: Tensor) -> Tensor:
    """What a projection and its adapters make of inputs ``(..., i)`` where one of them is part of the weight.

    Dropout acts on the inputs of the adapters only; where the sum is rounded, on the inputs of the sum, as in the
    official code.

    Raises:
        TrainingError: the base's weight is trained.
    """
    wrapper = parts[0].wrapper
    if parts[0].base.get_parameter("weight").requires_grad and torch.is_grad_enabled():
        raise TrainingError(f"{parts[0].module_name} is trained itself, whose zeros are the adapter's mask; freeze it")
    weight, bias = active_weight(parts[0].base)
    shifts = [_shift(part) for part in parts]
    drops = [wrapper.lora_dropout[part.adapter] for part in parts]
    dropping = wrapper.training and any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in drops)
    if dropping and not any(part.quantization_aware for part in parts):
        result = wrapper.base_layer(x)
        for part, drop, shift in zip(parts, drops, shifts, strict=True):
            rule = merged_weight([part], weight, alone=True)
            result = result + merged_linear(drop(x), rule, part.factors(), bias=shift)
        return result  # type: ignore[no-any-return]
    for shift in shifts:
        if shift is not None:
            bias = shift if bias is None else bias + shift.to(bias.dtype)
    factors, rule = [factor for part in parts for factor in part.factors()], merged_weight(parts, weight)
    return called_as(
        parts[0].base, drops[0](x) if dropping else x, lambda inputs: merged_linear(inputs, rule, factors, bias=bias)
    )


def called_as(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Calls a module with another forward, so that its hooks see what goes in and comes out."""
    held = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        result: Tensor = module(x)
    finally:
        vars(module).pop("forward")
        if held is not None:
            vars(module)["forward"] = held
    return result


def _shift(part: LoraPart) -> Tensor | None:
    """What an adapter adds to the bias, ``(o,)``."""
    if part.up.bias is None:
        return None
    shift: Tensor = taken(part.up.bias, part.up.active_region()["bias"]) * part.wrapper.scaling[part.adapter]
    return shift


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
    check_kept(config, bases.values())
    if config.trained_on is not None:
        check_base(config.trained_on, bases, layers=layers, model=model, kept=config)
        return
    configs[adapter] = copy.copy(config)
    configs[adapter].trained_on = described_base(bases, layers=layers, model=model, kept=config)
