"""What a proxy is given, and how it runs a model without touching it: its parameters are replaced for one call only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.proxies.roles import Roles, loaded_weight, module_of

Batch = Mapping[str, Tensor]
Target = Literal["auto", "loss", "signs", "sum"]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        model: the model.
        roles: which of its modules are what.
        batches: inputs, for proxies that need data.
        target: what is differentiated. ``loss`` is the model's own (``labels`` in the batch), ``sum`` the sum of its
            first output besides the loss, ``signs`` that output times fixed random signs, summed; ``auto`` is the loss
            where there are labels and signs where not. Behind a LayerNorm with gains of one, as they are before
            training, the sum is constant, so that every gradient of ``sum`` is rounding noise; published FlexiBERT
            scores were made so.
        single: whether all of a model in half precision is computed in single precision, on copies for the length of a
            call: for what half precision leaves nothing of, such as second derivatives and signs of gradients.
    """

    model: nn.Module
    roles: Roles
    batches: tuple[Batch, ...] = ()
    target: Target = "auto"
    single: bool = False

    def needed(self) -> tuple[Batch, ...]:
        """The batches.

        Raises:
            DataError: there are none.
        """
        if not self.batches:
            raise DataError("this proxy needs batches=[...] of model inputs; zerolm, synflow and dss need none")
        return self.batches

    def weights(self, names: Sequence[str] | None = None) -> Weights:
        """Weights by module name, by default of all projections: leaves that share memory with the model.

        Raises:
            UnsupportedModelError: one is no matrix of floats, is not loaded, or is computed from other tensors.
        """
        chosen = self.roles.projections if names is None else names
        found = {name: _parameter(self.model, name).detach() for name in chosen}
        return {name: (precise(w) if self.single else w).requires_grad_() for name, w in found.items()}

    def differentiated(self, batch: Batch, weights: Weights) -> Tensor:
        """The target on a batch as a function of ``weights``.

        Raises:
            DataError: the loss is wanted, and there is none or it is not finite.
            UnsupportedModelError: what is wanted is no tensor, or cannot be differentiated.
        """
        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        if self.single:
            held = (*self.model.named_parameters(), *self.model.named_buffers())
            narrow = {name: tensor for name, tensor in held if tensor.dtype in (torch.float16, torch.bfloat16)}
            replaced = {name: precise(tensor) for name, tensor in narrow.items()} | replaced
        output = functional_call(self.model, replaced, args=(), kwargs=dict(batch))
        loss = output.get("loss") if isinstance(output, dict) else None
        wanted = self.target
        if wanted == "auto":
            wanted = "signs" if loss is None else "loss"
        if wanted == "loss":
            return _differentiable(_loss(loss))
        first = first_output(output)
        return _differentiable(first.sum() if wanted == "sum" else (first * signs(first.shape[-1]).to(first)).sum())


def _loss(loss: Tensor | None) -> Tensor:
    if loss is None:
        raise DataError("the model returns no loss on this batch; add labels, or use target='signs'")
    return finite(loss, what="the model's loss")


def _differentiable(value: Tensor) -> Tensor:
    if not value.requires_grad:
        raise UnsupportedModelError(
            "the model's output has no gradient by its projections: its forward detaches them or runs without autograd"
        )
    return value


def _parameter(model: nn.Module, name: str) -> Tensor:
    """The weight of a module, if it is a parameter that may be replaced."""
    weight = loaded_weight(model, name)
    if dict(module_of(model, name).named_parameters(recurse=False)).get("weight") is not weight:
        raise UnsupportedModelError(
            f"{name} computes its weight from other tensors (an adapter, a mask or a parametrisation); merge or remove "
            "that first"
        )
    return weight


def finite(tensor: Tensor, *, what: str) -> Tensor:
    """The tensor itself.

    Raises:
        DataError: an entry is not finite.
    """
    if not bool(tensor.isfinite().all()):
        raise DataError(
            f"{what} is not finite; check the weights and the batches (half precision overflows where float32 does not)"
        )
    return tensor


def first_output(output: Any) -> Tensor:
    """The first tensor that a model returned besides its loss.

    Raises:
        UnsupportedModelError: what it returned first is no tensor ``(..., D)``.
    """
    found = output
    if isinstance(output, dict):
        found = next((value for name, value in output.items() if name != "loss"), None)
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    if not isinstance(found, Tensor) or not found.dim():
        raise UnsupportedModelError(
            f"the model returned a {type(found).__name__} where its output was looked for; let it return a tensor, a "
            "tuple that begins with one, or a dict with its loss under 'loss'"
        )
    return found


def signs(width: int) -> Tensor:
    """Fixed random signs ``(D,)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (width,), generator=generator) * 2 - 1


def gradients(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and gradient of every projection, ``(O, I)``, by the target's mean over the batches."""
    weights = subject.weights()
    total = mean_gradient(subject, weights)
    yield from _triples(subject, weights, total)


def mean_gradient(subject: Subject, weights: Weights) -> list[Tensor]:
    """Gradients of the target's mean over the batches, in single precision at least.

    Raises:
        DataError: one is not finite.
    """
    batches = subject.needed()
    total = [torch.zeros_like(precise(weight)) for weight in weights.values()]
    for batch in batches:
        found = derivatives(subject.differentiated(batch, weights), list(weights.values()))
        total = [t + g / len(batches) for t, g in zip(total, found, strict=True)]
    return [finite(t, what=f"the gradient of {name}") for name, t in zip(weights, total, strict=True)]


