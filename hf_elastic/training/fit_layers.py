"""Linear maps that make a student's states as wide as its teacher's; they are trained with it and then left behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.layers import seeded
from hf_elastic.training.sublayers import LayerStates

FIT_FILE = "fit_layers.safetensors"


class FitLayers(nn.Module):
    """Learned maps (with biases) from a student's widths to its teacher's, shared by all layers.

    One for the embedding and all outputs of layers, and one for each width that outputs of attention have: ELM (arXiv
    2510.27037) has two of these, as its candidate blocks attend in two widths. They are in single precision, and no
    part of the model: a checkpoint of a Trainer holds them in a file of their own.

    Args:
        width: of the student's embedding and outputs of layers.
        attention: widths of its outputs of attention.
        teacher: width of the teacher.
        seed: of their initialisation, that of ``nn.Linear``.
    """

    def __init__(self, width: int, *, attention: Iterable[int], teacher: int, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.states = nn.Linear(width, teacher, dtype=torch.float32)
            self.attention = nn.ModuleDict(
                {str(size): nn.Linear(size, teacher, dtype=torch.float32) for size in sorted(set(attention))}
            )

    def forward(self, states: LayerStates) -> LayerStates:
        """Map states ``(B, T, D)`` of the student to the teacher's width; logits stay as they are.

        Raises:
            TrainingError: A state has a width that there is no map for.
        """
        embedding = self._mapped(self.states, states.embedding)
        blocks = {n: self._mapped(self.states, state) for n, state in states.blocks.items()}
        attention = {n: self._mapped(self._of_attention(state), state) for n, state in states.attention.items()}
        return states._replace(embedding=embedding, attention=attention, blocks=blocks)

    def _of_attention(self, state: Tensor) -> nn.Module:
        maps = dict(self.attention.items())
        if (found := maps.get(str(state.shape[-1]))) is None:
            raise TrainingError(
                f"an output of attention is {state.shape[-1]} wide, the fit layers take {', '.join(maps)}; make the "
                "trainer after the last change of the model"
            )
        return found

    @staticmethod
    def _mapped(fit: nn.Module, state: Tensor) -> Tensor:
        mapped: Tensor = fit(state.float())  # (B, T, D of the teacher)
        return mapped

    def parameter_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups for an optimizer: the weights decay, the biases do not."""
        named = list(self.named_parameters())
        return [
            {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": weight_decay},
            {"params": [p for name, p in named if not name.endswith("weight")], "weight_decay": 0.0},
        ]

    def average_gradients(self) -> None:
        """Replace each gradient by its mean over all ranks, which must have gradients of the same parameters."""
        ranks = torch.distributed.get_world_size()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(ranks)
                torch.distributed.all_reduce(parameter.grad)

    def save_to(self, folder: str | Path) -> None:
        """Write the maps into a folder, which is made if it is missing.

        Raises:
            CheckpointError: They cannot be written.
        """
        file = Path(folder) / FIT_FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {file}: {error}") from error

    def load_from(self, folder: str | Path) -> None:
        """Take the maps out of a folder that :meth:`save_to` wrote them into.

        Raises:
            CheckpointError: They are missing, cannot be read, or are those of another student or teacher.
        """
        file = Path(folder) / FIT_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {FIT_FILE}, so its run had no fit layers; resume a checkpoint of a run with "
                "Distillation(fit=True), or start again"
            )
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}; resume from another checkpoint") from error
        given, wanted = _sizes(found), _sizes(self.state_dict())
        if given != wanted:
            raise CheckpointError(
                f"{file} holds fit layers {given}, this run has {wanted}; resume with the student and the teacher that "
                "the checkpoint was made with"
            )
        self.load_state_dict(found)


def _sizes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(tensors.items())}
