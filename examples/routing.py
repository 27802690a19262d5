"""ElastiFormer on a model of yours: what routers are worth at each capacity, beside choices that know nothing.

    python examples/routing.py --model my-llama --data stories.txt --output routing
    python examples/routing.py --model my-sentence-encoder --data sentences.txt --output routing --pairs sts.jsonl

For each kind of router, one router for all capacities in every layer: fitted in closed form without training
(``fit_routers``), trained by self-distillation from zero as in the paper, and both of them trained with LoRA of rank 1
on queries and values; each for some seeds. Beside them stand routers that choose at random, tokens with the largest
norm, and the best model without as many whole sublayers as take the time that routing saves. Causal models are judged
by the loss of held-out text and by how often their most likely token is the parent's, sentence encoders by the cosine
to the parent's embeddings and, with ``--pairs`` (a JSON line with sentence1, sentence2 and score each), by the Spearman
correlation of similarities with scores. The table is printed and written (``OUTPUT/table.json``), the figure is
``OUTPUT/routing.html``; fitted routers are in ``OUTPUT/KIND``, a few kilobytes. A run that was killed and is started
again with the same options goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import hf_elastic as he
from hf_elastic.models.elastic_routers import Router

Batch = dict[str, torch.Tensor]
QUERIES_AND_VALUES = {"gpt2": ["c_attn"], "bert": ["query", "value"], "roberta": ["query", "value"]}
SUBLAYER = {"mlp_tokens": "mlp", "experts": "mlp", "attention_tokens": "attention", "heads": "attention"}


class Random(Router):
    """Chooses at random, in each layer otherwise; the same at every call of a batch of the same size."""

    def forward(self, states: torch.Tensor, units: int | None = None) -> torch.Tensor:
        own = int(1e6 * float(self.scores.weight.abs().sum()))  # weights are drawn, see unlearned()
        generator = torch.Generator().manual_seed(own + states.numel())
        return 1e-6 * torch.rand(*states.shape[:-1], units or self.scores.out_features, generator=generator)


class Norm(Router):
    """Prefers tokens with large states."""

    def forward(self, states: torch.Tensor, units: int | None = None) -> torch.Tensor:
        return 1e-6 * states.norm(dim=-1, keepdim=True)


class Task:
    """A model, its text, and how it is judged."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.causal = (AutoConfig.from_pretrained(arguments.model).architectures or [""])[0].endswith(
            ("ForCausalLM", "LMHeadModel")
        )
        self.tokenizer = self.load_tokenizer()
        rows, calibration, held = self.texts()
        self.rows = [{"input_ids": row} for row in rows]
        self.fitting, self.calibration, self.held = map(self.batches, (rows[: arguments.fit_rows], calibration, held))
        parent = self.load()
        self.parameters = sum(parameter.numel() for parameter in parent.parameters())
        self.wanted = [self.output(parent, batch) for batch in self.held]
        self.pairs = self.scored_pairs() if arguments.pairs else None

    def load_tokenizer(self) -> Callable[..., dict[str, list[int]]]:
        return AutoTokenizer.from_pretrained(self.arguments.model)

    def texts(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Rows of token ids to train on, to calibrate on and to judge by."""
        arguments = self.arguments
        lines = [line for path in arguments.data for line in Path(path).read_text(encoding="utf-8").splitlines()]
        rows = self.encoded([line.strip() for line in lines if len(line.strip()) > 10])
        if len(rows) < 32:
            sys.exit(f"{' '.join(arguments.data)} gives {len(rows)} rows of {arguments.length} tokens; give more text")
        held = max(8, min(arguments.held_out, len(rows) // 5))
        return rows[2 * held :], rows[held : 2 * held], rows[:held]

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, or of causal models' one stream of them cut into rows."""
        length = self.arguments.length
        cut = {} if self.causal else {"truncation": True, "max_length": length}
        rows = [self.tokenizer(text, **cut)["input_ids"] for text in texts]
        if not self.causal:
            return rows
        ids = [token for row in rows for token in row]
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]

    def scored_pairs(self) -> tuple[list[Batch], list[int], list[float]]:
        """Batches of first and second sentences by length, the places of all there, and how alike people find them."""
        pairs = [json.loads(line) for line in Path(self.arguments.pairs).read_text(encoding="utf-8").splitlines()]
        rows = self.encoded([pair[name] for name in ("sentence1", "sentence2") for pair in pairs])
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # as batches() has them
        places = sorted(range(len(rows)), key=order.__getitem__)
        return self.batches(rows), places, [pair["score"] for pair in pairs]

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
        """Loss and agreement with the parent, or the mean cosine to it and the correlation with scores."""
        if self.causal:
            return self.judge_text(model)
        return self.judge_sentences(model) | ({} if self.pairs is None else self.judge_pairs(model))

    def judge_text(self, model: nn.Module) -> dict[str, float]:
        total, agreed, count = 0.0, 0, 0
        for batch, wanted in zip(self.held, self.wanted, strict=True):
            got = self.output(model, batch)[:, :-1]
            real = batch["attention_mask"][:, 1:].bool()  # tokens that are predicted
            labels = batch["input_ids"][:, 1:][real]
            total += float(nn.functional.cross_entropy(got[real], labels, reduction="sum"))
            agreed += int((got.argmax(-1) == wanted[:, :-1].argmax(-1))[real].sum())
            count += len(labels)
        return {"loss": total / count, "agreement": agreed / count}

    def judge_sentences(self, model: nn.Module) -> dict[str, float]:
        cosines = [
            nn.functional.cosine_similarity(self.output(model, batch), wanted, dim=-1)
            for batch, wanted in zip(self.held, self.wanted, strict=True)
        ]
        return {"cosine": float(torch.cat(cosines).mean())}

    def judge_pairs(self, model: nn.Module) -> dict[str, float]:
        batches, places, scores = self.pairs
        one, other = torch.cat([self.output(model, batch) for batch in batches])[places].chunk(2)
        similarities = nn.functional.cosine_similarity(one, other, dim=-1)
        return {"spearman": float(spearmanr(similarities.numpy(), scores).statistic)}


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


