"""The files beside the weights: what is copied, what is left, and that nothing outside the parent can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TRANSFORMER, module, tokenizer
from transformers import AutoTokenizer

from hf_elastic import CheckpointError
from hf_elastic.checkpoint.companions import copy_companions, parent_folder


def parent(root: Path, modules: Any = None) -> Path:
    """A checkpoint folder with a tokenizer and, where given, sentence-transformers modules."""
    folder = root / "parent"
    tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"of": "the parent"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".git").mkdir()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "config_sentence_transformers.json").write_text("{}")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    if modules is not None:
        (folder / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    return folder


def export_folder(root: Path) -> Path:
    folder = root / "export"
    folder.mkdir()
    (folder / "config.json").write_text('{"of": "the subnet"}')
    return folder


def test_tokenizer_and_chat_template_are_copied_and_weights_and_configs_are_not(tmp_path: Path) -> None:
    source, folder = parent(tmp_path), export_folder(tmp_path)
    names = copy_companions(source, folder)
    assert set(names) == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config_sentence_transformers.json",
        "sentence_bert_config.json",
    }  # fmt: skip
    assert names == tuple(sorted(names)) and json.loads((folder / "config.json").read_text()) == {"of": "the subnet"}
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("a c").input_ids == [2, 4] and loaded.chat_template == "{{ messages[0]['content'] }}"


def test_more_chat_templates_come_along(tmp_path: Path) -> None:
    source, folder = parent(tmp_path), export_folder(tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert "additional_chat_templates/tools.jinja" in copy_companions(source, folder)


def test_a_tokenizer_that_is_given_replaces_the_parents(tmp_path: Path) -> None:
    source, folder = parent(tmp_path), export_folder(tmp_path)
    (source / "vocab.txt").write_text("old")
    names = copy_companions(source, folder, tokenizer=tokenizer(words="x y"))
    assert "tokenizer.json" in names and "sentence_bert_config.json" in names and "vocab.txt" not in names
    assert AutoTokenizer.from_pretrained(folder)("y").input_ids == [3]


@pytest.mark.parametrize(
    "source", ["", "no/such-model", "no-such-model", "/no/such/folder", "a/b/c", "not a name!", "a:b"]
)
def test_a_parent_that_is_nowhere_gives_nothing(source: str, tmp_path: Path) -> None:
    assert parent_folder(source) is None
    assert copy_companions(source, export_folder(tmp_path)) == ()


def test_a_parent_in_the_hub_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--me--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "x").write_text("vocabulary")
    (snapshot / "vocab.txt").symlink_to(Path("../../blobs/x"))  # as huggingface_hub lays them out
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = export_folder(tmp_path)
    assert copy_companions("me/small", folder) == ("vocab.txt",)
    assert (folder / "vocab.txt").read_text() == "vocabulary" and not (folder / "vocab.txt").is_symlink()


def test_sentence_transformers_modules_are_copied_with_their_folders(tmp_path: Path) -> None:
    modules = [TRANSFORMER, module("1_Pooling"), module("2_Normalize", "Normalize", 2)]
    folder = export_folder(tmp_path)
    names = copy_companions(parent(tmp_path, modules), folder)
    assert {"modules.json", "1_Pooling/config.json"} <= set(names)
    assert json.loads((folder / "modules.json").read_text()) == modules
    assert (folder / "2_Normalize").is_dir()  # a module without files, of which git keeps no folder


def test_the_transformer_module_is_the_export_itself_wherever_it_was(tmp_path: Path) -> None:
    modules = [{**TRANSFORMER, "path": "0_Transformer"}, module("1_Pooling")]
    folder = export_folder(tmp_path)
    copy_companions(parent(tmp_path, modules), folder)
    assert (
        json.loads((folder / "modules.json").read_text())[0]["path"] == "" and not (folder / "0_Transformer").exists()
    )


OUTSIDE = ["..", "../secret", "1_Pooling/../../secret", "/etc", "", ".", "./", "1_Pooling/..", "link", "link/below",
           "..\\secret", "a\\..\\..\\secret", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_module_folder_outside_the_parent_is_refused_and_nothing_of_it_copied(path: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (secret / "below").mkdir(parents=True)
    (secret / "key").write_text("key")
    source, folder = parent(tmp_path, [TRANSFORMER, module(path)]), export_folder(tmp_path)
    (source / "link").symlink_to(secret)
    with pytest.raises(
        CheckpointError, match="modules.json names the module folder .*not inside the checkpoint"
    ) as caught:
        copy_companions(source, folder)
    assert "\n" not in str(caught.value) and not list(folder.rglob("key")) and not (folder / "modules.json").exists()


def test_a_path_through_a_link_cannot_write_outside_the_export(tmp_path: Path) -> None:
    source = parent(tmp_path, [TRANSFORMER, module("deep/../../planted")])
    (source / "a" / "b").mkdir(parents=True)
    (source / "planted").mkdir()
    (source / "deep").symlink_to(source / "a" / "b")  # deep/../../planted is inside the parent, but not lexically
    folder = export_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not inside the checkpoint"):
        copy_companions(source, folder)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("text", ["{", "{}" * 2, "3", '{"path": 1}', "[3]", '[{"path": "1_Pooling"}]', '["a"]', "null"])
def test_a_broken_list_of_modules_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="modules.json is no list of sentence-transformers modules") as caught:
        copy_companions(parent(tmp_path, text), export_folder(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_binary_list_of_modules_is_refused_by_name(tmp_path: Path) -> None:
    source = parent(tmp_path)
    (source / "modules.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="modules.json is no list"):
        copy_companions(source, export_folder(tmp_path))


def test_an_empty_object_of_modules_names_none(tmp_path: Path) -> None:
    folder = export_folder(tmp_path)
    copy_companions(parent(tmp_path, []), folder)
    assert json.loads((folder / "modules.json").read_text()) == []
