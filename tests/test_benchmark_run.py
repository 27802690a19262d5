"""The report of everything against its alternatives: its lines, its parts in small, its file and its table."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("scripts")
TINY = "--layers 2 --hidden 128 --batch 2 --length 64 --pairs 2 --repeats 2 --threads 1 --evaluations 20"


def script(name: str) -> ModuleType:
    return import_module(name)


def run(part: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    """Lines of one part in small, as its file holds them."""
    file = folder / "run.json"
    given = ["--parts", part, *TINY.split(), "--json", str(file), "--work", str(folder / "work"), *more]
    script("run").main(given)
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))[part]["lines"]
    return found


def test_a_line_has_all_columns_and_no_others() -> None:
    comparing = script("comparing")
    made = comparing.line("stock", "ours", "theirs", "seconds", ratio=1.0, low=0.9, high=1.1)
    assert tuple(made) == comparing.COLUMNS
    assert (made["ratio"], made["bar"]) == (1.0, "")
    with pytest.raises(TypeError, match="speed"):
        comparing.line("stock", "ours", "theirs", "seconds", speed=1.0)


def test_the_ratio_of_means_is_that_of_the_formula_and_its_interval_holds_the_true_one() -> None:
    comparing, rng = script("comparing"), np.random.default_rng(0)
    theirs = rng.exponential(1.0, size=400)
    ours = 0.5 * theirs * rng.uniform(0.8, 1.2, size=400)
    found = comparing.ratio_of_means(("p", "ours", "theirs", "error"), list(ours), list(theirs))
    assert found["ratio"] == pytest.approx(ours.sum() / theirs.sum())
    assert found["low"] <= 0.5 <= found["high"]
    worse = comparing.ratio_of_means(
        ("p", "ours", "theirs", "error"), list(2 * theirs), list(theirs), bar=script("measuring").Bar("at most", 1)
    )
    assert worse["met"] == "NO"


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_the_slope_is_the_power_of_a_law(power: float) -> None:
    sizes, rng = (4, 8, 16, 32), random.Random(0)
    exact = [[0.01 * size**power] * 5 for size in sizes]
    assert script("comparing").slope(sizes, exact) == pytest.approx((power, power, power))
    noisy = [[value * rng.uniform(0.9, 1.1) for value in row] for row in exact]
    found, low, high = script("comparing").slope(sizes, noisy)
    assert low <= found <= high
    assert low - 0.05 <= power <= high + 0.05


def test_results_that_differ_are_not_timed() -> None:
    same = script("against_formulas").same
    same([1.0, 2.0], [1.0, 2.0 + 1e-9], what="a formula")
    with pytest.raises(RuntimeError, match=r"a formula: ours and the formula differ by 5.00e-02"):
        same([1.0, 2.0], [1.0, 2.1][:1] + [2.0 / 0.95], what="a formula")
    with pytest.raises(RuntimeError, match="differ by nan"):
        same([float("nan")], [1.0], what="a formula")


def test_a_part_of_the_file_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    write, file = script("run").write, tmp_path / "run.json"
    write(file, "growth", {"lines": [1]})
    write(file, "stock", {"lines": [2]})
    write(file, "growth", {"lines": [3]})
    held = json.loads(file.read_text(encoding="utf-8"))
    assert held == {"stock": {"lines": [2]}, "growth": {"lines": [3]}}
    assert list(held) == ["stock", "growth"]


@pytest.mark.parametrize("part", ["cuts", "lora", "sizes"])
def test_a_part_without_its_data_says_so_in_the_table(part: str, tmp_path: Path) -> None:
    (found,) = run(part, tmp_path, "--data", str(tmp_path / "nowhere"), "--parent", str(tmp_path))
    assert found["what"] == "not run"
    assert "of the data folder: set HF_ELASTIC_DATA or --data" in found["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_part_says_so(tmp_path: Path) -> None:
    assert [line["note"] for line in run("gpu", tmp_path)] == ["needs a GPU: torch sees none"]


def test_formulas_and_ours_agree_in_small(tmp_path: Path) -> None:
    found = run("formulas", tmp_path, "--hidden", "256")
    assert len(found) == 11
    assert all(line["ratio"] > 0 and line["met"] in ("yes", "NO") for line in found)


def test_exact_search_is_never_worse(tmp_path: Path) -> None:
    damages = [line for line in run("search", tmp_path) if line["measure"] == "predicted damage"]
    assert len(damages) == 4
    assert all(line["ratio"] <= 1 and line["met"] == "yes" for line in damages)


@pytest.mark.slow
def test_elasticity_is_held_against_stock_models(tmp_path: Path) -> None:
    found = run("stock", tmp_path)
    against = {line["against"] for line in found}
    assert {"stock transformers", "peft's LoRA", "its formula with autograd"} <= against


@pytest.mark.slow
def test_slopes_are_measured(tmp_path: Path) -> None:
    found = run("growth", tmp_path, "--doublings", "1", "--evaluation-seconds", "0.05")
    assert {line["against"] for line in found} >= {"number of layers", "number of width", "number of evaluations"}
    assert all(line["note"] for line in found)


def test_the_table_marks_what_is_missed(tmp_path: Path) -> None:
    comparing, bar = script("comparing"), script("measuring").Bar("at most", 1.0)
    lines = [
        comparing.valued(("stock", "ours", "theirs", "seconds"), values, [1.0, 1.0], bar=bar)
        for values in ([0.5, 0.5], [2.0, 2.0])
    ]
    machine = script("measuring").environment()
    part = {"lines": lines, "seconds": 1.0, "machine": machine, "settings": {"pairs": 2}}
    page = script("render").page({"run": {"stock": part}})
    assert "Of 2 lines with a bar 1 meet it." in page
    assert "2.000 [2.000, 2.000]" in page
    assert "Settings of stock: pairs 2." in page
    assert page.count("| NO |") == 1
