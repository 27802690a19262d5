"""Writes docs/benchmarks.md from the JSON files in benchmarks/results, so that no number in it is typed.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import render_elm
import render_gpu
import render_routing
import render_run
import render_runtimes

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
            *_outputs(result),
            table(rows),
            f"Stages: {stages}.{_steps(result['plan'])}",
            machine(result["environment"]),
        ]
    )


def _outputs(result: Mapping[str, Any]) -> list[str]:
    """Paragraphs about runs of several seeds and about a bar, where there are."""
    found, made = result.get("summary"), result.get("outputs", [])
    if found is None:
        return []
    lines = []
    if found["bar"] is not None:
        lines.append(f"Bar for the share kept: {found['bar']}, {_verdict(found['met'])}.")
    if len(made) > 1:
        lines.append(
            f"Mean of {len(made)} runs, standard deviation of the share kept {found['spread']:.2%}. The second table "
            "is that of the first run."
        )
        lines.append(table(made))
    return lines


def _steps(plan: Mapping[str, Any] | None) -> str:
    if plan is None:
        return " Nothing was trained."
    return f" {plan['supernet_steps']} steps for the supernet and {plan['found_steps']} for the subnet found."


def _verdict(met: bool) -> str:
    return "met" if met else "**NOT met**"


def stories(result: Mapping[str, Any]) -> str:
    """Section about the small LLaMA checkpoints."""
    names = ", ".join(found["model"] for found in result["results"])
    parts = [
        f"## {names}, supernet trained: perplexity on TinyStories",
        "Real LLaMA weights. FFN widths, key/value groups and skipped sublayers of a small checkpoint. Smaller is "
        "better; parameters and "
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


def minilm_recover(result: Mapping[str, Any]) -> str:
    """Section about minutes of recover()."""
    bars = "; ".join(f"{name}: {_verdict(met)}" for name, met in result["bars"].items())
    return "\n\n".join(
        [
            "## all-MiniLM-L6-v2, `recover()` behind recipe `fast`",
            "STS-B of the answer without training and after distilling it from its parent, on the same text, without "
            f"labels: {result['steps']} steps in {result['seconds']:.0f} s. It is {result['speedup']:.2f}x as fast as "
            f"the parent. {bars}.",
            table(result["stsb"]),
            machine(result["environment"]),
        ]
    )


def stories_fast(result: Mapping[str, Any]) -> str:
    """Section about the small LLaMA checkpoints without training."""
    settings = result["settings"]
    parts = [
        "## Real LLaMA weights, without training: perplexity on TinyStories",
        "Sorted by reconstruction, quality table, exact search, closed-form repair; mean and standard deviation over "
        f"{settings['seeds']} seeds of the {settings['calibration_tokens']} calibration tokens. Limit: share of the "
        "parent's parameters. Smaller is better. Bar: untrained, the repaired exact answer is better than everything "
        "else of its limit.",
    ]
    for found in result["results"]:
        verdicts = (f"{limit:.0%}: {_verdict(met)}" for limit, met in _best_untrained(found["rows"]))
        sums, seconds = found["additivity"], found["seconds"]["0"]
        parts += [
            f"### {found['model']}, without training",
            table(found["rows"]),
            f"Bar at {', '.join(verdicts)}. The sum over layers ranks {sums['architectures']} random architectures "
            f"with a correlation of {sums['rank correlation']:.2f} to their true damage, which is "
            f"{sums['mean ratio']:.2f} times the sum. "
            f"Seconds: {', '.join(f'{stage} {spent:.1f}' for stage, spent in seconds.items())}.",
        ]
    return "\n\n".join([*parts, machine(result["environment"])])


def _best_untrained(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, bool]]:
    """Per limit, whether the repaired exact answer is better than every other untrained model."""
    found = []
    for limit in dict.fromkeys(row["limit"] for row in rows if row["what"] != "parent"):
        untrained = {r["what"]: r["perplexity"] for r in rows if r["limit"] == limit and "training" not in r["what"]}
        ours = untrained.pop("exact answer, refit")
        found.append((limit, ours < min(untrained.values())))
    return found


def exact_front(result: Mapping[str, Any]) -> str:
    """Section about exact search."""
    return "\n\n".join(
        [
            "## Seconds of exact search",
            "The whole Pareto front of predicted damage and a cost, the tables being there: median with its bootstrap "
            "interval (95 %). The encoder is of MiniLM's shape, the decoder has layers of LLaMA-7B's sizes.",
            table(result["rows"]),
            machine(result["environment"]),
        ]
    )


def refit_memory(result: Mapping[str, Any]) -> str:
    """Section about the memory of tables and repair."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## Memory of tables and repair",
            f"A LLaMA of random bf16 weights ({settings['layers']} layers x {settings['hidden']}, FFN "
            f"{settings['intermediate']}) on {settings['device']}, {settings['tokens']} calibration tokens. Peak of "
            "each phase in a process of its own; what is beyond the parent's weights and the process with the "
            "libraries imported is held against the bar, the subnet that a repair returns included.",
            table(result["rows"]),
            machine(result["environment"]),
        ]
    )


