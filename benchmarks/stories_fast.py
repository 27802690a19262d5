"""Perplexity of small real LLaMA models made smaller without training: tables, exact search, closed-form repair.

    python benchmarks/stories_fast.py [--models stories260K babyllama105] [--recover MINUTES] [--json FILE]

Everything that is measured on text (the order of neurons and heads, the quality table, the repair) is measured anew on
the calibration stories of each seed; a line gives mean and standard deviation over the seeds. Limits are shares of the
parent's parameters without embeddings. Plain cuts may have 1 % more, since layers are coarse steps. All perplexities
are those of the model that a user would get, on TinyStories' validation pieces; ``--recover`` goes on training the
repaired answer, by distillation from its parent on the training stories.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from measuring import print_table, started, write_json
from stories import (
    IGNORED,
    MODELS,
    Batch,
    Texts,
    add_data_argument,
    batches_of,
    checked_data,
    load_parent,
    perplexity,
    prepare,
)  # fmt: skip
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import hf_elastic as he
from hf_elastic.repair.recovery import recover
from hf_elastic.repair.refitting import refit
from hf_elastic.tables.quality import QualityTable, additivity, measure_quality_table

MEASURE = "kl"
MULTIPLE = 4
TOLERANCE = 1.01  # of a limit, for plain cuts
UNIFORM, DROPPED = "uniform width", "dropped layers"


def fine_config(parent: LlamaForCausalLM) -> he.ElasticConfig:
    """Widths in eighths, groups, and skips of the inner layers: a sublayer, or the whole layer."""
    inner = range(1, parent.config.num_hidden_layers - 1)
    return he.ElasticConfig(
        intermediate_size=[eighths / 8 for eighths in range(1, 9)],
        num_key_value_heads=list(range(1, parent.config.num_key_value_heads + 1)),
        skip={layer: ["attention", "mlp", "layer"] for layer in inner},
        multiple_of=MULTIPLE,
    )


def padding_mask(batch: Batch) -> Tensor:
    """One at real tokens, the first of which has no label, and zero at padding, ``(B, T)``."""
    mask = (batch["labels"] != IGNORED).long()
    mask[:, 0] = 1
    return mask


def drawn(stories: Sequence[list[int]], *, most: int, seed: int) -> list[Batch]:
    """Random stories of at most so many tokens, one at least; padding is masked, since it is not to be fitted."""
    chosen: list[list[int]] = []
    for story in random.Random(seed).sample(stories, len(stories)):
        if chosen and sum(map(len, chosen)) + len(story) > most:
            break
        chosen.append(story)
    return [{"input_ids": b["input_ids"], "attention_mask": padding_mask(b)} for b in batches_of(chosen)]


@dataclass(frozen=True)
class Sorted:
    """A parent in the order of one seed's calibration text, with its quality table.

    Attributes:
        supernet: of the fine space.
        table: of the supernet.
        calibration: batches of the seed.
        layer_order: layers from the most to the least important.
        seconds: of each stage so far.
    """

    supernet: he.Supernet
    table: QualityTable
    calibration: list[Batch]
    layer_order: list[int]
    seconds: dict[str, float]


def prepared(parent: LlamaForCausalLM, texts: Texts, options: argparse.Namespace, *, seed: int) -> Sorted:
    """Sorts by reconstruction and measures the quality table."""
    calibration = drawn(texts.train, most=options.calibration_tokens, seed=seed)
    supernet = he.make_elastic(copy.deepcopy(parent), fine_config(parent))
    assert he.costs.parameters(supernet, supernet.space.largest()) == size_of(parent)
    began = time.perf_counter()
    scores = he.sort_by_importance_(supernet, calibration, method="reconstruction")
    ordered = time.perf_counter()
    table = measure_quality_table(
        supernet, calibration, held_of(texts, options), measure=MEASURE, sizes=options.sizes
    )  # fmt: skip
    seconds = {"sort": ordered - began, "quality table": time.perf_counter() - ordered}
    order = scores["layers"].argsort(descending=True, stable=True).tolist()
    return Sorted(supernet, table, calibration, order, seconds)


def held_of(texts: Texts, options: argparse.Namespace) -> list[Batch]:
    """Batches to measure damage on: of stories that nothing else sees."""
    rows = [
        ids[mask.bool()].tolist()
        for batch in texts.search
        for ids, mask in zip(batch["input_ids"], padding_mask(batch), strict=True)
    ]
    return drawn(rows, most=options.held_tokens, seed=0)


def exact_answer(ready: Sorted, *, share: float) -> he.Architecture:
    """The architecture of least predicted damage within a share of the parameters."""
    damage = he.objectives.damage(ready.supernet, ready.table)
    result = he.search_subnets(
        ready.supernet.space, [damage], algorithm="exact", within={"parameters": share}, progress=False
    )  # fmt: skip
    return result.best(damage.name).architecture


def plain(ready: Sorted, kind: str, *, share: float) -> tuple[he.Supernet, he.Architecture]:
    """The largest uniform width, or the largest depth, within a share of the parameters.

    Raises:
        RuntimeError: there is none.
    """
    model = he.extract(ready.supernet, ready.supernet.space.largest())
    config = model.config
    if kind == UNIFORM:
        widths = list(range(MULTIPLE, config.intermediate_size + 1, MULTIPLE))
        space = he.ElasticConfig(intermediate_size=widths, loadability="stock")
    else:
        depths = list(range(1, config.num_hidden_layers + 1))
        space = he.ElasticConfig(num_hidden_layers=depths, layer_order=ready.layer_order)
    supernet = he.make_elastic(model, space)
    limit = TOLERANCE * share * he.costs.parameters(supernet, supernet.space.largest())
    sized = [(he.costs.parameters(supernet, point), point) for point in supernet.space.architectures()]
    within = [pair for pair in sized if pair[0] <= limit]
    if not within:
        raise RuntimeError(f"no {kind} has {share:.0%} of the parameters")
    return supernet, max(within, key=lambda pair: pair[0])[1]


class Report:
    """Lines of one model: what was done, under which limit, with which seed, and the perplexity that it gave."""

    def __init__(self, name: str, parent: LlamaForCausalLM, texts: Texts) -> None:
        self.name, self.parent, self.texts = name, parent, texts
        self.whole = size_of(parent)
        self.lines: list[dict[str, Any]] = []

    def add(self, model: PreTrainedModel, what: str, *, limit: float = 1.0, seed: int = 0) -> None:
        """Measures a model on the validation text."""
        found = perplexity(model, self.texts.validation)
        share = size_of(model) / self.whole
        self.lines.append({"limit": limit, "what": what, "seed": seed, "perplexity": found, "parameters": share})
        print(f"{self.name}, {what}, {share:.1%} of the parameters, seed {seed}: {found:.3f}", flush=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each limit and model: mean and standard deviation over the seeds."""
        for limit, what in dict.fromkeys((line["limit"], line["what"]) for line in self.lines):
            same = [line for line in self.lines if (line["limit"], line["what"]) == (limit, what)]
            values = [line["perplexity"] for line in same]
            yield {
                "model": self.name, "limit": limit, "what": what, "perplexity": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else "", "seeds": len(values),
                "parameters": statistics.fmean(line["parameters"] for line in same),
            }  # fmt: skip


