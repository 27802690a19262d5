"""Cuts a sub-adapter out of elastic adapters: an ordinary peft adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_elastic.adapters.lora_part import LoraPart, RankedConfig, lora_parts
from hf_elastic.errors import ExportError, UnsupportedModelError
from hf_elastic.files import whole_folder
from hf_elastic.layers import take_region
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_[AB]\.(weight|bias)$")


@dataclass(frozen=True)
class ExtractedAdapter:
    """An ordinary LoRA adapter.

    Attributes:
        config: of peft's own class.
        weights: by name, as they stand in ``adapter_model.safetensors``.
    """

    config: LoraConfig
    weights: Mapping[str, Tensor]

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter to a folder that ``PeftModel.from_pretrained`` loads.

        Raises:
            CheckpointError: the folder is not empty or cannot be written; nothing is left half-written.
        """
        with whole_folder(directory, overwrite=overwrite) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Writes the adapter's two files into a folder that is there."""
        self.config.save_pretrained(str(folder))
        save_file(dict(self.weights), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def onto(self, model: nn.Module) -> PeftModel:
        """Puts the adapter onto a model, as peft does: the one the supernet was made of, or an extracted one."""
        adapted = get_peft_model(model, self.config)
        set_peft_model_state_dict(adapted, dict(self.weights))
        return adapted.eval()


def extract_adapter(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    *,
    adapter_name: str = "default",
    hotswap: bool = False,
    base: str | None = None,
) -> ExtractedAdapter:
    """Copies an adapter at the ranks of an architecture into one that stock peft loads, merges and serves.

    The scaling stays :math:`\\alpha / r` of the largest rank, so a module of rank ``r'`` is written with
    ``lora_alpha = s r'``: in ``alpha_pattern``, beside its rank in ``rank_pattern``, where modules differ. Where the
    base is elastic too, the adapter fits the model that ``extract(..., merge=False)`` gives: layers that are skipped
    are left out and the others renumbered.

    Args:
        supernet: where from; unchanged.
        architecture: what.
        adapter_name: which of the model's adapters.
        hotswap: one rank for all modules, padded with zeros, and the scaling in ``B``: adapters of this form replace
            each other by ``peft.utils.hotswap.hotswap_adapter``, which ignores patterns silently.
        base: folder or Hub name written as the adapter's base; by default the model's own, or none where an elastic
            base was cut.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        ExportError: there is no such adapter, it is merged, or nothing of it is left.
    """
    point = supernet.point(architecture)
    parts = _parts_of(supernet, adapter_name)
    with supernet.activate(point):
        weights = _active_weights(supernet, adapter_name)
    renamed = _Renumbering(supernet, point)
    weights = {new: weights[name] for name in weights if (new := renamed(name)) is not None}
    if part := next((part for part in parts if part.in_weight), None):
        kind = "quantization_aware" if part.quantization_aware else "sparse"
        raise ExportError(
            f"the adapter {adapter_name!r} was trained with {kind}=True: it is part of the weight, which no plain LoRA "
            "computes; use export(..., merge=True)"
        )
    found = {
        name: part for part in parts if part.rank(point) and (name := renamed(part.module_name, root=True)) is not None
    }
    if not found:
        raise ExportError("nothing of the adapter is left in this architecture; choose one that skips less")
    scalings = {name: float(part.wrapper.scaling[adapter_name]) for name, part in found.items()}
    stated = supernet.base.peft_config[adapter_name]
    config = stated.plain() if isinstance(stated, RankedConfig) else copy.deepcopy(stated)
    config.base_model_name_or_path = base or (None if renamed.cut else config.base_model_name_or_path)
    config.target_modules = set(found)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights, config.inference_mode, config.use_rslora = True, True, False
    ranks = {name: part.rank(point) for name, part in found.items()}
    if hotswap:
        widest = max(part.ranks[-1] for part in parts)
        weights = {name: _padded(name, tensor, rank=widest, scalings=scalings) for name, tensor in weights.items()}
        ranks, scalings = dict.fromkeys(found, widest), dict.fromkeys(found, 1.0)
    _write_ranks(config, ranks, {name: _whole(scalings[name] * ranks[name]) for name in found})
    return ExtractedAdapter(config, weights)


def _parts_of(supernet: Supernet, adapter_name: str) -> list[LoraPart]:
    supernet.require_unmerged()
    if found := lora_parts(supernet.adapter_parts, adapter_name):
        return found
    names = ", ".join(sorted({part.adapter for part in lora_parts(supernet.adapter_parts)})) or "none"
    raise ExportError(f"the model has no adapter {adapter_name!r} made with ElasticLoraConfig; it has: {names}")


def _active_weights(supernet: Supernet, adapter_name: str) -> dict[str, Tensor]:
    """What peft saves of an adapter, cut to what is active, in names as saved."""
    regions, state = supernet.active_regions(), {}
    for name, tensor in supernet.model.state_dict().items():
        region = regions.get(name)
        small = ".lora_" in name or tensor.ndim < 2  # weights of the base are not saved, so need not be cut
        if region is None or not small:
            state[name] = tensor
        elif region:
            state[name] = take_region(tensor, region)
    saved = get_peft_model_state_dict(supernet.model, state_dict=state, adapter_name=adapter_name)
    prefix = "" if isinstance(supernet.model, PeftModel) else _PREFIX
    return {f"{prefix}{name}": tensor.detach().clone().contiguous() for name, tensor in saved.items()}


class _Renumbering:
    """Names of modules and weights in the extracted base: layers that are gone give ``None``."""

    def __init__(self, supernet: Supernet, point: Architecture) -> None:
        names = {id(module): name for name, module in supernet.base.named_modules()}
        shapes = list(zip(supernet.layer_parts, supernet.layer_shapes(point), strict=True))
        kept = [part.index for part, shape in shapes if not shape.skipped]
        self.cut = any(shape != part.full for part, shape in shapes)
        self.numbers = {part.index: kept.index(part.index) for part, _ in shapes if part.index in kept}
        self.prefix = names[id(shapes[0][0].layer)].rpartition(".")[0] + "." if shapes else None
        row = supernet.family if shapes else None
        other_names = row is not None and row.static_type == "elastic_bert" and row.model_type != "bert"
        if row is not None and other_names and supernet.loadability(point) != "stock":
            raise UnsupportedModelError(
                f"a {row.model_type} model with shapes per layer is exported as elastic_bert, whose modules have "
                "other names; use export(..., merge=True)"
            )

    def __call__(self, name: str, *, root: bool = False) -> str | None:
        """The new name; ``root``: it is a module's name in the model, not a saved weight's."""
        start = "" if root else _PREFIX
        if self.prefix is None or not name.startswith(start + self.prefix):
            return name
        number, _, rest = name.removeprefix(start + self.prefix).partition(".")
        new = self.numbers.get(int(number))
        return None if new is None else f"{start}{self.prefix}{new}.{rest}"


def _padded(name: str, tensor: Tensor, *, rank: int, scalings: Mapping[str, float]) -> Tensor:
    """A factor filled up with zeros to one rank, ``B`` multiplied by its scaling."""
    module = _FACTOR.sub("", name).removeprefix(_PREFIX)
    if module not in scalings:
        return tensor
    if ".lora_A." in name:
        return nn.functional.pad(tensor, (0, 0, 0, rank - len(tensor)))  # (r, in) -> (R, in)
    scaled = tensor * scalings[module]
    return scaled if scaled.ndim < 2 else nn.functional.pad(scaled, (0, rank - scaled.shape[1]))  # (out, r) -> (out, R)


def _write_ranks(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """States ranks and alphas of modules; those that most share without patterns."""
    config.r = max(ranks.values())
    first = next(name for name in ranks if ranks[name] == config.r)
    config.lora_alpha = alphas[first]  # type: ignore[assignment]  # peft takes any number
    config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {re.escape(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _whole(number: float) -> Any:
    """The number as an integer where it is one: peft's own files hold such."""
    return int(number) if number == int(number) else number
