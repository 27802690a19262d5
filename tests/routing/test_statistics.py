"""Statistics of routers: against decisions that are known beforehand, and loops over those that were made."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routed_models import ALL, routed
from tiny_models import tiny

from hf_elastic import ElasticConfig, Supernet, costs, make_elastic
from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.routing.calibration import calibrate_routing
from hf_elastic.routing.statistics import RouterStatistics, RoutingStatistics, routing_statistics


def batches(supernet: Supernet, *, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(1), []
    for length in (12, 9):
        ids = torch.randint(3, supernet.base.config.vocab_size, (5, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :4], mask[3, -3:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def calibrated(family: str, **kinds: Any) -> Supernet:
    supernet = routed(family, low=True, **kinds)
    calibrate_routing(supernet, batches(supernet), supernet.active)
    return supernet


def only(found: RoutingStatistics, layer: int, kind: str) -> RouterStatistics:
    (one,) = [each for each in found.routers if (each.layer, each.kind) == (layer, kind)]
    return one


def decided(supernet: Supernet, data: Any) -> dict[tuple[int, str], list[tuple[int, np.ndarray]]]:
    """Each decision about a real token that entered, with its position in its text, read off one text at a time."""
    found: dict[tuple[int, str], list[tuple[int, np.ndarray]]] = defaultdict(list)
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen: dict[tuple[int, str], np.ndarray] = {}
            undo = []
            for part in supernet.router_parts:

                def see(what: Any, layer: int = part.layer.index, seen: Any = seen) -> None:
                    keep = what.decision.keep.numpy()
                    seen[layer, what.kind] = keep.reshape(-1, 1 if "tokens" in what.kind else keep.shape[-1])

                part.routers.observers.append(see)
                undo.append((part.routers.observers, see))
            with torch.no_grad():
                supernet.model(input_ids=ids[mask.bool()][None])
            for observers, see in undo:
                observers.remove(see)
            for (layer, kind), keep in seen.items():
                entered = seen.get((layer, {"heads": "attention_tokens", "experts": "mlp_tokens"}.get(kind, "")))
                places = range(len(keep)) if entered is None else np.flatnonzero(entered[:, 0])
                assert len(places) == len(keep)
                found[layer, kind] += [(int(place), row) for place, row in zip(places, keep, strict=True)]
    return found


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_shares_entropy_and_dependence_are_those_of_loops_over_texts_without_padding(family: str) -> None:
    supernet = calibrated(family) if family == "llama" else routed(family)
    data = batches(supernet)
    if family == "llama":
        for batch in data:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    else:  # positions of BERT count padding on the left
        data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in data]
    found, by_hand = routing_statistics(supernet, data), decided(supernet, data)
    assert {(each.layer, each.kind) for each in found.routers} == set(by_hand)
    for place, decisions in by_hand.items():
        one = only(found, *place)
        rows = np.stack([row for _, row in decisions]).astype(float)  # (N, U)
        used = rows.mean(0)
        assert one.units == pytest.approx(used, abs=1e-9)
        assert one.share == pytest.approx(used.mean(), abs=1e-9)
        groups = defaultdict(list)
        for position, row in decisions:
            groups[position].append(row.astype(float))
        several = [np.stack(group) for group in groups.values() if len(group) > 1]
        within = sum((len(group) - 1) * group.var(0, ddof=1) for group in several)
        variance = float(np.mean(within / sum(len(group) - 1 for group in several)))
        assert one.dependence == pytest.approx(min(1.0, variance / (used.mean() * (1 - used.mean()))), abs=1e-9)
        if "tokens" in place[1]:
            assert one.entropy is None and one.evenness is None
        else:
            shares = [share / used.sum() for share in used if share]
            bits = -sum(share * math.log2(share) for share in shares)
            assert one.entropy == pytest.approx(bits) and one.evenness == pytest.approx(bits / math.log2(len(used)))
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)


def test_a_router_that_looks_at_nothing_is_found_out() -> None:
    supernet = routed("llama", heads=[1], experts=[2], num_experts=4)
    for part in supernet.router_parts:
        for kind, winners in (("heads", [1]), ("experts", [0, 3])):
            scores = part.routers[kind].scores
            with torch.no_grad():
                scores.weight.zero_()
                scores.bias.zero_()
                scores.bias[winners] = 1.0
    found = routing_statistics(supernet, batches(supernet))
    heads, experts = only(found, 0, "heads"), only(found, 0, "experts")
    assert heads.units == (0.0, 1.0) and heads.dependence == 0 and heads.entropy == 0
    assert experts.units == (1.0, 0.0, 0.0, 1.0) and experts.entropy == pytest.approx(1.0)
    assert experts.evenness == pytest.approx(0.5)
    assert "layer 2 experts: always chooses the same, never uses 2 of 4" in found.warnings
    assert str(found).count("always chooses the same") == 6


def test_the_first_tokens_whatever_they_are_have_no_dependence_and_random_ones_much() -> None:
    supernet = routed("bert", mlp_tokens=[0.5])
    random = routing_statistics(supernet, batches(supernet, padded=False))
    assert all(each.dependence is not None and each.dependence > 0.5 for each in random.routers)
    for part in supernet.router_parts:  # of equal scores the first tokens enter
        torch.nn.init.zeros_(part.routers["mlp_tokens"].scores.weight)
    first = routing_statistics(supernet, batches(supernet, padded=False)[:1])
    assert [each.dependence for each in first.routers] == [0.0] * 3
    assert [each.share for each in first.routers] == [0.5] * 3
    assert len(first.warnings) == 3


def test_one_text_says_nothing_about_dependence() -> None:
    supernet = routed("bert", mlp_tokens=[0.5])
    (batch, _) = batches(supernet)
    found = routing_statistics(supernet, {name: tensor[:1] for name, tensor in batch.items()})
    assert all(each.dependence is None for each in found.routers) and found.warnings == ()


def test_macs_follow_the_measured_shares_in_the_nominal_formulas() -> None:
    supernet = routed("bert", mlp_tokens=[0.5])
    whole_rows = [{"input_ids": batches(supernet)[0]["input_ids"]}]
    exact = routing_statistics(supernet, whole_rows)  # of 12 tokens just 6 enter
    assert exact.measured_macs == pytest.approx(exact.nominal_macs, abs=1e-6)
    uneven = [{"input_ids": ids[:, :9]} for ids in (whole_rows[0]["input_ids"],)]
    found = routing_statistics(supernet, uneven)  # of 9 tokens 5 enter: half is rounded up
    assert [each.share for each in found.routers] == pytest.approx([5 / 9] * 3)
    whole = costs.macs(supernet, supernet.space.largest(), seq_len=9)
    ffn = 9 * 2 * 32 * 48  # both projections of each layer
    router = 9 * 32
    wanted = (whole - 3 * ffn * (1 - 5 / 9) + 3 * router) / whole
    assert found.measured_macs == pytest.approx(wanted, abs=1e-6)
    assert found.nominal_macs == pytest.approx((whole - 3 * ffn * 0.5 + 3 * router) / whole, abs=1e-6)
    assert found.seq_len == 9


def test_the_active_architecture_is_looked_at_unless_one_is_given_and_everything_stays_as_it_was() -> None:
    supernet = routed("llama", low=False, experts=[1, 2], num_experts=3)
    supernet.model.train()
    bypassed = routing_statistics(supernet, batches(supernet))
    assert bypassed.routers == () and "bypassed" in str(bypassed)
    assert bypassed.measured_macs == bypassed.nominal_macs == 1
    with pytest.raises(DataError, match="nothing to draw"):
        bypassed.figure()
    values = {**supernet.space.largest(), "layers.1.experts": 2}
    found = routing_statistics(supernet, iter(batches(supernet)), values)
    assert [(each.layer, each.kind, each.capacity) for each in found.routers] == [(1, "experts", 2 / 3)]
    assert found.architecture == values
    assert supernet.active == supernet.space.largest() and supernet.model.training
    assert not any(part.routers.observers for part in supernet.router_parts)


def test_a_layer_that_is_narrower_counts_the_units_that_it_has() -> None:
    config = ElasticConfig(intermediate_size=[32, 48])
    supernet = routed("llama", config=config, low=False, experts=[1], num_experts=3)
    values = {**supernet.space.largest(), "layers.0.experts": 1, "layers.0.intermediate_size": 32}
    found = routing_statistics(supernet, batches(supernet), values)
    assert [len(each.units) for each in found.routers] == [2]
    assert found.routers[0].capacity == found.routers[0].share == 0.5


def test_the_numbers_go_into_json_a_table_and_a_page(tmp_path: Path) -> None:
    supernet = calibrated("llama")
    found = routing_statistics(supernet, batches(supernet))
    told = json.loads(json.dumps(found.to_dict()))
    assert len(told["routers"]) == 3 * len({kind for kind in ALL if kind != "num_experts"})
    assert told["architecture"] == dict(supernet.active)
    table = str(found).splitlines()
    assert len(table) == 1 + 12 + 2 and table[0].split()[:3] == ["layer", "kind", "capacity"]
    titles = [note["text"] for note in found.figure().to_dict()["layout"]["annotations"]]
    assert "experts: share" in titles and "mlp_tokens: dependence on the input" in titles
    page = found.plot(tmp_path / "routing.html")
    assert "dependence on the input" in page.read_text(encoding="utf-8")


def test_what_cannot_be_watched_is_refused_with_the_cure() -> None:
    plain = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[16, 48]))
    with pytest.raises(UnsupportedModelError, match="add_routing"):
        routing_statistics(plain, batches(plain))
    supernet = routed("bert", mlp_tokens=[0.5])
    with pytest.raises(DataError, match=r"shape \(batch, tokens\)"):
        routing_statistics(supernet, [{**batches(supernet)[0], "attention_mask": torch.ones(5, 1, 12, 12)}])
    with pytest.raises(DataError, match="input_ids"):
        routing_statistics(supernet, [{"labels": torch.zeros(2)}])
    with pytest.raises(DataError, match=r"input_ids are \(5, 2, 6\); give some of shape \(batch, tokens\)"):
        routing_statistics(supernet, [{"input_ids": torch.ones(5, 2, 6, dtype=torch.long)}])
