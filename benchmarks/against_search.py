"""Part ``search`` of ``run.py``: exact search against NSGA-II and random draws, on tables of a MiniLM-like encoder.

Both minimise the same predicted damage within the same limit; the tables are made up and seeded (see ``exact_front``).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from comparing import Line, line, valued
from exact_front import decoder, encoder
from measuring import Bar

import hf_elastic as he

PART = "search"
NOT_WORSE = Bar("at most", 1.0)
SHARES = (0.5, 0.7)
SEEDS = range(5)


def lines(options: argparse.Namespace) -> list[Line]:
    """Damage found within a limit, and the seconds that it took."""
    problem = encoder(layers=6, seed=0)
    cost = problem.costs[0]
    whole = cost(problem.space.largest())
    found: list[Line] = []
    for share in SHARES:
        limits = {cost.name: share * whole}

        def search(limits: dict[str, float] = limits, **settings: Any) -> tuple[float, float]:
            goals = [problem.damage, cost]
            began = time.perf_counter()
            result = he.search_subnets(problem.space, goals, within=limits, progress=False, **settings)
            spent = time.perf_counter() - began
            return result.best(problem.damage.name, within=limits).values[problem.damage.name], spent

        exact = [search(algorithm="exact") for _ in SEEDS]
        for evaluations in options.evaluations:
            for algorithm in ("nsga2", "random"):
                runs = [search(algorithm=algorithm, evaluations=evaluations, seed=seed) for seed in SEEDS]
                what = f"exact search, least damage with {share:.0%} of {cost.name}"
                against = f"{algorithm}, {evaluations} evaluations"
                damages = [run[0] for run in runs]
                found.append(
                    valued((PART, what, against, "predicted damage"), [e[0] for e in exact], damages, bar=NOT_WORSE)
                )
                found.append(valued((PART, what, against, "seconds"), [e[1] for e in exact], [run[1] for run in runs]))
    return [*found, *sized(options)]


def sized(options: argparse.Namespace) -> list[Line]:
    """How long the whole front takes, of a space as large as LLaMA-7B's."""
    problem = decoder(layers=32, seed=0)
    spent, points = [], 0
    for _ in range(options.repeats):
        began = time.perf_counter()
        goals = [problem.damage, problem.costs[0]]
        points = len(he.search_subnets(problem.space, goals, algorithm="exact", progress=False).front)
        spent.append(time.perf_counter() - began)
    digits = len(str(problem.space.size)) - 1
    what = f"exact front of 10^{digits} architectures: {points} points"
    return [
        line(PART, what, "nothing (no sample can show that it is whole)", "seconds", ours=statistics.median(spent),
             low=min(spent), high=max(spent), pairs=len(spent))
    ]  # fmt: skip
