"""``compress --lora``: elastic adapters are trained and searched; a plain adapter or a smaller model comes out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_elastic import costs, objectives
from hf_elastic.adapters import ElasticLoraConfig, SubnetStatistics, add_lora, extract_adapter, load_adapter
from hf_elastic.adapters.selection import STATISTICS_FILE
from hf_elastic.checkpoint import export
from hf_elastic.checkpoint.companions import copy_companions
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import RESULT_FILE, RunRecord
from hf_elastic.compression import quantize_, sparsify_
from hf_elastic.conversion import make_elastic
from hf_elastic.errors import CheckpointError, DataError, SpaceError, TrainingError
from hf_elastic.files import only_worker, remove_folder, whole_folder, write_json
from hf_elastic.importance import sort_by_importance_
from hf_elastic.packed_format import quantised_layers, unpack_, write_weights
from hf_elastic.pipeline.comparison import recorded
from hf_elastic.pipeline.compressed_base import compress_base_, has_zeros, own_integers, plain_quality
from hf_elastic.pipeline.kept import SORTED, identity_of
from hf_elastic.pipeline.limits import AmongSubnets, feasibility, near_limit
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import (
    Task,
    TaskData,
    load_model,
    load_tokenizer,
    load_with_classifier,
    read_config,
    resolve_task,
)
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import arguments_of, device_of, noted_losses, random_batches, step_seconds
from hf_elastic.report import adapter_table
from hf_elastic.runtimes.matrix import runs_where_space
from hf_elastic.search import search_subnets
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import Distillation, ElasticTrainer, RandomSubnet, SamplingRule, last_complete_checkpoint
from hf_elastic.training.order import InOrder, training_order

PARENT, ADAPTERS, BASE = "parent", "adapters", "base"
_OVERHEAD = 1.2  # optimizer, collation, checkpoints and logging


@dataclass(frozen=True)
class LoraResult:
    """What a run with adapters found.

    Attributes:
        architecture: the subnet.
        rows: the table, one dict a subnet.
        table: the same as text.
        record: contents of ``result.json``.
        folder: where the run keeps its work.
    """

    architecture: Architecture
    rows: tuple[Mapping[str, Any], ...]
    table: str
    record: Mapping[str, Any]
    folder: Path


def parse_ranks(text: str) -> list[int]:
    """Reads ``r=32,24,16`` as ranks, the largest first.

    Raises:
        SpaceError: it is not of that form, or names a rank twice.
    """
    found = re.fullmatch(r"r=(\d+(?:,\d+)*)", text.replace(" ", ""))
    ranks = [int(rank) for rank in found[1].split(",")] if found else []
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise SpaceError(f"lora={text!r} is not of the form r=32,24,16: distinct ranks of at least 1, commas between")
    return sorted(ranks, reverse=True)


class LoraRun:
    """A run with elastic adapters, opened or continued.

    Without ``options.space`` only ranks are choices (Mode A of arXiv 2501.16372: Shears, SQFT) and a plain peft adapter
    comes out; with a space the frozen base is cut as well (Mode B: LoNAS), and an ordinary merged model comes out. With
    ``options.sparsity`` or ``options.bits`` the base is compressed first, and what comes out is one merged model that
    is still sparse (SQFT+SparsePEFT) or of integers (SQFT+QA-SparsePEFT), or, ``apart``, base and adapter (SQFT).

    Args:
        options: what to do; ``lora`` names the ranks.
        say: where progress lines go.

    Raises:
        ElasticError: the options cannot be met; said before any training.
    """

    def __init__(self, options: CompressOptions, *, say: Callable[[str], None] = print) -> None:
        assert options.lora is not None
        self.given, self.say = options, say
        self.ranks = parse_ranks(options.lora)
        self.elastic_base = options.space is not None
        self.task: Task = resolve_task(options, integers=not self.elastic_base and options.sparsity is None)
        self.folder = options.run_folder
        if len(self.ranks) < 2 and not self.elastic_base:
            raise SpaceError(f"lora={options.lora!r} names one rank, which leaves nothing to choose; name several")
        if options.recipe != CompressOptions.recipe:
            raise TrainingError(f"recipe={options.recipe!r} is not for adapters, which are trained; leave it out")
        if self.task.name == "embedding" and not self.elastic_base:
            raise DataError(
                "a sentence encoder has nothing to learn from text while only ranks are chosen; give a space too, or a "
                "task with labels"
            )
        self.rows = read_rows(options.data, text_column=options.text_column)
        self.fresh_head = self._needs_head()
        self._identity = identity_of(options, self.rows, self.task)

    def _needs_head(self) -> bool:
        """Whether the checkpoint lacks the classifier that the task needs."""
        names = read_config(self.given.model).architectures or []
        return self.task.name == "classification" and not any("SequenceClassification" in name for name in names)

    @cached_property
    def options(self) -> CompressOptions:
        """The options, with the parent that was given a classifier where it had none."""
        return replace(self.given, model=str(self.folder / PARENT)) if self.fresh_head else self.given

    @cached_property
    def data(self) -> TaskData:
        """The data as batches."""
        return self.task.prepare(load_tokenizer(self.options), self.rows, self.options)

    def dry_run(self) -> str:
        """Describes the space and the task, without training or writing anything."""
        mode = "ranks, and the frozen base" if self.elastic_base else "ranks"
        draft = self._draft()
        return f"{draft}\n  chosen         {mode}, within {self.given.asked}\n  task           {self.task.name}"

    def _draft(self) -> Supernet:
        """The supernet as it would be made, of which the limits leave something."""
        if self.fresh_head:
            model, head = load_with_classifier(self.given.model, self._labels(), seed=self.given.seed)
        else:
            model, head = unpack_(load_model(self.task, self.given)), None
        if self.given.space is not None:
            make_elastic(model, self.given.space)
        if self.given.sparsity is not None:
            sparsify_(model, method="magnitude", sparsity=self.given.sparsity)
        sparse = has_zeros(model)
        if self.given.bits is not None and not own_integers(model, self.given):
            quantize_(model, method="rtn", bits=self.given.bits, group_size=self.given.group_size)
        supernet = add_lora(model, self._config(head, sparse=sparse), seed=self.given.seed)
        feasibility(supernet, dict(self.given.within or {}))
        return supernet

    def _labels(self) -> list[str]:
        """Names of the classes in the data."""
        column = self.given.label_column
        if missing := next((row for row in self.rows if column not in row), None):
            raise DataError(f"classification needs a column {column!r}, a row has only {sorted(missing)}")
        return sorted({str(row[column]) for row in self.rows})

    def _config(self, head: list[str] | None, *, sparse: bool) -> ElasticLoraConfig:
        return ElasticLoraConfig(
            r=self.ranks[0], lora_alpha=2 * self.ranks[0], ranks=self.ranks, target_modules="all-linear",
            modules_to_save=head, task_type=_PEFT_TASKS.get(self.task.name),
            sparse=self.merges and sparse,
            quantization_aware=self.merges and self.given.bits is not None,
        )  # fmt: skip

    @property
    def merges(self) -> bool:
        """Whether adapters are merged into a compressed base."""
        return self.given.compressed and not self.given.apart

    def run(self) -> LoraResult:
        """Runs the stages that are not finished and returns the result."""
        output = self.given.output_folder
        ours = (self.folder / RESULT_FILE).is_file()
        if output.is_dir() and any(output.iterdir()) and not (ours and (output / ARCHITECTURE_FILE).is_file()):
            raise CheckpointError(f"{output} is not empty and no run made it; choose another output, or delete it")
        if not ours:
            self._draft()  # errors of the options before anything is written
        with only_worker(self.folder):
            self.record = RunRecord(self.folder, self._identity)
            if self.fresh_head and not self.record.finished("parent"):
                with self.record.stage("parent"):
                    self._make_parent()
            self.data  # noqa: B018  # errors of the data before anything is trained
            if self.options.compressed and not self.record.finished("base"):
                with self.record.stage("base"):
                    self._compress_base()
            if self.elastic_base and not self.record.finished("space"):
                with self.record.stage("space"):
                    self._sorted().save_pretrained(self.folder / SORTED, overwrite=True)
            supernet = self._trained()
            found = self._searched(supernet)
            self._exported(supernet, found)
            return self._told(supernet, found)

    def _make_parent(self) -> None:
        """Gives the checkpoint a classifier for the labels of the data."""
        model, head = load_with_classifier(self.given.model, self._labels(), seed=self.given.seed)
        tokenizer = load_tokenizer(self.given)
        model.config.pad_token_id = model.config.pad_token_id or tokenizer.pad_token_id
        with whole_folder(self.folder / PARENT, overwrite=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        self.record.note("parent", head=head, labels=len(self._labels()))

    def _parent(self) -> Any:
        """The checkpoint as it was given."""
        return unpack_(load_model(self.task, self.options)).to(device_of(self.options))  # type: ignore[arg-type]

    def _compress_base(self) -> None:
        """Makes the base sparse, then of integers, and keeps it in the run folder."""
        model = self._parent()
        told = compress_base_(model, self.data.calibration, self.options)
        with whole_folder(self.folder / BASE, overwrite=True) as folder:
            write_weights(model, folder)
            copy_companions(self.options.model, folder)
        self.say(f"base: {told}")
        self.record.note("base", report=told, sparse=has_zeros(model))

    def _sorted(self) -> Supernet:
        assert self.options.space is not None
        supernet = make_elastic(load_model(self.task, self.options), self.options.space).to(device_of(self.options))
        sort_by_importance_(supernet, self.data.calibration, method="reconstruction")
        return supernet

    def _base(self) -> Any:
        if self.elastic_base:
            return Supernet.from_pretrained(self.folder / SORTED, dtype=torch.float32).model
        folder = self.folder / BASE if self.options.compressed else None
        return unpack_(load_model(self.task, self.options, folder=folder))

    def _trained(self) -> Supernet:
        """The supernet with its trained adapters."""
        if self.record.finished("train"):
            return load_adapter(self._base(), self.folder / ADAPTERS).to(device_of(self.options))
        sparse = bool(self.record.numbers("base").get("sparse"))
        config = self._config(self.record.numbers("parent").get("head"), sparse=sparse)
        supernet = add_lora(self._base(), config, seed=self.options.seed).to(device_of(self.options))
        limits = feasibility(supernet, dict(self.options.within or {}))
        self.say(f"{supernet!r}: {'ranks, and the frozen base' if self.elastic_base else 'ranks'}")
        self.say(f"runs where: {runs_where_space(supernet).in_short()}")
        rule: SamplingRule = RandomSubnet(self.options.seed)
        if self.elastic_base:
            rule = AmongSubnets(near_limit(supernet, limits, seed=self.options.seed), self.options.seed)
        with self.record.stage("train"):
            statistics = self._train(supernet, rule)
            if statistics.steps:
                chosen = {"most frequent": statistics.most_frequent(), "lowest loss": statistics.lowest_loss_values()}
                self.record.note("train", selected={name: dict(point) for name, point in chosen.items()})
            with whole_folder(self.folder / ADAPTERS, overwrite=True) as folder:
                supernet.model.save_pretrained(folder)
        return supernet

    def _train(self, supernet: Supernet, rule: SamplingRule) -> SubnetStatistics:
        options, folder = self.options, self.folder / "training"
        if "steps" not in self.record.numbers("train"):
            pool = tuple(rule.draw(supernet.space, step, 0)[0] for step in range(4))
            batches = random_batches(self.data, size=options.batch_size)
            per_step = step_seconds(supernet, pool, batches=batches, bf16=False)
            steps = round(60 * options.minutes / (_OVERHEAD * per_step))
            self.record.note("train", steps=steps, seconds_per_step=per_step)
        steps = self.record.numbers("train")["steps"]
        sentences = self.task.name == "embedding"
        statistics = SubnetStatistics(supernet)
        if not steps:
            return statistics
        self.say(f"training: {steps} steps of {self.record.numbers('train')['seconds_per_step']:.2f} s")
        lengths = [len(feature["input_ids"]) for feature in self.data.train]
        order = training_order(lengths, batch_size=options.batch_size, steps=steps, seed=options.seed)
        distill: bool | Distillation = False
        if sentences:
            teacher: Any = load_model(self.task, options)
            distill = Distillation(
                target=self.task.target, teacher=teacher.to(device_of(options)), state_distance="relative"
            )
        trainer = ElasticTrainer(
            supernet=supernet, sampling=rule, distill=distill, train_dataset=InOrder(self.data.train, order),
            args=arguments_of(options, folder=folder, steps=steps, bf16=False),
            data_collator=self.data.collate, callbacks=[statistics],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=_resumable(folder))
        supernet.model.eval()
        self.record.note("train", losses=noted_losses(trainer))
        return statistics

    def _searched(self, supernet: Supernet) -> Architecture:
        if not self.record.finished("search"):
            quality = self.task.measures(supernet, self.data.validation)[0]
            known = objectives.related_costs(supernet)
            within = dict(self.options.within or {})
            with self.record.stage("search"):
                result = search_subnets(
                    supernet.space, [quality, known[next(iter(within))]], evaluations=self.options.evaluations,
                    within=within, storage=f"sqlite:///{self.folder / 'search.db'}", seed=self.options.seed,
                )  # fmt: skip
                result.save(self.folder / "search.json")
                best = result.best(quality.name, within=within)
                self.record.note(
                    "search", evaluations=len(result.evaluations), architecture=dict(best.architecture),
                    best=dict(best.values),
                )  # fmt: skip
        return supernet.space.canonical(self.record.numbers("search")["architecture"])

    def _exported(self, supernet: Supernet, found: Architecture) -> None:
        output = self.given.output_folder
        if self.record.finished("export") and (output / ARCHITECTURE_FILE).is_file():
            return
        with self.record.stage("export"):
            if self.elastic_base or self.merges:
                report = export(supernet, found, output, merge=True, source=self.options.model, overwrite=True)
                self.say(str(report))
                self.record.note("export", loadability=report.loadability, snippet=report.snippet)
                return
            folder_of_base = Path(self.given.model).expanduser()
            base = str(folder_of_base.resolve()) if folder_of_base.is_dir() else self.given.model
            if self.given.apart:
                base = str((output / BASE).resolve())
            adapter = extract_adapter(supernet, found, base=base)
            with whole_folder(output, overwrite=True) as folder:
                adapter.write(folder)
                copy_companions(self.options.model, folder)
                if self.given.apart:
                    shutil.copytree(self.folder / BASE, folder / BASE)
                about = {"adapter_parameters": costs.adapter_parameters(supernet, found), "base": base}
                if self.task.name == "classification":
                    about["labels"] = list(supernet.base.config.id2label.values())
                write_json(folder / ARCHITECTURE_FILE, {"architecture": dict(found), "digest": found.digest, **about})
            names = {int(number): name for number, name in supernet.base.config.id2label.items()}
            few = len(names) <= 8  # else they are to be read in architecture.json
            labels = f", id2label={names}" if few else f", num_labels={len(names)}"
            labels = labels if self.fresh_head else ""
            snippet = f"peft.{_PEFT_CLASSES[self.task.name]}.from_pretrained({str(output)!r}{labels})"
            if quantised_layers(supernet.base):  # peft needs weights, which transformers leaves packed
                unpacked = "quantization_config=transformers.CompressedTensorsConfig(dequantize=True)"
                auto = self.task.auto_class.__name__
                snippet = f"transformers.{auto}.from_pretrained({base!r}, {unpacked}{labels})"
                snippet = f"peft.PeftModel.from_pretrained({snippet}, {str(output)!r})"
            self.record.note("export", loadability="stock", snippet=snippet)

    def _told(self, supernet: Supernet, found: Architecture) -> LoraResult:
        if not self.record.finished("compare"):
            with self.record.stage("compare"):
                self.record.note("compare", rows=self._compared(supernet, found))
        rows = self.record.numbers("compare")["rows"]
        table = adapter_table(rows, quality=self.task.quality)
        searched = self.record.numbers("search")
        self.say(f"{table}\nfound by {searched['evaluations']} evaluations in {searched['seconds']:.0f} s")
        self.say(f"{self.given.output_folder}: {self.record.numbers('export')['snippet']}")
        return LoraResult(found, tuple(rows), table, self.record.data, self.folder)

    def _compared(self, supernet: Supernet, found: Architecture) -> list[dict[str, Any]]:
        """Rows of the table: the largest, what heuristics choose, what was found, the smallest."""
        space = supernet.space
        points = {"largest": space.largest(), "found": found, "midpoint": space.midpoint()}
        points |= {n: space.canonical(p) for n, p in self.record.numbers("train").get("selected", {}).items()}
        points["smallest"] = space.smallest()
        measures = self.task.measures(supernet, self.data.validation)
        limits = feasibility(supernet, dict(self.options.within or {}))
        rows: list[dict[str, Any]] = []
        if self.given.compressed and not (self.fresh_head or quantised_layers(parent := self._parent())):
            quality = plain_quality(self.task, parent, self.data.validation, parent=parent)
            rows.append({"name": "parent", "adapter_parameters": 0, self.task.quality[-1]: quality})
        if not self.fresh_head:
            with supernet.model.disable_adapter():
                values = recorded(objectives.evaluated(measures, space.largest()))
            base = self._base_costs(supernet, space.largest())
            name = "base without adapters" if self.given.compressed else "parent"
            rows.append({"name": name, "adapter_parameters": 0, **base, **values})
        for name, point in points.items():
            row = {"name": name, "adapter_parameters": costs.adapter_parameters(supernet, point)}
            values = recorded(objectives.evaluated(measures, point))
            over = {} if limits.allows(point) else {"over_limit": True}
            rows.append({**row, **over, **self._base_costs(supernet, point), **values, "architecture": dict(point)})
        return rows

    @staticmethod
    def _base_costs(supernet: Supernet, point: Architecture) -> dict[str, int]:
        """Parameters and MACs once merged; only where the base is elastic do they differ."""
        if not supernet.layer_parts:
            return {}
        macs = costs.macs(supernet, point, seq_len=costs.LATENCY_TOKENS)
        return {"parameters": costs.parameters(supernet, point), "macs": macs}


def _resumable(folder: Path) -> str | None:
    """The newest whole checkpoint that has its statistics: a run may be killed before they are written.

    Raises:
        CheckpointError: one without cannot be removed.
    """
    found = last_complete_checkpoint(folder)
    while found is not None and not (Path(found) / STATISTICS_FILE).is_file():
        remove_folder(Path(found))
        if Path(found).is_dir():
            raise CheckpointError(f"{found} has no {STATISTICS_FILE} and cannot be removed; delete it to go on")
        found = last_complete_checkpoint(folder)
    return found


_PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
_PEFT_CLASSES = {
    "causal-lm": "AutoPeftModelForCausalLM",
    "classification": "AutoPeftModelForSequenceClassification",
    "masked-lm": "AutoPeftModel",
}
