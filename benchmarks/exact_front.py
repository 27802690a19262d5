"""How long exact search takes for the whole Pareto front, once the tables that it reads are there.

    python benchmarks/exact_front.py [--spaces encoder decoder] [--repeats 7] [--json FILE]

* ``encoder``: a BERT of MiniLM's shape with widths, heads and skips per layer; its quality table is made up;
* ``decoder``: 2^64 * 5^32 architectures of 32 layers of LLaMA-7B's sizes, each with two binary choices and one of five.

Damages are seeded and grow as sizes shrink, at a pace of each layer's own; costs are whole numbers. Layers of equal
sizes have equal MACs and parameters, so that many sums coincide; ``nanoseconds`` are those of a latency table, 10 % off
either way (seeded as well), so that hardly any do. Timed is what a user calls, ``search_subnets``, with two goals and
without limits.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from measuring import CLOCKS, Bar, environment, interval, print_environment, print_table, seconds, write_json
from predicted_speedup import Size, supernet_of

import hf_elastic as he
from hf_elastic.search import AdditiveTable
from hf_elastic.space import Choice, SearchSpace
from hf_elastic.tables.quality import WHOLE, QualityTable, sublayer_options

BARS = {"encoder": Bar("at most", 2.0), "decoder": Bar("at most", 10.0)}
MINILM = Size(layers=6, hidden=384, heads=12, positions=130, vocabulary=30522)
EVERY_WIDTH = 64

HIDDEN, LENGTH = 4096, 128  # LLaMA-7B's residual stream; tokens whose MACs are counted
HEADS, HEAD_SIZES = (20, 32), (96, 128)
WIDTHS = (2752, 5504, 8256, 9632, 11008)
COSTS = ("macs", "parameters", "nanoseconds")


@dataclass(frozen=True)
class Problem:
    """A space with its damage and the costs that it is traded against, one after the other."""

    space: SearchSpace
    damage: he.Objective
    costs: tuple[he.Objective, ...]


def shrinking(rng: random.Random) -> Callable[[float], float]:
    """Damage by the share that is kept: 0 at 1, growing as it shrinks, at a random pace and scale."""
    scale, pace = 10 ** rng.uniform(-2, 0), rng.uniform(1.2, 3.0)
    return lambda share: scale * (1 - share) ** pace


def quality_table(supernet: he.Supernet, *, seed: int) -> QualityTable:
    """A made-up table: damages of every option of every layer; leaving out a layer costs more than both sublayers."""
    rng, rows = random.Random(seed), []
    for part in supernet.layer_parts:
        whole = {"mlp": part.full.intermediate_size, "attention": part.full.num_key_value_heads}
        damage = {sublayer: shrinking(rng) for sublayer in whole}
        row = {WHOLE: 1.2 * sum(function(0) for function in damage.values())}
        for option in sublayer_options(part, sizes=EVERY_WIDTH):
            sublayer, _, size = option.partition("/")
            if option != WHOLE:
                row[option] = damage[sublayer](int(size) / whole[sublayer])
        rows.append(row)
    return QualityTable("made up", f"seed {seed}", tuple(rows))


def encoder(*, layers: int, seed: int) -> Problem:
    """The space of ``predicted_speedup.py`` on a BERT with random weights, which no cost depends on."""
    size = Size(layers, MINILM.hidden, MINILM.heads, MINILM.positions, MINILM.vocabulary)
    supernet = supernet_of("bert", size)
    damage = he.objectives.damage(supernet, quality_table(supernet, seed=seed))
    costs = (he.objectives.macs(supernet), he.objectives.parameters(supernet))
    return Problem(supernet.space, damage, costs)


def decoder(*, layers: int, seed: int) -> Problem:
    """Heads, their size and the FFN width of every layer: per layer 2 * 2 * 5 shapes.

    Raises:
        RuntimeError: the space is not of the size that it is to have.
    """
    rng, choices = random.Random(seed), []
    tables: dict[str, list[dict[tuple[int, ...], float]]] = {"damage": [], **{name: [] for name in COSTS}}
    for number in range(layers):
        names = (f"layers.{number}.{name}" for name in ("num_attention_heads", "head_dim", "intermediate_size"))
        choices.append([Choice(*pair) for pair in zip(names, (HEADS, HEAD_SIZES, WIDTHS), strict=True)])
        pieces = [(values[-1], shrinking(rng)) for values in (HEADS, HEAD_SIZES, WIDTHS)]
        shapes = list(itertools.product(HEADS, HEAD_SIZES, WIDTHS))
        tables["damage"].append(
            {shape: sum(f(value / most) for value, (most, f) in zip(shape, pieces, strict=True)) for shape in shapes}
        )
        tables["macs"].append({shape: layer_macs(*shape) for shape in shapes})
        tables["parameters"].append({shape: layer_parameters(*shape) for shape in shapes})
        tables["nanoseconds"].append({s: round(layer_macs(*s) / 1e3 * rng.uniform(0.9, 1.1)) for s in shapes})
    space = SearchSpace(choice for own in choices for choice in own)
    if space.size != (2**2 * 5) ** layers:
        raise RuntimeError(f"the space has {space.size} architectures, not 2^{2 * layers} * 5^{layers}")
    groups = tuple(tuple(choice.name for choice in own) for own in choices)
    made = {name: AdditiveTable(groups, tuple(rows)) for name, rows in tables.items()}
    damage, *costs = (
        he.Objective(name, table.value, cost=name != "damage", additive=table) for name, table in made.items()
    )
    return Problem(space, damage, tuple(costs))


def layer_parameters(heads: int, head_size: int, width: int) -> int:
    """Weights of a layer's projections: four of attention, three of a gated FFN."""
    return 4 * HIDDEN * heads * head_size + 3 * HIDDEN * width