def derivatives(value: Tensor, tensors: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a scalar, zeros by what it does not depend on."""
    if not value.requires_grad or not tensors:
        return tuple(torch.zeros_like(tensor) for tensor in tensors)
    return torch.autograd.grad(value, list(tensors), create_graph=create_graph, materialize_grads=True)


def precise(tensor: Tensor) -> Tensor:
    """A tensor without its graph, in single precision at least, so that sums of squares do not overflow."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _triples(subject: Subject, weights: Weights, found: Sequence[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        yield name, oriented(subject.model, name, precise(weight)), oriented(subject.model, name, gradient)


def oriented(model: nn.Module, name: str, matrix: Tensor) -> Tensor:
    """A matrix of a projection as ``(O, I)``."""
    return matrix.t() if isinstance(model.get_submodule(name), Conv1D) else matrix


def plain_attention() -> Any:
    """A context in which attention is computed by plain operations: they can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def ones_pass(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and gradient of every projection where all weights are positive and all embeddings are ones.

    ``R``, the sum of the last hidden states in double precision, is differentiated at absolute weights (Tanaka 2020).
    One token is run: more would be alike, and only multiply ``R``, but the gradients of queries and keys would be
    rounding noise in place of zero, which large logits can make the most of a score. LayerNorms are passed by: behind
    one with gains of one ``R`` would be constant and every gradient zero. RMSNorms stay (transformers computes those in
    single precision).

    Raises:
        UnsupportedModelError: the model takes no ``input_ids`` or cannot be differentiated, or a projection is not in
            its body.
        DataError: a gradient is not finite.
    """
    body, inside = _body(subject.model)
    originals = subject.weights()
    tensors = {n: t.detach() for n, t in (*body.named_parameters(), *body.named_buffers()) if t.is_floating_point()}
    state = {name: tensor.double().abs() for name, tensor in tensors.items()}
    state |= {name: tensors[name].double() for name, _ in body.named_buffers() if name in tensors}
    weights = {}
    for name in originals:
        held = f"{name.removeprefix(inside)}.weight"
        if held not in state:
            raise UnsupportedModelError(f"{name} is not in the body of {type(subject.model).__name__}")
        weights[name] = state[held].requires_grad_()
    ones, passed_by = _replaced(body, nn.Embedding, torch.ones_like), _replaced(body, nn.LayerNorm, None)
    with plain_attention(), ones, passed_by:
        output = first_output(functional_call(body, state, args=(), kwargs={"input_ids": _token_id(body)}))
    found = derivatives(_differentiable(output.sum()), list(weights.values()))
    for name, gradient in zip(weights, found, strict=True):
        finite(gradient, what=f"at absolute weights, in double precision, the gradient of {name}")
    yield from _triples(subject, weights, found)


def _body(model: nn.Module) -> tuple[nn.Module, str]:
    """A model without its head, and the prefix of its names."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return model, ""
    return model.base_model, f"{model.base_model_prefix}."


def _token_id(body: nn.Module) -> Tensor:
    """Some token that is not padding, ``(1, 1)``: which one makes no difference where all embeddings are ones."""
    if "input_ids" not in inspect.signature(body.forward).parameters:
        raise UnsupportedModelError(
            f"{type(body).__name__}.forward takes no input_ids, with which synflow, log_synflow and dss call it"
        )
    padding = getattr(getattr(body, "config", None), "pad_token_id", None)
    device = next(body.parameters()).device
    return torch.full((1, 1), int(padding == 0), dtype=torch.long, device=device)


@contextmanager
def _replaced(model: nn.Module, kind: type[nn.Module], output: Any) -> Iterator[None]:
    """Lets modules of a kind return ``output`` of what they return, or with ``None`` what they were given."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, kind):
                hook = (lambda _m, _a, out: output(out)) if output else (lambda _m, args, _o: args[0])
                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str], *, inputs: bool = False) -> Iterator[Weights]:
    """Collects what modules return, or are given, in the one forward inside the block, by name.

    Raises:
        UnsupportedModelError: a module runs twice, or handles no tensor.
    """
    found: Weights = {}
    with ExitStack() as stack:
        for name in names:
            keep = _keeping(found, name, inputs=inputs)
            stack.callback(module_of(model, name).register_forward_hook(keep).remove)
        yield found


def _keeping(found: Weights, name: str, *, inputs: bool) -> Any:
    def keep(_module: nn.Module, args: Any, output: Any) -> None:
        kept = (args[0] if args else None) if inputs else output
        if name in found or not isinstance(kept, Tensor):
            raise UnsupportedModelError(
                f"{name} runs twice in one forward, or passes on a {type(kept).__name__}; proxies that look at outputs "
                "need projections that run once, from tensor to tensor"
            )
        found[name] = kept

    return keep


def observed(subject: Subject, batch: Batch, names: Sequence[str], *, inputs: bool = False) -> Weights:
    """What modules return on a batch, or are given, by name; nothing is differentiated.

    Raises:
        DataError: an entry is not finite.
    """
    with torch.no_grad(), outputs_of(subject.model, names, inputs=inputs) as found:
        subject.model(**batch)
    what = "an activation that enters" if inputs else "an output of"
    return {name: finite(precise(tensor), what=f"{what} {name}") for name, tensor in found.items()}
