"""Fitted routers against worths that hooks on the stock model measure, and a ridge regression in NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from routed_models import ALL, array, only, positions_of
from tiny_models import tiny
from torch import Tensor, nn

from hf_elastic import RoutingConfig, Supernet, add_routing
from hf_elastic.routing.fitting import RouterFit, fit_routers

Array = NDArray[Any]
Place = tuple[int, str]
KINDS = ("attention_tokens", "heads", "mlp_tokens", "experts")
UNITS = {"llama": {"heads": 2, "experts": 3}, "gpt2": {"heads": 4, "experts": 3}, "bert": {"heads": 4, "experts": 3}}
POINTS = 3


@dataclass(frozen=True)
class Paths:
    """Modules of a stock layer: what takes the mask, and what first reads and what ends each sublayer."""

    layers: str
    masked: str
    attention_in: str
    attention_out: str
    mlp_in: str
    mlp_out: str


PATHS = {
    "llama": Paths("layers", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gpt2": Paths("h", "attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "bert": Paths(
        "encoder.layer", "attention.self", "attention.self.query", "attention.output.dense", "intermediate.dense",
        "output.dense",
    ),
}  # fmt: skip


@dataclass
class Oracle:
    """The stock model in double precision, and what its sublayers are worth to it.

    Attributes:
        family, head: of the model.
        kinds: what is weighted, in all layers at once.
        pooling: of the embeddings that are the target; of logits ``None``.
        hidden: weight and bias of the hidden layer of each router, if it has one.
        numbers: of the layers that are routed.
    """

    family: str
    head: str = "lm"
    kinds: Sequence[str] = KINDS
    pooling: str | None = None
    hidden: Mapping[Place, tuple[Array, Array]] = field(default_factory=dict)
    numbers: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        self.model: Any = tiny(self.family, self.head).double()
        self.model.set_attn_implementation("eager")
        self.paths = PATHS[self.family]
        self.layers: Any = self.model.base_model.get_submodule(self.paths.layers)
        self.causal = self.family != "bert"
        for layer in self.layers:  # softmax of LLaMA in float32 makes NaN of a row at the lowest float64
            layer.get_submodule(self.paths.masked).register_forward_pre_hook(_clamp_mask, with_kwargs=True)

    def signal(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities, or embeddings of length one."""
        outputs, mask = self.model(**batch), batch["attention_mask"]
        if self.pooling is None:
            return outputs.logits.log_softmax(-1)
        states = outputs.last_hidden_state
        if self.pooling == "cls":
            found = states[:, 0]
        elif self.pooling == "last":
            ends = [int(np.flatnonzero(row)[-1]) for row in mask.numpy()]
            found = torch.stack([row[end] for row, end in zip(states, ends, strict=True)])
        else:
            found = torch.stack([row[real].mean(0) for row, real in zip(states, mask.bool(), strict=True)])
        return found / found.norm(dim=-1, keepdim=True)

    def distance(self, signal: Tensor, whole: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Nats summed over real tokens or over rows that are classified, or cosine distances summed over rows."""
        if self.pooling is not None:
            return (1 - (signal * whole).sum(-1)).sum()
        nats = (whole.exp() * (whole - signal)).sum(-1)
        return nats.sum() if nats.ndim == 1 else nats[batch["attention_mask"].bool()].sum()

    def weights(self, batch: Mapping[str, Tensor], value: float) -> dict[Place, Tensor]:
        """One weight for each token of each layer, or for each of its units."""
        shape, found = batch["input_ids"].shape, {}
        for layer in self.numbers:
            for kind in self.kinds:
                units = UNITS[self.family].get(kind)
                size = shape if units is None else (*shape, units)
                found[layer, kind] = torch.full(size, value, dtype=torch.float64, requires_grad=True)
        return found

    @contextmanager
    def weighted(self, weights: Mapping[Place, Tensor]) -> Iterator[None]:
        """Inside the block what sublayers, heads and neurons give is multiplied by weights."""
        with ExitStack() as stack:
            for (number, kind), weight in weights.items():
                layer = self.layers[number]
                for handle in _hooked(layer, kind, weight, self.paths):
                    stack.callback(handle.remove)
            yield

    def worths(self, batch: Mapping[str, Tensor]) -> dict[Place, Array]:
        """Minus the integral of the gradient along the path from nothing to everything, by the midpoint rule."""
        whole, total = self.signal(batch).detach(), {}
        for point in range(POINTS):
            weights = self.weights(batch, (2 * point + 1) / (2 * POINTS))
            with self.weighted(weights):
                distance = self.distance(self.signal(batch), whole, batch)
            for place, slope in zip(weights, torch.autograd.grad(distance, list(weights.values())), strict=True):
                total[place] = total.get(place, 0.0) - array(slope) / POINTS
        return total

    def left_out(self, batch: Mapping[str, Tensor]) -> float:
        """Distance of the model without anything that could be weighted."""
        with torch.no_grad():
            whole = self.signal(batch)
            with self.weighted(self.weights(batch, 0.0)):
                return float(self.distance(self.signal(batch), whole, batch))

    def states(self, batch: Mapping[str, Tensor]) -> dict[Place, Array]:
        """What sublayers read in the model as it is, through the router's hidden layer if it has one."""
        found: dict[Place, Array] = {}
        with ExitStack() as stack:
            for number in self.numbers:
                for kind in self.kinds:
                    layer = self.layers[number]
                    path = self.paths.mlp_in if kind in ("mlp_tokens", "experts") else self.paths.attention_in

                    def read(module: nn.Module, args: Any, place: Place = (number, kind)) -> None:
                        found[place] = array(args[0])

                    stack.callback(layer.get_submodule(path).register_forward_pre_hook(read).remove)
            self.signal(batch)
        for place, (weight, bias) in self.hidden.items():
            inner = found[place] @ weight.T + bias
            found[place] = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        return found

    def fitted(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[Place, tuple[Array, Array, float]]:
        """Weight ``(U, D)``, bias and explained share of each router."""
        rows: dict[Place, list[Array]] = {}
        wanted: dict[Place, list[Array]] = {}
        for batch in batches:
            real, states = batch["attention_mask"].bool().numpy(), self.states(batch)
            for place, worth in self.worths(batch).items():
                rows.setdefault(place, []).append(states[place][real])
                wanted.setdefault(place, []).append(self._wanted(worth, real))
        return {
            place: ridge_regression(
                np.concatenate(rows[place]), np.concatenate(wanted[place]), units=place[1] in ("heads", "experts")
            )
            for place in rows
        }

    def _wanted(self, worth: Array, real: Array) -> Array:
        if worth.ndim == 3:
            return worth[real] - worth[real].mean(-1, keepdims=True)
        rows = [worth[real]] if self.causal else [row[there] for row, there in zip(worth, real, strict=True)]
        return np.concatenate([ranks(row) for row in rows])[:, None]


def _clamp_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clamp(min=-1e9)}


def _hooked(layer: nn.Module, kind: str, weight: Tensor, paths: Paths) -> list[Any]:
    out = layer.get_submodule(paths.mlp_out if kind in ("mlp_tokens", "experts") else paths.attention_out)
    if kind in ("heads", "experts"):

        def scale_units(module: nn.Module, args: Any) -> Any:
            units = args[0].unflatten(-1, (weight.shape[-1], -1)) * weight.unsqueeze(-1)
            return (units.flatten(-2), *args[1:])

        return [out.register_forward_pre_hook(scale_units)]

    def see_less(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        own = torch.eye(weight.shape[1], dtype=torch.bool)
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask + weight.log()[:, None, None, :].masked_fill(own, 0.0)}

    found = [out.register_forward_hook(lambda module, args, output: output * weight.unsqueeze(-1))]
    if kind == "attention_tokens":
        found.append(layer.get_submodule(paths.masked).register_forward_pre_hook(see_less, with_kwargs=True))
    return found


def ranks(values: Array) -> Array:
    """From -1/2 to 1/2, the lowest value first, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    return np.array([(order.index(place) + 0.5) / len(values) - 0.5 for place in range(len(values))])


def ridge_regression(x: Array, y: Array, *, units: bool, ridge: float = 1e-4) -> tuple[Array, Array, float]:
    """Weight ``(U, D)``, bias ``(U,)`` and explained share; of units at a standard deviation of 0.1."""
    centred, around = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred
    weight = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ around)
    scores = centred @ weight
    explained = 1 - float(((around - scores) ** 2).sum() / (around**2).sum())
    scale = 0.1 / math.sqrt(float(scores.var(0).mean())) if units else 1.0
    return scale * weight.T, scale * (y.mean(0) - x.mean(0) @ weight), explained


def padded_batches(vocabulary: int = 61, *, rows: int = 6, length: int = 12, count: int = 2) -> list[dict[str, Tensor]]:
    """Random tokens; some rows are padded on the left, some on the right, one is whole."""
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :3], mask[2, -2:], mask[3, :1], mask[4, -4:] = 0, 0, 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def routed_to_fit(family: str, head: str, kinds: Sequence[str], **changes: Any) -> Supernet:
    wanted = {name: value for kind in kinds for name, value in only(kind).items()}
    return add_routing(tiny(family, head), RoutingConfig(**wanted, **changes))


def assert_fitted(supernet: Supernet, report: RouterFit, wanted: Mapping[Place, tuple[Array, Array, float]]) -> None:
    assert {(each.layer, each.kind) for each in report.routers} == set(wanted)
    told = {(each.layer, each.kind): each.explained for each in report.routers}
    for part in supernet.router_parts:
        for kind in part.routers:
            weight, bias, explained = wanted[part.layer.index, kind]
            scores, size = part.routers[kind].scores, np.abs(weight).max()
            label = f"{kind} of layer {part.layer.index}"
            np.testing.assert_allclose(array(scores.weight), weight, rtol=1e-3, atol=1e-3 * size, err_msg=label)
            np.testing.assert_allclose(array(scores.bias), bias, rtol=1e-3, atol=1e-3 * size, err_msg=label)
            assert told[part.layer.index, kind] == pytest.approx(explained, abs=1e-3), label


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=[*KINDS, "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_routers_are_the_ridge_regressions_of_what_hooks_on_the_stock_model_measure(
    family: str, kinds: Sequence[str]
) -> None:
    supernet, batches = routed_to_fit(family, "lm", kinds), padded_batches()
    report = fit_routers(supernet, batches, points=POINTS)
    assert_fitted(supernet, report, Oracle(family, kinds=kinds).fitted(batches))
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize(
    ("family", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "mean"), ("gpt2", "last")]
)
def test_embeddings_are_the_target_of_a_model_that_gives_no_logits(family: str, pooling: Any) -> None:
    supernet, batches = routed_to_fit(family, "base", KINDS), padded_batches()
    report = fit_routers(supernet, batches, points=POINTS, pooling=pooling)
    assert_fitted(supernet, report, Oracle(family, "base", pooling=pooling).fitted(batches))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_embeddings_may_be_the_target_of_a_model_with_a_head(family: str) -> None:
    whole, inside = (
        add_routing(tiny(family), RoutingConfig(**ALL)),
        add_routing(tiny(family).base_model, RoutingConfig(**ALL)),
    )
    reports = [fit_routers(whole, padded_batches(), points=POINTS, target="embeddings")]
    reports.append(fit_routers(inside, padded_batches(), points=POINTS))
    assert reports[0].distance == pytest.approx(reports[1].distance, rel=1e-6)
    prefix = whole.base.base_model_prefix + "."
    assert_close({name.removeprefix(prefix): tensor for name, tensor in weights_of(whole).items()}, weights_of(inside))


def test_a_hidden_layer_is_kept_and_the_one_behind_it_fitted() -> None:
    supernet, batches = routed_to_fit("llama", "lm", KINDS, router="mlp", router_hidden_size=16), padded_batches()
    hidden = {
        (part.layer.index, kind): (array(layer.weight), array(layer.bias))
        for part in supernet.router_parts
        for kind in part.routers
        if (layer := part.routers[kind].hidden) is not None
    }
    assert len(hidden) == 12
    report = fit_routers(supernet, batches, points=POINTS)
    assert_fitted(supernet, report, Oracle("llama", hidden=hidden).fitted(batches))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_layers_that_are_not_routed_are_left_whole(family: str) -> None:
    supernet, batches = routed_to_fit(family, "lm", KINDS, layers=[0, 2]), padded_batches()
    report = fit_routers(supernet, batches, points=POINTS)
    assert_fitted(supernet, report, Oracle(family, numbers=[0, 2]).fitted(batches))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_weights_in_half_precision_give_routers_that_score_alike(family: str) -> None:
    batches, states, reports, found = padded_batches(rows=24), Oracle(family).states(padded_batches()[0]), [], []
    for dtype in (torch.float32, torch.bfloat16):
        supernet = add_routing(tiny(family).to(dtype), RoutingConfig(**ALL))
        reports.append(fit_routers(supernet, batches, points=POINTS))
        found.append(weights_of(supernet))
    assert reports[1].distance == pytest.approx(reports[0].distance, rel=0.05)
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in found[1].values())
    for part in supernet.router_parts:
        for kind in part.routers:
            (name,) = [name for name in found[0] if name.endswith(f"{part.layer.index}.routers.{kind}.scores.weight")]
            exact, half = (states[part.layer.index, kind] @ array(weights[name]).T for weights in found)
            assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.9, name


def test_the_ridge_is_relative_to_the_mean_variance_of_what_is_read() -> None:
    supernet, batches, oracle = routed_to_fit("gpt2", "lm", ["mlp_tokens"]), padded_batches(), Oracle("gpt2")
    oracle.kinds = ["mlp_tokens"]
    fit_routers(supernet, batches, points=POINTS, ridge=0.5)
    for part in supernet.router_parts:
        place = (part.layer.index, "mlp_tokens")
        real = [batch["attention_mask"].bool().numpy() for batch in batches]
        x = np.concatenate([oracle.states(batch)[place][there] for batch, there in zip(batches, real, strict=True)])
        y = [ranks(oracle.worths(batch)[place][there]) for batch, there in zip(batches, real, strict=True)]
        weight, bias, _ = ridge_regression(x, np.concatenate(y)[:, None], units=False, ridge=0.5)
        scores = part.routers["mlp_tokens"].scores
        np.testing.assert_allclose(array(scores.weight), weight, rtol=1e-3, atol=1e-3 * np.abs(weight).max())
        np.testing.assert_allclose(array(scores.bias), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("head", "kind"), [
    *((head, kind) for head in ("lm", "base") for kind in KINDS), ("sequence", "mlp_tokens"), ("token", "experts"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_worths_add_up_to_what_leaving_everything_out_costs(family: str, head: str, kind: str) -> None:
    (batch,), pooling = padded_batches(count=1), "mean" if head == "base" else None
    supernet, oracle = routed_to_fit(family, head, [kind]), Oracle(family, head, kinds=[kind], pooling=pooling)
    distance = fit_routers(supernet, batch, points=24).distance
    counted = int(batch["attention_mask"].sum()) if head in ("lm", "token") else len(batch["input_ids"])
    assert distance == pytest.approx(oracle.left_out(batch) / counted, rel=0.01)


@pytest.mark.parametrize("head", ["lm", "base", "sequence"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_distance_does_not_depend_on_how_rows_are_split_into_batches(family: str, head: str) -> None:
    batches = padded_batches()
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    parts: dict[str, list[Any]] = {"two": batches, "one": [joined]}
    parts["uneven"] = [{name: tensor[cut] for name, tensor in joined.items()} for cut in (slice(1), slice(1, None))]
    reports = [fit_routers(routed_to_fit(family, head, KINDS), each, points=POINTS) for each in parts.values()]
    assert [report.distance for report in reports] == pytest.approx([reports[0].distance] * 3, rel=1e-5)
    assert len({report.tokens for report in reports}) == 1


@pytest.mark.parametrize("head", ["lm", "base"], ids=["logits", "embeddings"])
def test_rows_of_an_encoder_padded_in_one_batch_count_as_if_each_were_alone(head: str) -> None:
    together = routed_to_fit("bert", head, list(KINDS))
    alone = routed_to_fit("bert", head, list(KINDS))
    for supernet in (together, alone):
        supernet.model.double()
    padded, single = [], []
    for batch in padded_batches():
        mask = batch["attention_mask"]
        padded.append({**batch, "position_ids": positions_of(together.base, mask)})
        single += [{"input_ids": ids[real][None]} for ids, real in zip(batch["input_ids"], mask.bool(), strict=True)]
    reports = [fit_routers(together, padded, points=POINTS), fit_routers(alone, single, points=POINTS)]
    assert reports[0].tokens == reports[1].tokens
    assert reports[0].distance == pytest.approx(reports[1].distance, rel=1e-5)
    assert_close(weights_of(together), weights_of(alone), tolerance=1e-5)


def weights_of(supernet: Supernet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in supernet.base.named_parameters() if ".scores." in name}


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys() and found
    for name, tensor in wanted.items():
        gap = float((found[name] - tensor).abs().max())
        assert gap <= tolerance * max(1.0, float(tensor.abs().max())), f"{name} differs by {gap:.1e}"


def test_every_kind_of_a_tiny_routed_model_is_tested_here() -> None:
    assert {*KINDS} == {*ALL} - {"num_experts"}
