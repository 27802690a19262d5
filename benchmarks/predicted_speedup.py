"""How well a latency table predicts the speed-up of exported models, each timed against its parent.

    python benchmarks/predicted_speedup.py [--families bert llama gpt2] [--phases prefill decode] [--json FILE]

Per family and phase: a table is measured, random architectures of a space of per-layer FFN widths, heads and skips are
extracted, and all of them are timed in rounds together with their parent. Weights are random: they do not change how
long a forward takes. The bar is for the worst architecture. A machine that does other work as well spreads the times;
``control`` is what the parent's copy then seems to gain over the parent, and no prediction can be better than that.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from measuring import CLOCKS, environment, print_environment, print_table, seconds, write_json
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)  # fmt: skip

import hf_elastic as he
from hf_elastic.checkpoint import extract
from hf_elastic.tables.latencies import LatencyTable, measure_latency_table
from hf_elastic.tables.timing import Phase, Timer, measure_models, speedup

BAR = 0.07
FRACTIONS = [eighths / 8 for eighths in range(2, 9)]
MULTIPLE = 32


@dataclass(frozen=True)
class Size:
    """Size of a model; ``heads`` of ``hidden / heads`` each."""

    layers: int
    hidden: int
    heads: int
    positions: int
    vocabulary: int


def bert(size: Size) -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=size.positions,
        )
    )  # fmt: skip


def llama(size: Size) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads // 2,
            max_position_embeddings=size.positions, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2(size: Size) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocabulary, n_embd=size.hidden, n_layer=size.layers, n_head=size.heads,
            n_positions=size.positions, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


FAMILIES = {"bert": bert, "llama": llama, "gpt2": gpt2}


def supernet_of(family: str, size: Size) -> he.Supernet:
    """A random model with per-layer widths, heads and skips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family](size).eval()
    heads = "num_key_value_heads" if family == "llama" else "num_attention_heads"
    settings: dict[str, Any] = {"intermediate_size": FRACTIONS, heads: [0.25, 0.5, 0.75, 1.0]}
    return he.make_elastic(model, he.ElasticConfig(**settings, skip=["attention", "mlp"], multiple_of=MULTIPLE))


def rows_of(supernet: he.Supernet, table: LatencyTable, *, count: int, limit: float, timer: Timer) -> Iterator[dict]:
    """Predicted and measured speed-up of random architectures, and of a copy of the parent."""
    rng = random.Random(0)
    points = {"control": supernet.space.largest()}
    points |= {str(number): supernet.space.sample(rng) for number in range(count)}
    models = {"parent": extract(supernet, supernet.space.largest())}
    models |= {name: extract(supernet, point) for name, point in points.items()}
    timed = measure_models(models, table.setting, seconds=limit, timer=timer)
    for name, point in points.items():
        predicted, measured = table.speedup(supernet, point), speedup(timed["parent"], timed[name])
        form = "stock" if supernet.loadability(point) == "stock" else "remote-code"  # what extract made
        yield {
            "architecture": name, "loadability": form, "ms": 1e3 * timed[name].median,
            "predicted": predicted, "measured": measured, "error": predicted / measured - 1,
        }  # fmt: skip


def phases_of(family: str, phases: Sequence[Phase]) -> list[Phase]:
    """The phases that a family has."""
    return [phase for phase in phases if phase == "prefill" or family != "bert"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    size = Size(options.layers, options.hidden, options.heads, options.length + 2, options.vocabulary)
    found: list[dict[str, Any]] = []
    worst: list[dict[str, Any]] = []
    made = environment()
    print_environment(made)

    def timer(call: Any) -> float:
        return seconds(call, clock=CLOCKS[options.clock])

    for family in options.families:
        supernet = supernet_of(family, size)
        for phase in phases_of(family, options.phases):
            table = measure_latency_table(
                supernet, batch_size=options.batch, length=options.length, phase=phase,
                seconds=options.table_seconds, timer=timer,
            )  # fmt: skip
            print(f"\n{family} {phase}: {table}")
            rows = list(
                rows_of(supernet, table, count=options.architectures, limit=options.seconds, timer=timer)
            )  # fmt: skip
            print_table(rows)
            errors = [abs(row["error"]) for row in rows if row["architecture"] != "control"]
            worst.append({
                "family": family, "phase": phase, "worst": max(errors), "mean": sum(errors) / len(errors),
                "bias": sum(r["error"] for r in rows[1:]) / len(errors), "control": rows[0]["measured"] - 1,
                "bar": f"<= {BAR:g}", "met": "yes" if max(errors) <= BAR else "NO",
            })  # fmt: skip
            found += [{"family": family, "phase": phase, **row} for row in rows]
    print()
    print_table(worst)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"environment": made, "options": settings, "worst": worst, "rows": found})


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--phases", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    parser.add_argument("--architectures", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-seconds", type=float, default=12.0, help="In forwards of the table.")
    parser.add_argument("--seconds", type=float, default=60.0, help="In forwards of the exported models.")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, where others use the machine too."
    )
    parser.add_argument("--json", help="Also write the numbers to this file.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
