"""Part ``stock`` of ``run.py``: what elasticity costs beside stock transformers and stock peft, in paired ratios."""

from __future__ import annotations

import argparse

import backbone
import elastic_lora
import routing
import sparse_peft
from comparing import Line, line, of_row
from measuring import CLOCKS

PART = "stock"
_WORDS = {
    "stock / stock": ("a copy of the stock model (what this machine adds)", "the stock model"),
    "elastic / stock": ("supernet at its largest", "stock transformers"),
    "active / extracted": ("subnet active in the supernet", "the same subnet as a stock model"),
}
_ADAPTERS = {
    "control": "a copy of the adapted model (what this machine adds)",
    "largest": "elastic LoRA at its largest rank",
    "random": "elastic LoRA, ranks drawn and activated each pass",
}


def lines(options: argparse.Namespace) -> list[Line]:
    """Backbones, adapters, SparsePEFT, routers."""
    return [*backbones(options), *adapters(options), *sparse(options), *routers(options)]


def backbones(options: argparse.Namespace) -> list[Line]:
    """Class-swapped models against stock transformers, subnets inside against outside."""
    size = backbone.Size(options.layers, options.hidden, options.batch, options.length)
    found = []
    for name in backbone.FAMILIES:
        family = backbone.Family(name, size, pairs=options.pairs, switches=200, clock=CLOCKS["wall"])
        rows = [*family.control(), *family.largest(), *family.active()]
        for row in rows:
            what, against = _WORDS[row["first / second"]]
            subnet = "" if row["subnet"] == "largest" else f" ({row['subnet']})"
            found.append(of_row(PART, f"{name}, {row['pass']}: {what}{subnet}", against, row))
        (switched,) = family.switch()
        found.append(
            line(
                PART, f"{name}: a switch of all choices of {2 * size.layers} layers", "nothing", "milliseconds",
                ours=switched["ratio"], low=switched["low"], high=switched["high"], pairs=switched["pairs"],
                bar=switched["bar"], met=switched["met"],
            )  # fmt: skip
        )
    return found


def adapters(options: argparse.Namespace) -> list[Line]:
    """Elastic LoRA against peft's."""
    size = backbone.Size(options.layers, options.hidden, options.batch, options.length)
    passes, found = elastic_lora.Passes(size), []
    for name in backbone.FAMILIES:
        pair = elastic_lora.Pair(name, size)
        rows = elastic_lora.timed(
            name, pair, passes, parts=list(_ADAPTERS), pairs=options.pairs, clock=CLOCKS["wall"]
        )  # fmt: skip
        found += [of_row(PART, f"{name}, {row['pass']}: {_ADAPTERS[row['what']]}", "peft's LoRA", row) for row in rows]
        for row in elastic_lora.memory(name, pair, passes):
            ratio = {key: row[key] for key in ("ratio", "low", "high", "pairs", "bar", "met")}
            what = f"{name}, step: elastic LoRA, {row['what'].removeprefix('memory, ')} ranks"
            found.append(line(PART, what, "peft's LoRA", "bytes at the peak", theirs=1e6 * row["stock_mb"], **ratio))
    return found


def sparse(options: argparse.Namespace) -> list[Line]:
    """SparsePEFT against its formula as it reads, and against peft's LoRA, which fills the zeros when merged."""
    size = backbone.Size(options.layers, options.hidden, options.batch, options.length)
    three, passes = sparse_peft.Three(size), sparse_peft.Passes(size)
    three.check(passes)
    against = {"plain": "its formula with autograd", "stock": "peft's LoRA (loses the zeros when merged)"}
    rows = sparse_peft.timed(three, passes, part="short", pairs=options.pairs, clock=CLOCKS["wall"])
    found = [of_row(PART, "SparsePEFT, step", against[row["what"].rpartition(" ")[2]], row) for row in rows]
    (held,) = sparse_peft.memory(three, passes)
    ratio = {key: held[key] for key in ("ratio", "low", "high", "pairs", "bar", "met")}
    note = "bytes beyond those of peft's LoRA"
    return [*found, line(PART, "SparsePEFT, step", against["plain"], "bytes at the peak", **ratio, note=note)]


def routers(options: argparse.Namespace) -> list[Line]:
    """Routed models against their parent: what computing everything and masking it would take at the least."""
    given = ["--threads", str(options.threads), "--pairs", str(options.pairs), "--layers", str(options.layers)]
    given += ["--hidden", str(options.hidden), "--heads", str(options.hidden // 64)]
    settings = routing.parsed([*given, "--length", str(options.batch * options.length)])
    found = []
    for family in ("llama", "bert"):
        for row in routing.prefill_rows(family, settings, CLOCKS["wall"]):
            full = row["half"] == "full"
            ratio = {"ratio": row["median"], "low": row["low"], "high": row["high"], "pairs": row["count"]}
            bar = {"bar": row["bar"], "met": row["met"]} if full else {}
            against = "stock transformers" if full else "computing everything and masking"
            halved = f"{row['half'].replace('_', ' ')} at half ({row['MACs left']:.0%} of MACs)"
            what = f"{family}: {'routed model at full capacity' if full else halved}"
            found.append(line(PART, what, against, "seconds", **ratio, **bar))
    return found
