"""Perplexity of small real LLaMA models as parent, cut without training, and after training the supernet.

    python benchmarks/stories.py [--models stories260K babyllama105] [--steps 400] [--json FILE]

Elastic: FFN width, key/value groups, and (in all layers but the first and the last) skips. The subnet to find may have
``--within`` of the parent's parameters without embeddings. Training, sorting and search see text of the training split
only; perplexities are those of TinyStories' validation pieces, each cut to the model's context.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llama2c_tokenizer import Llama2cTokenizer
from measuring import print_table, started, write_json
from torch import Tensor
from transformers import LlamaForCausalLM, PrinterCallback, TrainingArguments

import hf_elastic as he

IGNORED = -100
SHORTEST = 8  # tokens of a piece that counts, as where the documented perplexities were measured
STORY_BORDER = r"\n+(?=Once upon a time|One day, (?:a|there)|Once there )"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A checkpoint of the data folder, the perplexity that its README documents, and a learning rate for it."""

    documented: float
    pieces: int | None
    learning_rate: float

    def validation(self, folder: Path, *, pieces: int | None = None) -> list[str]:
        """The pieces of the validation text that the documented perplexity belongs to, or fewer."""
        text = (folder / "tinystories" / "valid_even.txt").read_text(encoding="utf-8")
        found = [piece.strip() for piece in text.split("<|endoftext|>")]
        return [piece for piece in found if piece][: pieces or self.pieces]


MODELS = {"stories260K": Model(4.59, None, 3e-3), "babyllama105": Model(1.74, 200, 1e-3)}


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--data``, by default HF_ELASTIC_DATA or ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HF_ELASTIC_DATA", beside)))


def checked_data(folder: Path) -> Path:
    """Returns the data folder, or ends the script with a line that says what is missing."""
    needed = ["tinystories/valid_even.txt", "tinystories/train_944k.txt", *(f"{name}/hf" for name in MODELS)]
    if missing := [name for name in needed if not (folder / name).exists()]:
        print(f"nothing measured: {folder} has no {', '.join(missing)}; pass --data or set HF_ELASTIC_DATA")
        sys.exit(0)
    return folder


def load_parent(folder: Path, name: str) -> tuple[LlamaForCausalLM, Llama2cTokenizer]:
    """Loads a checkpoint of the data folder with its tokenizer."""
    source = folder / name / "hf"
    return LlamaForCausalLM.from_pretrained(source).eval(), Llama2cTokenizer.load(source)


def windows(tokenizer: Llama2cTokenizer, pieces: Sequence[str], *, length: int) -> list[list[int]]:
    """Token ids of every piece, cut to ``length``; too short ones are left out."""
    encoded = (tokenizer.encode(piece)[:length] for piece in pieces)
    return [ids for ids in encoded if len(ids) >= SHORTEST]


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Pads to the right, which a causal model cannot see, and leaves padding and first tokens out of the loss."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
    labels = torch.full((len(rows), longest), IGNORED)  # (B, T)
    for number, line in enumerate(rows):
        tokens = torch.tensor(line["input_ids"])
        ids[number, : len(tokens)] = tokens
        labels[number, 1 : len(tokens)] = tokens[1:]
    return {"input_ids": ids, "labels": labels}


def batches_of(encoded: Sequence[list[int]], *, size: int = 16) -> list[Batch]:
    """Batches of rows of similar length."""
    ordered = sorted(encoded, key=len)
    return [collate([{"input_ids": ids} for ids in ordered[s : s + size]]) for s in range(0, len(ordered), size)]


