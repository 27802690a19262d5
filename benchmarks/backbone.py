"""What elasticity of a backbone costs, and what a smaller model gains, in paired ratios.

    python benchmarks/backbone.py [--families bert llama gpt2] [--parts largest active speedup switch] [--json FILE]

* ``largest``: the class-swapped model at its largest architecture against the stock model;
* ``active``: a subnet active inside the supernet against its extracted copy;
* ``speedup``: how much faster the extracted subnet is than the stock model, as a share of what its MACs promise;
* ``switch``: milliseconds to switch a model of twice the layers between random architectures.

Forward (inference) and forward + backward (gradients of all weights, freed before each pass) apart. Weights are random,
dropout is off. ``control`` times the stock model against a copy of itself: what the machine adds.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
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
    seconds,
    write_json,
)  # fmt: skip
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)  # fmt: skip

import hf_elastic as he

PARTS = ("control", "largest", "active", "speedup", "switch")
LARGEST, ACTIVE = Bar("at most", 1.03), Bar("at most", 1.06)
SPEEDUP, SWITCH = Bar("at least", 0.85), Bar("at most", 2.0)
VOCABULARY = 1024  # small, so that the layers and not the output head are measured
HEAD_SIZE = 64


@dataclass(frozen=True)
class Size:
    """Size of a model and of its input."""

    layers: int
    hidden: int
    batch: int
    length: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE


def bert(size: Size) -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=size.length,
        )
    )  # fmt: skip


def llama(size: Size) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=8 * size.hidden // 3,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 3),
            max_position_embeddings=size.length,
        )
    )  # fmt: skip


def gpt2(size: Size) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=size.hidden, n_layer=size.layers, n_head=size.heads, n_positions=size.length,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Size], PreTrainedModel]] = {"bert": bert, "llama": llama, "gpt2": gpt2}


def elastic_config(model: PreTrainedModel, *, skips: bool) -> he.ElasticConfig:
    """Widths, heads and depth, of which the midpoint is half the width and heads and all layers; or skips as well."""
    groups = getattr(model.config, "num_key_value_heads", None)
    heads = groups or model.config.num_attention_heads
    counts = sorted({max(1, heads // 4), max(1, heads // 2), heads})
    return he.ElasticConfig(
        intermediate_size=[0.25, 0.5, 1.0],
        num_key_value_heads=counts if groups else None,
        num_attention_heads=None if groups else counts,
        num_hidden_layers=[0.5, 1.0],
        skip=["attention", "mlp"] if skips else None,
        multiple_of=8,
    )


class Passes:
    """Forward and forward + backward of models on one input."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids: Tensor = torch.randint(VOCABULARY, (size.batch, size.length), generator=generator)  # (B, T)

    def forward(self, model: PreTrainedModel) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=self.ids).logits

    def both(self, model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(input_ids=self.ids, labels=self.ids).loss.backward()

    def named(self) -> dict[str, Callable[[PreTrainedModel], object]]:
        return {"forward": self.forward, "forward+backward": self.both}


class Family:
    """A stock model, its elastic copy, and subnets cut out of it."""

    def __init__(self, name: str, size: Size, *, pairs: int, switches: int, clock: Clock) -> None:
        torch.manual_seed(0)
        self.name, self.pairs, self.switches, self.clock = name, pairs, switches, clock
        self.stock = FAMILIES[name](size).eval()
        elastic = copy.deepcopy(self.stock)
        self.supernet = he.make_elastic(elastic, elastic_config(elastic, skips=False))
        self.size, self.passes = size, Passes(size)
        space = self.supernet.space
        self.subnets = {"midpoint": space.midpoint(), "smallest": space.smallest()}
        expected, found, again = (self.passes.forward(model) for model in (self.stock, elastic, self.stock))
        if not torch.equal(expected, found):
            by, of_itself = ((output - expected).abs().max().item() for output in (found, again))
            raise RuntimeError(
                f"{name}: the largest architecture differs from the stock model by {by:.3g}; that one from itself, run "
                f"again, by {of_itself:.3g}"
            )

    def extracted(self, subnet: str) -> PreTrainedModel:
        """The subnet as a model of its own, checked against the one inside the supernet."""
        model = he.extract(self.supernet, self.subnets[subnet])
        outside = self.passes.forward(model)
        with self.supernet.activate(self.subnets[subnet]):
            inside = self.passes.forward(self.supernet.model)
        if (inside - outside).abs().max() > 1e-5 * inside.abs().max():
            raise RuntimeError(f"{self.name}: the extracted {subnet} differs from the active one")
        return model

    def _compared(
        self, label: dict[str, str], runs: Callable[[Any], tuple[Callable[[], object], Callable[[], object]]],
        *, bar: Bar | None, scale: float = 1.0,
    ) -> list[dict[str, Any]]:  # fmt: skip
        found = []
        for kind, run in self.passes.named().items():
            pairs = paired_seconds(*runs(run), pairs=self.pairs, clock=self.clock)
            found.append(row({"family": self.name, **label, "pass": kind}, pairs, bar=bar, scale=scale))
            print_table(found[-1:])
        return found

    def control(self) -> list[dict[str, Any]]:
        twin = copy.deepcopy(self.stock)
        return self._compared(
            {"first / second": "stock / stock", "subnet": "largest"},
            lambda run: (lambda: run(self.stock), lambda: run(twin)), bar=None,
        )  # fmt: skip

    def largest(self) -> list[dict[str, Any]]:
        return self._compared(
            {"first / second": "elastic / stock", "subnet": "largest"},
            lambda run: (lambda: run(self.supernet.model), lambda: run(self.stock)), bar=LARGEST,
        )  # fmt: skip

    def active(self) -> list[dict[str, Any]]:
        found = []
        for subnet, architecture in self.subnets.items():
            alone = self.extracted(subnet)
            with self.supernet.activate(architecture):
                found += self._compared(
                    {"first / second": "active / extracted", "subnet": subnet},
                    lambda run, alone=alone: (lambda: run(self.supernet.model), lambda: run(alone)), bar=ACTIVE,
                )  # fmt: skip
        return found

    def speedup(self) -> list[dict[str, Any]]:
        found = []
        for subnet, architecture in self.subnets.items():
            alone = self.extracted(subnet)
            promised = self._macs(self.supernet.space.largest()) / self._macs(architecture)
            found += self._compared(
                {"first / second": f"stock / extracted / {promised:.2f}", "subnet": subnet},
                lambda run, alone=alone: (lambda: run(self.stock), lambda: run(alone)),
                bar=SPEEDUP, scale=1 / promised,
            )  # fmt: skip
        return found

    def _macs(self, architecture: he.Architecture) -> int:
        return he.costs.macs(self.supernet, architecture, seq_len=self.size.length)

    def switch(self) -> list[dict[str, Any]]:
        """Milliseconds of one switch, validation of the architecture included, with every kind of choice."""
        size = Size(2 * self.size.layers, self.size.hidden, self.size.batch, self.size.length)
        model = FAMILIES[self.name](size)
        supernet = he.make_elastic(model, elastic_config(model, skips=True))
        rng = random.Random(0)
        points = [supernet.space.sample(rng) for _ in range(self.switches)]
        times = [1e3 * seconds(lambda point=point: supernet.set_active(point)) for point in points]
        label = {"family": self.name, "first / second": "ms of a switch", "subnet": "random"}
        median = statistics.median(times)
        return [{
            **label, "pass": f"{size.layers} layers", "first_ms": median, "second_ms": max(times),
            **judged(interval(times), SWITCH),
        }]  # fmt: skip


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=6, help="of the models that run; twice as many are switched")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--threads", type=int, help="by default what torch chooses")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with --threads 1, on a shared machine")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    machine = environment()
    print_environment(machine)
    tokens = f"{options.batch} x {options.length} tokens"
    print(f"{options.layers} layers x {options.hidden}, {tokens}, {options.pairs} pairs, {options.clock} clock")
    rows: list[dict[str, Any]] = []
    for name in options.families:
        size = Size(options.layers, options.hidden, options.batch, options.length)
        family = Family(name, size, pairs=options.pairs, switches=options.switches, clock=CLOCKS[options.clock])
        for part in options.parts:
            rows += getattr(family, part)()
    print()
    print_table(rows)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"environment": machine, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
