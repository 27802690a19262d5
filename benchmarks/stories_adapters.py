"""Elastic adapters on a small real LLaMA: ranks alone (Mode A) and with a cut base (Mode B) beside fixed-rank LoRA.

    python benchmarks/stories_adapters.py [--seeds 0 1 2] [--steps 400] [--json FILE]

stories260K is trained further on TinyStories, the text that it was made of, so adapters of any kind can gain little:
what is compared is what Mode B loses with its base cut to ``--macs`` of the parent's, and how ranks are chosen.
Perplexities are of TinyStories' validation pieces; training and search see text of the training split only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import print_table, started, write_json
from stories import MODELS, Texts, add_data_argument, checked_data, collate, load_parent, perplexity, prepare
from torch import nn
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import hf_elastic as he
from hf_elastic.adapters import fixed_lora
from hf_elastic.pipeline.limits import AmongSubnets, feasibility, near_limit

NAME, RANK, RANKS, BUDGET = "stories260K", 8, [2, 4, 8], 0.5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Trainings:
    """Trainings of one seed on the same text."""

    def __init__(self, texts: Texts, parent: LlamaForCausalLM, options: argparse.Namespace, *, seed: int) -> None:
        self.texts, self.parent, self.options, self.seed = texts, parent, options, seed

    def train(self, model: nn.Module, supernet: he.Supernet | None = None, rule: Any = None, *callbacks: Any) -> None:
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            common: dict[str, Any] = {
                "args": TrainingArguments(
                    folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
                    learning_rate=options.learning_rate, lr_scheduler_type="cosine", weight_decay=0.0, use_cpu=True,
                    warmup_steps=options.steps // 20, save_strategy="no", logging_strategy="no", report_to="none",
                    disable_tqdm=True, seed=self.seed, remove_unused_columns=False, dataloader_pin_memory=False,
                ),
                "data_collator": collate, "train_dataset": [{"input_ids": ids} for ids in self.texts.train],
                "callbacks": list(callbacks),
            }  # fmt: skip
            trainer = (
                Trainer(model=model, **common)
                if supernet is None
                else he.ElasticTrainer(supernet=supernet, sampling=rule, **common)
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model.eval()

    def fixed(self, rank: int) -> list[dict[str, Any]]:
        adapted = fixed_lora(self.copy(), rank=rank, targets=TARGETS, seed=self.seed)
        self.train(adapted)
        count = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
        return [self.row(f"fixed-rank LoRA, {rank}", "", perplexity(adapted, self.texts.validation), count, 1.0)]

    def elastic(
        self, method: str, supernet: he.Supernet, within: Mapping[str, float], *, near: bool
    ) -> list[dict[str, Any]]:
        rule: Any = he.RandomSubnet(self.seed)
        if near:
            rule = AmongSubnets(near_limit(supernet, feasibility(supernet, within), seed=self.seed), self.seed)
        seen = he.SubnetStatistics(supernet)
        self.train(supernet.model, supernet, rule, seen)
        goals = [he.objectives.perplexity(supernet, self.texts.search)]
        goals.append(he.objectives.related_costs(supernet)[next(iter(within))])
        result = he.search_subnets(
            supernet.space, goals, evaluations=self.options.evaluations, within=within, seed=self.seed, progress=False
        )
        space = supernet.space
        points = {
            f"found by {len(result.evaluations)} evaluations": result.best("perplexity", within=within).architecture,
            "midpoint": space.midpoint(), "largest": space.largest(), "smallest": space.smallest(),
            "lowest loss": seen.lowest_loss_values(), "most active": seen.most_active(),
        }  # fmt: skip
        rows = []
        for label, point in points.items():
            with supernet.activate(point):
                found = perplexity(supernet.model, self.texts.validation)
            adapters = he.costs.adapter_parameters(supernet, point)
            rows.append(self.row(method, label, found, adapters, share(supernet, point)))
        return rows

    def copy(self) -> LlamaForCausalLM:
        other = LlamaForCausalLM(self.parent.config)
        other.load_state_dict(self.parent.state_dict())
        return other.eval()

    def row(self, method: str, subnet: str, found: float, *costs: float) -> dict[str, Any]:
        print(f"seed {self.seed}, {method}, {subnet}: perplexity {found:.3f}", flush=True)
        named = {"method": method, "subnet": subnet, "seed": self.seed, "perplexity": found}
        return {**named, **dict(zip(("adapters", "macs"), costs, strict=True))}


def share(supernet: he.Supernet, point: he.Architecture) -> float:
    """MACs once merged, as a share of the parent's."""
    if not supernet.layer_parts:
        return 1.0
    whole = he.costs.macs(supernet, supernet.space.largest(), seq_len=256)
    return he.costs.macs(supernet, point, seq_len=256) / whole


def lora() -> he.ElasticLoraConfig:
    return he.ElasticLoraConfig(r=RANK, lora_alpha=2 * RANK, ranks=RANKS, target_modules=TARGETS)


def one_seed(trainings: Trainings, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all methods."""
    rows = [trainings.row("parent", "", perplexity(trainings.parent, trainings.texts.validation), 0, 1.0)]
    for rank in (RANK, round(BUDGET * RANK)):
        rows += trainings.fixed(rank)
    supernet = he.add_lora(trainings.copy(), lora(), seed=trainings.seed)
    rows += trainings.elastic("Mode A", supernet, {"adapter_parameters": BUDGET}, near=False)
    base = trainings.copy()
    widths = [eighths / 8 for eighths in range(3, 8)]
    space = he.ElasticConfig(intermediate_size=widths, num_key_value_heads=[2, 3], multiple_of=4)
    he.sort_by_importance_(he.make_elastic(base, space), trainings.texts.calibration)
    supernet = he.add_lora(base, lora(), seed=trainings.seed)
    return [*rows, *trainings.elastic("Mode B", supernet, {"macs": options.macs}, near=True)]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds."""
    found = []
    for key in dict.fromkeys((row["method"], row["subnet"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["subnet"]) == key]
        values = [row["perplexity"] for row in chosen]
        found.append(
            {
                "method": key[0], "subnet": key[1], "perplexity": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
                "adapter parameters": statistics.fmean(row["adapters"] for row in chosen),
                "MACs, merged": statistics.fmean(row["macs"] for row in chosen), "seeds": len(chosen),
            }
        )  # fmt: skip
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--stories", type=int)
    parser.add_argument("--pieces", type=int)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--macs", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args(given)
    folder = checked_data(options.data)
    machine = started(options.threads)
    parent, tokenizer = load_parent(folder, NAME)
    texts = prepare(folder, MODELS[NAME], (parent, tokenizer), options)
    rows = [row for seed in options.seeds for row in one_seed(Trainings(texts, parent, options, seed=seed), options)]
    means = summary(rows)
    print_table(means)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    write_json(options.json, {"environment": machine, "settings": settings, "summary": means, "rows": rows})


if __name__ == "__main__":
    main()
