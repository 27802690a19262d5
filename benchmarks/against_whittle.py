"""Our side of the comparison with whittle: one LLaMA of equal weights, equal subnets, equal loss.

Before anything is timed, the whole model, random subnets and an extracted one must give the same logits on both sides,
and a training step the same loss and the same norm of all gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comparing import Line, line, valued
from measuring import Bar
from rival_process import Rival, RivalError, in_turns
from rival_serving import Stopwatch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_elastic as he

VOCABULARY = 1024  # small, so that the layers and not the output head are measured
HEAD_SIZE = 64
SWITCHES = 50
SAME = 1e-5
NOT_SLOWER = Bar("at most", 1.0)
KERNELS = "fp32, torch's scaled_dot_product_attention on both sides; whittle has q, k and v in one projection"
Shape = dict[str, list[int]]


class Ours:
    """The same steps as those of ``rival_whittle.py``, by hf-elastic."""

    def __init__(self, stock: LlamaForCausalLM, ids: Tensor, stopwatch: Stopwatch) -> None:
        config = stock.config
        self.stock, self.ids, self.stopwatch = stock, ids, stopwatch
        groups = sorted({max(1, config.num_key_value_heads // 2), config.num_key_value_heads, 1})
        self.supernet = he.make_elastic(
            copy.deepcopy(stock), he.ElasticConfig(intermediate_size=[0.25, 0.5, 1.0], num_key_value_heads=groups)
        )

    def shape(self, architecture: he.Architecture) -> Shape:
        """An architecture as the rival is told it."""
        layers = range(self.stock.config.num_hidden_layers)
        return {
            "widths": [int(architecture[f"layers.{i}.intermediate_size"]) for i in layers],
            "groups": [int(architecture[f"layers.{i}.num_key_value_heads"]) for i in layers],
        }

    def uniform(self) -> he.Architecture:
        """Half the width and half the groups in each layer."""
        config, values = self.stock.config, dict(self.supernet.space.largest())
        for name in values:
            full = config.intermediate_size if name.endswith("intermediate_size") else config.num_key_value_heads
            values[name] = max(1, full // 2)
        return self.supernet.point(values)

    def forward(self, model: LlamaForCausalLM) -> float:
        with torch.inference_mode():
            self.stopwatch(lambda: model(input_ids=self.ids))
        return self.stopwatch.taken()

    def switch(self, architectures: Sequence[he.Architecture]) -> float:
        self.stopwatch(lambda: [self.supernet.set_active(point) for point in architectures])
        self.supernet.set_active(self.supernet.space.largest())
        return self.stopwatch.taken()

    def logits(self, architecture: he.Architecture) -> Tensor:
        """Logits (B, T, V) of a subnet; switching there and back counts."""

        def whole() -> Tensor:
            with self.supernet.activate(architecture):
                return self.supernet.model(input_ids=self.ids).logits

        with torch.inference_mode():
            return self.stopwatch(whole)

    def train(self, architecture: he.Architecture) -> dict[str, float]:
        """Forward and backward of a subnet; switching there and back counts."""
        model = self.supernet.model
        model.zero_grad(set_to_none=True)

        def whole() -> Tensor:
            with self.supernet.activate(architecture):
                logits = model(input_ids=self.ids).logits  # (B, T, V)
                loss = cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
                loss.backward()
            return loss

        loss = self.stopwatch(whole)
        squares = [weight.grad.square().sum() for weight in model.parameters() if weight.grad is not None]
        return {"loss": loss.item(), "gradient": float(torch.stack(squares).sum().sqrt())}

    def extract(self, architecture: he.Architecture) -> Any:
        return self.stopwatch(lambda: he.extract(self.supernet, architecture))


def compare(rival: Rival, options: argparse.Namespace, *, against: str, folder: Path) -> Iterator[Line]:
    """All lines about whittle.

    Raises:
        RivalError: a step of whittle failed, or both sides do not give the same.
    """
    torch.manual_seed(0)
    heads = options.hidden // HEAD_SIZE
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=options.length,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    stock.save_pretrained(folder / "parent")
    ids = torch.randint(VOCABULARY, (options.batch, options.length))  # (B, T)
    torch.save(ids, folder / "parent" / "ids.pt")
    about, loaded = rival.run("about").found, rival.run("load", folder=str(folder / "parent")).found
    ours = Ours(stock, ids, Stopwatch(options.clock))
    drawn = random.Random(0)
    points = [ours.supernet.space.sample(drawn) for _ in range(options.pairs + 1)]
    check(rival, ours, points, folder=folder)
    note = (
        f"{sum(weight.numel() for weight in stock.parameters()) / 1e6:.0f}M parameters, {options.batch} x "
        f"{options.length} tokens; {KERNELS}; {loaded['dtype']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, litgpt {about['litgpt']} there"
    )
    names = ("rivals", against, f"{options.clock} seconds")
    yield from forwards(rival, ours, options, names=names, note=note)
    yield from subnets(rival, ours, points, names=names)
    yield from extraction(rival, ours, options, names=names)
    yield reloads(rival, ours, against=against, folder=folder)


def require(first: Any, second: Any, what: str) -> None:
    """Raises where two results that are to be equal are not, relative to the larger."""
    a, b = torch.as_tensor(first), torch.as_tensor(second)
    worst, largest = float((a - b).abs().max()), float(a.abs().max())
    if not worst <= SAME * largest:
        raise RivalError(f"not comparable: {what} differs by {worst:.1e} of {largest:.1e}")


def check(rival: Rival, ours: Ours, points: Sequence[he.Architecture], *, folder: Path) -> None:
    """Both sides give the same for the whole model, for random subnets, for a training step and for what is cut out."""
    theirs = torch.load(folder / "parent" / "theirs.pt")
    largest = ours.supernet.space.largest()
    for name in ("litgpt", "whittle"):
        require(ours.logits(largest), theirs[name], f"the whole model of {name}")
    out = str(folder / "subnet.pt")
    for point in points[:3]:
        rival.run("active", shape=ours.shape(point), out=out)
        require(ours.logits(point), torch.load(out), "a random subnet")
    mine, other = ours.train(points[0]), rival.run("train", shape=ours.shape(points[0])).found
    for name in ("loss", "gradient"):
        require(mine[name], other[name], f"the {name} of a training step")
    small = ours.extract(ours.uniform())
    found = rival.run("extract", shape=ours.shape(ours.uniform()), out=out).found
    require(sum(weight.numel() for weight in small.parameters()), found["parameters"], "the size of what is extracted")
    with torch.inference_mode():
        require(small(input_ids=ours.ids).logits, torch.load(out), "what is extracted")
    ours.stopwatch.taken()


def forwards(
    rival: Rival, ours: Ours, options: argparse.Namespace, *, names: tuple[str, str, str], note: str
) -> Iterator[Line]:
    """Forward of the whole model, and what elasticity adds to each side's own stock model."""
    part, against, measure = names
    found = in_turns(
        [
            lambda: ours.forward(ours.supernet.model),
            lambda: rival.run("forward", model="whittle").seconds,
            lambda: ours.forward(ours.stock),
            lambda: rival.run("forward", model="litgpt").seconds,
        ],
        rounds=options.pairs,
    )  # fmt: skip
    a, b = [row[0] for row in found], [row[1] for row in found]
    yield valued((part, "forward, largest", against, measure), a, b, bar=NOT_SLOWER, note=note)
    yield valued(
        (part, "forward, largest over own stock", against, "ratio"),
        [row[0] / row[2] for row in found], [row[1] / row[3] for row in found], bar=NOT_SLOWER,
        note="stock: transformers' LLaMA here, LitGPT's GPT there",
    )  # fmt: skip
    yield valued(
        (part, "forward, stock transformers", against.split()[0] + "'s stock LitGPT", measure),
        [row[2] for row in found], [row[3] for row in found], note="neither is elastic: what the bodies differ by",
    )  # fmt: skip


