"""What a model is set to for the length of a training, and what a Trainer leaves in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig


@contextmanager
def prepared_for_distillation(model: nn.Module, *, freeze_embeddings: bool) -> Iterator[None]:
    """Inside, dropout is off (a short distillation underfits) and embedding tables are frozen where asked."""
    modules = list(model.modules())
    dropouts = [(m, "p", m.p) for m in modules if isinstance(m, nn.Dropout)]
    # LLaMA's attention holds its rate as a number
    rates = [(m, "attention_dropout", getattr(m, "attention_dropout", None)) for m in modules]
    switched = dropouts + [entry for entry in rates if isinstance(entry[2], float)]
    tables = [m.weight for m in modules if freeze_embeddings and isinstance(m, nn.Embedding) and m.weight.requires_grad]
    for module, name, _ in switched:
        setattr(module, name, 0.0)
    for weight in tables:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for module, name, rate in switched:
            setattr(module, name, rate)
        for weight in tables:
            weight.requires_grad_(True)


class KeptCache:
    """What a config says of a cache, which the stock Trainer overwrites when it is made: decoders would lose theirs.

    Args:
        config: of the model, before the Trainer is made.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._config, self._known = config, getattr(config, "use_cache", None)

    def restore(self) -> None:
        """Says again what was said."""
        if self._known is not None:
            self._config.use_cache = self._known
