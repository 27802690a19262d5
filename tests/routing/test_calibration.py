"""Calibration of the thresholds of token routers: shares counted anew, on the batches and on held-out text."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routed_models import routed
from tiny_models import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_elastic import RoutingConfig, Supernet, add_routing, make_elastic, set_capacity
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import DataError, TrainingError, UnsupportedModelError
from hf_elastic.files import read_json
from hf_elastic.pipeline.elm_reproduction import _llama2c_tokenizer
from hf_elastic.routing import calibration
from hf_elastic.routing.calibration import calibrate_routing
from hf_elastic.training import Distillation, ElasticTrainer, RandomSubnet

BOTH: dict[str, Any] = {"mlp_tokens": [0.5, 0.7], "attention_tokens": [0.6]}


def batches(supernet: Supernet, *, count: int = 4, rows: int = 8, length: int = 24, seed: int = 0) -> list[Any]:
    """Random tokens, of which each row has another number of padding on the left or on the right."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(3, supernet.base.config.vocab_size, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            empty = slice(0, row) if number % 2 else slice(length - row, length)
            mask[row, empty] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def counted(supernet: Supernet, data: list[Any], **capacities: Any) -> dict[tuple[int, str], float]:
    """Share of real tokens that enter with capacities active in all layers, by what each layer's routers decided."""
    entered: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    with supernet.activate(supernet.space.largest()):
        set_capacity(supernet, **capacities)
        for batch in data:
            watching = []
            for part in supernet.router_parts:

                def see(what: Any, layer: int = part.layer.index, batch: Any = batch) -> None:
                    if what.kind not in ("attention_tokens", "mlp_tokens"):
                        return
                    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                    assert not what.decision.keep[~real].any()
                    entered[layer, what.kind].append(what.decision.keep[real])

                part.routers.observers.append(see)
                watching.append((part.routers.observers, see))
            with torch.no_grad():
                supernet.model(**batch)
            for observers, see in watching:
                observers.remove(see)
    return {place: float(torch.cat(found).float().mean()) for place, found in entered.items()}


def uncalibrated(family: str = "gpt2", **kinds: Any) -> Supernet:
    """A routed model with random routers and no thresholds."""
    supernet = routed(family, low=False, **(kinds or BOTH))
    for part in supernet.router_parts:
        for kind in ("attention_tokens", "mlp_tokens"):
            if kind in part.routers and part.routers.causal:
                part.routers[kind].thresholds.fill_(torch.nan)
    return supernet


def test_every_dial_lets_in_its_share_of_the_real_tokens_in_every_layer() -> None:
    supernet = uncalibrated()
    data = batches(supernet)
    report = calibrate_routing(supernet, data)
    for capacities in ({"mlp_tokens": 0.5}, {"mlp_tokens": 0.7}, {"attention_tokens": 0.6}):
        for (layer, kind), share in counted(supernet, data, **capacities).items():
            wanted = next(iter(capacities.values()))
            assert share == pytest.approx(wanted, abs=0.005), (layer, kind, capacities)
            (told,) = [
                each.measured
                for each in report.shares
                if (each.layer, each.kind, each.setting) == (layer, kind, "alone") and each.capacity == wanted * 100
            ]
            assert told == pytest.approx(share, abs=1e-6)
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert report.worst <= 0.005
    told_together = {
        (each.layer, each.kind): each.measured
        for each in report.shares
        if each.setting == "attention_tokens 60 %, mlp_tokens 50 %"
    }
    found = counted(supernet, data, mlp_tokens=0.5, attention_tokens=0.6)
    assert found == pytest.approx({place: told_together[place] for place in found}, abs=1e-6)


def test_an_architecture_is_calibrated_jointly() -> None:
    supernet, wanted = uncalibrated(heads=[1], **BOTH), {"mlp_tokens": 50, "attention_tokens": 60, "heads": 1}
    data = batches(supernet)
    calibrate_routing(supernet, data)
    before = [part.routers["mlp_tokens"].thresholds.clone() for part in supernet.router_parts]
    alone = counted(supernet, data, mlp_tokens=0.5, attention_tokens=0.6, heads=1)
    assert max(abs(share - (0.5 if kind == "mlp_tokens" else 0.6)) for (_, kind), share in tokens(alone).items()) > 0.01
    values = dict(supernet.space.largest())
    for part in supernet.router_parts:
        values |= {part.choice_name(kind): value for kind, value in wanted.items()}
    report = calibrate_routing(supernet, data, supernet.space.canonical(values))
    for (_, kind), share in tokens(counted(supernet, data, mlp_tokens=0.5, attention_tokens=0.6, heads=1)).items():
        assert share == pytest.approx(wanted[kind] / 100, abs=0.005)
    assert {each.setting for each in report.shares} == {"architecture"}
    for part, old in zip(supernet.router_parts, before, strict=True):  # of 50, 70 and 100 per cent, the first was asked
        assert float(part.routers["mlp_tokens"].thresholds[1]) == float(old[1])


