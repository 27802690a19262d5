"""Every proxy in a few lines of plain autograd, written from their definitions and from the names of modules alone.

Models are copied and the gradients of all their parameters taken. Besides tiny models of the families there is one that
transformers does not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.proxies import Roles
from hf_elastic.proxies.subject import signs

Batches = Sequence[dict[str, Tensor]]
Oracle = Callable[[nn.Module, Batches, str], float]

ATTENTION = re.compile(r"att")  # in the names of all projections of attention, and of no others
QUERIES = re.compile(r"(query|q_proj|c_attn|attention_in)$")
QUERIES_AND_KEYS = re.compile(r"(query|key|[qk]_proj)$")
HEADS = re.compile(r"(query|key|value|[qkv]_proj|c_attn|attention_in)$")
FUSED = re.compile(r"(c_attn|attention_in)$")
FFN_OUT = re.compile(r"(\d\.output\.dense|mlp\.c_proj|down_proj|ffn_out)$")
POSITIONS = re.compile(r"(position_embeddings|wpe|positions)$")


class Own(nn.Module):
    """An encoder of one's own: a fused Linear, pre-norm, and a tensor for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(61, 8), nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.attention_in, self.attention_out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.ffn_in, self.ffn_out = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        query, key, value = self.attention_in(self.norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.attention_out((query @ key.mT).softmax(-1) @ value)
        return hidden + self.ffn_out(self.ffn_in(hidden).tanh())


OWN_ROLES = Roles(
    attention=("attention_in", "attention_out"), heads=("attention_in",), ffn=("ffn_in", "ffn_out"),
    ffn_out=("ffn_out",), layers=1, hidden_size=8, fused=3, positions="positions", queries=("attention_in",),
)  # fmt: skip


def own() -> Own:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Own().double()


def batches_for(model: nn.Module, *, labels: bool = False) -> list[dict[str, Tensor]]:
    """Two batches of unlike shapes; the losses are of language models."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 61, shape, generator=generator) for shape in ((2, 9), (3, 5))]
    return [{"input_ids": i, "labels": i.flip(0)} if labels else {"input_ids": i} for i in ids]


def body_of(model: nn.Module) -> nn.Module:
    return model.base_model if isinstance(model, PreTrainedModel) else model


def causal(model: nn.Module) -> bool:
    return any(name.endswith(("c_attn", "q_proj")) for name, _ in model.named_modules())


def projections(model: nn.Module) -> dict[str, nn.Module]:
    linears = {n: m for n, m in body_of(model).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {name: module for name, module in linears.items() if "pooler" not in name}


def rows(module: Any, tensor: Tensor) -> Tensor:
    """As ``(O, I)``, in double precision."""
    return (tensor.t() if isinstance(module, Conv1D) else tensor).detach().double()


def target_of(output: Any, target: str) -> Tensor:
    if target == "loss":
        loss: Tensor = output.loss
        return loss
    first: Tensor = output if isinstance(output, Tensor) else output["logits" if "logits" in output else 0]
    return first.sum() if target == "sum" else (first * signs(first.shape[-1])).sum()


def differentiated(model: nn.Module, batches: Batches, target: str) -> nn.Module:
    """A copy whose parameters hold the gradients of the target's mean over the batches."""
    twin = copy.deepcopy(model).eval().requires_grad_()
    for batch in batches:
        (target_of(twin(**batch), target) / len(batches)).backward()
    return twin


Found = list[tuple[str, Tensor, Tensor]]


def gradients(model: nn.Module, batches: Batches, target: str) -> Found:
    twin = differentiated(model, batches, target)
    return [(n, rows(m, m.weight), rows(m, m.weight.grad)) for n, m in projections(twin).items()]  # type: ignore


def of_attention(model: nn.Module, found: Found) -> Found:
    return [entry for entry in found if causal(model) or ATTENTION.search(entry[0])]


def of_ffn(model: nn.Module, found: Found) -> Found:
    return [entry for entry in found if causal(model) or not ATTENTION.search(entry[0])]


def saliency(found: Found) -> float:
    return sum(float((w * g).abs().sum()) for _, w, g in found)


def nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


def of_a_mask(model: nn.Module, batches: Batches, target: str) -> float:
    """SNIP as published: the gradient by ones that weights are multiplied by."""
    masks = {name: torch.ones_like(m.weight) for name, m in projections(model).items()}
    twin = copy.deepcopy(model).eval()
    for name, module in projections(twin).items():
        module.mask, module.whole = masks[name].requires_grad_(), module.weight.detach()  # type: ignore
        del module.weight
        module.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.whole * m.mask))
    for batch in batches:
        (target_of(twin(**batch), target) / len(batches)).backward()
    return sum(float(mask.grad.abs().sum()) for mask in masks.values())  # type: ignore


