"""``ElasticLoraConfig``: peft's LoRA configuration with ranks to choose from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from hf_elastic.adapters.elastic_lora import LayerFactory
from hf_elastic.adapters.recognition import check_matched, check_patterns, check_variants
from hf_elastic.errors import SpaceError

Share = Literal["layer", "module"]
_NOT_PLAIN = "is part of the weight: load it with hf_elastic.load_adapter, or export the merged model"


@dataclass
class ElasticLoraConfig(LoraConfig):
    r"""LoRA whose ranks are choices: the first :math:`r'` rows of ``A`` and columns of ``B`` are active.

    .. math:: y = x W^\top + s \, (x A_{:r'}^\top) B_{:, :r'}^\top, \qquad s = \alpha / r

    The scaling stays that of the largest rank, as in the official code of LoNAS, Shears and SQFT (arXiv 2501.16372,
    Mode A); rsLoRA's :math:`s = \alpha / \sqrt{r}` likewise. On a model that ``make_elastic`` converted, adapters
    shrink with the projection they sit on (Mode B).

    It is used as peft's own: ``get_peft_model(model, ElasticLoraConfig(...))``, then ``Supernet(peft_model)``. Every
    other field is peft's. Saved adapters load in plain peft at their largest rank.

    Args:
        ranks: which ranks a module may have beside ``r``, which is always among them: a list for every targeted
            module, or a dict ``{pattern: list}`` whose patterns match names of modules as those of ``rank_pattern``
            do; modules that no pattern matches keep ``r``. Without ``ranks`` no rank is a choice.
        sparse: SparsePEFT: training sees ``s (B A) ⊙ 1[W ≠ 0]`` and merging keeps every zero of the base.
        quantization_aware: QA-SparsePEFT (with ``sparse``, or on a dense base without): training sees
            the sum rounded to the grid of the base, which :func:`hf_elastic.quantize_` or a compressed-tensors
            checkpoint gave it, and merging writes these integers. Gradients pass the rounding as if it were not there.
        share: ``"layer"``: modules of one layer that follow the same entry of ``ranks`` share one choice, such as
            ``layers.3.r``. ``"module"``: each has its own, such as ``layers.3.self_attn.q_proj.r``.
        trained_on: written by ``Supernet``: what the adapters were trained on, to be checked when they are loaded.

    Raises:
        SpaceError: a rank is not an integer from 1 to ``r``, is repeated, or a pattern is empty.
        UnsupportedModelError: a variant of LoRA that would ignore the ranks.
    """

    ranks: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Ranks to choose from.", "is_lora_variant": True}
    )
    sparse: bool = field(default=False, metadata={"help": "Mask the product by the zeros of the base."})
    quantization_aware: bool = field(default=False, metadata={"help": "Round the sum to the base's integers."})
    share: Share = field(default="layer", metadata={"help": "Which modules share one choice of rank."})
    trained_on: dict[str, Any] | None = field(default=None, metadata={"help": "What the adapters were trained on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self)
        self.ranks = _checked_ranks(self.ranks, self)
        if self.share not in ("layer", "module"):
            raise SpaceError(f"share={self.share!r} is neither 'layer' nor 'module'")
        factory: Any = LayerFactory()  # peft calls it as it would call a class
        self._register_custom_module({nn.Module: factory})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> ElasticLoraConfig:
        """Makes the configuration from the fields of a saved one; those of other peft versions are left out."""
        known = {entry.name for entry in fields(cls) if entry.init}
        if kwargs.get("init_lora_weights") == _NOT_PLAIN:
            kwargs["init_lora_weights"] = True
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as peft does; plain peft refuses what it would compute differently: it knows no such initialisation."""
        if not (self.sparse or self.quantization_aware):
            super().save_pretrained(save_directory, **kwargs)
            return
        stated, self.init_lora_weights = self.init_lora_weights, _NOT_PLAIN  # type: ignore[assignment]
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.init_lora_weights = stated

    def plain(self) -> LoraConfig:
        """The same configuration without choices, of peft's own class."""
        return LoraConfig(**{entry.name: getattr(self, entry.name) for entry in fields(LoraConfig) if entry.init})

    def ranks_of(self, module: str) -> tuple[str, tuple[int, ...]]:
        """The entry of ``ranks`` that a module follows (``""`` for the list, or none) and the ranks, ascending.

        Raises:
            SpaceError: a rank is larger than the module's own.
        """
        own_ranks = self.rank_pattern or {}
        own = int(own_ranks.get(get_pattern_key(list(own_ranks), module), self.r))
        if not self.ranks:
            return "", (own,)
        if isinstance(self.ranks, dict):
            entry = get_pattern_key(list(self.ranks), module)
            listed = self.ranks.get(entry)
            if listed is None:
                return "", (own,)
        else:
            entry, listed = "", self.ranks
        if max(listed) > own:
            raise SpaceError(
                f"{module} has rank {own} (rank_pattern), its ranks go up to {max(listed)}; give it ranks of its own "
                "as ranks={pattern: [...]}"
            )
        return entry, tuple(sorted({*listed, own}))

    def check(self, model: nn.Module) -> None:
        """Checks the names of modules against a model without changing it, before ``get_peft_model``.

        ``Supernet(peft_model)`` checks the patterns too. Of targets peft refuses those that all match nothing, with an
        error of its own, and ignores single ones.

        Raises:
            SpaceError: a target or a pattern matches no module.
        """
        names = [name for name, module in model.named_modules() if name and not list(module.children())]
        targeted = self._targeted(names)
        if not targeted:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            targets = _shown(self.target_modules)
            raise SpaceError(f"target_modules={targets} match none of the modules, which end in {leaves}")
        if isinstance(self.target_modules, set):
            check_matched("target_modules", map(re.escape, self.target_modules), targeted)
        check_patterns(self, targeted)

    def _targeted(self, names: list[str]) -> list[str]:
        if self.target_modules is None or self.target_modules == "all-linear":
            return names  # peft knows which
        return [name for name in names if bool(check_target_module_exists(self, name))]


def _shown(targets: object) -> str:
    return str(sorted(targets)) if isinstance(targets, set) else repr(targets)


def _checked_ranks(ranks: Any, config: LoraConfig) -> Any:
    if ranks is None:
        return None
    if isinstance(ranks, Mapping):
        if not ranks or not all(isinstance(key, str) and key for key in ranks):
            raise SpaceError(f"ranks={ranks!r} must be a list of ranks, or a dict of patterns to lists")
        return {key: _checked_list(listed, config, name=f"ranks[{key!r}]") for key, listed in ranks.items()}
    return _checked_list(ranks, config, name="ranks")


def _checked_list(ranks: Any, config: LoraConfig, *, name: str) -> list[int]:
    if not isinstance(ranks, Sequence) or isinstance(ranks, str) or not ranks:
        raise SpaceError(f"{name}={ranks!r} must be a non-empty list of ranks")
    largest = max([config.r, *(config.rank_pattern or {}).values()])
    if bad := [rank for rank in ranks if type(rank) is not int or not 1 <= rank <= largest]:
        raise SpaceError(f"{name} holds {bad}; ranks are integers from 1 to r={largest}")
    if len(set(ranks)) < len(ranks):
        raise SpaceError(f"{name}={list(ranks)} repeats a rank; name each once")
    return list(ranks)
