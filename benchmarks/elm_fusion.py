"""ELM, experiment 2: the path that a search found with and without head fusion, before and after training further.

    python benchmarks/elm_fusion.py [--seeds 0 1 2] [--steps 500] [--json FILE]

A supernet is trained, the best of some random paths is taken out with its weights, its heads are fused in each of the
three modes, by the published threshold of CKA and by lower ones, and every result is trained further for as many steps
as the path itself without fusion. Parameters are without embeddings.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

from elm_small import (
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
from measuring import print_table, started
from stories import add_data_argument, checked_data
from transformers import PreTrainedModel

import hf_elastic as he
from hf_elastic import costs

WIDTH, PATHS = 96, 24
MODES = ("merge", "remove", "resplit")


def found_path(texts: Texts, *, seed: int, steps: int) -> PreTrainedModel:
    """The best of random paths of a trained supernet, by text that was held out."""
    supernet = he.make_elastic(make(config(width=WIDTH), seed=seed))
    train(supernet, texts, he.RandomSubnet(seed=seed), steps=steps, seed=seed)
    paths = random_paths(supernet, PATHS, seed=seed)
    losses = path_losses(supernet, paths, texts.search[:4])
    return he.extract(supernet, paths[losses.index(min(losses))])


def one_result(
    model: PreTrainedModel, texts: Texts, *, seed: int, steps: int, mode: str | None, threshold: float
) -> dict[str, Any]:
    """Fuses heads and trains further."""
    fused, heads = model, "all heads"
    if mode is not None:
        fused, report = he.fuse_heads(model, texts.calibration, mode=mode, threshold=threshold, min_heads=1)
        heads = f"{mode}, CKA > {threshold:g}"
        kept = sum(entry.after for entry in report.layers) / sum(entry.before for entry in report.layers)
    one = he.make_elastic(copy.deepcopy(fused))
    path = one.space.largest()
    before = loss_of(one.model, texts.validation)
    train(one, texts, he.FixedSubnet(path), steps=steps, seed=seed, learning_rate=1e-3)
    return {
        "fusion": heads, "seed": seed, "heads kept": 1.0 if mode is None else kept,
        "parameters": costs.parameters(one, path), "loss before": before,
        "loss after": loss_of(one.model, texts.validation),
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    add_arguments(parser, steps=500)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.6, 0.4])
    options = parser.parse_args(given)
    folder = checked_data(options.data)
    machine = started(options.threads)
    texts = prepare(folder, blocks=options.blocks)
    rows = []
    for seed in options.seeds:
        model = found_path(texts, seed=seed, steps=options.steps)
        arms: list[tuple[str | None, float]] = [(None, 1.0)]
        arms += [(mode, threshold) for threshold in options.thresholds for mode in MODES]
        for mode, threshold in arms:
            rows.append(
                one_result(model, texts, seed=seed, steps=options.steps // 2, mode=mode, threshold=threshold)
            )
            print_table(rows[-1:])
    numbers = ("heads kept", "parameters", "loss before", "loss after")
    write_results(rows, by="fusion", numbers=numbers, options=options, extra={"environment": machine})


if __name__ == "__main__":
    main()
