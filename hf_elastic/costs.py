"""What an architecture costs: parameters, MACs and KV-cache bytes in closed form, latency by measurement.

MACs are multiply-accumulates; one MAC is two FLOPs. They equal ``FlopCounterMode / 2`` on an eager forward
(with SDPA on a CPU that counter misses attention itself). Nothing here runs the model except
:func:`measure_latency`.

Of a model with adapters these are costs after merging, when the adapters are gone; what they cost while they run beside
their base is :func:`adapter_parameters` and :func:`adapter_macs`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_elastic.kept_memory import steady_memory
from hf_elastic.layers import evaluating
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.space import Architecture, SearchSpace

if TYPE_CHECKING:
    from hf_elastic.supernet import Supernet

LATENCY_TOKENS = 128
"""Tokens at which MACs are stated and latency is measured; the latter with fewer where a model has fewer positions."""
BLOCK_HEADS = ("pooler.dense", "classifier")
"""Linears outside the layers of a static model that see one token of a sequence."""
_LOADABILITY_SAMPLES = 500
_PRINT_LATENCY_LIMIT = 500_000_000  # parameters: above, one CPU forward takes seconds


def parameters(supernet: Supernet, architecture: Architecture) -> int:
    """Parameters of the exported subnet without its embeddings (an untied output head counts).

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    return total_parameters(supernet, architecture) - embedding_parameters(supernet)


def total_parameters(supernet: Supernet, architecture: Architecture) -> int:
    """Parameters of the exported subnet, each tied tensor once; skipped sublayers are gone with their norms.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    supernet.space.validate(architecture)
    blocks = sum(part.parameters(part.chosen(architecture)) for part in supernet.block_parts)
    removed = sum(removed_parameters(part, part.shape(architecture)) for part in supernet.layer_parts)
    routers = sum(part.parameters(architecture) for part in supernet.router_parts)
    return parameters_outside_blocks(supernet) + blocks + routers - removed


def parameters_outside_blocks(supernet: Supernet) -> int:
    """Parameters of the whole model that are in no candidate block, each tied tensor once."""
    blocks = sum(own.numel() for part in supernet.block_parts for own in part.layer.parameters())
    return sum(parameter.numel() for parameter in _plain_parameters(supernet)) - blocks


def _plain_parameters(supernet: Supernet) -> Iterable[nn.Parameter]:
    """Parameters of the model without adapters, each once."""
    found = [p for _, module in supernet.plain_modules() for p in module.parameters(recurse=False)]
    return {id(parameter): parameter for parameter in found}.values()


def embedding_parameters(supernet: Supernet) -> int:
    """Parameters of all embedding tables (tokens, positions, token types)."""
    tables = [m for _, m in supernet.plain_modules() if isinstance(m, nn.Embedding)]
    return sum({id(t.weight): t.weight.numel() for t in tables}.values())


def adapter_parameters(supernet: Supernet, architecture: Architecture) -> int:
    """Parameters of the adapters, of all that the model has.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    supernet.space.validate(architecture)
    return sum(part.parameters(architecture) for part in supernet.adapter_parts)


def adapter_macs(supernet: Supernet, architecture: Architecture, *, seq_len: int, batch_size: int = 1) -> int:
    """MACs of the adapters beside their bases, as if every token passed each: ``T r (in + out)``.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    supernet.space.validate(architecture)
    return batch_size * sum(part.macs(architecture, seq_len=seq_len) for part in supernet.adapter_parts)


def macs(supernet: Supernet, architecture: Architecture, *, seq_len: int, batch_size: int = 1) -> int:
    """MACs of one forward over ``(batch_size, seq_len)`` tokens, attention and output heads included.

    Of routed layers these are the nominal ones, as if exactly the capacity of the tokens entered.

    Per layer with ``T`` tokens: ``T·Σ in·out`` over its projections ``+ 2·H·d·T²`` for ``QKᵀ`` and
    ``AV`` (a causal model computes the full square, as eager attention does).

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    supernet.space.validate(architecture)
    layers = sum(layer_macs(p, p.shape(architecture), seq_len=seq_len) for p in supernet.layer_parts)
    layers += sum(p.macs(p.chosen(architecture), seq_len=seq_len) for p in supernet.block_parts)
    layers -= sum(p.saved_macs(architecture, seq_len=seq_len) for p in supernet.router_parts)
    return batch_size * (layers + fixed_macs(supernet, seq_len=seq_len))


