"""ElastiFormer on a model of yours: what routers are worth at each capacity, beside choices that learn nothing.

    python examples/routing.py --model my-llama --data stories.txt --output routing
    python examples/routing.py --model my-sentence-encoder --data sentences.txt --output routing --kinds heads

For each kind of router: routers of all layers learn from the model itself (one router for all capacities), with and
without LoRA of rank 1 on queries and values, for some seeds. At each capacity they stand beside routers that choose at
random, by the norm of a token (the largest ones), and, for tokens, beside a model without as many sublayers as would
take the same time, the best set of them. Causal models are judged by the loss of held-out text and by how often their
most likely token is the parent's, sentence encoders by the cosine to the parent's embeddings. The table is printed and
written (``OUTPUT/table.json``), the figure is ``OUTPUT/routing.html``; the routers of the last seed are in
``OUTPUT/KIND``, a few kilobytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import hf_elastic as he
from hf_elastic.models.elastic_routers import Router

Batch = dict[str, torch.Tensor]
QUERIES_AND_VALUES = {"gpt2": ["c_attn"], "bert": ["query", "value"], "roberta": ["query", "value"]}
SUBLAYER = {"mlp_tokens": "mlp", "attention_tokens": "attention"}


class Random(Router):
    """Chooses at random, the same at every call of a batch of the same size."""

    def forward(self, states: torch.Tensor, units: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.of + states.numel())
        return 1e-6 * torch.rand(*states.shape[:-1], units or self.scores.out_features, generator=generator)


class Norm(Router):
    """Prefers tokens with large states."""

    def forward(self, states: torch.Tensor, units: int | None = None) -> torch.Tensor:
        return 1e-6 * states.norm(dim=-1, keepdim=True)


class Task:
    """A model, its text, and how it is judged."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        architectures = AutoConfig.from_pretrained(arguments.model).architectures or [""]
        self.causal = architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
        lines = [line for path in arguments.data for line in Path(path).read_text(encoding="utf-8").splitlines()]
        lines = [line.strip() for line in lines if len(line.strip()) > 10]
        cut = {} if self.causal else {"truncation": True, "max_length": arguments.length}
        rows = [self.tokenizer(line, **cut)["input_ids"] for line in lines]
        if self.causal:  # one stream of tokens
            ids, length = [token for row in rows for token in row], arguments.length
            rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if len(rows) < 32:
            sys.exit(f"{' '.join(arguments.data)} gives {len(rows)} rows of {arguments.length} tokens; give more text")
        held = max(8, min(arguments.held_out, len(rows) // 5))
        self.rows, self.held = [{"input_ids": row} for row in rows[2 * held :]], self.batches(rows[:held])
        self.calibration = self.batches(rows[held : 2 * held])
        parent = self.load()
        self.wanted = [self.output(parent, batch) for batch in self.held]

    def load(self) -> nn.Module:
        kind = AutoModelForCausalLM if self.causal else AutoModel
        return kind.from_pretrained(self.arguments.model, dtype=torch.float32).eval()

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[number, : len(row["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def batches(self, rows: Sequence[list[int]], *, size: int = 32) -> list[Batch]:
        ordered = sorted(rows, key=len)
        return [
            self.collate([{"input_ids": row} for row in ordered[n : n + size]]) for n in range(0, len(ordered), size)
        ]

    def output(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits ``(B, T, V)``, or embeddings ``(B, D)``."""
        with torch.inference_mode():
            result = model(**batch)
        if self.causal:
            return result.logits
        mask = batch["attention_mask"].unsqueeze(-1)
        return (result.last_hidden_state * mask).sum(1) / mask.sum(1)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Loss and agreement with the parent, or the mean cosine to it."""
        total, agreed, count = 0.0, 0.0, 0
        for batch, wanted in zip(self.held, self.wanted, strict=True):
            got = self.output(model, batch)
            if self.causal:
                labels = batch["input_ids"][:, 1:].flatten()
                total += float(nn.functional.cross_entropy(got[:, :-1].flatten(0, 1), labels, reduction="sum"))
                agreed += float((got.argmax(-1) == wanted.argmax(-1))[:, 1:].sum())
                count += len(labels)
            else:
                total += float(nn.functional.cosine_similarity(got, wanted, dim=-1).sum())
                count += len(got)
        return {"loss": total / count, "agreement": agreed / count} if self.causal else {"cosine": total / count}


def config_of(kind: str, model: nn.Module, arguments: argparse.Namespace) -> he.RoutingConfig:
    """The capacities of one kind of router."""
    if kind == "experts":
        counts = sorted({max(1, round(share * arguments.experts)) for share in arguments.capacities})
        return he.RoutingConfig(experts=counts, num_experts=arguments.experts, share="model")
    return he.RoutingConfig(**{kind: arguments.capacities}, share="model")


def routed(task: Task, kind: str, *, lora: bool) -> he.Supernet:
    """The model with fresh routers, and LoRA of rank 1 beside them."""
    model = task.load()
    he.add_routing(model, config_of(kind, model, task.arguments))
    if lora:
        names = QUERIES_AND_VALUES.get(model.config.model_type, ["q_proj", "v_proj"])
        model = get_peft_model(model, LoraConfig(r=1, lora_alpha=2, target_modules=names))
        he.train_routers(model)
    return he.Supernet(model)


def train(task: Task, supernet: he.Supernet, *, seed: int) -> None:
    """Self-distillation: a capacity a step, from the model with routers bypassed."""
    arguments = task.arguments
    args = TrainingArguments(
        f"{arguments.output}/training", max_steps=arguments.steps, per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate, lr_scheduler_type="cosine", warmup_steps=max(1, arguments.steps // 20),
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    plan = he.Distillation(teacher="parent", label_weight=0.0, target="logits" if task.causal else "embeddings")
    he.ElasticTrainer(
        supernet=supernet, sampling=he.RandomSubnet(seed=seed), distill=plan, args=args, train_dataset=task.rows,
        data_collator=task.collate,
    ).train()  # fmt: skip
    supernet.model.eval()


def capacities(task: Task, supernet: he.Supernet, *, method: str, extra: dict) -> list[dict]:
    """A row for each capacity below full."""
    he.calibrate_routing(supernet, task.calibration)
    (choice,) = supernet.space.choices
    rows = []
    for value in choice.values[:-1]:
        architecture = supernet.space.canonical({choice.name: value})
        with supernet.activate(architecture):
            found = task.judge(supernet.model)
        share = value / choice.values[-1]
        rows.append({"kind": choice.name, "method": method, "capacity": share, **extra, **found})
    return rows


def unlearned(task: Task, kind: str, made: Callable[..., Router], *, method: str) -> list[dict]:
    """Routers that choose by a rule."""
    supernet = routed(task, kind, lora=False)
    for part in supernet.router_parts:
        old = part.routers[kind]
        new = made(
            part.layer.hidden_size, of=old.of, values=old.values, tokens=kind.endswith("tokens"),
            thresholds=old.thresholds is not None,
        )  # fmt: skip
        part.routers[kind] = new.eval()
    return capacities(task, supernet, method=method, extra={"seed": 0})


def dropped(task: Task, kind: str) -> list[dict]:
    """The best model without so many sublayers, as many as the tokens that routers leave out of all together."""
    supernet = he.make_elastic(task.load(), he.ElasticConfig(skip=[SUBLAYER[kind]]))
    names, rows = list(supernet.space.names), []
    for share in task.arguments.capacities:
        found = []
        for gone in itertools.islice(itertools.combinations(names, round((1 - share) * len(names))), 40):
            point = {**supernet.space.largest(), **dict.fromkeys(gone, SUBLAYER[kind])}
            with supernet.activate(point):
                found.append(task.judge(supernet.model))
        best = min(found, key=lambda row: row["loss"] if task.causal else -row["cosine"])
        rows.append({"kind": kind, "method": "sublayers dropped", "capacity": share, "seed": 0, **best})
    return rows


def measure(task: Task, kind: str) -> list[dict]:
    """All rows of one kind."""
    rows = unlearned(task, kind, Random, method="random")
    if kind in SUBLAYER:
        rows += unlearned(task, kind, Norm, method="norm") + dropped(task, kind)
    for seed, lora in itertools.product(task.arguments.seeds, (False, True)):
        set_seed(seed)
        supernet = routed(task, kind, lora=lora)
        train(task, supernet, seed=seed)
        method = "learned, LoRA of rank 1" if lora else "learned"
        rows += capacities(task, supernet, method=method, extra={"seed": seed})
        if not lora:
            print(he.routing_statistics(supernet, task.held, supernet.space.smallest()))
            he.save_routers(supernet, f"{task.arguments.output}/{kind}", overwrite=True)
    return rows


def summary(rows: list[dict], measures: Sequence[str]) -> list[dict]:
    """Mean and spread over seeds."""
    keys = list(dict.fromkeys((row["kind"], row["method"], row["capacity"]) for row in rows))
    found = []
    for key in keys:
        own = [row for row in rows if (row["kind"], row["method"], row["capacity"]) == key]
        line = dict(zip(("kind", "method", "capacity"), key, strict=True)) | {"seeds": len(own)}
        for name in measures:
            values = [row[name] for row in own]
            line |= {name: statistics.fmean(values), f"{name} +-": statistics.stdev(values) if len(values) > 1 else 0.0}
        found.append(line)
    return found


def draw(table: list[dict], measure_name: str, *, path: Path, parent: float) -> None:
    """One panel for each kind, one line for each method."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    kinds = list(dict.fromkeys(row["kind"] for row in table))
    figure = make_subplots(rows=1, cols=len(kinds), subplot_titles=kinds)
    for column, kind in enumerate(kinds, start=1):
        for method in dict.fromkeys(row["method"] for row in table if row["kind"] == kind):
            own = sorted((r for r in table if (r["kind"], r["method"]) == (kind, method)), key=lambda r: r["capacity"])
            figure.add_trace(
                go.Scatter(
                    x=[r["capacity"] for r in own], y=[r[measure_name] for r in own], name=method, legendgroup=method,
                    showlegend=column == 1, error_y={"array": [r[f"{measure_name} +-"] for r in own]},
                ),
                row=1, col=column,
            )  # fmt: skip
        figure.add_hline(y=parent, line_dash="dot", row=1, col=column)
    figure.update_xaxes(title="capacity")
    figure.update_layout(title=f"{measure_name} (dotted: parent)")
    figure.write_html(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal model or sentence encoder, with its tokenizer")
    parser.add_argument("--data", required=True, nargs="+", help="files of text, a line a sentence")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--kinds", nargs="+", default=["mlp_tokens", "attention_tokens", "heads", "experts"])
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=256, help="rows to judge on, and as many to calibrate on")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    task = Task(arguments)
    parent = task.judge(task.load())
    rows = [row for kind in arguments.kinds for row in measure(task, kind)]
    table = summary(rows, list(parent))
    print("parent", {name: round(value, 4) for name, value in parent.items()})
    for row in table:
        numbers = "  ".join(f"{name} {row[name]:.4f} +- {row[f'{name} +-']:.4f}" for name in parent)
        print(f"{row['kind']:<17} {row['method']:<24} {row['capacity']:>5.0%}  {numbers}")
    (output / "table.json").write_text(json.dumps({"parent": parent, "table": table}, indent=1), encoding="utf-8")
    first = next(iter(parent))
    draw(table, first, path=output / "routing.html", parent=parent[first])


if __name__ == "__main__":
    main()
