"""The whole path of ELM: supernet with growth, search, head fusion, retraining, fine-tuning, export; resumable."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_elastic.checkpoint import ExportReport, export
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import PARENT, RESULT_FILE, TEXT, RunRecord, read_record
from hf_elastic.conversion import make_elastic
from hf_elastic.errors import CheckpointError
from hf_elastic.files import (
    LOCK_FILE,
    only_worker,
    remove_folder,
    whole_files,
    whole_folder,
    write_json,
)
from hf_elastic.pipeline.comparison import finite
from hf_elastic.pipeline.elm_data import ElmTexts, LabelledRows, read_labelled, read_texts
from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.elm_plan import describe_plan, growth_of, new_supernet, plan_of
from hf_elastic.pipeline.elm_steps import (
    ElmSetting,
    Timing,
    check_output,
    fine_tune,
    fused_path,
    fusion_numbers,
    load_single,
    measure_timing,
    require_timeable,
    save_static,
    search_paths,
    train,
)
from hf_elastic.pipeline.elm_table import (
    FOUND,
    FUSED,
    RETRAINED,
    ElmRow,
    compared,
    growth_line,
    layer_table,
    result_table,
    search_line,
    timing_lines,
    verdict_lines,
    written_as,
)
from hf_elastic.pipeline.kept import (
    LATENCY_FILE,
    TRAINED,
    RunResult,
    parent_digest,
    recorded_export,
    reported_export,
)
from hf_elastic.runtimes.matrix import runs_where_space
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.block_latencies import BlockLatencyTable
from hf_elastic.tables.timing import NOISY
from hf_elastic.training import FixedSubnet, RandomSubnet, last_complete_checkpoint
from hf_elastic.training.targets import Relation

Say = Callable[[str], None]
FUSED_FOLDER, RETRAINED_FOLDER, CLASSIFIER, EXPORTED = "fused", "retrained", "classifier", "exported"
_STAGES = ("latency", "supernet", "search", "fusion", "retrain", "finetune", "compare", "export")


@dataclass(frozen=True)
class ElmResult(RunResult):
    """What a run found.

    Attributes:
        architecture: the path, as blocks by layer.
        report: how it was exported.
        rows: the table, one dict a model, the teacher first.
        table: the same as text.
        record: contents of ``result.json``.
        folder: where the run keeps its work.
    """


class ElmRun:
    """A run of ELM (Wang 2025, arXiv 2510.27037), opened or continued.

    The stages: ``latency`` (where a limit is on time), ``supernet``, ``search``, ``fusion``, ``retrain``, ``finetune``
    (where rows are given), ``compare``, ``export``. The run's folder keeps, besides ``result.json``, the trained
    supernet (``supernet``), how its blocks grew (``growth.html``), the similarity of the found path's heads
    (``cka.html``) and what each later stage made.

    Args:
        options: what to do.
        say: where progress lines go.

    Raises:
        ElasticError: the options cannot be met; said before any training, and before anything is written.
    """

    def __init__(self, options: ElmOptions, *, say: Say = print) -> None:
        self.options, self.say, self.folder = options, say, options.run_folder
        ours, written = (self.folder / RESULT_FILE).is_file(), (options.output_folder / ARCHITECTURE_FILE).is_file()
        check_output(options, ours=ours, written=written)
        self.texts: ElmTexts = read_texts(options)
        self.labelled: LabelledRows | None = None
        if options.finetune:
            self.labelled = read_labelled(options, self.texts.tokenizer)
        self.setting = ElmSetting(options, self.texts, plan_of(options, self.texts))
        self.plan = self.setting.plan
        rows = {"rows": self.labelled.digest} if self.labelled else {}
        self._identity = {**options.to_dict(), TEXT: self.texts.digest, PARENT: parent_digest(options.teacher), **rows}

    def dry_run(self) -> str:
        """Describes the space, the budget, growth, trainings and distillation, without training or writing anything."""
        if (self.folder / RESULT_FILE).is_file():  # nothing is said of one run that would be done in another
            RunRecord(self.folder, self._identity)
        supernet = self._draft()
        said = describe_plan(self.plan, supernet, options=self.options, texts=self.texts)
        if not self.options.timed:
            return said
        timing = measure_timing(self.setting, supernet, path=None)
        return f"{said}\n  latencies      {_timing_words(timing)}"

    def run(self) -> ElmResult:
        """Runs the stages that are not finished and returns the result."""
        if (self.folder / RESULT_FILE).exists():
            self.record = RunRecord(self.folder, self._identity)
            if self._exported():
                return self._told()
        with only_worker(self.folder):
            return self._run()

    def _run(self) -> ElmResult:
        fresh = None if (self.folder / RESULT_FILE).exists() else self._draft()
        first = None
        if fresh is None:
            self.say(self._going_on())
        if fresh is not None and self.options.timed:  # a limit out of reach leaves no run behind
            first = measure_timing(self.setting, fresh, path=None)
        self.record = RunRecord(self.folder, self._identity)
        for half_written in self.folder.glob(".*"):  # what an attempt was writing aside when it was killed
            if half_written.name != LOCK_FILE:
                shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        self.timing = self._timed(first)
        supernet = self._trained(fresh)
        found = self._searched(supernet)
        self._fused(supernet, found)
        single = self._retrained()
        self._fine_tuned()
        self._compared(supernet, found, single)
        self._export(single)
        return self._told()

    def _going_on(self) -> str:
        """Where an interrupted run goes on."""
        record = RunRecord(self.folder, self._identity)
        left = [stage for stage in _STAGES if not record.finished(stage) and self._has_stage(stage)]
        if not left:
            return f"going on with {self.folder}: its export is written again"
        found = last_complete_checkpoint(self.folder / f"training-{left[0]}")
        step = f" from step {found.rpartition('-')[2]}" if found else ""
        return f"going on with {self.folder} at stage {left[0]}{step}"

    def _has_stage(self, stage: str) -> bool:
        return {"latency": self.options.timed, "finetune": self.labelled is not None}.get(stage, True)

    def _draft(self) -> Supernet:
        """The supernet as it starts, of which everything that was asked for can be done."""
        require_timeable(self.setting)
        supernet = new_supernet(self.plan, self.options).to(self.setting.device)
        distillation = self.setting.distillation
        if not isinstance(distillation, bool):
            Relation(distillation, supernet, seed=self.options.seed)  # refuses a teacher that does not fit
        return supernet

    def _timed(self, first: Timing | None) -> Timing | None:
        """The latency table and what follows from it; measured once a run, before anything is trained."""
        if not self.options.timed:
            return None
        path, names = self.folder / LATENCY_FILE, ("teacher", "fastest", "slowest", "bound")
        if self.record.finished("latency"):
            numbers = self.record.numbers("latency")
            return Timing(BlockLatencyTable.load(path), **{name: numbers[name] for name in names})
        with self.record.stage("latency"):
            if first is not None:
                first.table.save(path)
            timing = first or measure_timing(self.setting, self._draft(), path=path)
            said = {"setting": str(timing.table.setting), "table": str(timing.table)}
            self.record.note("latency", **{name: getattr(timing, name) for name in names}, **said)
        self.say(f"latencies: {_timing_words(timing)}")
        return timing

    def _trained(self, fresh: Supernet | None) -> Supernet:
        target, checkpoints = self.folder / TRAINED, self.folder / "training-supernet"
        if not self.record.finished("supernet"):
            supernet = fresh or self._draft()
            self.say(describe_plan(self.plan, supernet, options=self.options, texts=self.texts))
            self.say(f"runs where: {runs_where_space(supernet).in_short()}")
            with self.record.stage("supernet"):
                self._train_supernet(supernet, checkpoints)
                supernet.save_pretrained(target, overwrite=True)
                with whole_files(target) as aside:
                    self._tokenizer.save_pretrained(aside)  # so that `hf-elastic export` of it finds one
        remove_folder(checkpoints)
        return Supernet.from_pretrained(target).to(self.setting.device)

    def _train_supernet(self, supernet: Supernet, checkpoints: Path) -> None:
        callbacks = [] if self.plan.growing is None else [growth_of(supernet, self.plan)]
        rule = RandomSubnet(self.options.seed)
        losses = train(
            supernet, rule, self.setting, folder=checkpoints, steps=self.plan.steps, callbacks=callbacks
        )  # fmt: skip
        numbers: dict[str, Any] = {"steps": self.plan.steps, "losses": losses, "budget": self.plan.budget}
        for growth in callbacks:
            history = growth.history
            self._draw(history.figure(), "growth.html")
            last = history.entries[-1]
            numbers |= {"growth": history.to_dict(), "mean_parameters": last.parameters_after}
            self.say(growth_line(supernet, history))
        self.record.note("supernet", **numbers)

    def _searched(self, supernet: Supernet) -> Architecture:
        if not self.record.finished("search"):
            with self.record.stage("search"):
                result = search_paths(self.setting, supernet, timing=self.timing, storage=self.folder / "search.db")
                result.save(self.folder / "search.json")
                best = result.best("perplexity", within=result.within)
                values = {one.architecture: one.values["perplexity"] for one in result.evaluations}
                self.record.note(
                    "search", evaluations=len(result.evaluations), architecture=dict(best.architecture),
                    best=finite(best.values["perplexity"]), midpoint=finite(values[supernet.space.midpoint()]),
                    median=finite(statistics.median(values.values())), within=dict(result.within),
                )  # fmt: skip
        numbers = self.record.numbers("search")
        self.say(search_line(numbers))
        return supernet.space.canonical(numbers["architecture"])

    def _fused(self, supernet: Supernet, found: Architecture) -> None:
        if not self.record.finished("fusion"):
            with self.record.stage("fusion"):
                model, report = fused_path(self.setting, supernet, found)
                save_static(model, self.folder / FUSED_FOLDER)
                if report is not None:
                    self._draw(report.figure(), "cka.html")
                    self.record.note("fusion", **fusion_numbers(report))
        if report_text := self.record.numbers("fusion").get("report"):
            self.say(report_text)

    def _retrained(self) -> Supernet:
        checkpoints = self.folder / "training-retrain"
        if not self.record.finished("retrain"):
            with self.record.stage("retrain"):
                seed = self.options.seed + 1 if self.options.weights == "fresh" else None
                single, losses = load_single(self.setting, self.folder / FUSED_FOLDER, seed=seed), []
                if self.plan.retrain_steps:
                    self.say(f"training the path that was found for {self.plan.retrain_steps} steps")
                    rule = FixedSubnet(single.space.largest())
                    losses = train(single, rule, self.setting, folder=checkpoints, steps=self.plan.retrain_steps)
                save_static(single.model, self.folder / RETRAINED_FOLDER)
                self.record.note("retrain", steps=self.plan.retrain_steps, losses=losses)
        remove_folder(checkpoints)
        return load_single(self.setting, self.folder / RETRAINED_FOLDER)

    def _draw(self, figure: Any, name: str) -> None:
        with whole_files(self.folder) as aside:
            figure.write_html(aside / name, include_plotlyjs="directory")

    def _fine_tuned(self) -> None:
        if self.labelled is None:
            return
        checkpoints = self.folder / "training-finetune"
        if not self.record.finished("finetune"):
            self.say(f"fine-tuning on {len(self.labelled.train)} rows of {len(self.labelled.labels)} labels")
            with self.record.stage("finetune"):
                model, numbers = fine_tune(
                    self.setting, self.labelled, self.folder / RETRAINED_FOLDER, folder=checkpoints
                )  # fmt: skip
                self._write(make_elastic(model), self.folder / CLASSIFIER)
                self.record.note("finetune", **numbers)
        remove_folder(checkpoints)

    def _compared(self, supernet: Supernet, found: Architecture, single: Supernet) -> None:
        if self.record.finished("compare"):
            return
        self.say("comparing with the teacher")
        fused = load_single(self.setting, self.folder / FUSED_FOLDER)
        rows = [ElmRow(FOUND, supernet, found), ElmRow(FUSED, fused, fused.space.largest())]
        if self.plan.retrain_steps:
            rows.append(ElmRow(RETRAINED, single, single.space.largest()))
        with self.record.stage("compare"):
            made = compared(self.setting, rows)
            if self.labelled is not None:
                made[-1]["accuracy"] = self.record.numbers("finetune")["accuracy"]
            lines = verdict_lines(self.setting, made)
            if self.timing is not None:
                lines += timing_lines(supernet, found, timing=self.timing)
            self.record.note("compare", rows=made, table=result_table(made), layers=layer_table(made), lines=lines)

    @cached_property
    def _tokenizer(self) -> Any:
        """The teacher's tokenizer as it is, without the padding that training gave it."""
        return AutoTokenizer.from_pretrained(self.options.teacher, trust_remote_code=False)

    def _write(self, single: Supernet, folder: Path) -> ExportReport:
        point = single.space.largest()
        form = written_as(single, point)
        return export(single, point, folder, loadability=form, tokenizer=self._tokenizer, overwrite=True)

    def _exported(self) -> bool:
        written = (self.options.output_folder / ARCHITECTURE_FILE).is_file()
        return self.record.finished("export") and written

    def _export(self, single: Supernet) -> None:
        """Writes the model, with its classifier if there is one, unless an earlier attempt of the run has."""
        if self._exported():
            return
        output, aside = self.options.output_folder, self.folder / EXPORTED
        with self.record.stage("export"):
            report = self._write(single, aside)
            with whole_folder(output, overwrite=True) as folder:
                shutil.copytree(aside, folder, dirs_exist_ok=True)
                if self.labelled is not None:
                    shutil.copytree(self.folder / CLASSIFIER, folder / CLASSIFIER)
            remove_folder(aside)
            snippet = report.snippet.replace(json.dumps(str(aside)), json.dumps(str(output)))
            self.record.note("export", **{**recorded_export(report), "snippet": snippet})

    def _told(self) -> ElmResult:
        """Says what is recorded of a run whose stages are all done."""
        report = reported_export(self.record, self.options.output_folder)
        if not (report.directory / RESULT_FILE).is_file():
            write_json(report.directory / RESULT_FILE, self.record.data)
        numbers = self.record.numbers("compare")
        self.say("\n".join([numbers["layers"], "", numbers["table"], *numbers["lines"]]))
        if self.labelled is not None:
            tuned = self.record.numbers("finetune")
            self.say(
                f"accuracy: of {tuned['held_rows']} rows held out, {tuned['majority']:.4f} have the most common label; "
                f"the classifier is {report.directory / CLASSIFIER}"
            )
        self.say(str(report))
        found = self.record.numbers("search")["architecture"]
        point = Architecture(found)
        return ElmResult(point, report, tuple(numbers["rows"]), numbers["table"], self.record.data, self.folder)


