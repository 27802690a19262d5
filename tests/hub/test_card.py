"""Model cards: metadata that the Hub reads, numbers that were recorded, and nothing that a record could smuggle in."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import pytest
from huggingface_hub import ModelCard
from tiny_models import supernet_of, tiny

import hf_elastic as he
from hf_elastic import CheckpointError, ElasticError
from hf_elastic.hub.artefacts import recognise
from hf_elastic.hub.card import About, make_card, measured_table, model_card
from hf_elastic.hub.methods import method_of
from hf_elastic.hub.pushing import push_to_hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of recipe fast, its export in ``small``."""
    return made.compressed(tmp_path_factory.mktemp("run"))


def data_of(card: str) -> Any:
    return ModelCard(card).data


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n\n")[2].partition("\n## ")[0]


# --- from a run


@pytest.mark.slow
def test_the_card_of_a_run_has_its_numbers(run: Path) -> None:
    card, record = model_card(run), json.loads((run / "result.json").read_text())
    rows = record["stages"]["compare"]["rows"]
    lines = [line for line in section(card, "Measured").splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(rows)
    for line, row in zip(lines[2:], rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        speedup = rows[0]["latency"] / row["latency"]
        assert cells[0] == row["name"] and cells[-2:] == [f"{row['structure']:.4f}", f"{row['cosine']:.4f}"]
        assert cells[-4:-2] == [f"{1e3 * row['latency']:.2f} ms", f"{speedup:.2f}x"]
    for line in record["stages"]["check"]["lines"]:
        assert line.split(":")[0] in section(card, "Measured")


@pytest.mark.slow
def test_the_card_of_a_run_says_where_it_comes_from(run: Path) -> None:
    card, record = model_card(run), json.loads((run / "result.json").read_text())
    for text in ("Seed: 0", "Recipe: fast", "`text.txt`", *(f"{k} {v}" for k, v in record["versions"].items())):
        assert text in section(card, "How it was made")
    assert f"{record['stages']['space']['size']} architectures" in card or "architectures" in card
    assert str(run.parent) not in card.replace(str(run), "")  # but for the snippet, nothing of this machine


@pytest.mark.slow
def test_measured_qualities_are_in_the_model_index(run: Path) -> None:
    found = json.loads((run / "result.json").read_text())["stages"]["compare"]["rows"][1]
    data = data_of(model_card(run, repo_id="me/small"))
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "structure": found["structure"], "cosine": found["cosine"],
    }  # fmt: skip
    assert data.model_name == "small" and results["cosine"].task_type == "sentence-similarity"
    assert results["cosine"].dataset_name == "held out of text.txt"


@pytest.mark.slow
def test_licence_language_and_base_model_are_carried_over_from_the_parents_card(run: Path) -> None:
    data = data_of(model_card(run))
    assert (data.license, data.language, data.base_model) == ("apache-2.0", "en", "someone/encoder")
    assert data["base_model_relation"] == "finetune" and data.library_name == "sentence-transformers"
    other = data_of(model_card(run, base_model="me/other", license="mit"))
    assert (other.license, other.base_model) == ("mit", "me/other")


@pytest.mark.slow
def test_a_run_of_another_architecture_gives_no_numbers(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    record = json.loads((other / "architecture.json").read_text())
    record["architecture"] = {name: 1 for name in record["architecture"]}
    (other / "architecture.json").write_text(json.dumps(record))
    assert "## Measured" not in model_card(other)
    with pytest.raises(
        CheckpointError, match="found another subnet than the one in .*; leave run out, or give the run"
    ):
        model_card(other, run=run.with_name("small.run"))
    told = make_card(recognise(other), About(), repo_id=None).notes
    assert any("result.json found another subnet, so its numbers are not in the card" in note for note in told)


@pytest.mark.slow
def test_the_record_beside_an_export_is_found_as_well(run: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(run, tmp_path / "copy")
    (bare / "result.json").unlink()
    assert "## Measured" not in model_card(bare)
    given = model_card(bare, run=run.with_name("small.run"))
    shutil.copytree(run.with_name("small.run"), tmp_path / "copy.run")
    assert "## Measured" in given and model_card(bare) == given
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="is no run, it holds no result.json"):
            model_card(bare, run=wrong)


@pytest.mark.slow
def test_each_layer_of_a_run_is_in_the_card(run: Path) -> None:
    layers = json.loads((run / "architecture.json").read_text())["layers"]
    table = section(model_card(run), "Architecture")
    for layer in layers:
        assert not layer["mlp"] or f"{layer['intermediate_size']} neurons" in table
        assert not layer["attention"] or f"{layer['num_attention_heads']} heads" in table


@pytest.mark.slow
def test_the_front_of_a_run_goes_with_its_card(hub: Any, run: Path) -> None:
    push_to_hub(run, "tester/small")
    there = hub.repositories["tester/small"].files()
    assert there["pareto_front.svg"].startswith(b"<?xml") and b"Exact front" in there["pareto_front.svg"]
    assert "![Pareto front of the search](pareto_front.svg)" in there["README.md"].decode()


@pytest.mark.slow
def test_a_record_of_a_run_that_lacks_something_gives_a_card_or_one_line(run: Path, tmp_path: Path) -> None:
    small = shutil.copytree(run, tmp_path / "small")
    for name in ("result.json", "architecture.json"):
        assert cards_of_poorer(small, name) > 40


# --- records that lack something


def poorer(data: Any) -> Iterator[Any]:
    """The same data without one of its entries, and with nothing or a text in its place, for each entry."""
    places = data.items() if isinstance(data, dict) else enumerate(data[:2]) if isinstance(data, list) else ()
    for key, value in places:
        if isinstance(data, dict):
            yield {name: kept for name, kept in data.items() if name != key}
        for other in (None, "x", *poorer(value)):
            changed = copy.copy(data)
            changed[key] = other
            yield changed


def cards_of_poorer(folder: Path, name: str) -> int:
    """How many poorer records gave a card; all others gave an error of one line."""
    whole, made_cards = json.loads((folder / name).read_text()), 0
    for data in poorer(whole):
        (folder / name).write_text(json.dumps(data))
        try:
            model_card(folder)
            made_cards += 1
        except ElasticError as error:
            assert "\n" not in str(error)
    (folder / name).write_text(json.dumps(whole))
    return made_cards


@pytest.mark.parametrize("form", ["model", "adapter", "routers", "supernet"])
def test_a_record_that_lacks_something_gives_a_card_or_one_line(tmp_path: Path, form: str) -> None:
    folder, file = tmp_path / form, "architecture.json"
    if form == "model":
        made.remote(folder)
    elif form == "supernet":
        supernet_of("llama").save_pretrained(folder)
        file = "search_space.json"
    elif form == "routers":
        he.save_routers(made.routed(made.base(tmp_path)), folder)
        file = "routers.json"
    else:
        supernet = made.adapted(made.base(tmp_path))
        he.extract_adapter(supernet, supernet.space.midpoint()).save_pretrained(folder)
        file = "adapter_config.json"
    assert cards_of_poorer(folder, file) > 5


def test_a_record_of_a_run_of_elm_that_lacks_something_gives_a_card_or_one_line(tmp_path: Path) -> None:
    folder = made.remote(tmp_path / "small")
    (folder / "result.json").write_text(json.dumps(ELM_RECORD))
    assert cards_of_poorer(folder, "result.json") > 40


def test_what_is_missing_in_a_record_is_named(tmp_path: Path) -> None:
    folder = made.remote(tmp_path / "small")
    record = json.loads((folder / "architecture.json").read_text())
    del record["layers"][0]["num_attention_heads"], record["parameters"], record["macs_seq_len"]
    (folder / "architecture.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"is not as hf_elastic writes it \('num_attention_heads' is missing\)"):
        model_card(folder)
    (folder / "architecture.json").write_text(json.dumps({**record, "layers": []}))
    card = model_card(folder)
    assert "**Parameters:** " in card and "without embeddings" not in card.partition("## ")[0]
    assert "**MACs:** " in card and "tokens" not in card.partition("## ")[0]


# --- kinds


def test_a_card_of_every_kind_is_valid_and_names_its_library(tmp_path: Path) -> None:
    base = made.base(tmp_path)
    adapters = made.adapted(base)
    adapters.model.save_pretrained(tmp_path / "elastic")
    he.extract_adapter(adapters, adapters.space.midpoint()).save_pretrained(tmp_path / "plain")
    he.save_routers(made.routed(base), tmp_path / "routers")
    supernet_of("bert").save_pretrained(tmp_path / "supernet")
    made.stock(tmp_path / "stock")
    made.remote(tmp_path / "remote")
    made.integers(tmp_path / "integers")
    wanted = {
        "stock": ("transformers", "text-generation", "finetune"),
        "remote": ("transformers", "text-generation", "finetune"),
        "integers": ("transformers", "text-generation", "quantized"), "elastic": ("peft", "text-generation", "adapter"),
        "plain": ("peft", "text-generation", "adapter"), "routers": ("hf-elastic", "text-generation", "adapter"),
        "supernet": ("hf-elastic", "fill-mask", "finetune"),
    }  # fmt: skip
    for name, (library, task, relation) in wanted.items():
        card = model_card(tmp_path / name, repo_id="me/it", base_model="me/base")
        data = data_of(card)
        assert (data.library_name, data.pipeline_tag, data["base_model_relation"]) == (library, task, relation), name
        assert data.base_model == "me/base" and data.tags[0] == "hf-elastic"
        assert "## Architecture" in card and '"me/it"' in made.snippet(card)
        compile(made.snippet(card), "the snippet", "exec")
    assert "custom_code" in data_of(model_card(tmp_path / "remote")).tags
    assert {"compressed-tensors", "4-bit"} <= set(data_of(model_card(tmp_path / "integers")).tags)


def test_a_padded_export_says_that_it_is_no_faster(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    he.export(supernet, supernet.space.midpoint(), tmp_path / "padded", loadability="stock-padded")
    card = model_card(tmp_path / "padded")
    assert "it is no faster than its base" in card and "stock-padded" in data_of(card).tags


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2"])
def test_the_card_of_a_supernet_says_how_many_architectures_it_holds(tmp_path: Path, family: str) -> None:
    supernet = he.make_elastic(tiny(family), he.ElasticConfig(intermediate_size=[16, 0.5, 1.0]))
    supernet.save_pretrained(tmp_path / "supernet")
    assert supernet.space.size == 27 and "**Search space:** 27 architectures" in model_card(tmp_path / "supernet")


def test_routers_are_shown_with_the_capacities_they_were_saved_with(tmp_path: Path) -> None:
    he.save_routers(made.routed(made.base(tmp_path)), tmp_path / "routers")
    table = section(model_card(tmp_path / "routers"), "Architecture")
    assert "| layer | tokens in the FFN |" in table and table.count("50 %") == 2
    assert "arXiv:2411.15281" in model_card(tmp_path / "routers")


def test_an_adapter_is_shown_with_the_ranks_of_its_modules(tmp_path: Path) -> None:
    supernet = made.adapted(made.base(tmp_path))
    mixed = supernet.space.canonical({**supernet.space.largest(), "layers.1.r": 2})
    he.extract_adapter(supernet, mixed).save_pretrained(tmp_path / "adapter")
    table = section(model_card(tmp_path / "adapter"), "Architecture")
    assert table.splitlines()[2:] == [
        "| 0 | 8: `self_attn.q_proj`, `self_attn.v_proj` |", "| 1 | 2: `self_attn.q_proj`, `self_attn.v_proj` |",
    ]  # fmt: skip


OPTIONS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "adapters": ({"lora": "r=8,4"}, "elastic-lora", "2501.16372"),
    "with a base that shrinks": ({"lora": "r=8,4", "space": {"skip": []}}, "lonas", "2501.16372"),
    "on a sparse base, apart": ({"lora": "r=8,4", "sparsity": 0.5, "apart": True}, "shears", "2501.16372"),
    "merged into a sparse base": ({"lora": "r=8,4", "sparsity": 0.5}, "sqft", "2501.16372"),
    "merged into integers": ({"lora": "r=8,4", "bits": 4}, "sqft", "2501.16372"),
    "of ELM": ({"teacher": "me/teacher"}, "elm", "2510.27037"),
    "plain": ({"recipe": "best"}, "structured-pruning", None),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_of_a_run_say_the_method_and_its_paper(tmp_path: Path, options: str) -> None:
    given, tag, paper = OPTIONS[options]
    tiny("llama").save_pretrained(tmp_path / "model")
    method = method_of(recognise(tmp_path / "model"), given)
    assert (method.tag, method.arxiv) == (tag, paper)


_TEACHER = {"name": "teacher", "total_parameters": 100, "loss": 1.0, "perplexity": 2.5, "latency": 0.002, "blocks": []}
_STUDENT = {
    **_TEACHER, "name": "after retraining", "total_parameters": 40, "perplexity": 3.5, "latency": 0.001,
    "accuracy": 0.9,  # of the classifier beside it
}  # fmt: skip
ELM_RECORD: dict[str, Any] = {
    "format": 1, "options": {"teacher": "/home/me/my-teacher", "data": ["glue:train", "/home/me/a.txt"], "seed": 5},
    "stages": {"compare": {"rows": [_TEACHER, _STUDENT], "lines": ["met: a speed-up of 2"]}},
    "versions": {"torch": "2.0"},
}  # fmt: skip


def test_no_folder_of_this_machine_is_in_a_card(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "out" / "small")
    teacher = tmp_path / "hub" / "models--google--bert-tiny" / "snapshots" / "0123"
    (tmp_path / "out" / "my-teacher").mkdir()
    shown = {str(teacher): "google/bert-tiny", "../up/my-teacher": "my-teacher", "out/my-teacher": "my-teacher"}
    for stated, name in shown.items():
        options = {**ELM_RECORD["options"], "teacher": stated}
        (tmp_path / "out" / "small" / "result.json").write_text(json.dumps({**ELM_RECORD, "options": options}))
        card = model_card(tmp_path / "out" / "small", repo_id="me/small")
        assert f"**Teacher:** `{name}`" in card and "snapshots" not in card and "../" not in card
    base = made.base(tmp_path)
    he.save_routers(made.routed(base), tmp_path / "routers")
    assert str(base) in model_card(tmp_path / "routers") and str(base) not in model_card(
        tmp_path / "routers", repo_id="me/routers"
    )


def test_a_licence_that_a_teacher_does_not_give_is_asked_for(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "result.json").write_text(json.dumps(ELM_RECORD))
    artefact, note = (
        recognise(tmp_path / "small"),
        "the licence is not known, as a teacher gives none: state one by license=",
    )
    assert make_card(artefact, About(), repo_id=None).notes == (note,)
    assert make_card(artefact, About(license="mit"), repo_id=None).notes == ()


def test_a_path_out_of_a_published_supernet_of_elm_has_its_licence(hub: Any, tmp_path: Path) -> None:
    hub.new("me/elm", {"README.md": b"---\nlicense: mit\n---\n"})
    folder = made.stock(tmp_path / "small")
    record = json.loads((folder / "architecture.json").read_text())
    layers = [{"block": "bert", "intermediate_size": 24, "num_attention_heads": 2}] * 3
    (folder / "architecture.json").write_text(json.dumps({**record, "parent": "me/elm", "layers": layers}))
    data = data_of(model_card(folder))
    assert "elm" in data.tags and (data.base_model, data.license) == ("me/elm", "mit")


def test_a_teacher_is_named_and_is_no_base_model(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "result.json").write_text(json.dumps(ELM_RECORD))
    card = model_card(tmp_path / "small")
    data = data_of(card)
    assert data.base_model is None and data.datasets == ["glue"] and data.metrics == ["perplexity"]
    assert "**Teacher:** `my-teacher`" in card and "/home/me" not in card and "met: a speed-up of 2" in card
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"loss": 1.0, "perplexity": 3.5}
    assert "| after retraining | 40 (40%) | 1.00 ms | 2.00x |" in card


def test_what_was_not_measured_is_not_in_a_table() -> None:
    rows = [
        {"name": "parent", "adapter_parameters": 0, "accuracy": None},
        {"name": "found", "adapter_parameters": 50, "accuracy": 0.5, "over_limit": True},
        {"name": "largest", "adapter_parameters": 100, "accuracy": 0.75},
    ]
    assert measured_table(rows, ["accuracy"]).splitlines() == [
        "|  | adapter parameters | accuracy |",
        "| :-- | --: | --: |",
        "| parent | - | - |",
        "| found (over the limit) | 50 (50%) | 0.5000 |",
        "| largest | 100 (100%) | 0.7500 |",
    ]


# --- parents on the Hub


def test_the_card_of_a_parent_on_the_hub_is_read(hub: Any, tmp_path: Path) -> None:
    theirs = b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n---\n# X\n"
    hub.new("me/parent", {"README.md": theirs})
    made.stock(tmp_path / "stock")
    data = data_of(model_card(tmp_path / "stock", base_model="me/parent"))
    assert (data.license, data.license_name, data.language) == ("other", "mine", ["en", "de"])
    stated = data_of(model_card(tmp_path / "stock", base_model="me/parent", license="mit"))
    assert (stated.license, stated.license_name, stated.language) == ("mit", None, ["en", "de"])


def test_what_is_not_known_is_said(hub: Any, tmp_path: Path) -> None:
    folder = made.stock(tmp_path / "stock")
    hub.new("me/without-card")
    hub.new("me/broken", {"README.md": b"---\n: [\n---\n# X\n"})
    cases = {
        None: "the base model is not known: name it by base_model=",
        "me/nothing": "me/nothing is not on the Hub, or not for this token",
        "me/without-card": "the licence of the base model is not known: state one by license=",
        "me/broken": "the licence of the base model is not known",
    }
    for base, note in cases.items():
        assert any(note in told for told in push_to_hub(folder, "tester/small", base_model=base).notes), base
    told = push_to_hub(folder, "tester/small", base_model="me/without-card", license="mit").notes
    assert not any("licence" in note for note in told)


def test_offline_a_card_is_made_all_the_same(tmp_path: Path) -> None:
    data = data_of(model_card(made.stock(tmp_path / "stock"), base_model="me/parent"))
    assert data.base_model == "me/parent" and data.license is None


# --- nothing is smuggled in


def test_nothing_that_a_record_holds_becomes_markup_or_metadata(tmp_path: Path) -> None:
    folder = made.stock(tmp_path / "a](http:x) <b>#|`")
    record = json.loads((folder / "architecture.json").read_text())
    record["versions"] = {"<script>alert(1)</script>": "1\n---\nlicense: mit"}
    record["parent"] = "x\n---\nlicense: mit\n---\n"
    (folder / "architecture.json").write_text(json.dumps(record))
    evil = {"name": "| a | <img src=x>\n\n# title", "latency": None, "architecture": record["architecture"]}
    run = {
        "format": 1,
        "options": {"data": ["`x`\n# y.txt"], "model": "\n- evil"},
        "stages": {"compare": {"rows": [evil] * 2}},
    }
    (folder / "result.json").write_text(json.dumps(run))
    card = model_card(folder, repo_id="me/it")
    data = data_of(card)
    assert data.license is None and data.base_model is None
    assert "<script>" not in card and "<img" not in card and "\n# title" not in card and "\n# y" not in card


def test_a_licence_of_a_parent_cannot_break_the_metadata(hub: Any, tmp_path: Path) -> None:
    hub.new("me/parent", {"README.md": b'---\nlicense: "mit\\n---\\n# broken"\nlanguage: en\n---\n'})
    data = data_of(model_card(made.stock(tmp_path / "stock"), base_model="me/parent"))
    assert data.library_name == "transformers" and data.language == "en"