def kv_cache_bytes(
    supernet: Supernet,
    architecture: Architecture,
    *,
    seq_len: int,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes of the KV cache of the exported subnet after ``seq_len`` tokens; 0 for an encoder.

    Per layer ``2·K·d·T`` values; a layer that keeps its FFN but not its attention writes one zero per
    token as key and as value, a layer skipped as a whole writes nothing (of a model without any layer the
    first stays, and does write). Sliding windows hold ``window - 1`` tokens.

    Args:
        supernet: the handle.
        architecture: of its space.
        seq_len: tokens seen so far.
        batch_size: sequences.
        dtype: of the cache, by default the model's.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
    """
    supernet.space.validate(architecture)
    if not supernet.causal:
        return 0
    size = (dtype or supernet.base.dtype).itemsize
    blocks = supernet.block_shapes(architecture)
    values = sum(2 * shape.num_attention_heads * shape.head_dim * seq_len for shape in blocks)
    shapes = supernet.layer_shapes(architecture)
    empty = all(shape.skipped for shape in shapes)
    for part, shape in zip(supernet.layer_parts, shapes, strict=True):
        tokens = _cached_tokens(supernet, part, seq_len)
        if shape.attention:
            values += 2 * shape.num_key_value_heads * part.head_dim * tokens
        elif shape.mlp or (empty and part.index == 0):
            values += 2 * tokens
    return batch_size * values * size


def _cached_tokens(supernet: Supernet, part: LayerPart, seq_len: int) -> int:
    window = getattr(supernet.base.config, "sliding_window", None)
    types = getattr(supernet.base.config, "layer_types", None)
    slides = window is not None and (types is None or types[part.index] == "sliding_attention")
    return min(seq_len, window - 1) if slides and window is not None else seq_len


def removed_parameters(part: LayerPart, shape: LayerShape) -> int:
    """Parameters of one layer that a shape does without; a search asks this thousands of times."""
    attention_paths = part.attention_paths()
    removed = 0 if shape.attention else part.skip_parameters["attention"]
    removed += 0 if shape.mlp else part.skip_parameters["mlp"]
    for path, projection in part.projections().items():
        if shape.attention if path in attention_paths else shape.mlp:
            rows, columns = part.projection_sizes(path, shape)
            removed += projection.weight.numel() - rows * columns
            removed += projection.bias.numel() - columns if projection.bias is not None else 0
    return removed


def layer_macs(part: LayerPart, shape: LayerShape, *, seq_len: int) -> int:
    """MACs of one layer in a shape, for one sequence of ``seq_len`` tokens."""
    attention_paths = part.attention_paths()
    total = 0
    for path in part.projections():
        if shape.attention if path in attention_paths else shape.mlp:
            rows, columns = part.projection_sizes(path, shape)
            total += seq_len * rows * columns
    if shape.attention:
        total += 2 * shape.num_attention_heads * part.head_dim * seq_len * seq_len
    return total


def fixed_macs(supernet: Supernet, *, seq_len: int) -> int:
    """MACs outside the layers (output head, pooler, classifier), for one sequence of ``seq_len`` tokens."""
    one_token_heads = BLOCK_HEADS if supernet.block_parts else supernet.family.one_token_heads
    layers = [part.layer for part in supernet.layer_parts] + [part.layer for part in supernet.block_parts]
    inside = {id(module) for layer in layers for module in layer.modules()}
    every_token = "TokenClassification" in type(supernet.base).__name__
    total = 0
    for name, module in supernet.plain_modules():
        if id(module) in inside or not isinstance(module, nn.Linear):
            continue
        one_token = not every_token and any(name == h or name.endswith("." + h) for h in one_token_heads)
        total += (1 if one_token else seq_len) * module.in_features * module.out_features
    return total


@dataclass(frozen=True)
class Latency:
    """Measured wall-clock time of one call.

    Attributes:
        median: seconds.
        samples: seconds of every timed call.
    """

    median: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Interquartile range in seconds."""
        if len(self.samples) < 2:
            return 0.0
        quartiles = statistics.quantiles(self.samples, n=4)
        return quartiles[2] - quartiles[0]


@steady_memory()
def measure_latency(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 15,
    warmup: int = 2,
    seconds: float = 60.0,
    device: torch.device | None = None,
) -> dict[str, Latency]:
    """Times calls against each other: warm-up, then rounds in which each runs once: drift hits all alike.

    Freed memory is kept meanwhile, see :func:`hf_elastic.kept_memory.steady_memory`.

    Args:
        runs: what to time, by name; each call must run the model to its end (CUDA is synchronised here).
        repeats: timed rounds.
        warmup: untimed rounds.
        seconds: stops early after this time, but never before three rounds.
        device: where the models are; by default torch's current GPU, where one is in use.

    Returns:
        Median and samples by name, in seconds.
    """
    started = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + repeats):
        if index >= warmup + 3 and time.perf_counter() - started > seconds:
            break
        for name, run in runs.items():
            synchronise(device)
            begin = time.perf_counter()
            run()
            synchronise(device)
            if index >= warmup:
                samples[name].append(time.perf_counter() - begin)
    return {name: Latency(statistics.median(times), tuple(times)) for name, times in samples.items()}