def hessian_products(model: nn.Module, batches: Batches, target: str) -> float:
    """``-W^T H G`` of the whole mean at once, with attention in its eager form."""
    twin = copy.deepcopy(model).eval().requires_grad_()
    if isinstance(twin, PreTrainedModel):
        twin.set_attn_implementation("eager")
    weights = [module.weight for module in projections(twin).values()]
    value = sum(target_of(twin(**batch), target) for batch in batches) / len(batches)
    first = torch.autograd.grad(value, weights, create_graph=True)  # type: ignore
    product = sum((g.detach() * g).sum() for g in first)
    second = torch.autograd.grad(product, weights)  # type: ignore
    return -sum(float((w * s).detach().sum()) for w, s in zip(weights, second, strict=True))


@contextmanager
def recorded(model: nn.Module, wanted: re.Pattern[str], *, given: bool = False) -> Iterator[list[Any]]:
    """A module and what it returned, or was given, of each whose name matches."""
    seen: list[Any] = []
    for name, module in projections(model).items():
        if wanted.search(name):
            parts = 3 if FUSED.search(name) else 1
            module.register_forward_hook(lambda m, i, o, p=parts: seen.append((m, i[0] if given else o, p)))
    yield seen


def fishers(model: nn.Module, batches: Batches, target: str) -> float:
    total = 0.0
    for batch in batches:
        twin = copy.deepcopy(model).eval().requires_grad_()
        with recorded(twin, re.compile("")) as seen:
            value = target_of(twin(**batch), target)
        for _, output, _ in seen:
            output.retain_grad()
        value.backward()
        for module, output, _ in seen:
            saliences = (output * output.grad).square().reshape(-1, output.shape[-1]).mean(0) / 2
            masks = saliences[:, None].expand_as(rows(module, module.weight))
            total += float(masks.detach().abs().sum()) / len(batches)
    return total


def at_ones(model: nn.Module) -> Found:
    """A copy of the body with positive weights, ones for embeddings and no LayerNorm, differentiated.

    All tokens are alike, so that attention is their mean whatever queries and keys are: here those are zeros.
    """
    twin = copy.deepcopy(body_of(model)).double().eval().requires_grad_()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, nn.Identity())
            if isinstance(child, nn.Embedding):
                child.register_forward_hook(lambda _m, _i, o: torch.ones_like(o))
    for name, module in projections(twin).items():
        share = 2 / 3 if FUSED.search(name) else 1 if QUERIES_AND_KEYS.search(name) else 0
        module.register_forward_hook(
            lambda _m, _i, o, share=share: o * (torch.arange(o.shape[-1]) >= round(share * o.shape[-1]))
        )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    output = twin(input_ids=torch.full((1, 4), 7))
    (output if isinstance(output, Tensor) else output[0]).sum().div(4).backward()
    return [(n, rows(m, m.weight), rows(m, m.weight.grad)) for n, m in projections(twin).items()]  # type: ignore


def logarithms(found: Found) -> float:
    return sum(float((w * g.abs().log().abs())[g != 0].sum()) for _, w, g in found)


def mixed(found: Found) -> float:
    attention = [(w, g) for name, w, g in found if ATTENTION.search(name)]
    rest = saliency([entry for entry in found if not ATTENTION.search(entry[0])])
    return sum(nuclear(w) * nuclear(g) for w, g in attention) + rest


