"""The benchmark of CPU runtimes: its verdict, its calibration text and its section of the page; no number is tested."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import bert_tokenizer, sentence_encoder, sentences

pytestmark = pytest.mark.usefixtures("scripts")


def row(model: str, *, speedup: float, kept: float) -> dict[str, Any]:
    return {
        "model": model, "runtime": "openvino", "weights": "int8", "kept": kept, "spearman": 0.8 * kept, "MB": 20.0,
        "difference": 1e-6, "ms 1x128": 2.0, "speed-up 1x128": speedup, "ms 16x128": 30.0, "speed-up 16x128": speedup,
    }  # fmt: skip


def test_the_verdict_is_of_ours_that_keep_enough() -> None:
    rows = [row("parent", speedup=9.0, kept=1.0), row("a", speedup=5.0, kept=0.97), row("b", speedup=4.2, kept=0.985)]
    verdict = import_module("runtimes").verdict
    found = verdict(rows, bar=4.0, kept=0.98)
    assert found["met"] and found["best"] == "b, openvino int8" and found["speed-up"] == 4.2
    assert not verdict(rows, bar=4.3, kept=0.98)["met"]
    assert verdict(rows[:2], bar=4.0, kept=0.98) == {
        "bar": ">= 4x at >= 98% of STS-B", "met": False, "best": None, "speed-up": None, "kept": None,
    }  # fmt: skip


def test_the_section_shows_every_row_and_the_verdict() -> None:
    rows = [row("parent", speedup=1.0, kept=1.0), row("ours", speedup=4.2, kept=0.985)]
    verdict = import_module("runtimes").verdict(rows, bar=4.0, kept=0.98)
    result = {"rows": rows, "verdict": verdict, "lines": 8, "pairs": 5}
    text = "\n".join(import_module("render_runtimes").runtimes(result, import_module("render").table))
    assert "| ours | openvino | int8 | 2 | 4.20x | 30 | 4.20x |" in text and "98.5%" in text
    assert text.endswith("met, by ours, openvino int8: 4.20x at 98.5%.")


def test_calibration_lines_are_spread_over_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(40)), encoding="utf-8")
    batches = import_module("runtimes").calibration(bert_tokenizer(), [str(tmp_path / "text.txt")], count=20)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]


@pytest.mark.slow
def test_the_benchmark_runs_on_a_tiny_encoder(tmp_path: Path) -> None:
    for name in ("openvino", "nncf"):
        pytest.importorskip(name)
    parent, other = sentence_encoder(tmp_path / "parent"), sentence_encoder(tmp_path / "other", intermediate_size=32)
    (tmp_path / "text.txt").write_text("\n".join(sentences(40)), encoding="utf-8")
    (tmp_path / "glue").mkdir()
    texts = sentences(24, seed=5)
    pairs = [
        {"sentence1": a, "sentence2": b, "score": n % 5} for n, (a, b) in enumerate(zip(texts, texts[1:], strict=False))
    ]
    (tmp_path / "glue" / "stsb_dev.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    settings = import_module("runtimes").SETTINGS
    import_module("runtimes").SETTINGS = ((1, 8), (2, 8))
    try:
        import_module("runtimes").main(
            ["--data", str(tmp_path / "text.txt"), "--work", str(tmp_path / "work"), "--parent", str(parent), "--model",
             str(other), "--runtime", "openvino", "--threads", "1", "--seconds", "0.1", "--lines", "16",
             "--pairs-folder", str(tmp_path), "--json", str(tmp_path / "found.json")]
        )  # fmt: skip
    finally:
        import_module("runtimes").SETTINGS = settings
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [(r["model"], r["runtime"], r["weights"]) for r in found["rows"]] == [
        (model, *kind) for model in ("parent", "other")
        for kind in (("torch", "fp32"), ("openvino", "fp32"), ("openvino", "int8"))
    ]  # fmt: skip
    assert found["rows"][0]["kept"] == 1.0 and found["rows"][0]["speed-up 1x8"] == 1.0
    assert abs(found["rows"][1]["spearman"] - found["rows"][0]["spearman"]) < 1e-3  # floats of a runtime are torch's
