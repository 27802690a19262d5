"""Elastic modules: stock linears that use an active prefix of their weights, and modules that can be skipped.

A stock module becomes elastic by *class swap*: the object, its parameters and their names stay, only its
class becomes a subclass with a few integer attributes. Hence ``state_dict`` is that of the stock model, and
at full width the very same kernel runs on the very same tensors (bit-identical logits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.models.elastic_mixins import Mixin, with_mixin
from hf_elastic.quantgrid import SCHEME

_WRAPPED = {"forward", "_original_forward"}  # what accelerate sets
Region = tuple[tuple[slice, ...], ...]
"""Active part of a parameter: disjoint index boxes; ``()`` means that nothing of it is active."""


def take_region(tensor: Tensor, region: Region) -> Tensor:
    """Copies the boxes of a region side by side along the dimension in which they differ."""
    axes = [axis for axis, cuts in enumerate(zip(*region, strict=True)) if len({(c.start, c.stop) for c in cuts}) > 1]
    return torch.cat([tensor[box] for box in region], dim=axes[0] if axes else -1).clone()


class ElasticLinear(nn.Linear):
    """A linear layer of which a prefix of inputs and outputs is active: ``y = x W[:o, :i]ᵀ + b[:o]``.

    Made by :func:`make_elastic_linear`, never constructed. ``x`` is ``(..., i)``, the result ``(..., o)``. With
    ``fused > 1`` the outputs are that many projections side by side, and the prefix is taken within each.
    """

    active_in_features: int
    active_out_features: int
    fused: int = 1

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.active_out_features, self.active_in_features
        if rows == self.out_features and columns == self.in_features:
            return nn.functional.linear(input, self.weight, self.bias)
        if self.fused > 1 and rows < self.out_features:
            return nn.functional.linear(input, self._parts(self.weight)[:, :columns], self._parts(self.bias))
        weight = self.weight[:rows, :columns]
        if columns < self.in_features and self.weight.requires_grad and torch.is_grad_enabled():
            # Autograd returns the gradient of a strided weight transposed; writing that into the gradient of the
            # whole weight would cost more than this copy (benchmarks/backbone.py with few tokens shows it).
            weight = weight.contiguous()
        bias = None if self.bias is None else self.bias[:rows]
        return nn.functional.linear(input, weight, bias)

    @property
    def whole_features(self) -> tuple[int, int]:
        """All (in, out) features."""
        return self.in_features, self.out_features

    def _parts(self, tensor: Any) -> Any:
        """Active rows of each fused projection: ``(out, ...) -> (o, ...)``."""
        if tensor is None:
            return None
        part = self.active_out_features // self.fused
        return tensor.unflatten(0, (self.fused, -1))[:, :part].flatten(0, 1)  # (fused, out/fused, ...) -> (o, ...)

    def active_region(self) -> dict[str, Region]:
        """Active boxes of ``weight`` (out, in) and ``bias`` (out,), one box per fused output."""
        whole, part = self.out_features // self.fused, self.active_out_features // self.fused
        rows = [slice(k * whole, k * whole + part) for k in range(self.fused)]
        regions: dict[str, Region] = {"weight": tuple((r, slice(0, self.active_in_features)) for r in rows)}
        if self.bias is not None:
            regions["bias"] = tuple((r,) for r in rows)
        return regions


class ElasticConv1D(Conv1D):
    """GPT-2's transposed linear (weight ``(in, out)``) with an active prefix, maybe several fused outputs.

    ``fused=3`` is GPT-2's ``c_attn``: the output is query, key and value side by side, and the prefix is
    taken within each third, ``y = x W.view(in, 3, out/3)[:i, :, :o/3]``. ``active_out_features`` counts all
    fused outputs.
    """

    active_in_features: int
    active_out_features: int
    fused: int

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.active_in_features, self.active_out_features
        if rows == self.nx and columns == self.nf:
            return super().forward(x)
        if self.fused == 1:
            weight, bias = self.weight[:rows, :columns], self.bias[:columns]
        else:
            part = columns // self.fused
            weight = self.weight.unflatten(1, (self.fused, -1))[:rows, :, :part].flatten(1)  # (i, fused·o)
            bias = self.bias.unflatten(0, (self.fused, -1))[:, :part].flatten()  # (fused·o,)
        output = torch.addmm(bias, x.reshape(-1, rows), weight)  # (B·T, o)
        return output.view(*x.shape[:-1], columns)  # (..., o)

    @property
    def whole_features(self) -> tuple[int, int]:
        """All (in, out) features."""
        return self.nx, self.nf

    def active_region(self) -> dict[str, Region]:
        """Active boxes of ``weight`` (in, out) and ``bias`` (out,), one box per fused output."""
        rows = slice(0, self.active_in_features)
        whole, part = self.nf // self.fused, self.active_out_features // self.fused
        columns = [slice(k * whole, k * whole + part) for k in range(self.fused)]
        return {"weight": tuple((rows, c) for c in columns), "bias": tuple((c,) for c in columns)}


ElasticProjection = ElasticLinear | ElasticConv1D


def make_elastic_linear(module: nn.Module, *, name: str, fused: int = 1) -> ElasticProjection:
    """Swaps the class of a stock linear in place and returns it, wholly active.

    Args:
        module: an ``nn.Linear`` or a GPT-2 ``Conv1D``, exactly of that class.
        name: where the module stands, for the error.
        fused: how many projections of equal width the output holds side by side.

    Raises:
        UnsupportedModelError: see :func:`check_linear`.
    """
    check_linear(module, name=name, fused=fused)
    if isinstance(module, nn.Linear):
        return as_elastic_linear(module)
    _swap_class(module, ElasticConv1D)
    swapped: Any = module
    swapped.active_in_features, swapped.active_out_features, swapped.fused = module.nx, module.nf, fused
    assert isinstance(swapped, ElasticConv1D)
    return swapped


def as_elastic_linear(module: nn.Linear, *, fused: int = 1) -> ElasticLinear:
    """Swaps the class of an ``nn.Linear`` that nobody else has touched, and returns it, wholly active."""
    _swap_class(module, ElasticLinear)
    swapped: Any = module
    swapped.active_in_features, swapped.active_out_features, swapped.fused = (
        module.in_features, module.out_features, fused,
    )  # fmt: skip
    assert isinstance(swapped, ElasticLinear)
    return swapped


def check_linear(module: nn.Module, *, name: str, fused: int = 1) -> None:
    """Refuses what :func:`make_elastic_linear` cannot swap, without changing anything.

    Raises:
        UnsupportedModelError: the module is of another class (quantised, wrapped by an adapter, already
            elastic), its weight is computed (pruned, parametrised), or its ``forward`` is its own.
    """
    if SCHEME in vars(module):
        raise UnsupportedModelError(
            f"{name} is quantised: a cut through a group of inputs has no scale; make the float model elastic, extract "
            "a subnet, and quantise that"
        )
    check_forward(module, name=name)
    kind = type(module)
    if kind is not Conv1D and (kind is not nn.Linear or fused != 1):
        what = "a fused nn.Linear" if kind is nn.Linear else f"a {kind.__module__}.{kind.__qualname__}"
        raise UnsupportedModelError(
            f"{name} is {what}, only nn.Linear and Conv1D (the latter also fused) can be made elastic; "
            "call make_elastic on the model as from_pretrained returned it, before quantisation or adapters"
        )
    if "weight" not in dict(module.named_parameters(recurse=False)):
        raise UnsupportedModelError(
            f"{name} computes its weight from other tensors; make that permanent first "
            "(torch.nn.utils.prune.remove or parametrize.remove_parametrizations)"
        )


def check_forward(module: nn.Module, *, name: str) -> None:
    """Refuses a module whose object holds a ``forward``, by which a class swap would silently have no effect.

    Raises:
        UnsupportedModelError: accelerate hung an offloading or dispatch hook on the module.
    """
    if "forward" in vars(module) and not _is_stock_forward(module):
        raise UnsupportedModelError(
            f"{name} has a forward of its own (an accelerate offloading or dispatch hook); call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, or load without device_map"
        )


def _is_stock_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` that the object holds is that of its class, as accelerate leaves it when a hook goes."""
    return getattr(vars(module)["forward"], "__func__", None) is type(module).forward


