"""What a card names as the model that something was made from: what is true and what others can reach, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import made
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_elastic as he
from hf_elastic import CheckpointError
from hf_elastic.hub.pushing import push_to_hub


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remote-code export; read only."""
    return made.remote(tmp_path_factory.mktemp("export") / "small")


def files_of(hub: Any, name: str = "tester/small") -> dict[str, bytes]:
    found: dict[str, bytes] = hub.repositories[name].files()
    return found


def test_a_base_model_that_the_user_names_stays_where_the_hub_does_not_show_it(
    hub: Any, small: Path, tmp_path: Path
) -> None:
    for name, thing in (("adapter", made.adapted(made.base(tmp_path))), ("model", small)):
        report = push_to_hub(thing, f"tester/{name}", base_model="tester/later")
        card = ModelCard(files_of(hub, f"tester/{name}")["README.md"].decode())
        assert card.data.base_model == "tester/later"
        assert any("tester/later is not on the Hub, or not for this token; it is named" in n for n in report.notes)
    record = json.loads(files_of(hub, "tester/adapter")["adapter_config.json"])
    assert record["base_model_name_or_path"] == "tester/later"


def test_a_base_in_a_relative_folder_is_no_name_on_the_hub(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    made.base(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    supernet = made.adapted(Path("out/base"))
    he.extract_adapter(supernet, supernet.space.largest()).save_pretrained("out/adapter")
    stated = json.loads(Path("out/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert stated == "out/base"
    (tmp_path / "elsewhere").mkdir()
    for here in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(here)
        with pytest.raises(CheckpointError, match="of the base in out/base, which nobody else has"):
            push_to_hub(tmp_path / "out" / "adapter", "tester/alone")
    shutil.move(tmp_path / "out" / "adapter", tmp_path / "elsewhere" / "adapter")
    shutil.rmtree(tmp_path / "out")  # now nothing tells it from a name but the Hub
    with pytest.raises(CheckpointError, match="of the base out/base, which is not on the Hub, or not for this token"):
        push_to_hub(tmp_path / "elsewhere" / "adapter", "tester/alone")
    assert hub.repositories == {}


def test_a_folder_is_not_taken_for_the_name_of_a_base_model_unless_the_hub_has_it(
    hub: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tester" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="base_model='tester/base' is a folder here and was not found on the Hub"):
        push_to_hub(small, "tester/small", base_model="tester/base")
    for wrong in (str(tmp_path), "a/b/c"):
        with pytest.raises(CheckpointError, match="is no name of a repository, such as user/name"):
            push_to_hub(small, "tester/small", base_model=wrong)
    assert hub.repositories == {}
    hub.new("tester/base")
    push_to_hub(small, "tester/small", base_model="tester/base")
    assert ModelCard(files_of(hub)["README.md"].decode()).data.base_model == "tester/base"


def test_the_base_of_an_adapter_is_not_what_that_base_was_made_from(hub: Any, tmp_path: Path) -> None:
    base = made.base(tmp_path)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: someone/grandparent\n---\n# Mine\n")
    for supernet in (made.adapted(base), made.routed(base)):
        with pytest.raises(CheckpointError, match="which nobody else has; push that too, and name it by base_model="):
            push_to_hub(supernet, "tester/alone")
    whole = he.make_elastic(AutoModelForCausalLM.from_pretrained(base), he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    report = push_to_hub(whole, "tester/supernet")
    there = files_of(hub, "tester/supernet")
    data = ModelCard(there["README.md"].decode()).data
    assert (data.base_model, data["base_model_relation"], data.license) == ("someone/grandparent", "finetune", "mit")
    assert json.loads(there["search_space.json"])["parent"] == ""  # its weights are not those of its grandparent
    assert f"the base model is the folder {base}: push it, and name it by base_model=" in report.notes