def _timing_words(timing: Timing) -> str:
    noise = f" (noisy: one model differs by {timing.table.noise:.0%})" if timing.table.noise > NOISY else ""
    return (
        f"paths take {1e3 * timing.fastest:.3g} to {1e3 * timing.slowest:.3g} ms, the teacher "
        f"{1e3 * timing.teacher:.3g} ms for {timing.table.setting}; searched are paths of at most "
        f"{1e3 * timing.bound:.3g} ms{noise}"
    )


def require_no_elm_run(folder: Path) -> None:
    """Refuses the folder of a run of ELM, or of its output, where one of ``compress`` is asked for.

    Raises:
        CheckpointError: it is one; the message says which command takes what is in it.
    """
    file = folder / RESULT_FILE
    if not file.is_file() or "teacher" not in read_record(file)["options"]:
        return
    run = folder if (folder / TRAINED).is_dir() else folder.with_name(f"{folder.name}.run")
    raise CheckpointError(
        f"{folder} is of a run of hf-elastic elm, not of compress; write a path that its search found by hf-elastic "
        f"export {run / TRAINED} '{run / 'search.json'}#1' --output DIR, or run elm with other limits"
    )


def make_elm(options: ElmOptions, *, say: Say = print) -> ElmResult:
    """Makes a small language model by ELM out of a teacher and text. Interrupted, the same call goes on.

    Args:
        options: the teacher, the text, the output and the size.
        say: where progress lines go.

    Raises:
        ElasticError: the options cannot be met; said before any training.
    """
    return ElmRun(options, say=say).run()