def size_of(model: PreTrainedModel) -> int:
    """Parameters of the layers and of what stands behind them, as ``costs.parameters`` counts: without embeddings."""
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)


def run_seed(report: Report, ready: Sorted, options: argparse.Namespace, *, seed: int) -> Mapping[str, Any]:
    """All models of one seed; returns the architectures found."""
    architectures: dict[str, Any] = {}
    for share in options.within:
        label = {"limit": share, "seed": seed}
        supernet, depth = plain(ready, DROPPED, share=share)
        report.add(he.extract(supernet, depth), DROPPED, **label)
        supernet, width = plain(ready, UNIFORM, share=share)
        report.add(he.extract(supernet, width), f"{UNIFORM}, cut", **label)
        report.add(refit(supernet, width, ready.calibration), f"{UNIFORM}, refit", **label)
        began = time.perf_counter()
        found = exact_answer(ready, share=share)
        ready.seconds[f"search {share:g}"] = time.perf_counter() - began
        report.add(he.extract(ready.supernet, found), "exact answer, cut", **label)
        began = time.perf_counter()
        small = refit(ready.supernet, found, ready.calibration)
        ready.seconds[f"refit {share:g}"] = time.perf_counter() - began
        report.add(small, "exact answer, refit", **label)
        architectures[f"{share:g}"] = dict(found)
        if options.recover:
            recovered(report, small, options, seed=seed)
            report.add(small, f"exact answer, refit, {options.recover:g} min of training", **label)
    return architectures