def _swap_class(module: nn.Module, made: type[nn.Module]) -> None:
    vars(module).pop("forward", None)  # the stock one, which would hide that of the new class
    module.__class__ = made


@dataclass(frozen=True)
class Skip:
    """What a module returns while its sublayer is skipped.

    Attributes:
        module: path of the module inside its layer.
        returns: ``zero`` (a scalar 0, for a branch that is added to the residual), ``input`` (its first
            argument) or ``residual`` (its last positional argument).
        outputs: 1 for a tensor, 2 for ``(tensor, None)``.
    """

    module: str
    returns: Literal["zero", "input", "residual"]
    outputs: int = 1


class SkippableModule(Mixin):
    """Mixin that :func:`make_skippable` puts before a stock class: ``forward`` does nothing while ``skipped``."""

    skipped: bool
    skip_rule: Skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.skipped:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        write_cache_filler(self, hidden, kwargs.get("past_key_values"))
        if self.skip_rule.returns == "zero":
            result = hidden.new_zeros(())
        else:
            result = hidden if self.skip_rule.returns == "input" else args[-1]
        return result if self.skip_rule.outputs == 1 else (result, None)


def write_cache_filler(module: nn.Module, hidden: Tensor, cache: Any) -> None:
    """Keeps the length of a KV cache right when a layer's attention is skipped.

    transformers reads the length of a cache from its first layer, and counts an empty tensor as length 0; one
    zero per token, ``(B, 1, T, 1)``, keeps it right whichever layers are skipped.
    """
    if cache is None:
        return
    zeros = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)  # (B, 1, T, 1)
    cache.update(zeros, zeros, module.layer_idx)


