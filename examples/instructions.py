"""What the instruction-tuning examples share: prompts, rows, models, and answers read out of generated text.

Rows are those of LLM-Adapters (``instruction``, ``output``, ``answer``) or of GSM8K (``question``, ``answer``). A run
keeps its checkpoints and evaluations in ``OUTPUT.work``; killed and started again with the same options, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from going_on import training_arguments as kept_arguments
from going_on import work_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

import hf_elastic as he

DATA = Path(os.environ.get("HF_ELASTIC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
Row = dict[str, Any]
Extract = Callable[[str], str]


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments of both examples."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="folder or Hub name of a LLaMA-family model")
    made.add_argument("--tiny", action="store_true", help="a random model of bytes: shows every step, learns nothing")
    made.add_argument("--output", required=True, help="folder for the result")
    made.add_argument("--data", help="training rows: .jsonl file, or a data set on the Hub (NAME or NAME:SPLIT)")
    made.add_argument("--steps", type=int, default=defaults["steps"])
    made.add_argument("--rows", type=int, default=defaults["rows"], help="training rows")
    made.add_argument("--test-rows", type=int, default=100, help="test rows of each set")
    made.add_argument("--cutoff", type=int, default=256, help="tokens of a row")
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--accumulation", type=int, default=4)
    made.add_argument("--learning-rate", type=float, default=3e-4)
    made.add_argument("--evaluations", type=int, default=defaults["evaluations"])
    made.add_argument("--seed", type=int, default=0)
    return made


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The model and its tokenizer, padding on the left as generation needs."""
    if not arguments.tiny and not arguments.model:
        raise SystemExit("pass --model NAME of a LLaMA-family model, or --tiny")
    if not arguments.tiny:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32), tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **{c: n + 2 for n, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(alphabet) + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    set_seed(arguments.seed)  # a run that goes on has the same model
    return LlamaForCausalLM(config).eval(), tokenizer


def read(source: str | Path, count: int) -> list[Row]:
    """The first rows of a file, or of a data set on the Hub."""
    path = Path(source)
    if not path.is_file() and isinstance(source, str) and path.suffix != ".jsonl":
        from datasets import load_dataset

        name, _, split = source.partition(":")
        return list(load_dataset(name, split=split or "train").take(count))
    if not path.is_file():
        raise SystemExit(f"there is no {path}; set HF_ELASTIC_DATA to a folder that has it, or give --data")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def prompt(row: Row) -> str:
    return PROMPT.format(instruction=row.get("instruction") or row["question"])


def features(tokenizer: Any, rows: Sequence[Row], *, cutoff: int) -> list[Row]:
    """Token ids of prompt and answer; only the answer is learnt."""
    found = []
    for row in rows:
        asked = tokenizer(prompt(row), add_special_tokens=False)["input_ids"]
        told = tokenizer(str(row.get("output") or row["answer"]), add_special_tokens=False)["input_ids"]
        ids = [*asked, *told, tokenizer.eos_token_id][-cutoff:]
        kept = min(len(told) + 1, len(ids))
        found.append({"input_ids": ids, "labels": [-100] * (len(ids) - kept) + ids[-kept:]})
    return found


def batches(tokenizer: Any, rows: Sequence[Row], *, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Padded batches for measuring the loss."""
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return [dict(collate(list(rows[start : start + size]))) for start in range(0, len(rows), size)]


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    """The settings of LoNAS and Shears (their README): 100 warm-up steps, or a tenth of a short run."""
    return kept_arguments(
        work_folder(arguments), steps=arguments.steps, learning_rate=arguments.learning_rate, seed=arguments.seed,
        per_device_train_batch_size=arguments.batch_size, gradient_accumulation_steps=arguments.accumulation,
        warmup_steps=min(100, arguments.steps // 10),
    )  # fmt: skip


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, rows: Sequence[Row], *, extract: Extract, tokens: int) -> float:
    """Share of rows whose generated text holds the right answer, as LLM-Adapters counts it."""
    right = 0
    for start in range(0, len(rows), 8):
        chosen = rows[start : start + 8]
        feed = tokenizer([prompt(row) for row in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
        feed = {name: value.to(model.device) for name, value in feed.items() if name != "token_type_ids"}
        ids = model.generate(**feed, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(ids[:, feed["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(extract(text) == wanted(row) for text, row in zip(texts, chosen, strict=True))
    return right / max(1, len(rows))


def wanted(row: Row) -> str:
    """The right answer: of GSM8K what stands behind ``####``."""
    return number(str(row["answer"]).rpartition("####")[2]) if "question" in row else _plain(str(row["answer"]))


def option(text: str) -> str:
    """The first option that a text names: true, false, answer2, solution1, ending3, option1."""
    found = re.search(r"\b(true|false|(?:answer|solution|ending|option)\d)\b", text.lower())
    return found[1] if found else ""


def number(text: str) -> str:
    """The last number of a text."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return _plain(found[-1]) if found else ""


def _plain(answer: str) -> str:
    """An answer in one form: 7.0 is 7."""
    try:
        return f"{float(answer):g}"
    except ValueError:
        return answer.strip().lower()


def show(supernet: he.Supernet, named: dict[str, dict[str, float]]) -> None:
    """Prints accuracies of subnets by set, with their mean."""
    sets = list(next(iter(named.values())))
    print(f"{'':24s}" + "".join(f"{name:>16s}" for name in sets) + f"{'mean':>10s}")
    for label, found in named.items():
        mean = sum(found.values()) / len(found)
        print(f"{label:24s}" + "".join(f"{found[name]:16.1%}" for name in sets) + f"{mean:10.1%}")
    print(supernet)
