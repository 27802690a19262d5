"""Damages against models cut and repaired by hand with NumPy, and what a table must survive."""

from __future__ import annotations

import copy
import functools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GROUPED, supernet_of
from torch import Tensor, nn

from hf_elastic import CheckpointError, DataError, Supernet
from hf_elastic.repair.refitting import refit
from hf_elastic.tables.quality import (
    WHOLE,
    Additivity,
    QualityTable,
    additivity,
    measure_quality_table,
    predicted_damage,
    sublayer_options,
    true_damage,
)

FAMILIES = ("bert", "distilbert", "llama", "qwen3", "gpt2")
RIDGE = 1e-3


def batches(supernet: Supernet, *, seed: int, count: int = 2) -> list[dict[str, Tensor]]:
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(100 * seed + number)
        ids = torch.randint(3, supernet.model.config.vocab_size, (8, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:], mask[1, 5:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def made(family: str, head: str = "base", **changes: object) -> tuple[Supernet, list[dict], list[dict]]:
    supernet = supernet_of(family, head, num_hidden_layers=None, **changes)
    return supernet, batches(supernet, seed=1), batches(supernet, seed=2)


def states(model: nn.Module, data: list[dict[str, Tensor]], *, layer: nn.Module | None = None) -> Tensor:
    """What leaves a layer (by default the base model) at real tokens."""
    seen: list[Tensor] = []
    module = layer or model
    handle = module.register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat([s[b["attention_mask"].bool()] for s, b in zip(seen, data, strict=True)]).double()


def inputs_of(model: nn.Module, module: nn.Module, data: list[dict[str, Tensor]]) -> np.ndarray:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat([s[b["attention_mask"].bool()] for s, b in zip(seen, data, strict=True)]).double().numpy()


def cut_by_hand(supernet: Supernet, index: int, path: str, size: int, data: list[dict[str, Tensor]]) -> nn.Module:
    """A copy of the parent in which inputs of one projection beyond ``size`` are zeroed and the others refitted."""
    model = copy.deepcopy(supernet.model)
    layer = model.base_model.get_submodule(supernet.family.layers)[index]
    module = layer.get_submodule(path)
    transposed = isinstance(module, nn.Linear)
    weight = module.weight.detach().double().numpy()
    weight = weight.T if transposed else weight  # (I, O)
    x, bias = inputs_of(model, module, data), module.bias
    y = x @ weight + (0 if bias is None else bias.detach().double().numpy())
    kept = x[:, :size]
    centred = kept if bias is None else kept - kept.mean(0)
    strength = RIDGE * np.square(centred).sum(0).mean()
    if bias is not None:
        kept = np.hstack([kept, np.ones((len(kept), 1))])
    penalty = np.sqrt(strength) * np.eye(size, kept.shape[1])
    found = np.linalg.lstsq(
        np.vstack([kept, penalty]), np.vstack([y, np.sqrt(strength) * weight[:size]]), rcond=None
    )[0]
    new = np.zeros_like(weight)
    new[:size] = found[:size]
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(new.T if transposed else new))
        if bias is not None:
            bias.copy_(torch.from_numpy(found[size]))
    return model


def last_layer(model: nn.Module, supernet: Supernet) -> nn.Module:
    layers = model.base_model.get_submodule(supernet.family.layers)
    return layers[len(layers) - 1]


def hidden_error(model: nn.Module, supernet: Supernet, held: list[dict[str, Tensor]]) -> float:
    ours = states(model, held, layer=last_layer(model, supernet))
    theirs = states(supernet.model, held, layer=last_layer(supernet.model, supernet))
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_damages_are_those_of_a_parent_cut_and_repaired_by_hand(family: str) -> None:
    supernet, data, held = made(family)
    table = measure_quality_table(supernet, data, held, measure="hidden", ridge=RIDGE)
    head_dim, ratio = supernet.layer_parts[0].head_dim, 2 if family in GROUPED else 1
    for part, row in zip(supernet.layer_parts, table.damages, strict=True):
        for option, path, size in (
            ("mlp/16", part.family.ffn_out, 16),
            ("attention/1", part.family.attention_out, head_dim * ratio),
        ):
            by_hand = cut_by_hand(supernet, part.index, path, size, data)
            assert row[option] == pytest.approx(hidden_error(by_hand, supernet, held), rel=1e-3), (part.index, option)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("option", "skip"), [("mlp/0", "mlp"), ("attention/0", "attention")])
