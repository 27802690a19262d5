"""compressed-tensors, the file format of integer weights: the only code that imports it.

In memory a quantised layer is an ordinary ``nn.Linear``: its weight holds the values on its grid, beside it stand
scales and zero-points, and its forward is the stock one. Only files are packed. (compressed-tensors is imported when
something is quantised, written or unpacked: models without integers do not need it.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import CheckpointError, ExportError, UnsupportedModelError
from hf_elastic.quantgrid import SCALE, SCHEME, ZERO, Grid, grid_of

_STATUS = "quantization_status"
_PACKED, _FROZEN = "compressed", "frozen"  # of compressed-tensors' QuantizationStatus, an enumeration of strings


def attach_grid(module: nn.Linear, grid: Grid) -> None:
    """Lets a linear layer carry the grid that its weight lies on, as compressed-tensors notes it.

    Symmetric grids are written packed (``pack-quantized``). Asymmetric ones are written as 8-bit integers
    (``int-quantized``): stock transformers does not load packed zero-points.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus

    groups = grid.scale.shape[1]
    grouped = {"strategy": "group", "group_size": module.in_features // groups}
    args = QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **grouped)  # type: ignore[arg-type]
    form = "pack-quantized" if grid.symmetric else "int-quantized"
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)  # type: ignore[arg-type]
    module.register_parameter(SCALE, nn.Parameter(grid.scale, requires_grad=False))
    if not grid.symmetric:
        module.register_parameter(ZERO, nn.Parameter(grid.zero, requires_grad=False))
    module.__dict__.update({SCHEME: scheme, _STATUS: QuantizationStatus(_FROZEN)})


def detach_grid(module: nn.Module) -> None:
    """Makes a quantised layer an ordinary float one of the same values."""
    for name in (SCALE, ZERO, "weight_shape"):
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    for name in (SCHEME, _STATUS, "forward"):
        vars(module).pop(name, None)


def quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that carry a grid, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module)
    }


def integer_bits(model: nn.Module) -> int | None:
    """Bits of the integers that layers carry, the most where they differ; ``None`` where there are none."""
    found = [int(vars(module)[SCHEME].weights.num_bits) for module in quantised_layers(model).values()]
    return max(found, default=None)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer carries a grid, packed or not."""
    return SCHEME in vars(module)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer was loaded from a compressed-tensors checkpoint and its weight is still packed."""
    return is_quantised(module) and vars(module).get(_STATUS) == _PACKED