def recovered(report: Report, small: PreTrainedModel, options: argparse.Namespace, *, seed: int) -> None:
    """Distils the repaired model from its parent for some minutes, in place."""
    rows = [{"input_ids": ids} for ids in report.texts.train]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        recover(
            small, report.parent, rows, output=Path(folder) / "run", minutes=options.recover, seed=seed,
            batch_size=options.batch_size, learning_rate=options.learning_rate,
            arguments={"use_cpu": True, "disable_tqdm": True},
        )  # fmt: skip


def measured_additivity(ready: Sorted, texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """How well the sum over layers predicts the damage of random architectures, each repaired as a whole."""
    rng = random.Random(0)
    points = [ready.supernet.space.sample(rng) for _ in range(options.architectures)]
    found = additivity(
        ready.supernet, ready.table, points,
        calibration=ready.calibration, validation=held_of(texts, options), measure=MEASURE,
    )  # fmt: skip
    print(found)
    return {
        "architectures": len(points), "rank correlation": found.rank_correlation, "mean ratio": found.mean_ratio,
        "predicted": found.predicted, "measured": found.measured,
    }  # fmt: skip


def run_model(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All seeds of one model."""
    parent, tokenizer = load_parent(folder, name)
    texts = prepare(folder, MODELS[name], (parent, tokenizer), options)
    report = Report(name, parent, texts)
    report.add(parent, "parent")
    found: dict[str, Any] = {"model": name, "documented": MODELS[name].documented, "seconds": {}, "architectures": {}}
    for seed in range(options.seeds):
        ready = prepared(parent, texts, options, seed=seed)
        found["space"] = str(ready.supernet.space.size)
        if seed == 0:
            found["additivity"] = measured_additivity(ready, texts, options)
        found["architectures"][seed] = run_seed(report, ready, options, seed=seed)
        found["seconds"][seed] = ready.seconds
    return {**found, "rows": list(report.rows()), "lines": report.lines}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    folder = checked_data(options.data)
    machine = started(options.threads)
    results = []
    for name in options.models:
        results.append(run_model(folder, name, options))
        print()
        print_table(results[-1]["rows"])
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    write_json(options.json, {"environment": machine, "settings": settings, "results": results})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration text")
    parser.add_argument("--within", nargs="+", type=float, default=[0.6, 0.8], help="shares of the parameters")
    parser.add_argument("--calibration-tokens", type=int, default=20480)
    parser.add_argument("--held-tokens", type=int, default=8192, help="to measure damage on")
    parser.add_argument("--sizes", type=int, default=8, help="widths per layer in the quality table")
    parser.add_argument("--architectures", type=int, default=12, help="random ones, to measure the additivity on")
    parser.add_argument("--recover", type=float, metavar="MINUTES", help="also train every repaired answer for so long")
    parser.add_argument("--batch-size", type=int, default=4, help="of that training")
    parser.add_argument("--learning-rate", type=float, help="of that training; by default that of recover()")
    parser.add_argument("--tokens", type=int, default=512, help="of a training story, at most the model's context")
    parser.add_argument("--stories", type=int, help="how many training stories to read; all by default")
    parser.add_argument("--pieces", type=int, help="of the validation text; by default those that are documented")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
