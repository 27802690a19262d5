"""Our side of the comparison with Torch-Pruning: equal checkpoints cut to equal sizes, timed, saved and judged."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from comparing import Line, line, valued
from measuring import Bar
from rival_process import Rival, RivalError, in_turns
from rival_serving import Stopwatch
from stories import MODELS, Batch, load_parent, perplexity, prepare
from stories_fast import drawn
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_elastic as he
from hf_elastic.supernet import Loadability

STORIES = "stories260K"
NOT_MORE = Bar("at most", 1.0)
SAME = 1e-5
HEAD_SIZE = 64
REAL = ("tinystories/valid_even.txt", "tinystories/train_944k.txt", f"{STORIES}/hf")


def llama(options: argparse.Namespace) -> PreTrainedModel:
    """A LLaMA without grouped queries: of grouped ones Torch-Pruning removes queries alone, we whole groups."""
    heads = options.hidden // HEAD_SIZE
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=options.hidden, intermediate_size=8 * options.hidden // 3,
            num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=options.length,
        )
    )  # fmt: skip


def bert(options: argparse.Namespace) -> PreTrainedModel:
    """MiniLM's shape: half the hidden size of BERT-base, with twelve heads."""
    return BertModel(
        BertConfig(
            hidden_size=options.hidden // 2, intermediate_size=2 * options.hidden, num_attention_heads=12,
            num_hidden_layers=options.layers,
        )
    )  # fmt: skip