def layer_macs(heads: int, head_size: int, width: int) -> int:
    """MACs of a layer for ``LENGTH`` tokens, scores and mixing of all pairs of tokens included."""
    return LENGTH * layer_parameters(heads, head_size, width) + 2 * LENGTH**2 * heads * head_size


SPACES = {"encoder": encoder, "decoder": decoder}


def rows_of(name: str, problem: Problem, *, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times the front of damage against each cost."""
    for cost in problem.costs:
        results: list[he.SearchResult] = []

        def search(cost: he.Objective = cost, results: list[he.SearchResult] = results) -> None:
            goals = [problem.damage, cost]
            results[:] = [he.search_subnets(problem.space, goals, algorithm="exact", progress=False)]

        times = [seconds(search, clock=CLOCKS[options.clock]) for _ in range(options.repeats)]
        found = interval(times)
        yield {
            "space": name, "architectures": written(problem.space.size), "front": f"damage x {cost.name}",
            "points": len(results[0].front), "seconds": found.median, "low": found.low, "high": found.high,
            "slowest": max(times), "repeats": found.count, "bar": str(BARS[name]),
            "met": "yes" if BARS[name].met(found) else "NO",
        }  # fmt: skip


def written(size: int) -> str:
    """A number of architectures in scientific notation, also beyond what a float holds."""
    digits = str(size)
    return f"{digits[0]}.{digits[1:3].ljust(2, '0')}e{len(digits) - 1}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    machine = environment()
    print_environment(machine)
    layers = {"encoder": options.encoder_layers, "decoder": options.decoder_layers}
    rows: list[dict[str, Any]] = []
    for name in options.spaces:
        rows += rows_of(name, SPACES[name](layers=layers[name], seed=options.seed), options=options)
    print_table(rows)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"environment": machine, "settings": settings, "rows": rows})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=list(SPACES), default=list(SPACES))
    parser.add_argument("--encoder-layers", type=int, default=MINILM.layers)
    parser.add_argument("--decoder-layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of the made-up damages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where others use the machine too")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
