"""The handle: activation, regions, loadability, saving and restoring, and torch.compile around all of it."""

from __future__ import annotations

import copy
import itertools
import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    DECODERS,
    GROUPED,
    class_of,
    disk_full_at,
    inputs,
    outputs,
    space,
    supernet_of,
    tiny,
    tokenizer,
)
from transformers import BertForMaskedLM, OPTConfig, OPTForCausalLM

from hf_elastic import (
    FAMILIES,
    ActivationError,
    ArchitectureError,
    CheckpointError,
    ElasticConfig,
    ElasticError,
    ElasticLoraConfig,
    Family,
    SearchSpace,
    Skip,
    Supernet,
    UnsupportedModelError,
    add_lora,
    costs,
    make_elastic,
    set_layer_order,
)
from hf_elastic.parts import LayerShape
from hf_elastic.supernet import shapes_loadability

ROWS = {row.model_type: row for row in FAMILIES}


# -- activation -------------------------------------------------------------------------------------------------------


def test_a_dict_of_the_choices_in_effect_is_enough_to_activate() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(intermediate_size={0: [16]}, skip={0: ["mlp"]}))
    with supernet.activate({"layers.0.skip": "mlp"}):
        assert dict(supernet.active) == {"layers.0.skip": "mlp", "layers.0.intermediate_size": 16}
    with supernet.activate({"layers.0.skip": "none", "layers.0.intermediate_size": 16}) as handle:
        assert handle is supernet and supernet.measured(**inputs(supernet.model))["layers.0.intermediate_size"] == 16