def make_skippable(module: nn.Module, rule: Skip) -> SkippableModule:
    """Swaps the class of a stock module in place so that it can be skipped, and returns it, not skipped.

    Raises:
        UnsupportedModelError: see :func:`check_forward`.
    """
    check_forward(module, name=rule.module)
    if not isinstance(module, SkippableModule):
        _swap_class(module, with_mixin(type(module), SkippableModule))
    module.skipped, module.skip_rule = False, rule  # type: ignore[assignment]
    assert isinstance(module, SkippableModule)
    return module


class PartHolder(Mixin):
    """Mixin for a module that carries elastic parts; :class:`~hf_elastic.supernet.Supernet` finds them here."""

    elastic_parts: list[Any]


def make_part_holder(module: nn.Module, parts: list[Any]) -> PartHolder:
    """Swaps the class of a stock module in place so that it carries ``parts``."""
    module.__class__ = with_mixin(type(module), PartHolder)
    module.elastic_parts = parts  # type: ignore[assignment]
    assert isinstance(module, PartHolder)
    return module


def plain_children(root: nn.Module, inside: Mapping[int, nn.Module], *, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules below ``root`` and itself, with their names, wrappers replaced by what is inside them.

    Args:
        root: where to begin.
        inside: what each wrapper wraps, by ``id`` of the wrapper.
        prefix: name of ``root``.
    """
    yield prefix, root
    for name, child in root.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from plain_children(_unwrapped(child, inside), inside, prefix=path)


def _unwrapped(module: nn.Module, inside: Mapping[int, nn.Module]) -> nn.Module:
    """What a module stands for: itself, what it wraps, or of a peft ``ModulesToSaveWrapper`` the copy in use."""
    children = dict(module.named_children())
    if children.keys() >= {"original_module", "modules_to_save"}:
        copies = dict(children["modules_to_save"].named_children())
        stated = vars(module).get("_active_adapter", ())
        in_use = [name for name in ([stated] if isinstance(stated, str) else stated) if name in copies]
        return copies[in_use[0]] if in_use else children["original_module"]
    return inside.get(id(module), module)


@contextmanager
def without_wrappers(root: nn.Module, inside: Mapping[int, nn.Module]) -> Iterator[None]:
    """Puts what is inside each wrapper in its place inside the block, and the wrappers back at the end.

    Args:
        root, inside: as for :func:`plain_children`.
    """
    children = [(parent, name, child) for parent in root.modules() for name, child in parent.named_children()]
    wrapped = [(parent, name, child) for parent, name, child in children if _unwrapped(child, inside) is not child]
    for parent, name, child in wrapped:
        parent._modules[name] = _unwrapped(child, inside)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Makes torch's random numbers on the CPU a function of ``seed`` inside the block, and restores their state.

    For what draws from the state that all libraries share, such as new modules of transformers and peft. ``None``
    leaves them as they are.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode inside the block, and gives each its own mode back at the end.

    ``model.train(mode)`` would overwrite the modes of submodules, such as an encoder frozen in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Lets a model compute in the dtype of its weights inside the block.

    Accelerate wraps the forward of a model that it trains in mixed precision in autocast, and leaves it so.
    """
    wrapped = {module: vars(module)["forward"] for module in model.modules() if vars(module).keys() >= _WRAPPED}
    for module in wrapped:
        del vars(module)["forward"]
    try:
        yield
    finally:
        for module, forward in wrapped.items():
            vars(module)["forward"] = forward
