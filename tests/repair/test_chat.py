"""Which tokens of a conversation are scored, against masks written by hand and small templates."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_elastic import DataError
from hf_elastic.repair.chat import chat_features

KNOWN = "[PAD] [UNK] <user> <bot> <system> <end> hi there how are you fine thanks bye"
WORDS = KNOWN.split(" ")
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools\\nhere') }}{% endif %}"
    "{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<system>'}[m['role']] }} {{ m['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {% generation %}{{ m['content'] }} <end>"
    "{% endgeneration %} {% else %}<user> {{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
# What reasoning models do: only the last answer keeps its whole text.
REWRITING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} <end> {% elif loop.last %}"
    "<bot> {{ m['content'] }} <end> {% else %}<bot> {{ m['content'].split(' ')[-1] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    made.chat_template = template
    return made


def said(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TWO_TURNS = said(("user", "hi there"), ("assistant", "hi how are you"), ("user", "fine"), ("assistant", "thanks bye"))
WHOLE = "<user> hi there <end> <bot> hi how are you <end> <user> fine <end> <bot> thanks bye <end>"
SCORED = [0] * 5 + [1] * 5 + [0] * 4 + [1] * 3


def check(feature: dict[str, list[int]], text: str, scored: list[int]) -> None:
    words = text.split(" ")
    assert [WORDS[token] for token in feature["input_ids"]] == words
    assert feature["attention_mask"] == [1] * len(words)
    wanted = [WORDS.index(word) if kept else -100 for word, kept in zip(words, scored, strict=True)]
    assert feature["labels"] == wanted


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_is_scored(template: str) -> None:
    (feature,) = chat_features([TWO_TURNS], tokenizer(template))
    check(feature, WHOLE, SCORED)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("length", [6, 10, 12, 17, 18])
def test_long_conversations_are_cut_on_the_right(template: str, length: int) -> None:
    (feature,) = chat_features([TWO_TURNS], tokenizer(template), max_length=length)
    check(feature, " ".join(WHOLE.split(" ")[:length]), SCORED[:length])


def test_a_conversation_cut_before_its_first_answer_is_left_out_with_a_warning() -> None:
    short = said(("user", "hi"), ("assistant", "bye"))
    with pytest.warns(UserWarning, match=r"1 of 2 conversations are left out: no answer begins within max_length=5"):
        (feature,) = chat_features([TWO_TURNS, short], tokenizer(PLAIN), max_length=5)
    check(feature, "<user> hi <end> <bot> bye", [0, 0, 0, 0, 1])
    with pytest.raises(DataError, match="no answer of 1 conversations begins within max_length=4"):
        chat_features([TWO_TURNS], tokenizer(PLAIN), max_length=4)


def test_system_prompts_and_users_after_the_last_answer_are_not_scored() -> None:
    row = said(("system", "how"), ("user", "hi"), ("assistant", "bye"), ("user", "thanks"))
    (feature,) = chat_features([row], tokenizer(PLAIN))
    check(feature, "<system> how <end> <user> hi <end> <bot> bye <end> <user> thanks <end>",
          [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0])  # fmt: skip


def test_the_same_words_of_user_and_assistant_are_told_apart_by_place() -> None:
    (feature,) = chat_features([said(("user", "hi"), ("assistant", "hi"))], tokenizer(PLAIN))
    check(feature, "<user> hi <end> <bot> hi <end>", [0, 0, 0, 0, 1, 1])


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_the_answers() -> None:
    with pytest.raises(DataError, match=r"rewrites what stands before message 2 of conversation 2.*generation"):
        chat_features([said(("user", "hi"), ("assistant", "bye")), TWO_TURNS], tokenizer(REWRITING))
    marked = re.sub(r"<bot> (\{\{.*?\}\} <end>)", r"<bot> {% generation %}\1{% endgeneration %}", REWRITING)
    assert marked.count("{% generation %}") == 2
    (feature,) = chat_features([TWO_TURNS], tokenizer(marked))
    text = "<user> hi there <end> <bot> you <end> <user> fine <end> <bot> thanks bye <end>"
    check(feature, text, [0] * 5 + [1, 1] + [0] * 4 + [1] * 3)


def test_a_generation_block_that_holds_nothing_of_a_conversation_is_refused() -> None:
    empty = PLAIN + "{% if messages[0]['content'] == 'fine' %}{% generation %}bye{% endgeneration %}{% endif %}"
    rows = [said(("user", "fine"), ("assistant", "bye")), said(("user", "hi"), ("assistant", "bye"))]
    with pytest.raises(DataError, match="hold nothing of conversation 2"):
        chat_features(rows, tokenizer(empty))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said(("user", "hi")), "conversation 1 has no message of role 'assistant'"),
        ({"messages": []}, "conversation 1 has no list of 'messages'"),
        ({"text": "hi"}, "no list of 'messages', only ['text']"),
        ({"messages": "hi"}, "no list of 'messages'"),
        ({"messages": [{"role": "user"}]}, "without 'role' and 'content'"),
        ({"messages": ["hi"]}, "without 'role' and 'content'"),
        (said(("tool", "hi"), ("assistant", "bye")), "cannot render conversation 1"),
    ],
)
def test_what_is_no_conversation_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        chat_features([row], tokenizer(PLAIN))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="has no chat template; set tokenizer.chat_template"):
        chat_features([TWO_TURNS], tokenizer(None))


def test_rows_and_tokenizer_are_left_alone() -> None:
    made = tokenizer(PLAIN)
    row = said(("user", "hi"), ("assistant", "bye"))
    before, template = str(row), made.chat_template
    chat_features([row], made)
    assert str(row) == before and made.chat_template == template