def test_damages_of_skips_are_those_of_the_active_subnet(family: str, option: str, skip: str) -> None:
    supernet, data, held = made(family)
    table = measure_quality_table(supernet, data, held, measure="hidden")
    for index, row in enumerate(table.damages):
        point = supernet.space.canonical({**supernet.space.largest(), f"layers.{index}.skip": skip})
        theirs = states(supernet.model, held, layer=last_layer(supernet.model, supernet))
        with supernet.activate(point):
            ours = states(supernet.model, held, layer=last_layer(supernet.model, supernet))
        assert row[option] == pytest.approx(float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_damage_of_a_missing_layer_is_that_after_what_follows_was_refitted(family: str) -> None:
    supernet, data, held = made(family)
    table = measure_quality_table(supernet, data, held, measure="hidden")
    for index, row in enumerate(table.damages):
        point = supernet.space.canonical({**supernet.space.largest(), f"layers.{index}.skip": "layer"})
        refitted = true_damage(supernet, point, calibration=data, validation=held, measure="hidden")
        assert row[WHOLE] == pytest.approx(refitted, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_changes_nothing(family: str) -> None:
    supernet, data, held = made(family)
    before = {name: t.clone() for name, t in supernet.model.state_dict().items()}
    supernet.set_active(supernet.space.midpoint())
    supernet.model.train()
    measure_quality_table(supernet, data, held, measure="hidden")
    assert all(torch.equal(before[name], t) for name, t in supernet.model.state_dict().items())
    assert supernet.active == supernet.space.midpoint() and supernet.model.training


def test_the_largest_architecture_has_no_damage_and_skips_are_not_cheaper_than_widths() -> None:
    supernet, data, held = made("bert")
    table = measure_quality_table(supernet, data, held, measure="hidden")
    assert predicted_damage(supernet, table, supernet.space.largest()) == 0
    for row in table.damages:
        assert all(value >= 0 for value in row.values()) and row["mlp/16"] >= row["mlp/24"]


def test_widths_between_measured_ones_are_interpolated() -> None:
    supernet, data, held = made("bert", intermediate_size=list(range(8, 49, 8)))
    table = measure_quality_table(supernet, data, held, measure="hidden", sizes=3)
    assert [n for n in table.damages[0] if n.startswith("mlp")] == ["mlp/48", "mlp/32", "mlp/8", "mlp/0"] or [
        n for n in table.damages[0] if n.startswith("mlp")
    ] == ["mlp/48", "mlp/24", "mlp/8", "mlp/0"]
    part = supernet.layer_parts[0]
    middle = int(next(n for n in table.damages[0] if n in ("mlp/32", "mlp/24")).partition("/")[2])
    point = supernet.space.canonical({**supernet.space.largest(), "layers.0.intermediate_size": 16})
    low, high = table.damages[0]["mlp/8"], table.damages[0][f"mlp/{middle}"]
    wanted = low + (16 - 8) / (middle - 8) * (high - low)
    assert table.damage(part, part.shape(point)) == pytest.approx(wanted)


def test_options_are_what_the_space_can_ask_for() -> None:
    supernet = supernet_of("llama", "base", num_hidden_layers=[2, 3], skip=None)
    first, *_, last = (sublayer_options(part, sizes=9) for part in supernet.layer_parts)
    assert first == ["mlp/48", "mlp/24", "mlp/16", "attention/2", "attention/1"]
    assert WHOLE in {*last, *sublayer_options(supernet.layer_parts[1], sizes=9)}
    uniform = supernet_of("bert", "base", skip=["layer"], loadability="stock", num_attention_heads=None,
                          num_hidden_layers=None)  # fmt: skip
    assert sublayer_options(uniform.layer_parts[1], sizes=9) == ["mlp/48", "mlp/24", "mlp/16", "attention/4", WHOLE]


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    supernet, data, held = made("gpt2")
    path = tmp_path / "table.json"
    whole = measure_quality_table(supernet, data, held, measure="hidden")
    steps: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        steps.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_quality_table(supernet, data, held, measure="hidden", path=path, progress=stop)
    kept = QualityTable.load(path)
    assert any(kept.damages) and not all(kept.damages)
    calls: list[int] = []
    again = measure_quality_table(
        supernet, data, held, measure="hidden", path=path, progress=lambda done, total: calls.append(done)
    )
    assert again == whole == QualityTable.load(path)
    calls.clear()
    measure_quality_table(supernet, data, held, measure="hidden", path=path, progress=lambda d, t: calls.append(d))
    assert not calls  # a finished one is read


@pytest.mark.parametrize("change", ["weights", "data", "settings"])
def test_a_table_of_something_else_is_refused(change: str, tmp_path: Path) -> None:
    supernet, data, held = made("bert")
    path = tmp_path / "table.json"
    measure_quality_table(supernet, data, held, measure="hidden", path=path)
    if change == "weights":
        with torch.no_grad():
            next(supernet.model.parameters()).mul_(1.5)
    with pytest.raises(CheckpointError, match=r"table\.json was measured on another model"):
        measure_quality_table(
            supernet, data if change != "data" else held, held, measure="hidden", path=path,
            ridge=1e-2 if change == "settings" else RIDGE,
        )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1}',
        '{"format": 2, "measure": "x", "fingerprint": "y", "damages": []}',
        '{"format": 1, "measure": "x", "fingerprint": "y", "damages": [{"a": "b"}]}',
        '{"format": 1, "measure": "x", "fingerprint": "y", "damages": [{"mlp/a": 1.0}]}',
    ],
)
def test_files_that_hold_no_table_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CheckpointError, match="holds no quality table"):
        QualityTable.load(tmp_path / "t.json")