def subnets(
    rival: Rival, ours: Ours, points: Sequence[he.Architecture], *, names: tuple[str, str, str]
) -> Iterator[Line]:
    """Random subnets, the same ones on both sides: switching alone, with a forward, with forward and backward."""
    part, against, measure = names
    shapes = {point: ours.shape(point) for point in points}
    queue = [points[number % len(points)] for number in range(SWITCHES)]
    asked = [shapes[point] for point in queue]
    rounds = len(points) - 1
    found = in_turns([lambda: ours.switch(queue), lambda: rival.run("switch", shapes=asked).seconds], rounds=rounds)
    yield valued(
        (part, "switch to a random subnet", against, measure.replace("seconds", "ms")),
        [1e3 * row[0] / SWITCHES for row in found], [1e3 * row[1] / SWITCHES for row in found], bar=NOT_SLOWER,
        note=f"set_active, the architecture checked, and set_sub_network; means of {SWITCHES}; whittle makes indices "
        "of heads and the table of rotary embeddings anew, so its time grows with the context",
    )  # fmt: skip

    def one(first: Iterator[he.Architecture], second: Iterator[he.Architecture], step: str) -> list[tuple[float, ...]]:
        mine = ours.logits if step == "active" else ours.train

        def timed() -> float:
            mine(next(first))
            return ours.stopwatch.taken()

        return in_turns([timed, lambda: rival.run(step, shape=shapes[next(second)]).seconds], rounds=rounds)

    for step, what in (("active", "switch, forward"), ("train", "switch, forward, backward")):
        pairs = one(iter(points), iter(points), step)
        yield valued(
            (part, f"{what} and back, random subnets", against, measure), [row[0] for row in pairs],
            [row[1] for row in pairs], bar=NOT_SLOWER,
            note=f"{len(points)} subnets, the same on both sides; checked before: logits of three of them, loss and "
            "gradient norm of one; drawing them is not counted",
        )  # fmt: skip