def train(task: Task, supernet: he.Supernet, *, seed: int, learning_rate: float) -> None:
    """Self-distillation: a capacity a step, from the model with routers bypassed."""
    arguments = task.arguments
    args = TrainingArguments(
        f"{arguments.output}/training", max_steps=arguments.steps, per_device_train_batch_size=arguments.batch_size,
        learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=max(1, arguments.steps // 20),
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    plan = he.Distillation(teacher="parent", label_weight=0.0, target="logits" if task.causal else "embeddings")
    he.ElasticTrainer(
        supernet=supernet, sampling=he.RandomSubnet(seed=seed), distill=plan, args=args, train_dataset=task.rows,
        data_collator=task.collate,
    ).train()  # fmt: skip
    supernet.model.eval()


def capacities(task: Task, supernet: he.Supernet, *, method: str, seed: int) -> list[dict]:
    """A row for each capacity; at the full one routers are bypassed, and what differs is LoRA's."""
    he.calibrate_routing(supernet, task.calibration)
    (choice,) = supernet.space.choices
    rows = []
    for value in choice.values:
        with supernet.activate(supernet.space.canonical({choice.name: value})):
            found = task.judge(supernet.model)
        share = value / choice.values[-1]
        rows.append({"kind": choice.name, "method": method, "capacity": share, "seed": seed, **found})
    return rows


def unlearned(task: Task, kind: str, made: type[Router], *, seed: int) -> list[dict]:
    """Routers that choose by a rule."""
    supernet = routed(task, kind, lora=False)
    generator = torch.Generator().manual_seed(seed)
    for part in supernet.router_parts:
        router = part.routers[kind]
        router.__class__ = made
        with torch.no_grad():
            router.scores.weight.copy_(torch.rand(router.scores.weight.shape, generator=generator))
    return capacities(task, supernet, method=made.__name__.lower(), seed=seed)


def dropped(task: Task, kind: str) -> list[dict]:
    """The best model without so many whole sublayers: as many as the share that routers leave out of each."""
    supernet = he.make_elastic(task.load(), he.ElasticConfig(skip=[SUBLAYER[kind]]))
    names, rows = list(supernet.space.names), []
    shares = sorted({row / len(names) for row in range(1, len(names))})
    for share in [share for share in shares if share >= min(task.arguments.capacities)]:
        best = min(
            itertools.islice(itertools.combinations(names, round((1 - share) * len(names))), 40),
            key=lambda gone: distance(task, supernet, without(supernet, gone, SUBLAYER[kind])),
        )
        with supernet.activate(without(supernet, best, SUBLAYER[kind])):
            found = task.judge(supernet.model)
        rows.append({"kind": kind, "method": "sublayers dropped", "capacity": share, "seed": 0, **found})
    return rows


def without(supernet: he.Supernet, gone: Sequence[str], sublayer: str) -> dict:
    return {**supernet.space.largest(), **dict.fromkeys(gone, sublayer)}


def distance(task: Task, supernet: he.Supernet, point: dict) -> float:
    """The loss, or how far embeddings are from the parent's."""
    with supernet.activate(point):
        if task.causal:
            return task.judge_text(supernet.model)["loss"]
        return -task.judge_sentences(supernet.model)["cosine"]


class Kept:
    """Rows measured so far, in ``OUTPUT/rows.json``: a run that was killed goes on with what is missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._file = Path(arguments.output) / "rows.json"
        shown = {name: value for name, value in vars(arguments).items() if name not in ("kinds", "seeds")}
        self._settings = {name: value if isinstance(value, list) else str(value) for name, value in shown.items()}
        found = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        if found and found["settings"] != self._settings:
            sys.exit(f"{self._file} is of a run with other options; give another --output, or delete it")
        self._rows: list[dict] = found.get("rows", [])

    def rows(self, kind: str, method: str, *, seed: int, measured: Callable[[], list[dict]]) -> list[dict]:
        """Rows of one method, measured unless they are there."""
        found = [row for row in self._rows if (row["kind"], row["method"], row["seed"]) == (kind, method, seed)]
        if not found:
            found = measured()
            self._rows += found
            write_json(self._file, {"settings": self._settings, "rows": self._rows})
            print(f"{time.strftime('%H:%M:%S')} {kind}, {method}, seed {seed}: done", flush=True)
        return found


def write_json(file: Path, content: dict) -> None:
    """Writes a file as a whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    new.replace(file)


def measure(task: Task, kind: str, kept: Kept) -> tuple[list[dict], dict]:
    """All rows of one kind, and what its routers add to the model."""
    seeds = task.arguments.seeds
    rows = kept.rows(kind, "sublayers dropped", seed=0, measured=partial(dropped, task, kind))
    for seed in seeds:
        rows += kept.rows(kind, "random", seed=seed, measured=partial(unlearned, task, kind, Random, seed=seed))
    if kind.endswith("tokens"):
        rows += kept.rows(kind, "norm", seed=0, measured=partial(unlearned, task, kind, Norm, seed=0))
    fitted = routed(task, kind, lora=False)
    began = time.perf_counter()
    print(he.fit_routers(fitted, task.fitting))
    seconds = time.perf_counter() - began
    rows += kept.rows(kind, "fitted", seed=0, measured=partial(capacities, task, fitted, method="fitted", seed=0))
    he.calibrate_routing(fitted, task.calibration)
    print(he.routing_statistics(fitted, task.held, fitted.space.smallest()))
    for seed, method in itertools.product(seeds, ("fitted, LoRA", "learned", "learned, LoRA")):
        measured = partial(trained, task, kind, method=method, seed=seed, fitted=fitted)
        rows += kept.rows(kind, method, seed=seed, measured=measured)
    return rows, added(task, fitted, kind) | {"seconds to fit": seconds}


def trained(task: Task, kind: str, *, method: str, seed: int, fitted: he.Supernet) -> list[dict]:
    """Rows of routers that are trained, from zero or from those that were fitted."""
    set_seed(seed)
    supernet = routed(task, kind, lora=method.endswith("LoRA"))
    rate = task.arguments.learning_rate
    if method.startswith("fitted"):
        for part, same in zip(supernet.router_parts, fitted.router_parts, strict=True):
            part.routers.load_state_dict(same.routers.state_dict())
        rate = task.arguments.fitted_learning_rate
    train(task, supernet, seed=seed, learning_rate=rate)
    return capacities(task, supernet, method=method, seed=seed)


def added(task: Task, supernet: he.Supernet, kind: str) -> dict:
    """Parameters and bytes of the routers, beside the paper's 0.00006 % to 0.3 % of the model."""
    folder = Path(task.arguments.output) / kind
    he.save_routers(supernet, folder, overwrite=True)
    count = sum(parameter.numel() for part in supernet.router_parts for parameter in part.routers.parameters())
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"kind": kind, "parameters": count, "of the model": count / task.parameters, "bytes": size}


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


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal model or sentence encoder, with its tokenizer")
    parser.add_argument("--data", required=True, nargs="+", help="files of text, a line a sentence")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--pairs", help="JSON lines with sentence1, sentence2, score")
    parser.add_argument("--kinds", nargs="+", choices=SUBLAYER, default=list(SUBLAYER))
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=256, help="rows to judge on, and as many to calibrate on")
    parser.add_argument("--fit-rows", type=int, default=512, help="rows to fit routers on")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--fitted-learning-rate", type=float, default=1e-3, help="behind the fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(arguments)


