"""Writes docs/benchmarks.md from the JSON files in benchmarks/results, so that no number in it is typed.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Made by `python benchmarks/render.py` from the JSON files in `benchmarks/results`; every number is measured on the
machine named with it. Times are compared as ratios within one run.
"""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the columns are the keys of the first row."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(found: Mapping[str, Any]) -> str:
    """One line about where it was measured."""
    return "Measured with " + ", ".join(f"{name} {value}" for name, value in found.items()) + "."


def minilm(name: str, result: Mapping[str, Any]) -> str:
    """Section about a compressed sentence encoder."""
    parent = result["compared"][0]
    rows = [
        {
            "model": row["name"],
            "parameters (without embeddings)": f"{row['parameters'] / parent['parameters']:.1%}",
            "with embeddings": f"{row['total_parameters'] / parent['total_parameters']:.1%}",
            "MACs": f"{row['macs'] / parent['macs']:.1%}",
            "speed-up": f"{parent['latency'] / row['latency']:.2f}x",
            "similarity structure": row["structure"],
            "cosine": row["cosine"],
            "loads as": row["loadability"],
        }
        for row in result["compared"]
    ]
    kept = result["stsb"][1]
    stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in result["seconds"].items() if spent)
    return "\n\n".join(
        [
            f"## {name}",
            f"STS-B ({result['pairs']} pairs, never trained on): {kept['spearman']:.4f} of the parent's "
            f"{result['stsb'][0]['spearman']:.4f}, **{kept['kept']:.2%}**. Structure and cosine: against the parent, "
            "on held-out sentences of the text.",
            table(rows),
            f"Stages: {stages}. {result['plan']['supernet_steps']} steps for the supernet and "
            f"{result['plan']['found_steps']} for the subnet found.",
            machine(result["environment"]),
        ]
    )


def stories(result: Mapping[str, Any]) -> str:
    """Section about the small LLaMA checkpoints."""
    parts = [
        "## Real LLaMA weights: perplexity on TinyStories",
        "FFN widths, key/value groups and skipped sublayers of a small checkpoint. Smaller is better; parameters and "
        f"MACs as shares of the parent's; limit on the parameters: {result['settings']['within']:.0%}.",
    ]
    for found in result["results"]:
        spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found["seconds"].items())
        parts += [f"### {found['model']}", table(found["rows"]), f"Training: {spent}."]
    return "\n\n".join([*parts, machine(result["environment"])])


def backbone(result: Mapping[str, Any]) -> str:
    """Section about what elasticity costs."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## What elasticity costs",
            f"{settings['layers']} layers x {settings['hidden']}, {settings['batch']} x {settings['length']} tokens, "
            f"random weights, {settings['pairs']} pairs, {settings['clock']} clock. A bar is met when the bootstrap "
            "interval (95 %) of the median ratio includes it.",
            table(result["rows"]),
            machine(result["environment"]),
        ]
    )


def main() -> None:
    """Writes the page from what is there."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    sections = [INTRODUCTION.strip()]
    if "minilm-general" in found:
        sections.append(minilm("all-MiniLM-L6-v2, general English", found["minilm-general"]))
    if "minilm-docs" in found:
        sections.append(minilm("all-MiniLM-L6-v2, `make demo` (Python's documentation)", found["minilm-docs"]))
    sections += [stories(result) for name, result in found.items() if name.startswith("stories")]
    sections += [backbone(result) for name, result in found.items() if name.startswith("backbone")]
    PAGE.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {PAGE} from {len(found)} results")


if __name__ == "__main__":
    main()
