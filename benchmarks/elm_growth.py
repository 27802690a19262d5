"""ELM, experiment 1: blocks whose widths grow by PCA against blocks of one fixed width, at equal mean parameters.

    python benchmarks/elm_growth.py [--seeds 0 1 2] [--steps 1000] [--json FILE]

Both supernets have the same six candidates and see the same text in the same order. The grown one begins with FFNs of
32 neurons and grows ten times, up to the budget; the fixed one has from the start the one width of all blocks at which
its mean path has as many parameters. Reported are the loss of random paths with the weights of the supernet, that of
the best of them within the budget (chosen on text that was held out), and that of this path trained anew from nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from elm_small import (
    LARGEST,
    START,
    STEP,
    Texts,
    add_arguments,
    config,
    loss_of,
    make,
    path_losses,
    prepare,
    random_paths,
    train,
    write_results,
)
from measuring import started
from stories import add_data_argument, checked_data

import hf_elastic as he
from hf_elastic import costs
from hf_elastic.spaces import mean_path_parameters

PATHS, GROWTHS = 48, 10


def mean_parameters(width: int) -> float:
    """Parameters of the mean path where all blocks are of one width."""
    return mean_path_parameters(he.make_elastic(make(config(width=width), seed=0)))


def one_run(kind: str, texts: Texts, *, seed: int, steps: int, budget: float) -> dict[str, Any]:
    """Trains one supernet and reports on it."""
    callbacks, width = [], START
    if kind == "fixed":
        width = min(range(START, LARGEST + 1), key=lambda size: abs(mean_parameters(size) - budget))
    supernet = he.make_elastic(make(config(width=width), seed=seed))
    if kind == "grown":
        every = max(1, steps // GROWTHS)
        callbacks = [
            he.PCAGrowthCallback(supernet, total_parameters=budget, step=STEP, every=every, calc_freq=min(10, every))
        ]
    seconds = train(supernet, texts, he.RandomSubnet(seed=seed), steps=steps, seed=seed, callbacks=callbacks)
    paths = random_paths(supernet, PATHS, seed=seed)
    losses = path_losses(supernet, paths, texts.validation[:4])
    within = [path for path in paths if costs.total_parameters(supernet, path) <= budget]
    chosen = path_losses(supernet, within, texts.search[:4])
    best = within[chosen.index(min(chosen))]
    found = he.extract(supernet, best)
    inherited = loss_of(found, texts.validation)
    fresh = he.make_elastic(make(found.config, seed=seed + 100))
    train(fresh, texts, he.FixedSubnet(fresh.space.largest()), steps=steps // 2, seed=seed)
    growth = callbacks[0].history.to_dict() if callbacks else None
    return {
        "widths": kind, "seed": seed, "mean parameters": mean_path_parameters(supernet),
        "loss of paths": statistics.fmean(losses),
        "best path": inherited, "its parameters": costs.total_parameters(supernet, best),
        "trained anew": loss_of(fresh.model, texts.validation), "seconds": seconds, "history": growth,
        "architecture": dict(best),
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    add_arguments(parser, steps=1000)
    options = parser.parse_args(given)
    folder = checked_data(options.data)
    machine = started(options.threads)
    texts = prepare(folder, blocks=options.blocks)
    budget = (mean_parameters(START) + mean_parameters(LARGEST)) / 2
    rows = []
    for seed in options.seeds:
        for kind in ("grown", "fixed"):
            rows.append(one_run(kind, texts, seed=seed, steps=options.steps, budget=budget))
            print({name: value for name, value in rows[-1].items() if name != "history"}, flush=True)
    numbers = ("mean parameters", "loss of paths", "best path", "its parameters", "trained anew")
    write_results(rows, by="widths", numbers=numbers, options=options, extra={"environment": machine, "budget": budget})


if __name__ == "__main__":
    main()
