"""A family: several nested checkpoints out of one finished run, each solved inside the one before it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_elastic import costs, objectives
from hf_elastic.checkpoint import ExportReport, export
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import RESULT_FILE
from hf_elastic.errors import CheckpointError, InfeasibleError, SpaceError
from hf_elastic.files import only_worker, read_json, write_json
from hf_elastic.pipeline.comparison import Candidate, cast_parameters_, load_exported, recorded, table_row, written_form
from hf_elastic.pipeline.fast import Trial, distance_of, least
from hf_elastic.pipeline.goal import Goal, goal_of, judged, latencies_for
from hf_elastic.pipeline.kept import LATENCY_FILE, QUALITY_FILE, SORTED, TRAINED, FinishedRun, named_folder, require_run
from hf_elastic.repair.refitting import refitted
from hf_elastic.report import comparison_table, legend
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.budgets import LATENCY, MARGIN, Budgets
from hf_elastic.tables.latencies import LatencyTable
from hf_elastic.tables.quality import QualityTable
from hf_elastic.tables.timing import Phase, Setting, measure_models, typical

Say = Callable[[str], None]

EXPORTS = "family exports"
"""Stage of a run's record that holds every size of every family by the folder that it was written to."""
_PARENT = "parent"
_STARTS: Mapping[str, str] = {SORTED: "repaired", TRAINED: "trained"}
_CUT = "cut"
_SHARED = ("space", "teacher", "tables", "plan", "train")  # stages of a run that all sizes have behind them
_SECONDS = 5.0  # of timing, for each model


@dataclass(frozen=True)
class FamilySize:
    """One size of a family.

    Attributes:
        name: of its folder, such as ``1.7x``.
        architecture: the subnet.
        report: how it was exported.
        start: whose weights it has: ``repaired`` (the parent's, solved in closed form), ``cut`` (the parent's, where
            the repair ended farther away) or ``trained`` (the supernet's).
        lines: whether it is as fast as asked for, and as predicted.
    """

    name: str
    architecture: Architecture
    report: ExportReport
    start: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FamilyResult:
    """What a family is made of.

    Attributes:
        sizes: the largest first.
        rows: the table, one dict a model, the parent first.
        table: the same as text.
        setting: in which all of them were timed.
    """

    sizes: tuple[FamilySize, ...]
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    table: str = field(repr=False)
    setting: str


def export_family(
    run: str | Path,
    speedups: Sequence[str | float],
    *,
    output: str | Path | None = None,
    phase: Phase | None = None,
    say: Say = print,
) -> FamilyResult:
    """Exports several sizes of a finished run, nested in one another, and one table of them all.

    Each size is the architecture of least predicted damage that keeps its speed-up by the latency table and can be cut
    from the next larger one. Shapes are nested, and each has weights of its own: the parent's, repaired in closed form;
    of a run of recipe ``best``, the trained supernet's where these measure better. Interrupted, the same call goes on;
    sizes that are finished are not made again, also by a call that asks for smaller ones besides.

    Args:
        run: its folder, ``<output>.run``.
        speedups: such as ``[1.3, 1.7]`` or ``["1.3@16x128", "1.7@16x128"]`` (sequences x tokens; else 1x128), all of
            one workload.
        output: the sizes go to ``<output>/1.3x`` and so on; by default ``<output of the run>.family``.
        phase: what they are faster in; by default what the run was told.
        say: where progress lines go.

    Raises:
        SpaceError: a speed-up is malformed, at most 1, or there twice; or they are of different workloads.
        CheckpointError: the run is none, is not finished, or its text changed; or the output holds something else.
        InfeasibleError: a speed-up cannot be reached; the message says what can.
    """
    asked = parse_speedups(speedups)
    folder = named_folder(run)
    require_run(folder)
    with only_worker(folder):
        return _exported(folder, asked, output=output, phase=phase, say=say)


def _exported(
    folder: Path, asked: Mapping[str, Budgets], *, output: str | Path | None, phase: Phase | None, say: Say
) -> FamilyResult:
    finished = FinishedRun(folder)
    if finished.options.form == "stock-padded":
        raise SpaceError(
            f"{folder} is a run of loadability='stock-padded', whose models are never faster; compress with 'stock' "
            "or 'any'"
        )
    asked = {name: replace(budgets, phase=phase or finished.options.phase) for name, budgets in asked.items()}
    target = folder.with_name(folder.name.removesuffix(".run") + ".family") if output is None else named_folder(output)
    return _Family(finished, asked, output=target, say=say).run()