def extraction(rival: Rival, ours: Ours, options: argparse.Namespace, *, names: tuple[str, str, str]) -> Iterator[Line]:
    """A subnet of half the width and half the groups as a model of its own."""
    point = ours.uniform()
    shape = ours.shape(point)

    def timed() -> float:
        ours.extract(point)
        return ours.stopwatch.taken()

    found = in_turns([timed, lambda: rival.run("extract", shape=shape).seconds], rounds=options.pairs)
    part, against, measure = names
    yield valued(
        (part, "extract a subnet", against, measure), [row[0] for row in found], [row[1] for row in found],
        bar=NOT_SLOWER, note="one width and one head count for all layers: whittle extracts no other",
    )  # fmt: skip


def reloads(rival: Rival, ours: Ours, *, against: str, folder: Path) -> Line:
    """Whether what each saves is loaded by stock transformers, with the logits of the subnet."""
    point = ours.uniform()
    expected = ours.logits(point)
    ours.stopwatch.taken()
    he.export(ours.supernet, point, folder / "ours")
    rival.run("save", shape=ours.shape(point), folder=str(folder / "theirs"))
    answers = [reloaded(folder / name, ours.ids, expected) for name in ("ours", "theirs")]
    return line(
        "rivals", "reloads in stock transformers, LLaMA subnet", against, "yes or no", ours=answers[0],
        theirs=answers[1], note=by_hand(folder, ours.ids, expected),
    )  # fmt: skip


def reloaded(folder: Path, ids: Tensor, expected: Tensor) -> str:
    """Yes, if a folder is loaded by its own and gives what is expected."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return "no"
    with torch.inference_mode():
        return "yes" if torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5) else "no: other logits"


def by_hand(folder: Path, ids: Tensor, expected: Tensor) -> str:
    """What is in whittle's folder, and whether its weights are right once somebody writes the config."""
    files = ", ".join(sorted(file.name for file in (folder / "theirs").iterdir()))
    config: Mapping[str, Any] = json.loads((folder / "ours" / "config.json").read_text(encoding="utf-8"))
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(torch.load(folder / "theirs" / "model.pth"))
    with torch.inference_mode():
        right = torch.allclose(model.eval()(input_ids=ids).logits, expected, atol=1e-5)
    return f"whittle writes {files}; with a LlamaConfig written by hand its logits are {'equal' if right else 'others'}"
