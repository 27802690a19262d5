"""Latency tables against times made up by a formula, so that nothing depends on a clock, and against real forwards."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timed_tables import FormulaTimer, check_an_interrupted_measurement_goes_on
from tiny_models import supernet_of, tiny

from hf_elastic import CheckpointError, DataError, ElasticConfig, Supernet, make_elastic, objectives
from hf_elastic.checkpoint.extraction import extract, extract_shapes
from hf_elastic.costs import Latency
from hf_elastic.parts import LayerShape
from hf_elastic.search import Objective, search_subnets
from hf_elastic.tables.additive import layer_table
from hf_elastic.tables.latencies import LatencyTable, Sizes, measure_latency_table, shape_in, sizes_of
from hf_elastic.tables.timing import NOISY, Forward, Setting, measure_models, speedup, typical, wall_clock

FAMILIES = ("bert", "distilbert", "llama", "qwen3", "mistral", "gpt2")
Truth = Callable[[Sequence[tuple[int, int]]], float]


def sizes_seen(model: Any) -> list[tuple[int, int]]:
    """Key/value width and FFN width of each layer, read off the shapes of its weights; 0 where there is none."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    found = []
    for layer in layers:
        weights = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.ndim == 2}
        keys = [s[0] for n, s in weights.items() if n.endswith(("k_proj.weight", "key.weight", "k_lin.weight"))]
        keys += [s[1] // 3 for n, s in weights.items() if n.endswith("c_attn.weight")]
        ffn = [
            s[0]
            for n, s in weights.items()
            if n.endswith(("up_proj.weight", "intermediate.dense.weight", "lin1.weight"))
        ]
        ffn += [s[1] for n, s in weights.items() if n.endswith("c_fc.weight")]
        found.append((keys[0] if keys else 0, ffn[0] if ffn else 0))
    return found


def additive(sizes: Sequence[tuple[int, int]]) -> float:
    """Additive and linear; so are the tables of a fair machine."""
    return 0.5 + sum(0.25 * (keys > 0) + 0.01 * keys + 0.125 * (width > 0) + 0.005 * width for keys, width in sizes)


class FakeTimer(FormulaTimer):
    """Seconds by a formula of the sizes of the model that would run; nothing runs."""

    def __init__(self, truth: Truth = additive, **options: Any) -> None:
        super().__init__(lambda call: truth(sizes_seen(call.model)), **options)


def made(family: str = "bert", head: str = "base", **changes: Any) -> Supernet:
    return supernet_of(family, head, **changes)


def measured(supernet: Supernet, timer: FakeTimer | None = None, **options: Any) -> LatencyTable:
    return measure_latency_table(supernet, timer=timer or FakeTimer(), **{"rounds": 3, "seconds": 1e9, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_has_the_class_the_config_and_the_tensors_of_an_extracted_model(family: str) -> None:
    supernet = made(family, "lm")
    rng = random.Random(1)
    for _ in range(6):
        point = supernet.space.sample(rng)
        form = None if supernet.loadability(point) == "stock" else "remote-code"
        wanted, got = extract(supernet, point, loadability=form), extract_shapes(supernet, supernet.layer_shapes(point))
        assert type(got) is type(wanted)
        assert got.config.to_dict() == wanted.config.to_dict()
        shapes = {name: (t.shape, t.stride(), t.dtype) for name, t in wanted.state_dict().items()}
        assert {name: (t.shape, t.stride(), t.dtype) for name, t in got.state_dict().items()} == shapes


def test_a_shape_takes_no_memory_of_its_own() -> None:
    supernet = made("llama", "lm")
    shapes = [LayerShape(16, 2, 1), LayerShape(24, 4, 2, attention=False), LayerShape(48, 2, 1, mlp=False)]
    ours = {t.untyped_storage().data_ptr() for t in supernet.model.state_dict().values()}
    got = extract_shapes(supernet, shapes)
    assert {p.untyped_storage().data_ptr() for p in got.parameters()} <= ours
    assert supernet.active == supernet.space.largest()


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_exact_where_the_true_cost_is_additive_and_linear(family: str) -> None:
    supernet = made(family)
    table = measured(supernet)
    assert table.fit.misfit < 1e-12
    for point in itertools.islice(supernet.space.architectures(), 0, None, 97):
        shapes = supernet.layer_shapes(point)
        true = additive(sizes_seen(extract_shapes(supernet, shapes)))
        if any(not shape.skipped for shape in shapes):  # without layers, an empty one stays
            assert table.predict(supernet, point) == pytest.approx(true, rel=1e-9)
    assert table.speedup(supernet, supernet.space.largest()) == pytest.approx(1.0)


def test_layers_of_two_kinds_of_attention_have_times_of_their_own() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny("qwen2", "lm", layer_types=kinds, use_sliding_window=True, sliding_window=5)
    supernet = make_elastic(
        model, ElasticConfig(intermediate_size=[16, 1.0], num_key_value_heads=[1, 2], skip=["layer"])
    )

    def truth(model: Any) -> float:
        types = model.config.layer_types
        pairs = zip(sizes_seen(model), types, strict=True)
        return 0.5 + sum(0.01 * w * (1 + (t == "full_attention")) + 0.02 * k for (k, w), t in pairs)

    table = measure_latency_table(supernet, rounds=3, seconds=1e9, timer=lambda call: truth(call.model))
    assert table.kinds == (0, 1, 0)
    rng = random.Random(0)
    for point in (supernet.space.sample(rng) for _ in range(20)):
        shapes = supernet.layer_shapes(point)
        if any(not shape.skipped for shape in shapes):
            true = truth(extract_shapes(supernet, shapes))
            assert table.predict(supernet, point) == pytest.approx(true, rel=1e-9)


def test_noise_of_every_time_is_not_multiplied_by_the_number_of_layers() -> None:
    model = tiny("bert", "base", num_hidden_layers=12)
    config = ElasticConfig(intermediate_size=[8, 16, 32, 48], num_attention_heads=[1, 2, 4], skip=["attention", "mlp"])
    supernet, rng, errors = make_elastic(model, config), random.Random(0), []
    table = measured(supernet, FakeTimer(noise=0.03), rounds=15)
    for point in (supernet.space.sample(rng) for _ in range(30)):
        true = additive(sizes_seen(extract_shapes(supernet, supernet.layer_shapes(point))))
        largest = additive(sizes_seen(supernet.model))
        errors.append(table.speedup(supernet, point) * true / largest - 1)
    assert max(map(abs, errors)) < 0.03


def test_a_cost_that_is_not_additive_shows_in_the_misfit() -> None:
    table = measured(made(), FakeTimer(lambda sizes: additive(sizes) ** 2))
    assert table.fit.misfit > 0.02
    assert "within" in str(table)


def test_widths_beyond_the_measured_ones_are_interpolated() -> None:
    model = tiny("llama", "lm")
    config = ElasticConfig(intermediate_size=list(range(4, 49, 4)), skip=["mlp"])
    supernet = make_elastic(model, config)
    table = measured(supernet, sizes=3)
    assert sorted({v.mlp for v in table.variants if v.mlp}) == [4, 24, 48]
    point = supernet.space.canonical({**supernet.space.largest(), "layers.1.intermediate_size": 32})
    assert table.predict(supernet, point) == pytest.approx(additive([(16, 48), (16, 32), (16, 48)]))


def test_sizes_outside_the_table_are_refused() -> None:
    small = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[24, 48]))
    wide = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[12, 48], skip=["mlp"]))
    table = measured(small)
    with pytest.raises(DataError, match=r"no FFN of size 12, only \[24, 48\]; measure it"):
        table.predict(wide, wide.space.canonical({**wide.space.largest(), "layers.0.intermediate_size": 12}))
    with pytest.raises(DataError, match="no FFN of size 0"):
        objectives.predicted_latency(wide, table)


