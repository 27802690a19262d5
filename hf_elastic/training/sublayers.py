"""What the layers of a model and their attention give in a forward, taken by hooks on the modules that give it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.families import FAMILIES, Family, layers_of
from hf_elastic.layers import SkippableModule


class LayerStates(NamedTuple):
    """What a model made of a batch on its way: states ``(B, T, D)``; what did not run is missing.

    Attributes:
        embedding: what enters the first layer.
        attention: output of each layer's attention, by number of the layer.
        blocks: output of each layer.
        logits: of the head, where predictions are compared.
    """

    embedding: Tensor
    attention: dict[int, Tensor]
    blocks: dict[int, Tensor]
    logits: tuple[Tensor, ...] = ()

    def detached(self) -> LayerStates:
        """Return the states without their graph."""
        attention = {layer: state.detach() for layer, state in self.attention.items()}
        blocks = {layer: state.detach() for layer, state in self.blocks.items()}
        return LayerStates(self.embedding.detach(), attention, blocks, tuple(part.detach() for part in self.logits))


class Capture:
    """The states of one forward, as hooks find them; of a module that runs again, those of the first time.

    Make it where the forward is: with a graph or without one.

    Args:
        sublayers: whose; ``None`` finds nothing.
    """

    def __init__(self, sublayers: Sublayers | None) -> None:
        self._sublayers = sublayers
        self._embedding: Tensor | None = None
        self._attention: dict[int, Tensor] = {}
        self._blocks: dict[int, Tensor] = {}
        self._with_graph = torch.is_grad_enabled()
        self._cut = False

    def states(self) -> LayerStates | None:
        """Return the states; ``None`` where none were asked for.

        Raises:
            TrainingError: The layers did not run, or their states have no graph although there is one around them.
        """
        if self._sublayers is None:
            return None
        name = type(self._sublayers.model).__name__
        if self._embedding is None:
            raise TrainingError(f"the layers of {name} did not run in its forward, so there are no states to compare")
        if self._cut:
            raise TrainingError(
                f"{name} checkpoints its activations by reentrant autograd, which hides states from the loss; set "
                "use_reentrant=False where TrainingArguments ask for checkpointing"
            )
        return LayerStates(self._embedding, dict(self._attention), dict(self._blocks))

    def before_layers(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters the first layer; a hook before its forward."""
        if self._embedding is None:
            self._embedding = self._seen(args[0] if args else kwargs["hidden_states"])

    def after_block(self, layer: int, output: Any) -> None:
        """Keep the output of a layer."""
        self._blocks.setdefault(layer, self._seen(output))

    def after_attention(self, layer: int, output: Any) -> None:
        """Keep the output of a layer's attention."""
        self._attention.setdefault(layer, self._seen(output))

    def _seen(self, output: Any) -> Tensor:
        self._cut = self._cut or torch.is_grad_enabled() != self._with_graph
        state: Tensor = output[0] if isinstance(output, tuple) else output
        return state


class Sublayers:
    """Where the states of a model come from.

    The output of a layer's attention is that of the module around the projection ``attention_out`` of the family's row:
    after residual and LayerNorm in BERT and RoBERTa, before the residual in the others. A layer may hold several
    candidate blocks, in a ``ModuleDict`` named ``candidates``, of which one runs: that one counts. Layers without
    parameters are none.

    Args:
        model: of a known family, stock or of its static type (``elastic_bert``, ...); it may be inside others.
        known: rows of families that are tried before those of :data:`hf_elastic.families.FAMILIES`.

    Attributes:
        model: the transformers model.
        depth: number of its layers.
        width: of the embedding and of the output of layers.
        attention_widths: all widths that outputs of attention may have.
        vocabulary: number of tokens; ``None`` where the config names none.
        causal: whether a token sees those before it alone.

    Raises:
        UnsupportedModelError: No row fits the model.
    """

    def __init__(self, model: nn.Module, *, known: Sequence[Family] = ()) -> None:
        found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if found is None:
            raise UnsupportedModelError(f"{type(model).__name__} holds no transformers model; give one")
        row = _row(found, known)
        self.model = found
        self._layers = tuple(layers_of(found, row))
        self._attention = tuple(
            [
                module
                for block in _blocks(layer)
                if (module := _inside(block, row.attention_out.rpartition(".")[0])) is not None
            ]
            for layer in self._layers
        )
        projections = [_inside(block, row.attention_out) for layer in self._layers for block in _blocks(layer)]
        self.attention_widths = {_outputs(projection) for projection in projections if projection is not None}
        self.depth = len(self._layers)
        self.width = int(found.config.hidden_size)
        self.vocabulary: int | None = getattr(found.config, "vocab_size", None)
        left_to_right = row.causal or getattr(found.config, "is_decoder", False)
        self.causal = bool(left_to_right and getattr(found.config, "is_causal", True))

    @contextmanager
    def hooked(self, capture: Capture) -> Iterator[None]:
        """Fill ``capture`` from the forwards inside the block; afterwards the model is as it was."""
        with ExitStack() as stack:
            first = self._layers[0].register_forward_pre_hook(capture.before_layers, with_kwargs=True)
            stack.callback(first.remove)
            for number, layer in enumerate(self._layers):
                if next(layer.parameters(), None) is not None:
                    stack.callback(layer.register_forward_hook(_hook(capture.after_block, number)).remove)
                for module in self._attention[number]:
                    stack.callback(module.register_forward_hook(_hook(capture.after_attention, number)).remove)
            yield


@contextmanager
def captured(sublayers: Sublayers | None) -> Iterator[Capture]:
    """Yield a :class:`Capture` of the forward inside the block."""
    capture = Capture(sublayers)
    with ExitStack() as stack:
        if sublayers is not None:
            stack.enter_context(sublayers.hooked(capture))
        yield capture


def _hook(keep: Any, number: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(module, SkippableModule) and module.skipped):
            keep(number, output)

    return hook


def _row(model: PreTrainedModel, known: Sequence[Family]) -> Family:
    """The row of a model's type, or of the stock models that its static type was made from."""
    kind = model.config.model_type
    rows = [row for row in (*known, *FAMILIES) if row.model_type == kind]
    # Several rows share a static type, whose modules have the names of the first.
    rows += [row for row in FAMILIES if row.static_type == kind]
    if not rows:
        raise UnsupportedModelError(
            f"model type {kind!r} has no family row that says where its attention is; states can be compared of "
            f"{', '.join(sorted({row.model_type for row in (*known, *FAMILIES)}))}"
        )
    return rows[0]


def _blocks(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks of which a layer runs one: its candidates, or itself."""
    candidates = dict(layer.named_children()).get("candidates")
    return tuple(candidates.children()) if isinstance(candidates, nn.ModuleDict) else (layer,)


def _inside(root: nn.Module, path: str) -> nn.Module | None:
    return dict(root.named_modules(remove_duplicate=False)).get(path)


def _outputs(projection: nn.Module) -> int:
    """Width of what a projection gives, whatever adapters are around it."""
    while (inside := dict(projection.named_children()).get("base_layer")) is not None:
        projection = inside
    if isinstance(projection, Conv1D):
        return int(projection.nf)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    raise UnsupportedModelError(
        f"the width of a {type(projection).__name__} is not known; outputs of attention come from nn.Linear or Conv1D"
    )