def test_a_shape_beyond_the_table_is_refused() -> None:
    supernet, data, held = made("bert")
    table = QualityTable("hidden", "", tuple({"mlp/48": 0.0, "mlp/24": 0.1, "attention/4": 0.0} for _ in range(3)))
    point = supernet.space.canonical({**supernet.space.largest(), "layers.0.intermediate_size": 16})
    with pytest.raises(DataError, match="no mlp of size 16"):
        predicted_damage(supernet, table, point)


def test_a_users_measure_is_a_function_of_the_model() -> None:
    supernet, data, held = made("bert")

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(**held[0]).last_hidden_state.norm())

    table = measure_quality_table(supernet, data, held, measure=distance)
    by_hand = cut_by_hand(supernet, 1, supernet.family.ffn_out, 16, data)
    assert table.damages[1]["mlp/16"] == pytest.approx(distance(by_hand) - distance(supernet.model), rel=1e-2, abs=1e-4)


def test_a_damage_that_is_no_number_is_said_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    supernet, data, held = made("bert")
    path, calls = tmp_path / "table.json", iter([1.0, 1.5, 2.0])

    def broken(model: nn.Module) -> float:
        return next(calls, float("nan"))

    with pytest.raises(DataError, match=r"layer 0, \S+: the damage is nan; look for NaN"):
        measure_quality_table(supernet, data, held, measure=broken, path=path)
    assert sum(value > 0 for value in QualityTable.load(path).damages[0].values()) == 2
    with torch.no_grad():
        supernet.layer_parts[2].layer.output.dense.weight[0, 0] = float("nan")
    with pytest.raises(DataError):
        measure_quality_table(supernet, data, held, measure="hidden")


def one_measure(model: nn.Module) -> float:
    return 1.0


