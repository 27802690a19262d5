"""Writes the tables of methods and of crossovers from the JSON files in benchmarks/results, so that no number is typed.

    python benchmarks/render_methods.py

They stand between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in README.md and in docs/: methods.md, when-not.md and
reliability.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import render_crossovers
import render_faults
import render_fuzz
from render import RESULTS, table

ROOT = Path(__file__).resolve().parents[1]
Found = Mapping[str, Any]
PAPERS = {
    "": "",
    "once-for-all": "[BigNAS](https://arxiv.org/abs/2003.11142), [Once-for-All](https://arxiv.org/abs/1908.09791)",
    "lonas": "[2501.16372](https://arxiv.org/abs/2501.16372)",
    "wanda": "[Wanda](https://arxiv.org/abs/2306.11695), [GPTQ](https://arxiv.org/abs/2210.17323)",
    "elm": "[2510.27037](https://arxiv.org/abs/2510.27037)",
    "elastiformer": "[2411.15281](https://arxiv.org/abs/2411.15281)",
    "capacity": "[2001.08361](https://arxiv.org/abs/2001.08361), [2006.12467](https://arxiv.org/abs/2006.12467)",
    "zerolm": "[2503.18646](https://arxiv.org/abs/2503.18646)",
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: of the method.
        page: of docs/ that is about it.
        command: of the command line, or "" where there is none.
        api: names in ``hf_elastic``.
        paper: key of :data:`PAPERS`.
        test: file below tests/.
        result: sentence made of results by the names of their files.
    """

    name: str
    page: str
    command: str
    api: tuple[str, ...]
    paper: str
    test: str
    result: Callable[[Found], str]


def encoder_kept(name: str) -> Callable[[Found], str]:
    """STS-B and speed-up of a compressed sentence encoder: means over its runs."""

    def sentence(found: Found) -> str:
        outputs = found[name]["outputs"]
        speed = sum(row["speed-up"] for row in outputs) / len(outputs)
        minutes = sum(row["minutes"] for row in outputs) / len(outputs)
        kept = found[name]["summary"]["kept"]
        return f"MiniLM {speed:.2f}x as fast keeps {kept:.1%} of STS-B, in {minutes:.1f} min on two cores"

    return sentence


def repaired(found: Found) -> str:
    rows = next(model["rows"] for model in found["stories-fast"]["results"] if model["model"] == "babyllama105")
    by_name = {row["what"]: row["perplexity"] for row in rows if row["limit"] in (0.8, 1)}
    return (
        f"perplexity of a LLaMA with 80 % of its parameters: {by_name['exact answer, refit']:.2f} (parent "
        f"{by_name['parent']:.2f}, uniform cut {by_name['uniform width, cut']:.2f})"
    )


def exact(found: Found) -> str:
    row = max(found["exact-front"]["rows"], key=lambda row: float(row["architectures"]))
    return f"the whole front of {row['architectures']} architectures in {row['seconds']:.2g} s"


def latency_tables(found: Found) -> str:
    worst = max(row["worst"] for row in found["predicted-speedup"]["worst"])
    return f"predicted speed-ups at most {worst:.1%} off those of exported models"


def adapter(method: str, subnet: str) -> Callable[[Found], str]:
    """What a mode of elastic adapters keeps of fixed-rank LoRA."""

    def sentence(found: Found) -> str:
        rows = found["adapters-banking77"]["summary"]
        row = next(row for row in rows if (row["method"], row["subnet"]) == (method, subnet))
        full = rows[0]["adapter parameters"]
        size = f"{row['MACs, merged']:.0%} of the MACs" if method == "Mode B" else (
            f"{row['adapter parameters'] / full:.0%} of the adapter's parameters"
        )  # fmt: skip
        return f"banking77: {row['kept']:.1%} of fixed-rank LoRA's accuracy with {size}"

    return sentence


