"""Sampling rules: which subnets a training step runs, as a pure function of (seed, step, micro-step, draw).

Nothing is drawn from a generator that is kept between calls. So the choice is the same on every rank, after a
resume and in the recomputation of gradient checkpointing, and asking twice never changes what comes next.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hf_elastic.errors import TrainingError
from hf_elastic.space import Architecture, Choice, SearchSpace, Value


@runtime_checkable
class SamplingRule(Protocol):
    """Say which subnets one step runs, one after another."""

    @property
    def subnets(self) -> int:
        """How many architectures :meth:`draw` returns."""

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Return the architectures of a step.

        Args:
            space: where they are drawn from.
            step: optimizer steps finished before.
            micro_step: micro-batches of this step finished before (0 unless subnets change between
                micro-batches).
        """


@dataclass(frozen=True)
class RandomSubnet:
    """Draw one architecture, each choice uniformly (single-path one-shot: Guo et al. 2020, arXiv 1904.00420).

    Args:
        seed: Any integer.
    """

    seed: int

    @property
    def subnets(self) -> int:
        """One."""
        return 1

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Return one random architecture."""
        return (space.sample(generator(self.seed, step, micro_step)),)


@dataclass(frozen=True)
class SandwichRule:
    """Draw the largest, some random ones, and the smallest (Yu & Huang 2019, arXiv 1903.05134; BigNAS, Yu et
    al. 2020, arXiv 2003.11142, Algorithm 1), so that both bounds of the accuracy improve in every step.

    The largest comes first: its outputs are what the others are distilled from. We average the losses of a
    step's subnets where the papers sum them, so that a learning rate means what it means for the stock
    Trainer.

    Args:
        seed: Any integer.
        random: Architectures between the two, at least 0.
        midpoint: Whether the architecture of middle values is run as well.

    Raises:
        TrainingError: ``random`` is negative.
    """

    seed: int
    random: int = 2
    midpoint: bool = False

    def __post_init__(self) -> None:
        if self.random < 0:
            raise TrainingError(f"SandwichRule needs random >= 0, got {self.random}")

    @property
    def subnets(self) -> int:
        """The random ones and the two ends, and the midpoint if it is asked for."""
        return self.random + 2 + self.midpoint

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Return the largest, the random ones, the midpoint if asked for, and the smallest."""
        middle = [space.sample(generator(self.seed, step, micro_step, draw=n)) for n in range(self.random)]
        if self.midpoint:
            middle.append(space.midpoint())
        return (space.largest(), *middle, space.smallest())


@dataclass(frozen=True)
class ProgressiveShrinking:
    """Open the values of each choice one after another, from the largest down (Once-for-All: Cai et al. 2020,
    arXiv 1908.09791, section 3.2).

    In stage ``k`` a choice takes its ``k + 1`` largest values: stage 0 trains the largest subnet alone, and
    after the last stage the whole space stays open. With ``order`` the kinds of choices open one kind after
    another, as in the paper (kernel sizes, then depth, then width); without it all open together.

    Args:
        seed: Any integer.
        steps_per_stage: Optimizer steps of a stage, at least 1.
        order: Kinds of choices, that is last parts of their names (``("num_hidden_layers",
            "intermediate_size")``). It must name every kind that the space has.
        subnets: Architectures per step, at least 1 (the paper uses 2 to 4).

    Raises:
        TrainingError: A number is below 1, or a kind stands in ``order`` twice.
    """

    seed: int
    steps_per_stage: int
    order: Sequence[str] | None = None
    subnets: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_stage < 1 or self.subnets < 1:
            raise TrainingError(
                "ProgressiveShrinking needs steps_per_stage and subnets of at least 1, "
                f"got {self.steps_per_stage} and {self.subnets}"
            )
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            if len(set(self.order)) != len(self.order):
                raise TrainingError(f"ProgressiveShrinking's order names a kind twice: {list(self.order)}")

    def stages(self, space: SearchSpace) -> int:
        """Return the number of stages until the whole space is open, stage 0 included."""
        return 1 + sum(self._widths(space).values())

    def opened(self, space: SearchSpace, step: int) -> dict[str, tuple[Value, ...]]:
        """Return the values that each choice may take at a step, largest first.

        Raises:
            TrainingError: ``order`` does not name all kinds of choices of the space, or names others.
        """
        stage = step // self.steps_per_stage
        opened: dict[str, tuple[Value, ...]] = {}
        for kind, width in self._widths(space).items():
            for choice in space.choices:
                if self._kind(choice) == kind:
                    opened[choice.name] = choice.descending[: stage + 1]
            stage = max(0, stage - width)
        return opened

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Return random architectures of the values that are open."""
        opened = self.opened(space, step)
        return tuple(
            _sample(space, opened, generator(self.seed, step, micro_step, draw=n))
            for n in range(self.subnets)
        )

    def _kind(self, choice: Choice) -> str:
        return "" if self.order is None else choice.name.rpartition(".")[2]

    def _widths(self, space: SearchSpace) -> dict[str, int]:
        """Return how many stages each kind takes after its first value, in the order in which they open."""
        present = {self._kind(choice) for choice in space.choices}
        order = ("",) if self.order is None else tuple(self.order)
        if present != set(order):
            raise TrainingError(
                f"ProgressiveShrinking's order is {list(order)}, but the kinds of choices in the space are "
                f"{sorted(present)}; name each once"
            )
        return {
            kind: max(len(c.values) for c in space.choices if self._kind(c) == kind) - 1 for kind in order
        }


@dataclass(frozen=True)
class FixedSubnet:
    """Train one architecture all the time.

    Args:
        architecture: A point of the supernet's space.
    """

    architecture: Architecture

    @property
    def subnets(self) -> int:
        """One."""
        return 1

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Return the architecture.

        Raises:
            ArchitectureError: It is not a point of ``space``.
        """
        space.validate(self.architecture)
        return (self.architecture,)


def generator(seed: int, step: int, micro_step: int, *, draw: int = 0) -> random.Random:
    """Return a generator that depends on the four numbers and on nothing else.

    SHA-256 rather than ``hash()``, which differs between processes, or arithmetic on the numbers, which
    collides.
    """
    text = f"hf_elastic.training:{seed}:{step}:{micro_step}:{draw}"
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def _sample(space: SearchSpace, opened: dict[str, tuple[Value, ...]], rng: random.Random) -> Architecture:
    # random() is the one method whose sequence Python promises to keep between versions. Values of choices
    # that turn out not to be in effect are drawn too, and canonical() drops them.
    return space.canonical({name: values[int(rng.random() * len(values))] for name, values in opened.items()})
