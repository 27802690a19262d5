"""Part ``formulas`` of ``run.py``: what is computed here against the formula as the paper has it, on equal results.

Each comparison first shows that both give the same, and then times them.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comparing import Line, timed
from measuring import Bar
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_elastic as he
from hf_elastic.compression.quantization import _Fit, gptq
from hf_elastic.head_similarity import HeadFeatures
from hf_elastic.least_squares import NormalEquations
from hf_elastic.proxies import ZeroLMTable
from hf_elastic.quantgrid import Grid
from hf_elastic.repair.refitting import RIDGE
from hf_elastic.training.pca import PreActivations, pca_score

PART = "formulas"
NOT_SLOWER = Bar("at most", 1.0)
VOCABULARY = 512
Batches = list[dict[str, Tensor]]


def lines(options: argparse.Namespace) -> list[Line]:
    """All comparisons, one after the other."""
    torch.manual_seed(0)
    return [
        found
        for compare in (cka, growth, zerolm, wanda, rounding, least_squares, subnets, damages)
        for found in compare(options)
    ]


def same(ours: Any, theirs: Any, *, what: str, tolerance: float = 1e-6) -> None:
    """Holds two results against each other.

    Raises:
        RuntimeError: they differ by more than the tolerance, relative to the largest value.
    """
    a, b = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    if not off <= tolerance:
        raise RuntimeError(f"{what}: ours and the formula differ by {off:.2e}, more than {tolerance:.0e}")


def model_of(options: argparse.Namespace, *, layers: int | None = None) -> LlamaForCausalLM:
    """A random LLaMA of a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden // 2, intermediate_size=options.hidden,
        num_hidden_layers=layers or options.layers, num_attention_heads=options.hidden // 128,
        num_key_value_heads=options.hidden // 128, max_position_embeddings=options.length, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def calibration(options: argparse.Namespace, *, count: int = 2) -> Batches:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.length)
    return [{"input_ids": torch.randint(VOCABULARY, shape, generator=generator)} for _ in range(count)]


def cka(options: argparse.Namespace) -> list[Line]:
    """CKA of all pairs of heads: Gram matrices of samples, centred, against covariances of features."""
    heads, size, tokens = options.hidden // 64, 64, options.batch * options.length
    context = torch.randn(1, tokens, heads * size)

    def formula() -> Tensor:
        features = context[0].view(tokens, heads, size).unbind(1)
        grams = [x @ x.t() for x in features]
        grams = [gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean() for gram in grams]
        hsic = torch.tensor([[float((a * b).sum()) for b in grams] for a in grams])
        return hsic / torch.outer(hsic.diagonal(), hsic.diagonal()).sqrt()

    def ours() -> Tensor:
        features = HeadFeatures(heads, size)
        features.add(context)
        return features.cka()

    same(ours(), formula(), what="CKA", tolerance=1e-4)
    what = f"CKA of {heads} heads over {tokens} tokens"
    against = "centred Gram matrices of all tokens (Kornblith et al. 2019)"
    return [timed((PART, what, against), ours, formula, pairs=options.repeats, bar=NOT_SLOWER)]


def growth(options: argparse.Namespace) -> list[Line]:
    """ELM's PCA score: moments summed over micro-batches, against singular values of all tokens."""
    width, inputs, tokens = options.hidden, options.hidden // 2, 4 * options.batch * options.length
    states = torch.randn(tokens, inputs) @ torch.randn(inputs, width) / inputs**0.5
    parts = states.view(4, 1, -1, width)

    def formula() -> float:
        values = torch.linalg.svdvals((states - states.mean(0)).double()).square()
        share = values.cumsum(0) / values.sum()
        return (int((share <= 0.99).sum()) + 1) / min(inputs, width)

    def ours() -> float:
        moments = PreActivations(width)
        for part in parts:
            moments.add(part)
        return pca_score(moments, inputs=inputs)

    same(ours(), formula(), what="the PCA score", tolerance=1.5 / inputs)
    names = (PART, f"PCA score of {width} neurons over {tokens} tokens", "singular values of all tokens (ELM)")
    return [timed(names, ours, formula, pairs=options.repeats, bar=NOT_SLOWER)]


