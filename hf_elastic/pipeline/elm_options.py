"""What a run of ELM can be asked for, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from hf_elastic.errors import DataError, SearchError, SpaceError, TrainingError
from hf_elastic.fusion import FusionMode
from hf_elastic.pipeline.options import CompressOptions, Device, Precision, TaskName, _is_number, _name_of
from hf_elastic.spaces import ELM_SIZES
from hf_elastic.tables.timing import Phase

Distilled = Literal["relational", "mse", "none"]
Fused = Literal[FusionMode, "none"]
Start = Literal["inherit", "fresh"]
DECISIONS = 10
"""How often blocks may grow: the paper has ten epochs, with a growth behind each."""
_FEWEST_EVALUATIONS = 4  # the midpoint, the even cut, largest and smallest are evaluated in any case


@dataclass(frozen=True)
class ElmOptions:
    """Everything a run of ELM (arXiv 2510.27037) takes. Paths and names are strings, so that a run can be continued.

    Attributes:
        teacher: folder of a checkpoint, or its name on the Hub. The student takes its tokenizer, its vocabulary and its
            task: a decoder is distilled into an ``elastic_gpt2``, any encoder into an ``elastic_bert``.
        data: text (``.txt``), rows (``.jsonl``, ``.csv``) or the name of a data set on the Hub; several are joined.
        output: folder of the found model. The work of the run is kept beside it, in ``<output>.run``.
        size: ``small``, ``tiny`` or ``micro``, see :data:`hf_elastic.spaces.ELM_SIZES`.
        layers: depth of the student, of which the teacher's is a multiple; by default that of the size, or the largest
            one below it that divides the teacher's.
        task: what the teacher is for; ``auto`` reads it off the checkpoint's class.
        epochs: of the supernet; the paper has 10.
        steps: at most so many for the supernet; the retraining is shortened with it. A stream needs it.
        retrain_epochs: of the found path; by default as many as of the supernet, 0 for none. Where ``steps`` shortens
            the supernet's training, an epoch of this one is shortened likewise: to ``steps / epochs`` steps.
        batch_size: sequences per step; the paper has 256.
        sequence_length: tokens of each.
        learning_rate: peak of both trainings. The default is for little data, the paper has 1e-4.
        dropout: of the student; the paper has 0.1, which short trainings do not need.
        distill: ``relational`` compares states by their correlation, as the paper; ``mse`` by their distance; ``none``
            learns from the text alone.
        growth: whether blocks start narrow and grow by their PCA scores. Otherwise all have the one width, of those
            that growth goes through, whose mean path is nearest to the budget.
        total_parameters: what the mean path is to have when growth ends; by default
            :func:`hf_elastic.spaces.elm_budget`.
        growth_every: steps from one growth to the next; the paper has one behind each of ten epochs. By default an
            eleventh of the steps: ten growths, and some training behind the last.
        calc_freq: steps from one PCA score to the next; the paper has 30. By default 24 scores between two growths, at
            most every 30 steps.
        fusion: what becomes of heads that write alike in the found path: ``merge``, ``remove`` or ``resplit`` (see
            :func:`hf_elastic.fusion.fuse_heads_`), or ``none``.
        threshold: CKA above which heads are alike, above 0 and at most 1. At least two heads of a block stay.
        weights: what the found path is trained from: ``inherit``: what it has in the supernet; ``fresh``: new weights,
            as the paper has it.
        evaluations: how many paths the search may evaluate; at least 4.
        within: limits of the search by name of a cost (``total_parameters``, ``parameters``, ``macs``); up to 1 a
            fraction of the largest path's, above 1 an absolute number. By default, unless there is another limit,
            ``total_parameters`` up to that of ``total_parameters=``, as in the paper.
        speedup: how many times faster than the teacher, such as ``1.7`` or ``"1.7@16x128"`` (sequences x tokens).
        latency: of a forward, such as ``"8ms"`` or ``"8ms@16x128"``. Both are searched for in a latency table that is
            measured on this device before anything is trained.
        phase: what these two are of: ``prefill`` or ``decode``.
        finetune: rows with text and labels (``.jsonl``, ``.csv``) that the retrained model is fine-tuned on to
            classify, nine tenths of them to train and one to measure; the classifier is written to
            ``<output>/classifier``.
        finetune_epochs: of that; the paper has 10.
        finetune_learning_rate: peak of that; the paper has 5e-5.
        text_column, label_column: columns of rows.
        stream: whether data are read while they are trained on, in their own order, for text that does not fit into
            memory.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on a GPU.
        seed: of everything random.
        device: ``auto`` takes a GPU if there is one.
    """

    teacher: str
    data: tuple[str, ...]
    output: str
    size: str = "micro"
    layers: int | None = None
    task: TaskName = "auto"
    epochs: float = 10
    steps: int | None = None
    retrain_epochs: float | None = None
    batch_size: int = 32
    sequence_length: int = 128
    learning_rate: float = 1e-3
    dropout: float = 0.0
    distill: Distilled = "relational"
    growth: bool = True
    total_parameters: float | None = None
    growth_every: int | None = None
    calc_freq: int | None = None
    fusion: Fused = "merge"
    threshold: float = 0.9
    weights: Start = "inherit"
    evaluations: int = 200
    within: Mapping[str, float] | None = None
    speedup: str | float | None = None
    latency: str | None = None
    phase: Phase = "prefill"
    finetune: tuple[str, ...] = ()
    finetune_epochs: float = 3
    finetune_learning_rate: float = 3e-4
    text_column: str = "text"
    label_column: str = "label"
    stream: bool = False
    precision: Precision = "auto"
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", _name_of(self.teacher, option="teacher"))
        if not isinstance(self.size, str) or self.size not in ELM_SIZES:
            raise SpaceError(f"size={self.size!r} is not one of {', '.join(ELM_SIZES)}")
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise TrainingError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        rows = (self.finetune,) if isinstance(self.finetune, str) else self.finetune
        if not isinstance(rows, Sequence) or not all(isinstance(name, str) and name for name in rows):
            raise DataError(f"finetune={self.finetune!r} is no tuple of names of files with labelled rows")
        object.__setattr__(self, "finetune", tuple(rows))
        if type(self.evaluations) is not int or self.evaluations < _FEWEST_EVALUATIONS:
            raise SearchError(f"evaluations={self.evaluations!r} must be an integer of at least {_FEWEST_EVALUATIONS}")
        shared = self.compress  # raises where something of it is malformed
        for name in ("data", "output", "speedup"):
            object.__setattr__(self, name, getattr(shared, name))
        object.__setattr__(self, "within", dict(self.within) if self.within is not None else None)
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise TrainingError(f"{name}={value!r} must be an integer of at least {least}")
        for name in ("epochs", "finetune_epochs", "finetune_learning_rate"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise TrainingError(f"{name}={value!r} must be a number above 0")
        budget = self.total_parameters
        if budget is not None and not (_is_number(budget) and budget > 1):
            raise TrainingError(f"total_parameters={budget!r} must be a number of parameters above 1, no fraction")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout={self.dropout!r} must be a number of at least 0 and below 1")
        if not _is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise TrainingError(f"threshold={self.threshold!r} must be a number above 0 and at most 1")
        again = self.retrain_epochs
        if again is not None and not (_is_number(again) and again >= 0):
            raise TrainingError(f"retrain_epochs={again!r} must be a number of at least 0")

    def _check_together(self) -> None:
        if self.stream and self.steps is None:
            raise TrainingError("stream=True reads data of unknown length; say how many steps=")
        if self.retrain_epochs == 0 and self.weights == "fresh":
            raise TrainingError("weights='fresh' with retrain_epochs=0 would export weights that were never trained")
        if not self.growth:
            for name in ("growth_every", "calc_freq"):
                if getattr(self, name) is not None:
                    raise TrainingError(f"{name}= is of growth, which growth=False leaves out")
        if self.steps is not None and self.growth_every is not None and self.growth_every > self.steps:
            raise TrainingError(
                f"growth_every={self.growth_every} is more than steps={self.steps}, so no block would grow"
            )

    @cached_property
    def compress(self) -> CompressOptions:
        """The teacher and its data as ``compress`` names them: how text is read, cut and split."""
        others = self.speedup is not None or self.latency is not None
        return CompressOptions(
            model=self.teacher, data=self.data, output=self.output, task=self.task, speedup=self.speedup,
            latency=self.latency, phase=self.phase, evaluations=self.evaluations, loadability="any",
            within=self.within if self.within is not None or others else {"total_parameters": 1.0},
            sequence_length=self.sequence_length, batch_size=self.batch_size, learning_rate=self.learning_rate,
            text_column=self.text_column, label_column=self.label_column, precision=self.precision, seed=self.seed,
            device=self.device,
        )  # fmt: skip

    @property
    def output_folder(self) -> Path:
        """Where the found model goes."""
        return self.compress.output_folder

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its work: ``<output>.run``."""
        return self.compress.run_folder

    @property
    def timed(self) -> bool:
        """Whether a limit is on time, so that a latency table is needed."""
        return self.speedup is not None or self.latency is not None

    def limits(self, budget: float) -> dict[str, float]:
        """Limits of the search on costs; on total parameters up to the budget of growth where none is asked for."""
        if self.within is None and not self.timed:
            return {"total_parameters": float(budget)}
        return dict(self.within or {})

    def to_dict(self) -> dict[str, Any]:
        """Returns what identifies the run, JSON-ready; ``output`` is where, not what."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data |= {"data": list(self.data), "finetune": list(self.finetune)}
        del data["output"]
        return data


_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "distill": get_args(Distilled),
    "fusion": (*get_args(FusionMode), "none"),
    "weights": get_args(Start),
}


def in_words_of_options(text: str) -> str:
    """Names options as the command line does where an error names them as Python does."""
    names = "|".join(entry.name for entry in fields(ElmOptions))
    text = re.sub(r"\b(growth|stream)=True\b", r"--\1", re.sub(r"\bgrowth=False\b", "--no-growth", text))

    def option(found: re.Match[str]) -> str:
        value = found["quoted"] if found["quoted"] is not None else found["value"]
        return f"--{found['name'].replace('_', '-')}{' ' if value else ''}{value}"

    # a limit on total_parameters is no option
    return re.sub(rf"(?<!keeps )\b(?P<name>{names})=(?:'(?P<quoted>[^']*)'|(?P<value>[^\s,;.)']?))", option, text)


_WHOLE: Mapping[str, int] = {"layers": 1, "steps": 1, "growth_every": 1, "calc_freq": 1}
