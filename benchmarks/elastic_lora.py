"""What elastic adapters cost beside peft's own LoRA, in paired ratios.

    python benchmarks/elastic_lora.py [--families bert llama gpt2] [--parts control largest random memory] [--json FILE]

Both models have adapters of rank 32 on all linear layers and the same weights; the elastic ones may have rank 16, 24 or
32 per layer.

* ``largest``: all ranks at 32, against stock LoRA;
* ``random``: other ranks drawn and activated in every pass, against stock LoRA at 32;
* ``memory``: peak of what one training step allocates beside the weights.

``forward`` is inference, ``forward+backward`` has the gradients of the adapters, ``step`` an AdamW step on top.
``control`` times the stock model against a copy of itself: what the machine adds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from backbone import FAMILIES, Size
from measuring import (
    CLOCKS,
    Bar,
    Clock,
    environment,
    interval,
    judged,
    paired_seconds,
    print_environment,
    print_table,
    row,
    write_json,
)  # fmt: skip
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hf_elastic as he

PARTS = ("control", "largest", "random", "memory")
LARGEST, RANDOM, MEMORY = Bar("at most", 1.03), Bar("at most", 1.02), Bar("at most", 1.02)
RANK, RANKS = 32, [16, 24, 32]


class Passes:
    """What is timed, on one input."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids: Tensor = torch.randint(1024, (size.batch, size.length), generator=generator)  # (B, T)
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def forward(self, model: nn.Module) -> None:
        with torch.inference_mode():
            model(input_ids=self.ids)

    def both(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(input_ids=self.ids, labels=self.ids).loss.backward()

    def step(self, model: nn.Module) -> None:
        self.both(model)
        if id(model) not in self.optimizers:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.optimizers[id(model)] = torch.optim.AdamW(trained, lr=1e-5)
        self.optimizers[id(model)].step()

    def named(self) -> dict[str, Callable[[nn.Module], None]]:
        return {"forward": self.forward, "forward+backward": self.both, "step": self.step}


class Pair:
    """A model with stock LoRA, and the same with elastic LoRA."""

    def __init__(self, family: str, size: Size) -> None:
        torch.manual_seed(0)
        base = FAMILIES[family](size).eval()
        shared: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
        shared["fan_in_fan_out"] = family == "gpt2"
        self.stock: PeftModel = get_peft_model(copy.deepcopy(base), LoraConfig(**shared))
        self.supernet = he.add_lora(base, he.ElasticLoraConfig(**shared, ranks=RANKS))
        for name, parameter in self.stock.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.01 * torch.randn_like(parameter)
        self.supernet.model.load_state_dict(self.stock.state_dict())
        self.rule, self.drawn = he.RandomSubnet(seed=0), 0

    def check(self, passes: Passes) -> None:
        """Shows that both compute the same at the largest ranks.

        Raises:
            RuntimeError: they do not.
        """
        with torch.inference_mode():
            ours, stock = (model(input_ids=passes.ids).logits for model in (self.supernet.model, self.stock))
        if not float((ours - stock).abs().max()) <= 1e-5 * float(stock.abs().max()):
            raise RuntimeError("elastic LoRA at its largest ranks is not peft's LoRA")

    def at_random(self, run: Callable[[nn.Module], None]) -> None:
        (architecture,) = self.rule.draw(self.supernet.space, self.drawn, 0)
        self.drawn += 1
        with self.supernet.activate(architecture):
            run(self.supernet.model)


def timed(
    family: str, pair: Pair, passes: Passes, *, parts: list[str], pairs: int, clock: Clock
) -> list[dict[str, Any]]:
    """Rows of ratios of one family."""
    rows = []
    pair.check(passes)
    other = copy.deepcopy(pair.stock) if "control" in parts else None
    for name, run in passes.named().items():
        def stock(run: Callable[[nn.Module], None] = run) -> None:
            run(pair.stock)

        candidates: dict[str, tuple[Callable[[], None], Bar | None]] = {
            "control": (lambda run=run: run(other), None),
            "largest": (lambda run=run: run(pair.supernet.model), LARGEST),
            "random": (lambda run=run: pair.at_random(run), RANDOM),
        }
        for part, (call, bar) in candidates.items():
            if part in parts:
                found = paired_seconds(call, stock, pairs=pairs, clock=clock)
                rows.append(row({"family": family, "what": part, "pass": name}, found, bar=bar))
                print_table(rows[-1:])
    return rows


def peak_bytes(call: Callable[[], None]) -> int:
    """Most bytes that one call holds at a time beyond what was there before it."""
    call()  # buffers that are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(family: str, pair: Pair, passes: Passes) -> list[dict[str, Any]]:
    """Rows of ratios of peak memory of one family."""
    stock = peak_bytes(lambda: passes.step(pair.stock))
    calls: dict[str, Callable[[], None]] = {
        "largest": lambda: passes.step(pair.supernet.model),
        "random": lambda: pair.at_random(passes.step),
    }
    rows = []
    for name, call in calls.items():
        peaks = [peak_bytes(call) / stock for _ in range(3)]
        found = judged(interval(peaks), MEMORY)
        rows.append({"family": family, "what": f"memory, {name}", "pass": "step", "stock_mb": stock / 1e6, **found})
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    machine = environment()
    print_environment(machine)
    size = Size(arguments.layers, arguments.hidden, arguments.batch, arguments.length)
    times, peaks = [], []
    for family in arguments.families:
        pair, passes = Pair(family, size), Passes(size)
        if set(arguments.parts) - {"memory"}:
            times += timed(
                family, pair, passes, parts=arguments.parts, pairs=arguments.pairs, clock=CLOCKS[arguments.clock]
            )  # fmt: skip
        if "memory" in arguments.parts:
            peaks += memory(family, pair, passes)
            print_table(peaks[-2:])
    settings = {name: getattr(arguments, name) for name in ("layers", "hidden", "batch", "length", "pairs", "clock")}
    write_json(arguments.json, {"environment": machine, "settings": settings, "times": times, "memory": peaks})


if __name__ == "__main__":
    main()
