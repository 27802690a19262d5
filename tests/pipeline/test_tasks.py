from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
import transformers
from tiny_checkpoints import options, sentences, write_rows, write_text
from transformers import AutoTokenizer

from hf_elastic import CheckpointError, CompressOptions, DataError, ElasticError, UnsupportedModelError
from hf_elastic.pipeline.tasks import (
    Task,
    TaskData,
    load_model,
    load_tokenizer,
    load_with_classifier,
    resolve_task,
)
from hf_elastic.pipeline.texts import read_rows

Find = Callable[[str], Path]


def prepared(given: CompressOptions) -> tuple[Task, TaskData]:
    task = resolve_task(given)
    rows = read_rows(given.data, text_column=given.text_column)
    return task, task.prepare(load_tokenizer(given), rows, given)


def copied(checkpoint: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other entries in its config.json."""
    shutil.copytree(checkpoint, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


QUALITY = {
    "embedding": ("structure", "cosine"), "masked-lm": ("perplexity",), "causal-lm": ("perplexity",),
    "classification": ("accuracy",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [(name, name) for name in QUALITY]
    + [("gpt2", "causal-lm"), ("decoder-classification", "classification"), ("gpt2-classification", "classification")],
)
def test_the_checkpoint_says_what_it_is_for(checkpoint: Find, data: Find, tmp_path: Path, kind: str, name: str) -> None:
    task = resolve_task(options(checkpoint(kind), data(kind), tmp_path / "out"))
    assert (task.name, task.quality) == (name, QUALITY[name])


def test_a_base_model_is_an_encoder_of_sentences(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    folder = copied(checkpoint("embedding"), tmp_path / "plain")
    (folder / "modules.json").unlink()
    assert resolve_task(options(folder, data("embedding"), tmp_path / "out")).name == "embedding"


def test_weights_of_other_shapes_than_the_config_says_are_named(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    own = json.loads((checkpoint("causal-lm") / "config.json").read_text())["intermediate_size"]
    folder = copied(checkpoint("causal-lm"), tmp_path / "lie", intermediate_size=own // 2)
    given = options(folder, data("causal-lm"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"proj.weight is of shape \[.*{own}.*\], its config says \[") as caught:
        load_model(resolve_task(given), given)
    assert "\n" not in str(caught.value)


def test_a_relative_path_that_is_no_folder_is_said_to_be_none(data: Find, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load 'm/nope', which is no folder here: "):
        resolve_task(options(Path("m/nope"), data("causal-lm"), tmp_path / "out"))


def test_no_code_of_a_checkpoint_is_asked_for_or_run(
    checkpoint: Find, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word on it transformers asks at the terminal whether the code may run."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    own = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config"}}
    folder = copied(checkpoint("classification"), tmp_path / "own", **own)
    (folder / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(CheckpointError, match="cannot load .*own"):
        resolve_task(options(folder, data("classification"), tmp_path / "out"))
    assert asked == []
    given: list[object] = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification"):
        auto = getattr(transformers, name)

        def noted(*args: Any, load: Any = auto.from_pretrained, **more: Any) -> Any:
            given.append(more.get("trust_remote_code"))
            return load(*args, **more)

        monkeypatch.setattr(auto, "from_pretrained", noted)
    known = options(checkpoint("classification"), data("classification"), tmp_path / "out")
    task = resolve_task(known)
    load_tokenizer(known)
    load_model(task, known)
    load_with_classifier(str(checkpoint("embedding")), ["a", "b", "c"], seed=0)
    assert len(given) >= 4 and set(given) == {False}


@pytest.mark.parametrize(("pooling", "found"), [("mean", "mean"), ("cls", "cls")])
def test_pooling_is_read_off_the_modules(tmp_path: Path, data: Find, pooling: str, found: str) -> None:
    folder = tiny_checkpoints.sentence_encoder(tmp_path / "encoder", pooling=pooling)
    assert resolve_task(options(folder, data("embedding"), tmp_path / "out")).pooling == found


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "mean"])
def test_pooling_is_read_in_the_newer_spelling_too(checkpoint: Find, tmp_path: Path, data: Find, mode: str) -> None:
    folder = copied(checkpoint("embedding"), tmp_path / "encoder")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode, "include_prompt": True}))
    task = resolve_task(options(folder, data("embedding"), tmp_path / "out"))
    assert task.pooling == ("last" if mode == "lasttoken" else mode)


@pytest.mark.parametrize("modes", [["max_tokens"], ["mean_tokens", "max_tokens"], ["mean_tokens", "cls_token"]])
def test_another_pooling_is_refused(checkpoint: Find, tmp_path: Path, data: Find, modes: list[str]) -> None:
    folder = copied(checkpoint("embedding"), tmp_path / "encoder")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True for mode in modes}))
    with pytest.raises(UnsupportedModelError, match="pools tokens by"):
        resolve_task(options(folder, data("embedding"), tmp_path / "out"))
    joined = {"pooling_mode": [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes]}  # newer files
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(joined))
    with pytest.raises(UnsupportedModelError, match="pools tokens by"):
        resolve_task(options(folder, data("embedding"), tmp_path / "out"))


@pytest.mark.parametrize("kind", ["embedding", "masked-lm", "causal-lm", "classification", "decoder-classification"])
def test_validation_examples_are_never_trained_on(checkpoint: Find, data: Find, tmp_path: Path, kind: str) -> None:
    task, made = prepared(options(checkpoint(kind), data(kind), tmp_path / "out"))
    held = sum(len(batch["input_ids"]) for batch in made.validation)
    assert held >= 8 and held == (len(made.train) + held) // 5
    if task.name == "embedding":
        trained = {tuple(feature["input_ids"]) for feature in made.train}
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(kind))
        for sentence in made.held_out:
            assert tuple(tokenizer(sentence, truncation=True, max_length=24)["input_ids"]) not in trained


@pytest.mark.parametrize("kind", ["embedding", "masked-lm", "causal-lm", "classification", "decoder-classification"])
def test_the_same_options_give_the_same_batches(checkpoint: Find, data: Find, tmp_path: Path, kind: str) -> None:
    given = options(checkpoint(kind), data(kind), tmp_path / "out")
    torch.rand(3)  # whatever the random state that libraries share
    one, other = prepared(given)[1], prepared(given)[1]
    pairs = zip([*one.validation, *one.calibration], [*other.validation, *other.calibration], strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    assert one.train == other.train
    assert prepared(options(checkpoint(kind), data(kind), tmp_path / "out", seed=1))[1].train != one.train


def test_sentences_are_padded_to_the_right_and_cut_to_length(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    made = prepared(options(checkpoint("embedding"), data("embedding"), tmp_path / "out", sequence_length=8))[1]
    lengths = [batch["attention_mask"].sum(1) for batch in made.validation]
    assert torch.cat(lengths).tolist() == sorted(torch.cat(lengths).tolist())  # little padding
    for batch in made.validation:
        assert batch["input_ids"].shape[1] <= 8
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        assert (batch["input_ids"][:, 0] == 2).all()


def test_a_language_model_reads_the_text_in_blocks_without_gaps(checkpoint: Find, tmp_path: Path) -> None:
    text = " ".join(sentences(120))
    (tmp_path / "t.txt").write_text(text)
    made = prepared(options(checkpoint("causal-lm"), tmp_path / "t.txt", tmp_path / "out", sequence_length=16))[1]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("causal-lm"))
    stream = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    blocks = [feature["input_ids"] for feature in made.train] + [
        row for batch in made.validation for row in batch["input_ids"].tolist()
    ]
    assert sorted(blocks) == sorted(stream[i : i + 16] for i in range(0, len(stream) - 15, 16))
    batch = made.collate(made.train[:2])
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["attention_mask"].all()


def test_masks_are_a_function_of_the_batch(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    made = prepared(options(checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out"))[1]
    first, again = made.collate(made.train[:8]), made.collate(made.train[:8])
    assert all(torch.equal(first[name], again[name]) for name in first)
    among_others = made.collate(made.train[4:12])
    assert not torch.equal(first["labels"][4:], among_others["labels"][:4])
    assert 0.02 < float((first["labels"] != -100).float().mean()) < 0.4


def test_labels_are_known_by_name_and_by_number(checkpoint: Find, tmp_path: Path) -> None:
    texts = sentences(60)
    by_name = [{"body": text, "mood": ("calm", "lively")[n % 2]} for n, text in enumerate(texts)]
    by_number = [{"body": text, "mood": (0, "1")[n % 2]} for n, text in enumerate(texts)]
    found = []
    for name, rows in (("names", by_name), ("numbers", by_number)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        columns = {"text_column": "body", "label_column": "mood"}
        found.append(prepared(options(checkpoint("classification"), file, tmp_path / "out", **columns))[1].train)
    assert found[0] == found[1]
    assert {feature["labels"] for feature in found[0]} == {0, 1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_without_a_token_for_padding_classifies_batches_as_it_does_rows(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoints.decoder_classifier(tmp_path / "model", family)
    given = options(folder, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", sequence_length=64)
    task, made = prepared(given)
    model = load_model(task, given)
    batch = made.collate(made.train[:6])
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = torch.cat([model(torch.tensor([f["input_ids"]])).logits for f in made.train[:6]])
    assert torch.allclose(together, alone, atol=1e-5)


def test_weights_on_disk_in_bf16_are_loaded_in_fp32(data: Find, tmp_path: Path) -> None:
    folder = tiny_checkpoints.sentence_encoder(tmp_path / "encoder")
    task_options = options(folder, data("embedding"), tmp_path / "out")
    task = resolve_task(task_options)
    load_model(task, task_options).bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load_model(task, task_options).parameters()} == {torch.float32}


def test_an_encoder_may_lack_the_pooler(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    given = options(checkpoint("masked-lm"), data("embedding"), tmp_path / "out", task="embedding")
    assert type(load_model(resolve_task(given), given)).__name__ == "BertModel"


def _given(tmp_path: Path, checkpoint: Find, case: str) -> CompressOptions:
    """Options that each break one thing."""
    text, rows = write_text(tmp_path / "t.txt"), write_rows(tmp_path / "r.jsonl")
    encoder, out = checkpoint("embedding"), tmp_path / "out"
    if case == "no tokenizer":
        folder = copied(encoder, tmp_path / "bare")
        for file in folder.glob("tokenizer*"):
            file.unlink()
        return options(folder, text, out)
    if case == "the tokenizer of a larger model":
        folder = copied(checkpoint("causal-lm"), tmp_path / "mixed")
        shutil.copyfile(encoder / "config.json", folder / "config.json")
        shutil.copyfile(encoder / "model.safetensors", folder / "model.safetensors")
        return options(folder, text, out)
    if case == "an empty row":
        (tmp_path / "r.jsonl").write_text(rows.read_text() + '\n{"text": "", "label": 0}')
        return options(checkpoint("gpt2-classification"), rows, out)
    if case == "no mask token":
        folder = copied(checkpoint("masked-lm"), tmp_path / "unmasked")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("mask_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return options(folder, text, out)
    if case == "an unknown label":
        (tmp_path / "r.jsonl").write_text(rows.read_text() + '\n{"text": "what is this then", "label": "angry"}')
        return options(checkpoint("classification"), rows, out)
    if case == "a label beyond the last":
        (tmp_path / "r.jsonl").write_text(rows.read_text() + '\n{"text": "what is this then", "label": 2}')
        return options(checkpoint("classification"), rows, out)
    config: dict[str, dict[str, Any]] = {
        "an unknown type": {"model_type": "nonsense"},
        "a type without a family": {"model_type": "opt"},
        "a config that is none": {"hidden_size": "wide"},
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "an unknown class": {"architectures": ["BertForTranslation"]},
    }
    if case in config:
        folder = copied(encoder, tmp_path / "changed", **config[case])
        (folder / "modules.json").unlink()
        return options(folder, text, out)
    return {
        "no folder": options(tmp_path / "nowhere", text, out),
        "more tokens than positions": options(encoder, text, out, sequence_length=65),
        "too little text": options(encoder, write_text(tmp_path / "short.txt", count=20), out),
        "too little for blocks": options(checkpoint("masked-lm"), text, out, sequence_length=64),
        "no column of labels": options(checkpoint("classification"), rows, out, label_column="mood"),
        "a decoder asked for masks": options(checkpoint("causal-lm"), text, out, task="masked-lm"),
        "an encoder asked to go on": options(checkpoint("masked-lm"), text, out, task="causal-lm"),
    }[case]


BAD: list[tuple[str, type[ElasticError], str]] = [
    ("no folder", CheckpointError, "nowhere"),
    ("an unknown type", CheckpointError, "nonsense"),
    ("a type without a family", UnsupportedModelError, "'opt'.*bert, distilbert"),
    ("a config that is none", CheckpointError, "hidden_size"),
    ("quantised", UnsupportedModelError, "quantised .gptq."),
    ("an unknown class", UnsupportedModelError, "BertForTranslation.*set task"),
    ("more tokens than positions", DataError, "sequence_length=65 .* at most 64"),
    ("too little text", DataError, "at least 40"),
    ("too little for blocks", DataError, "blocks of 64 tokens, at least 40"),
    ("no tokenizer", CheckpointError, "holds no tokenizer"),
    ("the tokenizer of a larger model", CheckpointError, "its model knows"),
    ("an empty row", DataError, "gives no token"),
    ("no mask token", DataError, "no mask token"),
    ("no column of labels", DataError, "'mood'.*label.*text"),
    ("an unknown label", DataError, "'angry'.*calm, lively"),
    ("a label beyond the last", DataError, "label 2 is none of the model's 2"),
    ("a decoder asked for masks", UnsupportedModelError, "set task='causal-lm'"),
    ("an encoder asked to go on", UnsupportedModelError, "set task='masked-lm'"),
]


@pytest.mark.parametrize(("case", "error", "words"), BAD, ids=[case for case, _, _ in BAD])
def test_what_cannot_be_prepared_is_named_in_one_line(
    checkpoint: Find, tmp_path: Path, case: str, error: type[ElasticError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        prepared(_given(tmp_path, checkpoint, case))
    assert "\n" not in str(caught.value)


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


WEIGHTS: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[ElasticError]]] = {
    "truncated": (_truncated, {}, CheckpointError),
    "foreign": (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors " * 9), {}, CheckpointError),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), {}, CheckpointError),
    "without a classifier": (lambda folder: None, {"task": "classification"}, UnsupportedModelError),
    "without an output head": (lambda folder: None, {"task": "masked-lm"}, UnsupportedModelError),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used_are_named_in_one_line(
    checkpoint: Find, data: Find, tmp_path: Path, case: str
) -> None:
    damage, changes, error = WEIGHTS[case]
    folder = copied(checkpoint("embedding"), tmp_path / "encoder")
    damage(folder)
    given = options(folder, data("embedding"), tmp_path / "out", **changes)
    with pytest.raises(error, match="encoder") as caught:
        load_model(resolve_task(given), given)
    assert "\n" not in str(caught.value)


def test_roberta_has_fewer_positions_than_its_table_has_rows(tmp_path: Path, data: Find) -> None:
    from transformers import RobertaConfig, RobertaModel

    settings = {**tiny_checkpoints.BERT, "pad_token_id": 1}
    model = tiny_checkpoints.seeded(lambda: RobertaModel(RobertaConfig(**settings)))
    folder = tiny_checkpoints.saved(tmp_path / "roberta", model, tiny_checkpoints.bert_tokenizer())
    assert resolve_task(options(folder, data("embedding"), tmp_path / "out", sequence_length=62)).name == "embedding"
    with torch.no_grad():
        assert model(torch.full((1, 62), 5))[0].shape == (1, 62, 32)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 63), 5))
    with pytest.raises(DataError, match="at most 62"):
        resolve_task(options(folder, data("embedding"), tmp_path / "out", sequence_length=63))
