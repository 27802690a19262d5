"""Absolute figures on one device: latencies of subnets, what an active subnet and routing cost, and every command.

    python benchmarks/gpu.py [--device cuda] [--parts subnets ...] [--json benchmarks/results/gpu.json]

A LLaMA of a billion random bf16 weights by default (16 layers x 2048, FFN 8192, 32 heads, 8 key/value heads); sizes
are options, so that it also runs in small on a CPU. Weights and tokens are random, which changes neither time nor
memory.

* ``subnets``: milliseconds of extracted subnets and of the parent, prefill and decoding.
* ``active``: time of an active subnet over that of the same one extracted, forward and forward with backward.
* ``routing``: time of the routed model over the parent's, beside the share of MACs that is left; every router lets half
  in, and at full capacity all are bypassed.
* ``commands``: seconds and peak memory of sorting, repair, sparsification, quantisation, training steps and export.

Pairs alternate in one process; all work is waited for before a clock is read.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from measuring import Bar, environment, interval, judged, paired_seconds, print_environment, print_table, write_json
from refit_memory import GIB, Peak, parent, tokens
from transformers import TrainingArguments

import hf_elastic as he
from hf_elastic.tables.timing import Forward, Setting

FULL, SAVED, ACTIVE = Bar("at most", 1.03), Bar("at least", 0.8), Bar("at most", 1.1)
Options = argparse.Namespace


def waited(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, ending when the device is done."""

    def run() -> object:
        found = call()
        if device != "cpu":
            torch.cuda.synchronize()
        return found

    return run


def paired(first: Callable[[], object], second: Callable[[], object], options: Options) -> list[tuple[float, float]]:
    """Seconds of two calls, in turns."""
    calls = waited(first, options.device), waited(second, options.device)
    return paired_seconds(*calls, pairs=options.pairs, warmup=3)


def elastic(options: Options) -> he.Supernet:
    """The parent with half widths, half groups and skips."""
    space = he.ElasticConfig(intermediate_size=[0.5, 1.0], num_key_value_heads=[0.5, 1.0], skip=["layer"])
    return he.make_elastic(parent(options), space)


