"""Latency tables of candidate blocks against times made of counted MACs, and against real forwards."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timed_tables import FormulaTimer, check_an_interrupted_measurement_goes_on
from tiny_models import supernet_of
from torch.utils.flop_counter import FlopCounterMode

import hf_elastic as he
from hf_elastic import BlockLatencyTable, CheckpointError, DataError, Supernet, UnsupportedModelError, objectives
from hf_elastic.blocks import BlockShape
from hf_elastic.checkpoint.extraction import extract
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.search import Objective, search_subnets
from hf_elastic.tables.additive import layer_table
from hf_elastic.tables.block_latencies import (
    BlockKind,
    check_latency,
    kind_of,
    measure_block_latency_table,
    timed_path,
)
from hf_elastic.tables.latencies import measure_latency_table

NAMES = {"elastic_bert": "ElasticBertForMaskedLM", "elastic_gpt2": "ElasticGPT2ForCausalLM"}
FAMILIES = tuple(NAMES)
CONSTANT = 0.25
WIDTHS = (8, 16, 24, 36, 48)


def made(family: str = "elastic_bert", *, layers: int = 3, seed: int = 0, **changes: Any) -> Supernet:
    """A space of all six blocks; attention is eager, so that its MACs can be counted."""
    names = ("n_embd", "n_layer", "n_head", "n_inner", "n_positions")
    if family == "elastic_bert":
        names = (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
        )  # fmt: skip
    fields = dict(zip(names, (32, layers, 4, 48, 32), strict=True))
    own = {"vocab_size": 40, "bottleneck_size": 16, "candidate_blocks": list(BLOCKS), **fields, **changes}
    config = config_class(family)(**own, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return he.make_elastic(model_class(family, NAMES[family])(config).eval())


def grown(family: str = "elastic_bert", *, seed: int = 0, **changes: Any) -> Supernet:
    """The same with widths that differ by layer and block, heads left out of one block and merged in another."""
    supernet, rng = made(family, **changes), random.Random(seed)
    for part in supernet.block_parts:
        for block in part.blocks:
            part.set_width(block, rng.choice(WIDTHS))
    supernet.block_parts[0].set_heads("standard-qv", [1, 3])
    supernet.block_parts[-1].set_heads("bottleneck", 2)
    supernet.resized()
    return supernet


def small(*, layers: int = 3, seed: int = 0) -> Supernet:
    """Of two blocks, for what the others would not show."""
    return made(layers=layers, seed=seed, candidate_blocks=["standard", "bottleneck-kv"])


def counted(call: Any) -> float:
    """MACs of one forward, of which 10⁵ take a second, behind a constant."""
    with FlopCounterMode(display=False) as counter:
        call()
    return CONSTANT + counter.get_total_flops() / 2 / 1e5


def sized(call: Any) -> float:
    """Parameters, of which 10⁵ take a second, behind a constant; nothing runs."""
    return CONSTANT + sum(parameter.numel() for parameter in call.model.parameters()) / 1e5


class FakeTimer(FormulaTimer):
    """Seconds by a formula of the model that would run, of its parameters where none is given."""

    def __init__(self, truth: Callable[[Any], float] = sized, **options: Any) -> None:
        super().__init__(truth, **options)


def measured(supernet: Supernet, timer: FakeTimer | None = None, **options: Any) -> BlockLatencyTable:
    options = {"rounds": 3, "seconds": 1e9, "widths": 5, **options}
    return measure_block_latency_table(supernet, timer=timer or FakeTimer(), **options)


def sampled(supernet: Supernet, count: int, *, seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    return {f"random {number}": supernet.space.sample(rng) for number in range(count)}


def layout(model: Any) -> dict[str, Any]:
    return {name: (t.shape, t.stride(), t.dtype) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_timed_has_the_class_the_config_and_the_tensors_of_an_exported_path(family: str) -> None:
    supernet = grown(family)
    ours = {t.untyped_storage().data_ptr() for t in supernet.model.state_dict().values()}
    for point in sampled(supernet, 8).values():
        wanted, got = (
            extract(supernet, point, loadability="remote-code"),
            timed_path(supernet, supernet.block_shapes(point)),
        )
        assert type(got) is type(wanted) and not got.training
        assert got.config.to_dict() == wanted.config.to_dict()
        assert got.config._attn_implementation == "eager"
        assert layout(got) == layout(wanted)
        assert {p.untyped_storage().data_ptr() for p in got.base_model.parameters()} <= ours  # no memory of its own


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("elastic_bert", {"batch_size": 2, "length": 7}),
        ("elastic_gpt2", {"length": 9}),
        ("elastic_gpt2", {"length": 11, "batch_size": 2, "phase": "decode"}),
    ],
)
def test_predictions_are_exact_where_time_is_macs_and_a_constant(family: str, setting: dict[str, Any]) -> None:
    supernet = grown(family)
    table = measured(supernet, FakeTimer(counted), **setting)
    assert table.fit.misfit < 1e-9
    outside = supernet.model.get_output_embeddings().weight.numel() * (1 if family == "elastic_gpt2" else 7)
    outside += 0 if family == "elastic_gpt2" else 32 * 32 * 7  # the head's own linear
    batch = setting.get("batch_size", 1)
    assert table.fit.constant == pytest.approx(CONSTANT + batch * outside / 1e5, rel=1e-9)
    points = {**sampled(supernet, 12), "largest": supernet.space.largest(), "smallest": supernet.space.smallest()}
    check = check_latency(supernet, table, points, timer=FakeTimer(counted))
    assert check.worst_error < 1e-9
    assert table.speedup(supernet, supernet.space.largest()) == 1.0
    times = {row.name: row.measured for row in check.rows}
    ratio = times["largest"] / times["smallest"]
    assert table.speedup(supernet, supernet.space.smallest()) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("layers", (1, 2))
def test_the_constant_is_told_apart_in_models_of_few_layers(layers: int) -> None:
    supernet = made("elastic_gpt2", layers=layers)
    table = measured(supernet, FakeTimer(counted), length=4)
    assert table.fit.constant == pytest.approx(CONSTANT + 40 * 32 / 1e5, rel=1e-9)
    assert check_latency(supernet, table, sampled(supernet, 4), timer=FakeTimer(counted)).worst_error < 1e-9


def test_each_kind_of_block_is_measured_at_a_few_of_its_widths_and_the_others_are_interpolated() -> None:
    supernet = made(layers=5, candidate_blocks=["standard", "bottleneck-kv"])
    for part, width in zip(supernet.block_parts, (12, 48, 20, 28, 30), strict=True):
        part.set_width("standard", width)
    supernet.resized()
    table = measured(supernet, FakeTimer(counted), widths=3)
    assert table.shapes == (
        *(BlockShape("standard", width, 4, 8) for width in (48, 30, 12)), BlockShape("bottleneck-kv", 48, 4, 4),
    )  # fmt: skip
    pure = [variant for variant in table.variants if len(set(variant)) == 1 and len(variant) == 5]
    assert pure == [(place,) * 5 for place in range(4)]
    assert check_latency(supernet, table, sampled(supernet, 6), timer=FakeTimer(counted)).worst_error < 1e-9


def test_blocks_whose_heads_were_merged_or_left_out_are_kinds_of_their_own() -> None:
    supernet = grown()
    table = measured(supernet)
    assert {kind for kind in table.fit.blocks if kind.block == "bottleneck"} == {
        BlockKind("bottleneck", 4, 4), BlockKind("bottleneck", 2, 8),
    }  # fmt: skip
    assert BlockKind("standard-qv", 2, 8) in table.fit.blocks
    supernet.block_parts[1].set_heads("standard", 2)
    supernet.resized()
    point = supernet.space.canonical({**supernet.space.largest(), "layers.1.block": "standard"})
    with pytest.raises(DataError, match="no standard of 2 x 16, only standard of 4 x 8, .*; measure it again"):
        table.predict(supernet, point)
    with pytest.raises(DataError, match="no standard of 2 x 16"):
        objectives.predicted_latency(supernet, table)


def test_widths_that_the_table_does_not_reach_are_refused() -> None:
    supernet = made()
    for part in supernet.block_parts:
        for block in part.blocks:
            part.set_width(block, 16 if part.index else 24)
    supernet.resized()
    table = measured(supernet)
    supernet.block_parts[1].set_width("standard", 20)  # between
    supernet.block_parts[2].set_width("standard", 32)
    supernet.resized()
    assert table.predict(supernet, supernet.space.canonical({f"layers.{n}.block": BLOCKS[n == 2] for n in range(3)}))
    with pytest.raises(DataError, match=r"no FFN in standard of size 32, only \[16, 24\]; measure it"):
        table.predict(supernet, supernet.space.canonical({f"layers.{n}.block": "standard" for n in range(3)}))
    with pytest.raises(DataError, match="of size 32"):
        objectives.predicted_latency(supernet, table)


def test_noise_of_every_time_is_not_multiplied_by_the_number_of_layers() -> None:
    supernet = small(layers=12)
    table = measured(supernet, FakeTimer(noise=0.03), rounds=15)
    check = check_latency(supernet, table, sampled(supernet, 20), timer=FakeTimer(), rounds=1)
    assert check.worst_error < 0.03
    assert 0 < table.noise < 0.1


def test_a_time_that_is_no_sum_over_blocks_shows_in_the_misfit() -> None:
    def changes(call: Any) -> float:
        """What costs extra here is a change of block from one layer to the next."""
        blocks = [type(layer.bottleneck_out_norm).__name__ if layer.has_bottleneck else "" for layer in _layers(call)]
        return sized(call) * (1 + 0.1 * sum(a != b for a, b in itertools.pairwise(blocks)))

    table = measured(small(), FakeTimer(changes))
    assert table.fit.misfit > 0.02
    assert (
        "which sums fit within" in str(table)
        and "noise is 0.0%" in str(table)
        and "bottleneck-kv of 4 x 4" in str(table)
    )


def _layers(call: Any) -> Any:
    return call.model.bert.encoder.layer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_objective_is_a_sum_of_whole_nanoseconds_that_says_what_predict_says(family: str) -> None:
    supernet = grown(family)
    table = measured(supernet, FakeTimer(lambda call: sized(call) / 3e3))
    objective = objectives.predicted_latency(supernet, table)
    assert objective.additive is not None and objective.cost and objective.unit == "ns"
    for point in sampled(supernet, 50).values():
        value = objective(point)
        assert value == objective.additive.value(point) and value == int(value)
        assert value == pytest.approx(1e9 * table.predict(supernet, point), abs=2.0)  # 3 layers, constant: 4 · 0.5
    other = objectives.predicted_latency(supernet, measured(supernet, FakeTimer(lambda call: sized(call) / 2e3)))
    assert other.fingerprint != objective.fingerprint


def loss_of(supernet: Supernet) -> Objective:
    """A sum over blocks of which nothing is known."""
    rng = random.Random(3)
    worth = {(part.index, block): float(rng.randrange(1000)) for part in supernet.block_parts for block in part.blocks}

    def total(point: Any) -> float:
        return sum(worth[part.index, part.chosen(point)] for part in supernet.block_parts)

    table = layer_table(supernet, block=lambda part, block: worth[part.index, block])
    return Objective("loss", total, additive=table)


def test_exact_search_within_half_of_the_latency_finds_what_brute_force_finds() -> None:
    supernet = grown(layers=4)
    latency = objectives.predicted_latency(
        supernet, measured(supernet, FakeTimer(lambda call: counted(call) - CONSTANT))
    )
    loss = loss_of(supernet)
    options: dict[str, Any] = {"within": {"predicted_latency": 0.5}, "progress": False}
    best = search_subnets(supernet.space, [loss, latency], algorithm="exact", **options).best("loss")
    bound = 0.5 * latency(supernet.space.largest())
    allowed = [point for point in supernet.space.architectures() if latency(point) <= bound]
    assert 0 < len(allowed) < supernet.space.size
    assert best.values["loss"] == min(map(loss, allowed))
    assert latency(best.architecture) <= bound
    found = search_subnets(supernet.space, [loss, latency], algorithm="nsga2", evaluations=40, seed=0, **options)
    assert found.best("loss").values["predicted_latency"] <= bound


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    supernet = grown("elastic_gpt2")
    table = measured(supernet, phase="decode", batch_size=2, length=7)
    table.save(tmp_path / "table.json")
    again = BlockLatencyTable.load(tmp_path / "table.json")
    assert again == table
    supernet.save_pretrained(tmp_path / "supernet")
    restored = Supernet.from_pretrained(tmp_path / "supernet", attn_implementation="eager")
    point = supernet.space.midpoint()
    assert again.predict(restored, point) == table.predict(supernet, point)


def test_an_interrupted_measurement_goes_on_with_the_rest_only(tmp_path: Path) -> None:
    check_an_interrupted_measurement_goes_on(
        measured, FakeTimer, small(), file=tmp_path / "table.json", call="measure_block_latency_table"
    )


def test_measuring_ends_when_the_time_is_spent_but_not_before_three_rounds() -> None:
    supernet = small()
    assert len(measured(supernet, rounds=15, seconds=0.0).rounds) == 3
    one = measured(supernet, rounds=15, seconds=0.0).spent / 4  # with the round that warms up
    assert len(measured(supernet, rounds=15, seconds=5.5 * one).rounds) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 2}, "batch_size 1 and not 2"),
        ({"length": 9}, "length 32 and not 9"),
        ({"dtype": torch.bfloat16}, "dtype 'float32' and not 'bfloat16'"),
        ({"widths": 2}, "other widths or heads than they have now"),
    ],
)
def test_a_file_of_another_setting_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    supernet, file = small(), tmp_path / "t.json"
    for part, width in zip(supernet.block_parts, (12, 24, 36), strict=True):
        part.set_width("standard", width)
    supernet.resized()
    measured(supernet, path=file)
    with pytest.raises(CheckpointError, match=words) as error:
        measured(supernet, path=file, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("device", "cpu of old"), ("threads", 64), ("software", "torch 0.1")])
def test_a_file_of_another_machine_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    supernet, file = small(), tmp_path / "t.json"
    table = measured(supernet)
    other = replace(table, setting=replace(table.setting, **{name: value}))
    other.save(file)
    with pytest.raises(CheckpointError, match=f"was measured with {name} '?{value}'? and not"):
        measured(supernet, path=file)
    with pytest.raises(CheckpointError, match=f"does not fit random 0: it says {name} '?{value}'? and not"):
        check_latency(supernet, other, sampled(supernet, 1))


def test_a_table_of_another_model_is_refused_but_not_one_of_other_weights(tmp_path: Path) -> None:
    supernet, file = small(), tmp_path / "t.json"
    table = measured(supernet, path=file)
    assert table.predict(small(seed=5), supernet.space.largest()) > 0
    two = ["standard", "bottleneck-kv"]
    others = (
        made(), made("elastic_gpt2", candidate_blocks=two), made(candidate_blocks=two, bottleneck_act="gelu"),
        made(candidate_blocks=two, bottleneck_size=12), small(layers=4), supernet_of("bert", "lm"),
    )  # fmt: skip
    for other in others:
        with pytest.raises(CheckpointError, match=f"another model than this {type(other.model).__name__}"):
            table.predict(other, other.space.largest())
        with pytest.raises(CheckpointError, match="another model"):
            objectives.predicted_latency(other, table)
    with pytest.raises(CheckpointError, match=r"t\.json was measured on another model"):
        measured(small(layers=4), path=file)
    supernet.block_parts[0].set_width("standard", 8)
    with pytest.raises(CheckpointError, match="other widths or heads than they have now"):
        measured(supernet, path=file)


@pytest.mark.parametrize(
    "broken",
    [
        {"format": 2}, {"rounds": [[1.0]]}, {"rounds": []}, {"variants": [[0, 1]]}, {"variants": [[99]]},
        {"shapes": []}, {"shapes": [{"block": "standard"}]}, {"spent": "x"}, {"setting": {}}, {"finished": 1},
    ],
)  # fmt: skip
def test_a_file_that_holds_no_table_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    measured(small(), path=file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    with pytest.raises(CheckpointError, match="holds no block latency table of format 1; delete it"):
        BlockLatencyTable.load(file)
    with pytest.raises(CheckpointError, match="holds no latency table"):
        he.LatencyTable.load(file)


def test_what_cannot_be_run_is_refused() -> None:
    supernet = small()
    with pytest.raises(DataError, match="does not generate, so it has no decode"):
        measured(supernet, phase="decode")
    with pytest.raises(DataError, match="length=33 is more than the model has positions for: at most 32"):
        measured(supernet, length=33)
    with pytest.raises(DataError, match="widths=1 must be an integer of at least 2"):
        measured(supernet, widths=1)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM hold no candidate blocks"):
        measured(supernet_of("bert", "lm"))
    path = he.make_elastic(extract(supernet, supernet.space.smallest()))
    with pytest.raises(UnsupportedModelError, match="hold no candidate blocks to choose from"):
        measured(path)


def test_a_check_says_how_far_predictions_are_off() -> None:
    supernet = small()
    table = measured(supernet, FakeTimer(lambda call: sized(call) / 100))
    points = {
        **sampled(supernet, 4),
        "stock": supernet.space.canonical({f"layers.{n}.block": "standard" for n in range(3)}),
    }
    check = check_latency(supernet, table, points, timer=FakeTimer(lambda call: sized(call) / 80))
    assert [row.name for row in check.rows] == list(points)
    assert all(row.predicted == table.predict(supernet, points[row.name]) for row in check.rows)
    assert all(row.error == pytest.approx(-0.2) for row in check.rows)
    assert (check.median_error, check.worst_error, check.shift) == pytest.approx((0.2, 0.2, -0.2))
    lines = str(check).splitlines()
    assert len(lines) == 7 and "-20.0%" in lines[1] and lines[5].startswith("stock ")
    assert "median 20.0%, worst 20.0%, common to all -20.0%" in lines[-1]
    with pytest.raises(DataError, match="at least one architecture"):
        check_latency(supernet, table, {})
    with pytest.raises(CheckpointError, match="interrupted"):
        check_latency(supernet, replace(table, finished=False), points)


def test_tables_of_widths_and_heads_are_checked_alike() -> None:
    supernet = supernet_of("llama", "lm")
    supernet.model.set_attn_implementation("eager")
    table = measure_latency_table(supernet, rounds=3, length=8, timer=FakeTimer(counted))
    assert check_latency(supernet, table, sampled(supernet, 4), timer=FakeTimer(counted)).worst_error < 1e-6


@pytest.mark.parametrize(("family", "phase"), [("elastic_bert", "prefill"), ("elastic_gpt2", "decode")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_table_of_real_forwards_is_finite(family: str, phase: Any, dtype: torch.dtype | None) -> None:
    supernet = grown(family)
    table = he.measure_block_latency_table(supernet, length=8, phase=phase, dtype=dtype, seconds=0.0)
    assert table.finished and table.setting.dtype == ("float32" if dtype is None else "bfloat16")
    assert set(table.fit.blocks) == {kind_of(p.shape_of(b)) for p in supernet.block_parts for b in p.blocks}
    check = he.check_latency(supernet, table, sampled(supernet, 3), seconds=0.0)
    assert all(row.predicted > 0 and row.measured > 0 for row in check.rows)
    assert {p.dtype for p in supernet.model.parameters()} == {torch.float32}