def test_the_table_of_another_function_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    supernet, data, held = made("bert")
    path = tmp_path / "table.json"
    table = measure_quality_table(supernet, data, held, measure=one_measure, path=path)
    assert measure_quality_table(supernet, data, held, measure=one_measure, path=path) == table

    def other(model: nn.Module) -> float:
        return 2.0

    other.__qualname__ = one_measure.__qualname__
    with pytest.raises(CheckpointError, match="another model, other data or other settings"):
        measure_quality_table(supernet, data, held, measure=other, path=path)
    for nameless in (lambda model: 1.0, functools.partial(one_measure)):
        with pytest.raises(DataError, match="make it a function with def, or leave path out"):
            measure_quality_table(supernet, data, held, measure=nameless, path=path)
        assert measure_quality_table(supernet, data, held, measure=nameless).damages == table.damages


IDENTIFY = """
from hf_elastic.tables.quality import _identified
def measure(model):
    return float(str(model) in {"one", "two", "three", "four"})
print(_identified(measure, kept=True))
"""


def test_a_measure_is_the_same_in_every_process() -> None:
    """Sets of strings are ordered by a hash that each process draws anew."""
    told = [
        subprocess.run(
            [sys.executable, "-c", IDENTIFY], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    assert "four" in told[0] and told[0] == told[1] == told[2]


@pytest.mark.parametrize("sizes", [0, 1, -1, "a", True])
def test_a_number_of_sizes_that_makes_no_sense_is_refused(sizes: Any) -> None:
    supernet, data, held = made("bert")
    with pytest.raises(DataError, match="must be an integer of at least 2"):
        measure_quality_table(supernet, data, held, measure="hidden", sizes=sizes)


@pytest.mark.parametrize("measure", ["hidden", "kl"])
def test_held_out_text_without_a_token_is_refused(measure: str) -> None:
    supernet, data, held = made("llama", "lm")
    empty = [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])} for batch in held]
    with pytest.raises(DataError, match="no real token"):
        measure_quality_table(supernet, data, empty, measure=measure)


def test_true_damage_is_that_of_the_refitted_model() -> None:
    supernet, data, held = made("llama")
    point = supernet.space.midpoint()
    small = refit(supernet, point, data)
    found = true_damage(supernet, point, calibration=data, validation=held, measure="hidden")
    assert found == pytest.approx(hidden_error(small, supernet, held), rel=1e-3)


def test_additivity_tells_rank_correlation_and_ratio() -> None:
    supernet, data, held = made("gpt2")
    table = measure_quality_table(supernet, data, held, measure="hidden")
    rng = random.Random(0)
    points = [supernet.space.sample(rng) for _ in range(4)]
    found = additivity(supernet, table, points, calibration=data, validation=held, measure="hidden")
    assert found.predicted == tuple(predicted_damage(supernet, table, p) for p in points)
    assert found.measured[0] == pytest.approx(
        true_damage(supernet, points[0], calibration=data, validation=held, measure="hidden")
    )
    sure = Additivity((1.0, 2.0, 3.0), (2.0, 4.0, 6.0))
    assert sure.rank_correlation == pytest.approx(1.0) and sure.mean_ratio == pytest.approx(2.0)
    assert "correlation of 1.00" in str(sure) and "2.00 times" in str(sure) and "weak" not in str(sure)
    for order in ((3.0, 2.0, 1.0), (1.0, 1.0, 1.0)):
        assert "a weak guide" in str(Additivity((1.0, 2.0, 3.0), order))
    with pytest.raises(DataError, match="at least 3"):
        additivity(supernet, table, points[:2], calibration=data, validation=held, measure="hidden")


@pytest.mark.parametrize("value", ["NaN", "1e999", "1" + "0" * 400, "true", "null", '"1"', "[1]"])
def test_a_damage_that_is_no_number_is_refused(value: str, tmp_path: Path) -> None:
    QualityTable("hidden", "abc", ({WHOLE: 0.5},)).save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    assert QualityTable.load(tmp_path / "table.json").damages == ({WHOLE: 0.5},)
    (tmp_path / "table.json").write_text(text.replace("0.5", value))
    with pytest.raises(CheckpointError, match="holds no quality table"):
        QualityTable.load(tmp_path / "table.json")
