"""One run from a checkpoint to a smaller one: each stage is recorded, and a run that was interrupted goes on."""

from __future__ import annotations

import copy
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_elastic import costs, objectives
from hf_elastic.checkpoint import export
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import RESULT_FILE, RunRecord
from hf_elastic.conversion import make_elastic
from hf_elastic.errors import CheckpointError
from hf_elastic.files import LOCK_FILE, only_worker, remove_folder, write_json
from hf_elastic.importance import sort_by_importance_
from hf_elastic.pipeline.alternatives import UNIFORM, plain_alternatives
from hf_elastic.pipeline.comparison import (
    Candidate,
    cast_parameters_,
    compare,
    load_exported,
    recorded,
    written_form,
)
from hf_elastic.pipeline.fast import (
    additivity_numbers,
    candidates,
    keep_exact_front,
    quality_table,
    ranking_streams,
    require_calibration,
    trial_numbers,
    tried,
    trust,
    untrained_seconds,
)
from hf_elastic.pipeline.goal import Goal, goal_of, outcome_of
from hf_elastic.pipeline.kept import (
    LATENCY_FILE,
    QUALITY_FILE,
    SORTED,
    TEACHER_FILE,
    TRAINED,
    RunResult,
    export_dtype,
    identity_of,
    recorded_export,
    reported_export,
)
from hf_elastic.pipeline.limits import AmongSubnets, feasible_share, near_limit
from hf_elastic.pipeline.lora_run import LoraResult, LoraRun
from hf_elastic.pipeline.nested import FamilyResult, export_family
from hf_elastic.pipeline.options import CompressOptions, default_space
from hf_elastic.pipeline.progress import progress_bar
from hf_elastic.pipeline.tasks import Task, TaskData, load_model, load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import device_of, train_phase, training_plan
from hf_elastic.repair.parent_streams import ParentStreams
from hf_elastic.repair.refitting import refitted
from hf_elastic.report import comparison_table, legend
from hf_elastic.runtimes.matrix import runs_where_space
from hf_elastic.search import Objective, search_subnets
from hf_elastic.space import Architecture
from hf_elastic.supernet import Loadability, Supernet
from hf_elastic.tables.latencies import LatencyTable
from hf_elastic.tables.quality import QualityTable
from hf_elastic.tables.timing import Phase
from hf_elastic.training import FixedSubnet

Say = Callable[[str], None]

UNIFORM_REPAIRED = "uniform width, refit"
_TRUSTED: Mapping[str, int] = {"fast": 4, "balanced": 12, "best": 12}  # random architectures that try the sums out
_PADDED = "these are costs of the subnet: the exported file is filled up with zeros, so it holds and computes more"


@dataclass(frozen=True)
class CompressResult(RunResult):
    """What a run found.

    Attributes:
        architecture: the subnet.
        report: how it was exported.
        rows: the table, one dict a model, the parent first.
        table: the same as text.
        record: contents of ``result.json``.
        folder: where the run keeps its work.
    """

    def family(
        self,
        speedups: Sequence[str | float],
        *,
        output: str | Path | None = None,
        phase: Phase | None = None,
        say: Say = print,
    ) -> FamilyResult:
        """Exports several nested sizes out of this one run; see :func:`hf_elastic.pipeline.nested.export_family`."""
        return export_family(self.folder, speedups, output=output, phase=phase, say=say)


