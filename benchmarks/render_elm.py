"""Sections of docs/benchmarks.md about ELM."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[[Any], str]
SETTING = (
    "A causal supernet of five layers of 128 dimensions, six candidate blocks a layer (about 0.4 M parameters), on "
    "TinyStories cut into blocks of 128 of stories260K's tokens; losses in nats per token on the validation pieces; "
)


def elm_growth(result: Mapping[str, Any], table: Table) -> list[str]:
    """Widths that grow against one width."""
    settings, rows = result["settings"], result["rows"]
    means = {
        kind: statistics.fmean(row["trained anew"] for row in rows if row["widths"] == kind)
        for kind in ("grown", "fixed")
    }
    better = "better" if means["grown"] < means["fixed"] else "no better"
    return [
        "## ELM: widths grown by PCA against one fixed width",
        f"{SETTING}{settings['steps']} steps of eight blocks, {len(settings['seeds'])} seeds (mean +- standard "
        f"deviation). At equal mean parameters the architecture found among grown widths is {better} than that found "
        f"among fixed ones when both are trained anew ({means['grown']:.3f} against {means['fixed']:.3f}).",
        table(result["summary"]),
    ]


def elm_fusion(result: Mapping[str, Any], table: Table) -> list[str]:
    """With and without head fusion."""
    settings = result["settings"]
    return [
        "## ELM: with and without head fusion",
        f"{SETTING}the best of 24 paths of a supernet trained for {settings['steps']} steps, its heads fused, and then "
        f"trained for {settings['steps'] // 2} more; {len(settings['seeds'])} seeds. `loss before` is that right after "
        "fusion. Parameters are without embeddings.",
        table(result["summary"]),
    ]


def elm_distillation(result: Mapping[str, Any], table: Table) -> list[str]:
    """What the supernet learns from."""
    settings, alone = result["settings"], result["alone"]
    losses = [entry["loss"] for entry in alone]
    return [
        "## ELM: relational against squared-error distillation",
        f"{SETTING}supernets of one width trained for {settings['steps']} steps, teacher stories260K, "
        f"{len(settings['seeds'])} seeds. Similarity is the mean linear CKA between what two candidates of a layer add "
        f"to the same input. Kendall's tau is between losses with the supernet's weights and those of {len(alone)} "
        f"architectures trained alone for {settings['alone_steps']} steps (means of {settings['alone_seeds']} seeds), "
        f"which lie between {min(losses):.3f} and {max(losses):.3f}; between the first two seeds of these trainings it "
        f"is {_agreement(alone):.2f}, and no ranking can be told to be better than that.",
        table(result["summary"]),
    ]


def _agreement(alone: Sequence[Mapping[str, Any]]) -> float:
    """Kendall's tau between the first two seeds of the trainings alone."""
    first, second = ([entry["losses"][number] for entry in alone] for number in (0, 1))
    pairs = list(itertools.combinations(range(len(alone)), 2))
    agree = [(first[a] - first[b]) * (second[a] - second[b]) for a, b in pairs]
    return sum(1 if product > 0 else -1 for product in agree) / len(pairs)


def elm(result: Mapping[str, Any], table: Table) -> list[str]:
    """What measuring and growing cost."""
    return [
        "## ELM: what PCA growth costs",
        "`benchmarks/elm.py`: the share of training time that scores and growth take, H = 528, 12 layers of six "
        "candidates, at the first and at the largest width.",
        table(result["rows"]),
    ]
