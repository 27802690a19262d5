"""Only what is expected is shared, and only if it is whole."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import sentence_encoder
from tiny_models import supernet_of, tiny, tokenizer

import hf_elastic as he
from hf_elastic import CheckpointError
from hf_elastic.hub.artefacts import recognise
from hf_elastic.hub.contents import contents_of, may_be_of_a_push, without_local_folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.remote(tmp_path_factory.mktemp("export") / "small")


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> Path:
    """A remote-code export to be spoilt."""
    return shutil.copytree(exported, tmp_path / "small")


def test_an_export_is_shared_as_it_was_written(small: Path) -> None:
    contents = contents_of(small)
    assert contents.files == {file.name: file for file in sorted(small.iterdir())} and contents.left_out == ()


def test_what_is_not_expected_is_left_out_and_said(small: Path) -> None:
    strangers = {
        "result.json": b"{}", ".lock": b"", "training_args.bin": pickle.dumps(1), "optimizer.pt": b"x",
        "notes.txt": b"x",
        "secrets.env": b"TOKEN", "evil.py": b"import os", "checkpoint-3/model.safetensors": b"x", ".git/config": b"x",
        "adapter/adapter_config.json": b"{}", "picture.png": b"x",
    }  # fmt: skip
    for name, content in strangers.items():
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_bytes(content)
    contents = contents_of(small)
    assert set(contents.left_out) == strangers.keys() and not strangers.keys() & contents.files.keys()


def test_licences_and_pictures_that_a_card_shows_go_along(small: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "front.png", "other.png"):
        (small / name).write_text("x")
    (small / "README.md").write_text("# Mine\n![front](./front.png) ![up](../other.png) ![web](https://x.y/z.png)")
    contents = contents_of(small)
    assert {"LICENSE", "NOTICE.txt", "front.png"} <= contents.files.keys() and contents.left_out == ("other.png",)


def test_sentence_transformers_modules_go_along_with_their_files(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "encoder")
    (folder / "1_Pooling" / "weights.bin").write_bytes(b"pickle")
    contents = contents_of(folder)
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= contents.files.keys()
    assert contents.left_out == ("1_Pooling/weights.bin",)


def test_a_module_whose_only_weights_are_a_pickle_is_refused_and_the_cure_helps(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Dense

    encoder = st.SentenceTransformer(str(sentence_encoder(tmp_path / "encoder")))
    encoder.append(Dense(in_features=32, out_features=5))
    folder = tmp_path / "pickled"
    encoder.save_pretrained(str(folder), create_model_card=False, safe_serialization=False)
    wanted = encoder.encode(["The small dog runs."])
    with pytest.raises(
        CheckpointError, match=r"3_Dense are pytorch_model.bin, a pickle, which is not shared"
    ) as caught:
        contents_of(folder)
    assert "\n" not in str(caught.value)
    exec(str(caught.value).partition("safetensors by ")[2], {"SentenceTransformer": st.SentenceTransformer})
    contents = contents_of(folder)
    assert "3_Dense/model.safetensors" in contents.files and contents.left_out == ("3_Dense/pytorch_model.bin",)
    for name, file in contents.files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, tmp_path / "pulled" / name)
    assert abs(st.SentenceTransformer(str(tmp_path / "pulled")).encode(["The small dog runs."]) - wanted).max() == 0


def test_sharded_weights_go_along_with_their_index(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shards = {file.name for file in (tmp_path / "sharded").glob("*.safetensors")}
    assert (
        len(shards) > 1 and {*shards, "model.safetensors.index.json"} <= contents_of(tmp_path / "sharded").files.keys()
    )
    (tmp_path / "sharded" / sorted(shards)[0]).unlink()
    with pytest.raises(CheckpointError, match="is not whole: model-00001-of-.* is missing"):
        contents_of(tmp_path / "sharded")


def test_a_supernet_goes_with_what_stands_on_it(tmp_path: Path) -> None:
    supernet = he.make_elastic(tiny("llama"), he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    both = he.add_lora(supernet.model, he.ElasticLoraConfig(**made.LORA), seed=0)
    both.save_pretrained(tmp_path / "supernet")
    names = contents_of(tmp_path / "supernet").files.keys()
    assert {"search_space.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert "adapter/README.md" not in names


# --- halves


def _cut(name: str, size: int = -20) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _headed(header: Any) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + b"0000"


HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is not whole: model.safetensors is missing"),
    "truncated weights": (_cut("model.safetensors"), "model.safetensors is truncated: it has"),
    "a truncated header": (_cut("model.safetensors", 100), "is truncated or no safetensors file"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is truncated or no safetensors file"),
    "longer weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        "model.safetensors is truncated: it has",
    ),
    "a header without ends": (
        lambda f: (f / "model.safetensors").write_bytes(_headed({"a": {"data_offsets": [0]}})),
        "is truncated or no safetensors file",
    ),
    "a header nested too deeply": (
        lambda f: (f / "model.safetensors").write_bytes(_headed("[" * 10**5 + "]" * 10**5) + b"x"),
        "is truncated or no safetensors file",
    ),
    "a broken config": (_cut("config.json"), "config.json is no JSON file"),
    "a broken record": (_cut("architecture.json"), "architecture.json is no JSON file"),
    "no code": (lambda f: (f / "modeling_elastic_llama.py").unlink(), "modeling_elastic_llama.py, code of the model"),
    "no code behind it": (lambda f: (f / "elastic_routers.py").unlink(), "elastic_routers.py, code of the model"),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is not shared",
    ),
    "foreign modules": (
        lambda f: (f / "modules.json").write_text('[{"path": "../1_Pooling", "type": "Pooling"}]'),
        "names '../1_Pooling', which is not a folder inside of it",
    ),
    "the folder itself as a module": (
        lambda f: (f / "modules.json").write_text('[{"path": ".", "type": "Pooling"}]'),
        "names '.', which is not a folder inside of it",
    ),
    "an index of other files": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        "names '../../x.safetensors', which holds no weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_a_half_folder_is_refused(small: Path, half: str) -> None:
    spoil, message = HALVES[half]
    spoil(small)
    with pytest.raises(CheckpointError, match=message) as caught:
        contents_of(small)
    assert "\n" not in str(caught.value)


def test_a_supernet_whose_weights_are_others_is_refused(tmp_path: Path) -> None:
    supernet_of("llama").save_pretrained(tmp_path / "supernet")
    save_file({"a": torch.zeros(3)}, tmp_path / "supernet" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the file this supernet was saved with"):
        contents_of(tmp_path / "supernet")


def test_routers_and_adapters_that_are_broken_are_refused(tmp_path: Path) -> None:
    base = made.base(tmp_path)
    he.save_routers(made.routed(base), tmp_path / "routers")
    _cut("routers.safetensors")(tmp_path / "routers")
    with pytest.raises(CheckpointError, match=r"routers.safetensors is truncated"):
        contents_of(tmp_path / "routers")
    supernet = made.adapted(base)
    he.extract_adapter(supernet, supernet.space.largest()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is not whole: adapter_model.safetensors is missing"):
        contents_of(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (small / name).unlink(missing_ok=True)
    (small / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} in .* is a link to .*secret, outside of it"):
        contents_of(small)


def test_links_of_the_hubs_own_cache_are_followed(small: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--small" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--me--small" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in small.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert contents_of(snapshot).files.keys() == contents_of(small).files.keys()


# --- what is no artefact


def test_folders_that_are_no_artefacts_are_told_apart(small: Path, tmp_path: Path) -> None:
    run, family, nothing = tmp_path / "small.run", tmp_path / "small.family", tmp_path / "nothing"
    for folder in (run, family / "1.3x", nothing):
        folder.mkdir(parents=True)
    (run / "result.json").write_text("{}")
    (family / "1.3x" / "architecture.json").write_text("{}")
    for name, file in (("graph", "runtime.json"), ("llama-cpp", "model.gguf")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        (tmp_path / name / "config.json").write_text("{}")
    cases: dict[Any, str] = {
        run: f"is the folder of a run, which is not shared; push what it exported, {tmp_path / 'small'}",
        family: "is a family of 1.3x; push each of them",
        nothing: "holds no config.json, search_space.json",
        tmp_path / "graph": "was converted for a runtime, which has no card of ours; `hf upload`",
        tmp_path / "llama-cpp": "was converted for a runtime",
        tmp_path / "gone": "is no folder",
        small / "config.json": "is no folder",
    }
    for folder, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            contents_of(folder)


def test_kinds_are_recognised_by_their_records(small: Path, tmp_path: Path) -> None:
    base = made.base(tmp_path)
    supernet = made.adapted(base)
    supernet.model.save_pretrained(tmp_path / "elastic")
    he.extract_adapter(supernet, supernet.space.smallest()).save_pretrained(tmp_path / "plain")
    he.save_routers(made.routed(base), tmp_path / "routers")
    supernet_of("bert").save_pretrained(tmp_path / "supernet")
    kinds = {place: recognise(place) for place in (small, *(tmp_path / n for n in ("elastic", "plain", "routers")))}
    assert [found.kind for found in kinds.values()] == ["model", "adapter", "adapter", "routers"]
    assert [found.elastic for found in kinds.values()] == [False, True, False, False]
    assert recognise(tmp_path / "supernet").kind == "supernet" and kinds[small].loadability == "remote-code"
    assert recognise(made.integers(tmp_path / "integers")).bits == 4


# --- folders of this machine


def test_a_tokenizers_config_loses_the_paths_of_whoever_saved_it(small: Path) -> None:
    told = {"name_or_path": "/home/me/base", "tokenizer_file": "/home/me/base/tokenizer.json", "pad_token": "[PAD]"}
    (small / "tokenizer_config.json").write_text(json.dumps(told))
    rewritten = without_local_folders(contents_of(small), base="user/base").rewritten
    assert json.loads(rewritten["tokenizer_config.json"]) == {"pad_token": "[PAD]"}


def test_records_lose_folders_of_this_machine_and_nothing_else(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "parent")
    tokenizer().save_pretrained(tmp_path / "parent")
    from transformers import AutoModelForCausalLM

    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    supernet = he.make_elastic(parent, he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    he.export(supernet, supernet.space.smallest(), tmp_path / "small")
    before = json.loads((tmp_path / "small" / "architecture.json").read_text())
    assert before["parent"] == str(tmp_path / "parent")
    contents = contents_of(tmp_path / "small")
    for base, wanted in ((None, ""), ("me/parent", "me/parent")):
        rewritten = without_local_folders(contents, base=base).rewritten
        assert rewritten.keys() == {"architecture.json"}
        assert json.loads(rewritten["architecture.json"]) == {**before, "parent": wanted}


def test_only_names_that_a_push_gives_to_files_may_be_of_one() -> None:
    ours = ["config.json", "adapter/adapter_config.json", "model-00001-of-00003.safetensors", "elastic_layers.py"]
    theirs = [
        "README.md",
        "LICENSE",
        ".gitattributes",
        "tokenizer.json",
        "onnx/config.json",
        "modeling_mine.py",
        "x/y.py",
    ]
    assert [name for name in (*ours, *theirs) if may_be_of_a_push(name)] == ours