def perplexity(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Perplexity per predicted token over all batches."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            counted = int((batch["labels"] != IGNORED).sum())
            total += float(model(**batch).loss) * counted
            count += counted
    return math.exp(min(total / count, 700.0))


def measured_perplexity(model: LlamaForCausalLM, tokenizer: Llama2cTokenizer, pieces: Sequence[str]) -> float:
    """Perplexity of a model on pieces of text, each cut to its context."""
    length = model.config.max_position_embeddings
    return perplexity(model, batches_of(windows(tokenizer, pieces, length=length)))


@dataclass(frozen=True)
class Texts:
    """Encoded text of one model: to train on, to calibrate and search with (both unseen in training), to report."""

    train: list[list[int]]
    calibration: list[Batch]
    search: list[Batch]
    validation: list[Batch]


def prepare(folder: Path, model: Model, parts: tuple[LlamaForCausalLM, Llama2cTokenizer], options: Any) -> Texts:
    """Cuts the training text into stories and sets the last of them apart for the search."""
    parent, tokenizer = parts
    context = parent.config.max_position_embeddings
    text = (folder / "tinystories" / "train_944k.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in re.split(STORY_BORDER, text)][: options.stories]
    held = max(4, len(stories) // 20)
    length = min(context, options.tokens)
    train = windows(tokenizer, stories[:-held], length=length)
    search = windows(tokenizer, stories[-held:], length=context)
    validation = windows(tokenizer, model.validation(folder, pieces=options.pieces), length=context)
    return Texts(train, batches_of(train[:64]), batches_of(search), batches_of(validation))


def elastic_config(parent: LlamaForCausalLM) -> he.ElasticConfig:
    """FFN widths, groups, and skips of the inner layers."""
    inner = range(1, parent.config.num_hidden_layers - 1)
    groups = range(1, parent.config.num_key_value_heads + 1)
    return he.ElasticConfig(
        intermediate_size=[0.25, 0.5, 0.75, 1.0],
        num_key_value_heads=list(groups),
        skip={layer: ["attention", "mlp"] for layer in inner},
        multiple_of=4,
    )


def train(supernet: he.Supernet, rule: he.SandwichRule | he.FixedSubnet, texts: Texts, *, plan: Any) -> float:
    """Trains the subnets of a rule, distilled, and returns the seconds it took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=plan.steps, per_device_train_batch_size=plan.batch_size, learning_rate=plan.learning_rate,
            lr_scheduler_type="cosine", warmup_steps=max(1, plan.steps // 20), weight_decay=0.0, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=plan.seed,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = he.ElasticTrainer(
            supernet=supernet, sampling=rule, distill=plan.distillation, args=arguments, data_collator=collate,
            train_dataset=[{"input_ids": ids} for ids in texts.train],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    supernet.model.eval()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Plan:
    """Settings of one training."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    distillation: he.Distillation


def plan_of(name: str, parent: LlamaForCausalLM, options: argparse.Namespace, *, steps: int) -> Plan:
    """Logits distilled from the frozen parent (no labels) or in place from the largest subnet (labels beside them)."""
    if options.teacher == "parent":
        distillation = he.Distillation(teacher=parent, label_weight=0.0)
    else:
        distillation = he.Distillation(label_weight=0.0)  # the largest learns from labels, the others from it
    rate = options.learning_rate or MODELS[name].learning_rate
    return Plan(steps, options.batch_size, rate, options.seed, distillation)


def search(supernet: he.Supernet, texts: Texts, options: argparse.Namespace) -> he.Evaluation:
    """The best subnet within the limit by the perplexity of held-out training text."""
    objective = he.objectives.perplexity(supernet, texts.search)
    result = he.search_subnets(
        supernet.space, [objective, he.objectives.parameters(supernet)], evaluations=options.evaluations,
        within={"parameters": options.within}, seed=options.seed, progress=False,
    )  # fmt: skip
    return result.best("perplexity")


class Report:
    """Rows of one model: what was done, which architecture, its share of the parameters, its perplexity."""

    def __init__(self, name: str, texts: Texts) -> None:
        self.name, self.texts = name, texts
        self.rows: list[dict[str, Any]] = []

    def add(self, stage: str, supernet: he.Supernet, *, names: Mapping[str, he.Architecture]) -> None:
        """Measures architectures of a supernet on the validation text."""
        whole = he.costs.parameters(supernet, supernet.space.largest())
        for label, architecture in names.items():
            with supernet.activate(architecture):
                found = perplexity(supernet.model, self.texts.validation)
            line = {
                "model": self.name, "stage": stage, "subnet": label, "perplexity": found,
                "parameters": he.costs.parameters(supernet, architecture) / whole,
                "macs": _macs(supernet, architecture) / _macs(supernet, supernet.space.largest()),
                "loads as": supernet.loadability(architecture),
            }  # fmt: skip
            self.rows.append(line)
            print(f"{self.name}, {stage}, {label}: perplexity {found:.3f}", flush=True)


def _macs(supernet: he.Supernet, architecture: he.Architecture) -> int:
    return he.costs.macs(supernet, architecture, seq_len=256)


def run_model(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of one model; returns its rows and what is needed to repeat them."""
    model = MODELS[name]
    parent, tokenizer = load_parent(folder, name)
    texts = prepare(folder, model, (parent, tokenizer), options)
    supernet = he.make_elastic(copy.deepcopy(parent), elastic_config(parent))
    report, space = Report(name, texts), supernet.space
    ends = {"smallest": space.smallest(), "midpoint": space.midpoint()}
    report.add("parent", supernet, names={"largest": space.largest()})
    report.add("cut, not sorted", supernet, names=ends)

    he.sort_by_importance_(supernet, texts.calibration)
    before = search(supernet, texts, options).architecture
    report.add("cut, sorted", supernet, names={**ends, "found": before})
    untrained = copy.deepcopy(supernet.model)

    seconds = {"supernet": train(
        supernet, he.SandwichRule(seed=options.seed), texts, plan=plan_of(name, parent, options, steps=options.steps)
    )}  # fmt: skip
    found = search(supernet, texts, options).architecture
    report.add("supernet trained", supernet, names={"largest": space.largest(), **ends, "found": found})

    last = plan_of(name, parent, options, steps=options.last_steps)
    seconds["found subnet"] = train(supernet, he.FixedSubnet(found), texts, plan=last)
    report.add("found subnet trained on", supernet, names={"found": found})
    check_extracted(supernet, found, texts)

    if options.alone:
        # As much computation as both trainings above, spent on the subnet that was found without any.
        alone = he.Supernet(untrained)
        steps = round(sum(seconds.values()) / seconds["found subnet"] * options.last_steps)
        seconds["one subnet alone"] = train(
            alone, he.FixedSubnet(before), texts, plan=plan_of(name, parent, options, steps=steps)
        )
        report.add("one subnet alone", alone, names={f"found before, {steps} steps": before})
    return {
        "model": name, "documented": model.documented, "space": str(space.size), "seconds": seconds,
        "architecture": dict(found), "rows": report.rows,
    }  # fmt: skip


def check_extracted(supernet: he.Supernet, architecture: he.Architecture, texts: Texts) -> None:
    """The model that leaves the supernet must give the logits of the subnet inside it.

    Raises:
        RuntimeError: it does not.
    """
    ids = texts.validation[0]["input_ids"]
    with torch.inference_mode(), supernet.activate(architecture):
        inside = supernet.model(input_ids=ids).logits
        outside = he.extract(supernet, architecture)(input_ids=ids).logits
    worst, allowed = float((inside - outside).abs().max()), 1e-5 * float(inside.abs().max())
    if worst > allowed:
        raise RuntimeError(f"the extracted subnet differs from the active one by {worst}, allowed {allowed}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=400, help="of the supernet, four subnets each")
    parser.add_argument("--last-steps", type=int, default=400, help="of the subnet found")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a training story, at most the model's context")
    parser.add_argument("--stories", type=int, help="how many training stories to read; all by default")
    parser.add_argument("--pieces", type=int, help="of the validation text; by default those that are documented")
    parser.add_argument("--learning-rate", type=float, help="by default one chosen for each model")
    parser.add_argument("--teacher", choices=("parent", "in-place"), default="parent")
    parser.add_argument("--within", type=float, default=0.6, help="share of the parameters that the subnet may have")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--alone", action="store_true", help="also train one subnet alone for the same time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    folder = checked_data(options.data)
    machine = started(options.threads)
    results = []
    for name in options.models:
        found = run_model(folder, name, options)
        results.append(found)
        spent = ", ".join(f"{stage} {value:.0f} s" for stage, value in found["seconds"].items())
        print(f"\n{name}: {found['space']} architectures, trained: {spent}")
        print_table(found["rows"])
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    write_json(options.json, {"environment": machine, "settings": settings, "results": results})


if __name__ == "__main__":
    main()
