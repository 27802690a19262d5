"""Folders on data: equal to the loaded model by hand, and to the subnet that a child was exported from."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import local_metrics
import local_tasks
import pytest
import torch
import typer
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, ndcg_score
from tiny_checkpoints import (
    LABELS,
    classifier,
    decoder_tokenizer,
    language_model,
    masked_model,
    sentence_encoder,
    sentences,
    write_rows,
    write_text,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_elastic import CheckpointError, DataError, ElasticConfig, Supernet, export, make_elastic, objectives
from hf_elastic.evaluation import FolderOptions, compare_folders, evaluate_folder
from hf_elastic.evaluation.command import evaluate_command

SPACE = ElasticConfig(intermediate_size=[16, 64], skip=["attention", "mlp"])


def child_of(folder: Path, kind: Any, target: Path, **changes: Any) -> tuple[Supernet, Any]:
    """Exports a subnet that skips and cuts, in the form that needs our classes."""
    supernet = make_elastic(kind.from_pretrained(folder), SPACE)
    values = {**supernet.space.largest(), "layers.0.intermediate_size": 16, "layers.1.skip": "mlp", **changes}
    if "layers.1.intermediate_size" in values:
        values["layers.1.intermediate_size"] = supernet.space["layers.1.intermediate_size"].values[0]
    point = supernet.space.canonical(values)
    export(supernet, point, target, source=folder, loadability="remote-code")
    return supernet, point


def pairs_file(path: Path, *, count: int = 20, label: Any = float) -> Path:
    rows = zip(sentences(count), sentences(count, seed=1), strict=True)
    lines = [json.dumps({"sentence1": a, "sentence2": b, "score": label(n % 5)}) for n, (a, b) in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


@torch.no_grad()
def guesses(folder: Path, texts: list[str]) -> list[int]:
    """Classes of the loaded model, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def test_accuracy_of_parent_and_child_is_that_of_the_loaded_models(tmp_path: Path) -> None:
    parent, data = classifier(tmp_path / "parent"), write_rows(tmp_path / "rows.jsonl", count=50)
    supernet, point = child_of(parent, AutoModelForSequenceClassification, tmp_path / "child")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    names = {name: number for number, name in LABELS.items()}
    for folder in (parent, tmp_path / "child"):
        found = evaluate_folder(folder, data, options=FolderOptions(batch_size=7))
        right = [
            g == names[row["label"]] for g, row in zip(guesses(folder, [r["text"] for r in rows]), rows, strict=True)
        ]
        assert found.values == {"accuracy": pytest.approx(sum(right) / len(right))}
        assert found.counted == "50 rows"
    tokenizer = AutoTokenizer.from_pretrained(parent)
    batches = [
        {**tokenizer(row["text"], return_tensors="pt"), "labels": torch.tensor([names[row["label"]]])} for row in rows
    ]
    assert found.values["accuracy"] == pytest.approx(objectives.accuracy(supernet, batches)(point))
    assert found.parameters == objectives.parameters(supernet)(point)


def test_a_metric_of_evaluate_is_named_by_its_folder(tmp_path: Path) -> None:
    parent, data = classifier(tmp_path / "parent"), write_rows(tmp_path / "rows.jsonl", count=30)
    script = local_metrics.script_folder(tmp_path)
    own = evaluate_folder(parent, data).values["accuracy"]
    found = evaluate_folder(parent, data, options=FolderOptions(metric=f"evaluate:{script}"))
    assert found.values == {"share_right": pytest.approx(own)}
    keyed = evaluate_folder(parent, data, options=FolderOptions(metric=f"evaluate:{script}", key="share", limit=10))
    assert set(keyed.values) == {"share"} and keyed.counted == "10 rows"


