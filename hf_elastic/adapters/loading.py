"""Puts elastic adapters onto a model: new ones, and saved ones back onto their base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.adapters.configuration import ElasticLoraConfig
from hf_elastic.adapters.lora_part import LoraPart, lora_parts
from hf_elastic.adapters.recognition import FLOAT_BASE, check_base, check_description, described_base
from hf_elastic.downloads import checkpoint_folder
from hf_elastic.errors import CheckpointError, CompressionError, ElasticError, SpaceError, UnsupportedModelError
from hf_elastic.layers import PartHolder, seeded
from hf_elastic.packed_format import unpack_
from hf_elastic.parts import LayerPart
from hf_elastic.supernet import Supernet


def add_lora(
    model: nn.Module,
    config: ElasticLoraConfig,
    *,
    adapter_name: str = "default",
    seed: int | None = None,
    float_base: nn.Module | None = None,
) -> Supernet:
    """Puts new elastic adapters onto a model: ``Supernet(get_peft_model(model, config))``, checked beforehand.

    Args:
        model: a model, or what ``make_elastic`` returned the handle of.
        config: of the adapters.
        adapter_name: what they are called.
        seed: of their first weights; by default they are drawn from torch's own state, as peft does.
        float_base: with ``quantization_aware``: the model before it was quantised, whose weights the products are
            added to before rounding, as in the official recipes; they are shared with it, and their zeros are the mask.
            By default the values of the integers.

    Returns:
        A handle on the ``PeftModel``.

    Raises:
        SpaceError: a target or a pattern matches no module.
        CompressionError: ``sparse=True`` on a base without zeros, or a ``float_base`` that does not fit.
        UnsupportedModelError: a targeted module has no rank to choose, the model has adapters already, or is none. The
            model is left as it was.
    """
    if not isinstance(config, ElasticLoraConfig):
        raise SpaceError(f"config is a {type(config).__name__}, expected ElasticLoraConfig(ranks=[...], ...)")
    if not isinstance(model, nn.Module):
        cure = "its .model" if isinstance(model, Supernet) else "what from_pretrained returned"
        raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a model; pass {cure}")
    if isinstance(model, PeftModel):
        raise UnsupportedModelError("the model has adapters already; use its add_adapter, then Supernet(model)")
    if isinstance(model, PreTrainedModel):
        unpack_(model)
    config.check(model)
    with _left_as_it_was(model), seeded(seed):
        try:
            supernet = Supernet(get_peft_model(model, config, adapter_name))
            if float_base is not None:
                _start_from(supernet, float_base, adapter_name=adapter_name)
            return supernet
        except (ValueError, TypeError) as error:
            if isinstance(error, ElasticError):
                raise
            raise SpaceError(f"peft cannot adapt {type(model).__name__}: {' '.join(str(error).split())}") from error


def _start_from(supernet: Supernet, float_base: nn.Module, *, adapter_name: str) -> None:
    """Lets adapters start from the weights that their base was rounded from, and notes or checks which they were."""
    modules = dict(float_base.named_modules())
    parts = [part for part in lora_parts(supernet.adapter_parts, adapter_name) if part.quantization_aware]
    if not parts:
        raise CompressionError("float_base is for quantization_aware=True; leave it out")
    noted: dict[str, Any] = supernet.base.peft_config[adapter_name].trained_on
    bases = {part.module_name: modules[part.module_name] for part in parts if part.module_name in modules}
    if FLOAT_BASE in noted:
        check_base({"weights": noted[FLOAT_BASE], "space": None}, bases)
    shapes = {name: module.weight.shape for name, module in bases.items() if isinstance(module, nn.Linear)}
    for part in parts:
        if shapes.get(part.module_name) != part.base.get_parameter("weight").shape:
            raise CompressionError(f"float_base has no linear layer {part.module_name} of the shape of the base's")
    starts = [_checked_start(part, bases[part.module_name].get_parameter("weight").detach()) for part in parts]
    if any(part.sparse for part in parts) and not any(bool((start == 0).any()) for start in starts):
        raise CompressionError(
            "sparse=True, but no weight of float_base is zero, whose zeros are the mask; pass the sparse model that "
            "was quantised, not the dense one"
        )
    for part, start in zip(parts, starts, strict=True):
        part.start = start
    noted[FLOAT_BASE] = described_base(bases)["weights"]


_DOWN = ".lora_A.weight"
_MOST_RANK = 2**16  # of what no weights are there for
_ALIKE = 0.5  # cosine to what a weight was rounded to: above .8 with two bits, and near 0 for another weight


def _checked_start(part: LoraPart, weight: Tensor) -> Tensor:
    """The float weight that a base was rounded from."""
    base = part.base.get_parameter("weight").detach()
    start = weight.to(base.device)
    if bool(((start == 0) & (base != 0)).any()):
        raise CompressionError(
            f"{part.module_name} is zero in float_base where the base is not: the base was not quantised from it"
        )
    likeness = nn.functional.cosine_similarity(start.float().flatten(), base.float().flatten(), dim=0)
    if bool(base.any()) and float(likeness) < _ALIKE:
        raise CompressionError(f"{part.module_name} has other weights in float_base than the base was quantised from")
    return start


_NOTED = ("peft_config", "_hf_elastic_state")


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undoes, after an error, what peft has done to a model."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    noted: dict[str, Any] = {name: value for name, value in vars(model).items() if name in _NOTED}
    try:
        yield
    except BaseException:
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for name in _NOTED:
            vars(model).pop(name, None)
        vars(model).update(noted)
        raise


def fixed_lora(
    model: PreTrainedModel, *, rank: int, targets: Sequence[str], head: Sequence[str] = (), seed: int = 0
) -> PeftModel:
    """Puts stock LoRA of one rank onto a model, with the weights that :func:`add_lora` would begin with.

    Args:
        model: a plain model.
        rank: of all adapters; the scaling is 2.
        targets: names of modules.
        head: modules that are trained as a whole.
        seed: of the adapters' first weights.
    """
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), modules_to_save=list(head) or None,
    )  # fmt: skip
    with seeded(seed):
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    return adapted


def load_fixed_lora(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """Puts stock LoRA that was saved onto its base, in evaluation mode: to be a teacher, or to be compared with."""
    adapted: PeftModel = PeftModel.from_pretrained(model, str(directory))  # type: ignore[assignment]
    return adapted.eval()


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    float_base: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Supernet:
    """Puts elastic adapters that ``PeftModel.save_pretrained`` wrote onto their base, ranks to choose included.

    (``PeftModel.from_pretrained`` by itself makes plain adapters of the largest rank of them.)

    Args:
        model: the base: the model that ``get_peft_model`` was given, made elastic in the same way if it was so; or a
            ``PeftModel`` on it that gets a further adapter.
        directory: folder or Hub name.
        adapter_name: what it is called in the model.
        is_trainable: whether it will be trained further.
        float_base: as for :func:`add_lora`, where the adapter was trained with one.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; by default the one that is logged in.

    Returns:
        A handle on the ``PeftModel``.

    Raises:
        CheckpointError: there is no such adapter, it is not elastic, or it was trained on another base or in another
            space of it; the model is left as it was.
    """
    existing: Any = model if isinstance(model, PeftModel) else None
    if existing is not None and adapter_name in existing.peft_config:
        raise CheckpointError(f"the model has an adapter {adapter_name!r} already; pass another adapter_name")
    directory = checkpoint_folder(directory, revision=revision, token=token)
    config = _read_config(str(directory))
    config.inference_mode = not is_trainable
    base: Any = model if existing is None else existing.get_base_model()
    if isinstance(base, PreTrainedModel):
        unpack_(base)
    weights = _read_weights(directory)
    _check_shapes(base, weights, where=str(directory))
    _check_ranks(config, weights, where=str(directory))
    if FLOAT_BASE in (config.trained_on or {}) and float_base is None:
        raise CheckpointError(f"the adapter in {directory} was trained with float_base=; pass that model again")
    if float_base is not None and FLOAT_BASE not in (config.trained_on or {}):
        raise CheckpointError(f"the adapter in {directory} was trained without float_base=; leave it out")
    if config.trained_on is not None:
        check_base(config.trained_on, _adaptable(base), layers=_elastic_layers(base), model=base)
    with _left_as_it_was(base):
        try:
            adapted = _adapted(model, config, adapter_name=adapter_name, where=str(directory))
            _fill(adapted, weights, adapter_name=adapter_name, where=str(directory))
            supernet = Supernet(adapted)
            if float_base is not None:
                _start_from(supernet, float_base, adapter_name=adapter_name)
        except BaseException:
            if existing is not None and adapter_name in existing.peft_config:
                existing.delete_adapter(adapter_name)
            raise
    if not is_trainable and existing is None:
        adapted.eval()
    return supernet


def _read_weights(directory: Path) -> dict[str, Tensor]:
    if not (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}; save it by save_pretrained, as pickles are not read"
        )
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(directory), device="cpu")
    except Exception as error:  # peft and safetensors raise whatever their parts raise
        raise CheckpointError(f"cannot read the adapter in {directory}: {' '.join(str(error).split())}") from error
    return weights


def _adapted(model: Any, config: ElasticLoraConfig, *, adapter_name: str, where: str) -> PeftModel:
    """A model with one more adapter, still empty; peft checks no field of a configuration before it uses it."""
    try:
        if not isinstance(model, PeftModel):
            return PeftModel(model, config, adapter_name)
        model.add_adapter(adapter_name, config)
    except ElasticError:
        raise
    except Exception as error:  # peft raises whatever its parts raise
        raise CheckpointError(f"peft makes no adapter of the configuration in {where}: {error!r}") from error
    return model


def _fill(adapted: PeftModel, weights: dict[str, Tensor], *, adapter_name: str, where: str) -> None:
    """Copies saved weights into an adapter; all of it must be there, and fit."""
    try:
        report: Any = set_peft_model_state_dict(adapted, weights, adapter_name=adapter_name)
    except (RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the adapter in {where} does not fit the model: {reason[:300]}") from error
    own = (f".lora_A.{adapter_name}.", f".lora_B.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    wrong = [*report.unexpected_keys, *(key for key in report.missing_keys if any(part in key for part in own))]
    if wrong:
        raise CheckpointError(f"{len(wrong)} weights of the adapter in {where} are missing or too many, as {wrong[0]}")


def _read_config(directory: str) -> ElasticLoraConfig:
    try:
        config = ElasticLoraConfig.from_pretrained(directory)
    except Exception as error:  # peft looks for nothing, and raises whatever its parts raise
        raise CheckpointError(f"cannot read an adapter in {directory}: {' '.join(str(error).split())}") from error
    in_weight = config.sparse or config.quantization_aware
    if config.trained_on is not None:
        check_description(config.trained_on, kept=config, where=directory)
    if config.trained_on is None and config.ranks is None and not in_weight:
        raise CheckpointError(
            f"the adapter in {directory} has one rank; load it with PeftModel.from_pretrained (compress --lora "
            "keeps its elastic ones in OUTPUT.run/adapters, on OUTPUT.run/base where that was compressed)"
        )
    return config


def _check_shapes(base: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Checks names and sizes of the adapted modules before anything is changed."""
    modules: dict[str, Any] = _adaptable(base)
    for name, tensor in weights.items():
        for factor, axis, size in ((".lora_A.weight", 1, "in_features"), (".lora_B.weight", 0, "out_features")):
            if not name.endswith(factor):
                continue
            path = name.removeprefix("base_model.model.").removesuffix(factor)
            module = modules.get(path)
            if module is None:
                raise CheckpointError(
                    f"the adapter in {where} adapts {path}, which the {type(base).__name__} does not have; it was "
                    "trained on another base"
                )
            found = _features(module)[size]
            if found != tensor.shape[axis]:
                raise CheckpointError(
                    f"the adapter in {where} was trained on another base: {path} has {found} {size}, the adapter "
                    f"{tensor.shape[axis]}"
                )