def zerolm(options: argparse.Namespace) -> list[Line]:
    """ZeroLM of many subnets: prefixes of squared norms, against singular values of every cut matrix."""
    model = model_of(options)
    supernet = he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.25, 0.5, 0.75, 1.0]))
    generator = random.Random(0)
    shapes = [supernet.layer_shapes(supernet.space.sample(generator)) for _ in range(8)]

    def singular(weight: Tensor) -> float:
        return float(torch.linalg.svdvals(weight).square().sum()) / min(weight.shape)

    def squared(weight: Tensor) -> float:
        return float(weight.square().sum()) / min(weight.shape)

    def formula(energy: Callable[[Tensor], float]) -> list[float]:
        found = []
        for subnet in shapes:
            score = 0.0
            for layer, shape in zip(model.model.layers, subnet, strict=True):
                attention, kept = layer.self_attn, shape.intermediate_size
                weights = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
                ffn = [layer.mlp.gate_proj.weight[:kept], layer.mlp.up_proj.weight[:kept]]
                matrices = [*(m.weight for m in weights), *ffn, layer.mlp.down_proj.weight[:, :kept]]
                score += 0.5 * sum(map(energy, matrices))
            found.append(score)
        return found

    def ours() -> list[float]:
        table = ZeroLMTable.of_model(model)
        return [table.score(tuple(subnet)) for subnet in shapes]

    forms = {
        "singular values of each cut matrix (ZeroLM, eq. 3 and 4)": lambda: formula(singular),
        "squared norms of each cut matrix (the same sums)": lambda: formula(squared),
    }
    found = []
    with torch.no_grad():
        for against, theirs in forms.items():
            same(ours(), theirs(), what="ZeroLM", tolerance=1e-5)
            names = (PART, f"ZeroLM of {len(shapes)} subnets", against)
            found.append(timed(names, ours, theirs, pairs=5, bar=NOT_SLOWER))
    return found


def wanda(options: argparse.Namespace) -> list[Line]:
    """Wanda: norms summed while hidden states are handed on, against all inputs kept, in two orders of work.

    The published code hands hidden states on from block to block as well; passes of the whole model are what hooks
    alone would do.
    """
    batches = calibration(options)

    @torch.no_grad()
    def passes() -> LlamaForCausalLM:
        model = model_of(options)
        for layer in model.model.layers:
            linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
            with seen(linears) as inputs:
                for batch in batches:
                    model(**batch)
            zeroed_(inputs)
        return model

    @torch.no_grad()
    def blocks() -> LlamaForCausalLM:
        model = model_of(options)
        states = [model.model.embed_tokens(batch["input_ids"]) for batch in batches]
        positions = torch.arange(options.length)[None]
        rotary = model.model.rotary_emb(states[0], positions)
        mask = torch.full((options.length, options.length), -torch.inf).triu(1)[None, None]
        for layer in model.model.layers:
            given = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}
            with seen([m for m in layer.modules() if isinstance(m, nn.Linear)]) as inputs:
                for state in states:
                    layer(state, **given)
            zeroed_(inputs)
            states = [tensor_of(layer(state, **given)) for state in states]
        return model

    def ours() -> LlamaForCausalLM:
        model = model_of(options)
        he.sparsify_(model, batches, sparsity=0.5)
        return model

    found = []
    for theirs, against in ((passes, "forwards of the whole model for each block"), (blocks, "block after block")):
        first, second = (
            torch.cat([(p == 0).flatten() for n, p in model.named_parameters() if "proj" in n])
            for model in (ours(), theirs())
        )
        agree = float((first == second).double().mean())
        if not agree >= 0.9999:
            raise RuntimeError(f"Wanda: only {agree:.4%} of the zeros are the formula's")
        names = (PART, "Wanda of all blocks, model made anew", f"{against}, all inputs kept (Wanda, eq. 1)")
        note = f"{agree:.3%} of the zeros agree"
        found.append(timed(names, ours, theirs, pairs=options.repeats, bar=NOT_SLOWER, note=note))
    return found


