"""Which sub-adapter to take without a search: what a training has shown about subnets, as architectures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_elastic.adapters.lora_part import LoraPart, lora_parts
from hf_elastic.errors import DataError, TrainingError
from hf_elastic.files import read_json, write_json
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet

STATISTICS_FILE = "subnet_statistics.json"
_WINDOW = 64  # recorded losses on both sides that a loss is compared with: training lowers all of them


class SubnetStatistics(TrainerCallback):
    """Records, while a supernet is trained, which subnets ran, with which loss, and what each rank contributed.

    A callback for any Trainer beside ``SubnetSamplingCallback`` or ``ElasticTrainer``; or a context manager around a
    training loop of one's own. Statistics are written into every checkpoint and read back when a run resumes. With
    several processes each records its own batches.

    The heuristics are those that the official code of Shears and SQFT offers (arXiv 2501.16372; the example of NNCF
    2.17 that SQFT's README refers to): the middle (``supernet.space.midpoint()``), what was drawn most often, and what
    had the lowest loss. How those of the paper weigh losses is not published; ours is said at each method.

    Args:
        supernet: what is trained; its model returns its loss where labels are given.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self._drawn: list[Architecture] = []
        self._losses: list[Tensor | float] = []
        self._energy: dict[str, Tensor] = {}  # by adapter and module: sums of squares of each component of A x
        self._tokens: dict[str, Tensor] = {}  # and of how many tokens
        self._hooks = ExitStack()
        self._written: int | None = None  # the step whose checkpoint has them

    def __enter__(self) -> SubnetStatistics:
        self._hooks.close()
        self._hooks.callback(self.supernet.model.register_forward_hook(self._on_forward).remove)
        for part in lora_parts(self.supernet.adapter_parts):
            self._hooks.callback(part.up.register_forward_pre_hook(self._on_components(part)).remove)
            self._hooks.enter_context(part.observed())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to record, after what the resumed checkpoint holds.

        Raises:
            TrainingError: the run resumes from a checkpoint without statistics.
        """
        self._written = None
        if state.global_step > 0:
            file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATISTICS_FILE
            if not file.is_file():
                raise TrainingError(
                    f"{file} is missing: resume with the callbacks that the run began with, or start anew"
                )
            self._read(file)
        else:
            self._drawn, self._losses, self._energy, self._tokens = [], [], {}, {}
        self.__enter__()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends recording where a run that was over when it was resumed does a step all the same."""
        if state.global_step >= state.max_steps:
            self._hooks.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the statistics into the checkpoint, before what makes it whole."""
        if control.should_save and state.global_step <= state.max_steps:  # none of a step too many
            self.on_save(args, state, control)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes them, unless they are written: another callback may have asked for the checkpoint last."""
        if state.is_world_process_zero and self._written != state.global_step:
            self.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATISTICS_FILE)
            self._written = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends recording."""
        self._hooks.close()

    def _on_forward(self, model: nn.Module, _inputs: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if model.training and torch.is_grad_enabled() and loss is not None:
            self._drawn.append(self.supernet.active)
            self._losses.append(loss.detach())

    def _on_components(self, part: LoraPart) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training and torch.is_grad_enabled():
                components = inputs[0].detach().float().flatten(0, -2)  # (tokens, r)
                energy = self._energy.setdefault(_key(part), components.new_zeros(part.ranks[-1]))
                tokens = self._tokens.setdefault(_key(part), components.new_zeros(part.ranks[-1]))
                energy[: components.shape[1]] += components.square().sum(0)
                tokens[: components.shape[1]] += len(components)

        return record

    # -- heuristics ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many forward passes with a loss were recorded."""
        return len(self._losses)

    def most_frequent(self) -> Architecture:
        """The value of each choice that was drawn most often; of equally frequent ones the larger.

        Raises:
            DataError: nothing was recorded.
        """
        drawn = self._recorded()
        picked: dict[str, Value] = {}
        for choice in self.supernet.space:
            effective = [a[choice.name] for a in drawn if choice.name in self.supernet.space.in_effect(a)]
            picked[choice.name] = max(choice.descending, key=effective.count)
        return self.supernet.space.canonical(picked)

    def lowest_loss(self, count: int = 5) -> tuple[Architecture, ...]:
        """Whole architectures by their mean relative loss, the lowest first: candidates to be evaluated.

        Losses are divided by the mean of those recorded around them, as training lowers them all (ours).

        Args:
            count: how many.

        Raises:
            DataError: nothing was recorded.
        """
        drawn, losses = self._recorded(), self._relative_losses()
        found: dict[Architecture, list[float]] = {}
        for architecture, loss in zip(drawn, losses, strict=True):
            found.setdefault(architecture, []).append(loss)
        means = {architecture: sum(values) / len(values) for architecture, values in found.items()}
        return tuple(sorted(means, key=lambda architecture: (means[architecture], architecture.digest))[:count])

    def lowest_loss_values(self) -> Architecture:
        """The value of each choice with the lowest mean relative loss over the steps that it had an effect in (ours).

        Where architectures are many, each is drawn once and its loss says more about its batch than about it; a value
        is drawn many times.

        Raises:
            DataError: nothing was recorded.
        """
        drawn, losses = self._recorded(), self._relative_losses()
        picked: dict[str, Value] = {}
        for choice in self.supernet.space:
            seen: dict[Value, list[float]] = {}
            for architecture, loss in zip(drawn, losses, strict=True):
                if choice.name in self.supernet.space.in_effect(architecture):
                    seen.setdefault(architecture[choice.name], []).append(loss)
            means = {value: sum(values) / len(values) for value, values in seen.items()}
            known = [value for value in choice.descending if value in means]
            picked[choice.name] = min(known, key=means.__getitem__) if known else choice.midpoint
        return self.supernet.space.canonical(picked)

    def most_active(self, share: float = 0.9) -> Architecture:
        r"""The smallest ranks whose first components hold a share of the adapters' activation; else the midpoint.

        Component ``k`` of a module contributes :math:`s\, (Ax)_k B_{:,k}` to its output; its activation is
        :math:`\mathrm{mean}_x (Ax)_k^2 \, \lVert B_{:,k} \rVert^2` over the tokens of training on which it was active.
        Modules that share a choice are averaged. Choices other than ranks take their middle value.

        Args:
            share: of the sum over all components, in (0, 1].

        Raises:
            DataError: nothing was recorded, or ``share`` is out of range.
        """
        if not 0 < share <= 1:
            raise DataError(f"share={share!r} must be above 0 and at most 1")
        if not self._energy:
            raise DataError("no activation was recorded; train with this callback first")
        held: dict[str, list[Tensor]] = {}
        for part in lora_parts(self.supernet.adapter_parts):
            if len(part.ranks) > 1 and _key(part) in self._energy:
                held.setdefault(part.choice_name, []).append(self._held(part))
        picked: dict[str, Value] = dict(self.supernet.space.midpoint())
        for choice in self.supernet.space:
            if choice.name in held:
                mean = torch.stack(held[choice.name]).mean(0)  # (R,)
                enough = [rank for rank in choice.values if float(mean[int(rank) - 1]) >= share - 1e-6]
                picked[choice.name] = enough[0]
        return self.supernet.space.canonical(picked)

    def _held(self, part: LoraPart) -> Tensor:
        """Share of the activation that the first ``k`` components hold, ``(R,)``, ending in 1."""
        name = _key(part)
        mean = self._energy[name] / self._tokens[name].clamp(min=1)
        energy = mean * part.up.weight.detach().float().square().sum(0).to(mean.device)  # (R,)
        total = energy.sum()
        return energy.cumsum(0) / total if total > 0 else torch.ones_like(energy)

    def _recorded(self) -> list[Architecture]:
        if not self._drawn:
            raise DataError(
                "no loss was recorded: train with this callback first, on batches with labels, with a model that "
                "returns its loss"
            )
        return self._drawn

    def _relative_losses(self) -> list[float]:
        losses = [float(loss) for loss in self._losses]
        around = [losses[max(0, i - _WINDOW) : i + _WINDOW + 1] for i in range(len(losses))]
        return [loss * len(near) / (sum(near) or 1.0) for loss, near in zip(losses, around, strict=True)]

    # -- keeping ------------------------------------------------------------------------------------------------------

    def save(self, file: str | Path) -> None:
        """Writes what was recorded as JSON, whole or not at all."""
        data = {
            "space": self.supernet.space.digest,
            "drawn": [list(self.supernet.space.encode(architecture)) for architecture in self._drawn],
            "losses": [float(loss) for loss in self._losses],
            "energy": {name: values.tolist() for name, values in self._energy.items()},
            "tokens": {name: values.tolist() for name, values in self._tokens.items()},
        }
        write_json(Path(file), data)

    def _read(self, file: Path) -> None:
        data = read_json(file)
        if data.get("space") != self.supernet.space.digest:
            raise TrainingError(f"{file} was recorded in another space; start anew in another folder")
        self._drawn = [self.supernet.space.decode(indices) for indices in data["drawn"]]
        self._losses = list(data["losses"])
        device = self.supernet.base.device
        self._energy = dict(_tensors(data["energy"], device=device))
        self._tokens = dict(_tensors(data["tokens"], device=device))


def _key(part: LoraPart) -> str:
    return f"{part.adapter}:{part.module_name}"


def _tensors(lists: dict[str, Sequence[float]], *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, values in lists.items():
        yield name, torch.tensor(values, device=device)
