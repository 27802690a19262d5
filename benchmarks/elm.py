"""What PCA growth costs: the share of training time that scores and growths take, in paired steps of one run.

    python benchmarks/elm.py [--threads 2] [--json benchmarks/results/elm.json]

An ELM supernet (hidden size 528, 12 layers of six candidate blocks, three neighbouring tokens per embedding) takes
training steps along uniformly drawn paths, with all blocks at their first width (132) and with all at the largest
(792), where eigenvalues cost most. Every path is stepped twice, which first alternating: without ``PCAGrowthCallback``,
and with it in a step that is measured. Of ``calc_freq`` steps one is measured. In the others the hooks only look
whether they have to do anything, which does not depend on the number of tokens and is timed as ``idle`` on short
forwards, where it can be told from noise:

    share = (measured - without + (calc_freq - 1) * idle) / (calc_freq * without)

``growth`` is what the end of an epoch takes, as a share of the shortest epoch there can be, one of ``calc_freq`` steps.
Dropout is off, decay is that of the optimizer and the vocabulary is small: what costs more would only make the share
smaller.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import (
    CLOCKS,
    Bar,
    Clock,
    environment,
    interval,
    judged,
    print_environment,
    print_table,
    seconds,
    write_json,
)  # fmt: skip
from transformers import TrainerControl, TrainerState, TrainingArguments

import hf_elastic as he
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.spaces import mean_path_parameters
from hf_elastic.training import PCAGrowthCallback
from hf_elastic.training.periods import announce

SHARE = Bar("at most", 0.05)
VOCABULARY = 1024
SHORT = 8  # tokens of the forwards that tell what idle hooks cost


Pair = tuple[float, float]
"""Seconds with the callback and without."""


class Growing:
    """A supernet with all blocks of one width, and a callback that measures it and lets it grow."""

    def __init__(self, options: argparse.Namespace, *, width: int) -> None:
        torch.manual_seed(0)
        config = config_class("elastic_bert")(
            hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=options.largest, embedding_size=max(1, options.hidden // 4), trigram_input=True,
            vocab_size=VOCABULARY, max_position_embeddings=options.length, hidden_act="gelu_pytorch_tanh",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            candidate_blocks=list(BLOCKS), candidate_widths=[[width] * len(BLOCKS)] * options.layers,
        )  # fmt: skip
        self.supernet = he.make_elastic(model_class("elastic_bert", "ElasticBertForMaskedLM")(config))
        self.supernet.model.train()
        self.optimizer = torch.optim.AdamW(self.supernet.model.parameters(), lr=1e-5)
        self.rule = he.RandomSubnet(seed=0)
        ids = torch.randint(VOCABULARY, (options.batch, options.length))  # (B, T)
        self.batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        self.short = {name: tensor[:1, :SHORT] for name, tensor in self.batch.items()}
        self.calc_freq, self.width = options.calc_freq, width
        self.callback = PCAGrowthCallback(
            self.supernet, total_parameters=self.budget(), step=options.start, count=options.count,
            calc_freq=options.calc_freq,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            self.args = TrainingArguments(folder, use_cpu=True, report_to="none", num_train_epochs=1)
        self.state, self.control = TrainerState(max_steps=options.calc_freq), TrainerControl()

    def budget(self) -> float:
        """Parameters of the mean path with all blocks at their largest."""
        return mean_path_parameters(self.supernet, width=self.supernet.block_parts[0].allocated(BLOCKS[0]))

    def listen(self, step: int) -> None:
        """Begin to train with the callback, at a step."""
        self.callback.release()
        self.state.global_step = 0
        batches = [self.batch] * self.calc_freq
        announce(self.callback, self.state, samples=True)  # paths are drawn here, not by a callback
        self.callback.on_train_begin(self.args, self.state, self.control, train_dataloader=batches)
        self.state.global_step = step

    def train(self, path: he.Architecture) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        with self.supernet.activate(path):
            self.supernet.model(**self.batch).loss.backward()
        self.optimizer.step()

    def look(self, path: he.Architecture) -> None:
        """Run a short forward."""
        with self.supernet.activate(path):
            self.supernet.model(**self.short)

    def listening(self, run: Callable[[], None]) -> None:
        """Run what stands for a step, with the callback."""
        self.callback.on_step_begin(self.args, self.state, self.control)
        run()
        self.state.global_step += 1
        self.callback.on_step_end(self.args, self.state, self.control)

    def pair(self, number: int, run: Callable[[he.Architecture], None], *, step: int, clock: Clock) -> Pair:
        """Time something along one path, with the callback at a step (of which the first is measured) and without."""
        (path,) = self.rule.draw(self.supernet.space, number, 0)
        found = [0.0, 0.0]
        for kind in (number % 2, 1 - number % 2):
            if kind:
                self.callback.release()
                found[kind] = seconds(lambda: run(path), clock=clock)
            else:
                self.listen(step)
                found[kind] = seconds(lambda: self.listening(lambda: run(path)), clock=clock)
        self.callback.release()
        return found[0], found[1]

    def idle(self, pairs: int, *, clock: Clock) -> float:
        """Seconds that a step which is not measured takes longer than one without the callback."""
        found = [self.pair(number, self.look, step=1, clock=clock) for number in range(pairs)]
        return statistics.median(listening - without for listening, without in found)

    def growth(self, *, clock: Clock) -> float:
        """Time the end of an epoch in which every block was measured; the widths are put back."""
        self.listen(0)
        for block in BLOCKS:
            path = {f"layers.{part.index}.block": block for part in self.supernet.block_parts}
            self.state.global_step = 0
            self.listening(lambda path=path: self.look(self.supernet.space.canonical(path)))
        self.state.epoch = 1.0
        taken = seconds(lambda: self.callback.on_epoch_end(self.args, self.state, self.control), clock=clock)
        self.callback.release()
        for part in self.supernet.block_parts:
            for block in part.blocks:
                part.set_width(block, self.width)
        self.supernet.resized()
        return taken


def row_of(what: str, width: int, extra: Sequence[float], **columns: Any) -> dict[str, Any]:
    """One line of the table, the share of time against the bar."""
    found = judged(interval(columns.pop("shares")), SHARE)
    share = {"share": found.pop("ratio"), **found}
    return {"what": what, "width": width, **columns, "extra_ms": 1e3 * statistics.median(extra), **share}


def measured_rows(options: argparse.Namespace, *, width: int) -> list[dict[str, Any]]:
    """Scores at one width, and growths at the first one."""
    growing, clock, freq = Growing(options, width=width), CLOCKS[options.clock], options.calc_freq
    growing.pair(0, growing.train, step=0, clock=clock)
    pairs = [growing.pair(number, growing.train, step=0, clock=clock) for number in range(options.pairs)]
    idle = growing.idle(options.idle_pairs, clock=clock)
    step, extra = statistics.median(without for _, without in pairs), [measured - plain for measured, plain in pairs]
    shares = [(more + (freq - 1) * idle) / (freq * plain) for more, (_, plain) in zip(extra, pairs, strict=True)]
    rows = [row_of("scores", width, extra, step_s=step, idle_ms=1e3 * idle, shares=shares)]
    if width < options.largest:
        growths = [growing.growth(clock=clock) for _ in range(options.growths)]
        shares = [taken / (freq * step) for taken in growths]
        rows.append(row_of("growth", width, growths, step_s=step, idle_ms=0.0, shares=shares))
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "layers": 12, "hidden": 528, "heads": 12, "start": 132, "largest": 792, "batch": 16, "length": 128,
        "calc-freq": 30, "count": 21, "pairs": 16, "idle-pairs": 100,
        "growths": 9, "threads": torch.get_num_threads(),
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    machine = environment()
    print_environment(machine)
    rows = [row for width in (options.start, options.largest) for row in measured_rows(options, width=width)]
    print_table(rows)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"environment": machine, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
