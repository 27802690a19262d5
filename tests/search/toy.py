"""Toy search problems, and a search to be run in a process of its own."""

import os
import random
import signal
import sys
import time
from pathlib import Path

from hf_elastic.search import Objective, search_subnets
from hf_elastic.space import Choice, Condition, SearchSpace


def widths_problem(layers=6, values=4, seed=1):
    """Widths per layer: a smooth loss with one interaction, and a linear cost."""
    rng = random.Random(seed)
    space = SearchSpace(
        Choice(f"layers.{i}.intermediate_size", tuple(range(64, 64 * (values + 1), 64))) for i in range(layers)
    )
    gain = [rng.uniform(0.2, 2) for _ in range(layers)]
    price = [rng.uniform(0.2, 2) for _ in range(layers)]

    def loss(architecture):
        sizes = [value / 64 for value in architecture.values()]
        return sum(g / s**1.5 for g, s in zip(gain, sizes, strict=True)) * (1 + 0.1 * abs(sizes[0] - sizes[1]))

    def parameters(architecture):
        return sum(p * v for p, v in zip(price, architecture.values(), strict=True))

    return space, [Objective("loss", loss), Objective("parameters", parameters, cost=True, unit="parameters")]


def layers_problem():
    """Depth, skips and widths, conditional on one another; 306 canonical architectures."""
    choices = [Choice("num_hidden_layers", (1, 2))]
    for i in range(2):
        deep = Condition("num_hidden_layers", tuple(range(i + 1, 3)))
        skip = Choice(f"layers.{i}.skip", ("none", "mlp", "layer"), "categorical", (30, 20, 0), (deep,))
        kept = (deep, Condition(skip.name, ("none",)))
        width = Choice(f"layers.{i}.intermediate_size", tuple(range(1, 16)), when=kept)
        choices += [skip, width]
    space = SearchSpace(choices)

    def size(architecture):
        used = space.in_effect(architecture)
        return float(sum(architecture[n] for n in used if n.endswith("size")) + len(used))

    def loss(architecture):
        return 1.0 / size(architecture) + 0.01 * (architecture["layers.0.skip"] == "mlp")

    return space, [Objective("loss", loss), Objective("parameters", size, cost=True)]


def main(options):
    """Search in this process; log each evaluation; kill the process with SIGKILL where asked to."""
    space, (loss, cost) = widths_problem(layers=5)
    log = Path(options["log"])
    started = 0

    def logged(architecture):
        nonlocal started
        started += 1
        if started == options.get("die_in"):
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {architecture.digest}\n")
        time.sleep(options.get("seconds", 0.0))
        return loss(architecture)

    if "die_before" in options:
        die_before(options["die_before"])
    if "die_recording" in options:
        die_while_recording(options["die_recording"])
    result = search_subnets(
        space,
        [Objective("loss", logged), cost],
        algorithm=options.get("algorithm", "nsga2"),
        evaluations=options["evaluations"],
        within={"parameters": 0.7},
        storage=options["storage"],
        seed=3,
        progress=False,
    )
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    Path(options["output"]).write_text(result.to_json())


def die_before(statement):
    """Kill the process when it is about to say something to the database."""
    from sqlalchemy import Engine, event

    def heard(connection, cursor, said, *args):
        if said.lstrip().startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", heard)


def die_while_recording(count):
    """Kill the process when the trial is stored and its claim is not yet closed."""
    from hf_elastic.search.claims import ClaimTable

    closed = 0
    close = ClaimTable.mark_done

    def mark_done(self, digest):
        nonlocal closed
        closed += 1
        if closed == count:
            os.kill(os.getpid(), signal.SIGKILL)
        close(self, digest)

    ClaimTable.mark_done = mark_done
