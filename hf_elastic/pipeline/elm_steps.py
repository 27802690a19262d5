"""The steps of a run of ELM, each a function of what was before: trainings, latencies, search, fusion, fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_elastic import objectives
from hf_elastic.checkpoint import extract
from hf_elastic.conversion import make_elastic
from hf_elastic.errors import CheckpointError, InfeasibleError, SpaceError
from hf_elastic.files import whole_folder
from hf_elastic.fusion import FusionReport, fuse_heads_
from hf_elastic.layers import evaluating, seeded
from hf_elastic.pipeline.elm_data import ElmTexts, LabelledRows
from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.elm_plan import ElmPlan, spread_widths
from hf_elastic.pipeline.progress import progress_bar
from hf_elastic.pipeline.tasks import Batch, load_model, load_with_classifier
from hf_elastic.pipeline.training import device_of, noted_losses
from hf_elastic.search import Objective, SearchResult, search_subnets
from hf_elastic.search.samplers import uniform_evolution
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.supernet_folder import class_named
from hf_elastic.supernet_folder import load_model as load_static
from hf_elastic.tables.block_latencies import BlockLatencyTable, measure_block_latency_table
from hf_elastic.tables.budgets import LATENCY, MARGIN, Budgets
from hf_elastic.tables.latencies import NANOSECONDS
from hf_elastic.tables.timing import Setting, measure_models, typical
from hf_elastic.training import (
    CompleteCheckpointCallback,
    Distillation,
    ElasticTrainer,
    SamplingRule,
    last_complete_checkpoint,
)
from hf_elastic.training.order import InOrder, training_order
from hf_elastic.training.preparation import KeptCache

_SAVES, _LOGS = 5, 4  # checkpoints of a training, and losses that are noted between two
_POPULATION = (10, 50)  # of the search: at least, and as published
_GENERATIONS = 4
_TIMED_WIDTHS = 3


@dataclass(frozen=True)
class ElmSetting:
    """What all steps of a run have in common.

    Attributes:
        options: what the run was asked for.
        texts: what it reads.
        plan: what it is going to do.
    """

    options: ElmOptions
    texts: ElmTexts
    plan: ElmPlan

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return device_of(self.options.compress)

    @property
    def bf16(self) -> bool:
        """Whether trainings are in mixed precision."""
        return self.options.precision == "bf16" or (self.options.precision == "auto" and self.device == "cuda")

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher in fp32, on the device of the run."""
        model: Any = load_model(self.texts.teacher_task, self.options.compress)
        return model.to(self.device).requires_grad_(False)  # type: ignore[no-any-return]

    @property
    def distillation(self) -> Distillation | bool:
        """What a student learns from besides the labels of the text.

        As published, encoders are compared by their states; a decoder also by its predictions. The totals are the
        published ones, too: the sum over all states, and 1 for predictions.
        """
        distill = self.options.distill
        if distill == "none":
            return False
        predicts, states = self.texts.causal and not self.texts.headless, 2 * self.plan.layers + 1
        return Distillation(
            target="relational",
            teacher=self.teacher if predicts else self.teacher.base_model,
            fit=True,
            state_distance="pearson" if distill == "relational" else "mse",
            prediction=None if not predicts else "dist" if distill == "relational" else "kl",
            weight=float(states),
            prediction_weight=1 / states,
        )

    def batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches on the device of the run."""
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]


def training_arguments(
    setting: ElmSetting, *, folder: Path, steps: int, learning_rate: float | None = None
) -> TrainingArguments:
    """The Trainer's settings of a training of so many steps: those published, but for batch and learning rate."""
    options, log = setting.options, max(1, math.ceil(steps / (_SAVES * _LOGS)))
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=learning_rate or options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=setting.bf16,
        use_cpu=setting.device == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # a loss is the mean since the last one was noted, so no checkpoint may lie between two
        save_steps=_LOGS * log,
        logging_steps=log,
        save_total_limit=2,
        report_to="none",
        seed=options.seed,
        dataloader_pin_memory=False,
    )


