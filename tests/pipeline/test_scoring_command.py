"""``hf-elastic score``: its table and its numbers against SciPy and against the scores of loaded models; bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, Ended
from scipy.stats import kendalltau, spearmanr
from tiny_benchmarks import flexibert_layer, flexibert_row, flexibert_rows, lts_row, write_lines
from transformers import AutoModel

from hf_elastic.pipeline.scoring import RankingOptions, rank_benchmark, score_checkpoint
from hf_elastic.proxies import fitted_alpha, label_free_alpha, read_benchmark, roles_of, score, zerolm_parts
from hf_elastic.proxies.subject import Subject

BASELINES = ["params", "decoder_params", "depth", "width_depth"]
ZEROLM = ["zerolm, attention only", "zerolm, ffn only", "zerolm", "zerolm, label-free", "zerolm, fitted"]


@pytest.fixture
def score_command(command: Command) -> Command:
    """Runs ``hf-elastic score`` with arguments in this process."""
    return lambda *arguments: command("score", *arguments)


@pytest.fixture(scope="module")
def flexibert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("benchmark") / "flexibert.jsonl", flexibert_rows(60))


def columns(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell]


def test_a_benchmark_prints_one_table_and_writes_its_numbers(
    score_command: Command, flexibert: Path, tmp_path: Path
) -> None:
    ended = score_command(flexibert, "--resamples", "20", "--draws", "3", "--json", tmp_path / "score.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "FlexiBERT as specified: 60 architectures, truth glue"
    assert [cell.strip() for cell in columns(lines[1])] == [
        "proxy", "Spearman [95 %]", "Kendall [95 %]", "us/architecture",
    ]  # fmt: skip
    names = [columns(line)[0] for line in lines[3:16]]
    assert names[:8] == [*BASELINES, "capacity", *ZEROLM[:2], "zerolm, alpha 0.500"]
    assert names[8].startswith("zerolm, label-free, alpha ") and names[9].startswith("zerolm, fitted, alpha ")
    assert "+-" in names[9]
    assert names[10:] == ["Head Confidence (file)", "Constant (file)", "train_seconds (file)"]
    assert "ties only" in lines[3 + 11] and lines[3 + 11].endswith("-")
    assert "interval over 20 bootstrap samples" in ended.out and "Algorithm 1 on 30 labelled rows" in ended.out
    assert "the labelled ones among them, as in the paper" in ended.out
    record = json.loads((tmp_path / "score.json").read_text())
    assert record["benchmark"] == "FlexiBERT as specified" and record["architectures"] == 60
    assert [row["proxy"] for row in record["rows"]][:10] == [*BASELINES, "capacity", *ZEROLM]
    assert record["options"]["labelled"] == 30 and record["options"]["truth"] is None


def ranked(file: Path, **options: Any) -> dict[str, Any]:
    found = rank_benchmark(read_benchmark(file, setting=options.get("setting")), RankingOptions(**options))
    return {row.proxy: row for row in found.rows}


def test_rows_are_the_correlations_of_scipy(flexibert: Path) -> None:
    benchmark = read_benchmark(flexibert)
    shapes = benchmark.shapes
    assert shapes is not None
    attention, ffn = shapes.zerolm_parts()
    label_free = label_free_alpha(attention, ffn, shapes.parameters)
    wanted = {
        "params": shapes.parameters, "decoder_params": shapes.decoder_parameters, "depth": shapes.depth,
        "width_depth": shapes.depth * shapes.width, "zerolm, attention only": attention, "zerolm, ffn only": ffn,
        "zerolm": attention + ffn, "zerolm, label-free": label_free * attention + (1 - label_free) * ffn,
        "Head Confidence (file)": benchmark.published["Head Confidence"],
    }  # fmt: skip
    found = ranked(flexibert, resamples=30, draws=2)
    for name, scores in wanted.items():
        row = found[name]
        assert row.spearman == pytest.approx(spearmanr(scores, benchmark.truth).statistic), name
        assert row.kendall == pytest.approx(kendalltau(scores, benchmark.truth).statistic), name
        assert row.spearman_interval[0] <= row.spearman <= row.spearman_interval[1], name
        assert row.kendall_interval[0] < row.kendall_interval[1], name
        assert (row.microseconds is None) == name.endswith("(file)")
    assert found["zerolm, label-free"].alpha == pytest.approx(label_free) and found["zerolm"].alpha == 0.5


def test_alpha_is_fitted_to_draws_of_labelled_rows_and_measured_on_all(flexibert: Path) -> None:
    benchmark = read_benchmark(flexibert)
    assert benchmark.shapes is not None
    attention, ffn = benchmark.shapes.zerolm_parts()
    alphas, taus = [], []
    for draw in range(5):
        rows = np.random.default_rng([7, draw]).choice(60, size=12, replace=False)
        alphas.append(fitted_alpha(attention[rows], ffn[rows], benchmark.truth[rows]))
        taus.append(kendalltau(alphas[-1] * attention + (1 - alphas[-1]) * ffn, benchmark.truth).statistic)
    row = ranked(flexibert, resamples=0, labelled=12, draws=5, seed=7)["zerolm, fitted"]
    assert (row.alpha, row.alpha_sd) == pytest.approx((np.mean(alphas), np.std(alphas, ddof=1)))
    assert (row.kendall, row.kendall_sd) == pytest.approx((np.mean(taus), np.std(taus, ddof=1)))
    assert row.kendall_interval is None and row.microseconds > 0
    once = ranked(flexibert, resamples=0, draws=1)["zerolm, fitted"]
    assert (once.alpha_sd, once.kendall_sd) == (0, 0)


def test_the_same_seed_gives_the_same_table(flexibert: Path) -> None:
    def numbers(**options: Any) -> list[tuple[Any, ...]]:
        return [(r.spearman, r.kendall_interval, r.alpha) for r in ranked(flexibert, resamples=10, **options).values()]

    assert numbers(draws=3, seed=1) == numbers(draws=3, seed=1) != numbers(draws=3, seed=2)


def test_settings_of_flexibert_change_sizes_and_not_what_is_stored(score_command: Command, flexibert: Path) -> None:
    outs = {
        setting: score_command(flexibert, "--setting", setting, "--resamples", "0", "--draws", "1").out.splitlines()
        for setting in ("published", "specified", "trained")
    }
    assert all(f"as {setting}" in lines[0] and "[95 %]" not in lines[1] for setting, lines in outs.items())
    params, stored = ({tuple(columns(lines[row])[1:3]) for lines in outs.values()} for row in (3, 13))
    assert len(params) == 3 and len(stored) == 1


def test_a_csv_ranks_its_columns_by_the_truth_that_is_named(score_command: Command, tmp_path: Path) -> None:
    (file := tmp_path / "mine.csv").write_text("name,ppl,size\na,30,1\nb,20,3\nc,25,2\nd,10,5\n")
    ended = score_command(file, "--truth", "ppl", "--smaller-is-better", "--resamples", "0")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "mine.csv: 4 architectures, truth -ppl"
    assert columns(lines[3])[0] == "size (file)" and lines[3].count("1.000") == 2
    assert "Algorithm" not in ended.out


def test_rows_left_out_are_told(score_command: Command, tmp_path: Path) -> None:
    rows = [lts_row(depth=2 + n % 3, width=128 + 16 * n, ppl=50.0 - n + n % 2) for n in range(8)]
    file = write_lines(tmp_path / "lts.jsonl", [*rows, lts_row(ppl=None)])
    ended = score_command(file, "--labelled", "5", "--draws", "2", "--resamples", "5")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].endswith("8 architectures, truth -ppl, 1 more without it left out")
    assert is_one_line(score_command(file, "--truth", "accuracy"), "ppl is one number, so there is no truth")


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm", "gpt2"])
def test_a_checkpoint_is_scored_as_the_model_that_it_holds(
    score_command: Command, checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = checkpoint(kind)
    model = AutoModel.from_pretrained(folder)
    ended = score_command(folder, "--json", tmp_path / "score.json")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "score.json").read_text())
    parts = zerolm_parts(Subject(model, roles_of(model)))
    assert (record["attention"], record["ffn"]) == pytest.approx(parts, rel=1e-5)
    assert record["zerolm"] == pytest.approx(score(model, "zerolm"), rel=1e-5)
    sizes = {"depth": score(model, "depth"), "width_depth": score(model, "width_depth")}
    assert {name: record["baselines"][name] for name in sizes} == sizes
    assert list(record["baselines"]) == BASELINES and 0 < record["baselines"]["decoder_params"] < 1e6
    for words in ("weights streamed in", *BASELINES, "zerolm, attention only", "zerolm, alpha 0.5"):
        assert words in ended.out


def test_the_sizes_of_a_checkpoint_are_those_of_its_body(checkpoint: Callable[[str], Path]) -> None:
    model = AutoModel.from_pretrained(checkpoint("causal-lm"))
    tables = model.get_input_embeddings().weight.numel()
    found = score_checkpoint(checkpoint("causal-lm")).baselines
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["decoder_params"] == found["params"] - tables


def alike(rows: int, **change: Any) -> list[dict[str, Any]]:
    return [flexibert_row([flexibert_layer()] * (1 + n % 3), glue=change.get("glue", float(n))) for n in range(rows)]


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (alike(8, glue=70.0), ["--labelled", "3"], "the truth glue are ties only (all 70)"),
        (alike(2), ["--labelled", "3"], "must be a list of at least 3 numbers"),
        (alike(8), ["--labelled", "2"], "--labelled 2 is too small, at least 3"),
        (alike(8), ["--draws", "0"], "--draws 0 is too small, at least 1"),
        (alike(8), ["--resamples", "-1"], "--resamples -1 is too small"),
        (alike(8), ["--seed", "-1"], "--seed -1 is too small"),
        (alike(8), ["--truth", "squad"], "scores has no field 'squad'"),
        (alike(8), ["--smaller-is-better"], "smaller_is_better does not apply"),
        ([{"text": "a", "label": 1}], [], "is no benchmark (fields: label, text)"),
    ],
)
def test_bad_benchmarks_are_one_line(
    score_command: Command, tmp_path: Path, rows: list[dict[str, Any]], arguments: list[str], words: str
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows)
    ended = score_command(file, *arguments, "--json", tmp_path / "out.json")
    assert is_one_line(ended, words)
    assert list(tmp_path.iterdir()) == [file]


def is_one_line(ended: Ended, words: str) -> bool:
    assert ended.code == 2 and ended.out == "", ended
    assert ended.err.startswith("hf-elastic: ") and ended.err.count("\n") == 1, ended.err
    assert words in ended.err, ended.err
    return True


def test_a_table_without_anything_to_rank_is_one_line(score_command: Command, tmp_path: Path) -> None:
    (file := tmp_path / "mine.csv").write_text("name,ppl\na,30\nb,20\nc,25\n")
    assert is_one_line(score_command(file, "--truth", "ppl"), "holds nothing to rank beside its truth ppl")


def test_bad_checkpoints_are_one_line(
    score_command: Command, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    assert is_one_line(score_command(tmp_path / "nothing"), "there is no file or folder")
    assert is_one_line(score_command(tmp_path / "nothing.csv"), "No such file")
    assert is_one_line(score_command("org/name"), "no checkpoint can be read from org/name")
    assert is_one_line(score_command(tmp_path), "no checkpoint can be read from")
    whole = checkpoint("masked-lm")
    assert is_one_line(score_command(whole, "--setting", "trained"), "is no benchmark file")
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:3000])
    assert is_one_line(score_command(cut), "model.safetensors is truncated or no safetensors file")
    (tmp_path / "taken").write_text("")
    assert is_one_line(score_command(whole, "--json", tmp_path / "taken" / "score.json"), "cannot write")


def test_a_score_that_is_the_same_under_a_fitted_alpha_is_told(tmp_path: Path) -> None:
    rows = [flexibert_row([flexibert_layer()] * 2, glue=float(n)) for n in range(6)]
    found = ranked(write_lines(tmp_path / "rows.jsonl", rows), labelled=4, draws=2, resamples=0)
    assert all(found[name].kendall is None for name in (*BASELINES, *ZEROLM))
    assert found["zerolm, fitted"].cells()[1:3] == ["ties only", "ties only"]


def test_with_fewer_rows_than_are_to_be_labelled_no_alpha_is_fitted(flexibert: Path) -> None:
    found = rank_benchmark(read_benchmark(flexibert), RankingOptions(labelled=61, resamples=0))
    assert "zerolm, fitted" not in {row.proxy for row in found.rows}
    assert "fitted: left out, 60 rows are fewer than --labelled 61" in str(found)
