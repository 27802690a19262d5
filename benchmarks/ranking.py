"""Scores without training on benchmarks of trained architectures, in one table.

    python benchmarks/ranking.py [--data FOLDER] [--json FILE]

FlexiBERT in three settings (as its published metrics were computed, as specified, as trained) and the random sets of
LiteTransformerSearch: what ``hf-elastic score`` prints of each, without the metrics that the files hold. Half of each
benchmark is in the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from measuring import environment, print_environment, print_table, write_json
from stories import add_data_argument

from hf_elastic.pipeline.scoring import RankingOptions, rank_benchmark
from hf_elastic.proxies import read_benchmark
from hf_elastic.proxies.readers import Setting

LTS = ("GPT2_wt103", "GPT2_lm1b", "TransXL_wt103", "TransXL_wt103_homogeneous", "TransXL_lm1b")


def rows_of(name: str, file: str, options: RankingOptions) -> list[dict[str, Any]]:
    """The scores of one benchmark."""
    ranking = rank_benchmark(read_benchmark(file, setting=options.setting), options)
    return [
        {"benchmark": name, "score": cells[0], "Spearman": cells[1], "Kendall": cells[2], "us each": cells[3]}
        for row in ranking.rows
        if not row.proxy.endswith("(file)")
        for cells in [row.cells()]
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--labelled", type=int, default=30)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(given)
    folder = options.data
    if missing := [name for name in ("flexibert", "lts") if not (folder / name).is_dir()]:
        raise SystemExit(f"{folder} has no {missing[0]}; pass --data or set HF_ELASTIC_DATA")
    machine = environment()
    print_environment(machine)
    rows: list[dict[str, Any]] = []
    drawn = {"labelled": options.labelled, "draws": options.draws, "seed": options.seed}
    for setting in get_args(Setting):
        chosen = RankingOptions(setting=setting, **drawn)
        rows += rows_of(f"FlexiBERT as {setting}", str(folder / "flexibert" / "flexibert.jsonl"), chosen)
    for name in LTS:
        rows += rows_of(f"LTS {name}", str(folder / "lts" / f"random_{name}.jsonl"), RankingOptions(**drawn))
    print_table(rows)
    write_json(options.json, {"environment": machine, "settings": drawn, "rows": rows})


if __name__ == "__main__":
    main()