def subnets(supernet: he.Supernet) -> dict[str, he.Architecture]:
    """What is timed: one kind of cut at a time, and widths with groups."""
    largest, layers = dict(supernet.space.largest()), len(supernet.layer_parts)
    half = {name: supernet.space[name].values[0] for name in largest if not name.endswith(("skip", "layer"))}
    ffn = {name: value for name, value in half.items() if name.endswith("intermediate_size")}
    groups = {name: value for name, value in half.items() if name.endswith("num_key_value_heads")}
    middle = {f"layers.{number}.skip": "layer" for number in range(layers // 4, layers // 4 + layers // 2)}
    points = {"parent": {}, "half of the FFN": ffn, "half of the groups": groups, "both": {**ffn, **groups}}
    points["half of the layers"] = middle
    return {name: supernet.space.canonical({**largest, **point}) for name, point in points.items()}


def subnet_rows(options: Options) -> Iterator[dict[str, Any]]:
    """Extracted subnets against the parent."""
    supernet = elastic(options)
    points = subnets(supernet)
    models = {name: he.extract(supernet, point) for name, point in points.items()}
    for size, length, phase in options.workloads:
        setting = Setting.of(supernet, batch_size=size, length=length, phase=phase)
        dense = Forward(models["parent"], setting)
        for name, model in models.items():
            if name == "parent":
                continue
            pairs = paired(dense, Forward(model, setting), options)
            ratio = interval([whole / small for whole, small in pairs])
            ms = [1e3 * interval([pair[i] for pair in pairs]).median for i in (0, 1)]
            macs = he.costs.macs(supernet, points[name], seq_len=max(length, 1)) / he.costs.macs(
                supernet, points["parent"], seq_len=max(length, 1)
            )
            yield {
                "subnet": name, "workload": f"{phase} {size}x{length}", "parent ms": ms[0], "ms": ms[1],
                "speed-up": str(ratio), "MACs left": macs,
                "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "pairs": ratio.count,
            }  # fmt: skip


def active_rows(options: Options) -> Iterator[dict[str, Any]]:
    """The price of a supernet in place of the extracted model."""
    supernet = elastic(options)
    ids = tokens(options, count=1, seed=3)[0]["input_ids"].to(options.device)
    for name, point in subnets(supernet).items():
        small = he.extract(supernet, point)
        for what in ("forward", "forward and backward"):
            step = {"forward": forward_of, "forward and backward": backward_of}[what]
            with supernet.activate(point):
                pairs = paired(step(supernet.model, ids), step(small, ids), options)
            ratio = interval([active / static for active, static in pairs])
            yield {"subnet": name, "what": what, "time": str(ratio), **judged(ratio, ACTIVE)}
        supernet.model.zero_grad(set_to_none=True)


def forward_of(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False)

    return run


def backward_of(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return None

    return run


def routing_rows(options: Options) -> Iterator[dict[str, Any]]:
    """The routed model against the parent."""
    dense = parent(options)
    config = he.RoutingConfig(
        mlp_tokens=[0.5], attention_tokens=[0.5], heads=[options.kv_heads // 2], experts=[options.experts // 2],
        num_experts=options.experts, share="model",
    )  # fmt: skip
    supernet = he.add_routing(parent(options), config)
    generator = torch.Generator().manual_seed(1)
    for part in supernet.router_parts:
        for parameter in part.routers.parameters():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    largest, smallest = supernet.space.largest(), supernet.space.smallest()
    for size, length in options.routed:
        ids = torch.randint(options.vocabulary, (size, length), generator=generator).to(options.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        he.calibrate_routing(supernet, [batch])
        for kind in ("nothing", "mlp_tokens", "attention_tokens", "heads", "experts"):
            point = supernet.space.canonical({**largest, **({} if kind == "nothing" else {kind: smallest[kind]})})
            left = 1.0 if kind == "nothing" else he.routing_statistics(supernet, [batch], point).measured_macs
            with supernet.activate(point):
                pairs = paired(forward_of(supernet.model, ids), forward_of(dense, ids), options)
            ratio = interval([routed / whole for routed, whole in pairs])
            row = {"half of": kind, "workload": f"prefill {size}x{length}", "MACs left": left, "time": str(ratio)}
            saved = interval([(1 - routed / whole) / (1 - left) for routed, whole in pairs] if left < 1 else [0.0])
            row["saved"] = str(saved) if left < 1 else ""
            bar = judged(ratio, FULL) if left == 1 else judged(saved, SAVED if kind == "mlp_tokens" else None)
            yield row | bar


def command_rows(options: Options) -> Iterator[dict[str, Any]]:
    """Seconds and memory of what users call, each beginning from the random parent."""
    batches = tokens(options, count=options.tokens, seed=0)
    few = tokens(options, count=2 * options.batch * options.length, seed=1)
    half = "half of the FFN"
    supernet = elastic(options)
    with noted("sort_by_importance_", options) as row:
        he.sort_by_importance_(supernet, few)
    yield row
    with noted("refit", options) as row:
        he.refit(supernet, subnets(supernet)[half], batches)
    yield row
    with noted("measure_quality_table", options) as row:
        he.measure_quality_table(supernet, batches, few, measure="kl")
    yield row
    with noted("measure_latency_table", options) as row:
        he.measure_latency_table(supernet, batch_size=1, length=options.length)
    yield row
    with tempfile.TemporaryDirectory() as folder, noted("export", options) as row:
        he.export(supernet, subnets(supernet)[half], f"{folder}/half")
    yield row
    yield from training_rows(supernet, options)
    del supernet
    yield from adapter_rows(options)
    model = parent(options)
    with noted("sparsify_ (wanda)", options) as row:
        he.sparsify_(model, few)
    yield row
    for method in ("rtn", "gptq"):
        with noted(f"quantize_ ({method})", options) as row:
            chosen = model if method == "gptq" else parent(options)
            he.quantize_(chosen, few, method=method, group_size=options.group_size)
        yield row


def adapter_rows(options: Options) -> Iterator[dict[str, Any]]:
    """Steps of elastic LoRA and its merge into a model of its own."""
    adapted = he.add_lora(parent(options), he.ElasticLoraConfig(r=32, lora_alpha=64, ranks=[16, 24, 32]))
    yield from training_rows(adapted, options, names=("one subnet a step",), of="elastic LoRA, ")
    with noted("merge of elastic LoRA", options) as row:
        he.extract(adapted, adapted.space.midpoint(), merge=True)
    yield row


def training_rows(
    supernet: he.Supernet,
    options: Options,
    *,
    names: Sequence[str] = ("one subnet a step", "sandwich rule, distilled"),
    of: str = "",
) -> Iterator[dict[str, Any]]:
    """Steps of the sandwich rule with distillation, and of the stock Trainer on the whole model."""
    batches = tokens(options, count=16384, seed=2)
    rows = [{"input_ids": ids, "labels": ids} for batch in batches for ids in batch["input_ids"]]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=1e-5,
                report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", optim="sgd",
                use_cpu=options.device == "cpu",
            )  # fmt: skip
            rule = he.RandomSubnet(seed=0) if name.startswith("one") else he.SandwichRule(seed=0)
            trainer = he.ElasticTrainer(
                supernet=supernet, sampling=rule, distill=not name.startswith("one"), args=args, train_dataset=rows
            )
            with noted(f"{options.steps} training steps, {of}{name}", options) as row:
                trainer.train()
        yield row
        supernet.model.zero_grad(set_to_none=True)


@contextmanager
def noted(name: str, options: Options) -> Iterator[dict[str, Any]]:
    """Notes seconds and the most memory that was held, in GiB, weights of the model included."""
    gc.collect()
    if options.device != "cpu":
        torch.cuda.empty_cache()
    row: dict[str, Any] = {"command": name}
    began = time.perf_counter()
    with Peak(options.device) as peak:
        yield row
        waited(lambda: None, options.device)()
    row |= {"seconds": time.perf_counter() - began, "peak GiB": peak.value / GIB}


PARTS: Mapping[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "subnets": subnet_rows, "active": active_rows, "routing": routing_rows, "commands": command_rows,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    transformers.logging.set_verbosity_error()
    machine = environment()
    if options.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name(options.device)
    print_environment(machine)
    found: dict[str, list[dict[str, Any]]] = {}
    for part in options.parts:
        began = time.perf_counter()
        found[part] = []
        for row in PARTS[part](options):
            found[part].append(row)
            print(", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"environment": machine, "settings": settings, "rows": found})
    for rows in found.values():
        print_table(rows)


def shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def workload(text: str) -> tuple[int, int, str]:
    """``16x512`` is a prefill of 16 rows of 512 tokens, ``16x512d`` one step on a cache of 512 tokens."""
    size, _, length = text.removesuffix("d").partition("x")
    return int(size), int(length), "decode" if text.endswith("d") else "prefill"


def parsed(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="or cpu")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=32768, help="to calibrate with; at least the FFN's width")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument(
        "--workloads", nargs="+", type=workload, help="batch x tokens, ending in d for decoding",
        default=[workload(text) for text in ("1x128", "1x2048", "16x2048", "1x2048d", "16x2048d")],
    )  # fmt: skip
    parser.add_argument(
        "--routed", nargs="+", type=lambda text: workload(text)[:2], default=[(1, 2048), (8, 2048)],
        help="prefills of the routed model",
    )  # fmt: skip
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