def parse_speedups(speedups: Sequence[str | float]) -> dict[str, Budgets]:
    """Reads speed-ups as budgets by the names of their sizes, the largest model first.

    Raises:
        SpaceError: there is none, one is malformed or at most 1, or two are equal.
    """
    if isinstance(speedups, str | int | float) or not speedups:
        raise SpaceError(f"speedups={speedups!r} must be a list of one or more speed-ups, such as [1.3, 1.7, 2.5]")
    found: dict[str, Budgets] = {}
    for text in speedups:
        budgets = Budgets.parse(speedup=str(text))
        name = f"{budgets.speedup:g}x"
        if name in found:
            raise SpaceError(f"speed-up {name} is asked for twice; name each size once")
        found[name] = budgets
    return dict(sorted(found.items(), key=lambda pair: pair[1].speedup or 0.0))


def nested_architectures(
    supernet: Supernet, quality: QualityTable, goals: Mapping[str, Goal]
) -> dict[str, Architecture]:
    """Solves sizes one inside the other.

    Args:
        supernet: the space.
        quality: damages by layer.
        goals: one speed-up each, the largest model first.

    Returns:
        By name the architecture of least predicted damage within the goal that can be cut from the one before it.

    Raises:
        InfeasibleError: a size cannot be had inside the one before it; the message says how fast that can be.
    """
    damage = objectives.damage(supernet, quality)
    found: dict[str, Architecture] = {}
    inside, outer = tuple(part.full for part in supernet.layer_parts), "the parent"
    for name, goal in goals.items():
        try:
            found[name] = least(supernet, damage, known=goal.known, within=goal.within, inside=inside)
        except InfeasibleError:
            fastest = least(supernet, goal.known[LATENCY], known=goal.known, within={}, inside=inside)
            assert goal.table is not None
            reached = goal.table.speedup(supernet, fastest)
            raise InfeasibleError(
                f"a speed-up of {name} cannot be reached (aiming {MARGIN:.0%} faster): with a layer left, cut from "
                f"{outer}, the space goes up to {reached:.3g} times; ask for less, or widen the space"
            ) from None
        inside, outer = supernet.layer_shapes(found[name]), name
    return found