def synchronise(device: torch.device | None = None) -> None:
    """Waits until a GPU has done what it was given: that of a model, by default torch's current one, if it is in use.

    Calls return before a GPU is done, and waiting for one does not wait for another; a CPU is done when a call returns.
    """
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if in_use if device is None else device.type == "cuda":
        torch.cuda.synchronize(device)


def architecture_latency(
    supernet: Supernet,
    architectures: Mapping[str, Architecture],
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    repeats: int = 15,
) -> dict[str, Latency]:
    """Measures architectures inside the supernet, interleaved, on the model's device, in evaluation mode.

    Args:
        architectures: by name.
        inputs: of one forward; by default ``(1, 128)`` token ids, fewer where the model has fewer positions.
        repeats: timed rounds.
    """
    device = supernet.base.device
    feed = default_inputs(supernet) if inputs is None else {name: t.to(device) for name, t in inputs.items()}
    model = supernet.model

    def run(architecture: Architecture) -> Callable[[], object]:
        def call() -> object:
            with supernet.activate(architecture), torch.inference_mode():
                return model(**feed)

        return call

    with evaluating(model):
        runs = {name: run(arch) for name, arch in architectures.items()}
        return measure_latency(runs, repeats=repeats, device=device)


def default_inputs(supernet: Supernet, *, seq_len: int = LATENCY_TOKENS) -> dict[str, torch.Tensor]:
    """Token ids ``(1, T)`` for timing, ``T`` capped by the model's positions; multiple choice: ``(1, 1, T)``."""
    config = supernet.base.config
    tokens = max(1, min(seq_len, int(getattr(config, "max_position_embeddings", seq_len)) - 2))
    ids = torch.arange(tokens).remainder(min(int(config.vocab_size), 100) - 3).add(3).unsqueeze(0)  # (1, T)
    if type(supernet.base).__name__.endswith("MultipleChoice"):
        ids = ids.unsqueeze(1)  # (1, 1, T)
    return {"input_ids": ids.to(supernet.base.device)}


