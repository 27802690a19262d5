"""What a proxy is given, and how it runs a model without touching it: its parameters are replaced for one call only."""

from __future__ import annotations

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

from hf_elastic.errors import DataError
from hf_elastic.proxies.roles import Roles, weight_of

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
            first output, ``signs`` that output times fixed random signs, summed; ``auto`` is the loss where there are
            labels and signs where not. Behind a LayerNorm the sum is constant, so that every gradient of ``sum`` is
            rounding noise; published FlexiBERT scores were made so.
    """

    model: nn.Module
    roles: Roles
    batches: tuple[Batch, ...] = ()
    target: Target = "auto"

    def needed(self) -> tuple[Batch, ...]:
        """The batches.

        Raises:
            DataError: there are none.
        """
        if not self.batches:
            raise DataError("this proxy needs batches=[...] of model inputs; zerolm, synflow and dss need none")
        return self.batches

    def weights(self, names: Sequence[str] | None = None) -> Weights:
        """Weights of projections by module name, as leaves that ask for gradients and share memory with the model."""
        return {n: weight_of(self.model, n).detach().requires_grad_() for n in names or self.roles.projections}

    def differentiated(self, batch: Batch, weights: Weights) -> Tensor:
        """The target on a batch as a function of ``weights``."""
        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        output = functional_call(self.model, replaced, args=(), kwargs=dict(batch))
        loss = output.get("loss") if isinstance(output, dict) else None
        wanted = self.target
        if wanted == "auto":
            wanted = "signs" if loss is None else "loss"
        if wanted == "loss":
            if loss is None:
                raise DataError("the model returns no loss on this batch; add labels, or use target='signs'")
            return loss  # type: ignore[no-any-return]
        first = first_output(output)
        return first.sum() if wanted == "sum" else (first * signs(first.shape[-1]).to(first)).sum()


def first_output(output: Any) -> Tensor:
    """The first tensor that a model returned besides its loss."""
    if isinstance(output, Tensor):
        return output
    values = [v for n, v in output.items() if n != "loss"] if isinstance(output, dict) else output
    found: Tensor = next(iter(values))
    return found


def signs(width: int) -> Tensor:
    """Fixed random signs ``(D,)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (width,), generator=generator) * 2 - 1


def gradients(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and gradient of every projection, ``(O, I)``, by the target's mean over the batches."""
    weights = subject.weights()
    batches = subject.needed()
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        found = torch.autograd.grad(subject.differentiated(batch, weights), list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            total[name] += gradient / len(batches)
    for name, weight in weights.items():
        yield name, oriented(subject.model, name, weight.detach()), oriented(subject.model, name, total[name])


def oriented(model: nn.Module, name: str, matrix: Tensor) -> Tensor:
    """A matrix of a projection as ``(O, I)``."""
    return matrix.t() if isinstance(model.get_submodule(name), Conv1D) else matrix


def twice_differentiable() -> Any:
    """A context in which attention is computed by operations that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


_TOKENS = 16


def ones_pass(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and gradient of every projection where all weights are positive and all embeddings are ones.

    ``R``, the sum of the last hidden states in double precision, is differentiated at absolute weights (Tanaka 2020).
    LayerNorms are passed by: behind one ``R`` would be constant and every gradient zero. RMSNorms stay.
    """
    body, inside = _body(subject.model)
    names = [name.removeprefix(inside) for name in subject.roles.projections]
    tensors = {n: t.detach() for n, t in (*body.named_parameters(), *body.named_buffers()) if t.is_floating_point()}
    state = {name: tensor.double().abs() for name, tensor in tensors.items()}
    state |= {name: tensors[name].double() for name, _ in body.named_buffers() if name in tensors}
    weights = {name: state[f"{name}.weight"].requires_grad_() for name in names}
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=next(body.parameters()).device)
    with _replaced(body, nn.Embedding, torch.ones_like), _replaced(body, nn.LayerNorm, None):
        output = first_output(functional_call(body, state, args=(), kwargs={"input_ids": ids}))
    found = torch.autograd.grad(output.sum(), list(weights.values()))
    for name, weight, gradient in zip(subject.roles.projections, weights.values(), found, strict=True):
        yield name, oriented(subject.model, name, weight.detach()), oriented(subject.model, name, gradient)


def _body(model: nn.Module) -> tuple[nn.Module, str]:
    """A model without its head, and the prefix of its names."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return model, ""
    return model.base_model, f"{model.base_model_prefix}."


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
    """Collects what modules return, or are given, in the forwards inside the block, by name."""
    found: Weights = {}
    with ExitStack() as stack:
        for name in names:
            keep = _keeping(found, name, inputs=inputs)
            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found


def _keeping(found: Weights, name: str, *, inputs: bool) -> Any:
    def keep(_module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = args[0] if inputs else output

    return keep
