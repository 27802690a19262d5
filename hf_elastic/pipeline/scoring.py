"""``hf-elastic score``: how well scores rank the architectures of a benchmark, or the scores of one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_elastic.errors import DataError
from hf_elastic.files import given_path, write_json
from hf_elastic.pipeline.progress import progress_bar
from hf_elastic.proxies import (
    BASELINES,
    SHAPE_BASELINES,
    BenchmarkRows,
    Correlation,
    Setting,
    ShapeBatch,
    checkpoint_table,
    correlation,
    fitted_alpha,
    label_free_alpha,
    read_benchmark,
    score,
)
from hf_elastic.proxies.ranking import checked_scores
from hf_elastic.proxies.shapes import Floats
from hf_elastic.proxies.stored import skeleton
from hf_elastic.proxies.zerolm_table import DEFAULT_ALPHA
from hf_elastic.report import aligned

Tell = Callable[[int, int], None]
_FEWEST = 3
_MICRO = 1e6
_REPEATS = 5
_STORED = " (file)"


@dataclass(frozen=True)
class RankingOptions:
    """How a benchmark is read and scores are compared on it.

    Attributes:
        setting: of FlexiBERT, see :func:`~hf_elastic.proxies.read_flexibert`; ``None``: as specified.
        truth: what counts as the truth; a CSV has no default.
        smaller_is_better: of the truth in a CSV.
        labelled: architectures whose truth Algorithm 1 fits alpha to, in each draw.
        draws: how often they are drawn, without replacement, from all rows.
        seed: of these draws and of the bootstrap samples.
        resamples: bootstrap samples of the intervals; 0 for none.

    Raises:
        DataError: a number is too small.
    """

    setting: Setting | None = None
    truth: str | None = None
    smaller_is_better: bool = False
    labelled: int = 30
    draws: int = 20
    seed: int = 0
    resamples: int = 400

    def __post_init__(self) -> None:
        for name, least in (("labelled", _FEWEST), ("draws", 1), ("seed", 0), ("resamples", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)} is too small, at least {least}")


@dataclass(frozen=True)
class RankedProxy:
    """How well one score ranks a benchmark.

    Attributes:
        proxy: its name; of a number of the benchmark's own rows, its name there.
        spearman, kendall: coefficients, or means over draws; ``None`` of a score that is the same for all.
        spearman_interval, kendall_interval: 95 % bootstrap intervals, of a score that is not drawn.
        spearman_sd, kendall_sd: standard deviations over draws, of a score that is.
        alpha: ZeroLM's weight of attention, or its mean over draws.
        alpha_sd: standard deviation over draws.
        microseconds: to compute it, per architecture; ``None`` of what the file holds.
    """

    proxy: str
    spearman: float | None
    kendall: float | None
    spearman_interval: tuple[float, float] | None = None
    kendall_interval: tuple[float, float] | None = None
    spearman_sd: float | None = None
    kendall_sd: float | None = None
    alpha: float | None = None
    alpha_sd: float | None = None
    microseconds: float | None = None

    def cells(self) -> list[str]:
        """The row of a table."""
        name = self.proxy if self.alpha is None else f"{self.proxy}, alpha {_spread(self.alpha, self.alpha_sd)}"
        coefficients = (
            (self.spearman, self.spearman_interval, self.spearman_sd),
            (self.kendall, self.kendall_interval, self.kendall_sd),
        )
        seconds = "-" if self.microseconds is None else f"{self.microseconds:.3f}"
        return [name, *(_coefficient(*found) for found in coefficients), seconds]


def _coefficient(value: float | None, interval: tuple[float, float] | None, sd: float | None) -> str:
    if value is None:
        return "ties only"
    return _spread(value, sd) if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _spread(value: float, sd: float | None) -> str:
    return f"{value:.3f}" if sd is None else f"{value:.3f} +- {sd:.3f}"


@dataclass(frozen=True)
class Ranking:
    """What :func:`rank_benchmark` found; as text one table with its legend."""

    benchmark: BenchmarkRows
    options: RankingOptions
    rows: tuple[RankedProxy, ...]

    def __str__(self) -> str:
        benchmark, options = self.benchmark, self.options
        without = f", {benchmark.left_out} more without it left out" if benchmark.left_out else ""
        lines = [f"{benchmark.name}: {len(benchmark.truth)} architectures, truth {benchmark.truth_name}{without}"]
        interval = " [95 %]" if options.resamples else ""
        header = ["proxy", f"Spearman{interval}", f"Kendall{interval}", "us/architecture"]
        lines.append(aligned([header, *(row.cells() for row in self.rows)]))
        if options.resamples:
            lines.append(f"[95 %]: interval over {options.resamples} bootstrap samples of the architectures")
        if benchmark.shapes is not None:
            lines.append("label-free: alpha by Algorithm 2 of ZeroLM, from both parts and params of all rows")
        if benchmark.shapes is not None and options.labelled > len(benchmark.truth):
            lines.append(f"fitted: left out, {len(benchmark.truth)} rows are fewer than --labelled {options.labelled}")
        if any(row.alpha_sd is not None for row in self.rows):
            lines += [
                f"fitted: alpha by Algorithm 1 on {options.labelled} labelled rows, mean +- sd of {options.draws} "
                "draws; measured on all rows, the labelled ones among them, as in the paper",
            ]
        if any(row.proxy.endswith(_STORED) for row in self.rows):
            lines.append("(file): as the file has it, whatever the setting")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        benchmark = self.benchmark
        return {
            "benchmark": benchmark.name,
            "architectures": len(benchmark.truth),
            "truth": benchmark.truth_name,
            "left_out": benchmark.left_out,
            "options": asdict(self.options),
            "rows": [asdict(row) for row in self.rows],
        }


def rank_benchmark(
    benchmark: BenchmarkRows, options: RankingOptions = RankingOptions(), *, tell: Tell = lambda done, total: None
) -> Ranking:
    """Ranks the architectures of a benchmark by sizes, by ZeroLM in closed form, and by what its file holds.

    Sizes and ZeroLM need the shapes of the architectures, which a CSV has not.

    Args:
        benchmark: from :func:`~hf_elastic.proxies.read_benchmark`.
        options: how.
        tell: is called with the scores done and to be done.

    Raises:
        DataError: the truth is the same for all or of fewer than three architectures, or there is nothing to rank.
            (Where there are fewer rows than are to be labelled, the fitted alpha is left out, and said so.)
    """
    checked_scores(benchmark.truth, name=f"{benchmark.name}: the truth {benchmark.truth_name}")
    shapes = benchmark.shapes
    works = _shape_scores(benchmark, shapes, options) if shapes is not None else []
    works += [_stored_score(benchmark, name, options) for name in benchmark.published]
    if not works:
        raise DataError(f"{benchmark.name} holds nothing to rank beside its truth {benchmark.truth_name}")
    rows = []
    for done, work in enumerate(works, 1):
        rows.append(work())
        tell(done, len(works))
    return Ranking(benchmark, options, tuple(rows))


Work = Callable[[], RankedProxy]


def _shape_scores(benchmark: BenchmarkRows, shapes: ShapeBatch, options: RankingOptions) -> list[Work]:
    """What is to be computed from shapes, one function a row of the table."""

    def ranked(name: str, compute: Callable[[], Floats], alpha: Callable[[], float] | None = None) -> Work:
        return lambda: RankedProxy(
            name, alpha=alpha() if alpha else None, **_agreement(compute(), benchmark.truth, options),
            microseconds=_microseconds(compute, len(shapes)),
        )  # fmt: skip

    def label_free() -> float:
        return label_free_alpha(*shapes.zerolm_parts(), shapes.parameters)

    works = [ranked(name, lambda size=size: size(shapes)) for name, size in SHAPE_BASELINES.items()]  # type: ignore[misc]
    causal = benchmark.causal
    if causal is not None:
        works.append(ranked("capacity", lambda: shapes.capacity(causal=causal)))
    return [
        *works,
        ranked("zerolm, attention only", lambda: shapes.zerolm_parts()[0]),
        ranked("zerolm, ffn only", lambda: shapes.zerolm_parts()[1]),
        ranked("zerolm", shapes.zerolm, lambda: DEFAULT_ALPHA),
        ranked("zerolm, label-free", lambda: shapes.zerolm(label_free()), label_free),
        *([lambda: _fitted(benchmark, shapes, options)] if options.labelled <= len(shapes) else []),
    ]


def _stored_score(benchmark: BenchmarkRows, name: str, options: RankingOptions) -> Work:
    values = benchmark.published[name]
    return lambda: RankedProxy(f"{name}{_STORED}", **_agreement(values, benchmark.truth, options))


def _agreement(values: Floats, truth: Floats, options: RankingOptions) -> dict[str, Any]:
    if np.ptp(values) == 0:
        return {"spearman": None, "kendall": None}
    found = correlation(values, truth, resamples=options.resamples, seed=options.seed)
    return {
        "spearman": found.spearman, "spearman_interval": found.spearman_interval,
        "kendall": found.kendall, "kendall_interval": found.kendall_interval,
    }  # fmt: skip


def _fitted(benchmark: BenchmarkRows, shapes: ShapeBatch, options: RankingOptions) -> RankedProxy:
    """ZeroLM with alpha of Algorithm 1, over draws of labelled rows.

    The paper's listing draws with replacement; nobody labels one architecture twice, so rows are drawn without.
    """
    count = len(benchmark.truth)
    parts = shapes.zerolm_parts()
    alphas: list[float] = []
    found: list[Correlation] = []
    started = time.perf_counter()
    for draw in range(options.draws):
        rows = np.random.default_rng([options.seed, draw]).choice(count, size=options.labelled, replace=False)
        drawn = (parts[0][rows], parts[1][rows], benchmark.truth[rows])
        tied = np.ptp(drawn[2]) == 0 or np.ptp(drawn[0]) == np.ptp(drawn[1]) == 0
        alphas.append(DEFAULT_ALPHA if tied else fitted_alpha(*drawn))  # rows alike say nothing
    seconds = (time.perf_counter() - started) / options.draws
    for alpha in alphas:
        scores = alpha * parts[0] + (1 - alpha) * parts[1]
        if np.ptp(scores) == 0:
            return RankedProxy("zerolm, fitted", None, None, **_means(alpha=alphas))
        found.append(correlation(scores, benchmark.truth, resamples=0))
    spread = _means(spearman=[one.spearman for one in found], kendall=[one.kendall for one in found], alpha=alphas)
    microseconds = seconds * _MICRO / count + _microseconds(shapes.zerolm, count)
    return RankedProxy("zerolm, fitted", **spread, microseconds=microseconds)


def _means(**columns: Sequence[float]) -> dict[str, Any]:
    """Means, and standard deviations by the names with ``_sd``."""
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return means | {
        f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for name, values in columns.items()
    }


def _microseconds(compute: Callable[[], object], count: int) -> float:
    """Per architecture, the best of a few."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return min(times) * _MICRO / count