def test_a_space_of_stock_checkpoints_needs_no_static_class() -> None:
    class Own(type(tiny("bert", "base"))):  # type: ignore[misc]
        pass

    parent = Own(tiny("bert", "base").config).eval()
    stock = make_elastic(parent, ElasticConfig(intermediate_size=[24, 48], skip=["layer"], loadability="stock"))
    table = measured(stock)
    for depth in (1, 2, 3):
        values = {**stock.space.largest(), "intermediate_size": 24}
        values |= {name: "layer" for name in [n for n in values if n.endswith("skip")][depth - 1 :]}
        point = stock.space.canonical(values)
        assert table.predict(stock, point) == pytest.approx(additive([(32, 24)] * depth))


def test_rounds_are_in_alternating_order_and_short_forwards_run_twice() -> None:
    order: list[tuple[int, int]] = []

    def timer(call: Any) -> float:
        order.append(sizes_seen(call.model)[0])
        return 0.05

    supernet = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[24, 48]))
    table = measure_latency_table(supernet, rounds=3, timer=timer)
    count = len(table.variants)
    assert len(order) == count * (1 + 3 * 2)
    rounds = [order[count + 2 * count * i : count + 2 * count * (i + 1)] for i in range(3)]
    assert rounds[0] == rounds[1][::-1] == rounds[2]
    assert table.spent == pytest.approx(0.05 * len(order))