def unpack_(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model loaded from a compressed-tensors checkpoint one that :func:`hf_elastic.quantize_` could have left.

    Stock transformers keeps its weights packed until the first forward and computes with other forwards; here they are
    unpacked now, the forwards are the stock ones, and the grids stay. A model that is no such one is left as it is.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the checkpoint quantises activations too.
        CheckpointError: integers or scales of a layer are not what its config says.
    """
    layers = quantised_layers(model)
    if not layers:
        return model
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    schemes: list[Any] = [vars(module)[SCHEME] for module in layers.values()]
    if any(scheme.input_activations is not None or scheme.output_activations is not None for scheme in schemes):
        raise UnsupportedModelError(
            "the checkpoint quantises activations, which adapters cannot be merged under; take one of weights only"
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    packed = any(map(is_packed, layers.values()))
    if quantizer is None and not packed:
        return model  # as quantize_ left it; a forward on its layers is not compressed-tensors' own
    if packed:
        for name, layer in layers.items():
            _check_width(layer, name=name)
        try:
            compressor = ModelCompressor(quantization_config=QuantizationConfig.from_pretrained(model))
            with torch.no_grad():
                compressor.decompress_model(model)
        except Exception as error:  # compressed-tensors raises whatever its parts raise
            raise CheckpointError(f"the checkpoint's integers cannot be unpacked: {error}; copy it again") from error
    # It leaves caches in place of the dicts of parameters, in which a replaced parameter would overwrite the weight.
    remove_dispatch(model, onload_tensors=True)
    for module in model.modules():
        own = vars(module).get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del vars(module)["forward"]  # which would hide that of an elastic class
    for name, module in layers.items():
        grid_of(module, name=name)
        vars(module).pop("forward", None)
        module._parameters.pop("weight_shape", None)
        module._buffers.pop("weight_shape", None)
        vars(module)[_STATUS] = QuantizationStatus(_FROZEN)
        module.requires_grad_(False)
    if quantizer is not None:
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        vars(model.config).pop("quantization_config", None)
    return model


def _check_width(module: nn.Linear, *, name: str) -> None:
    """Refuses integers of other bits than the config says, which compressed-tensors unpacks to other values."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = dict(module.named_parameters(recurse=False)).get("weight_packed")
    bits = int(vars(module)[SCHEME].weights.num_bits)
    if packed is None or packed.dtype != torch.int32 or not 1 <= bits <= 8:
        return  # in another format; or it is not unpacked
    wanted = pack_to_int32(torch.zeros(1, module.in_features, dtype=torch.int8), bits).shape[1]
    if packed.shape[-1] != wanted:
        raise CheckpointError(
            f"{name} has {packed.shape[-1]} words of integers an output, {bits} bits as its config says are {wanted}; "
            "copy the checkpoint again"
        )


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` as it stands in a compressed-tensors checkpoint.

    Raises:
        ExportError: the weight of a layer is not on its grid, so that the file would hold another model.
    """
    from compressed_tensors.compressors import BaseCompressor

    state = dict(model.state_dict())
    for name, module in quantised_layers(model).items():
        prefix = f"{name}." if name else ""
        grid = grid_of(module, name=name)
        scheme = vars(module)[SCHEME]
        if grid is None:
            raise ExportError(f"{name} is quantised to no integers of 2 to 8 bits, which is all that is written here")
        if not torch.equal(grid.nearest(module.weight), module.weight.to(grid.scale.dtype)):
            raise ExportError(
                f"the weight of {name} is not on its grid any more: it was changed after quantize_, or an adapter that "
                "was not trained with quantization_aware=True was merged into it"
            )
        known = ("weight", SCALE, ZERO)
        for key in known:
            state.pop(prefix + key, None)
        # In half precision the compressor's own division would round some weights to the integer beside theirs.
        local = {"weight": module.weight.detach().float(), SCALE: grid.scale.float(), ZERO: grid.zero}
        compressor: Any = BaseCompressor.get_value_from_registry(_format(scheme))
        packed = {**compressor.compress(local, scheme), SCALE: grid.scale}
        if not torch.equal(_stored_integers(packed, scheme), grid.integers(module.weight)):
            raise ExportError(f"compressed-tensors writes other integers of {name} than it has; please report this")
        state.update({prefix + key: tensor.contiguous() for key, tensor in packed.items()})
    return state


def _stored_integers(packed: dict[str, Tensor], scheme: Any) -> Tensor:
    """The integers ``(O, I)`` of a layer as a file holds them."""
    if "weight_packed" not in packed:
        return packed["weight"]
    shape = torch.Size(packed["weight_shape"].tolist())
    return _from_int32(packed["weight_packed"], int(scheme.weights.num_bits), shape)


def _from_int32(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    found: Tensor = unpack_from_int32(packed, bits, shape)
    return found


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Writes a checkpoint as stock transformers loads it: quantised layers packed; the model stays as it is.

    Raises:
        ExportError: see :func:`packed_state`.
    """
    if not quantised_layers(model):
        model.save_pretrained(folder)
        return
    from compressed_tensors.compressors import ModelCompressor

    model.save_pretrained(folder, state_dict=packed_state(model))
    ModelCompressor(quantization_config=_stated(model)).update_config(str(folder))


def _format(scheme: Any) -> str:
    return str(getattr(scheme.format, "value", scheme.format))


def _stated(model: PreTrainedModel) -> Any:
    """What ``config.json`` says: the layers of each scheme, by patterns that also match below another head."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    layers, linears = quantised_layers(model), [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    alike: dict[str, list[str]] = {}
    for name, module in layers.items():
        alike.setdefault(vars(module)[SCHEME].model_dump_json(exclude={"targets"}), []).append(name)
    prefix = re.escape(f"{model.base_model_prefix}.")
    groups, forms = {}, set()
    for number, names in enumerate(alike.values()):
        scheme = vars(layers[names[0]])[SCHEME]
        forms.add(_format(scheme))
        targets = list(dict.fromkeys(_pattern(name, names, linears).removeprefix(prefix) for name in names))
        found = [f"re:(.*\\.)?{target}$" for target in targets]
        groups[f"group_{number}"] = scheme.model_copy(update={"targets": found})
    form = forms.pop() if len(forms) == 1 else "mixed-precision"
    return QuantizationConfig(
        config_groups=groups, format=form, quantization_status=QuantizationStatus(_PACKED),
    )  # fmt: skip


def _pattern(name: str, names: list[str], linears: list[str]) -> str:
    """A pattern for the layers of this name at any depth, where all such are meant, and else for this one."""
    anywhere = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
    return anywhere if all(other in names for other in linears if re.fullmatch(anywhere, other)) else re.escape(name)


def stated_quantisation(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` of a folder says about quantisation."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    return found


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of linear layers and embeddings in a checkpoint, ``(O, I)``, one at a time; of packed ones the
    integers less their zero-points, so that what is zero is so here too.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    groups: Any = (stated_quantisation(folder) or {}).get("config_groups", {})
    bits = {int(group["weights"]["num_bits"]) for group in groups.values() if group.get("weights")}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from _weights_in(tensors, bits=bits)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); copy it again") from error


def _weights_in(tensors: Any, *, bits: set[int]) -> Iterator[tuple[str, Tensor]]:
    names = set(tensors.keys())
    for name in sorted(names):
        if name.endswith("weight_packed"):
            yield name.removesuffix("_packed"), _unpacked(tensors, name, bits=bits)
        elif name.endswith("weight") and len(tensors.get_slice(name).get_shape()) == 2:
            yield name, _shifted(tensors, name, names)


def _unpacked(tensors: Any, name: str, *, bits: set[int]) -> Tensor:
    shape = torch.Size(tensors.get_tensor(name.removesuffix("_packed") + "_shape").tolist())
    packed = tensors.get_tensor(name)
    width = round(packed.shape[1] * 32 / shape[1]) if len(bits) != 1 else next(iter(bits))
    return _from_int32(packed, width, shape)


def _shifted(tensors: Any, name: str, names: set[str]) -> Tensor:
    weight: Tensor = tensors.get_tensor(name)
    key = name.removesuffix("weight") + ZERO
    if key not in names:
        return weight
    zero = tensors.get_tensor(key)  # (O, G)
    return weight.short() - zero.short().repeat_interleave(weight.shape[1] // zero.shape[1], dim=1)
