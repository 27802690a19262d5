"""Parent and child side by side say what transformers says of each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from recorded_runs import Make
from tiny_checkpoints import LABELS
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hf_elastic import ElasticConfig, export, make_elastic
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.reporting import try_models

CONFIG = ElasticConfig(intermediate_size=[0.25, 1.0], num_attention_heads=None, skip=["mlp"], loadability="any")


def exported(parent: Path, auto: type, child: Path) -> Path:
    supernet = make_elastic(auto.from_pretrained(parent), CONFIG)  # type: ignore[attr-defined]
    export(supernet, supernet.space.smallest(), child, loadability="remote-code")
    return child


def told(text: str, side: str) -> str:
    found = re.search(rf"^  {side} +(.*)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_causal_models_go_on_greedily(tmp_path: Path) -> None:
    parent = tiny_checkpoints.language_model(tmp_path / "parent")
    child = exported(parent, AutoModelForCausalLM, tmp_path / "child")
    text = try_models(child, prompts=["the cat"], new_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    for side, folder in (("parent", parent), ("smaller", child)):
        model, made = AutoModelForCausalLM.from_pretrained(folder).eval(), ids
        for _ in range(6):  # the oracle: the likeliest token, six times
            made = torch.cat([made, model(made).logits[:, -1:].argmax(-1)], dim=1)
        line = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).splitlines()[0]
        assert told(text, side).strip() == line.strip()
    assert re.search(r"smaller +[\d.]+ k \(\d\d%\) +0\.\d MB +[\d.]+ ms +[\d.]+x", text)
    assert text.count("(6 tokens, ") == 2


def test_encoders_tell_the_cosine_of_each_pair(tmp_path: Path) -> None:
    parent = tiny_checkpoints.sentence_encoder(tmp_path / "parent")
    child = exported(parent, AutoModel, tmp_path / "child")
    pair = ("The cat sleeps.", "A young dog runs today.")
    text = try_models(child, prompts=pair)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    for side, folder in (("parent", parent), ("smaller", child)):
        model = AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            means = [model(**tokenizer(one, return_tensors="pt")).last_hidden_state[0].mean(0) for one in pair]
        cosine = float(torch.cosine_similarity(means[0], means[1], dim=0))
        assert float(told(text, side).removeprefix("cosine ")) == pytest.approx(cosine, abs=1.1e-4)
    three = try_models(child, prompts=[*pair, "We hear the horse."])
    assert len(re.findall(r"  cosine -?\d", three)) == 6


def test_masked_models_fill_the_mask(tmp_path: Path) -> None:
    parent = tiny_checkpoints.masked_model(tmp_path / "parent")
    child = exported(parent, AutoModelForMaskedLM, tmp_path / "child")
    text = try_models(child, prompts=["the [MASK] runs"])
    tokenizer = AutoTokenizer.from_pretrained(parent)
    inputs = tokenizer("the [MASK] runs", return_tensors="pt")
    logits = AutoModelForMaskedLM.from_pretrained(child).eval()(**inputs).logits[0, 2]
    best = logits.softmax(-1).max()
    assert told(text, "smaller").startswith(f"{tokenizer.decode([int(logits.argmax())]).strip()} {best:.1%}, ")
    with pytest.raises(DataError, match=r"'no hole' holds no \[MASK\]"):
        try_models(child, prompts=["no hole"])


def ranked(chances: torch.Tensor) -> str:
    return ", ".join(f"{LABELS[n]} {chances[n]:.1%}" for n in chances.argsort().flip(0).tolist())


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, lambda logits: ranked(logits.softmax(-1))),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, lambda logits: f"{logits[0]:.4f}"),
        ({"problem_type": "regression"}, lambda logits: ", ".join(f"{number:.4f}" for number in logits)),
        ({"problem_type": "multi_label_classification"}, lambda logits: ranked(logits.sigmoid())),
    ],
)
def test_classifiers_tell_labels_or_numbers_of_a_text_and_of_two(
    changes: dict[str, Any], shown: Callable[[torch.Tensor], str], tmp_path: Path
) -> None:
    parent = tiny_checkpoints.classifier(tmp_path / "parent", **changes)
    child = exported(parent, AutoModelForSequenceClassification, tmp_path / "child")
    pair = ("The cat sleeps.", "A young dog runs today.")
    tokenizer, found = AutoTokenizer.from_pretrained(parent), []
    for given in ((pair[0],), pair):
        text = try_models(child, prompts=[given if len(given) == 2 else given[0]])
        assert "\n".join(map(repr, given)) in text
        for side, folder in (("parent", parent), ("smaller", child)):
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            with torch.no_grad():
                logits = model(**tokenizer(*given, return_tensors="pt")).logits[0]
            assert told(text, side) == shown(logits)
        found.append(told(text, "parent"))
    assert found[0] != found[1]


def test_the_segments_that_bert_tells_apart_are_given(tmp_path: Path) -> None:
    parent = tiny_checkpoints.classifier(tmp_path / "parent", id2label={0: "score"}, label2id={"score": 0})
    plain = tiny_checkpoints.bert_tokenizer()
    backend = plain._tokenizer
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, **plain.special_tokens_map
    ).save_pretrained(parent)
    model = AutoModelForSequenceClassification.from_pretrained(parent).eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1].normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(parent)
    child, pair = exported(parent, AutoModelForSequenceClassification, tmp_path / "child"), ("the cat", "the dog")
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(parent)(*pair, return_tensors="pt")
        assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
        wanted, blind = float(model(**batch).logits), float(model(input_ids=batch["input_ids"]).logits)
    assert abs(wanted - blind) > 1e-3
    assert told(try_models(child, prompts=[pair]), "parent") == f"{wanted:.4f}"


def test_two_texts_are_for_models_that_take_two(tmp_path: Path) -> None:
    child = exported(tiny_checkpoints.masked_model(tmp_path / "parent"), AutoModelForMaskedLM, tmp_path / "child")
    with pytest.raises(DataError, match=r"masked-lm needs a text with a \[MASK\], got 1 prompts"):
        try_models(child, prompts=[("the [MASK] runs", "the [MASK] sleeps")])


def test_no_code_of_a_checkpoint_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = exported(tiny_checkpoints.sentence_encoder(tmp_path / "parent"), AutoModel, tmp_path / "child")
    given: list[object] = []
    load = AutoTokenizer.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        given.append(options.get("trust_remote_code"))
        return load(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    try_models(child, prompts=["a", "b"])
    assert given and set(given) == {False}


@pytest.mark.slow
def test_adapters_are_put_onto_their_base(made: Make) -> None:
    text = try_models(made("adapters"), prompts=["the dog runs"])
    assert re.search(r"^  smaller  (calm|lively) \d\d\.\d%", text, re.MULTILINE)
    assert told(text, "parent") != told(text, "smaller")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    parent = tiny_checkpoints.sentence_encoder(tmp_path / "parent")
    child = exported(parent, AutoModel, tmp_path / "child")
    with pytest.raises(DataError, match="embedding needs two sentences, as --pair A B"):
        try_models(child, prompts=["one"])
    with pytest.raises(
        CheckpointError, match=r"the parent is not to be had: cannot load .nobody/nothing.*; give --parent FOLDER"
    ):
        try_models(child, parent="nobody/nothing", prompts=["a", "b"])
    shutil.move(parent, tmp_path / "moved")
    with pytest.raises(CheckpointError, match="give --parent FOLDER"):
        try_models(child, prompts=["a", "b"])
    assert "cosine" in try_models(child, parent=str(tmp_path / "moved"), prompts=["a", "b"])
    (child / "architecture.json").unlink()
    with pytest.raises(CheckpointError, match="says what its parent is; give --parent FOLDER"):
        try_models(child, prompts=["a", "b"])
    with pytest.raises(CheckpointError, match="holds no config.json"):
        try_models(tmp_path, prompts=["a", "b"])


def test_a_parent_without_the_weights_of_the_task_says_so(tmp_path: Path) -> None:
    child = exported(tiny_checkpoints.masked_model(tmp_path / "teacher"), AutoModelForMaskedLM, tmp_path / "child")
    encoder = tiny_checkpoints.sentence_encoder(tmp_path / "encoder")
    text = try_models(child, parent=str(encoder), prompts=["the [MASK] runs"])
    assert told(text, "parent") == "has no weights for this task" and "%" in told(text, "smaller")
