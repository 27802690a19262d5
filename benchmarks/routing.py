"""What routing saves: time of a forward as a share of the parent's, beside the share of MACs that was left out.

    python benchmarks/routing.py [--threads 2] [--json benchmarks/results/routing.json]

Random models of 6 layers x 768 are run over one row of 2,048 tokens, with one kind of router in all layers at half of
its capacity and all else full, and with all kinds at once; and with all at full capacity, where routers are bypassed.
Routers have random weights, and those of tokens in causal models thresholds that let half of the tokens in; how many
rows were computed is measured, not assumed. ``saved`` is the share of the parent's time that was saved over the share
of its MACs: 1 where all that is left out is time won. ``decode`` rows are steps of one token on a cache, for batches of
1 and 16 rows, whatever comes out. Pairs alternate in one process.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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
    write_json,
)  # fmt: skip
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import hf_elastic as he

FULL = Bar("at most", 1.03)
SAVED = Bar("at least", 0.8)
SEEN = 128  # tokens in the cache of a decoding step


def make_model(family: str, options: argparse.Namespace) -> Any:
    """A random model in evaluation mode."""
    torch.manual_seed(0)
    hidden, layers, heads, length = options.hidden, options.layers, options.heads, options.length + SEEN
    if family == "llama":
        width = options.experts * (8 * hidden // 3 // options.experts)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=hidden, intermediate_size=width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(2, heads // 3),
            max_position_embeddings=length,
        )  # fmt: skip
        return LlamaModel(config).eval()
    if family == "gpt2":
        return GPT2Model(
            GPT2Config(vocab_size=1024, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length)
        ).eval()
    return BertModel(
        BertConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=length,
        )  # fmt: skip
    ).eval()


def routed(model: Any, options: argparse.Namespace, batch: Mapping[str, torch.Tensor]) -> he.Supernet:
    """The model with routers of all kinds at half of their capacities, calibrated on the batch."""
    groups = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    config = he.RoutingConfig(
        mlp_tokens=[0.5], attention_tokens=[0.5], heads=[groups // 2], experts=[options.experts // 2],
        num_experts=options.experts, share="model",
    )  # fmt: skip
    supernet = he.add_routing(model, config)
    generator = torch.Generator().manual_seed(1)
    for part in supernet.router_parts:
        for parameter in part.routers.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
    he.calibrate_routing(supernet, [batch])
    return supernet


def half(supernet: he.Supernet, *kinds: str) -> he.Architecture:
    """Half of the capacity of some kinds, all of the others."""
    largest, smallest = supernet.space.largest(), supernet.space.smallest()
    return supernet.space.canonical({**largest, **{kind: smallest[kind] for kind in kinds}})


def macs_left(supernet: he.Supernet, architecture: he.Architecture, batch: Mapping[str, torch.Tensor]) -> float:
    """Share of the parent's MACs in a forward, with the tokens that really entered."""
    statistics = he.routing_statistics(supernet, [batch], architecture)
    return statistics.measured_macs


def prefill_rows(family: str, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """One family at full capacity and with each kind at half of it."""
    ids = torch.randint(1024, (1, options.length), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parent = make_model(family, options)
    supernet = routed(copy.deepcopy(parent), options, batch)
    kinds = ("mlp_tokens", "attention_tokens", "heads", "experts")
    settings = {"full": (), **{kind: (kind,) for kind in kinds}, "all": kinds}
    rows = []
    for name, halved in settings.items():
        architecture = half(supernet, *halved)
        left = macs_left(supernet, architecture, batch) if halved else 1.0
        with supernet.activate(architecture), torch.inference_mode():
            if not halved and not torch.equal(supernet.model(**batch)[0], parent(**batch)[0]):
                raise RuntimeError(f"{family}: the routed model at full capacity is not its parent")
            pairs = paired_seconds(
                lambda: supernet.model(**batch), lambda: parent(**batch), pairs=options.pairs, clock=clock
            )
        ratio = interval([routed_seconds / dense for routed_seconds, dense in pairs])
        row = {"family": family, "what": f"prefill {options.length}", "half": name, "MACs left": left}
        row |= {"time": str(ratio), **{key: getattr(ratio, key) for key in ("median", "low", "high", "count")}}
        if halved:
            saved = interval([(1 - routed_seconds / dense) / (1 - left) for routed_seconds, dense in pairs])
            row |= {"saved": str(saved), **(judged(saved, SAVED) if name == "mlp_tokens" else {})}
        else:
            row |= {"saved": "", **judged(ratio, FULL)}
        rows.append(row)
        print(f"{family}, {name}: {ratio} of the time, {left:.3f} of the MACs", flush=True)
    return rows


def decode_rows(family: str, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Steps of one token on a cache, for small batches."""
    rows = []
    for size in (1, 16):
        ids = torch.randint(1024, (size, SEEN + 1), generator=torch.Generator().manual_seed(3))
        parent = make_model(family, options)
        supernet = routed(copy.deepcopy(parent), options, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        for name in ("mlp_tokens", "experts"):
            with supernet.activate(half(supernet, name)), torch.inference_mode():
                steps = [stepper(model, ids) for model in (supernet.model, parent)]
                pairs = paired_seconds(*steps, pairs=4 * options.pairs, clock=clock)
            ratio = interval([routed_seconds / dense for routed_seconds, dense in pairs])
            row = {"family": family, "what": f"decode, batch {size}", "half": name, "time": str(ratio)}
            rows.append(row | {key: getattr(ratio, key) for key in ("median", "low", "high", "count")})
            print(f"{family}, {row['what']}, {name}: {ratio} of the time", flush=True)
    return rows


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """A call that decodes one token after the others, from the same cache every time."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)

    def step() -> object:
        output = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return output

    return step


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameters of the routers, and the size of their file, as shares of the model's."""
    rows = []
    for family in options.families:
        model = make_model(family, options)
        whole = sum(parameter.numel() for parameter in model.parameters())
        for kind in ("mlp_tokens", "attention_tokens", "heads", "experts"):
            groups = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
            value = {"heads": [groups // 2], "experts": [options.experts // 2]}.get(kind, [0.5])
            more = {"num_experts": options.experts} if kind == "experts" else {}
            supernet = he.add_routing(copy.deepcopy(model), he.RoutingConfig(**{kind: value}, **more))
            count = sum(p.numel() for part in supernet.router_parts for p in part.routers.parameters())
            row = {"family": family, "routers": kind, "parameters": count, "share": f"{count / whole:.4%}"}
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    machine = environment()
    print_environment(machine)
    rows = [row for family in options.families for row in prefill_rows(family, options, clock)]
    rows += [row for family in options.families if family != "bert" for row in decode_rows(family, options, clock)]
    print_table([{k: v for k, v in row.items() if k not in ("median", "low", "high", "count")} for row in rows])
    sizes = overhead(options)
    print_table(sizes)
    stated = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"environment": machine, "options": stated, "rows": rows, "routers": sizes})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["bert", "llama", "gpt2"], choices=["bert", "llama", "gpt2"])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