def sqft(method: str) -> Callable[[Found], str]:
    """What a merged sparse model keeps of LoRA on the same base."""

    def sentence(found: Found) -> str:
        row = next(row for row in found["sqft-banking77"]["summary"] if row["method"] == f"{method}, merged")
        bits = f", {row['bits']} bits" if row["bits"] else ""
        return f"banking77: {row['kept']:.1%} of LoRA's accuracy, {row['zeros']:.0%} zeros{bits}, merged"

    return sentence


def zeros(found: Found) -> str:
    row = next(row for row in found["sqft-banking77"]["summary"] if row["method"] == "no adapters")
    return (
        f"banking77: {row['kept']:.1%} of LoRA's accuracy with {row['zeros']:.0%} zeros and a trained classifier alone"
    )


def growth(found: Found) -> str:
    rows = {row["what"]: row for row in found["elm"]["rows"] if row["width"] == found["elm"]["settings"]["largest"]}
    summary = {row["widths"]: row["trained anew"] for row in found["elm-growth"]["summary"]}
    losses = ", ".join(f"{name} {loss}" for name, loss in summary.items())
    return f"scores take {rows['scores']['share']:.1%} of training at the most; loss of the found path: {losses}"


def fusion(found: Found) -> str:
    rows = found["elm-fusion"]["summary"]
    merged = min((row for row in rows if row["fusion"].startswith("merge")), key=lambda row: _first(row["heads kept"]))
    return (
        f"`{merged['fusion']}`: {_first(merged['heads kept']):.0%} of the heads, loss "
        f"{_first(merged['loss after']):.3f} after training on ({_first(rows[0]['loss after']):.3f} with all)"
    )


def _first(value: str) -> float:
    return float(value.partition(" ")[0])


def routing(found: Found) -> str:
    rows = found["routing-minilm"]["table"]
    row = next(r for r in rows if (r["kind"], r["method"], r["capacity"]) == ("mlp_tokens", "fitted", 0.8))
    share = row["spearman"] / found["routing-minilm"]["parent"]["spearman"]
    small = found["routing-stories260K"]
    lost = next(b["lost"] for b in small["bars"] if (b["kind"], b["method"]) == ("mlp_tokens", "fitted"))
    return (
        f"80 % of the FFN's tokens, routers fitted without training: MiniLM keeps {share:.1%} of STS-B; "
        f"stories260K's loss grows by {lost:.0%}"
    )


def zerolm(found: Found) -> str:
    (row,) = found["zerolm"]["front"]
    rows = {r["score"]: r["Spearman"] for r in found["ranking"]["rows"] if r["benchmark"] == "FlexiBERT as specified"}
    ours, depth = (rows[name].partition(" ")[0] for name in ("zerolm, alpha 0.500", "depth"))
    return f"front of a 7B space in {row['seconds']:.2g} s; FlexiBERT: Spearman {ours} (depth alone {depth})"


def capacity(found: Found) -> str:
    rows = {
        (r["benchmark"], r["score"]): r["Spearman"].partition(" ")[0]
        for r in found["ranking"]["rows"]
        if r["score"] in ("capacity", "decoder_params")
    }
    flexible, causal = "FlexiBERT as specified", "LTS GPT2_wt103"
    return (
        f"Spearman {rows[flexible, 'capacity']} on FlexiBERT, {rows[causal, 'capacity']} on GPT-2 (parameters: "
        f"{rows[flexible, 'decoder_params']}, {rows[causal, 'decoder_params']})"
    )