def predicted_speedup(result: Mapping[str, Any]) -> str:
    """Section about what a latency table predicts."""
    options = result["options"]
    return "\n\n".join(
        [
            "## Predicted against measured speed-up",
            f"{options['layers']} layers x {options['hidden']}, {options['batch']} x {options['length']} tokens, "
            f"{options['architectures']} random architectures per family and phase, {options['clock']} clock. Error "
            "of the predicted speed-up, relative to that of the exported model; the bar is for the worst. Control: "
            "what a copy of the parent seems to gain.",
            table(result["worst"]),
            machine(result["environment"]),
        ]
    )


def predicted_speedup_busy(result: Mapping[str, Any]) -> str:
    """What the same command finds where other work shares the processor."""
    return "\n\n".join(
        [
            "### On a machine with busy neighbours",
            "The same command on a rented machine, as fast from one second to the next as its neighbours let it. "
            "Predictions miss by more there. `compress` says so where a table is too noisy, and holds what it exports "
            "against the budget by the clock, not by the prediction.",
            table(result["worst"]),
            machine(result["environment"]),
        ]
    )


def elastic_lora(result: Mapping[str, Any]) -> str:
    """Section about what elastic adapters cost."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## What elastic adapters cost",
            "Against peft's own LoRA of rank 32 on all linear layers, the same weights in both: elastic adapters at "
            "their largest rank, and with other ranks (16, 24 or 32 in each layer) drawn and activated in every pass. "
            f"{settings['layers']} layers x {settings['hidden']}, {settings['batch']} x {settings['length']} tokens, "
            f"{settings['pairs']} pairs, {settings['clock']} clock. `control`: a copy of the stock model.",
            table(result["times"]),
            "Peak of what a training step allocates beside the weights, from the allocator's own record:",
            table(result["memory"]),
            machine(result["environment"]),
        ]
    )


def adapters(result: Mapping[str, Any]) -> str:
    """Section about adapters on MiniLM."""
    settings, rows = result["settings"], result["summary"]
    kept = next(row["kept"] for row in rows if (row["method"], row["subnet"]) == ("Mode B", "kept"))
    shown = [
        {
            **{name: row[name] for name in ("method", "subnet")},
            "accuracy": f"{row['accuracy']:.2%} +- {row['spread']:.2%}", "of LoRA's": f"{row['kept']:.1%}",
            "adapter parameters": round(row["adapter parameters"]), "MACs, merged": f"{row['MACs, merged']:.0%}",
            "evaluations": row["evaluations"] or "",
        }
        for row in rows
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## Adapters on all-MiniLM-L6-v2: {settings['task']}",
            f"`examples/adapters_minilm.py`: a new classifier, and adapters of rank {settings['rank']} on all linear "
            f"layers; ranks {settings['ranks']}; {settings['steps']} steps; {rows[0]['seeds']} seeds. Mode B may keep "
            f"{settings['macs']:.0%} of the MACs; bar: 99.5 % of fixed-rank LoRA's accuracy, {_verdict(kept >= 0.995)} "
            f"({kept:.2%}). Published for BERT-base on SST-2: 101.3 % at 71 %.",
            table(shown),
            machine(result["environment"]),
        ]
    )


def stories_adapters(result: Mapping[str, Any]) -> str:
    """Section about adapters on a small LLaMA."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## Adapters on stories260K: perplexity on TinyStories",
            f"{settings['steps']} steps on the text that the model was made of, {len(settings['seeds'])} seeds; Mode B "
            f"may keep {settings['macs']:.0%} of the MACs. Smaller is better.",
            table(result["summary"]),
            machine(result["environment"]),
        ]
    )


