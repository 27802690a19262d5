"""Conversations as examples: rendered by the tokenizer's chat template, with only the answers scored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_elastic.distillation import IGNORED_LABEL
from hf_elastic.errors import DataError

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_features(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024
) -> list[dict[str, list[int]]]:
    """Turns conversations into examples whose labels are -100 outside what the assistant says.

    A template with ``{% generation %}`` blocks says itself which tokens those are. Of another one each assistant turn
    is what the conversation up to it adds to the prompt of that turn; that both are prefixes of the whole is checked.

    Args:
        rows: with ``messages``, each with ``role`` and ``content``; other columns are left alone.
        tokenizer: unchanged; its chat template renders the conversation.
        max_length: longer conversations are cut on the right; those without any answer before the cut are left out,
            with a warning that counts them.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of each conversation, in order.

    Raises:
        DataError: there is no template, a conversation cannot be rendered or has no answer, all are left out, or the
            template rewrites earlier turns.
    """
    marked = _GENERATION.search(template_of(tokenizer)) is not None
    features: list[dict[str, list[int]]] = []
    count = 0
    for count, row in enumerate(rows, start=1):
        messages = checked_messages(row, count)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"conversation {count} has no message of role 'assistant'; write_answers() can write some")
        ids, mask = (_marked if marked else _by_prefixes)(tokenizer, messages, count)
        if any(mask[1:max_length]):
            labels = [token if scored else IGNORED_LABEL for token, scored in zip(ids, mask, strict=True)]
            whole = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            features.append({name: values[:max_length] for name, values in whole.items()})
    if not features:
        raise DataError(f"no answer of {count} conversations begins within max_length={max_length} tokens")
    if left_out := count - len(features):
        warnings.warn(
            f"{left_out} of {count} conversations are left out: no answer begins within max_length={max_length} tokens",
            stacklevel=2,
        )
    return features


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the template that the tokenizer renders conversations with.

    Raises:
        DataError: there is none.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{type(tokenizer).__name__} has no chat template; set tokenizer.chat_template, or pass rows of input_ids"
        ) from error
    return template


def checked_messages(row: Mapping[str, Any], number: int) -> Sequence[Message]:
    """Returns the messages of a conversation.

    Raises:
        DataError: they are no list of messages with a role and a content.
    """
    messages = row.get("messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"conversation {number} has no list of 'messages', only {sorted(row)}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"conversation {number} has a message without 'role' and 'content': {str(message)[:60]!r}")
    return messages


def rendered_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int, *, prompt: bool = False
) -> list[int]:
    """Token ids of a conversation; with ``prompt``, followed by what makes the assistant speak.

    Raises:
        DataError: the template refuses the conversation.
    """
    return list(_rendered(tokenizer, messages, number, add_generation_prompt=prompt)["input_ids"])


def _rendered(tokenizer: Any, messages: Sequence[Message], number: int, **options: bool) -> Mapping[str, Any]:
    """Calls ``apply_chat_template`` with ``options``."""
    try:
        found: Mapping[str, Any] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=True, **options
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the chat template cannot render conversation {number}: {reason}") from error
    return found


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them the template's generation blocks hold."""
    found = _rendered(tokenizer, messages, number, return_assistant_tokens_mask=True)
    mask = [bool(scored) for scored in found["assistant_masks"]]
    if not any(mask):
        raise DataError(f"the generation blocks of the chat template hold nothing of conversation {number}")
    return list(found["input_ids"]), mask


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them each assistant turn adds to its prompt."""
    whole = rendered_ids(tokenizer, messages, number)
    mask = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = rendered_ids(tokenizer, messages[:turn], number, prompt=True) if turn else []
        spoken = rendered_ids(tokenizer, messages[: turn + 1], number)
        if whole[: len(spoken)] != spoken or spoken[: len(prompt)] != prompt or len(spoken) == len(prompt):
            raise DataError(
                f"the chat template rewrites what stands before message {turn + 1} of conversation {number}, or its "
                "tokens; put {% generation %} blocks into it, or pass rows of input_ids and labels"
            )
        mask[len(prompt) : len(spoken)] = [True] * (len(spoken) - len(prompt))
    return whole, mask
