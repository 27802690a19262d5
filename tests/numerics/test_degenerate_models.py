"""Degenerate models: weights of zeros, one head, one layer, one group; every method gives what is right, or refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from half_models import batches, distance, finite, output, refused
from lora_models import elastic
from routed_models import ALL
from tiny_models import GROUPED, point, space, tiny
from torch import Tensor, nn

from hf_elastic import (
    ElasticConfig,
    RoutingConfig,
    Supernet,
    add_routing,
    calibrate_routing,
    extract,
    fit_routers,
    fuse_heads,
    make_elastic,
    measure_quality_table,
    quantize_,
    refit,
    routing_statistics,
    score,
    sort_by_importance_,
    sparsify_,
    sparsity_of,
)
from hf_elastic.proxies import PROXIES

FAMILIES = ("bert", "llama", "gpt2")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
METHODS: tuple[Any, ...] = ("activation", "reconstruction", "taylor", "weight")


ONES = pytest.mark.parametrize(
    ("family", "what"), [*((family, what) for family in FAMILIES for what in ("head", "layer")), ("llama", "group")]
)


def one(family: str, what: str, *, head: str = "lm") -> Any:
    """A model of one head, of one layer, or of one group of keys and values."""
    gpt2 = family == "gpt2"
    changes: dict[str, Any] = {
        "head": {"n_head" if gpt2 else "num_attention_heads": 1},
        "layer": {"n_layer" if gpt2 else "num_hidden_layers": 1},
        "group": {},
    }[what]
    if family in GROUPED and what in ("head", "group"):
        changes["num_key_value_heads"] = 1
    return tiny(family, head, **changes)


def narrow(model: Any) -> Supernet:
    return make_elastic(model, ElasticConfig(intermediate_size=[16, 1.0], skip=["attention", "mlp"]))


def zeroed(family: str, which: str) -> Any:
    """A model with zeros in one neuron, in one head, in the FFN, in attention, in all blocks, or everywhere."""
    model = tiny(family)
    supernet = make_elastic(model, space(family))
    with torch.no_grad():
        for part in supernet.layer_parts:
            row = part.family
            for path, projection in part.projections().items():
                of_ffn = path == row.ffn_out or path in row.ffn_in
                if which in ("all blocks", "everything") or which == ("FFN" if of_ffn else "attention"):
                    _zero(projection)
                if which == "neuron" and of_ffn:
                    _zero(projection, unit=0, outputs=path in row.ffn_in)
        if which == "everything":
            for parameter in model.parameters():
                parameter.zero_()
    return supernet


def _zero(projection: Any, *, unit: int | None = None, outputs: bool = True) -> None:
    rows = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()  # (O, I), a view
    if unit is None:
        rows.zero_()
    elif outputs:
        rows[unit] = 0
    else:
        rows[:, unit] = 0
    if projection.bias is not None and outputs:
        projection.bias[slice(None) if unit is None else unit] = 0


ZEROS = pytest.mark.parametrize("which", ["neuron", "FFN", "attention", "all blocks", "everything"])


@ZEROS
@FAMILY
@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_are_sorted_with_what_they_are_worth(method: Any, family: str, which: str) -> None:
    supernet = zeroed(family, which)
    data = None if method == "weight" else batches(supernet.model, labels=True)
    (feed, *_) = batches(supernet.model)
    before = output(supernet.model, feed)
    scores = sort_by_importance_(supernet, data, method=method)
    assert all(bool(torch.isfinite(values).all()) for values in scores.values())
    # A permutation of units computes the same.
    assert (output(supernet.model, feed) - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    for part in supernet.layer_parts:
        neurons = scores[f"layers.{part.index}.intermediate_size"]
        if which == "neuron":
            assert int(neurons.argmin()) == 0  # it writes nothing, so it goes first
        elif which != "attention" and method != "reconstruction":
            assert neurons.abs().max() == 0
    if "layers" in scores and which in ("all blocks",) and family != "bert":
        assert scores["layers"].abs().max() <= 1e-6  # a layer that adds nothing leaves the direction as it is


@ZEROS
@FAMILY
def test_zero_weights_are_repaired_to_the_parent(family: str, which: str) -> None:
    supernet = zeroed(family, which)
    data = batches(supernet.model, count=6, rows=6, tokens=16)
    reports: list[Any] = []
    model = refit(supernet, point(supernet, ffn0=24, heads1=1), data, on_report=reports.append)
    (report,) = reports
    assert finite(model) and np.isfinite(report.error) and report.error <= report.error_cut + 1e-12
    if which == "everything":
        assert report.error == report.error_cut == 0
    if which in ("all blocks", "everything"):  # what is cut wrote nothing
        kept = data[0]["attention_mask"].bool()
        assert (output(model, data[0]) - output(supernet.model, data[0]))[kept].abs().max() <= 1e-5


@pytest.mark.parametrize("which", ["FFN", "all blocks"])
@FAMILY
@pytest.mark.parametrize("measure", ["hidden", "kl"])
def test_cutting_zeros_does_no_damage(measure: str, family: str, which: str) -> None:
    supernet = zeroed(family, which)
    data = batches(supernet.model, count=6, rows=6, tokens=16)
    table = measure_quality_table(supernet, data, data[:1], measure=measure)
    for row in table.damages:
        for option, damage in row.items():
            of_zeros = option.startswith("mlp/") or which == "all blocks"
            skips_a_norm = family == "bert" and (option.endswith("/0") or option == "layer")
            assert np.isfinite(damage) and (damage <= 1e-9 or not of_zeros or skips_a_norm), (option, damage)


def test_a_parent_that_gives_zeros_has_no_share_to_miss() -> None:
    supernet = zeroed("gpt2", "everything")
    data = batches(supernet.model, count=6, rows=6, tokens=16)
    with refused("last hidden states are zero", "check the weights"):
        measure_quality_table(supernet, data, data[:1], measure="hidden")
    table = measure_quality_table(supernet, data, data[:1], measure="kl")
    assert all(damage == 0 for row in table.damages for damage in row.values())


@ZEROS
@FAMILY
def test_zero_weights_are_pruned_and_rounded_to_themselves(family: str, which: str) -> None:
    for method in ("wanda", "magnitude"):
        model = extract_of(zeroed(family, which))
        before = {name: p.clone() for name, p in model.named_parameters()}
        report = sparsify_(model, batches(model), method=method)  # type: ignore[arg-type]
        assert report.share >= 0.5 - 0.02 and finite(model)
        changed = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert all(bool(((p == before[name]) | (p == 0)).all()) for name, p in changed.items())
        if which == "everything":
            assert report.share == sparsity_of(model).share == 1.0
    if family == "gpt2":
        return
    for method in ("gptq", "rtn"):
        model = extract_of(zeroed(family, which))
        zeros = {name: p == 0 for name, p in model.named_parameters()}
        report = quantize_(model, batches(model), group_size=16, method=method)  # type: ignore[arg-type]
        assert finite(model) and all(np.isfinite(error) for error in report.errors.values())
        for name, p in model.named_parameters():
            if name in zeros:  # scales are new
                assert not bool((p[zeros[name]] != 0).any())


def extract_of(supernet: Supernet) -> Any:
    return extract(supernet, supernet.space.largest())


@pytest.mark.parametrize("which", ["everything", pytest.param("FFN", marks=pytest.mark.slow)])
@FAMILY
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_zero_weights_have_finite_scores(name: str, family: str, which: str) -> None:
    supernet = zeroed(family, which)
    model = extract_of(supernet)
    if (name, family) == ("jacobian_cosine", "llama"):
        return
    found = score(model, name, batches(model, labels=True, count=1))
    assert np.isfinite(found)
    if which == "everything" and name in ("zerolm", "snip", "grad_norm", "synaptic_saliency", "synflow", "dss"):
        assert found == 0 or name == "grad_norm"


@ONES
@pytest.mark.parametrize("method", METHODS)
def test_models_of_one_are_sorted(method: Any, what: str, family: str) -> None:
    supernet = narrow(one(family, what))
    data = None if method == "weight" else batches(supernet.model, labels=True)
    (feed, *_) = batches(supernet.model)
    before = output(supernet.model, feed)
    scores = sort_by_importance_(supernet, data, method=method)
    assert all(bool(torch.isfinite(values).all()) for values in scores.values())
    assert distance(output(supernet.model, feed), before) <= 1e-5


@ONES
def test_models_of_one_are_cut_repaired_and_measured(what: str, family: str) -> None:
    supernet = narrow(one(family, what))
    data = batches(supernet.model, count=6, rows=6, tokens=16)
    reports: list[Any] = []
    architecture = point(supernet, ffn0=16)
    model = refit(supernet, architecture, data, on_report=reports.append)
    assert finite(model) and reports[0].error < reports[0].error_cut
    with supernet.activate(architecture):
        cut = extract(supernet, architecture)
        kept = data[0]["attention_mask"].bool()
        assert distance(output(cut, data[0])[kept], output(supernet.model, data[0])[kept]) <= 1e-5
    table = measure_quality_table(supernet, data, data[:2], measure="kl")
    assert all(np.isfinite(damage) and damage >= -1e-9 for row in table.damages for damage in row.values())
    assert np.isfinite(table.damage(supernet.layer_parts[0], supernet.layer_shapes(architecture)[0]))


@ONES
def test_models_of_one_are_compressed_adapted_and_scored(what: str, family: str) -> None:
    model = one(family, what)
    assert sparsify_(model, batches(model)).share == pytest.approx(0.5, abs=0.02)
    if family != "gpt2":
        quantize_(one(family, what), batches(model), group_size=16)
    supernet = elastic(one(family, what))
    merged = extract(supernet, supernet.space.smallest(), merge=True)
    with supernet.activate(supernet.space.smallest()):
        (feed, *_) = batches(merged)
        assert distance(output(merged, feed), output(supernet.model, feed)) <= 1e-5
    for name in PROXIES:
        if (name, family) != ("jacobian_cosine", "llama"):
            assert np.isfinite(score(one(family, what), name, batches(model, labels=True, count=1)))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_models_of_one_are_fused_or_refused(family: str) -> None:
    with refused("one head"):
        fuse_heads(one(family, "head"), batches(one(family, "head")))
    fused, report = fuse_heads(one(family, "layer"), batches(one(family, "layer")), threshold=0.01, min_heads=1)
    assert finite(fused) and report.layers[0].after <= report.layers[0].before


@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_that_write_zeros_are_kept_or_removed_without_nan(family: str, mode: Any) -> None:
    model = extract_of(zeroed(family, "attention"))
    model = tiny(family) if model.config.model_type not in ("bert", "gpt2") else model
    fused, report = fuse_heads(model, batches(model), mode=mode, threshold=0.5, min_heads=1)
    assert finite(fused)
    for entry in report.layers:
        assert entry.after == entry.before  # a constant head is alike to none
        assert torch.equal(entry.cka, torch.eye(len(entry.cka), dtype=entry.cka.dtype))


@ONES
def test_models_of_one_are_routed(what: str, family: str) -> None:
    kinds = {name: value for name, value in ALL.items() if what == "layer" or name != "heads"}
    if what != "layer":
        with refused("heads"):
            add_routing(one(family, what), RoutingConfig(**{**ALL, "heads": [1, 2]}))
    supernet = add_routing(one(family, what), RoutingConfig(**kinds))
    data = batches(supernet.model, count=8, rows=6, tokens=16)
    fit = fit_routers(supernet, data)
    assert np.isfinite(fit.distance) and all(0 <= each.explained <= 1 for each in fit.routers)
    report = calibrate_routing(supernet, data)
    statistics = routing_statistics(supernet, data, supernet.space.smallest())
    assert np.isfinite(statistics.measured_macs) and all(0 <= each.share <= 1 for each in statistics.routers)
    assert (report.note != "") == (family == "bert")
    with supernet.activate(supernet.space.smallest()):
        found: Tensor = output(supernet.model, data[0])
    assert bool(torch.isfinite(found[data[0]["attention_mask"].bool()]).all())
