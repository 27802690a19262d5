"""Answers of a teacher, against a greedy loop without batches, padding or a cache of keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_elastic import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.repair import answers
from hf_elastic.repair.answers import write_answers
from hf_elastic.repair.chat import chat_features

WORDS = ["[PAD]", "<user>", "<end>", "<bot>", *(f"w{n}" for n in range(4, 61))]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
PROMPTS = ["w4 w5", "w9", "w10 w11 w12 w13", "w20 w21", "w33"]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


def teacher(family: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    """A model whose end of text is ``<end>``, which it gives early to some prompts."""
    model = tiny(family, seed=seed, eos_token_id=2, bos_token_id=1)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 4.0 if family == "gpt2" else -2.0
    return model


def greedy(model: PreTrainedModel, prompt: str, *, limit: int) -> tuple[str, bool]:
    """Appends the most likely token to the whole text again and again."""
    ids = [WORDS.index(word) for word in f"<user> {prompt} <end> <bot>".split(" ")]
    said: list[int] = []
    while len(said) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == 2:
            return " ".join(WORDS[t] for t in said if t != 0), True
        said.append(token)
    return " ".join(WORDS[t] for t in said if t != 0), False


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_what_the_teacher_finds_most_likely(family: str, batch_size: int, tmp_path: Path) -> None:
    model = teacher(family)
    rows = write_answers(
        model, tokenizer(), PROMPTS, output=tmp_path / "a.jsonl", max_new_tokens=6, batch_size=batch_size
    )
    assert len(rows) == len(PROMPTS)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        text, complete = greedy(model, prompt, limit=6)
        question, answer = row["messages"]
        assert question == {"role": "user", "content": prompt}
        assert answer == {"role": "assistant", "content": text} and row["complete"] is complete
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_some_of_these_answers_end_and_some_are_cut(family: str) -> None:
    assert {greedy(teacher(family), prompt, limit=6)[1] for prompt in PROMPTS} == {True, False}


def test_answers_are_what_a_recovery_reads(tmp_path: Path) -> None:
    rows = write_answers(teacher(), tokenizer(), PROMPTS, output=tmp_path / "a.jsonl", max_new_tokens=6)
    features = chat_features(rows, tokenizer())
    for row, feature in zip(rows, features, strict=True):
        scored = [WORDS[label] for label in feature["labels"] if label != -100]
        assert " ".join(scored) == f"{row['messages'][1]['content']} <end>".strip()


def test_conversations_are_gone_on_with_and_keep_their_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}, {"role": "user", "content": "w6"},
    ]  # fmt: skip
    made = tokenizer()
    listed = write_answers(teacher(), made, [turns], output=tmp_path / "a.jsonl", max_new_tokens=3)
    as_row = write_answers(
        teacher(), made, [{"messages": turns, "id": 7}], output=tmp_path / "b.jsonl", max_new_tokens=3
    )
    assert listed == as_row and listed[0]["messages"][:3] == turns
    assert len(listed[0]["messages"]) == 4 and len(turns) == 3


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_goes_on_and_ends_with_the_same_answers(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 2, "temperature": temperature, "seed": 3}
    whole = write_answers(teacher(), tokenizer(), PROMPTS, output=tmp_path / "whole.jsonl", **settings)
    rows, seen, parts = answers._Writer.rows, [], tmp_path / "parts.jsonl"

    def stopping(self: Any, conversations: Any, ids: Any, batch: int) -> Any:
        seen.append(batch)
        if batch == 1 and len(seen) == 2:
            raise _Killed
        return rows(self, conversations, ids, batch)

    monkeypatch.setattr(answers._Writer, "rows", stopping)
    with pytest.raises(_Killed):
        write_answers(teacher(), tokenizer(), PROMPTS, output=parts, **settings)
    with parts.open("ab") as stream:  # a row of the next batch, and half of another
        stream.write(b'{"messages": [], "complete": true}\n{"messages": [{"ro')
    torch.rand(5)  # whatever the random state that libraries share
    assert write_answers(teacher(), tokenizer(), PROMPTS, output=parts, **settings) == whole
    assert seen == [0, 1, 1, 2]
    assert parts.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert write_answers(teacher(), tokenizer(), PROMPTS, output=parts, **settings) == whole
    assert seen == [0, 1, 1, 2]  # nothing was left to do


def test_drawn_answers_are_a_function_of_the_seed_and_draw_nothing_from_the_shared_state(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> list[dict[str, Any]]:
        return write_answers(
            teacher(), tokenizer(), PROMPTS, output=tmp_path / name, max_new_tokens=6, temperature=1.0, seed=seed
        )

    state = torch.get_rng_state()
    first = drawn("a.jsonl", 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert drawn("b.jsonl", 0) == first
    assert drawn("c.jsonl", 1) != first


def test_a_file_of_other_answers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    model = teacher()
    write_answers(model, tokenizer(), PROMPTS, output=file, max_new_tokens=3)
    penal = teacher()
    penal.generation_config.repetition_penalty = 1.5
    before = file.read_bytes()
    for other, prompts, limit in (
        (teacher(seed=1), PROMPTS, 3), (model, PROMPTS[:3], 3), (model, PROMPTS, 4), (penal, PROMPTS, 3),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="another teacher, to other prompts or drawn otherwise"):
            write_answers(other, tokenizer(), prompts, output=file, max_new_tokens=limit)
    assert file.read_bytes() == before
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("mine\n")
    with pytest.raises(CheckpointError, match="was not written by write_answers"):
        write_answers(model, tokenizer(), PROMPTS, output=foreign, max_new_tokens=3)
    assert foreign.read_text() == "mine\n"


def test_the_teacher_and_the_tokenizer_are_unchanged(tmp_path: Path) -> None:
    model, made = teacher().train(), tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, padding = model.generation_config.to_json_string(), made.padding_side
    write_answers(model, made, PROMPTS, output=tmp_path / "a.jsonl", max_new_tokens=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.generation_config.to_json_string() == config and made.padding_side == padding


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]], {}, "prompt 1 ends with"),
        (["w4", {"text": "w5"}], {}, "conversation 2 has no list of 'messages'"),
        (["w4", " ".join(["w5"] * 58)], {"max_new_tokens": 4}, "prompt 2 has 61 tokens; with max_new_tokens=4"),
        (["w4"], {"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        (["w4"], {"batch_size": 1.5}, "batch_size=1.5 must be an integer"),
        (["w4"], {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        (["w4"], {"top_p": 0.0}, "top_p=0.0 within"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    prompts: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"max_new_tokens": 3, **settings}
    with pytest.raises(DataError) as caught:
        write_answers(teacher(), tokenizer(), prompts, output=tmp_path / "a.jsonl", **given)
    assert message in str(caught.value) and not list(tmp_path.iterdir())


def test_a_model_that_cannot_write_and_a_tokenizer_without_a_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot generate"):
        write_answers(tiny("bert", "sequence"), tokenizer(), PROMPTS, output=tmp_path / "a.jsonl")
    made = tokenizer()
    made.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        write_answers(teacher(), made, PROMPTS, output=tmp_path / "a.jsonl")