class Ours:
    """The same steps as those of ``rival_torch_pruning.py``, by hf-elastic."""

    def __init__(self, model: PreTrainedModel, stopwatch: Stopwatch) -> None:
        self.model, self.stopwatch = model, stopwatch
        self.llama = model.config.model_type == "llama"

    def declared(self, *, heads: bool) -> he.ElasticConfig:
        """Half the FFN width, and half the heads if asked for."""
        half = [self.model.config.num_attention_heads // 2] if heads else None
        return he.ElasticConfig(
            intermediate_size=[0.5], num_key_value_heads=half if self.llama else None,
            num_attention_heads=None if self.llama else half,
        )  # fmt: skip

    def prune(self) -> Any:
        """From the loaded model to the smaller one, out of a copy; the copy is not counted."""
        model = copy.deepcopy(self.model)

        def whole() -> PreTrainedModel:
            supernet = he.make_elastic(model, self.declared(heads=True))
            he.sort_by_importance_(supernet)
            return he.extract(supernet, supernet.space.smallest())

        return self.stopwatch(whole)

    def seconds(self) -> float:
        self.prune()
        return self.stopwatch.taken()

    def export(self, folder: Path, *, heads: bool, ids: Tensor, form: Loadability | None = None) -> str:
        """Saves the smaller model with what it gives; returns the form that :meth:`Supernet.loadability` says."""
        supernet = he.make_elastic(copy.deepcopy(self.model), self.declared(heads=heads))
        he.sort_by_importance_(supernet)
        point = supernet.space.smallest()
        he.export(supernet, point, folder, loadability=form)
        with torch.inference_mode(), supernet.activate(point):
            torch.save(supernet.model(input_ids=ids)[0], folder / "expected.pt")
        return supernet.loadability(point)


def compare(rival: Rival, options: argparse.Namespace, *, against: str, folder: Path) -> Iterator[Line]:
    """All lines about Torch-Pruning.

    Raises:
        RivalError: a step of Torch-Pruning failed, or both sides do not give the same.
    """
    about = rival.run("about").found
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers")) + " on both sides"
    stopwatch = Stopwatch(options.clock)
    for family, make in (("llama", llama), ("bert", bert)):
        torch.manual_seed(0)
        ours = Ours(make(options).eval(), stopwatch)
        yield times(rival, ours, options, names=(family, against, versions), folder=folder / family)
        yield from reloads(rival, ours, names=(family, against), folder=folder / family)
    yield from quality(rival, options, against=against, folder=folder / STORIES)


def times(rival: Rival, ours: Ours, options: argparse.Namespace, *, names: tuple[str, str, str], folder: Path) -> Line:
    """Time from the loaded model to the smaller one."""
    family, against, versions = names
    ids = torch.randint(1024, (2, min(64, options.length)))  # (B, T)
    ours.model.save_pretrained(folder)
    torch.save(ids, folder / "ids.pt")
    loaded = rival.run("load", family=family, folder=str(folder)).found
    with torch.inference_mode():
        expected = ours.model(input_ids=ids)[0]
    if not float((expected - torch.load(folder / "theirs.pt")).abs().max()) <= SAME * float(expected.abs().max()):
        raise RivalError(f"not comparable: the whole {family} gives other values there")
    mine = sorted(list(weight.shape) for weight in ours.prune().parameters())
    if mine != rival.run("prune", family=family).found["shapes"]:
        raise RivalError(f"not comparable: the smaller {family} has other sizes there")
    ours.stopwatch.taken()
    found = in_turns([ours.seconds, lambda: rival.run("prune", family=family).seconds], rounds=options.pairs)
    size = sum(weight.numel() for weight in ours.model.parameters()) / 1e6
    return valued(
        ("rivals", f"{family}: halve FFN widths and heads", against, f"{options.clock} seconds"),
        [row[0] for row in found], [row[1] for row in found], bar=NOT_MORE,
        note=f"{size:.0f}M parameters, {loaded['dtype']}, each by its own magnitude score, to equal sizes; {versions}",
    )  # fmt: skip


def reloads(rival: Rival, ours: Ours, *, names: tuple[str, str], folder: Path) -> Iterator[Line]:
    """Whether stock transformers loads what each saves, and gives the same: asked in the rival's process."""
    family, against = names
    ids = folder / "ids.pt"

    def loads(where: Path, **given: Any) -> tuple[bool, str]:
        found = rival.run("reload", family=family, folder=str(where), ids=str(ids), **given).found
        return found["reloads"], found["why"]

    for heads, what in ((False, "FFN halved"), (True, "FFN and heads halved")):
        mine, other = folder / f"ours-{heads}", folder / f"theirs-{heads}"
        form = ours.export(mine, heads=heads, ids=torch.load(ids))
        rival.run("save", family=family, heads=heads, folder=str(other), ids=str(ids))
        (first, _), (second, why) = loads(mine), loads(other)
        told = {True: "yes", False: "no"}
        padded = form == "stock-padded"
        yield line(
            "rivals", f"{family}, {what}: reloads in stock transformers", against, "yes or no",
            ours=told[first] + (", zero-padded" if padded else ""), theirs=told[second],
            note="" if second else f"Torch-Pruning's: {why}",
        )  # fmt: skip
        if padded:
            compact = folder / "ours-compact"
            ours.export(compact, heads=heads, ids=torch.load(ids), form="remote-code")
            both = [told[loads(where, remote_code=True)[0]] for where in (compact, other)]
            yield line(
                "rivals", f"{family}, {what}: reloads at its size with trust_remote_code", against, "yes or no",
                ours=both[0], theirs=both[1], note="the stock class holds no such number of heads",
            )  # fmt: skip


def quality(rival: Rival, options: argparse.Namespace, *, against: str, folder: Path) -> Iterator[Line]:
    """Loss above the parent's of a real LLaMA with half its FFN widths, for some calibration texts; no training."""
    what = f"{STORIES}, FFN widths halved"
    if missing := [name for name in REAL if not (options.data / name).exists()]:
        note = f"not measured: no {', '.join(missing)} in the data folder; set HF_ELASTIC_DATA"
        yield line("rivals", what, against, "loss above the parent's", note=note)
        return
    parent, tokenizer = load_parent(options.data, STORIES)
    texts = prepare(options.data, MODELS[STORIES], (parent, tokenizer), options)
    folder.mkdir()
    whole = math.log(perplexity(parent, texts.validation))
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    def judge(name: str, model: PreTrainedModel, taken: float) -> None:
        losses.setdefault(name, []).append(math.log(perplexity(model, texts.validation)) - whole)
        seconds.setdefault(name, []).append(taken)

    stopwatch = Stopwatch(options.clock)
    for seed in range(options.seeds):
        calibration = drawn(texts.train, most=options.calibration_tokens, seed=seed)
        for name, model in ours_cut(parent, calibration, stopwatch):
            judge(name, model, stopwatch.taken())
        labelled = [{**batch, "labels": labels_of(batch)} for batch in calibration]
        torch.save(labelled, folder / "batches.pt")
        for importance in ("magnitude", "taylor"):
            out = folder / f"{importance}-{seed}"
            done = rival.run(
                "cut", folder=str(options.data / STORIES / "hf"), importance=importance,
                batches=str(folder / "batches.pt"), out=str(out),
            )  # fmt: skip
            model = LlamaForCausalLM.from_pretrained(out).eval()
            if model.config.intermediate_size != parent.config.intermediate_size // 2:
                raise RivalError(f"not comparable: a width of {model.config.intermediate_size} there")
            judge(importance, model, done.seconds)
    spent = ", ".join(f"{name} {statistics.median(taken):.2f}" for name, taken in seconds.items())
    for name in ("reconstruction order", "reconstruction order and refit"):
        for other in ("magnitude", "taylor"):
            yield valued(
                ("rivals", f"{what}: {name}", f"{against}, {other}", "loss above the parent's (nats)"),
                losses[name], losses[other], bar=NOT_MORE,
                note=f"parent's loss {whole:.3f}; pairs are calibration texts of {options.calibration_tokens} tokens; "
                f"nothing trained; {options.clock} seconds of a cut: {spent}",
            )  # fmt: skip


def ours_cut(
    parent: LlamaForCausalLM, calibration: list[Batch], stopwatch: Stopwatch
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Half the width in the order of reconstruction; then the same repaired, to whose time the sorting belongs."""
    supernet = he.make_elastic(copy.deepcopy(parent), he.ElasticConfig(intermediate_size=[0.5]))
    stopwatch(lambda: he.sort_by_importance_(supernet, calibration, method="reconstruction"))
    smallest = supernet.space.smallest()
    cut = stopwatch(lambda: he.extract(supernet, smallest))
    sorting = stopwatch.seconds
    yield "reconstruction order", cut
    fitted = stopwatch(lambda: he.refit(supernet, smallest, calibration))
    stopwatch.seconds += sorting
    yield "reconstruction order and refit", fitted


def labels_of(batch: Batch) -> Tensor:
    """The tokens themselves, and -100 at padding, (B, T)."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
