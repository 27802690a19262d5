"""Where something else is better: cuts too small to be felt, zeros that are served (for INT8 see runtimes.py).

    python benchmarks/crossovers.py [--parts cuts zeros] [--json FILE]

``cuts``: stock models of one FFN width against their parent, random weights. ``zeros``: a linear layer with zeros, as a
dense and as a sparse matrix. One thread, CPU clock, so that others on the machine change little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import CLOCKS, interval, paired_seconds, print_table, started, write_json
from transformers import BertConfig, BertModel

SHARES = (0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.25)
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
MULTIPLE = 32  # of which widths are that kernels like
WORTH = 1.05  # times as fast, from which on a cut is called felt


def ratio(first: Callable[[], object], second: Callable[[], object], *, pairs: int) -> dict[str, Any]:
    """How many times as fast the second call is, with its interval."""
    found = interval([a / b for a, b in paired_seconds(first, second, pairs=pairs, clock=CLOCKS["cpu"])])
    return {"speed-up": found.median, "low": found.low, "high": found.high, "pairs": found.count}


def encoder(width: int, *, layers: int, hidden: int) -> BertModel:
    """A stock encoder of random weights."""
    config = BertConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=width
    )
    return BertModel(config).eval()


def cuts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed-up of stock models whose FFNs are narrower, by the share of the width that is left."""
    whole = 4 * options.hidden
    ids = torch.randint(0, 1000, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    parent = encoder(whole, layers=options.layers, hidden=options.hidden)
    sizes = sum(p.numel() for p in parent.encoder.parameters())
    rows = []
    aligned = [MULTIPLE * round(share * whole / MULTIPLE) for share in SHARES]
    for width in (whole, *aligned, aligned[1] + 13):
        child = encoder(width, layers=options.layers, hidden=options.hidden)
        left = sum(p.numel() for p in child.encoder.parameters()) / sizes
        found = ratio(lambda: parent(ids), lambda model=child: model(ids), pairs=options.pairs)
        rows.append({"FFN width": width, "parameters left": left, "if time followed": 1 / left, **found})
        print_table(rows[-1:])
    return rows


def zeros(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed of a linear layer whose weight has zeros, over that of the same layer without."""
    generator = torch.Generator().manual_seed(0)
    size, tokens = options.hidden, options.batch * options.length
    dense, states = torch.randn(4 * size, size, generator=generator), torch.randn(tokens, size, generator=generator)
    rows = []
    for share in ZEROS:
        sparse = dense * (torch.rand(dense.shape, generator=generator) >= share)
        compressed = sparse.to_sparse_csr()
        kept = ratio(lambda: dense @ states.T, lambda weight=sparse: weight @ states.T, pairs=options.pairs)
        stored = ratio(lambda: dense @ states.T, lambda weight=compressed: weight @ states.T, pairs=options.pairs)
        for how, found in (("dense matrix with zeros in it", kept), ("sparse matrix (CSR)", stored)):
            rows.append({"zeros": share, "served as": how, **found})
        print_table(rows[-2:])
    return rows


PARTS = {"cuts": cuts, "zeros": zeros}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    machine = started(1)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    with torch.no_grad():
        found = {part: PARTS[part](options) for part in options.parts}
    write_json(options.json, {"environment": machine, "settings": {**settings, "worth": WORTH}, **found})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