def train(
    supernet: Supernet,
    rule: SamplingRule,
    setting: ElmSetting,
    *,
    folder: Path,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Trains the paths of a rule; continues from the newest whole checkpoint of ``folder``.

    Returns:
        Losses by step, of labels and distillation together.
    """
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=rule,
        distill=setting.distillation,
        args=training_arguments(setting, folder=folder, steps=steps),
        train_dataset=setting.texts.training(setting.options, steps=steps),
        data_collator=setting.texts.data.collate,
        callbacks=list(callbacks),
    )
    _run(trainer, folder)
    supernet.model.eval()
    return noted_losses(trainer)


class _Bar(ProgressCallback):
    """The Trainer's bar without its lines of numbers, which the record keeps."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


def _run(trainer: Trainer, folder: Path) -> None:
    """Trains, or goes on from the newest whole checkpoint."""
    for told in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(told)
    trainer.add_callback(_Bar())
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


@dataclass(frozen=True)
class Timing:
    """Latencies that a limit on time is about.

    Attributes:
        table: of all blocks at all widths that growth goes through.
        teacher: seconds of the teacher, in the terms of the table.
        fastest, slowest: seconds that a path may take, by the table.
        bound: seconds that a path may take, with a margin.
    """

    table: BlockLatencyTable
    teacher: float
    fastest: float
    slowest: float
    bound: float

    def within(self) -> dict[str, float]:
        """The limit for a search."""
        return {LATENCY: math.floor(NANOSECONDS * self.bound)}


def timed_setting(setting: ElmSetting, supernet: Supernet) -> Setting:
    """In which models are timed: that of a speed-up or a latency, else one sequence."""
    budgets = budgets_of(setting.options)
    timed = budgets.timed.fitted(supernet, new=int(budgets.phase == "decode"))
    return Setting.of(supernet, batch_size=timed.batch_size, length=timed.length, phase=budgets.phase)


def budgets_of(options: ElmOptions) -> Budgets:
    """What was asked for of time."""
    return options.compress.budgets


def require_timeable(setting: ElmSetting) -> None:
    """Refuses a limit on time that means nothing for this teacher or this student.

    Raises:
        SpaceError: it does.
    """
    if not setting.options.timed:
        return
    if setting.texts.headless:
        raise SpaceError(
            "speedup= and latency= are of models with an output head, which this teacher has not; limit macs= or "
            "parameters= by within="
        )
    if setting.plan.layers < 2:
        raise SpaceError("a latency table tells layers from what is around them, so it needs two; limit macs= instead")


def measure_timing(setting: ElmSetting, supernet: Supernet, *, path: Path | None) -> Timing:
    """Measures the latency table of a supernet that has not grown yet, and its teacher beside it.

    Args:
        setting: of the run.
        supernet: as it starts.
        path: keeps the table; an interrupted measurement goes on, a finished one is read.

    Raises:
        InfeasibleError: not even the fastest path before growth is fast enough.
    """
    budgets, where = budgets_of(setting.options), timed_setting(setting, supernet)
    widths = setting.plan.widths
    chosen = sorted({widths[0], widths[len(widths) // 2], widths[-1]}, reverse=True)
    with spread_widths(supernet, [*chosen[:1], *chosen[-1:], *chosen[1:-1]]), progress_bar("latency table") as tell:
        table = measure_block_latency_table(
            supernet, batch_size=where.batch_size, length=where.length, phase=where.phase, widths=_TIMED_WIDTHS,
            path=path, progress=tell,
        )  # fmt: skip
    teacher = _teacher_seconds(setting, supernet, table)
    fastest = _extreme(supernet, table, min)
    with spread_widths(supernet, widths[-1:]):
        slowest = _extreme(supernet, table, max)
    targets = [] if budgets.speedup is None else [teacher / budgets.speedup]
    bound = min([*targets, *([] if budgets.latency is None else [budgets.latency])]) / (1 + MARGIN)
    if fastest > bound:
        asked = [f"{name}={getattr(setting.options, name)}" for name in ("speedup", "latency")]
        asked = [text for text in asked if not text.endswith("=None")]
        raise InfeasibleError(
            f"{' and '.join(asked)} cannot be reached (aiming {MARGIN:.0%} faster): paths take {1e3 * fastest:.3g} to "
            f"{1e3 * slowest:.3g} ms, the teacher {1e3 * teacher:.3g} ms for {table.setting}; ask for less, or take a "
            "smaller size"
        )
    return Timing(table, teacher, fastest, slowest, bound)


def _teacher_seconds(setting: ElmSetting, supernet: Supernet, table: BlockLatencyTable) -> float:
    """Seconds of the teacher, by how much slower it is than a path whose seconds the table knows."""
    path = supernet.space.largest()
    models = {"teacher": setting.teacher, "path": extract(supernet, path, loadability="remote-code")}
    found = measure_models(models, table.setting)
    ratio = typical(found["teacher"].samples) / typical(found["path"].samples)
    return ratio * table.predict(supernet, path)


def _extreme(supernet: Supernet, table: BlockLatencyTable, choose: Callable[..., float]) -> float:
    layers = (choose(table.seconds(part.shape_of(block)) for block in part.blocks) for part in supernet.block_parts)
    return math.fsum([table.fit.constant, *layers])


def search_paths(setting: ElmSetting, supernet: Supernet, *, timing: Timing | None, storage: Path) -> SearchResult:
    """Searches the path of least perplexity on held-out text within the limits, by the published evolution.

    The population is the published one, smaller where there are fewer than four generations of it.

    Raises:
        InfeasibleError: nothing in the space, as it has grown, keeps the limits.
    """
    options = setting.options
    known, within = objectives.related_costs(supernet), options.limits(setting.plan.budget)
    if timing is not None:
        known[LATENCY] = objectives.predicted_latency(supernet, timing.table)
        within |= timing.within()
    measure = perplexity(setting, supernet, setting.texts.searched)
    population = min(max(options.evaluations // _GENERATIONS, _POPULATION[0]), _POPULATION[1])
    return search_subnets(
        supernet.space, [replace(measure, related=lambda: known)], algorithm=uniform_evolution(population),
        evaluations=options.evaluations, within=within, storage=f"sqlite:///{storage}", seed=options.seed,
    )  # fmt: skip


def perplexity(setting: ElmSetting, supernet: Supernet, batches: Sequence[Batch]) -> Objective:
    """Perplexity of a path on held-out batches."""
    return objectives.perplexity(supernet, setting.batches(batches))


def fused_path(
    setting: ElmSetting, supernet: Supernet, found: Architecture
) -> tuple[PreTrainedModel, FusionReport | None]:
    """Takes a path out of the supernet and fuses its heads that write alike.

    Returns:
        A static model, and what was done; ``None`` where nothing was asked for.
    """
    options = setting.options
    single = make_elastic(extract(supernet, found, loadability="remote-code"))
    if options.fusion == "none":
        return single.model, None
    report = fuse_heads_(
        single, setting.batches(setting.texts.data.calibration), mode=options.fusion, threshold=options.threshold,
        too_few="stop",
    )  # fmt: skip
    return extract(single, single.space.largest(), loadability="remote-code"), report


def fusion_numbers(report: FusionReport) -> dict[str, Any]:
    """What a record keeps of a fusion."""
    layers = [
        {
            "layer": layer.layer, "block": layer.block, "before": layer.before, "after": layer.after,
            "groups": [list(group) for group in layer.groups],
            "cka": [[round(value, 4) for value in row] for row in layer.cka.tolist()],
        }
        for layer in report.layers
    ]  # fmt: skip
    losses = {"loss_before": report.loss_before, "loss_after": report.loss_after}
    sizes = {"parameters_before": report.parameters_before, "parameters_after": report.parameters_after}
    return {"report": str(report), "layers": layers, **losses, **sizes}


def save_static(model: PreTrainedModel, folder: Path) -> None:
    """Keeps a static model in a folder of the run, whole or not at all."""
    with whole_folder(folder, overwrite=True) as aside:
        model.save_pretrained(aside)


def load_single(setting: ElmSetting, folder: Path, *, seed: int | None = None) -> Supernet:
    """A static model that the run keeps, as a supernet of one path.

    Args:
        setting: of the run.
        folder: where it is.
        seed: of new weights in the place of those that were kept.
    """
    kind = class_named(setting.plan.architecture_class)
    model = load_static(folder, kind, {"dtype": torch.float32})
    if seed is not None:
        with seeded(seed):
            model = kind(model.config)
    model.config._name_or_path = ""  # a folder of the run, where nobody is to look for a tokenizer
    return make_elastic(model.eval()).to(setting.device)


def fine_tune(setting: ElmSetting, rows: LabelledRows, source: Path, *, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Fine-tunes a kept model to classify, by the stock Trainer; continues from the newest whole checkpoint.

    Returns:
        The classifier, and its numbers: accuracy on the rows that were held out, and that of the most common label.
    """
    options, tokenizer = setting.options, setting.texts.tokenizer
    model, _ = load_with_classifier(str(source), rows.labels, seed=options.seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # else it takes one row at a time
    steps = max(1, round(options.finetune_epochs * max(1, len(rows.train) // options.batch_size)))
    order = training_order(
        [len(row["input_ids"]) for row in rows.train], batch_size=options.batch_size, steps=steps, seed=options.seed
    )
    collate: Any = DataCollatorWithPadding(tokenizer)
    cache = KeptCache(model.config)
    trainer = Trainer(
        model=model,
        args=training_arguments(setting, folder=folder, steps=steps, learning_rate=options.finetune_learning_rate),
        train_dataset=InOrder(rows.train, order),
        data_collator=collate,
        callbacks=[CompleteCheckpointCallback()],
    )
    _run(trainer, folder)
    cache.restore()
    right = 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(rows.held), options.batch_size):
            batch = collate([dict(row) for row in rows.held[start : start + options.batch_size]]).to(model.device)
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    model.config._name_or_path = ""
    return model.eval(), {
        "accuracy": right / len(rows.held), "majority": rows.majority, "labels": list(rows.labels), "steps": steps,
        "train_rows": len(rows.train), "held_rows": len(rows.held), "losses": noted_losses(trainer),
    }  # fmt: skip


def check_output(options: ElmOptions, *, ours: bool, written: bool) -> None:
    """Refuses an output, or a place for the run, that holds something else.

    Args:
        options: name both.
        ours: whether the run was begun before.
        written: whether there is an export in the output.

    Raises:
        CheckpointError: one does.
    """
    output, run = options.output_folder, options.run_folder
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file, expected a folder to write to; choose another output")
    if output.is_dir() and any(output.iterdir()) and not (ours and written):
        why = f"the work of its run, {run}, is gone" if written else "no run made it"
        raise CheckpointError(f"{output} is not empty and {why}; choose another output, or delete it")
    if not ours and run.exists() and not (run.is_dir() and all(f.name.startswith(".") for f in run.iterdir())):
        raise CheckpointError(f"{run}, where this run keeps its work, holds something else; choose another output")