def sparse_peft(result: Mapping[str, Any]) -> str:
    """Section about what SparsePEFT costs."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## What SparsePEFT costs",
            f"A half-sparse LLaMA of {settings['layers']} layers x {settings['hidden']}, adapters of rank 32 on all "
            "linear layers. `plain` is the formula with autograd, which keeps mask and product; `stock` is peft's "
            f"LoRA, which would fill the zeros. A step is forward, backward and AdamW; {settings['pairs']} pairs, "
            f"{settings['clock']} clock.",
            table(result["times"]),
            "Peak of what a training step allocates beside the weights, above that of stock LoRA:",
            table(result["memory"]),
            machine(result["environment"]),
        ]
    )


def sqft(result: Mapping[str, Any]) -> str:
    """Section about merged sparse and integer models on MiniLM."""
    settings, rows = result["settings"], result["summary"]
    kept = next(row["kept"] for row in rows if row["method"].startswith("QA-SparsePEFT"))
    shown = [
        {
            "method": row["method"], "accuracy": f"{row['accuracy']:.2%} +- {row['spread']:.2%}",
            "of LoRA's": f"{row['kept']:.1%}", "zeros": "" if row["zeros"] is None else f"{row['zeros']:.1%}",
            "bits": row["bits"] or "",
        }
        for row in rows
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## SQFT on all-MiniLM-L6-v2: {settings['task']}",
            f"`examples/sqft_minilm.py`: Wanda sets {settings['sparsity']:.0%} of the weights of the layers to zero; a "
            f"new classifier and adapters of rank {settings['rank']}, {settings['steps']} steps, {rows[0]['seeds']} "
            f"seeds. Bar: merged {settings['bits']}-bit integers keep 99 % of LoRA's accuracy on the same base, "
            f"{_verdict(kept >= 0.99)} ({kept:.2%}).",
            table(shown),
            machine(result["environment"]),
        ]
    )


def stories_sqft(result: Mapping[str, Any]) -> str:
    """Section about merged sparse and integer models on a small LLaMA."""
    settings, rows = result["settings"], result["summary"]
    lora = {row["subnet"]: row["perplexity"] for row in rows if row["method"].startswith("LoRA")}
    merged = min(row["perplexity"] for row in rows if row["method"].startswith("QA-SparsePEFT"))
    kept = ", ".join(f"{value / merged:.1%} of LoRA's of {rank}" for rank, value in lora.items())
    return "\n\n".join(
        [
            "## SQFT on stories260K: perplexity on TinyStories",
            f"{settings['steps']} steps on the text that the model was made of, {len(settings['seeds'])} seeds, half "
            "of the weights zero by Wanda. Smaller is better. The best merged model of 4-bit integers keeps, as ratio "
            f"of perplexities, {kept} on the same sparse base; at equal rank it does not reach 99 %, since LoRA kept "
            "apart adds a dense product to the sparse base and a model of 64 dimensions has no redundancy to make up.",
            table(result["summary"]),
            machine(result["environment"]),
        ]
    )


def flexibert(result: Mapping[str, Any]) -> str:
    """Section about proxies on FlexiBERT."""
    settings, rows = result["settings"], result["rows"]
    own, both = ("proxy", "target", "Spearman", "95 %", "Kendall"), ("its Spearman", "its Kendall", "ours with it")
    scores = {(r["proxy"], r["target"]): {**{n: r[n] for n in own}, "s per row": r["seconds"]} for r in rows}
    beside = [
        {"published": r["published"], "ours": f"{r['proxy']} {r['target']}".strip(), "Spearman": r["Spearman"],
         "Kendall": r["Kendall"], **{name: r[name] for name in both}, "ours / it": r["ours / it"]}
        for r in rows if r["published"]
    ]  # fmt: skip
    size = "" if result["noise"] is None else f" ({result['noise']:.1g} of the size of those of `signs`, median)"
    parts = [
        "## Zero-cost proxies on FlexiBERT",
        f"Random models of {result['architectures']} of the {result['of']} rows of the benchmark at hand, as "
        f"{settings['setting']}, {settings['batch']} x {settings['length']} tokens ({settings['text']}). Rank "
        "correlations with GLUE; `signs`: gradients of the last hidden states times fixed signs; `sum`: of their sum, "
        f"which is constant, so that its gradients are rounding noise{size}.",
        table(list(scores.values())),
    ]
    if beside:
        parts += ["Beside the published metrics of the same rows (128 x 512 tokens, `sum`):", table(beside)]
    return "\n\n".join([*parts, machine(result["environment"])])


def ranking(result: Mapping[str, Any]) -> str:
    """Section about how scores from sizes rank trained architectures."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "## Scores without training: how they rank",
            "`benchmarks/ranking.py`, half of each benchmark: Spearman's and Kendall's coefficients with GLUE "
            "(FlexiBERT) or with the validation perplexity (LiteTransformerSearch), 95 % bootstrap intervals. "
            f"`fitted`: alpha by Algorithm 1 on {settings['labelled']} labelled rows, mean and standard deviation of "
            f"{settings['draws']} draws; `label-free`: by Algorithm 2. The paper has .765 / .532 on FlexiBERT (as "
            "published) and .979 / .871 on GPT-2; LPZero, the record there, .980 / .886.",
            table(result["rows"]),
            machine(result["environment"]),
        ]
    )