def zeroed_(inputs: Mapping[nn.Module, list[Tensor]]) -> None:
    """Sets the half of each row with the least Wanda scores to zero."""
    for module, rows in inputs.items():
        weight: Any = module.weight
        score = weight.abs() * torch.cat(rows).norm(dim=0)
        weight.scatter_(1, score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2], 0.0)


def tensor_of(output: Any) -> Tensor:
    """Hidden states that a layer returned, in a tuple or not."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def seen(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Keeps what enters modules, as rows."""
    found: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[module].append(given[0].flatten(0, -2))

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rounding(options: argparse.Namespace) -> list[Line]:
    """GPTQ: updates in blocks of columns, against each column moving all behind it."""
    outputs, inputs, group = options.hidden, options.hidden, 64
    weight = 0.05 * torch.randn(outputs, inputs)
    rows = torch.randn(4 * inputs, inputs) * torch.rand(inputs)
    sums = NormalEquations(inputs)
    sums.add(rows)

    def grid(part: Tensor) -> Grid:
        return Grid.fit(part, bits=4, group_size=group, symmetric=False)

    def formula() -> Tensor:
        gram = sums.gram.clone()
        gram.diagonal().add_(0.01 * float(gram.diagonal().mean()))
        factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float()
        rest, found = weight.clone(), torch.empty_like(weight)
        for column in range(inputs):
            if column % group == 0:
                current = grid(rest[:, column : column + group])
            values = rest[:, column]
            integers = current.integers(values[:, None])
            found[:, column] = integers[:, 0]
            error = (values - current.values(integers)[:, 0]) / factor[column, column]
            rest[:, column:] -= error[:, None] * factor[column, column:]
        return found

    fit = _Fit(4, group, symmetric=False)
    agree = float((gptq(weight, sums, fit=fit)[0].float() == formula()).double().mean())
    if agree < 0.99:
        raise RuntimeError(f"GPTQ: only {agree:.3%} of the integers are the formula's")
    what = f"GPTQ of {outputs} x {inputs}, INT4, groups of {group}"
    names = (PART, what, "each column moves all behind it (GPTQ, eq. 2)")
    ours: Callable[[], object] = lambda: gptq(weight, sums, fit=fit)  # noqa: E731
    return [timed(names, ours, formula, pairs=options.repeats, bar=NOT_SLOWER, note=f"{agree:.2%} of integers agree")]