class CompressRun:
    """A run, opened or continued.

    Args:
        options: what to do.
        say: where progress lines go.

    Raises:
        ElasticError: the options cannot be met; said before any training, and before anything is written.
    """

    goal: Goal

    def __init__(self, options: CompressOptions, *, say: Say = print) -> None:
        self.options, self.say = options, say
        self.task: Task = resolve_task(options)
        self.device = device_of(options)
        self.folder = options.run_folder
        self.dtype = export_dtype(options.model)
        self.latencies: LatencyTable | None = None
        self.tables_at: Path | None = self.folder
        self._check_output()
        rows = read_rows(options.data, text_column=options.text_column)
        self.data: TaskData = self.task.prepare(load_tokenizer(options), rows, options)
        self._identity = identity_of(options, rows, self.task)

    def _check_output(self) -> None:
        output, run = self.options.output_folder, self.folder
        if output.exists() and not output.is_dir():
            raise CheckpointError(f"{output} is a file, expected a folder to write to; choose another output")
        ours = (run / RESULT_FILE).is_file()
        if not (ours and (output / ARCHITECTURE_FILE).is_file()) and output.is_dir() and any(output.iterdir()):
            gone = (output / ARCHITECTURE_FILE).is_file() and (output / RESULT_FILE).is_file()
            why = f"the work of its run, {run}, is gone" if gone else "no run made it"
            raise CheckpointError(f"{output} is not empty and {why}; choose another output, or delete it")
        # A run that was killed at its very start leaves at most a hidden file.
        if not ours and run.exists() and not (run.is_dir() and all(f.name.startswith(".") for f in run.iterdir())):
            raise CheckpointError(f"{run}, where this run keeps its work, holds something else; choose another output")

    def dry_run(self) -> str:
        """Describes the space, what the limits leave, loadability and time, without training or writing anything."""
        if (self.folder / RESULT_FILE).is_file():  # nothing is said of one run that would be done in another
            RunRecord(self.folder, self._identity)
        self.tables_at = None
        supernet = self._new_supernet()
        limits, share = self.goal.feasible, feasible_share(supernet, self.goal.feasible)
        pool = near_limit(supernet, limits, count=16, seed=self.options.seed)
        forms = ", ".join(sorted({self._form(supernet, architecture) for architecture in pool}))
        quality = ", ".join(self.task.quality)
        lines = [
            str(supernet),
            f"  task           {self.task.name}, {len(self.data.train)} training examples, quality: {quality}",
            f"  limits         {self.options.asked}: {share:.1%} of the space, loading as {forms}",
            *self._times(supernet, pool),
            f"  runs where\n{textwrap.indent(str(runs_where_space(supernet)), '    ')}",
        ]
        return "\n".join(lines)

    def _times(self, supernet: Supernet, pool: tuple[Architecture, ...]) -> list[str]:
        """What a dry run says of the stages that the recipe has."""
        lines, recipe = [f"  recipe         {self.options.recipe}"], self.options.recipe
        untrained = untrained_seconds(supernet, self.data, trusted=_TRUSTED[recipe])
        lines.append(f"  untrained      about {untrained / 60:.1f} min: tables, exact search, repair, comparison")
        if recipe != "fast":
            plan = training_plan(supernet, pool, data=self.data, options=self.options)
            steps, per_step = plan["supernet_steps"] + plan["found_steps"], plan["seconds_per_step"]
            lines.append(f"  training       {self.options.minutes:g} min: {steps} steps of {per_step:.2f} s")
        if recipe == "best":
            per_evaluation, evaluations = self._seconds_per_evaluation(supernet, pool[0]), self.options.evaluations
            minutes = evaluations * per_evaluation / 60
            lines.append(f"  search         {minutes:.1f} min: {evaluations} evaluations of {per_evaluation:.2f} s")
        return lines

    def _seconds_per_evaluation(self, supernet: Supernet, architecture: Architecture) -> float:
        measure = self.task.measures(supernet, self.data.validation)[0]
        began = time.perf_counter()
        measure(architecture)
        return time.perf_counter() - began

    def run(self) -> CompressResult:
        """Runs the stages that are not finished and returns the result."""
        if (self.folder / RESULT_FILE).exists():
            self.record = RunRecord(self.folder, self._identity)
            if self.record.finished("check") and (self.options.output_folder / ARCHITECTURE_FILE).is_file():
                space = self._kept(SORTED).space
                return self._told(space.canonical(self.record.numbers("compare")["rows"][1]["architecture"]))
        with only_worker(self.folder):
            return self._run()

    def _run(self) -> CompressResult:
        fresh = None if (self.folder / RESULT_FILE).exists() else self._new_supernet()
        self.record = RunRecord(self.folder, self._identity)
        for half_written in self.folder.glob(".*"):  # what an attempt was writing aside when it was killed
            if half_written.name != LOCK_FILE:
                shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        if fresh is not None and self.goal.table is not None:
            self.goal.table.save(self.folder / LATENCY_FILE)
        if self.data.held_out:
            (self.folder / "validation.txt").write_text("\n".join(self.data.held_out), encoding="utf-8")
        supernet = self._stage("space", SORTED, lambda: self._sorted(fresh or self._new_supernet()))
        self.goal = self._goal(supernet)
        self.validation_teacher = self._teacher(supernet)
        answer = self._without_training(supernet)
        fast = supernet.space.canonical(self.record.numbers("repair")["architecture"])
        if self.options.recipe == "fast":
            return self._finish(answer, fast)
        self.parent = copy.deepcopy(supernet.model).eval().requires_grad_(False)
        if self.options.recipe == "balanced":
            self._plan_training(supernet, (fast,))
            return self._finish(self._stage("specialise", "found", lambda: self._specialise(answer, fast)), fast)
        pool = near_limit(supernet, self.goal.feasible, seed=self.options.seed)
        self._plan_training(supernet, pool)
        trained = self._stage("train", TRAINED, lambda: self._train_supernet(supernet, pool))
        found = self._search(trained)
        final = self._stage("specialise", "found", lambda: self._specialise(trained, found))
        return self._finish(final, found)

    def _without_training(self, supernet: Supernet) -> Supernet:
        ranking = ranking_streams(supernet, self.data)
        self._measure_tables(supernet, ranking)
        return self._stage("repair", "repaired", lambda: self._fast_answer(supernet, ranking))

    def _measure_tables(self, supernet: Supernet, ranking: ParentStreams) -> None:
        if not self.record.finished("tables"):
            with self.record.stage("tables"):
                path = self.folder / QUALITY_FILE
                self.say("measuring the damage of every option, cut alone and repaired")
                with progress_bar("quality table") as tell:
                    table = quality_table(
                        supernet, ranking, task=self.task, data=self.data, path=path, progress=tell
                    )  # fmt: skip
                keep_exact_front(supernet, table, self.goal, folder=self.folder)
                self.record.note("tables", **self._trust(supernet, table, ranking))

    def _trust(self, supernet: Supernet, table: QualityTable, ranking: ParentStreams) -> dict[str, Any]:
        """Says how far the sums over layers are to be trusted."""
        count, seed = _TRUSTED[self.options.recipe], self.options.seed
        found = trust(supernet, table, ranking, task=self.task, data=self.data, count=count, seed=seed)
        if found is None:
            return {}
        self.say(str(found))
        return additivity_numbers(found)

    def _fast_answer(self, supernet: Supernet, ranking: ParentStreams) -> Supernet:
        """The best of a few exact answers, repaired in closed form on all calibration data."""
        table = QualityTable.load(self.folder / QUALITY_FILE)
        measures = self._measures(supernet)
        points = candidates(supernet, table, self.goal)
        trials = [tried(supernet, point, measures=measures, calibration=ranking) for point in points]
        best = min(trials, key=lambda trial: trial.distance).architecture
        with refitted(supernet, best, self.data.calibration) as report:
            values = objectives.evaluated(measures, best)
            repaired = copy.deepcopy(supernet.model)
        kept = self._macs(supernet, best) / self._macs(supernet, supernet.space.largest())
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        dropped = "" if report.repaired else "; only cut, as the repair ended farther from the parent"
        self.say(f"without training: {shown} at {kept:.0%} of the MACs{dropped}")
        self.record.note(
            "repair",
            architecture=dict(best),
            values=recorded(values),
            repaired=report.repaired,
            error_cut=report.error_cut,
            error=report.error,
            tried=[trial_numbers(supernet, trial) for trial in trials],
        )
        return Supernet(repaired)

    @staticmethod
    def _macs(supernet: Supernet, architecture: Architecture) -> int:
        return costs.macs(supernet, architecture, seq_len=costs.LATENCY_TOKENS)

    def _measures(self, supernet: Supernet) -> list[Objective]:
        return self.task.measures(supernet, self.data.validation, teacher=self.validation_teacher)

    def _stage(self, name: str, folder: str, work: Callable[[], Supernet]) -> Supernet:
        """Runs a stage whose result is a supernet, or restores it."""
        target = self.folder / folder
        if not self.record.finished(name):
            with self.record.stage(name):
                work().save_pretrained(target, overwrite=True)
        remove_folder(self._checkpoints(folder))
        return self._kept(folder)

    def _checkpoints(self, phase: str) -> Path:
        return self.folder / f"training-{phase}"

    def _new_supernet(self) -> Supernet:
        """Makes the parent elastic and checks that the limits leave something, before anything is written."""
        model = load_model(self.task, self.options)
        space = self.options.space or default_space(model, self.options.loadability)
        supernet = make_elastic(model, space).to(self.device)
        require_calibration(supernet, self.data)
        self.goal = self._goal(supernet)
        near_limit(supernet, self.goal.feasible, count=1, seed=self.options.seed)
        return supernet

    def _goal(self, supernet: Supernet) -> Goal:
        """The budgets as limits; latencies are measured once a run, at its very start."""
        path = self.tables_at / LATENCY_FILE if self.tables_at and (self.tables_at / RESULT_FILE).is_file() else None
        goal = goal_of(
            supernet, self.options.budgets, dtype=self.dtype, table=self.latencies, path=path, say=self.say
        )  # fmt: skip
        self.latencies = goal.table
        return goal

    def _sorted(self, supernet: Supernet) -> Supernet:
        scores = sort_by_importance_(supernet, self.data.calibration, method="reconstruction")
        order = scores["layers"].argsort(descending=True, stable=True).tolist()
        self.record.note("space", layer_order=order, size=str(supernet.space.size))
        self.say(f"{supernet}\n  runs where     {runs_where_space(supernet).in_short()} (--dry-run says why)")
        return supernet

    def _teacher(self, supernet: Supernet) -> Tensor | None:
        """Embeds the validation sentences with the parent, once; ``None`` for other tasks."""
        if self.task.name != "embedding":
            return None
        path = self.folder / TEACHER_FILE
        if not self.record.finished("teacher"):
            largest = supernet.space.largest()
            with self.record.stage("teacher"):
                vectors = objectives.embeddings(supernet, largest, self.data.validation, pooling=self.task.pooling)
                save_file({"validation": vectors.contiguous()}, path)
        return load_file(path)["validation"]

    def _plan_training(self, supernet: Supernet, pool: tuple[Architecture, ...]) -> None:
        """Turns minutes into a number of steps, once; a continued run keeps the plan."""
        if self.record.numbers("plan"):
            return
        plan = training_plan(supernet, pool, data=self.data, options=self.options)
        self.record.note("plan", **plan)
        self.say(
            f"training: {plan['supernet_steps']} steps for the supernet, {plan['found_steps']} for the subnet found, "
            f"{plan['seconds_per_step']:.2f} s each"
        )

    def _train(self, supernet: Supernet, rule: Any, *, phase: str) -> Supernet:
        plan = self.record.numbers("plan")
        if plan[f"{phase}_steps"]:
            losses = train_phase(
                supernet, rule, task=self.task, data=self.data, options=self.options, folder=self._checkpoints(phase),
                steps=plan[f"{phase}_steps"], bf16=plan["bf16"], teacher=self.parent,
            )  # fmt: skip
            self.record.note({"supernet": "train", "found": "specialise"}[phase], losses=losses)
        return supernet

    def _train_supernet(self, supernet: Supernet, pool: tuple[Architecture, ...]) -> Supernet:
        return self._train(supernet, AmongSubnets(pool, self.options.seed), phase="supernet")

    def _specialise(self, supernet: Supernet, architecture: Architecture) -> Supernet:
        if all(shape.skipped for shape in supernet.layer_shapes(architecture)):
            return supernet  # nothing of it can learn
        return self._train(supernet, FixedSubnet(architecture), phase="found")

    def _search(self, supernet: Supernet) -> Architecture:
        if self.record.finished("search"):
            return supernet.space.canonical(self.record.numbers("search")["architecture"])
        measures = self._measures(supernet)
        quality, within = self.goal.limiting(measures[0]), self.goal.within
        with self.record.stage("search"):
            result = search_subnets(
                supernet.space, [quality, self.goal.cost], evaluations=self.options.evaluations, within=within,
                storage=f"sqlite:///{self.folder / 'search.db'}", seed=self.options.seed,
            )  # fmt: skip
            result.save(self.folder / "search.json")
            best = result.best(quality.name, within=within)
            self.record.note(
                "search",
                evaluations=len(result.evaluations),
                best=dict(best.values),
                architecture=dict(best.architecture),
            )
        return best.architecture

    def _finish(self, final: Supernet, architecture: Architecture) -> CompressResult:
        if not self.record.finished("compare"):
            with self.record.stage("compare"):
                rows = self._compare(final, architecture)
                self.record.note("compare", rows=rows, setting=str(self.goal.setting))
        self._export(final, architecture)
        self._check(final, architecture)
        return self._told(architecture)

    def _told(self, architecture: Architecture) -> CompressResult:
        """Says what is recorded of a run whose stages are all done."""
        report = reported_export(self.record, self.options.output_folder)
        if not (report.directory / RESULT_FILE).is_file():
            write_json(report.directory / RESULT_FILE, self.record.data)
        rows = self.record.numbers("compare")["rows"]
        table = comparison_table(rows, quality=self.task.quality, seq_len=costs.LATENCY_TOKENS)
        self.say(f"{table}\n{legend(self.task.quality, self.record.numbers('compare')['setting'])}")
        self.say("\n".join(self.record.numbers("check")["lines"]))
        self.say(str(report))
        return CompressResult(architecture, report, tuple(rows), table, self.record.data, self.folder)

    def _export(self, final: Supernet, architecture: Architecture) -> None:
        """Writes the found model in the dtype of its parent, unless an earlier attempt of the run has."""
        output = self.options.output_folder
        if not (self.record.finished("export") and (output / ARCHITECTURE_FILE).is_file()):
            cast_parameters_(final.model, self.dtype)
            with self.record.stage("export"):
                report = export(
                    final, architecture, output, loadability=self._form(final, architecture),
                    source=self.options.model, overwrite=True,
                )  # fmt: skip
                self.record.note("export", **recorded_export(report))

    def _check(self, final: Supernet, architecture: Architecture) -> None:
        """Holds what was exported against the budgets, measured beside the parent."""
        if self.record.finished("check"):
            return
        with self.record.stage("check"):
            folders = (None, self.options.output_folder)
            parent, exported = (
                load_exported(self.task, self.options, folder=folder, dtype=self.dtype) for folder in folders
            )
            outcome = outcome_of(self.goal, final, architecture, parent=parent, exported=exported)
            padded = [_PADDED] if self._form(final, architecture) == "stock-padded" else []
            self.record.note("check", **outcome.to_dict(), lines=[*outcome.lines(), *padded])

    def _form(self, supernet: Supernet, architecture: Architecture) -> Loadability:
        """How an architecture is written: compact where the options allow remote code, rather than padded."""
        return written_form(supernet, architecture, allowed=self.options.form)

    def _compare(self, final: Supernet, architecture: Architecture) -> list[dict[str, Any]]:
        """Rows of the table: the parent, what was found, how it stood on the way, and what plain cutting gives."""
        self.say("comparing with plain cuts of the same cost")
        pristine = self._kept(SORTED)
        rows = [
            Candidate("parent", pristine, pristine.space.largest()),
            Candidate("found", final, architecture),
            *self._on_the_way(pristine),
        ]
        plain = plain_alternatives(
            lambda: load_model(self.task, self.options, folder=self.folder / SORTED),
            limit=self._macs(final, architecture),
            layer_order=self.record.numbers("space")["layer_order"],
        )
        if not any(name == UNIFORM for name, _, _ in plain):
            self.say(f"no uniform width is as cheap as the subnet found: the table has no row '{UNIFORM}'")
        for name, supernet, point in plain:
            moved = supernet.to(self.device)
            rows.append(Candidate(name, moved, point))
            if name == UNIFORM:
                rows.append(Candidate(UNIFORM_REPAIRED, moved, point, tuple(self.data.calibration)))
        return compare(rows, measures=self._measures, form=self._form, setting=self.goal.setting)

    def _on_the_way(self, pristine: Supernet) -> list[Candidate]:
        """What earlier stages gave: the fast answer cut only, and repaired; the midpoint of a trained supernet."""
        fast = pristine.space.canonical(self.record.numbers("repair")["architecture"])
        found = [Candidate("fast answer, cut only", pristine, fast)]
        if self.options.recipe != "fast":
            found.insert(0, Candidate("fast answer, untrained", self._kept("repaired"), fast))
        if self.options.recipe == "best":
            trained = self._kept(TRAINED)
            found.insert(0, Candidate("midpoint", trained, trained.space.midpoint()))
        return found

    def _kept(self, folder: str) -> Supernet:
        return Supernet.from_pretrained(self.folder / folder, dtype=torch.float32).to(self.device)


def compress(options: CompressOptions, *, say: Say = print) -> CompressResult | LoraResult:
    """Makes a checkpoint smaller: supernet, training, search, export, and a table. Interrupted, the same call goes on.

    Args:
        options: the checkpoint, the text, the limits, the output and the time; with ``lora`` adapters are trained.
        say: where progress lines go.

    Raises:
        ElasticError: the options cannot be met; said before any training.
    """
    return (CompressRun if options.lora is None else LoraRun)(options, say=say).run()