def zerolm(result: Mapping[str, Any]) -> str:
    """Section about what ZeroLM costs."""
    parts = [
        ("svd", "The closed form beside singular values:"), ("shapes", "From sizes alone:"),
        ("stream", "A checkpoint of a billion parameters in bf16, streamed from its files:"),
        ("front", "All widths of LoNAS-LLaMA-7B (the paper: 25 minutes for two architectures):"),
        ("search", "NSGA-II on the same, as a share of the exact front's hypervolume:"),
    ]  # fmt: skip
    lines = ["## ZeroLM: what it costs"]
    for name, title in parts:
        lines += [title, table(result[name])] if name in result else []
    return "\n\n".join([*lines, machine(result["environment"])])


def startup(result: Mapping[str, Any]) -> str:
    """Section about imports and help."""
    rows = [{name: row[name] for name in ("what", "seconds", "bar", "met")} for row in result["rows"]]
    title, what = "## What one waits for at the start", "`benchmarks/startup.py`: seconds in fresh processes, in turns."
    return "\n\n".join([title, what, table(rows), machine(result["environment"])])


def with_machine(section: Callable[[Mapping[str, Any], Callable[[Any], str]], list[str]]) -> Callable[[Any], str]:
    """A section of several paragraphs, with the machine it was measured on."""
    return lambda result: "\n\n".join([*section(result, table), machine(result["environment"])])


ELM_AND_ROUTING = {
    "elm-growth": render_elm.elm_growth, "elm-fusion": render_elm.elm_fusion,
    "elm-distillation": render_elm.elm_distillation, "elm": render_elm.elm, "routing": render_routing.routing,
    "routing-stories260K": render_routing.routing_quality, "routing-minilm": render_routing.routing_quality,
}  # fmt: skip
MINILM = {
    "minilm-general": "all-MiniLM-L6-v2, general English",
    "minilm-docs": "all-MiniLM-L6-v2, `make demo` (Python's documentation)",
    "minilm-fast": "all-MiniLM-L6-v2, recipe `fast`: no training",
    "minilm-balanced": "all-MiniLM-L6-v2, recipe `balanced`",
    "minilm-balanced-equal": "all-MiniLM-L6-v2, recipe `balanced` in the time that `best` took",
}
ELSEWHERE = {"crossovers", "workers", "faults", "fuzz"}  # on other pages: when-not.md, scale.md, reliability.md
def against(result: Mapping[str, Any]) -> str:
    """Section about everything against its alternatives; each part has its own machine."""
    return "\n\n".join(render_run.run(result, table))


FIRST = "run"
SECTIONS: dict[str, Callable[[Any], str]] = {
    FIRST: against, "minilm-recover": minilm_recover, "stories-fast": stories_fast,
    "stories260K": stories, "babyllama105": stories, "exact-front": exact_front,
    "refit-memory": refit_memory, "predicted-speedup": predicted_speedup,
    "predicted-speedup-busy": predicted_speedup_busy, "backbone": backbone,
    "adapters-banking77": adapters, "adapters-sst2": adapters, "stories-adapters": stories_adapters,
    "elastic-lora": elastic_lora, "sparse-peft": sparse_peft, "sqft-banking77": sqft, "sqft-sst2": sqft,
    "stories-sqft": stories_sqft, "ranking": ranking, "flexibert": flexibert, "zerolm": zerolm,
    **{name: with_machine(section) for name, section in ELM_AND_ROUTING.items()}, "gpu": with_machine(render_gpu.gpu),
    "startup": startup, "runtimes": with_machine(render_runtimes.runtimes),
}  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """The page about the results that are there, by the names of their files.

    Raises:
        SystemExit: there is a result that no section is about.
    """
    if unknown := sorted(set(found) - set(MINILM) - set(SECTIONS) - ELSEWHERE):
        raise SystemExit(f"no section of the page is about {', '.join(unknown)}; name it in SECTIONS")
    sections = [INTRODUCTION.strip()]
    sections += [SECTIONS[FIRST](found[FIRST])] if FIRST in found else []
    sections += [minilm(title, found[name]) for name, title in MINILM.items() if name in found]
    sections += [section(found[name]) for name, section in SECTIONS.items() if name in found and name != FIRST]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Writes the page from what is there."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE} from {len(found)} results")


if __name__ == "__main__":
    main()