def tokens(shares: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    return {place: share for place, share in shares.items() if place[1].endswith("tokens")}


def test_a_threshold_lies_between_the_scores_that_enter_and_the_others() -> None:
    supernet = uncalibrated(mlp_tokens=[0.7], layers=[0])
    data = batches(supernet, count=2)
    (part,) = supernet.router_parts
    seen: list[Tensor] = []
    hook = part.routers["mlp_tokens"].register_forward_hook(lambda module, args, scores: seen.append(scores))
    report = calibrate_routing(supernet, data)
    hook.remove()
    # The scores of one layer depend on no threshold, so those of the first run are right.
    real = [batch["attention_mask"].bool().numpy() for batch in data]
    scores = np.sort(np.concatenate([s[..., 0].numpy()[r] for s, r in zip(seen, real, strict=False)]))[::-1]
    count = round(0.7 * len(scores))
    assert scores[count - 1] > report.shares[0].threshold >= scores[count]


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows alone, without padding, give the thresholds of the padded batches, once no threshold moves any more."""
    monkeypatch.setattr(calibration, "TOLERANCE", -1.0)
    found = []
    for padded in (True, False):
        supernet = uncalibrated("llama", mlp_tokens=[0.5, 0.7])
        data = batches(supernet, count=2)
        if not padded:
            data = [
                {"input_ids": ids[mask.bool()][None]}
                for batch in data
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        else:
            for batch in data:
                batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found.append(calibrate_routing(supernet, data))
    assert found[0].tokens == found[1].tokens
    for one, other in zip(found[0].shares, found[1].shares, strict=True):
        assert one.threshold == pytest.approx(other.threshold, abs=1e-4)


def test_tokens_of_equal_scores_enter_together_so_that_the_nearest_share_is_taken() -> None:
    supernet = uncalibrated("llama", attention_tokens=[0.5], layers=[0])
    # Nothing has mixed the tokens of layer 0 yet: three words are three scores, of 60, 30 and 10 tokens.
    ids = torch.tensor([[5] * 60 + [6] * 30 + [7] * 10])[:, torch.randperm(100, generator=torch.Generator())]
    (part,) = supernet.router_parts
    seen: list[Tensor] = []
    hook = part.routers["attention_tokens"].register_forward_hook(lambda module, args, scores: seen.append(scores))
    report = calibrate_routing(supernet, [{"input_ids": ids[:, start : start + 50]} for start in (0, 50)])
    hook.remove()
    values, counts = torch.cat([scores.flatten() for scores in seen[:2]]).round(decimals=4).unique(return_counts=True)
    assert sorted(counts.tolist()) == [10, 30, 60]
    reached = [sum(counts.flip(0).tolist()[:words]) / 100 for words in (1, 2, 3)]  # the highest score first
    best = min(abs(each - 0.5) for each in reached)
    (share,) = report.shares
    assert share.missed == pytest.approx(best)
    assert f"misses its capacity by {best:.1%}" in str(report)


def test_it_is_deterministic_computes_no_gradient_and_leaves_modes_and_the_active_architecture() -> None:
    reports = []
    for _ in range(2):
        supernet = uncalibrated()
        supernet.model.train()
        supernet.base.transformer.h[0].eval()
        point = supernet.space.smallest()
        with supernet.activate(point):
            reports.append(calibrate_routing(supernet, iter(batches(supernet))))
            assert supernet.active == point
        assert supernet.model.training and not supernet.base.transformer.h[0].training
        assert all(p.grad is None for p in supernet.model.parameters())
        assert not any(part.routers.observers for part in supernet.router_parts)
        assert not any(m._forward_hooks for part in supernet.router_parts for m in part.routers.modules())
    assert reports[0] == reports[1]
    assert json.loads(json.dumps(reports[0].to_dict()))["passes"] == reports[0].passes


def test_an_encoder_needs_none_and_the_report_says_so() -> None:
    supernet = routed("bert", low=False, mlp_tokens=[0.5])
    report = calibrate_routing(supernet, batches(supernet))
    assert report.shares == () and "encoder" in str(report)
    assert "rank" in str(calibrate_routing(routed("llama", heads=[1]), batches(supernet)))
    largest = supernet.space.largest()
    causal = uncalibrated()
    assert "all tokens enter" in str(calibrate_routing(causal, batches(causal), causal.space.largest()))
    assert supernet.active == largest


def test_sublayers_that_an_architecture_skips_need_no_threshold() -> None:
    supernet = routed("gpt2", config=ElasticConfig(skip=["mlp"]), low=False, mlp_tokens=[0.5])
    values = {**supernet.space.largest(), "layers.1.skip": "mlp", "layers.0.mlp_tokens": 50, "layers.2.mlp_tokens": 50}
    report = calibrate_routing(supernet, batches(supernet), supernet.space.canonical(values))
    assert [share.layer for share in report.shares] == [0, 2]
    assert report.worst <= 0.005


def test_what_cannot_be_calibrated_is_refused_with_the_cure() -> None:
    plain = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[16, 48]))
    with pytest.raises(UnsupportedModelError, match="add_routing"):
        calibrate_routing(plain, batches(plain))
    supernet = uncalibrated()
    with pytest.raises(DataError, match="no calibration batch"):
        calibrate_routing(supernet, [])
    with pytest.raises(DataError, match="nothing but padding"):
        calibrate_routing(
            supernet, [{**batch, "attention_mask": torch.zeros(8, 24).long()} for batch in batches(supernet)]
        )
    fresh = add_routing(tiny("llama"), RoutingConfig(mlp_tokens=[0.5]))
    with pytest.raises(TrainingError, match="mlp_tokens in layer 0 gives all .* one score.*train it first"):
        calibrate_routing(fresh, batches(fresh))


def thresholds(supernet: Supernet) -> list[Tensor]:
    routers = [part.routers["mlp_tokens"] for part in supernet.router_parts]
    return [router.thresholds.clone() for router in routers]


def test_a_calibration_that_fails_leaves_the_thresholds_there_were() -> None:
    fresh = add_routing(tiny("llama"), RoutingConfig(mlp_tokens=[0.5]))
    with pytest.raises(TrainingError):
        calibrate_routing(fresh, batches(fresh))
    assert all(each.isnan().all() for each in thresholds(fresh))
    set_capacity(fresh, mlp_tokens=0.5)
    with pytest.raises(RuntimeError, match="has no threshold"):
        fresh.model(**batches(fresh)[0])
    supernet = uncalibrated("llama", mlp_tokens=[0.5])
    data = batches(supernet)
    calibrate_routing(supernet, data)
    before = thresholds(supernet)
    broken = {"input_ids": torch.full((2, 5), supernet.base.config.vocab_size + 7)}
    with pytest.raises(IndexError):
        calibrate_routing(supernet, [*data[:1], broken])
    torch.testing.assert_close(thresholds(supernet), before, rtol=0, atol=0, equal_nan=True)


def stories(data_dir: Path, *, length: int = 128) -> tuple[Any, Tensor]:
    folder, text = data_dir / "stories260K" / "hf", data_dir / "tinystories" / "train_944k.txt"
    if not (folder / "config.json").is_file() or not text.is_file():
        pytest.skip(f"no checkpoint in {folder}, or no {text}")
    tokenizer = _llama2c_tokenizer(read_json(folder / "llama2c_tokenizer.json"))
    ids = tokenizer(text.read_text(encoding="utf-8")[:160_000], add_special_tokens=False)["input_ids"]
    return folder, torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@pytest.mark.slow
def test_shares_are_within_two_points_on_held_out_text(data_dir: Path, tmp_path: Path) -> None:
    folder, ids = stories(data_dir)
    wanted = RoutingConfig(mlp_tokens=[0.5, 0.8], attention_tokens=[0.7], share="model")
    supernet = add_routing(AutoModelForCausalLM.from_pretrained(folder), wanted)
    args = TrainingArguments(
        str(tmp_path), max_steps=25, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", seed=0,
        disable_tqdm=True, save_strategy="no", use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row} for row in ids[:100]]
    plan = Distillation(teacher="parent")
    ElasticTrainer(
        supernet=supernet, sampling=RandomSubnet(seed=0), distill=plan, args=args, train_dataset=rows
    ).train()
    order = torch.randperm(len(ids) - 100, generator=torch.Generator().manual_seed(0)) + 100
    measured, held_out = ([{"input_ids": part} for part in ids[half].split(32)] for half in order.chunk(2))
    report = calibrate_routing(supernet, measured)
    assert report.worst <= 0.005, str(report)
    supernet.model.eval()
    for capacities in ({"mlp_tokens": 0.5}, {"mlp_tokens": 0.8}, {"attention_tokens": 0.7}):
        (share,) = capacities.values()
        for place, found in counted(supernet, held_out, **capacities).items():
            assert found == pytest.approx(share, abs=0.02), (place, capacities)
    joint = {"mlp_tokens": 80, "attention_tokens": 70}
    calibrate_routing(supernet, measured, {**supernet.space.largest(), **joint})
    for (layer, kind), found in counted(supernet, held_out, mlp_tokens=0.8, attention_tokens=0.7).items():
        assert found == pytest.approx(joint[kind] / 100, abs=0.02), (layer, kind)