# -- one checkpoint ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointScores:
    """What :func:`score_checkpoint` found.

    Attributes:
        source: folder or name.
        attention, ffn: the parts of ZeroLM's score, over all layers.
        zerolm: both, weighted alike.
        seconds: to stream the weights and add them up.
        baselines: sizes of the body of the model, without a head.
    """

    source: str
    attention: float
    ffn: float
    zerolm: float
    seconds: float
    baselines: Mapping[str, float]

    def __str__(self) -> str:
        scores = {"zerolm, attention only": self.attention, "zerolm, ffn only": self.ffn}
        scores[f"zerolm, alpha {DEFAULT_ALPHA}"] = self.zerolm
        lines = [["score", "value"], *([name, f"{value:.6g}"] for name, value in scores.items())]
        lines += [[name, f"{value:,.0f}"] for name, value in self.baselines.items()]
        return "\n".join(
            [f"{self.source}: weights streamed in {self.seconds:.2f} s, sizes without a head", aligned(lines)]
        )

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


def score_checkpoint(source: str | Path) -> CheckpointScores:
    """Scores a whole checkpoint without loading it.

    Args:
        source: a local folder, or a name whose files are in the Hub cache.

    Raises:
        CheckpointError: there is no such checkpoint, or a file of it is missing or damaged.
        UnsupportedModelError: there is no row of its family, or its weights are packed integers.
        DataError: a weight is not finite.
    """
    started = time.perf_counter()
    table = checkpoint_table(source)
    attention, ffn = table.parts()
    seconds = time.perf_counter() - started
    body = skeleton(source)
    sizes = {name: score(body, name) for name in BASELINES}
    return CheckpointScores(str(source), attention, ffn, table.score(), seconds, sizes)


