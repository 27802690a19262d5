"""ELM, experiment 3: relational against squared-error distillation of a supernet, and no distillation.

    python benchmarks/elm_distillation.py [--seeds 0 1 2] [--steps 600] [--json FILE]

The teacher is stories260K. Relational: Pearson's correlation per channel of hidden states, and DIST of predictions;
squared error: MSE of hidden states and KL of predictions; all beside the loss of the labels. Asked is what ELM says of
it: are the candidates of a layer more alike (mean linear CKA between the outputs of two candidates on the same input),
and does the supernet rank architectures better: Kendall's tau between losses with the weights of the supernet and
losses of the same architectures trained alone, from nothing and with labels only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
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
from scipy.stats import kendalltau
from stories import add_data_argument, checked_data
from torch import Tensor

import hf_elastic as he
from hf_elastic.head_similarity import linear_cka

WIDTH, SIMILARITY_TOKENS = 96, 2048
METHODS: dict[str, dict[str, Any] | None] = {
    "relational": {"state_distance": "pearson", "prediction": "dist"},
    "squared error": {"state_distance": "mse", "prediction": "kl"},
    "labels alone": None,
}


@torch.no_grad()
def block_similarity(supernet: he.Supernet, texts: Texts, *, seed: int) -> float:
    """Mean CKA between the outputs of two candidates of a layer on the same input, over layers and pairs."""
    found = []
    path = random_paths(supernet, 1, seed=seed)[0]
    for part in supernet.block_parts:
        seen: list[tuple[Any, dict[str, Any]]] = []
        hook = part.layer.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
        )
        with supernet.activate(path):
            supernet.model.eval()(texts.validation[0]["input_ids"], use_cache=False)
        hook.remove()
        args, kwargs = seen[0]
        outputs: list[Tensor] = [part.module(block)(*args, **kwargs) for block in part.blocks]
        changes = [(output - args[0]).flatten(0, 1)[:SIMILARITY_TOKENS] for output in outputs]  # without the residual
        found += [linear_cka(a, b) for a, b in itertools.combinations(changes, 2)]
    return statistics.fmean(found)


def alone(texts: Texts, paths: Sequence[he.Architecture], *, steps: int, seeds: int) -> list[list[float]]:
    """Losses of architectures trained alone, from several seeds each."""
    losses = []
    shapes = he.make_elastic(make(config(width=WIDTH), seed=0))
    for number, path in enumerate(paths):
        losses.append([])
        for seed in range(seeds):
            one = he.make_elastic(make(he.extract(shapes, path, loadability="remote-code").config, seed=1000 + seed))
            train(one, texts, he.FixedSubnet(one.space.largest()), steps=steps, seed=seed)
            losses[-1].append(loss_of(one.model, texts.validation))
        print(f"alone {number}: {losses[-1]}", flush=True)
    return losses


def one_run(method: str, texts: Texts, truth: dict[he.Architecture, float], *, seed: int, steps: int) -> dict[str, Any]:
    """Trains one supernet and reports on it."""
    supernet = he.make_elastic(make(config(width=WIDTH), seed=seed))
    settings = METHODS[method]
    distill = None
    if settings is not None:
        distill = he.Distillation(target="relational", teacher=texts.teacher, fit=True, **settings)
    seconds = train(supernet, texts, he.RandomSubnet(seed=seed), steps=steps, seed=seed, distill=distill)
    losses = path_losses(supernet, list(truth), texts.validation[:8])
    return {
        "distillation": method, "seed": seed, "loss of paths": statistics.fmean(losses),
        "similarity of blocks": block_similarity(supernet, texts, seed=seed),
        "Kendall's tau": float(kendalltau(losses, list(truth.values())).statistic), "seconds": seconds,
        "losses": losses,
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    add_arguments(parser, steps=600)
    parser.add_argument("--architectures", type=int, default=14, help="Trained alone.")
    parser.add_argument("--alone-steps", type=int, default=600)
    parser.add_argument("--alone-seeds", type=int, default=2, help="Trainings of each, whose losses are averaged.")
    options = parser.parse_args(given)
    folder = checked_data(options.data)
    machine = started(options.threads)
    texts = prepare(folder, blocks=options.blocks)
    paths = random_paths(he.make_elastic(make(config(width=WIDTH), seed=0)), options.architectures, seed=7)
    trained = alone(texts, paths, steps=options.alone_steps, seeds=options.alone_seeds)
    truth = {path: statistics.fmean(losses) for path, losses in zip(paths, trained, strict=True)}
    rows = []
    for seed in options.seeds:
        for method in METHODS:
            rows.append(one_run(method, texts, truth, seed=seed, steps=options.steps))
            print_table([{name: value for name, value in rows[-1].items() if name != "losses"}])
    numbers = ("loss of paths", "similarity of blocks", "Kendall's tau")
    stated = [
        {"architecture": dict(path), "loss": truth[path], "losses": losses}
        for path, losses in zip(paths, trained, strict=True)
    ]
    extra = {"environment": machine, "alone": stated}
    write_results(rows, by="distillation", numbers=numbers, options=options, extra=extra)


if __name__ == "__main__":
    main()