METHODS = (
    Method("Cut and repair, without training", "fast.md", "compress --recipe fast", ("refit",), "",
           "repair/test_refitting.py", encoder_kept("minilm-fast")),
    Method("The same for decoders", "fast.md", "compress --recipe fast", ("measure_quality_table", "refit"), "",
           "pipeline/test_fast.py", repaired),
    Method("Repair, then distillation", "fast.md", "compress --recipe balanced", ("recover",), "",
           "repair/test_recovery.py", encoder_kept("minilm-balanced")),
    Method("Supernet, search, distillation", "training.md", "compress --recipe best",
           ("make_elastic", "ElasticTrainer"), "once-for-all", "pipeline/test_run.py", encoder_kept("minilm-general")),
    Method("Exact search", "search.md", "compress", ("search_subnets",), "", "search/test_exact.py", exact),
    Method("Latency tables", "fast.md", "compress --speedup", ("measure_latency_table",), "",
           "tables/test_latencies.py", latency_tables),
    Method("Elastic LoRA (Shears, Mode A)", "adapters.md", "compress --lora", ("ElasticLoraConfig", "extract_adapter"),
           "lonas", "adapters/test_elastic_lora.py", adapter("Mode A", "found")),
    Method("LoNAS (Mode B)", "adapters.md", "compress --lora --space", ("make_elastic", "add_lora"), "lonas",
           "adapters/test_bases.py", adapter("Mode B", "kept")),
    Method("Zeros and integers in place", "compression.md", "sparsify", ("sparsify_", "quantize_"), "wanda",
           "compression/test_sparsity.py", zeros),
    Method("SparsePEFT", "compression.md", "compress --lora --sparsity", ("sparsify_", "add_lora"), "lonas",
           "adapters/test_merged.py", sqft("SparsePEFT")),
    Method("QA-SparsePEFT (SQFT)", "compression.md", "compress --lora --sparsity --bits", ("quantize_", "add_lora"),
           "lonas", "adapters/test_merged.py", sqft("QA-SparsePEFT")),
    Method("ELM: blocks that grow", "elm.md", "elm", ("PCAGrowthCallback", "make_elm"), "elm",
           "training/test_growth.py", growth),
    Method("ELM: head fusion", "elm.md", "elm", ("fuse_heads", "HeadFusionCallback"), "elm", "repair/test_fusing.py",
           fusion),
    Method("Routing (ElastiFormer)", "routing.md", "", ("add_routing", "fit_routers", "set_capacity"), "elastiformer",
           "routing/test_promises.py", routing),
    Method("ZeroLM", "proxies.md", "score", ("score", "proxies"), "zerolm", "proxies/test_zerolm_table.py", zerolm),
    Method("Capacity, from sizes alone", "proxies.md", "score", ("proxies",), "capacity", "proxies/test_shapes.py",
           capacity),
)  # fmt: skip


def methods(found: Found, *, docs: str = "", root: str = "../") -> str:
    """The table of methods; ``docs`` and ``root`` lead from the page to docs/ and to the root."""
    return table([
        {
            "method": f"[{method.name}]({docs}{method.page})",
            "command": f"`hf-elastic {method.command}`" if method.command else "Python only",
            "API": ", ".join(f"`{name}`" for name in method.api),
            "paper": PAPERS[method.paper] or "none",
            "test": f"[{Path(method.test).name}]({root}tests/{method.test})",
            "measured": method.result(found),
        }
        for method in METHODS
    ])  # fmt: skip


def placed(text: str, name: str, contents: str) -> str:
    """The text with something else between the marks of a name.

    Raises:
        SystemExit: the text has no such marks.
    """
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there is no {marks[0]} ... {marks[1]} to write between")
    return pattern.sub(lambda _: f"{marks[0]}\n\n{contents}\n\n{marks[1]}", text)


def written(found: Found) -> dict[str, str]:
    """Every page that numbers are written into, by its path below the root."""
    parts = {
        "README.md": {"methods": methods(found, docs="docs/", root="")},
        "docs/methods.md": {"methods": methods(found)},
        "docs/when-not.md": render_crossovers.parts(found),
        "docs/reliability.md": {**render_faults.parts(found), **render_fuzz.parts(found)},
    }
    pages = {}
    for page, contents in parts.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, one in contents.items():
            text = placed(text, name, one)
        pages[page] = text
    return pages


def results() -> dict[str, Any]:
    """All results by the names of their files."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}


def main() -> None:
    """Writes the pages from what is there."""
    for page, text in written(results()).items():
        (ROOT / page).write_text(text, encoding="utf-8")
        print(f"wrote {page}")


if __name__ == "__main__":
    main()