class _Family:
    """A family to be made, or to go on with."""

    def __init__(self, run: FinishedRun, asked: Mapping[str, Budgets], *, output: Path, say: Say) -> None:
        self.finished, self.asked, self.output, self.say = run, asked, output, say
        self.record, self.paths = run.record, {name: output / name for name in asked}
        self._check_output()
        self.parent = run.supernet(SORTED)
        workload = self._workload()
        self.stage = f"family {' '.join(asked)} ({self.phase} of {workload})"
        self.file = f"latency-{self.phase}-{workload}.json"

    @property
    def phase(self) -> Phase:
        """Of all speed-ups alike."""
        return next(iter(self.asked.values())).phase

    def _workload(self) -> str:
        """What all sizes are for, as text."""
        new = int(self.phase == "decode")
        texts = {name: str(budgets.timed.fitted(self.parent, new=new)) for name, budgets in self.asked.items()}
        if len(set(texts.values())) > 1:
            listed = ", ".join(f"{name} is for {text}" for name, text in texts.items())
            raise SpaceError(f"{listed}; one family is of one workload, so write the same @BATCHxTOKENS behind each")
        return next(iter(texts.values()))

    def _check_output(self) -> None:
        """Refuses a folder that cannot be written or holds what is no size of a family of this run."""
        there = next(folder for folder in (self.output, *self.output.absolute().parents) if folder.exists())
        try:
            with tempfile.TemporaryDirectory(prefix=".hf-elastic.", dir=there):
                pass
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.output}: {error.strerror or error}") from error
        for child in sorted(self.output.iterdir()) if self.output.is_dir() else ():
            ours = child.name.startswith(".") or self._entry(child) or (child.is_dir() and not any(child.iterdir()))
            if not ours:
                raise CheckpointError(
                    f"{self.output} holds {child.name}, which no family of {self.finished.folder} made; "
                    "choose another output"
                )

    def _entry(self, path: Path) -> dict[str, Any]:
        """What is recorded of the size in a folder; nothing where something else is there by now."""
        entry = dict(self.record.numbers(EXPORTS).get(str(path.resolve()), {}))
        there = (path / ARCHITECTURE_FILE).is_file() and read_json(path / ARCHITECTURE_FILE)
        return entry if there and there.get("digest") == entry.get("digest") else {}

    def run(self) -> FamilyResult:
        """Makes what is not finished and tells all of it."""
        plan = self._plan()
        if not self.record.finished(self.stage) or not all(self._written(name, plan[name]) for name in plan):
            with self.record.stage(self.stage):
                made = [self._make(name, architecture) for name, architecture in plan.items()]
                if any(made) or "rows" not in self.record.numbers(self.stage):
                    self._compare(plan)
        return self._told(plan)

    def _plan(self) -> dict[str, Architecture]:
        """The architectures, solved once and then recorded."""
        kept = self.record.numbers(self.stage).get("plan")
        if kept:
            plan = {name: self.parent.space.canonical(point) for name, point in kept.items()}
        else:
            quality = QualityTable.load(self.finished.folder / QUALITY_FILE)
            plan = nested_architectures(self.parent, quality, self.goals)
        for name, path in self.paths.items():
            if (entry := self._entry(path)) and entry["digest"] != plan[name].digest:
                raise CheckpointError(
                    f"{path} is of another family of {self.finished.folder}, which other sizes lie around; choose "
                    "another output"
                )
        self.record.note(self.stage, plan={name: dict(point) for name, point in plan.items()})
        return plan

    @cached_property
    def goals(self) -> dict[str, Goal]:
        """What each size is to reach, by one latency table."""
        table, dtype = self._latency_table(), self.finished.dtype
        return {name: goal_of(self.parent, asked, dtype=dtype, table=table) for name, asked in self.asked.items()}

    def _latency_table(self) -> LatencyTable:
        """The run's latencies, or those of this workload, which are measured and kept beside them."""
        asked, dtype = next(iter(self.asked.values())), self.finished.dtype
        timed = asked.timed
        wanted = Setting.of(
            self.parent, batch_size=timed.batch_size, length=timed.length, phase=self.phase, dtype=dtype
        )
        path = self.finished.folder / LATENCY_FILE
        if not path.is_file() or LatencyTable.load(path).setting != wanted:
            path = path.with_name(self.file)
        return latencies_for(self.parent, asked, dtype=dtype, path=path, say=self.say)

    def _written(self, name: str, architecture: Architecture) -> bool:
        entry = self._entry(self.paths[name])
        return bool(entry.get("written")) and entry["digest"] == architecture.digest

    def _make(self, name: str, architecture: Architecture) -> bool:
        """Repairs, measures and writes one size, unless an earlier call has; says whether it did."""
        if self._written(name, architecture):
            return False
        path = self.paths[name]
        # Noted before it is written: a call that is killed in between leaves a folder that is known to be ours.
        self.record.note(EXPORTS, **{str(path.resolve()): {"digest": architecture.digest, "written": False}})
        with refitted(self.parent, architecture, self.finished.data.calibration) as repair:
            tried = self._tried(architecture)
            start = min(tried, key=lambda place: tried[place].distance)
            label = _CUT if start == SORTED and not repair.repaired else _STARTS[start]
            supernet = self._supernets[start]
            form = written_form(supernet, architecture, allowed=self.finished.options.form)
            row = table_row(Candidate(name, supernet, architecture), tried[start].values, loadability=form)
            report = export(
                self._cast(supernet), architecture, path, loadability=form, source=self.finished.options.model,
                overwrite=path.is_dir(),
            )  # fmt: skip
        entry = {
            "digest": architecture.digest,
            "written": True,
            "start": label,
            "row": row,
            "error_cut": repair.error_cut,
            "error": repair.error,
            "tried": {_STARTS[place]: recorded(trial.values) for place, trial in tried.items()},
            "report": {**asdict(report), "directory": str(path), "files": list(report.files)},
        }
        self.record.note(EXPORTS, **{str(path.resolve()): entry})
        self.say(f"{name}: {label}, at {row['macs'] / self._macs:.0%} of the MACs, written to {path}")
        return True

    @cached_property
    def _macs(self) -> int:
        return costs.macs(self.parent, self.parent.space.largest(), seq_len=costs.LATENCY_TOKENS)

    @cached_property
    def _supernets(self) -> dict[str, Supernet]:
        """Where weights may come from."""
        trained = {TRAINED: self.finished.supernet(TRAINED)} if self.finished.options.recipe == "best" else {}
        return {SORTED: self.parent, **trained}

    def _tried(self, architecture: Architecture) -> dict[str, Trial]:
        """What a size is like with each of the weights that it may have."""
        found = {}
        for place, supernet in self._supernets.items():
            measures = self.finished.measures(supernet)
            values = objectives.evaluated(measures, architecture)
            found[place] = Trial(architecture, values, distance_of(measures, values))
        return found

    def _cast(self, supernet: Supernet) -> Supernet:
        """The supernet in the dtype of the export; the other stays as it is, for the next size."""
        if supernet.model.dtype == self.finished.dtype:
            return supernet
        model = copy.deepcopy(supernet.model)
        cast_parameters_(model, self.finished.dtype)
        return Supernet(model)

    def _compare(self, plan: Mapping[str, Architecture]) -> None:
        """Times all exported checkpoints beside the parent, and holds each against its speed-up."""
        goals = self.goals
        setting = next(iter(goals.values())).setting
        models = {
            name: load_exported(self.finished.task, self.finished.options, folder=path, dtype=self.finished.dtype)
            for name, path in {_PARENT: None, **self.paths}.items()
        }
        timed = measure_models(models, setting, seconds=_SECONDS * len(models))
        largest = self.parent.space.largest()
        whole = Candidate(_PARENT, self.parent, largest)
        form = written_form(self.parent, largest, allowed=self.finished.options.form)
        values = objectives.evaluated(self.finished.measures(self.parent), largest)
        rows = [{**table_row(whole, values, loadability=form), "latency": typical(timed[_PARENT].samples)}]
        outcomes = {}
        for name, point in plan.items():
            entry = self._entry(self.paths[name])
            label = f"{name}, {entry['start']}"
            rows.append({**entry["row"], "name": label, "latency": typical(timed[name].samples)})
            outcome = judged(
                goals[name], self.parent, point, exported=models[name], times=timed[name], of=timed[_PARENT]
            )
            outcomes[name] = {**outcome.to_dict(), "lines": outcome.lines()}
        self.record.note(self.stage, rows=rows, setting=str(setting), outcomes=outcomes)

    def _result(self, name: str) -> dict[str, Any]:
        """What lies in a size's folder as ``result.json``: the record of the run, with the size's own numbers."""
        numbers, entry, data = self.record.numbers(self.stage), self._entry(self.paths[name]), self.record.data
        row = 1 + list(self.asked).index(name)  # behind the parent's
        own = {
            "compare": {"rows": [numbers["rows"][0], numbers["rows"][row]], "setting": numbers["setting"]},
            "export": {**entry["report"], "finished": True},
            "check": numbers["outcomes"][name],
        }
        shared = {stage: found for stage, found in data["stages"].items() if stage in _SHARED}
        budgets: dict[str, Any] = {"speedup": f"{self.asked[name].speedup:g}@{self._workload()}", "phase": self.phase}
        budgets |= {"latency": None, "memory": None, "within": {}}
        return {**data, "options": {**data["options"], **budgets}, "stages": {**shared, **own}}

    def _told(self, plan: Mapping[str, Architecture]) -> FamilyResult:
        numbers = self.record.numbers(self.stage)
        for name, path in self.paths.items():
            file, found = path / RESULT_FILE, self._result(name)
            if not file.is_file() or read_json(file) != found:
                write_json(file, found)
        sizes = []
        for name, point in plan.items():
            entry = self._entry(self.paths[name])
            report = ExportReport(**{**entry["report"], "directory": self.paths[name]})
            report = replace(report, files=tuple(report.files))
            sizes.append(FamilySize(name, point, report, entry["start"], tuple(numbers["outcomes"][name]["lines"])))
        table = comparison_table(numbers["rows"], quality=self.finished.task.quality, seq_len=costs.LATENCY_TOKENS)
        self.say(f"{table}\n{legend(self.finished.task.quality, numbers['setting'])}")
        self.say("\n".join(f"{size.name}: {line}" for size in sizes for line in size.lines))
        for size in sizes:
            self.say(str(size.report))
        return FamilyResult(tuple(sizes), tuple(numbers["rows"]), table, numbers["setting"])
