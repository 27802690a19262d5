"""Answers that a teacher writes to prompts, kept as they come: what a chat model is best recovered on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.files import read_json, write_json
from hf_elastic.fingerprints import fingerprint
from hf_elastic.layers import evaluating
from hf_elastic.repair.chat import Message, checked_messages, rendered_ids, template_of
from hf_elastic.repair.features import positions_of

Prompt = str | Sequence[Message] | Mapping[str, Any]
"""A question, the messages of a conversation that the teacher goes on with, or a row with such ``messages``."""

RUN_FILE_ENDING = ".run.json"
_FORMAT = 1


@dataclass(frozen=True)
class _Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    batch_size: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise DataError(f"{name}={value!r} must be an integer of at least 1")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise DataError(f"temperature={self.temperature!r} must be at least 0, top_p={self.top_p!r} within (0, 1]")

    def arguments(self) -> dict[str, Any]:
        """What ``generate`` is asked for."""
        length = {"max_new_tokens": self.max_new_tokens}
        if not self.temperature:
            return {**length, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**length, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def write_answers(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    *,
    output: str | Path,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Lets a teacher answer prompts, and keeps the conversations as JSONL; called again, it goes on where it was.

    Distillation on what the teacher itself writes is sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947).

    Args:
        teacher: a causal language model, on the device where it is to run.
        tokenizer: unchanged; its chat template renders the prompts.
        prompts: questions, or conversations whose last message is not the assistant's.
        output: the ``.jsonl`` file. What it was made from is noted in ``<output>.run.json``.
        max_new_tokens: longest answer.
        batch_size: prompts that are answered at once.
        temperature: 0 takes the most likely token; above 0 tokens are drawn, a pure function of the seed and the
            number of the batch.
        top_p: share of the probability that tokens are drawn from.
        seed: of the draws.

    Returns:
        Per prompt ``{"messages": [..., {"role": "assistant", "content": ...}], "complete": bool}``; not complete is an
        answer that ``max_new_tokens`` cut off. Input of :func:`recover` and :func:`chat_features`.

    Raises:
        DataError: there is no prompt, one cannot be rendered or leaves no room for an answer, or a setting is out of
            range.
        CheckpointError: the file holds answers of another teacher, to other prompts or drawn otherwise.
        UnsupportedModelError: the model cannot generate.
    """
    sampling = _Sampling(max_new_tokens, batch_size, temperature, top_p, seed)
    if not teacher.can_generate():
        raise UnsupportedModelError(f"{type(teacher).__name__} cannot generate; pass a causal language model")
    template_of(tokenizer)
    conversations = [_conversation(prompt, number) for number, prompt in enumerate(prompts, start=1)]
    if not conversations:
        raise DataError("there are no prompts to answer")
    ids = [rendered_ids(tokenizer, messages, n, prompt=True) for n, messages in enumerate(conversations, start=1)]
    _check_room(teacher, ids, max_new_tokens)
    file = Path(output).expanduser()
    _claim(file, fingerprint(teacher, rest=[ids, sampling, _own_settings(teacher)]))
    writer = _Writer(teacher, tokenizer, sampling)
    done = _whole_rows(file, multiple=batch_size, total=len(ids))
    starts = range(len(done), len(ids), batch_size)
    with evaluating(teacher), torch.no_grad():
        for start in tqdm(starts, desc="answers", unit="batch", disable=None, dynamic_ncols=True):
            chosen = slice(start, start + batch_size)
            rows = writer.rows(conversations[chosen], ids[chosen], start // batch_size)
            _append(file, rows)
            done += rows
    return done


def _conversation(prompt: Prompt, number: int) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    row = prompt if isinstance(prompt, Mapping) else {"messages": list(prompt)}
    messages = [dict(message) for message in checked_messages(row, number)]
    if messages[-1]["role"] == "assistant":
        raise DataError(f"prompt {number} ends with a message of the assistant, so there is nothing to answer")
    return messages


def _own_settings(teacher: PreTrainedModel) -> list[tuple[str, Any]]:
    """What the teacher's own configuration asks of ``generate``, such as a repetition penalty."""
    config = teacher.generation_config
    found = {} if config is None else config.to_diff_dict()
    return sorted((name, value) for name, value in found.items() if name != "transformers_version")


def _check_room(teacher: PreTrainedModel, ids: Sequence[Sequence[int]], new: int) -> None:
    positions = positions_of(teacher)
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if positions is not None and len(ids[longest]) + new > positions:
        raise DataError(
            f"prompt {longest + 1} has {len(ids[longest])} tokens; with max_new_tokens={new} that is more than the "
            f"{positions} positions of the teacher"
        )


class _Writer:
    """Answers batches of prompts."""

    def __init__(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: _Sampling) -> None:
        self.teacher, self.tokenizer, self.sampling = teacher, tokenizer, sampling
        config = teacher.generation_config
        ends = config.eos_token_id if config is not None else None
        ends = tokenizer.eos_token_id if ends is None else ends
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = [int(end) for end in listed]
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (self.ends or [0])[0])

    def rows(
        self, conversations: Sequence[list[dict[str, Any]]], ids: Sequence[Sequence[int]], batch: int
    ) -> list[dict[str, Any]]:
        """Answers the prompts of one batch."""
        longest = max(map(len, ids))
        padded = torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in ids])  # (B, T)
        kept = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])  # (B, T)
        device = self.teacher.device
        with _drawing(self.sampling.seed, batch, device):
            written: Tensor = self.teacher.generate(  # type: ignore[operator]
                input_ids=padded.to(device),
                attention_mask=kept.to(device),
                pad_token_id=self.pad,
                eos_token_id=self.ends or None,
                **self.sampling.arguments(),
            )
        answers = written[:, longest:].tolist()  # (B, new)
        return [self._row(messages, tokens) for messages, tokens in zip(conversations, answers, strict=True)]

    def _row(self, messages: list[dict[str, Any]], tokens: list[int]) -> dict[str, Any]:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        answer = {"role": "assistant", "content": str(text).strip()}
        return {"messages": [*messages, answer], "complete": end is not None}


