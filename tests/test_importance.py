"""Scores against brute force, permutations against weights permuted by hand, and what sorting must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, GROUPED, inputs, outputs, space, supernet_of, tiny
from torch import Tensor, nn
from transformers import BatchEncoding

from hf_elastic import (
    DataError,
    ElasticConfig,
    SpaceError,
    Supernet,
    make_elastic,
    set_layer_order,
    sort_by_importance_,
)
from hf_elastic.parts import LayerPart

Method = Any
METHODS = ("activation", "reconstruction", "taylor", "weight")
FAMILIES = ("bert", "distilbert", "llama", "qwen3", "gpt2")


def uneven(family: str, head: str = "lm", **changes: Any) -> Supernet:
    """A supernet whose neurons and heads differ much in size, as those of trained models do."""
    supernet = make_elastic(tiny(family, head), space(family, **changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in supernet.layer_parts:
            for path in (part.family.ffn_out, part.family.attention_out):
                weight = columns(part, path)
                unit = unit_of(part, path)
                scale = torch.exp(torch.randn(weight.shape[0] // unit, generator=generator)).repeat_interleave(unit)
                weight.mul_(scale[:, None])
    return supernet


def columns(part: LayerPart, path: str) -> Tensor:
    """View of an output projection's weight as (inputs, outputs)."""
    projection = part.layer.get_submodule(path)
    weight = projection.weight.detach()
    return weight.T if isinstance(projection, nn.Linear) else weight


def unit_of(part: LayerPart, path: str) -> int:
    return 1 if path == part.family.ffn_out else part.head_dim


def name_of(part: LayerPart, path: str) -> str:
    return f"layers.{part.index}." + ("intermediate_size" if path == part.family.ffn_out else part.family.heads_choice)


def batches(supernet: Supernet, *, count: int = 2, labels: bool = False) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        feed = inputs(supernet.model, tokens=6 - seed, seed=seed)
        feed["attention_mask"] = torch.ones_like(feed["input_ids"])
        feed["attention_mask"][0, -2:] = 0  # right padding
        found.append({**feed, **({"labels": feed["input_ids"]} if labels else {})})
    return found


def grouped(part: LayerPart, path: str, per_unit: Tensor) -> Tensor:
    """Sums the scores of query heads that share keys and values."""
    if path == part.family.ffn_out:
        return per_unit
    return per_unit.reshape(part.full.num_key_value_heads, -1).sum(1)


def with_unit_hook(supernet: Supernet, part: LayerPart, path: str, edit: Callable[[Tensor], Tensor]) -> Any:
    module = part.layer.get_submodule(path)
    return module.register_forward_pre_hook(lambda _, args: (edit(args[0]),))


def zeroed(part: LayerPart, path: str, supernet: Supernet, feed: dict[str, Tensor]) -> Tensor:
    """By zeroing one unit at a time: mean squared change of the projection's output over real tokens, (units,)."""
    module, unit = part.layer.get_submodule(path), unit_of(part, path)
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    with torch.no_grad():
        supernet.model(**feed)
        handle.remove()
        entering = caught[0][feed["attention_mask"].bool()].double()
        projection = module.weight.T.double() if isinstance(module, nn.Linear) else module.weight.double()
        energies = []
        for u in range(entering.shape[1] // unit):
            without = entering.clone()
            without[:, u * unit : (u + 1) * unit] = 0
            energies.append(((entering - without) @ projection).square().sum(1).sum())
    return torch.stack(energies)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_scores_are_the_energy_that_zeroing_a_unit_removes(family: str) -> None:
    supernet = uneven(family)
    data = batches(supernet)
    tokens = sum(int(feed["attention_mask"].sum()) for feed in data)
    wanted = {
        name_of(part, path): grouped(part, path, sum(zeroed(part, path, supernet, feed) for feed in data) / tokens)
        for part in supernet.layer_parts
        for path in (part.family.ffn_out, part.family.attention_out)
    }
    found = sort_by_importance_(supernet, data, method="activation")
    assert set(found) == {*wanted, "layers"}
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-8)


