"""Importance, least squares, repair, quality tables and recovery in half precision, against float32 copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from half_models import CASES, HALVES, batches, distance, finite, output, pair, refused, supernets, tolerance
from least_squares_oracle import least_squares
from tiny_models import point, space

from hf_elastic import (
    make_elastic,
    measure_quality_table,
    objectives,
    recover,
    refit,
    search_subnets,
    sort_by_importance_,
)
from hf_elastic.distillation import pooled
from hf_elastic.errors import DataError
from hf_elastic.least_squares import NormalEquations, Scatter, elimination_order
from hf_elastic.repair.refitting import within_dtype

FAMILIES = ("bert", "llama", "gpt2")
EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
LARGE = 3e3  # squares are beyond float16


@CASES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["activation", "weight", "taylor"])
def test_scores_of_units_are_those_of_float32(method: Any, family: str, dtype: torch.dtype, loud: bool) -> None:
    half, exact = supernets(family, dtype, loud=loud)
    data = None if method == "weight" else batches(half.model, labels=True)
    wanted = sort_by_importance_(exact, data, method=method)
    if method == "taylor" and (family, dtype, loud) == ("gpt2", torch.float16, True):
        before = {name: tensor.clone() for name, tensor in half.model.state_dict().items()}
        with refused("float16", "load the model in float32"):  # the slope of transformers' gelu_new is inf * 0 there
            sort_by_importance_(half, data, method=method)
        assert all(torch.equal(before[name], tensor) for name, tensor in half.model.state_dict().items())
        return
    found = sort_by_importance_(half, data, method=method)
    assert set(found) == set(wanted)
    assert max(distance(found[name], wanted[name]) for name in wanted) <= tolerance(dtype)
    assert half.model.dtype == dtype and finite(half.model)


@pytest.mark.parametrize("family", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_taylor_scores_of_float16_do_not_vanish_where_gradients_are_small(family: str) -> None:
    half, exact = supernets(family, torch.float16)
    data = batches(half.model, labels=True)
    scale = 1e-4  # of the loss: products of activations and gradients are about 1e-8, below what float16 holds

    def small_loss(model: Any, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss.float() * scale

    found = sort_by_importance_(half, data, method="taylor", loss_function=small_loss)
    wanted = sort_by_importance_(exact, data, method="taylor", loss_function=small_loss)
    assert max(distance(found[name], wanted[name]) for name in wanted) <= tolerance(torch.float16)


@CASES
@pytest.mark.parametrize("family", FAMILIES)
def test_what_reconstruction_gives_up_first_costs_least_or_nearly(family: str, dtype: torch.dtype, loud: bool) -> None:
    half, exact = supernets(family, dtype, loud=loud)
    data = batches(half.model)
    costs = {name: scores for name, scores in costs_of_units(exact, data).items()}
    found = sort_by_importance_(half, data, method="reconstruction")
    for name, cost in costs.items():
        first = int(found[name].argmin())  # the first to go scores 1
        assert cost[first] <= cost.min() * (1 + 4 * tolerance(dtype))


def costs_of_units(supernet: Any, data: Any) -> dict[str, np.ndarray]:
    """Squared error that the best refit of all other neurons leaves, by NumPy, for each neuron of the FFNs."""
    found = {}
    for part in supernet.layer_parts:
        entering: list[torch.Tensor] = []
        module = part.projections()[part.family.ffn_out]
        hook = module.register_forward_pre_hook(lambda _m, args, kept=entering: kept.append(args[0]))
        for batch in data:
            output(supernet.model, batch)
        hook.remove()
        rows = torch.cat([x.reshape(*b["attention_mask"].shape, -1)[b["attention_mask"].bool()]
                          for x, b in zip(entering, data, strict=True)])  # fmt: skip
        weight = module.weight.detach() if supernet.family.model_type == "gpt2" else module.weight.detach().t()
        biased = module.bias is not None
        found[f"layers.{part.index}.intermediate_size"] = least_squares(rows, weight, centred=biased)
    return found


@EVERY
@pytest.mark.parametrize("solved", ["gram", "scatter"])
def test_sums_of_squares_of_large_half_activations_are_those_of_numpy(solved: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (LARGE * torch.randn(3000, 12, generator=generator) + LARGE).to(dtype)
    wide = x.double().numpy()
    sums: Any = NormalEquations(12) if solved == "gram" else Scatter(12)
    for part in x.split(700):
        sums.add(part)
    for centred in (False, True):
        around = wide - wide.mean(0) if centred else wide
        got = sums.scatter(centred=centred) if solved == "gram" else sums.matrix(centred=centred)
        assert np.linalg.norm(got.numpy() - around.T @ around) <= 1e-6 * np.linalg.norm(around.T @ around)


@EVERY
def test_a_solution_from_large_half_rows_is_numpys(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (LARGE * torch.randn(400, 6, generator=generator)).to(dtype)
    y = (x.float() @ torch.randn(6, 3, generator=generator) / 8).to(dtype)
    sums = NormalEquations(6, 3)
    sums.add(x, y)
    solved = sums.solve(torch.zeros(6, 3, dtype=dtype), torch.zeros(3, dtype=dtype), ridge=1e-9)
    wide, wanted = np.c_[x.double().numpy(), np.ones(400)], y.double().numpy()
    solution = np.linalg.lstsq(wide, wanted, rcond=None)[0]
    assert np.abs(solved.weight.numpy() - solution[:-1]).max() <= 1e-5
    order = elimination_order(sums.gram, solved.weight.to(dtype))
    assert sorted(order.tolist()) == list(range(6))


@CASES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repair_is_that_of_float32(family: str, dtype: torch.dtype, loud: bool) -> None:
    reports: list[Any] = []
    found = []
    for supernet in supernets(family, dtype, loud=loud):
        data = batches(supernet.model, count=6, rows=6, tokens=16)
        architecture = point(supernet, ffn0=16, skip1="attention", heads2=1)
        model = refit(supernet, architecture, data, on_report=reports.append)
        found.append(output(model, data[0])[data[0]["attention_mask"].bool()])
        assert model.dtype == supernet.model.dtype and finite(model)
    half, exact = reports
    assert half.repaired and half.error < half.error_cut
    assert half.error_cut == pytest.approx(exact.error_cut, rel=tolerance(dtype))
    assert half.error == pytest.approx(exact.error, rel=tolerance(dtype), abs=tolerance(dtype))
    assert distance(*found) <= 2 * tolerance(dtype)  # weights are rounded once more, and what is solved differs so


def test_repaired_weights_beyond_float16_are_refused() -> None:
    values = torch.tensor([1.0, 7e4], dtype=torch.float64)
    assert torch.equal(within_dtype(values, torch.bfloat16, layer=1, sublayer="mlp"), values.bfloat16())
    with refused("layer 1, mlp", "float16", "float32"):
        within_dtype(values, torch.float16, layer=1, sublayer="mlp")


@CASES
@pytest.mark.parametrize(("measure", "family"), [("hidden", "llama"), ("kl", "gpt2"), ("similarity", "bert")])
def test_a_quality_table_is_that_of_float32(measure: str, family: str, dtype: torch.dtype, loud: bool) -> None:
    found = []
    for supernet in supernets(family, dtype, loud=loud):
        data = batches(supernet.model, count=6, rows=6, tokens=16)
        table = measure_quality_table(supernet, data, data[:2], measure=measure)
        found.append(torch.tensor([value for row in table.damages for value in row.values()], dtype=torch.float64))
    assert distance(*found) <= tolerance(dtype)


@EVERY
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_of_large_states_over_many_tokens_is_numpys(pooling: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (1000 + 100 * torch.randn(3, 300, 4, generator=generator)).to(dtype)  # 300 of 1,000 are beyond float16
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[1, 257:], mask[2, 1:] = 0, 0  # 257 is no number of bfloat16
    found = pooled(hidden, mask, pooling=pooling)
    wide, kept = hidden.double().numpy(), mask.bool().numpy()
    by_hand = {
        "mean": lambda row: wide[row][kept[row]].mean(0),
        "cls": lambda row: wide[row][0],
        "last": lambda row: wide[row][kept[row]][-1],
    }
    wanted = np.stack([by_hand[pooling](row) for row in range(3)])
    assert found.dtype == dtype
    assert np.abs(found.double().numpy() - wanted).max() <= torch.finfo(dtype).eps * np.abs(wanted).max()


def test_padding_that_holds_nan_is_not_pooled() -> None:
    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = torch.nan
    assert torch.equal(pooled(hidden, torch.tensor([[1, 1, 0]])), torch.ones(1, 2))


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["loss", "perplexity", "accuracy", "embedding_cosine", "similarity_structure"])
def test_objectives_are_those_of_float32(name: str, family: str, dtype: torch.dtype) -> None:
    values = []
    for supernet in supernets(family, dtype):
        data = batches(supernet.model, labels=True)
        objective = getattr(objectives, name)(supernet, data)
        values.append(objective(point(supernet, ffn0=16, heads1=1)))
    slack = {"accuracy": 3 / 30, "similarity_structure": 0.05}.get(name, 0.0)  # ranks flip where two are nearly equal
    assert values[0] == pytest.approx(values[1], rel=2 * tolerance(dtype), abs=slack)


@EVERY
def test_a_model_whose_loss_overflows_is_a_failed_evaluation(dtype: torch.dtype) -> None:
    half, _ = pair("gpt2", dtype)
    with torch.no_grad():
        half.transformer.wte.weight.mul_(1e38 if dtype == torch.bfloat16 else 3e4)
    supernet = make_elastic(half, space("gpt2"))
    objective = objectives.loss(supernet, batches(half, labels=True))
    with refused("all 4 evaluations failed", "not a finite number"):
        search_subnets(supernet.space, [objective], algorithm="random", evaluations=4, seed=0)


@EVERY
@pytest.mark.parametrize(
    "target", ["logits", *(pytest.param(t, marks=pytest.mark.slow) for t in ("hidden_states", "embeddings"))]
)
def test_bfloat16_is_recovered_and_float16_refused(target: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for number, supernet in enumerate(supernets("llama", dtype)):
        small = refit(supernet, point(supernet, ffn0=24, ffn1=24, ffn2=24), batches(supernet.model, count=6))
        arguments: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True}
        data = [{"input_ids": row.tolist()} for batch in batches(supernet.model) for row in batch["input_ids"]]
        settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "target": target, "arguments": arguments}
        if dtype == torch.float16 and not number:
            with refused("float16 cannot be trained", "model.float()"):
                recover(small, supernet.model, data, output=tmp_path / str(number), **settings)
            continue
        trained = recover(small, supernet.model, data, output=tmp_path / str(number), **settings)
        assert finite(trained)
        found.append(torch.cat([p.detach().float().flatten() for p in trained.parameters()]))
    if dtype == torch.bfloat16:
        assert distance(*found) <= tolerance(dtype)


def test_nan_weights_give_no_order() -> None:
    for dtype, words in ((torch.float32, "check the weights"), (torch.bfloat16, "bfloat16")):
        half, exact = supernets("bert", torch.bfloat16)
        supernet = exact if dtype == torch.float32 else half
        with torch.no_grad():
            part = supernet.layer_parts[1]
            part.projections()[part.family.ffn_out].weight[0, 0] = torch.nan
        before = [parameter.clone() for parameter in supernet.model.parameters()]
        for method in ("weight", "activation", "reconstruction"):
            data = None if method == "weight" else batches(supernet.model)
            with pytest.raises(DataError, match="NaN"):
                sort_by_importance_(supernet, data, method=method)  # type: ignore[arg-type]
        with refused(words):
            sort_by_importance_(supernet)
        pairs = zip(before, supernet.model.parameters(), strict=True)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)
