"""What only hf_elastic understands comes back from the Hub by its name: supernets, elastic adapters, routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import pytest
import torch
from tiny_models import supernet_of, tiny, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_elastic as he
from hf_elastic import CheckpointError, Supernet
from hf_elastic.hub.pushing import push_to_hub


def state(supernet: Supernet) -> dict[str, Tensor]:
    return supernet.model.state_dict()


def same_state(one: Supernet, other: Supernet) -> bool:
    ours, theirs = state(one), state(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(supernet: Supernet, architecture: Any = None) -> Tensor:
    point = architecture or supernet.active
    with supernet.activate(point), torch.no_grad():
        return supernet.model.eval()(input_ids=made.token_ids())[0]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_supernet_comes_back_bit_equal(hub: Any, family: str) -> None:
    supernet = supernet_of(family)
    push_to_hub(supernet, "tester/supernet")
    restored = Supernet.from_pretrained("tester/supernet")
    assert restored.space == supernet.space and same_state(restored, supernet)
    for point in (supernet.space.smallest(), supernet.space.midpoint()):
        assert torch.equal(logits(restored, point), logits(supernet, point))


def test_an_earlier_state_of_a_supernet_is_found_by_its_revision(hub: Any) -> None:
    supernet = supernet_of("llama")
    first = push_to_hub(supernet, "tester/supernet").commit
    with torch.no_grad():
        supernet.model.get_input_embeddings().weight.add_(1.0)
    push_to_hub(supernet, "tester/supernet")
    old, new = Supernet.from_pretrained("tester/supernet", revision=first), Supernet.from_pretrained("tester/supernet")
    assert same_state(new, supernet) and not same_state(old, supernet)


def test_a_supernet_in_a_private_repository_needs_a_token(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_hub import TOKEN

    push_to_hub(supernet_of("llama"), "tester/hidden", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="tester/hidden is no folder here, and not on the Hub, or not for this"):
        Supernet.from_pretrained("tester/hidden")
    assert Supernet.from_pretrained("tester/hidden", token=TOKEN).space.size > 1


def test_an_export_of_a_supernet_from_the_hub_has_the_tokenizer_of_its_parent(hub: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "parent")
    tokenizer().save_pretrained(tmp_path / "parent")
    supernet = he.make_elastic(
        AutoModelForCausalLM.from_pretrained(tmp_path / "parent"), he.ElasticConfig(intermediate_size=[0.5, 1.0])
    )
    supernet.save_pretrained(tmp_path / "saved")  # names its parent's folder, which nobody else has
    push_to_hub(tmp_path / "saved", "tester/supernet")
    restored = Supernet.from_pretrained("tester/supernet")
    he.export(restored, restored.space.smallest(), tmp_path / "small")
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("a c").input_ids == [2, 4]


def test_elastic_adapters_come_back_onto_their_base(hub: Any, tmp_path: Path) -> None:
    supernet = made.adapted(made.base(tmp_path))
    push_to_hub(tmp_path / "base", "tester/base")
    push_to_hub(supernet, "tester/adapter", base_model="tester/base")
    restored = he.load_adapter(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/adapter")
    assert restored.space == supernet.space
    for point in (supernet.space.smallest(), supernet.space.largest()):
        assert torch.equal(logits(restored, point), logits(supernet, point))


def test_routers_come_back_onto_their_base_with_their_dial(hub: Any, tmp_path: Path) -> None:
    supernet = made.routed(made.base(tmp_path))
    push_to_hub(tmp_path / "base", "tester/base")
    push_to_hub(supernet, "tester/routers", base_model="tester/base")
    restored = he.load_routers(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/routers")
    assert restored.active == supernet.active != supernet.space.largest()
    assert torch.equal(logits(restored), logits(supernet))


def test_a_name_that_is_nowhere_is_said_in_one_line(hub: Any) -> None:
    base = tiny("llama")
    calls = (
        lambda: Supernet.from_pretrained("tester/nothing"),
        lambda: he.load_adapter(base, "tester/nothing"),
        lambda: he.load_routers(base, "tester/nothing"),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match="^tester/nothing is no folder here, and not on the Hub") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_offline_a_supernet_comes_from_the_cache(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("llama")
    push_to_hub(supernet, "tester/supernet")
    Supernet.from_pretrained("tester/supernet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same_state(Supernet.from_pretrained("tester/supernet"), supernet)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        Supernet.from_pretrained("tester/another")


@pytest.mark.parametrize(
    "path", ["../../outside.json", "a/../../../outside.json", "/tmp/outside.json", "..\\outside.json"]
)
def test_a_file_that_a_server_names_outside_of_the_repository_is_not_written(
    hub: Any, tmp_path: Path, path: str
) -> None:
    push_to_hub(supernet_of("llama"), "tester/supernet")
    hub.extra_tree.append(path)
    with pytest.raises(CheckpointError, match="cannot be read from the Hub"):
        Supernet.from_pretrained("tester/supernet")
    written = [file for file in tmp_path.rglob("*") if b"hostile" in (file.read_bytes() if file.is_file() else b"")]
    assert written == [] and not Path("/tmp/outside.json").exists()


def test_pickles_of_a_repository_are_not_fetched(hub: Any, tmp_path: Path) -> None:
    push_to_hub(supernet_of("llama"), "tester/supernet")
    hub.extra_tree += ["pytorch_model.bin", "training_args.bin", "state.pkl"]
    Supernet.from_pretrained("tester/supernet")
    assert not hub.asked(r"resolve/.*\.(bin|pkl)")


@pytest.mark.slow
def test_a_fresh_process_restores_them_by_the_snippets_of_their_cards(hub: Any, tmp_path: Path) -> None:
    supernet = he.make_elastic(tiny("llama"), he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    both = he.add_lora(supernet.model, he.ElasticLoraConfig(**made.LORA), seed=0)
    made.base(tmp_path)
    adapter, routers = made.adapted(tmp_path / "base"), made.routed(tmp_path / "base")
    push_to_hub(tmp_path / "base", "tester/base")
    push_to_hub(both, "tester/both")
    push_to_hub(adapter, "tester/adapter", base_model="tester/base")
    push_to_hub(routers, "tester/routers", base_model="tester/base")
    smallest = "with supernet.activate(supernet.space.smallest()):\n    result = supernet.model(input_ids=ids)[0]"
    active = "result = supernet.model.eval()(input_ids=ids)[0]"
    jobs = {"tester/both": smallest, "tester/adapter": smallest, "tester/routers": active}
    (tmp_path / "reader").mkdir()
    results = made.read_from(hub, tmp_path / "reader", jobs, with_us=True)
    wanted = {
        "tester/both": logits(both, both.space.smallest()),
        "tester/adapter": logits(adapter, adapter.space.smallest()),
        "tester/routers": logits(routers),
    }
    for name, outputs in wanted.items():  # sums are in another order where weights lie elsewhere in memory
        assert torch.allclose(results[name], outputs, rtol=0, atol=1e-5), name