@contextmanager
def _drawing(seed: int, batch: int, device: torch.device) -> Iterator[None]:
    """Inside, what ``generate`` draws is a function of the seed and the batch; outside, nothing was drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        fresh = torch.Generator().manual_seed(seed * 1_000_003 + batch)
        torch.set_rng_state(fresh.get_state())
        if devices:
            own = torch.Generator(device).manual_seed(seed * 1_000_003 + batch)
            torch.cuda.set_rng_state(own.get_state(), device)
        yield


def _claim(file: Path, identity: str) -> None:
    """Notes what the file is made from, or refuses one that is made from something else."""
    note = file.with_name(file.name + RUN_FILE_ENDING)
    if not note.is_file():
        if file.exists():
            raise CheckpointError(f"{file} exists and was not written by write_answers; give another file")
        write_json(note, {"format": _FORMAT, "fingerprint": identity})
    elif read_json(note).get("fingerprint") != identity:
        raise CheckpointError(
            f"{file} holds answers of another teacher, to other prompts or drawn otherwise; give another file, or "
            f"delete it and {note.name}"
        )


def _whole_rows(file: Path, *, multiple: int, total: int) -> list[dict[str, Any]]:
    """Rows of whole batches; what a killed process left behind them is cut off."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # behind the last newline is nothing, or half a row
    whole = len(lines) if len(lines) == total else len(lines) // multiple * multiple
    kept = lines[:whole]
    os.truncate(file, sum(len(line) + 1 for line in kept))
    try:
        return [json.loads(line) for line in kept]
    except ValueError as error:
        raise CheckpointError(f"{file} holds a row that is no JSON: {error}; delete it to start again") from error


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with file.open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