def test_measuring_ends_when_the_time_is_spent_but_not_before_three_rounds() -> None:
    supernet = made()
    assert len(measured(supernet, rounds=15, seconds=0.0).rounds) == 3
    one = measured(supernet, rounds=15, seconds=0.0).spent / 4  # with the round that warms up
    assert len(measured(supernet, rounds=15, seconds=6.5 * one).rounds) == 6
    assert len(measured(supernet, rounds=15).rounds) == 15


def test_measuring_goes_on_up_to_three_times_as_long_where_the_machine_is_noisy() -> None:
    supernet = made()
    one = measured(supernet, rounds=15, seconds=0.0).spent / 4

    def noisy(share: float) -> LatencyTable:
        return measured(supernet, FakeTimer(noise=share), rounds=100, seconds=8 * one)

    calm, wild = noisy(0.03), noisy(0.5)
    assert calm.noise < NOISY and 8 * one <= calm.spent <= 9.5 * one
    assert wild.noise > NOISY and 24 * one <= wild.spent <= 26 * one and wild.finished


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    supernet = made("gpt2", "lm")
    table = measured(supernet, phase="decode", batch_size=2, length=7)
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == table
    point = supernet.space.midpoint()
    assert again.predict(supernet, point) == table.predict(supernet, point)


def test_an_interrupted_measurement_goes_on_with_the_rest_only(tmp_path: Path) -> None:
    check_an_interrupted_measurement_goes_on(
        measured, FakeTimer, made(), file=tmp_path / "table.json", call="measure_latency_table"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 2}, "batch_size 1 and not 2"),
        ({"length": 9}, "length 62 and not 9|length 64 and not 9"),
        ({"dtype": torch.bfloat16}, "dtype 'float32' and not 'bfloat16'"),
        ({"sizes": 2}, "another model or space"),
    ],
)
def test_a_file_of_another_setting_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    supernet, file = (
        make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[8, 24, 48])),
        tmp_path / "t.json",
    )
    measured(supernet, path=file)
    with pytest.raises(CheckpointError, match=words) as error:
        measured(supernet, path=file, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("device", "cpu of old"), ("threads", 64), ("software", "torch 0.1")])
def test_a_file_of_another_machine_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    supernet, file = made(), tmp_path / "t.json"
    table = measured(supernet)
    replace(table, setting=replace(table.setting, **{name: value})).save(file)
    with pytest.raises(CheckpointError, match=f"was measured with {name} '?{value}'? and not") as error:
        measured(supernet, path=file)
    assert "\n" not in str(error.value)


def test_a_table_of_another_model_is_refused_but_not_one_of_other_weights(tmp_path: Path) -> None:
    supernet, file = made(), tmp_path / "t.json"
    table = measured(supernet, path=file)
    assert table.predict(supernet_of("bert", "base", seed=5), supernet.space.largest()) > 0
    with pytest.raises(CheckpointError, match="measured on another model than this BertForMaskedLM"):
        table.predict(made("bert", "lm"), supernet.space.largest())
    with pytest.raises(CheckpointError, match="another model or space"):
        measured(made("bert", "lm"), path=file)