def least_squares(options: argparse.Namespace) -> list[Line]:
    """Repair of eight widths of one FFN: one sum of products for all, against least squares on the rows of each."""
    inputs, outputs, ridge = options.hidden, options.hidden // 2, 1e-2
    rows = torch.randn(8 * inputs, inputs).relu()
    weight = torch.randn(inputs, outputs) / inputs**0.5
    target = rows @ weight
    sizes = [eighth * inputs // 8 for eighth in range(1, 9)]

    def formula() -> list[Tensor]:
        found = []
        for size in sizes:
            found.append(ridge_regression(rows[:, :size], target, start=weight[:size], ridge=ridge))
        return found

    def ours() -> list[Tensor]:
        sums = NormalEquations(inputs, outputs)
        sums.add(rows, target)
        return [sums.prefix(size).solve(weight[:size], None, ridge=ridge).weight for size in sizes]

    for one, other in zip(ours(), formula(), strict=True):
        same(one, other, what="the repair")
    names = (PART, f"repair of 8 widths of {inputs} neurons", "least squares on all rows for each width")
    return [timed(names, ours, formula, pairs=5, bar=NOT_SLOWER)]


def ridge_regression(rows: Tensor, target: Tensor, *, start: Tensor, ridge: float) -> Tensor:
    """Least squares on the rows themselves, drawn to a start by ``ridge`` times the inputs' mean sum of squares."""
    x, y = rows.double(), target.double()
    strength = ridge * float(x.square().sum(0).mean())
    stacked = torch.cat([x, strength**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(stacked, torch.cat([y, strength**0.5 * start.double()])).solution


def subnets(options: argparse.Namespace) -> list[Line]:
    """Losses of subnets: activated in the supernet, against a checkpoint cut for each, and against masks."""
    supernet = he.make_elastic(model_of(options), he.ElasticConfig(intermediate_size=[0.125, 0.25, 0.5, 1.0]))
    generator = random.Random(0)
    points = [supernet.space.sample(generator) for _ in range(8)]
    batch = {name: ids[:1, :64] for name, ids in calibration(options, count=1)[0].items()}
    full = copy.deepcopy(supernet.model)

    @torch.no_grad()
    def ours() -> list[float]:
        found = []
        for point in points:
            with supernet.activate(point):
                found.append(float(supernet.model(**batch, labels=batch["input_ids"]).loss))
        return found

    @torch.no_grad()
    def cut() -> list[float]:
        return [float(he.extract(supernet, p)(**batch, labels=batch["input_ids"]).loss) for p in points]

    @torch.no_grad()
    def masked() -> list[float]:
        found = []
        for point in points:
            kept = {
                layer.mlp.down_proj: shape.intermediate_size if shape.mlp else 0
                for layer, shape in zip(full.model.layers, supernet.layer_shapes(point), strict=True)
            }
            with masks(kept):
                found.append(float(full(**batch, labels=batch["input_ids"]).loss))
        return found

    wanted = ours()
    same(cut(), wanted, what="losses of subnets", tolerance=1e-5)
    same(masked(), wanted, what="losses of masked models", tolerance=1e-5)
    what = f"losses of {len(points)} random subnets, 64 tokens each"
    return [
        timed((PART, what, "a model cut out for each"), ours, cut, pairs=options.repeats, bar=NOT_SLOWER),
        timed((PART, what, "masks on the whole model"), ours, masked, pairs=options.repeats, bar=NOT_SLOWER),
    ]


@contextmanager
def masks(kept: Mapping[nn.Module, int]) -> Iterator[None]:
    """Zeroes what enters modules behind their first so many inputs."""

    def mask(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = given[0]
        return (states * (torch.arange(states.shape[-1]) < kept[module]),)

    handles = [module.register_forward_pre_hook(mask) for module in kept]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def damages(options: argparse.Namespace) -> list[Line]:
    """A quality table of FFN widths, against a pass over the text and least squares for every entry of it."""
    layers, batches = 4, calibration(options)
    held = calibration(options, count=1)
    supernet = he.make_elastic(
        model_of(options, layers=layers), he.ElasticConfig(intermediate_size=[0.25, 0.5, 0.75, 1.0])
    )  # fmt: skip
    he.sort_by_importance_(supernet, batches, method="reconstruction")
    largest = supernet.space.largest()
    cuts = [(choice.name, int(size)) for choice in supernet.space for size in choice.descending[1:]]
    parent = he.extract(supernet, largest)

    @torch.no_grad()
    def states(model: LlamaForCausalLM) -> Tensor:
        with seen([model.model.norm]) as inputs:
            for batch in held:
                model(**batch)
        return torch.cat(inputs[model.model.norm]).double()

    @torch.no_grad()
    def formula() -> list[float]:
        found, whole = [], states(parent)
        for name, size in cuts:
            model = copy.deepcopy(parent)
            ffn = model.model.layers[int(name.split(".")[1])].mlp
            with seen([ffn.down_proj]) as inputs:
                for batch in batches:
                    model(**batch)
            rows = torch.cat(inputs[ffn.down_proj])
            start = ffn.down_proj.weight[:, :size].t()
            solution = ridge_regression(rows[:, :size], ffn.down_proj(rows), start=start, ridge=RIDGE)
            ffn.down_proj.weight[:, size:] = 0.0
            ffn.down_proj.weight[:, :size] = solution.t()
            found.append(float((states(model) - whole).square().sum() / whole.square().sum()))
        return found

    def ours() -> he.QualityTable:
        return he.measure_quality_table(supernet, batches, held, measure="hidden")

    damage = he.objectives.damage(supernet, ours())
    points = [supernet.space.canonical({**largest, name: size}) for name, size in cuts]
    same([damage(point) for point in points], formula(), what="damages", tolerance=1e-3)
    names = (PART, f"damages of {len(cuts)} repaired cuts of {layers} layers", "a pass and least squares for each")
    return [timed(names, ours, formula, pairs=5, bar=NOT_SLOWER)]
