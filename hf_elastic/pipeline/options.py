"""What ``compress`` can be asked for, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from hf_elastic.architecture import is_finite
from hf_elastic.declaration import ElasticConfig, Loadability
from hf_elastic.errors import (
    CheckpointError,
    CompressionError,
    DataError,
    ElasticError,
    SearchError,
    SpaceError,
    TrainingError,
)
from hf_elastic.families import family_of, ffn_neurons, layers_of
from hf_elastic.tables.budgets import Budgets
from hf_elastic.tables.timing import Phase

TaskName = Literal["auto", "embedding", "causal-lm", "masked-lm", "classification"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Recipe = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class CompressOptions:
    """Everything ``compress`` takes. Paths and names are strings, so that a run can be recorded and continued.

    Attributes:
        model: folder of a checkpoint, or its name on the Hub.
        data: text (``.txt``), rows (``.jsonl``, ``.csv``) or the name of a data set on the Hub; several are joined.
        output: folder of the found model. The work of the run is kept beside it, in ``<output>.run``.
        within: limits by name of a cost (``parameters``, ``total_parameters``, ``macs``); up to 1 a fraction of the
            parent's, above 1 an absolute number. By default ``parameters=0.6``, unless there is another budget.
        speedup: how many times faster than the parent, such as ``1.7`` or ``"1.7@16x128"`` (sequences x tokens; else
            1x128). It is searched for in a latency table that is measured on this device, and checked after export.
        latency: of a forward, such as ``"8ms"`` or ``"8ms@16x128"``; in us, ms or s.
        memory: of the weights and, for a model that generates, the KV cache: ``"6GB"`` or ``"6GB@8x2048"``; in MB,
            MiB, GB or GiB.
        phase: what ``speedup`` and ``latency`` are of: ``prefill``, or ``decode`` of one token with so many cached.
        task: what the model is for; ``auto`` reads it off the checkpoint's class.
        recipe: ``fast`` trains nothing: measured tables, exact search, closed-form repair. ``balanced`` then trains
            what that found. ``best`` trains a supernet, searches it, and trains what it found.
        minutes: training time on this machine; 0 trains nothing.
        share: with ``best``, the part of that time that trains the supernet; the rest trains the found subnet.
        evaluations: how many architectures the search may evaluate; at least 3.
        loadability: ``stock`` keeps to what ordinary checkpoints hold; ``any`` may need ``trust_remote_code``. A
            ``space`` has its own.
        space: which dimensions become choices; by default FFN widths and layers (and heads with ``any``).
        lora: ranks of elastic adapters, such as ``"r=32,24,16"``: the base stays frozen, adapters are trained on the
            data. Without ``space`` only ranks are chosen, within ``adapter_parameters`` (by default 0.75, or 1.0 where
            they are merged and ranks cost nothing), and a plain peft adapter is written; with a space the base is cut
            too and the merged model is written.
        sparsity: with ``lora`` and without ``space``: share of the base's weights that Wanda sets to zero before
            adapters (SQFT). Adapters keep the zeros, and the merged sparse model is written.
        bits: likewise, of the integers that GPTQ then rounds the base to; the merged model of integers is written.
        group_size: of these, neighbouring inputs that share a scale.
        apart: with ``sparsity`` or ``bits``: ordinary adapters, written beside the compressed base.
        sequence_length: longest sequence in tokens; at most the model's positions.
        batch_size: sequences per step.
        learning_rate: peak of the schedule.
        text_column, label_column: columns of rows.
        precision: ``fp32``, ``bf16``, or ``auto``: whichever a few training steps run faster in.
        seed: of everything random.
        device: ``auto`` takes a GPU if there is one.
    """

    model: str
    data: tuple[str, ...]
    output: str
    within: Mapping[str, float] | None = None
    speedup: str | float | None = None
    latency: str | None = None
    memory: str | None = None
    phase: Phase = "prefill"
    task: TaskName = "auto"
    recipe: Recipe = "best"
    minutes: float = 8.0
    share: float = 0.4
    evaluations: int = 80
    loadability: Loadability = "stock"
    space: ElasticConfig | None = None
    lora: str | None = None
    sparsity: float | None = None
    bits: int | None = None
    group_size: int = 128
    apart: bool = False
    sequence_length: int = 64
    batch_size: int = 32
    learning_rate: float = 5e-4
    text_column: str = "text"
    label_column: str = "label"
    precision: Precision = "auto"
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            object.__setattr__(self, name, _name_of(getattr(self, name), option=name))
        if isinstance(self.data, str | os.PathLike) or not isinstance(self.data, Sequence) or not self.data:
            raise DataError(
                f"data={self.data!r} is no tuple of names; pass text files, .jsonl or .csv files, or data sets"
            )
        object.__setattr__(self, "data", tuple(_name_of(name, option="data") for name in self.data))
        if not isinstance(self.space, ElasticConfig | None):
            raise SpaceError(f"space is a {type(self.space).__name__}, expected ElasticConfig(intermediate_size=[...])")
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise _ERRORS[name](f"{name}={value!r} is not one of {', '.join(allowed)}")
        self._check_budgets()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _ERRORS[name](f"{name}={value!r} must be an integer of at least {least}")
        if self.seed >= 2**32:
            raise SearchError(f"seed={self.seed} must be below 2**32")
        if not _is_number(self.minutes) or self.minutes < 0:
            raise TrainingError(f"minutes={self.minutes!r} must be a number of at least 0")
        if not _is_number(self.learning_rate) or self.learning_rate <= 0:
            raise TrainingError(f"learning_rate={self.learning_rate!r} must be a number above 0")
        if not _is_number(self.share) or not 0 <= self.share <= 1:
            raise TrainingError(f"share={self.share!r} must be a number between 0 and 1")
        if not self.output or not self.output_folder.name:
            raise CheckpointError(f"output={self.output!r} names no folder; give one that does not exist")

    @property
    def compressed(self) -> bool:
        """Whether the base is made sparse or of integers before adapters."""
        return self.sparsity is not None or self.bits is not None

    def _check_compression(self) -> None:
        if self.compressed and (self.lora is None or self.space is not None):
            raise SpaceError("sparsity= and bits= compress the base of adapters: give lora=, and no space=")
        if self.apart and not self.compressed:
            raise SpaceError("apart=True keeps adapters beside a compressed base; give sparsity= or bits=")
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise CompressionError(f"sparsity={self.sparsity!r} must be a number above 0 and below 1")

    def _check_budgets(self) -> None:
        if not isinstance(self.lora, str | None):
            raise SpaceError(f"lora={self.lora!r} must be text such as 'r=32,24,16'")
        self._check_compression()
        others = any(budget is not None for budget in (self.speedup, self.latency, self.memory))
        for name, example in (("latency", "8ms"), ("memory", "6GB")):
            if not isinstance(value := getattr(self, name), str | None):
                raise SpaceError(f"{name}={value!r} must be text with a unit, such as {example!r}")
        if not isinstance(self.within, Mapping | None):
            raise SpaceError(f"within={self.within!r} must be a dict such as {{'parameters': 0.6}}")
        default = _WITHIN_ADAPTERS if self.lora is not None and self.space is None else _WITHIN
        if self.compressed and not self.apart:
            default = _WITHIN_MERGED
        within = self.within if self.within is not None else {} if others else default
        if self.lora is not None and others:
            raise SpaceError("with lora= limits are given as within=, such as macs=0.7 or adapter_parameters=0.5")
        if not (within or others) or any(not (_is_number(limit) and limit > 0) for limit in within.values()):
            raise SpaceError(f"within={dict(within)} must name a cost and a limit above 0, such as parameters=0.6")
        object.__setattr__(self, "within", dict(within))
        if isinstance(self.speedup, int | float):
            object.__setattr__(self, "speedup", repr(self.speedup))
        budgets = self.budgets  # which raises where one is malformed
        if self.phase != CompressOptions.phase and not budgets.needs_table:
            raise SpaceError(f"phase={self.phase!r} is what a speed-up or a latency is of; give one, or leave it out")
        if (budgets.needs_table or budgets.memory is not None) and self.form == "stock-padded":
            raise SpaceError(
                "loadability='stock-padded' fills up what was cut with zeros, so it is never faster and seldom "
                "smaller; take 'stock' or 'any' with a speed-up, a latency or a memory"
            )

    @property
    def budgets(self) -> Budgets:
        """All that the found model may cost."""
        speedup = None if self.speedup is None else str(self.speedup)
        return Budgets.parse(
            speedup=speedup, latency=self.latency, memory=self.memory, within=self.within, phase=self.phase
        )

    @property
    def asked(self) -> str:
        """The budgets as they were asked for."""
        named = {name: getattr(self, name) for name in ("speedup", "latency", "memory")}
        typed = [f"{name}={value}" for name, value in named.items() if value is not None]
        return ", ".join([*typed, *(f"{name}={value:g}" for name, value in (self.within or {}).items())])

    @property
    def output_folder(self) -> Path:
        """Where the found model goes."""
        output = Path(self.output).expanduser()
        return output if output.name not in ("", "..") else output.resolve()

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its work: ``<output>.run``."""
        return self.output_folder.with_name(self.output_folder.name + ".run")

    @property
    def form(self) -> Loadability:
        """What the found model may need to load: the space's own word, if one was given."""
        return self.loadability if self.space is None else self.space.loadability

    def to_dict(self) -> dict[str, Any]:
        """Returns what identifies the run, JSON-ready; ``output`` is where, not what."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data |= {"data": list(self.data), "within": dict(self.within or {})}
        data["space"] = self.space.to_dict() if self.space else None
        del data["output"]
        return data


_WITHIN: Mapping[str, float] = {"parameters": 0.6}
_WITHIN_ADAPTERS: Mapping[str, float] = {"adapter_parameters": 0.75}
_WITHIN_MERGED: Mapping[str, float] = {"adapter_parameters": 1.0}  # a rank costs nothing once it is merged
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "task": get_args(TaskName),
    "recipe": get_args(Recipe),
    "loadability": get_args(Loadability),
    "precision": get_args(Precision),
    "device": get_args(Device),
    "phase": get_args(Phase),
}
# The search evaluates the midpoint, the even cut and the smallest architecture before it proposes any.
_LEAST: Mapping[str, int] = {"evaluations": 3, "sequence_length": 4, "batch_size": 1, "seed": 0}
_ERRORS: Mapping[str, type[ElasticError]] = {
    "task": DataError, "recipe": TrainingError, "loadability": SpaceError, "precision": TrainingError,
    "device": TrainingError, "evaluations": SearchError, "sequence_length": DataError, "batch_size": TrainingError,
    "seed": SearchError, "phase": SpaceError,
}  # fmt: skip


def _name_of(value: object, *, option: str) -> str:
    """A name or a path as a string, as a run can be recorded with."""
    if not isinstance(value, str | os.PathLike):
        raise CheckpointError(f"{option}={value!r} must be a name or a path")
    return os.fspath(value)  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return is_finite(value)


_MOST_WIDTHS = 48


def default_space(model: PreTrainedModel, loadability: Loadability) -> ElasticConfig:
    """A space for any supported model: FFN widths and whole layers; with ``any`` heads and sublayers too.

    Widths are multiples of what hardware likes (32; 8 of small models) from a quarter up, at most 48 where one width
    holds for all layers, else eighths.

    Args:
        model: to read its family and sizes.
        loadability: what may be chosen per layer.
    """
    family = family_of(model)
    multiple = 32 if model.config.hidden_size >= 256 else 8
    if loadability == "stock":
        neurons, step = ffn_neurons(model, family), multiple
        while neurons > _MOST_WIDTHS * step:
            step *= 2
        finer = [width for width in range(step, neurons + 1, step) if 4 * width >= neurons]
        return ElasticConfig(intermediate_size=finer or None, skip=["layer"], multiple_of=multiple, loadability="stock")
    kinds = ["layer"] if loadability == "stock-padded" and not family.pre_norm else ["attention", "mlp"]
    heads = {family.heads_choice: [0.25, 0.5, 0.75, 1.0]}
    return ElasticConfig(
        intermediate_size=[eighths / 8 for eighths in range(2, 9)],
        num_attention_heads=heads.get("num_attention_heads"),
        num_key_value_heads=heads.get("num_key_value_heads"),
        skip=kinds if len(layers_of(model, family)) > 1 else None,
        multiple_of=multiple,
        loadability=loadability,
    )