def test_pairs_of_sentences_are_classified_together_and_columns_may_be_named(tmp_path: Path) -> None:
    parent = classifier(tmp_path / "parent")
    rows = [
        {"premise": a, "claim": b, "gold": n % 2}
        for n, (a, b) in enumerate(zip(sentences(12), sentences(12, seed=1), strict=True))
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    options = FolderOptions(text_column="premise", pair_column="claim", label_column="gold")
    found = evaluate_folder(parent, tmp_path / "rows.csv", options=options).values["accuracy"]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(parent).eval(),
        AutoTokenizer.from_pretrained(parent),
    )
    with torch.no_grad():
        right = [
            int(model(**tokenizer(row["premise"], row["claim"], return_tensors="pt")).logits.argmax()) == row["gold"]
            for row in rows
        ]
    assert found == pytest.approx(sum(right) / 12)


@torch.no_grad()
def test_perplexity_is_that_of_the_stream_in_blocks(tmp_path: Path) -> None:
    parent, data = language_model(tmp_path / "parent"), write_text(tmp_path / "text.txt", count=12)
    supernet, point = child_of(parent, AutoModelForCausalLM, tmp_path / "child")
    ids = torch.tensor([*decoder_tokenizer()(data.read_text())["input_ids"], 1])
    blocks = ids.split(40)
    for folder in (parent, tmp_path / "child"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        losses: list[Tensor] = []
        for block in blocks:
            scores = F.log_softmax(model(input_ids=block[None]).logits[0], -1)
            losses += [-scores[n, token] for n, token in enumerate(block[1:])]
        found = evaluate_folder(folder, data, options=FolderOptions(sequence_length=40, batch_size=3))
        assert found.values["perplexity"] == pytest.approx(math.exp(float(torch.stack(losses).mean())), rel=1e-4)
        assert found.counted == f"{len(losses)} tokens in blocks of 40"
    batches = [{"input_ids": block[None], "labels": block[None]} for block in blocks if len(block) > 1]
    assert found.values["perplexity"] == pytest.approx(objectives.perplexity(supernet, batches)(point), rel=1e-4)


@torch.no_grad()
def embed(folder: Path, texts: list[str]) -> Tensor:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = torch.stack([model(**tokenizer(text, return_tensors="pt"))[0][0].mean(0) for text in texts])
    return F.normalize(rows, dim=-1)


def test_spearman_is_that_of_the_loaded_encoders(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    parent, data = sentence_encoder(tmp_path / "parent"), pairs_file(tmp_path / "pairs.jsonl")
    child_of(parent, AutoModel, tmp_path / "child")
    for folder in (parent, tmp_path / "child"):
        cosines = (embed(folder, sentences(20)) * embed(folder, sentences(20, seed=1))).sum(-1)
        found = evaluate_folder(folder, data)
        assert found.values["spearman"] == pytest.approx(
            spearmanr(cosines, [n % 5 for n in range(20)]).statistic, abs=1e-6
        )
        assert found.counted == "20 pairs"


def test_ndcg_is_that_of_the_loaded_encoder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    parent = sentence_encoder(tmp_path / "parent")
    queries, corpus = sentences(3, seed=2), sentences(12, seed=3)
    judged = [(q, d, (m + n) % 3) for m, q in enumerate(queries) for n, d in enumerate(corpus)]
    data = tmp_path / "judged.jsonl"
    data.write_text("\n".join(json.dumps({"query": q, "document": d, "relevance": r}) for q, d, r in judged))
    found = evaluate_folder(parent, data, options=FolderOptions(metric="ndcg", k=4))
    cosines = embed(parent, queries) @ embed(parent, corpus).t()
    grades = [[(m + n) % 3 for n in range(12)] for m in range(3)]
    assert found.values == {"ndcg@4": pytest.approx(ndcg_score(grades, cosines.numpy(), k=4), abs=1e-6)}
    assert found.counted == "3 queries, 12 documents"


def test_a_task_of_lm_eval_is_run_on_folders(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "hf-elastic[eval]"')
    tasks = local_tasks.task_folder(tmp_path / "tasks")
    parent = language_model(tmp_path / "parent", max_position_embeddings=512)
    supernet, point = child_of(parent, AutoModelForCausalLM, tmp_path / "child")
    options = FolderOptions(metric="lm-eval:tiny_rolling,tiny_choice", limit=5)
    found = evaluate_folder(tmp_path / "child", tasks, options=options)
    assert set(found.values) == {"tiny_rolling/word_perplexity", "tiny_choice/acc", "tiny_choice/acc_norm"}
    from hf_elastic.evaluation import lm_eval

    in_memory = lm_eval(supernet, ["tiny_rolling"], tokenizer=decoder_tokenizer(), include=tasks, limit=5)(point)
    assert found.values["tiny_rolling/word_perplexity"] == pytest.approx(in_memory, rel=1e-3)
    keyed = FolderOptions(metric="lm-eval:tiny_choice", key="acc_norm", limit=5)
    assert set(evaluate_folder(parent, tasks, options=keyed).values) == {"acc_norm"}


def app() -> typer.Typer:
    made = typer.Typer()
    made.command("evaluate")(evaluate_command)
    made.command("other")(lambda: None)
    return made


def test_the_command_prints_parent_and_children_in_one_table(tmp_path: Path) -> None:
    parent, data = classifier(tmp_path / "parent"), write_rows(tmp_path / "rows.jsonl", count=40)
    child = tmp_path / "child"
    child_of(parent, AutoModelForSequenceClassification, child)
    ended = CliRunner().invoke(app(), ["evaluate", str(parent), "--data", str(data), "--compare", str(child)])
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    header, rows = lines[0].split(), lines[2:4]
    assert header == ["parameters", "on", "disk", "accuracy"]
    for folder, row in zip((parent, child), rows, strict=True):
        found = evaluate_folder(folder, data)
        assert row.split()[0] == str(folder) and row.split()[-1] == f"{found.values['accuracy']:.4f}"
    assert "(100%)" in rows[0] and "(100%)" not in rows[1].partition("MB")[0]
    assert lines[4] == "accuracy on 40 rows; parameters without embeddings"
    assert f"measuring {child}" in ended.stderr and "measuring" not in ended.stdout


def test_perplexities_of_different_tokens_are_not_compared_in_silence(tmp_path: Path) -> None:
    one, data = language_model(tmp_path / "one"), write_text(tmp_path / "text.txt", count=10)
    other = language_model(tmp_path / "other")
    words = (other / "tokenizer.json").read_text()
    merged = json.loads(words)
    merged["model"]["merges"] = [["t", "h"]]
    merged["model"]["vocab"]["th"] = 257
    swapped = next(name for name, number in merged["model"]["vocab"].items() if number == 257 and name != "th")
    del merged["model"]["vocab"][swapped]
    (other / "tokenizer.json").write_text(json.dumps(merged))
    assert "cannot be compared" in compare_folders([one, other], data)
    assert "cannot be compared" not in compare_folders([one, one], data)


@pytest.mark.parametrize(
    ("make", "data", "options", "message"),
    [
        (classifier, None, FolderOptions(), "needs data"),
        (classifier, "rows", FolderOptions(label_column="gold"), "row 1 of .* has no 'gold'"),
        (classifier, "rows", FolderOptions(text_column="prompt"), "no text in column 'prompt'"),
        (classifier, "pairs", FolderOptions(label_column="score"), "label 0.0 .row 1. is none of the 2: calm, lively"),
        (classifier, "rows", FolderOptions(sequence_length=99), "sequence_length=99 is more than the 64 positions"),
        (sentence_encoder, "rows", FolderOptions(), "spearman is of pairs|has no 'score'"),
        (sentence_encoder, "rows", FolderOptions(metric="ndcg"), "no text in column 'query'"),
        (masked_model, "rows", FolderOptions(), "cannot tell what .* 'BertForMaskedLM'"),
        (classifier, "gone", FolderOptions(), "there is no file"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    make: Any, data: str | None, options: FolderOptions, message: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", count=20)
    pairs_file(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=message):
        evaluate_folder(folder, None if data is None else tmp_path / f"{data}.jsonl", options=options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("metric", "bleu", "there is no metric 'bleu'; known: accuracy"),
        ("metric", "evaluate:", "there is no metric 'evaluate:'"),
        ("metric", "lm-eval:", "there is no metric 'lm-eval:'"),
        ("metric", "", "metric='' must be a name, or left out"),
        ("batch_size", 0, "batch_size=0 must be an integer of at least 1"),
        ("batch_size", -4, "batch_size=-4 must be an integer of at least 1"),
        ("batch_size", None, "batch_size=None must be an integer of at least 1"),
        ("sequence_length", 0, "sequence_length=0 must be an integer of at least 4"),
        ("limit", 0, "limit=0 must be an integer of at least 1"),
        ("limit", 2.5, "limit=2.5 must be an integer of at least 1"),
        ("num_fewshot", -1, "num_fewshot=-1 must be an integer of at least 0"),
        ("k", 0, "k=0 must be an integer of at least 1"),
        ("text_column", "", "text_column='' must be a name, or left out"),
        ("key", 3, "key=3 must be a name, or left out"),
    ],
)
def test_options_that_can_be_no_options_are_refused_where_they_are_made(option: str, value: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        FolderOptions(**{option: value})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


APPLIES = {  # option: an example, and the metrics that it means something for
    "text_column": ("text", {"accuracy", "perplexity", "spearman", "evaluate:x"}),
    "pair_column": ("text", {"accuracy", "spearman", "evaluate:x"}),
    "label_column": ("label", {"accuracy", "spearman", "evaluate:x"}),
    "key": ("acc", {"evaluate:x", "lm-eval:x"}),
    "sequence_length": (8, {"accuracy", "perplexity", "spearman", "ndcg", "evaluate:x", "lm-eval:x"}),
    "num_fewshot": (0, {"lm-eval:x"}),
    "k": (5, {"ndcg"}),
}


@pytest.mark.parametrize("metric", ["accuracy", "perplexity", "spearman", "ndcg", "evaluate:x", "lm-eval:x"])
@pytest.mark.parametrize("option", APPLIES)
def test_an_option_that_means_nothing_to_the_metric_is_refused_before_weights_are_read(
    metric: str, option: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 64}')  # and no weights
    value, metrics = APPLIES[option]
    with pytest.raises((DataError, CheckpointError)) as caught:
        evaluate_folder(folder, tmp_path / "gone.jsonl", options=FolderOptions(metric=metric, **{option: value}))
    told = f"{option}={value!r} is nothing to {metric!r}, leave it out; it is of "
    assert str(caught.value).startswith(told) == (metric not in metrics)


def test_all_folders_are_looked_at_before_the_first_is_measured(tmp_path: Path) -> None:
    parent, data = classifier(tmp_path / "parent"), write_rows(tmp_path / "rows.jsonl", count=20)
    told: list[str] = []
    with pytest.raises(CheckpointError, match="child holds no config.json"):
        compare_folders([parent, tmp_path / "child"], data, say=told.append)
    assert told == []


@torch.no_grad()
def test_sentence_encoders_read_as_many_tokens_as_asked(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    parent, data = sentence_encoder(tmp_path / "parent"), pairs_file(tmp_path / "pairs.jsonl")
    model, tokenizer = AutoModel.from_pretrained(parent).eval(), AutoTokenizer.from_pretrained(parent)

    def cut(text: str) -> Tensor:
        states: Tensor = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=5))[0][0]  # (T, D)
        return F.normalize(states.mean(0), dim=-1)

    cosines = [
        float(cut(a) @ cut(b)) for a, b in zip(sentences(20), sentences(20, seed=1), strict=True)
    ]  # fmt: skip
    wanted = spearmanr(cosines, [n % 5 for n in range(20)]).statistic
    found = evaluate_folder(parent, data, options=FolderOptions(sequence_length=5)).values["spearman"]
    assert found == pytest.approx(wanted, abs=1e-6) and found != evaluate_folder(parent, data).values["spearman"]
    judged = tmp_path / "judged.jsonl"
    queries, corpus = sentences(3, seed=2), sentences(12, seed=3)
    rows = [(q, d, (m + n) % 3) for m, q in enumerate(queries) for n, d in enumerate(corpus)]
    judged.write_text("\n".join(json.dumps({"query": q, "document": d, "relevance": r}) for q, d, r in rows))
    scores = torch.stack([cut(q) for q in queries]) @ torch.stack([cut(d) for d in corpus]).t()
    grades = [[(m + n) % 3 for n in range(12)] for m in range(3)]
    options = FolderOptions(metric="ndcg", sequence_length=5)
    ranked = evaluate_folder(parent, judged, options=options).values
    assert ranked == {"ndcg@10": pytest.approx(ndcg_score(grades, scores.numpy(), k=10), abs=1e-6)}


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"model_max_length": [64]}, r"has model_max_length=\[64\]; make it a number of tokens"),
    "padding": ({"pad_token": None, "eos_token": None, "unk_token": None}, "has no token for padding, nor for an end"),
}


@pytest.mark.parametrize("wrong", TOKENIZERS)
def test_a_tokenizer_that_cannot_make_batches_is_refused(tmp_path: Path, wrong: str) -> None:
    changes, said = TOKENIZERS[wrong]
    folder = classifier(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=said):
        evaluate_folder(folder, write_rows(tmp_path / "rows.jsonl"))


def test_modules_that_make_no_embeddings_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[::-1]))
    pairs = [{"sentence1": "the dog runs", "sentence2": "a cat sings", "score": number} for number in range(4)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(CheckpointError, match="makes no embeddings of texts: ") as caught:
        evaluate_folder(folder, data)
    assert "\n" not in str(caught.value)


def test_classes_that_are_no_list_are_refused(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": 1.5}))
    with pytest.raises(DataError, match="cannot tell what .* is measured by from its class ''"):
        evaluate_folder(folder, write_rows(tmp_path / "rows.jsonl"))


def test_a_folder_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", count=20)
    with pytest.raises(CheckpointError, match="holds no config.json"):
        evaluate_folder(tmp_path, data)
    with pytest.raises(CheckpointError, match="has no weights for .*, which this metric needs"):
        evaluate_folder(masked_model(tmp_path / "model"), data, options=FolderOptions(metric="accuracy"))
    with pytest.raises(CheckpointError, match="is an encoder .bert., which sees the words it would have to predict"):
        evaluate_folder(tmp_path / "model", data, options=FolderOptions(metric="perplexity"))
    broken = classifier(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="broken/model.safetensors is truncated or no safetensors file") as caught:
        evaluate_folder(broken, data)
    assert "\n" not in str(caught.value)


def test_f1_of_glue_columns(tmp_path: Path) -> None:
    parent = classifier(tmp_path / "parent")
    texts = sentences(20)
    rows = [{"sentence": text, "label": n % 2} for n, text in enumerate(texts)]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = local_metrics.SCRIPT.replace(
        '{"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}',
        '{"f1": __import__("sklearn.metrics").metrics.f1_score(references, predictions, average="macro")}',
    )
    folder = local_metrics.script_folder(tmp_path, name="macro_f1", text=script)
    found = evaluate_folder(parent, tmp_path / "dev.jsonl", options=FolderOptions(metric=f"evaluate:{folder}"))
    wanted = f1_score([n % 2 for n in range(20)], guesses(parent, texts), average="macro")
    assert list(found.values.values()) == [pytest.approx(wanted)]


def test_the_command_is_imported_without_torch_of_its_own() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "class Barred:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.split('.')[0] not in ('torch', 'transformers', 'lm_eval'), name\n"
        "import types, pathlib\n"
        "root = pathlib.Path(u.find_spec('hf_elastic').origin).parent\n"
        "package = types.ModuleType('hf_elastic'); package.__path__ = [str(root)]\n"
        "sys.modules['hf_elastic'] = package\n"
        "sys.meta_path.insert(0, Barred())\n"
        "import hf_elastic.evaluation.command\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_sentence_encoders_in_pickles_are_not_read(tmp_path: Path) -> None:
    parent, data = sentence_encoder(tmp_path / "parent"), pairs_file(tmp_path / "pairs.jsonl")
    dense = parent / "2_Dense"
    dense.mkdir()
    torch.save({"linear.weight": torch.zeros(2, 2)}, dense / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="2_Dense/pytorch_model.bin is a pickle, which is not read"):
        evaluate_folder(parent, data)
    save_file({"linear.weight": torch.zeros(2, 2)}, dense / "model.safetensors")
    assert evaluate_folder(parent, data).values["spearman"]
