"""Routers beside checkpoints that are without them: the Trainer saves of a ``PeftModel`` the adapters alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_elastic.errors import CheckpointError
from hf_elastic.routers import router_tensors
from hf_elastic.supernet import Supernet
from hf_elastic.training.teacher import AdaptedModel

ROUTERS_FILE = "elastic_routers.safetensors"


def left_out(supernet: Supernet) -> bool:
    """Return whether checkpoints of the Trainer hold the model without its routers."""
    return bool(supernet.router_parts) and isinstance(supernet.model, AdaptedModel)


def save_beside(supernet: Supernet, checkpoint: str | Path) -> None:
    """Write the routers into a checkpoint, if it is without them."""
    if left_out(supernet):
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in router_tensors(supernet.router_parts).items()
        }
        save_file(tensors, Path(checkpoint) / ROUTERS_FILE)


@torch.no_grad()
def load_beside(supernet: Supernet, checkpoint: str | Path) -> None:
    """Read what :func:`save_beside` wrote, if it was needed.

    Raises:
        CheckpointError: There are no routers, or they are of another model.
    """
    if not left_out(supernet):
        return
    file, ours = Path(checkpoint) / ROUTERS_FILE, router_tensors(supernet.router_parts)
    cure = "resume from a checkpoint in output_dir that was written with the same routers, or start again"
    try:
        theirs = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}), so that routers would be fresh; {cure}"
        ) from error
    if {name: tensor.shape for name, tensor in theirs.items()} != {name: tensor.shape for name, tensor in ours.items()}:
        raise CheckpointError(f"{file} holds other routers than the model has; {cure}")
    for name, tensor in theirs.items():
        ours[name].copy_(tensor)