def _check_ranks(config: ElasticLoraConfig, weights: dict[str, Tensor], *, where: str) -> None:
    """Refuses ranks that no weights are of, before memory is taken for them; those that no module follows may be any.

    Raises:
        CheckpointError: a rank is none, or weights are of another.
    """
    pattern = dict(config.rank_pattern or {})
    stored = {
        name.removeprefix("base_model.model.").removesuffix(_DOWN): tensor.shape[0]
        for name, tensor in weights.items()
        if name.endswith(_DOWN)
    }
    most, unused = max(stored.values(), default=0), dict(pattern)
    for module, rank in stored.items():
        try:
            entry = get_pattern_key(list(pattern), module)
        except re.error as error:
            raise CheckpointError(f"the adapter in {where} has a rank_pattern that is no pattern: {error}") from error
        unused.pop(entry, None)
        if pattern.get(entry, config.r) != rank:
            raise CheckpointError(
                f"the adapter in {where} states rank {pattern.get(entry, config.r)!r} for {module}, its weights are of "
                f"rank {rank}; copy it again"
            )
    for rank in (config.r, *unused.values()):
        if type(rank) is not int or not 1 <= rank <= max(most, _MOST_RANK):
            raise CheckpointError(
                f"the adapter in {where} states rank {rank!r}, its weights are of ranks up to {most}; copy it again"
            )


def _adaptable(base: nn.Module) -> dict[str, nn.Module]:
    """Modules by the name that they have without adapters."""
    return {name.removesuffix(".base_layer"): module for name, module in base.named_modules()}


def _elastic_layers(base: nn.Module) -> list[LayerPart]:
    holders = [module for module in base.modules() if isinstance(module, PartHolder)]
    return [part for holder in holders for part in holder.elastic_parts if isinstance(part, LayerPart)]


def _features(module: Any) -> dict[str, int]:
    if isinstance(module, Conv1D):
        return {"in_features": module.nx, "out_features": module.nf}
    return {size: int(getattr(module, size, 0)) for size in ("in_features", "out_features")}
