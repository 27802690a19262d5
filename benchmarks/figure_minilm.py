"""Draws docs/figures/minilm.svg from benchmarks/results: quality against speed-up of all-MiniLM-L6-v2.

python benchmarks/figure_minilm.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, FIGURE = HERE / "results", HERE.parent / "docs" / "figures" / "minilm.svg"

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 56, 52
SPEEDS, KEPT = (0.95, 2.15), (0.74, 1.01)
# file, row, what it is called here, kind, and where its name stands: the offset and the side that the text ends on
SHOWN = (
    ("minilm-general", "parent", "parent", "parent", (10, 4, "start")),
    ("minilm-balanced", "found", "balanced: trained for {minutes:.0f} minutes", "ours", (10, -6, "start")),
    ("minilm-general", "found", "best: supernet, search, training", "ours", (10, 10, "start")),
    ("minilm-general", "fast answer, untrained", "fast: searched and repaired, untrained", "ours", (12, 16, "start")),
    ("minilm-general", "uniform width, refit", "uniform width, repaired", "plain", (-12, 4, "end")),
    ("minilm-general", "fast answer, cut only", "the same cut, not repaired", "plain", (10, 4, "start")),
    ("minilm-general", "uniform width, untrained", "uniform width", "plain", (-12, 4, "end")),
    ("minilm-general", "one layer more, untrained", "2 of 6 layers dropped", "plain", (-12, 4, "end")),
    ("minilm-general", "dropped layers, untrained", "3 of 6 layers dropped", "plain", (0, -13, "middle")),
)  # fmt: skip
TITLE = "all-MiniLM-L6-v2: similarities of held-out sentences, correlation with the parent's"

STYLE = """
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .grid { stroke: #d1d9e0 }
  .ours { fill: #0969da } .plain { fill: none; stroke: #bc4c00; stroke-width: 2 } .parent { fill: #59636e }
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif } .title { font-weight: 600; font-size: 15px }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .soft { fill: #9198a1 } .grid { stroke: #3d444d }
    .ours { fill: #4493f8 } .plain { stroke: #db6d28 } .parent { fill: #9198a1 }
  }
"""


@dataclass(frozen=True)
class Point:
    """A model in the picture: how fast it is, what it keeps, how it is called."""

    speedup: float
    kept: float
    name: str
    kind: str
    place: tuple[float, float, str]


def points(found: Mapping[str, Any]) -> list[Point]:
    """The models of the picture, from results by the names of their files."""
    made = []
    for file, row_name, name, kind, place in SHOWN:
        rows = {row["name"]: row for row in found[file]["compared"]}
        row, parent = rows[row_name], rows["parent"]
        trained = name.format(minutes=found[file]["seconds"].get("specialise", 0.0) / 60)
        made.append(Point(parent["latency"] / row["latency"], row["structure"], trained, kind, place))
    return made


def x(speedup: float) -> float:
    return LEFT + (speedup - SPEEDS[0]) / (SPEEDS[1] - SPEEDS[0]) * (WIDTH - LEFT - RIGHT)


def y(kept: float) -> float:
    return HEIGHT - BOTTOM - (kept - KEPT[0]) / (KEPT[1] - KEPT[0]) * (HEIGHT - TOP - BOTTOM)


def text(words: str, where: tuple[float, float], *, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{where[0]:.1f}" y="{where[1]:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def grid() -> list[str]:
    """Lines and numbers of both axes."""
    lines = []
    for tick in (0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        lines.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" class="grid"/>')
        lines.append(text(f"{tick:.2f}", (LEFT - 8, y(tick) + 4), kind="soft", anchor="end"))
    for tick in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0):
        lines.append(text(f"{tick:.1f}x", (x(tick), HEIGHT - BOTTOM + 20), kind="soft", anchor="middle"))
    lines.append(text("times as fast as the parent, measured", ((LEFT + WIDTH) / 2, HEIGHT - 10), anchor="middle"))
    return lines


def drawing(found: Sequence[Point]) -> str:
    """The picture as SVG, which follows the reader's light or dark scheme."""
    listed = "; ".join(f"{p.name}: {p.kept:.3f} at {p.speedup:.2f}x" for p in found)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">',
        f"<title>What all-MiniLM-L6-v2 keeps when it is made faster. {escape(listed)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" class="paper"/>',
        text(TITLE, (16, 26), kind="ink title"),
        text("filled: hf-elastic; rings: plain alternatives and single steps", (16, 44), kind="soft"),
        *grid(),
    ]  # fmt: skip
    for point in found:
        where = (x(point.speedup), y(point.kept))
        lines.append(f'<circle cx="{where[0]:.1f}" cy="{where[1]:.1f}" r="6" class="{point.kind}"/>')
        across, down, anchor = point.place
        lines.append(text(point.name, (where[0] + across, where[1] + down), anchor=anchor))
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Draws the figure from what is there."""
    names = {file for file, *_ in SHOWN}
    found = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(drawing(points(found)), encoding="utf-8")
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