FOREIGN: dict[str, tuple[Callable[[Supernet], Any], str]] = {
    "of another space": (
        lambda s: supernet_of("llama").space.largest(),
        "has no choice 'layers.0.num_key_value_heads'",
    ),
    "another value": (
        lambda s: {**s.space.largest(), "layers.0.intermediate_size": 17},
        "'layers.0.intermediate_size' cannot be 17; allowed: 16, 24, 48",
    ),
    "missing": (lambda s: {"num_hidden_layers": 3}, "no value for 'layers.0.skip'"),
    "bool": (lambda s: {**s.space.largest(), "layers.0.num_attention_heads": True}, "cannot be True"),
    "nothing": (lambda s: None, "a NoneType is no architecture"),
    "text": (lambda s: "largest", "a str is no architecture"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_point_of_the_space_is_refused_and_nothing_changes(
    make: Callable[[Supernet], Any], message: str
) -> None:
    supernet = supernet_of("bert")
    middle = supernet.space.midpoint()
    supernet.set_active(middle)
    for use in (supernet.set_active, lambda a: supernet.activate(a).__enter__()):
        with pytest.raises(ArchitectureError, match=message) as caught:
            use(make(supernet))
        assert "\n" not in str(caught.value)
    assert supernet.active == middle and supernet.measured(**inputs(supernet.model)) == supernet.expected(middle)


def test_costs_sizes_and_loadability_of_a_foreign_architecture_are_refused() -> None:
    supernet, foreign = supernet_of("gpt2"), supernet_of("bert", intermediate_size=[8]).space.smallest()
    asked: list[Callable[[], object]] = [
        lambda: supernet.loadability(foreign),
        lambda: supernet.expected(foreign),
        lambda: supernet.layer_shapes(foreign),
        lambda: costs.parameters(supernet, foreign),
        lambda: costs.total_parameters(supernet, foreign),
        lambda: costs.macs(supernet, foreign, seq_len=8),
        lambda: costs.kv_cache_bytes(supernet, foreign, seq_len=8),
    ]
    for ask in asked:
        with pytest.raises(ArchitectureError, match="'layers.0.intermediate_size' cannot be 8; allowed: 16, 24, 48"):
            ask()


def test_handles_on_one_model_share_what_is_active() -> None:
    supernet = supernet_of("llama")
    other = Supernet(supernet.model)
    small = supernet.space.smallest()
    with supernet.activate(small):
        assert other.active == small and Supernet(supernet.model).active == small
    assert other.active == other.space.largest() and other.space == supernet.space


def test_a_new_handle_runs_nothing_and_changes_nothing() -> None:
    supernet = supernet_of("bert")
    supernet.set_active(supernet.space.smallest())
    calls: list[str] = []
    supernet.model.register_forward_pre_hook(lambda *args: calls.append("ran"))
    twin = Supernet(supernet.model)
    assert (twin.active, twin.layer_order, twin.family.model_type) == (supernet.active, (0, 2, 1), "bert")
    assert repr(twin) == repr(supernet) and not calls


def test_an_architecture_that_fails_inside_a_block_leaves_the_outer_one() -> None:
    supernet = supernet_of("bert")
    middle = supernet.space.midpoint()
    with supernet.activate(middle):
        with pytest.raises(ArchitectureError), supernet.activate({"nonsense": 1}):
            pass
        assert supernet.active == middle


def test_an_order_of_layers_set_inside_a_block_leaves_a_point_of_the_new_space() -> None:
    supernet = supernet_of("bert")
    shallow = supernet.space.canonical({**supernet.space.midpoint(), "num_hidden_layers": 2})
    with supernet.activate({**shallow, "layers.0.intermediate_size": 16}):
        set_layer_order(supernet, [1, 2, 0])
    with supernet.activate({**shallow, "layers.0.intermediate_size": 16}):
        with supernet.activate(supernet.space.largest()):
            set_layer_order(supernet, [0, 1, 2])
        assert supernet.active in supernet.space
        assert supernet.measured(**inputs(supernet.model)) == supernet.expected(supernet.active)
    assert supernet.active == supernet.space.largest()


def test_an_order_set_by_one_handle_is_the_space_of_all() -> None:
    supernet = supernet_of("bert")
    other = Supernet(supernet.model)
    set_layer_order(supernet, [1, 2, 0])
    assert other.space is supernet.space and other.layer_order == (1, 2, 0)
    small = other.space.smallest()
    with other.activate(small):
        assert supernet.active == small and other.measured(**inputs(other.model)) == other.expected(small)
    with other.activate(other.space.midpoint()):
        set_layer_order(supernet, [2, 0, 1])
    assert other.active == other.space.largest() == supernet.active


def in_a_thread(work: Callable[[], Any]) -> Exception | None:
    caught: list[Exception] = []

    def run() -> None:
        try:
            work()
        except ActivationError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_threads_may_take_turns_but_not_interfere() -> None:
    supernet = supernet_of("bert")
    small = supernet.space.smallest()

    def use() -> None:
        with Supernet(supernet.model).activate(small), supernet.activate(supernet.space.midpoint()):
            pass

    use()
    assert in_a_thread(use) is None  # nothing was open
    with supernet.activate(supernet.space.midpoint()):
        assert "used from a second thread" in str(in_a_thread(use))
        assert "used from a second thread" in str(in_a_thread(lambda: supernet.set_active(small)))
        assert supernet.active == supernet.space.midpoint()
        supernet.set_active(small)  # undone at the end of the block
    assert supernet.active == supernet.space.largest() and in_a_thread(use) is None


def test_what_a_thread_made_active_for_good_is_its_own_as_long_as_it_lives() -> None:
    supernet = supernet_of("bert")
    small = supernet.space.smallest()
    assert in_a_thread(lambda: supernet.set_active(small)) is None
    assert supernet.active == small
    supernet.set_active(supernet.space.largest())  # that thread is dead, this one lives
    with supernet.activate(small):
        pass
    assert in_a_thread(lambda: supernet.set_active(small)) is not None
    twin = Supernet(copy.deepcopy(supernet.model))
    assert in_a_thread(lambda: twin.set_active(small)) is None


def test_a_refused_architecture_leaves_the_supernet_to_other_threads() -> None:
    supernet = supernet_of("bert")
    with pytest.raises(ArchitectureError), supernet.activate({"nonsense": 1}):
        pass
    with pytest.raises(ArchitectureError):
        supernet.set_active({"nonsense": 1})
    assert in_a_thread(lambda: supernet.set_active(supernet.space.smallest())) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_subnets_are_close_to_float32_ones(family: str) -> None:
    exact, half = supernet_of(family), make_elastic(tiny(family).to(torch.bfloat16), space(family))
    for point in (exact.space.largest(), exact.space.midpoint(), exact.space.smallest()):
        got = outputs(half, point)
        assert got.dtype == torch.bfloat16
        wanted = outputs(exact, point)
        assert (got.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_compiled_model_follows_what_is_active(family: str) -> None:
    supernet, plain = supernet_of(family), supernet_of(family)
    compiled = torch.compile(supernet.model, backend="eager")
    feed, search = inputs(supernet.model), supernet.space
    for point in (search.largest(), search.sample(random.Random(0)), search.smallest(), search.largest()):
        with supernet.activate(point), torch.no_grad():
            torch.testing.assert_close(compiled(**feed)[0], outputs(plain, point, **feed), rtol=1e-4, atol=1e-5)


# -- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_regions_are_those_entries_whose_change_moves_the_output(family: str) -> None:
    """Oracle: noise on everything outside the regions moves no output, noise inside a region does."""
    supernet, rng = supernet_of(family), random.Random(1)
    feed = inputs(supernet.model)
    for point in (supernet.space.smallest(), supernet.space.sample(rng), supernet.space.sample(rng)):
        wanted = outputs(supernet, point, **feed)
        with supernet.activate(point):
            regions = supernet.active_regions()
        state = copy.deepcopy(supernet.model.state_dict())
        parameters = dict(supernet.model.named_parameters())
        with torch.no_grad():
            for name, region in regions.items():
                kept = [parameters[name][box].clone() for box in region]
                parameters[name].normal_()
                for box, values in zip(region, kept, strict=True):
                    parameters[name][box] = values
        assert torch.equal(outputs(supernet, point, **feed), wanted)
        inside = next(((n, r) for n, r in regions.items() if r and n.endswith("weight")), None)
        assert inside or all(shape.skipped for shape in supernet.layer_shapes(point))
        if inside:
            with torch.no_grad():
                parameters[inside[0]][inside[1][-1]] += 1
            assert not torch.equal(outputs(supernet, point, **feed), wanted)
        supernet.model.load_state_dict(state)


def test_a_parameter_that_is_always_whole_has_no_region() -> None:
    supernet = supernet_of("bert")
    assert not any(name.startswith(("bert.embeddings", "cls.")) for name in supernet.active_regions())
    assert all(name.endswith(("weight", "bias")) and ".layer." in name for name in supernet.active_regions())


# -- loadability ------------------------------------------------------------------------------------------------------

FULL = LayerShape(48, 4, 4)
NARROW, ONE_HEAD = replace(FULL, intermediate_size=16), replace(FULL, num_attention_heads=1, num_key_value_heads=1)
THREE_HEADS = replace(FULL, num_attention_heads=3, num_key_value_heads=3)
NO_FFN, GONE = replace(FULL, mlp=False), replace(FULL, attention=False, mlp=False)


@pytest.mark.parametrize(
    ("family", "shapes", "wanted"),
    [
        *[(f, (FULL, FULL), "stock") for f in CONFIGS],
        *[(f, (NARROW, NARROW), "stock") for f in CONFIGS],
        *[(f, (NARROW, GONE), "stock") for f in CONFIGS],
        *[(f, (FULL, NARROW), "stock-padded") for f in CONFIGS],
        *[(f, (NO_FFN, FULL), "stock-padded" if f in DECODERS else "remote-code") for f in CONFIGS],
        *[(f, (ONE_HEAD, ONE_HEAD), "stock" if f in GROUPED else "stock-padded") for f in CONFIGS],
        *[(f, (THREE_HEADS,), "stock" if f == "qwen3" else "stock-padded") for f in CONFIGS],
        *[(f, (ONE_HEAD, FULL), "stock-padded") for f in CONFIGS],
        *[(f, (GONE, GONE), "remote-code") for f in CONFIGS],
    ],
)
def test_loadability_is_what_a_stock_config_can_say(family: str, shapes: tuple[LayerShape, ...], wanted: str) -> None:
    assert shapes_loadability(shapes, ROWS[family], hidden_size=32, parent=FULL) == wanted


# -- saving and restoring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_supernet_is_restored_bit_equal(family: str, tmp_path: Path) -> None:
    supernet = supernet_of(family)
    set_layer_order(supernet, [2, 0, 1])
    supernet.set_active(supernet.space.smallest())
    supernet.save_pretrained(tmp_path / "saved")
    assert supernet.active == supernet.space.smallest()
    again = Supernet.from_pretrained(tmp_path / "saved")
    assert again.space == supernet.space and again.layer_order == (2, 0, 1) and again.active == again.space.largest()
    state = again.model.state_dict()
    assert {n: t.dtype for n, t in supernet.model.state_dict().items()} == {n: t.dtype for n, t in state.items()}
    assert all(torch.equal(t, state[n]) for n, t in supernet.model.state_dict().items())
    for point in itertools.islice(supernet.space.architectures(), 3):
        assert torch.equal(outputs(again, point), outputs(supernet, point))


def test_a_saved_supernet_is_a_stock_checkpoint(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    with supernet.activate(supernet.space.smallest()):
        supernet.save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model))[0], outputs(supernet, supernet.space.largest()))
    record = json.loads((tmp_path / "search_space.json").read_text())
    assert record["class"] == "BertForMaskedLM" and record["family"] is None and "active" not in record


def test_bfloat16_and_options_survive(tmp_path: Path) -> None:
    supernet = make_elastic(tiny("llama").to(torch.bfloat16), space("llama"))
    supernet.save_pretrained(tmp_path)
    again = Supernet.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.model.dtype == torch.bfloat16 and again.model.config._attn_implementation == "eager"
    assert Supernet.from_pretrained(tmp_path, dtype=torch.float32).model.dtype == torch.float32


def test_pickles_are_not_read_on_demand_either(tmp_path: Path) -> None:
    make_elastic(tiny("llama"), space("llama")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_safetensors=False would read pickles"):
        Supernet.from_pretrained(tmp_path, use_safetensors=False)


def test_everything_a_config_can_say_is_restored(tmp_path: Path) -> None:
    config = ElasticConfig(
        intermediate_size={0: [16], 2: [0.5]}, num_attention_heads=range(1, 3), skip={1: ["mlp"], 2: ["layer"]},
        num_hidden_layers=[0.4], multiple_of=8, loadability="any",
    )  # fmt: skip
    supernet = make_elastic(tiny("roberta", "sequence"), config)
    supernet.save_pretrained(tmp_path)
    assert Supernet.from_pretrained(tmp_path).space == supernet.space


OPT = Family(
    model_type="opt", layers="decoder.layers", ffn_in=("fc1",), ffn_out="fc2", query="self_attn.q_proj",
    key="self_attn.k_proj", value="self_attn.v_proj", attention_out="self_attn.out_proj", attention="self_attn",
    head_size="head_dim", attributes={"num_heads": "heads"}, pre_norm=True, causal=True,
    skip_attention=(Skip("self_attn_layer_norm", "input"), Skip("self_attn", "zero", outputs=2)),
    skip_mlp=(*(Skip(name, "input") for name in ("final_layer_norm", "fc1", "activation_fn")), Skip("fc2", "zero")),
    config_names={"intermediate_size": "ffn_dim"},
)  # fmt: skip


def opt_supernet() -> Supernet:
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
                       max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    elastic = ElasticConfig(intermediate_size=[16], num_attention_heads=[1, 2], num_hidden_layers=[1])
    return make_elastic(OPTForCausalLM(config).eval(), elastic, family=OPT)


def test_a_supernet_with_a_users_family_row_is_restored_with_that_row(tmp_path: Path) -> None:
    supernet = opt_supernet()
    supernet.save_pretrained(tmp_path)
    again = Supernet.from_pretrained(tmp_path)
    assert again.family == OPT and again.space == supernet.space
    small = supernet.space.smallest()
    assert torch.equal(outputs(again, small), outputs(supernet, small))


class OwnModel(BertForMaskedLM):
    """A model class that transformers does not know."""


def test_a_model_of_a_users_class_is_restored_by_naming_the_class(tmp_path: Path) -> None:
    model = OwnModel(tiny("bert").config)
    make_elastic(model, ElasticConfig(intermediate_size=[16])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'OwnModel', which is no model of transformers; pass model_class="):
        Supernet.from_pretrained(tmp_path)
    assert type(Supernet.from_pretrained(tmp_path, model_class=OwnModel).model) is OwnModel


def test_a_handle_without_elastic_layers_says_that_it_cannot_be_saved(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    del supernet.model.__dict__["_hf_elastic_config"]
    with pytest.raises(CheckpointError, match="holds no ElasticConfig.*save the supernet that make_elastic returned"):
        supernet.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_restored_supernet_knows_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("bert").save_pretrained(tmp_path / "parent")
    monkeypatch.chdir(tmp_path)
    supernet = make_elastic(BertForMaskedLM.from_pretrained("parent"), space("bert"))
    supernet.save_pretrained("saved")
    assert json.loads((tmp_path / "saved" / "search_space.json").read_text())["parent"] == str(tmp_path / "parent")
    again = Supernet.from_pretrained("saved")
    assert again.model.config._name_or_path == str(tmp_path / "parent")
    again.save_pretrained("twice")
    assert Supernet.from_pretrained("twice").model.config._name_or_path == str(tmp_path / "parent")
    (tmp_path / "parent").rename(tmp_path / "moved")
    assert Supernet.from_pretrained("saved").model.config._name_or_path == "saved"


def test_a_restored_supernet_knows_the_hub_name_of_its_parent(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    supernet.model.config._name_or_path = "someone/parent"
    supernet.save_pretrained(tmp_path)
    assert Supernet.from_pretrained(tmp_path).model.config._name_or_path == "someone/parent"
    tokenizer().save_pretrained(tmp_path)
    assert Supernet.from_pretrained(tmp_path).model.config._name_or_path == str(tmp_path)


def test_a_generation_config_that_transformers_refuses_leaves_nothing(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    supernet.model.generation_config.temperature = 0.5
    supernet.model.generation_config.do_sample = False
    with pytest.raises(CheckpointError, match="does not write this generation config.*temperature") as caught:
        supernet.save_pretrained(tmp_path / "saved")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "search_space.json"
    record = json.loads(file.read_text())
    for name, value in changes.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    file.write_text(json.dumps(record))


def truncate(folder: Path, name: str = "model.safetensors", *, by: int = 10) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-by])


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def foreign_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 4}))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (
        lambda f: (f / "search_space.json").unlink(),
        "is no saved supernet, it has no search_space.json; write one with",
    ),
    "no folder": (lambda f: f.rename(f.parent / "gone"), "is no saved supernet"),
    "truncated record": (lambda f: truncate(f, "search_space.json"), "search_space.json is no JSON file"),
    "record is a list": (lambda f: (f / "search_space.json").write_text("[]"), "holds a JSON list, expected an object"),
    "binary record": (
        lambda f: (f / "search_space.json").write_bytes(b"\xff\xfe\x00"),
        "search_space.json is no JSON file",
    ),
    "other format": (lambda f: edit(f, format=99), "has format 99, this version reads 1"),
    "no weights listed": (lambda f: edit(f, weights={}), "nothing usable about weights"),
    "weights of another type": (lambda f: edit(f, weights=[1]), "nothing usable about weights"),
    "no class": (lambda f: edit(f, **{"class": None}), "nothing usable about class"),
    "foreign class": (
        lambda f: edit(f, **{"class": "BertTokenizer"}),
        "'BertTokenizer', which is no model of transformers",
    ),
    "foreign config field": (
        lambda f: edit(f, elastic_config={"width": [1]}),
        r"unknown ElasticConfig fields \['width'\]",
    ),
    "config of another space": (
        lambda f: edit(f, elastic_config={"intermediate_size": [8]}),
        "was made for another space",
    ),
    "foreign order": (lambda f: edit(f, layer_order=[0, 1, 7]), r"layer_order=\[0, 1, 7\]"),
    "foreign row": (lambda f: edit(f, family={"model_type": "bert"}), "not a family row"),
    "truncated weights": (truncate, "model.safetensors is truncated or is not the file this supernet was saved with"),
    "foreign weights": (other_weights, "model.safetensors is truncated or is not the file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot read .*model.safetensors: No such file"),
    "weights elsewhere": (
        lambda f: edit(f, weights={"../model.safetensors": "0"}),
        "model.safetensors is truncated or is not",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json, so its weights are of no model"),
    "truncated config": (lambda f: truncate(f, "config.json"), "config.json is no JSON file"),
    "config of another model": (foreign_config, "do not fit its config.json .16 tensors, e.g. bert.encoder.layer.3"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_folder_is_refused_by_name(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    supernet_of("bert").save_pretrained(folder)
    damage(folder)
    with pytest.raises(ElasticError, match=message) as caught:
        Supernet.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_full_disk_leaves_no_half_written_supernet_and_keeps_the_old_one(size: int, tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    with disk_full_at(size), pytest.raises(CheckpointError, match="cannot write") as caught:
        supernet.save_pretrained(tmp_path / "new" / "deep")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    supernet.save_pretrained(tmp_path / "old")
    before = {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()}
    with disk_full_at(size), pytest.raises(CheckpointError, match="cannot write"):
        supernet.save_pretrained(tmp_path / "old", overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_holds_something_is_overwritten_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    supernet = supernet_of("bert")
    with pytest.raises(CheckpointError, match="is not empty; give another folder or overwrite=True"):
        supernet.save_pretrained(tmp_path)
    assert (tmp_path / "precious").read_text() == "data"
    supernet.save_pretrained(tmp_path, overwrite=True)
    assert Supernet.from_pretrained(tmp_path).space == supernet.space and not (tmp_path / "precious").exists()


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["base", "lm", "sequence", "token", "qa", "choice"])
def test_printing_shows_size_costs_latency_and_loadability_of_any_head(head: str) -> None:
    supernet = supernet_of("bert", head, **({"skip": ["layer"]} if head == "choice" else {}))
    text = str(supernet)
    assert text.startswith(f"{class_of('bert', head).__name__} supernet (bert)")
    lines = [line.split()[0] for line in text.splitlines()[1:]]
    assert lines == ["architectures", "parameters", "MACs", "latency", "loadability", "active"]
    assert ("stock-padded" if head == "choice" else "remote-code") in text and "faster at the smallest" in text
    assert supernet.active == supernet.space.largest()


def test_printing_tells_which_subnet_is_active_and_keeps_it() -> None:
    supernet = supernet_of("gpt2")
    supernet.model.train()
    with supernet.activate(supernet.space.smallest()):
        assert "layers.*.skip" in str(supernet).splitlines()[-1]
        assert supernet.active == supernet.space.smallest()
    assert str(supernet).endswith("largest") and supernet.model.training


def test_a_space_of_more_points_than_a_float_can_count_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("bert")
    monkeypatch.setattr(SearchSpace, "size", 7 * 10**400)
    assert "10^400" in repr(supernet) and "7.00e+400" in str(supernet)


def test_a_model_without_elastic_layers_has_no_family() -> None:
    supernet = add_lora(tiny("bert"), ElasticLoraConfig(r=4, ranks=[2], target_modules=["query"]))
    with pytest.raises(UnsupportedModelError, match="no elastic layers"):
        _ = supernet.family
