"""Studies of adapters on labelled text: fixed ranks, elastic ranks, and an elastic base, trained alike and tested."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_elastic import costs, objectives
from hf_elastic.adapters import ElasticLoraConfig, SubnetStatistics, add_lora, fixed_lora, load_fixed_lora
from hf_elastic.checkpoint import extract
from hf_elastic.checkpoint.exporting import zero_share
from hf_elastic.checkpoint.run_record import RunRecord
from hf_elastic.compression import quantize_, sparsify_
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.files import only_worker, whole_folder
from hf_elastic.importance import sort_by_importance_
from hf_elastic.layers import evaluating
from hf_elastic.packed_format import integer_bits
from hf_elastic.pipeline.limits import AmongSubnets, feasibility, near_limit
from hf_elastic.pipeline.tasks import load_with_classifier, one_line
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.search import search_subnets
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import Distillation, ElasticTrainer, FixedSubnet, RandomSubnet, SamplingRule

Batch = dict[str, torch.Tensor]
Make = Callable[[PreTrainedModel, list[str]], Supernet]
"""Makes a parent with a new classifier elastic; the list names the modules of the classifier, trained as a whole."""


@dataclass(frozen=True)
class Plan:
    """What all trainings of a study have in common.

    Attributes:
        model: folder or Hub name of the parent.
        train, test: files of labelled rows.
        label: column of the labels.
        text: column of the text.
        steps: of each training.
        validation: rows split off the training rows, for the search.
        most_rows: of the training rows, drawn once; fewer train faster.
        learning_rate: peak.
        batch_size: rows a step.
        sequence_length: tokens, at most.
        evaluations: of each search.
        seed: of weights, order and draws.
        sparsity: share of zeros that Wanda makes in the parent before anything is trained.
    """

    model: str
    train: str
    test: str
    label: str = "label"
    text: str = "text"
    steps: int = 600
    validation: int = 500
    most_rows: int = 20_000
    learning_rate: float = 2e-3
    batch_size: int = 32
    sequence_length: int = 64
    evaluations: int = 60
    seed: int = 0
    sparsity: float = 0.0


class Study:
    """Trains one parent in several ways on the same rows, and keeps what was measured in ``result.json``.

    Args:
        plan: what they have in common.
        folder: where numbers are kept; what is there already is not measured again.
        say: where progress lines go.

    Raises:
        ElasticError: the parent or the rows cannot be read, or the folder holds another study.
    """

    def __init__(self, plan: Plan, folder: Path, *, say: Callable[[str], None] = print) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        rows, test = (read_rows((name,), text_column=plan.text) for name in (plan.train, plan.test))
        for row in (*rows[:1], *test[:1]):
            if plan.label not in row:
                raise DataError(f"a row has no column {plan.label!r}, only {sorted(row)}; set label")
        self.labels = sorted({str(row[plan.label]) for row in rows})
        random.Random(0).shuffle(rows)  # the same split for every seed
        rows = rows[: plan.most_rows]
        try:
            tokenizer = AutoTokenizer.from_pretrained(plan.model, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            raise CheckpointError(f"cannot load the tokenizer of {plan.model!r}: {one_line(error)}") from error
        self._collate = DataCollatorWithPadding(tokenizer)
        encode = self._encoder(tokenizer)
        held = min(plan.validation, len(rows) // 5)
        self.train = encode(rows[held:])
        self.validation, self.test = self._batches(encode(rows[:held])), self._batches(encode(test))
        self.record = RunRecord(folder, asdict(plan))

    def _encoder(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
        numbers = {name: number for number, name in enumerate(self.labels)}

        def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            texts = [row[self.plan.text] for row in rows]
            ids = tokenizer(texts, truncation=True, max_length=self.plan.sequence_length)["input_ids"]
            labels = [numbers[str(row[self.plan.label])] for row in rows]
            return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]

        return encode

    def _batches(self, features: list[dict[str, Any]]) -> list[Batch]:
        ordered = sorted(features, key=lambda feature: len(feature["input_ids"]))
        return [dict(self._collate(ordered[i : i + 64])) for i in range(0, len(ordered), 64)]

    def parent(self) -> tuple[PreTrainedModel, list[str]]:
        """The parent with a new classifier, and the modules trained as a whole: what is new, and its pooler."""
        model, head = load_with_classifier(self.plan.model, self.labels, seed=self.plan.seed)
        if self.plan.sparsity:
            sparsify_(model, self.calibration(), sparsity=self.plan.sparsity)
        return model, head

    def calibration(self) -> list[Batch]:
        """Training rows without labels."""
        return [{n: v for n, v in batch.items() if n != "labels"} for batch in self._batches(self.train[:1500])]

    def fixed(self, name: str, *, rank: int, targets: Sequence[str]) -> list[dict[str, Any]]:
        """Trains stock LoRA of one rank, keeps it in the folder, and returns its one row."""
        return self._measured(name, lambda: self._fixed(name, rank, targets))

    def _fixed(self, name: str, rank: int, targets: Sequence[str]) -> list[dict[str, Any]]:
        model, head = self.parent()
        adapted = fixed_lora(model, rank=rank, targets=targets, head=head, seed=self.plan.seed)
        seconds = self._train(adapted, None, None)
        with whole_folder(self._adapters(name), overwrite=True) as folder:
            adapted.save_pretrained(str(folder))
        trained = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
        return [{"subnet": f"rank {rank}", "accuracy": self._accuracy(adapted), "adapter_parameters": trained,
                 "macs_share": 1.0, "train_seconds": seconds}]  # fmt: skip

    def head_alone(self, name: str) -> list[dict[str, Any]]:
        """Trains the classifier without adapters and returns its one row."""

        def measure() -> list[dict[str, Any]]:
            model, head = self.parent()
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(any(f"{part}." in f"{path}." for part in head))
            seconds = self._train(model, None, None)
            return [{"subnet": "-", "accuracy": self._accuracy(model), "adapter_parameters": 0, "macs_share": 1.0,
                     "train_seconds": seconds, "zeros": zero_share(model)}]  # fmt: skip

        return self._measured(name, measure)

    def merged(
        self, name: str, config: Callable[[list[str]], ElasticLoraConfig], *, bits: int | None = None
    ) -> list[dict[str, Any]]:
        """Trains adapters that are part of the weight, at their largest rank, merges them, and returns the one row.

        Args:
            name: of the row.
            config: makes the configuration, given the modules of the classifier.
            bits: of the integers that the base is rounded to beforehand.
        """

        def measure() -> list[dict[str, Any]]:
            model, head = self.parent()
            if bits is not None:
                quantize_(model, self.calibration(), bits=bits)
            supernet = add_lora(model, config(head), seed=self.plan.seed)
            largest = supernet.space.largest()
            seconds = self._train(supernet.model, supernet, FixedSubnet(largest))
            one = extract(supernet, largest, merge=True)
            return [{"subnet": "merged", "accuracy": self._accuracy(one), **self._costs(supernet, largest),
                     "train_seconds": seconds, "zeros": zero_share(one), "bits": integer_bits(one)}]  # fmt: skip

        return self._measured(name, measure)

    def _adapters(self, name: str) -> Path:
        return self.folder / "adapters" / re.sub(r"\W+", "-", name)

    def trained(self, name: str) -> nn.Module:
        """What :meth:`fixed` trained under this name.

        Raises:
            CheckpointError: nothing was.
        """
        if not self._adapters(name).is_dir():
            raise CheckpointError(f"{self.folder} keeps no adapters of {name!r}; train them with fixed() first")
        return load_fixed_lora(self.parent()[0], self._adapters(name))

    def elastic(
        self,
        name: str,
        make: Make,
        *,
        within: Mapping[str, float],
        near: bool = False,
        judged_by: Literal["accuracy", "loss"] = "accuracy",
        teacher: str | None = None,
        further: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Trains elastic adapters, searches them, and returns the rows of the largest, found, middle and other subnets.

        Args:
            name: of the rows.
            make: makes the parent elastic.
            within: limits of the search; the first names its second objective.
            near: whether training draws subnets near the limits only, rather than from the whole space.
            judged_by: what of the validation rows the search looks at. Where candidates differ by less than a row in a
                hundred, their losses say more than their accuracies.
            teacher: name of what :meth:`fixed` trained; its logits are learned from, besides the labels.
            further: how long the found subnet alone is trained afterwards, as a share of the steps, at half the peak
                learning rate. Whether that helped is for the validation rows to say: of both states ``kept`` is the one
                that is better there.

        Raises:
            CheckpointError: the teacher was not trained.
            ElasticError: what :func:`~hf_elastic.search_subnets` and training raise.
        """

        def measure() -> list[dict[str, Any]]:
            distill = Distillation(teacher=self.trained(teacher)) if teacher else None
            return self._elastic(
                make, dict(within), near=near, judge=judged_by, distill=distill, further=further
            )  # fmt: skip

        return self._measured(name, measure)

    def _elastic(
        self,
        make: Make,
        within: dict[str, float],
        *,
        near: bool,
        judge: str,
        distill: Distillation | None,
        further: float,
    ) -> list[dict[str, Any]]:
        supernet = make(*self.parent())
        limits = feasibility(supernet, within)
        rule: SamplingRule = RandomSubnet(self.plan.seed)
        if near:
            rule = AmongSubnets(near_limit(supernet, limits, seed=self.plan.seed), self.plan.seed)
        statistics = SubnetStatistics(supernet)
        seconds = self._train(supernet.model, supernet, rule, statistics, distill=distill)
        began = time.perf_counter()
        quality = (objectives.loss if judge == "loss" else objectives.accuracy)(supernet, self.validation)
        goals = [quality, objectives.related_costs(supernet)[next(iter(within))]]
        result = search_subnets(
            supernet.space, goals, evaluations=self.plan.evaluations, within=within, seed=self.plan.seed
        )
        found = result.best(judge, within=within).architecture
        spent = time.perf_counter() - began
        space = supernet.space
        points = {
            "largest": space.largest(), "found": found, "midpoint": space.midpoint(), "smallest": space.smallest(),
            "most frequent": statistics.most_frequent(), "lowest loss": statistics.lowest_loss_values(),
            "most active": statistics.most_active(),
        }  # fmt: skip
        rows = []
        for label, point in points.items():
            with supernet.activate(point):
                row = {"subnet": label, "accuracy": self._accuracy(supernet.model), **self._costs(supernet, point)}
            rows.append({**row, "train_seconds": seconds})
        rows[1] |= {"evaluations": len(result.evaluations), "search_seconds": spent, "space": str(space.size)}
        if further:
            before = objectives.evaluated([quality], found)[judge]
            more = self._train(
                supernet.model, supernet, FixedSubnet(found), share=further, slower=0.5, distill=distill
            )  # fmt: skip
            after = objectives.evaluated([quality], found)[judge]
            with supernet.activate(found):
                row = {"subnet": "found, trained further", "accuracy": self._accuracy(supernet.model)}
            rows.append({**row, **self._costs(supernet, found), "train_seconds": seconds + more})
            better = after < before if judge == "loss" else after > before
            rows.append({**rows[-1 if better else 1], "subnet": "kept", "train_seconds": seconds + more})
        return rows

    def _measured(self, name: str, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        with only_worker(self.folder):
            if not self.record.finished(name):
                with self.record.stage(name):
                    found = [{"method": name, "seed": self.plan.seed, **row} for row in measure()]
                    self.record.note(name, rows=found)
        rows: list[dict[str, Any]] = self.record.numbers(name)["rows"]
        for row in rows:
            self.say(f"seed {row['seed']}  {name}, {row['subnet']}: accuracy {row['accuracy']:.4f}")
        return rows

    @staticmethod
    def _costs(supernet: Supernet, point: Architecture) -> dict[str, float]:
        share = 1.0
        if supernet.layer_parts:
            whole = costs.macs(supernet, supernet.space.largest(), seq_len=costs.LATENCY_TOKENS)
            share = costs.macs(supernet, point, seq_len=costs.LATENCY_TOKENS) / whole
        return {"adapter_parameters": costs.adapter_parameters(supernet, point), "macs_share": share}

    def _train(
        self,
        model: nn.Module,
        supernet: Supernet | None,
        rule: SamplingRule | None,
        *callbacks: Any,
        share: float = 1.0,
        slower: float = 1.0,
        distill: Distillation | None = None,
    ) -> float:
        """Trains for a share of the plan's steps, at a part of its peak rate; returns the seconds that it took."""
        plan = self.plan
        steps, rate = max(1, round(share * plan.steps)), slower * plan.learning_rate
        args = TrainingArguments(
            str(self.folder / "training"), max_steps=steps, per_device_train_batch_size=plan.batch_size,
            learning_rate=rate, warmup_steps=max(1, steps // 16), lr_scheduler_type="linear",
            weight_decay=0.0, report_to="none", save_strategy="no", logging_strategy="no", seed=plan.seed,
            remove_unused_columns=False, train_sampling_strategy="group_by_length", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        common: dict[str, Any] = {"args": args, "train_dataset": self.train, "data_collator": self._collate}
        common["callbacks"] = list(callbacks)
        trainer: Any = (
            Trainer(model=model, **common)
            if supernet is None or rule is None
            else ElasticTrainer(supernet=supernet, sampling=rule, distill=distill or False, **common)
        )
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began

    def _accuracy(self, model: nn.Module) -> float:
        right = total = 0
        with evaluating(model), torch.inference_mode():
            device = next(model.parameters()).device
            for batch in self.test:
                feed = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                right += int((model(**feed).logits.argmax(-1).cpu() == batch["labels"]).sum())
                total += len(batch["labels"])
        return right / total

    def sorted_(self, supernet: Supernet) -> None:
        """Sorts neurons and heads of an elastic base by importance, on training rows."""
        sort_by_importance_(supernet, self.calibration())
