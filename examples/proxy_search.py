"""Search without training (ZeroLM, arXiv 2503.18646): a proxy ranks all widths and heads; the best is cut and repaired.

    python examples/proxy_search.py --model my-llama --within 0.7 --output small
    python examples/proxy_search.py --model my-llama --data stories.txt --within 0.7 --output small
    python examples/proxy_search.py --model my-llama --data stories.txt --proxy snip --evaluations 300 --output small

Proxies that are sums over layers (zerolm, decoder_params, params, depth, width_depth) are searched exactly, in seconds;
others look at each subnet, by NSGA-II, for as long as ``--evaluations`` take. ``--data`` (files, or names of data sets)
repairs what was cut by least squares, prints perplexities, and serves the proxies that need data. A search that was
killed and is started again goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from going_on import Batch, search_storage, text_batches, work_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_elastic as he

SUMS = ("zerolm", "decoder_params", "params", "depth", "width_depth")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--data", nargs="+", help="text: .txt, .jsonl, .csv, or names of data sets")
    parser.add_argument("--proxy", default="zerolm", choices=list(he.proxies.PROXIES))
    parser.add_argument("--within", type=float, default=0.7, help="parameters, as a share of the parent's")
    parser.add_argument("--widths", type=int, default=8, help="FFN widths of a layer to choose from")
    parser.add_argument("--evaluations", type=int, default=200, help="of a proxy that is no sum over layers")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=256, help="rows to repair with; as many are held out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def found_by(supernet: he.Supernet, arguments: argparse.Namespace, *, batches: list[Batch]) -> Any:
    """The best architecture by the proxy within the limit."""
    data = batches[:1] if arguments.proxy in he.proxies.ON_DATA else ()
    goal = he.objectives.proxy(supernet, arguments.proxy, batches=data)
    within = {"parameters": arguments.within}
    if arguments.proxy in SUMS:
        goals = [goal, he.objectives.parameters(supernet)]
        result = he.search_subnets(supernet.space, goals, algorithm="exact", within=within)
        print(f"exact front: {len(result.front)} of {supernet.space.size:.3g} architectures")
    else:
        result = he.search_subnets(
            supernet.space, [goal], evaluations=arguments.evaluations, within=within, seed=arguments.seed,
            storage=search_storage(work_folder(arguments)),
        )  # fmt: skip
        print(f"NSGA-II: {len(result.evaluations)} evaluations")
    return result.best(goal.name).architecture


@torch.inference_mode()
def perplexity(model: Any, batches: list[Batch]) -> float:
    losses = [float(model(**batch).loss) for batch in batches]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    arguments = parsed()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    batches: list[Batch] = []
    if arguments.data:
        batches = text_batches(tokenizer, arguments.data, length=arguments.length, count=2 * arguments.rows)
    elif arguments.proxy in he.proxies.ON_DATA:
        sys.exit(f"{arguments.proxy} needs data: give --data")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    shares = [number / arguments.widths for number in range(1, arguments.widths + 1)]
    supernet = he.make_elastic(model, he.ElasticConfig(intermediate_size=shares))
    found = found_by(supernet, arguments, batches=batches)
    named = supernet.space.names
    print("found:", {name: found[name] for name in named[:4]}, f"and {len(named) - 4} more" if len(named) > 4 else "")
    half = len(batches) // 2
    small = he.refit(supernet, found, batches[half:]) if half else None
    if half:
        print(f"parent: perplexity {perplexity(supernet.model, batches[:half]):.2f}")
        print(f"found, repaired: perplexity {perplexity(small, batches[:half]):.2f}")
    print(he.export(supernet, found, arguments.output, model=small, tokenizer=tokenizer, overwrite=True))


if __name__ == "__main__":
    main()