def run(task: Task) -> dict:
    """Measures all kinds, prints the table, and draws the figure; returns what the table is made of."""
    output = Path(task.arguments.output)
    parent = task.judge(task.load())
    kept = Kept(task.arguments)
    found = [measure(task, kind, kept) for kind in task.arguments.kinds]
    table = summary([row for rows, _ in found for row in rows], list(parent))
    routers = [each for _, each in found]
    print("parent", {name: round(value, 4) for name, value in parent.items()})
    for row in table:
        numbers = "  ".join(f"{name} {row[name]:.4f} +- {row[f'{name} +-']:.4f}" for name in parent)
        print(f"{row['kind']:<17} {row['method']:<18} {row['capacity']:>5.0%}  {numbers}")
    for each in routers:
        print(
            f"{each['kind']}: {each['parameters']:,} parameters, {each['of the model']:.4%} of the model (paper: "
            f"0.00006 % to 0.3 %), {each['bytes']:,} bytes on disk, fitted in {each['seconds to fit']:.0f} s"
        )
    result = {"parent": parent, "table": table, "routers": routers}
    write_json(output / "table.json", result)
    first = next(iter(parent))
    draw(table, first, path=output / "routing.html", parent=parent[first])
    return result


def main() -> None:
    arguments = parsed()
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    run(Task(arguments))


if __name__ == "__main__":
    main()
