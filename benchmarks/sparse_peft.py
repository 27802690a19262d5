"""What SparsePEFT costs here, beside its plain form and beside stock LoRA, in paired ratios.

    python benchmarks/sparse_peft.py [--parts memory short long] [--json FILE]

Three copies of one half-sparse LLaMA-like model with adapters of rank 32 on all linear layers and equal weights:

* ``ours``: ``ElasticLoraConfig(sparse=True)``;
* ``plain``: the formula with autograd, as the official code has it: the base's product, and beside it that of the input
  with ``s (B A) ⊙ M``, the mask kept;
* ``stock``: peft's LoRA, which would fill the zeros when merged.

``memory`` is the peak of what one training step allocates beside the weights, counted allocation by allocation, so
that no allocator that keeps what is freed has a say: ours above stock, as a share of plain above stock. ``short`` and
``long`` time a step (forward, backward, AdamW) on 1,024 and 4,096 tokens. An exact gradient of a masked product needs a
third product of the base's size, so about 1.5 of stock LoRA's time is the floor.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from backbone import Size
from elastic_lora import Passes, peak_bytes
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
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_elastic as he

PARTS = ("memory", "short", "long")
MEMORY, SHORT, LONG, STOCK = Bar("at most", 0.25), Bar("at most", 1.10), Bar("at most", 1.02), Bar("at most", 1.6)
SETTINGS: dict[str, Any] = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
TOKENS = {"short": 1024, "long": 4096}


class PlainSparse(LoraLinear):
    """SparsePEFT as the formula reads; made by swapping the class of peft's layer."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        mask = self.base_layer.weight != 0
        product = self.lora_B["default"].weight @ self.lora_A["default"].weight
        delta = (product * mask) * self.scaling["default"]
        return self.base_layer(x) + nn.functional.linear(self.lora_dropout["default"](x), delta)


def model_of(size: Size) -> LlamaForCausalLM:
    """A random half-sparse model with a small vocabulary, so that its head says little."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=size.hidden, intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    he.sparsify_(model, method="magnitude", sparsity=0.5)
    return model


class Three:
    """The model in its three forms."""

    def __init__(self, size: Size) -> None:
        base = model_of(size)
        self.stock: PeftModel = get_peft_model(copy.deepcopy(base), LoraConfig(**SETTINGS))
        for name, parameter in self.stock.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.01 * torch.randn_like(parameter)
        self.plain = copy.deepcopy(self.stock)
        for module in self.plain.modules():
            if type(module) is LoraLinear:
                module.__class__ = PlainSparse
        supernet = he.add_lora(base, he.ElasticLoraConfig(**SETTINGS, ranks=[16, 24], sparse=True))
        self.ours: PeftModel = supernet.model
        self.ours.load_state_dict(self.stock.state_dict())

    def check(self, passes: Passes) -> None:
        """Shows that ours computes what the plain form does, and stock LoRA something else."""
        with torch.inference_mode():
            ours, plain, stock = (m(input_ids=passes.ids).logits for m in (self.ours, self.plain, self.stock))
        largest = float(plain.abs().max())
        assert float((ours - plain).abs().max()) <= 1e-4 * largest, "ours is not the formula"
        assert float((stock - plain).abs().max()) > 1e-4 * largest, "the mask does nothing"


def memory(three: Three, passes: Passes) -> list[dict[str, Any]]:
    """The row of peak memory."""
    found = []
    for _ in range(3):
        stock, plain, ours = (
            peak_bytes(lambda model=model: passes.step(model)) for model in (three.stock, three.plain, three.ours)
        )
        found.append((ours - stock) / (plain - stock))
    return [
        {
            "what": "memory above stock LoRA, ours / plain", "tokens": passes.ids.numel(), "stock_mb": stock / 1e6,
            "plain_mb": plain / 1e6, "ours_mb": ours / 1e6, **judged(interval(found), MEMORY),
        }
    ]  # fmt: skip


def timed(three: Three, passes: Passes, *, part: str, pairs: int, clock: Clock) -> list[dict[str, Any]]:
    """Rows of ratios of a step."""
    rows = []
    others: dict[str, tuple[nn.Module, Bar]] = {
        "plain": (three.plain, SHORT if part == "short" else LONG), "stock": (three.stock, STOCK),
    }  # fmt: skip
    for name, (other, bar) in others.items():
        ours: Callable[[], None] = lambda: passes.step(three.ours)  # noqa: E731
        found = paired_seconds(ours, lambda other=other: passes.step(other), pairs=pairs, warmup=1, clock=clock)
        rows.append(row({"what": f"step, ours / {name}", "tokens": str(passes.ids.numel())}, found, bar=bar))
        print_table(rows[-1:])
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs=2, default=list(TOKENS.values()), help="of short and of long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    machine = environment()
    print_environment(machine)
    tokens = dict(zip(TOKENS, arguments.tokens, strict=True))
    size = Size(arguments.layers, arguments.hidden, 1, tokens["short"])
    three, times, peaks = Three(size), [], []
    three.check(Passes(size))
    if "memory" in arguments.parts:
        peaks = memory(three, Passes(size))
        print_table(peaks)
    for part in ("short", "long"):
        if part in arguments.parts:
            length = min(tokens[part], 512)
            passes = Passes(Size(arguments.layers, arguments.hidden, tokens[part] // length, length))
            times += timed(three, passes, part=part, pairs=arguments.pairs, clock=CLOCKS[arguments.clock])
    settings = {name: getattr(arguments, name) for name in ("layers", "hidden", "tokens", "pairs", "clock")}
    write_json(arguments.json, {"environment": machine, "settings": settings, "times": times, "memory": peaks})


if __name__ == "__main__":
    main()