def determinant(matrix: list[list[int]]) -> int:
    """Exactly, in whole numbers (Bareiss)."""
    rest, last, sign = matrix, 1, 1
    while len(rest) > 1:
        pivot = next((i for i, row in enumerate(rest) if row[0]), None)
        if pivot is None:
            return 0
        top = rest.pop(pivot)
        sign *= (-1) ** pivot
        rest = [[(top[0] * e - row[0] * t) // last for e, t in zip(row[1:], top[1:], strict=True)] for row in rest]
        last = top[0]
    return sign * rest[0][0]


def squashed_determinants(found: Found) -> float:
    """``sigmoid(log d) = d / (1 + d)``; ``A A^T`` of more rows than columns is singular."""
    patterns = [g.sign().long() for _, _, g in found if g.shape[0] <= g.shape[1]]
    determinants = [abs(determinant((a @ a.t()).tolist())) for a in patterns]
    return float(sum(Fraction(d, 1 + d) for d in determinants))


def cosines(model: nn.Module, batches: Batches, target: str) -> float:
    twin = differentiated(model, batches, target)
    table = next(module for name, module in twin.named_modules() if POSITIONS.search(name))
    jacobian = table.weight.grad.t().double()  # type: ignore
    pairs = [(a, b) for i, a in enumerate(jacobian) for j, b in enumerate(jacobian) if i != j]
    left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    found = torch.cosine_similarity(left, right, dim=1)
    return 1 - float(found.abs().pow(1 / 20).sum()) / 2 / len(pairs)


def looked_at(model: nn.Module, batch: dict[str, Tensor], wanted: re.Pattern[str], **options: bool) -> list[Any]:
    twin = copy.deepcopy(model).eval()
    with recorded(twin, wanted, **options) as seen, torch.no_grad():
        twin(**batch)
    return seen


def lpzero(model: nn.Module, batches: Batches, target: str) -> float:
    if causal(model):
        pairs = [(w, torch.exp(g) / torch.exp(g).sum(1, keepdim=True)) for _, w, g in gradients(model, batches, target)]
        return sum(float((w**2).mean() + (p**2).mean()) for w, p in pairs) / len(pairs)
    outputs = [(o, parts) for batch in batches for _, o, parts in looked_at(model, batch, QUERIES)]
    return sum(float((o[..., : o.shape[-1] // p] ** 2).mean()) for o, p in outputs) / len(outputs)


def attention_confidence(model: nn.Module, batches: Batches, _target: str) -> float:
    outputs = [(o, parts) for batch in batches for _, o, parts in looked_at(model, batch, HEADS)]
    pieces = [piece for o, parts in outputs for piece in torch.tensor_split(o, parts, dim=2)]
    return sum(float(piece.max(dim=1).values.mean()) for piece in pieces) / len(batches)


def softmax_confidence(model: nn.Module, batches: Batches, _target: str) -> float:
    twin: Any = copy.deepcopy(model).eval()
    twin.set_attn_implementation("eager")
    layers = [layer for batch in batches for layer in twin(**batch, output_attentions=True).attentions]
    return sum(float(layer.detach().max(dim=1).values.mean()) for layer in layers) / len(batches)


def activation_distance(model: nn.Module, batches: Batches, _target: str) -> float:
    neurons = [given[0] for batch in batches for _, given, _ in looked_at(model, batch, FFN_OUT, given=True)]
    patterns = [(a > 0).double() for a in neurons]
    return sum(float((x @ x.t() + (1 - x) @ (1 - x).t()).sum()) for x in patterns) / len(batches)


def zerolm(model: nn.Module, _batches: Batches, _target: str) -> float:
    found = {name: rows(m, m.weight) for name, m in projections(model).items()}  # type: ignore
    pieces = [piece for name, w in found.items() for piece in w.chunk(3 if FUSED.search(name) else 1)]
    return sum(float(torch.linalg.svdvals(piece).square().sum()) / min(piece.shape) for piece in pieces) / 2


def sizes(model: nn.Module, *, embeddings: bool) -> float:
    found = {p.data_ptr(): p.numel() for p in model.parameters()}
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(numel for pointer, numel in found.items() if embeddings or pointer not in tables)


def layers_of(model: nn.Module) -> int:
    return next((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), 1)


def width_of(model: nn.Module) -> int:
    return next(module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding))


ORACLES: dict[str, Oracle] = {
    "zerolm": zerolm,
    "synflow": lambda m, b, t: saliency(at_ones(m)),
    "log_synflow": lambda m, b, t: logarithms(at_ones(m)),
    "dss": lambda m, b, t: mixed(at_ones(m)),
    "params": lambda m, b, t: sizes(m, embeddings=True),
    "decoder_params": lambda m, b, t: sizes(m, embeddings=False),
    "depth": lambda m, b, t: layers_of(m),
    "width_depth": lambda m, b, t: layers_of(m) * width_of(m),
    "fisher": fishers,
    "grad_norm": lambda m, b, t: sum(float(g.square().sum()) ** 0.5 for _, _, g in gradients(m, b, t)),
    "snip": of_a_mask,
    "grasp": hessian_products,
    "jacobian_cosine": cosines,
    "synaptic_saliency": lambda m, b, t: saliency(of_ffn(m, gradients(m, b, t))),
    "synaptic_diversity": lambda m, b, t: sum(
        nuclear(w) * nuclear(g) for _, w, g in of_attention(m, gradients(m, b, t))
    ),
    "head_importance": lambda m, b, t: saliency(of_attention(m, gradients(m, b, t))),
    "attention_confidence": attention_confidence,
    "softmax_confidence": softmax_confidence,
    "activation_distance": activation_distance,
    "eznas": lambda m, b, t: squashed_determinants(of_attention(m, gradients(m, b, t))),
    "lpzero": lpzero,
}  # fmt: skip