@pytest.mark.parametrize(
    "broken",
    [
        {"format": 2}, {"rounds": [[1.0]]}, {"rounds": []}, {"kinds": [0, 0, 3]}, {"variants": [[0, 1]]},
        {"spent": "x"}, {"setting": {}}, {"finished": 1}, {"whole": 3}, {"variants": [[0, 4, 48]]},
    ],
)  # fmt: skip
def test_a_file_that_holds_no_table_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    measured(made(), path=file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    with pytest.raises(CheckpointError, match="holds no latency table of format 1; delete it"):
        LatencyTable.load(file)


def test_what_cannot_be_run_is_refused() -> None:
    bert, llama = made(), made("llama", "lm")
    with pytest.raises(DataError, match="BertModel does not generate, so it has no decode"):
        measured(bert, phase="decode")
    with pytest.raises(DataError, match="phase='both' is not one of prefill, decode"):
        measured(bert, phase="both")
    with pytest.raises(DataError, match="length=65 is more than the model has positions for: at most 64"):
        measured(bert, length=65)
    with pytest.raises(DataError, match="length=64 is more than the model has positions for: at most 63"):
        measured(llama, phase="decode", length=64)
    with pytest.raises(DataError, match="at most 62"):
        measured(made("roberta"), length=63)
    with pytest.raises(DataError, match="batch_size=0 must be"):
        measured(bert, batch_size=0)
    with pytest.raises(DataError, match="length=0 must be"):
        measured(bert, length=0)
    with pytest.raises(DataError, match="sizes=1 must be"):
        measured(bert, sizes=1)


def test_the_objective_is_a_sum_of_whole_nanoseconds_that_says_what_predict_says() -> None:
    supernet = made("llama", "lm")
    table = measured(supernet, FakeTimer(lambda sizes: 1e-3 * additive(sizes) / 3))
    objective = objectives.predicted_latency(supernet, table)
    assert objective.additive is not None and objective.cost and objective.unit == "ns"
    rng = random.Random(0)
    for point in (supernet.space.sample(rng) for _ in range(50)):
        value = objective(point)
        assert value == objective.additive.value(point) and value == int(value)
        assert value == pytest.approx(1e9 * table.predict(supernet, point), abs=2.0)  # 3 layers, constant: 4 · 0.5


def test_exact_search_within_a_latency_finds_what_brute_force_finds() -> None:
    supernet = supernet_of("llama", "lm", num_hidden_layers=None, skip=["mlp"])
    table = measured(supernet)
    latency = objectives.predicted_latency(supernet, table)
    rng = random.Random(3)
    worth = {(p.index, s.intermediate_size * s.mlp, s.num_attention_heads): float(rng.randrange(1000))
             for p in supernet.layer_parts for s in {p.shape(a) for a in supernet.space.architectures()}}  # fmt: skip

    def loss(part: Any, shape: LayerShape) -> float:
        return worth[part.index, shape.intermediate_size * shape.mlp, shape.num_attention_heads]

    def total(point: Any) -> float:
        return sum(
            loss(part, shape) for part, shape in zip(supernet.layer_parts, supernet.layer_shapes(point), strict=True)
        )

    goal = Objective("loss", total, related=lambda: {latency.name: latency}, additive=layer_table(supernet, loss))
    bound = round(1e9 * table.parent / 1.25)
    found = search_subnets(supernet.space, [goal], algorithm="exact", within={latency.name: bound}, progress=False)
    best = min(total(a) for a in supernet.space.architectures() if latency(a) <= bound)
    assert found.best("loss").values["loss"] == best
    assert latency(found.best("loss").architecture) <= bound


@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2"))
def test_decode_runs_one_token_against_a_cache_of_the_stated_length(family: str) -> None:
    supernet = made(family, "lm")
    setting = Setting.of(supernet, batch_size=2, length=11, phase="decode")
    model = extract_shapes(supernet, [part.full for part in supernet.layer_parts])
    forward = Forward(model, setting)
    with torch.inference_mode():
        cache = model(torch.full((2, 11), 5), use_cache=True).past_key_values
        wanted = model(torch.full((2, 1), 5), past_key_values=cache, use_cache=True)
    for _ in range(3):  # each starts from the same cache
        got: Any = forward()
        assert got.logits.shape == (2, 1, 61)
        pairs = zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True)
        assert all(a.keys.shape == b.keys.shape and a.get_seq_length() == b.get_seq_length() for a, b in pairs)