def describe(supernet: Supernet) -> str:
    """What ``print(supernet)`` shows: size of the space, costs, latency, shares of each loadability."""
    space = supernet.space
    low, high = space.smallest(), space.largest()
    if not (supernet.layer_parts or supernet.block_parts):
        lines = [f"{type(supernet.base).__name__} with elastic adapters", _size_line(space), *_adapter_line(supernet)]
        return "\n".join([*lines, _active_line(supernet)])
    tokens = LATENCY_TOKENS
    rng = random.Random(0)
    counts = Counter(supernet.loadability(space.sample(rng)) for _ in range(_LOADABILITY_SAMPLES))
    shares = ", ".join(f"{name} {count / _LOADABILITY_SAMPLES:.0%}" for name, count in counts.most_common())
    small, large = parameters(supernet, low), parameters(supernet, high)
    small_macs, large_macs = macs(supernet, low, seq_len=tokens), macs(supernet, high, seq_len=tokens)
    return "\n".join(
        [
            f"{type(supernet.base).__name__} supernet ({supernet.base.config.model_type})",
            _size_line(space),
            f"  parameters     {count(small)} to {count(large)} without embeddings "
            f"({small / large:.0%} to 100%), plus {count(embedding_parameters(supernet))} in embeddings",
            *_adapter_line(supernet),
            f"  MACs           {count(small_macs)} to {count(large_macs)} at 1 x {tokens} tokens "
            f"({small_macs / large_macs:.0%} to 100%)",
            f"  latency        {_latency_line(supernet, low, high)}",
            f"  loadability    {shares} (of {_LOADABILITY_SAMPLES} sampled)",
            _active_line(supernet),
        ]
    )


def _size_line(space: SearchSpace) -> str:
    return f"  architectures  {count(space.size)} from {len(space)} choices"


def _active_line(supernet: Supernet) -> str:
    largest = supernet.active == supernet.space.largest()
    return f"  active         {'largest' if largest else repr(supernet.active)}"


def _adapter_line(supernet: Supernet) -> list[str]:
    """The line about adapters, where there are some."""
    if not supernet.adapter_parts:
        return []
    space = supernet.space
    small, large = (adapter_parameters(supernet, point) for point in (space.smallest(), space.largest()))
    modules = f"on {len(supernet.adapter_parts)} modules, none once they are merged"
    return [f"  adapters       {count(small)} to {count(large)} parameters ({small / large:.0%} to 100%) {modules}"]


def _latency_line(supernet: Supernet, low: Architecture, high: Architecture) -> str:
    if supernet.base.device.type == "cpu" and total_parameters(supernet, high) > _PRINT_LATENCY_LIMIT:
        return "not measured for a model of this size on a CPU; call hf_elastic.costs.architecture_latency"
    if any(part.uncalibrated for part in supernet.router_parts):
        return "not measured before routers of tokens are calibrated; call hf_elastic.calibrate_routing"
    feed = default_inputs(supernet)
    timed = architecture_latency(supernet, {"low": low, "high": high}, inputs=feed, repeats=5)
    fast, slow = timed["low"].median, timed["high"].median
    where = f"{supernet.base.device} at 1 x {feed['input_ids'].shape[-1]} tokens"
    span = f"{fast * 1e3:.1f} to {slow * 1e3:.1f} ms measured on {where}"
    gain = f"{slow / fast:.2f}x faster" if fast <= slow else f"{fast / slow:.2f}x slower"
    return f"{span} ({gain} at the smallest)"


def count(number: float) -> str:
    """A number with a unit: 1.23 M; exact beyond what a float can say, as spaces are."""
    if abs(number) >= 10**15:
        whole = int(number)
        exponent = len(str(abs(whole))) - 1
        return f"{whole // 10 ** (exponent - 2) / 100:.2f}e+{exponent}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"