def mask_gradient(part: LayerPart, path: str, supernet: Supernet, feed: dict[str, Tensor]) -> Tensor:
    """By autograd through an explicit mask of ones on every unit of every token: sum of |dL/dm|, (units,)."""
    unit, masks = unit_of(part, path), []

    def multiply(entering: Tensor) -> Tensor:
        mask = torch.ones(*entering.shape[:-1], entering.shape[-1] // unit, requires_grad=True)
        masks.append(mask)
        return entering * mask.repeat_interleave(unit, dim=-1)

    handle = with_unit_hook(supernet, part, path, multiply)
    loss = supernet.model(**feed).loss
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, masks)
    return gradient[feed["attention_mask"].bool()].double().abs().sum(0)


def entering(part: LayerPart, path: str, supernet: Supernet, feed: dict[str, Tensor]) -> Tensor:
    """What enters an output projection at real tokens, (tokens, N)."""
    caught: list[Tensor] = []
    handle = part.layer.get_submodule(path).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        supernet.model(**feed)
    handle.remove()
    return caught[0][feed["attention_mask"].bool()].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_scores_tell_how_late_a_unit_can_be_spared(family: str) -> None:
    """The unit with score 1 is the one without which a float64 least-squares fit of the output loses least."""
    supernet = uneven(family)
    ids = inputs(supernet.model, batch_size=16, tokens=12)["input_ids"]
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    losses = {}
    for part in supernet.layer_parts:
        for path in (part.family.ffn_out, part.family.attention_out):
            x = torch.cat([entering(part, path, supernet, feed) for feed in data])
            bias = part.layer.get_submodule(path).bias
            x = x if bias is None else x - x.mean(0)
            y = x @ columns(part, path).double()
            per = unit_of(part, path)
            if path == part.family.attention_out:
                per *= part.full.num_attention_heads // part.full.num_key_value_heads
            errors = []
            for start in range(0, x.shape[1], per):
                kept = torch.cat([x[:, :start], x[:, start + per :]], dim=1)
                fit = torch.linalg.lstsq(kept, y).solution if kept.shape[1] else torch.zeros(0, y.shape[1]).double()
                errors.append(float((kept @ fit - y).square().sum()))
            losses[name_of(part, path)] = torch.tensor(errors)
    found = sort_by_importance_(supernet, data, method="reconstruction")
    for name, errors in losses.items():
        assert sorted(found[name].tolist()) == list(range(1, len(errors) + 1)), name
        first = int(found[name].argmin())
        assert errors[first] <= errors.min() * 1.05 + 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_scores_are_the_gradient_of_an_explicit_mask(family: str) -> None:
    supernet = uneven(family)
    data = batches(supernet, labels=True)
    tokens = sum(int(feed["attention_mask"].sum()) for feed in data)
    wanted = {
        name_of(part, path): grouped(
            part, path, sum(mask_gradient(part, path, supernet, feed) for feed in data) / tokens
        )
        for part in supernet.layer_parts
        for path in (part.family.ffn_out, part.family.attention_out)
    }
    found = sort_by_importance_(supernet, data, method="taylor")
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in supernet.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_scores_are_products_of_norms_in_plain_loops(family: str) -> None:
    supernet = uneven(family)
    wanted: dict[str, list[float]] = {}
    for part in supernet.layer_parts:
        row, layer, dim = part.family, part.layer, part.head_dim
        heads, ratio = part.full.num_attention_heads, part.full.num_attention_heads // part.full.num_key_value_heads

        def rows(path: str, layer: nn.Module = layer) -> Tensor:
            module = layer.get_submodule(path)
            weight = module.weight.detach().double()
            return weight if isinstance(module, nn.Linear) else weight.T

        neurons = []
        for u in range(48):
            score = float(columns(part, row.ffn_out)[u].double().norm())
            for path in row.ffn_in:
                score *= float(rows(path)[u].norm())
            neurons.append(score)
        wanted[name_of(part, row.ffn_out)] = neurons
        groups = [0.0] * part.full.num_key_value_heads
        for h in range(heads):
            score = float(columns(part, row.attention_out)[h * dim : (h + 1) * dim].double().norm())
            for k, path in enumerate((row.query, row.key, row.value)):
                start = h * dim if k == 0 else (h // ratio) * dim
                start += k * heads * dim if row.fused else 0
                score *= float(rows(path)[start : start + dim].norm())
            groups[h // ratio] += score
        wanted[name_of(part, row.attention_out)] = groups
    found = sort_by_importance_(supernet)
    assert set(found) == set(wanted)
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], torch.tensor(score, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_is_one_minus_the_cosine_over_a_layer(family: str) -> None:
    supernet = uneven(family)
    data, seen = batches(supernet), []
    handles = [
        part.layer.register_forward_hook(
            lambda _m, args, kwargs, out, i=i: seen.append((i, args[0], out[0] if isinstance(out, tuple) else out)),
            with_kwargs=True,
        )
        for i, part in enumerate(supernet.layer_parts)
    ]
    totals, tokens = torch.zeros(3, dtype=torch.float64), 0
    for feed in data:
        seen.clear()
        with torch.no_grad():
            supernet.model(**feed)
        mask = feed["attention_mask"].bool()
        tokens += int(mask.sum())
        for i, before, after in seen:
            a, b = before[mask].double(), after[mask].double()
            totals[i] += (1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).sum()
    for handle in handles:
        handle.remove()
    found = sort_by_importance_(supernet, data)
    torch.testing.assert_close(found["layers"], totals / tokens, rtol=1e-3, atol=1e-5)
    assert list(supernet.layer_order) == (totals / tokens).argsort(descending=True).tolist()


# -- the permutation ----------------------------------------------------------------------------------------------


def by_hand(part: LayerPart, scores: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one layer with neurons and heads moved by index lists, written out per family layout."""
    row, dim = part.family, part.head_dim
    neurons = scores[name_of(part, row.ffn_out)].argsort(descending=True).tolist()
    groups = scores[name_of(part, row.attention_out)].argsort(descending=True).tolist()
    ratio = part.full.num_attention_heads // part.full.num_key_value_heads
    keys = [g * dim + i for g in groups for i in range(dim)]
    queries = [(g * ratio + r) * dim + i for g in groups for r in range(ratio) for i in range(dim)]
    moved = dict(state)
    width = part.full.num_attention_heads * dim
    linears = not row.fused
    for path in row.ffn_in:
        moved[f"{path}.weight"] = state[f"{path}.weight"][neurons] if linears else state[f"{path}.weight"][:, neurons]
        if f"{path}.bias" in state:
            moved[f"{path}.bias"] = state[f"{path}.bias"][neurons]
    for path, order in ((row.ffn_out, neurons), (row.attention_out, queries)):
        moved[f"{path}.weight"] = state[f"{path}.weight"][:, order] if linears else state[f"{path}.weight"][order]
    if linears:
        for path, order in ((row.query, queries), (row.key, keys), (row.value, keys)):
            for name in (f"{path}.weight", f"{path}.bias"):
                if name in state:
                    moved[name] = state[name][order]
    else:
        thirds = [k * width + i for k in range(3) for i in queries]
        moved[f"{row.query}.weight"] = state[f"{row.query}.weight"][:, thirds]
        moved[f"{row.query}.bias"] = state[f"{row.query}.bias"][thirds]
    return moved


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_moved_as_by_hand_and_the_function_stays(family: str, method: Method) -> None:
    supernet = uneven(family)
    data = None if method == "weight" else batches(supernet, labels=True)
    feed = inputs(supernet.model)
    before = outputs(supernet, supernet.space.largest(), **feed)
    states = [{n: t.clone() for n, t in part.layer.state_dict().items()} for part in supernet.layer_parts]
    outside = {n: t.clone() for n, t in supernet.model.state_dict().items() if ".layer" not in n and ".h." not in n}
    scores = sort_by_importance_(supernet, data, method=method)
    for part, state in zip(supernet.layer_parts, states, strict=True):
        wanted, found = by_hand(part, scores, state), part.layer.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(supernet.model.state_dict()[name], t) for name, t in outside.items())
    torch.testing.assert_close(outputs(supernet, supernet.space.largest(), **feed), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_sorting_again_moves_nothing(method: Method) -> None:
    supernet = uneven("llama")
    data = batches(supernet, labels=True)
    sort_by_importance_(supernet, data, method=method)
    state = {n: t.clone() for n, t in supernet.model.state_dict().items()}
    again = sort_by_importance_(supernet, data, method=method)
    assert all(torch.equal(t, state[n]) for n, t in supernet.model.state_dict().items())
    assert all(bool((score.diff() <= 0).all()) for name, score in again.items() if name != "layers")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_sorted_prefix_keeps_more_of_the_function_than_the_reverse_order(family: str, method: Method) -> None:
    supernet = uneven(family, skip=None, num_hidden_layers=None)
    data = batches(supernet, count=3, labels=True)
    sort_by_importance_(supernet, data, method=method)
    feed, small = inputs(supernet.model, batch_size=8, seed=9), supernet.space.smallest()
    whole = outputs(supernet, supernet.space.largest(), **feed)
    kept = (outputs(supernet, small, **feed) - whole).square().mean()
    for part in supernet.layer_parts:
        worst = {
            name_of(part, p): torch.arange(n)
            for p, n in ((part.family.ffn_out, 48), (part.family.attention_out, part.full.num_key_value_heads))
        }
        state = {n: t.clone() for n, t in part.layer.state_dict().items()}
        part.layer.load_state_dict(by_hand(part, worst, state))
    torch.testing.assert_close(outputs(supernet, supernet.space.largest(), **feed), whole, rtol=1e-4, atol=1e-5)
    assert kept < 0.8 * (outputs(supernet, small, **feed) - whole).square().mean()


# -- data -------------------------------------------------------------------------------------------------------------


def test_padding_never_counts() -> None:
    first, second = uneven("bert"), uneven("bert")
    ids = inputs(first.model, tokens=6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    padded = sort_by_importance_(first, [{"input_ids": ids, "attention_mask": mask}])
    apart = sort_by_importance_(second, [{"input_ids": ids[:1, :4]}, {"input_ids": ids[1:]}])
    for name, score in padded.items():
        torch.testing.assert_close(score, apart[name], rtol=1e-4, atol=1e-7)


def test_batches_of_multiple_choice_may_be_padded() -> None:
    supernet = uneven("bert", "choice", skip=["layer"])
    ids = torch.randint(3, 61, (2, 3, 5))
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    flat = uneven("bert", "choice", skip=["layer"])
    rows = [
        {"input_ids": i[None, None, : int(m.sum())]} for i, m in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)
    ]
    found, wanted = (
        sort_by_importance_(supernet, [{"input_ids": ids, "attention_mask": mask}]),
        sort_by_importance_(flat, rows),
    )
    torch.testing.assert_close(
        found["layers.0.intermediate_size"], wanted["layers.0.intermediate_size"], rtol=1e-4, atol=1e-7
    )


def test_one_batch_an_iterator_and_a_tokenizers_output_are_taken() -> None:
    first, second, third = uneven("bert"), uneven("bert"), uneven("bert")
    feed = batches(first, count=1)[0]
    found = sort_by_importance_(first, feed)  # type: ignore[arg-type]
    for other in (sort_by_importance_(second, iter([feed])), sort_by_importance_(third, [BatchEncoding(feed)])):
        assert all(torch.equal(score, other[name]) for name, score in found.items())


def test_a_loss_function_replaces_the_models_own() -> None:
    supernet = uneven("bert", "base")
    feed = inputs(supernet.model)
    with pytest.raises(DataError, match="needs a loss: put labels into the batches or pass loss_function="):
        sort_by_importance_(supernet, [feed], method="taylor")
    scores = sort_by_importance_(
        supernet, [feed], method="taylor", loss_function=lambda model, batch: model(**batch)[0].square().mean()
    )
    assert scores["layers.0.intermediate_size"].min() >= 0 < scores["layers.0.intermediate_size"].max()


def test_frozen_models_are_sorted_by_activations() -> None:
    supernet = uneven("llama")
    supernet.model.requires_grad_(False)
    sort_by_importance_(supernet, batches(supernet))
    assert not any(p.requires_grad for p in supernet.model.parameters())
    with pytest.raises(DataError, match="parameters are frozen; call"):
        sort_by_importance_(supernet, batches(supernet, labels=True), method="taylor")


def test_taylor_works_where_gradients_are_off_around_it() -> None:
    supernet = uneven("gpt2")
    with torch.no_grad():
        sort_by_importance_(supernet, batches(supernet, labels=True), method="taylor")
        assert not torch.is_grad_enabled()


def test_bfloat16_models_are_sorted() -> None:
    supernet = make_elastic(tiny("llama").to(torch.bfloat16), space("llama"))
    before = outputs(supernet, supernet.space.largest()).float()
    sort_by_importance_(supernet, batches(supernet))
    assert supernet.model.dtype == torch.bfloat16
    torch.testing.assert_close(outputs(supernet, supernet.space.largest()).float(), before, rtol=0.1, atol=0.1)


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no data": (None, {"method": "activation"}, DataError, "method='activation' needs calibration batches"),
    "no data for taylor": (None, {"method": "taylor"}, DataError, "method='taylor' needs calibration batches"),
    "empty": ([], {}, DataError, "there is no calibration batch"),
    "unknown method": ([], {"method": "magnitude"}, SpaceError, "method='magnitude' is not one of"),
    "texts": (["a text"], {}, DataError, "must be a dict of tensors such as input_ids, got a str"),
    "tensors": ([torch.ones(1, 2)], {}, DataError, "got a Tensor for the batch"),
    "lists": ([{"input_ids": [[1, 2]]}], {}, DataError, "got a list for input_ids"),
    "all hidden": (
        [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}],
        {},
        DataError,
        "no token",
    ),
    "no labels": ([{"input_ids": torch.ones(1, 3, dtype=torch.long)}], {"method": "taylor"}, DataError, "needs a loss"),
}


@pytest.mark.parametrize(("data", "options", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_measured_is_refused_and_nothing_moves(
    data: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    supernet = uneven("bert")
    supernet.model.train()
    state = {n: t.clone() for n, t in supernet.model.state_dict().items()}
    with supernet.activate(supernet.space.smallest()):
        with pytest.raises(error, match=message) as caught:
            sort_by_importance_(supernet, data, **options)
        assert supernet.active == supernet.space.smallest() and "\n" not in str(caught.value)
    assert all(torch.equal(t, state[n]) for n, t in supernet.model.state_dict().items())
    assert supernet.model.training and supernet.layer_order == (0, 2, 1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in supernet.model.modules())


def test_chunked_ffns_with_padding_are_refused_since_padding_could_not_be_told() -> None:
    supernet = make_elastic(tiny("bert", chunk_size_feed_forward=3), ElasticConfig(intermediate_size=[16]))
    ids = torch.randint(3, 61, (2, 6))
    mask = torch.ones_like(ids)
    sort_by_importance_(supernet, [{"input_ids": ids, "attention_mask": mask}])
    mask[0, :2] = 0
    with pytest.raises(DataError, match=r"activations of \(2, 3\) tokens do not fit an attention_mask of \(2, 6\)"):
        sort_by_importance_(supernet, [{"input_ids": ids, "attention_mask": mask}])


# -- the order of layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_depth_choice_drops_the_least_important_layers_after_sorting(family: str) -> None:
    supernet = uneven(family, skip=None)
    influence = sort_by_importance_(supernet, batches(supernet))["layers"]
    shallow = supernet.space.canonical({**supernet.space.largest(), "num_hidden_layers": 2})
    gone = [i for i, shape in enumerate(supernet.layer_shapes(shallow)) if shape.skipped]
    assert gone == [int(influence.argmin())] and supernet.active == supernet.space.largest()


def test_sorting_without_data_keeps_the_order_of_layers() -> None:
    supernet = uneven("bert", layer_order=[1, 0, 2])
    digest = supernet.space.digest
    assert "layers" not in sort_by_importance_(supernet)
    assert supernet.layer_order == (1, 0, 2) and supernet.space.digest == digest


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 0, 1], ["0", 1, 2]])
@pytest.mark.parametrize("depth", [[2], None])
def test_a_wrong_order_of_layers_is_refused(order: list[Any], depth: list[int] | None) -> None:
    supernet = supernet_of("bert", num_hidden_layers=depth)
    with pytest.raises(SpaceError, match="must name each of the layers 0 to 2 once"):
        set_layer_order(supernet, order)


def test_without_a_depth_choice_the_space_stays() -> None:
    supernet = supernet_of("bert", num_hidden_layers=None)
    digest = supernet.space.digest
    set_layer_order(supernet, [2, 1, 0])
    assert supernet.space.digest == digest


def test_grouped_families_are_sorted_by_group() -> None:
    for family in GROUPED:
        scores = sort_by_importance_(supernet_of(family))
        assert scores["layers.0.num_key_value_heads"].shape == (2,) and "layers.0.num_attention_heads" not in scores


@pytest.mark.parametrize("method", METHODS)
def test_sorting_keeps_the_gradients_a_user_accumulated_and_every_modules_mode(method: Method) -> None:
    supernet = uneven("bert")
    model = supernet.model.train()
    model.bert.embeddings.eval()
    frozen = {name for name, module in model.named_modules() if not module.training}
    parameter = model.get_input_embeddings().weight
    gradient = parameter.grad = torch.ones_like(parameter)
    sort_by_importance_(supernet, None if method == "weight" else batches(supernet, labels=True), method=method)
    assert parameter.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert {name for name, module in model.named_modules() if not module.training} == frozen
