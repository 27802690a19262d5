"""What routers are worth on real models: ``examples/routing.py`` on stories260K and on all-MiniLM-L6-v2.

    python benchmarks/routing_quality.py stories260K [--json FILE]
    python benchmarks/routing_quality.py minilm --parent FOLDER [--json FILE]

Stories are TinyStories: routers learn from the training text, thresholds are calibrated on the last of it, and losses
are those of the validation pieces. Sentences are those of STS-B's training pairs; its other half judges. Options of the
example come behind ``--``. The bar is the paper's point: at most 1 % lost with 80 % of the FFN's tokens, and with 56 %
of its experts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import started, write_json
from stories import MODELS, STORY_BORDER, add_data_argument, checked_data, load_parent, windows

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "routing.py"
_spec = importlib.util.spec_from_file_location("routing_example", EXAMPLE)  # there is a routing.py beside this file too
assert _spec is not None and _spec.loader is not None
routing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(routing)

POINTS = {"mlp_tokens": 0.8, "experts": 0.56}
BAR = 0.01
STORIES = {
    "--experts": ["43"], "--length": ["256"], "--capacities": ["0.5", "0.56", "0.7", "0.8", "0.9"],
}  # fmt: skip
SENTENCES = {"--experts": ["16"], "--capacities": ["0.5", "0.56", "0.7", "0.8", "0.9"]}


class Stories(routing.Task):
    """A model of llama2.c and its own tokenizer, on stories."""

    def load_tokenizer(self) -> Callable[..., dict[str, list[int]]]:
        _, self._tokenizer = load_parent(self.arguments.folder, self.arguments.name)
        return lambda text: {"input_ids": self._tokenizer.encode(text)}

    def texts(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        folder, options = self.arguments.folder, self.arguments
        text = (folder / "tinystories" / "train_944k.txt").read_text(encoding="utf-8")
        stories = [story.strip() for story in re.split(STORY_BORDER, text)]
        train, last = (windows(self._tokenizer, part, length=options.length) for part in (stories[:-48], stories[-48:]))
        pieces = MODELS[options.name].validation(folder, pieces=options.held_out)
        return train, last, windows(self._tokenizer, pieces, length=options.length)


def sentences(folder: Path, *, output: Path) -> list[str]:
    """Options of the example for sentences and pairs of STS-B."""
    lines = (folder / "glue" / "stsb_train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    text = output / "sentences.txt"
    text.write_text("\n".join(dict.fromkeys(pair[name] for pair in pairs for name in ("sentence1", "sentence2"))))
    return ["--data", str(text), "--pairs", str(folder / "glue" / "stsb_dev.jsonl")]


def bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How much is lost at the paper's points by each method, of the loss or of the correlation with scores."""
    parent, found = result["parent"], []
    name = "loss" if "loss" in parent else "spearman"
    for kind, capacity in POINTS.items():
        rows = [row for row in result["table"] if row["kind"] == kind]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            row = min(own, key=lambda row: abs(row["capacity"] - capacity))
            lost = row[name] / parent[name] - 1 if name == "loss" else 1 - row[name] / parent[name]
            found.append(
                {
                    "kind": kind, "capacity": row["capacity"], "method": row["method"], "lost": lost,
                    "bar": f"<= {BAR:.0%}", "met": lost <= BAR,
                }
            )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options, rest = parsed(arguments)
    folder, machine = checked_data(options.data), started(options.threads)
    with tempfile.TemporaryDirectory() as work:
        output = Path(options.output or work)
        output.mkdir(parents=True, exist_ok=True)
        if options.model == "minilm":
            chosen = [*_flat(SENTENCES), "--model", options.parent, *sentences(folder, output=output)]
            task = routing.Task(routing.parsed([*chosen, "--output", str(output), *rest]))
        else:
            source = str(folder / options.model / "hf")
            chosen = [*_flat(STORIES), "--model", source, "--data", str(folder), "--output", str(output)]
            settings = routing.parsed([*chosen, *rest])
            settings.folder, settings.name = folder, options.model
            task = Stories(settings)
        result = routing.run(task)
        settings = {n: v for n, v in vars(task.arguments).items() if isinstance(v, int | float | list) and n != "data"}
    found = bars(result)
    for row in found:
        print(f"{row['kind']} {row['capacity']:.0%} {row['method']}: {row['lost']:+.2%} lost (bar {row['bar']})")
    write_json(
        options.json,
        {"environment": machine, "model": options.model, "settings": settings, "bars": found, **result},
    )


def _flat(settings: Mapping[str, list[str]]) -> list[str]:
    return [word for name, values in settings.items() for word in (name, *values)]


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and those of the example behind ``--``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*MODELS, "minilm"])
    add_data_argument(parser)
    parser.add_argument("--parent", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output", help="folder for routers and the figure; by default none is kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args(words[:cut])
    if options.model == "minilm" and not options.parent:
        parser.error("minilm needs --parent FOLDER")
    return options, words[cut + 1 :]


if __name__ == "__main__":
    main()