def test_prefill_of_a_model_that_generates_gives_the_last_logits_only() -> None:
    supernet = made("llama", "lm")
    got: Any = Forward(supernet.model, Setting.of(supernet, batch_size=2, length=9))()
    assert got.logits.shape == (2, 1, 61)
    encoder = made("bert", "lm")
    assert Forward(encoder.model, Setting.of(encoder, batch_size=2, length=9))().logits.shape == (2, 9, 61)  # type: ignore[attr-defined]
    choice = made("bert", "choice", skip=["layer"])
    assert Forward(choice.model, Setting.of(choice, batch_size=2, length=9))().logits.shape == (2, 1)  # type: ignore[attr-defined]


def test_models_are_measured_against_each_other() -> None:
    supernet = made("gpt2", "lm")
    models = {
        "parent": extract(supernet, supernet.space.largest()),
        "small": extract(supernet, supernet.space.smallest()),
    }
    setting = Setting.of(supernet, length=8)
    found = measure_models(models, setting, rounds=4, timer=FakeTimer())
    assert [len(latency.samples) for latency in found.values()] == [4, 4]
    ratio = additive(sizes_seen(models["parent"])) / additive(sizes_seen(models["small"]))
    assert speedup(found["parent"], found["small"]) == pytest.approx(ratio)
    with pytest.raises(CheckpointError, match="does not fit parent: it says dtype 'float16' and not 'float32'"):
        measure_models(models, replace(setting, dtype="float16"))


def test_what_is_typical_leaves_interruptions_out() -> None:
    assert typical([3.0, 1.0, 100.0, 2.0, 50.0]) == 2.0
    assert typical([7.0]) == 7.0
    assert speedup(Latency(4.0, (4.0, 4.0, 40.0)), Latency(2.0, (2.0, 20.0, 2.0))) == 2.0


@pytest.mark.parametrize(("family", "phase"), [("bert", "prefill"), ("llama", "prefill"), ("gpt2", "decode")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_table_of_real_forwards_is_finite(family: str, phase: Any, dtype: torch.dtype | None) -> None:
    supernet = made(family, "lm")
    table = measure_latency_table(supernet, length=8, phase=phase, dtype=dtype, seconds=0.0)
    assert table.finished and table.parent > 0
    assert table.setting.dtype == ("float32" if dtype is None else "bfloat16")
    assert {p.dtype for p in supernet.model.parameters()} == {torch.float32}


def test_sizes_say_which_shape_a_layer_has() -> None:
    part = made("llama", "lm").layer_parts[0]
    for sizes, shape in {
        Sizes(1, 16): LayerShape(16, 2, 1),
        Sizes(0, 16): LayerShape(16, 4, 2, attention=False),
        Sizes(1, 0): LayerShape(48, 2, 1, mlp=False),
    }.items():
        assert shape_in(part, sizes) == shape
        assert sizes_of(shape) == sizes
    assert shape_in(part, Sizes(0, 0)).skipped


def test_the_clock_waits_for_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, asked = made("bert", "lm"), []
    monkeypatch.setattr("hf_elastic.tables.timing.synchronise", asked.append)
    wall_clock(Forward(supernet.model, Setting.of(supernet, length=8)))
    wall_clock(lambda: None)
    assert asked == [supernet.model.device] * 2 + [None] * 2


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", "x"), ("length", float("nan")), ("threads", None), ("dtype", 3), ("device", [])]
)
def test_a_file_whose_setting_is_none_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    measured(made(), path=tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    data["setting"][name] = value
    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="holds no latency table"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_file_whose_spent_seconds_are_no_number_is_refused(tmp_path: Path) -> None:
    measured(made(), path=tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**data, "spent": float("nan")}))
    with pytest.raises(CheckpointError, match="holds no latency table"):
        LatencyTable.load(tmp_path / "table.json")