def score_source(
    source: str, options: RankingOptions = RankingOptions(), *, json_file: str | None = None
) -> Ranking | CheckpointScores:
    """Ranks a benchmark file, or scores a checkpoint.

    Args:
        source: a file; or the folder of a checkpoint, or its name in the Hub cache.
        options: of a ranking.
        json_file: where all numbers are written to.

    Raises:
        ElasticError: as :func:`rank_benchmark`, :func:`~hf_elastic.proxies.read_benchmark`, :func:`score_checkpoint`;
            an option is of benchmarks only, or the file cannot be written.
    """
    found: Ranking | CheckpointScores
    given_path(source, error=DataError)
    if Path(source).is_file() or Path(source).suffix in (".jsonl", ".json", ".csv"):
        given = {"setting": options.setting, "truth": options.truth, "smaller_is_better": options.smaller_is_better}
        benchmark = read_benchmark(source, **given)  # type: ignore[arg-type]
        with progress_bar("scores") as tell:
            found = rank_benchmark(benchmark, options, tell=tell)
    elif not Path(source).exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise DataError(f"there is no file or folder {source}")
    elif options != RankingOptions():
        raise DataError(f"{source} is no benchmark file, and only those have options beside --json")
    else:
        found = score_checkpoint(source)
    if json_file is not None:
        write_json(Path(json_file), found.record())
    return found
