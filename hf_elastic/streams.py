"""Runs a model one layer at a time: hidden states of calibration batches, in memory or on disk.

The model itself says how it calls its layers: on each batch it runs once with the layers taken out, which costs its
embeddings and masks only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import DataError
from hf_elastic.families import Family, family_of, layers_of
from hf_elastic.layers import ElasticLinear, ElasticProjection
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.supernet import Supernet

Batch = Mapping[str, Tensor]
Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "mlp")

MEMORY_LIMIT = 512 * 2**20
"""Bytes of hidden states kept in memory by default; what is beyond goes to a temporary file."""


@dataclass(frozen=True)
class LayerCalls:
    """How a model calls its layers on one batch.

    Attributes:
        hidden: ``(B, T, D)``, what enters the first layer.
        arguments: positional and keyword arguments behind the hidden states, per layer.
        kept: ``(B, T)``, false at padding.
    """

    hidden: Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    kept: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """Values at real tokens: ``(B, T, N)`` or ``(B·T, N)`` -> ``(tokens, N)``.

        Raises:
            DataError: the values are not one per token.
        """
        flat = values.reshape(-1, values.shape[-1])  # (B·T, N)
        if len(flat) != self.kept.numel():
            raise DataError(f"activations of {len(flat)} tokens do not fit a batch of {self.kept.numel()}")
        return flat if bool(self.kept.all()) else flat[self.kept.reshape(-1)]


class _Stand(nn.Module):
    """Takes the place of a layer: notes how it is called, and passes the hidden states on."""

    def __init__(self, layer: nn.Module, seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__()
        self.__dict__["layer"], self.__dict__["seen"] = layer, seen  # hidden from state_dict and from modules()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # what a model reads off its layers, such as attention_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.__dict__["seen"].append((hidden, args[1:], kwargs))
        return hidden


@contextmanager
def _without_layers(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    originals, seen = list(layers), []  # type: ignore[var-annotated]
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Stand(layer, seen)
        yield seen
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


class LayerRunner:
    """Runs single layers of a model, and what is before and behind them.

    Args:
        model: a supernet, or a plain model, in evaluation mode; what is active in a layer when it runs is what is
            computed.
        family: row of a plain model; by default that of its type.
    """

    def __init__(self, model: Supernet | PreTrainedModel, *, family: Family | None = None) -> None:
        if isinstance(model, Supernet):
            model.require_plain("running single layers (refit, quality tables)")
            model.require_layers("running single layers (refit, quality tables)")
            family = model.family
        plain: PreTrainedModel = model.model if isinstance(model, Supernet) else model
        row = family_of(plain, family)
        self.model, self.layers = plain, layers_of(plain, row)
        self._options = {"use_cache": False} if row.causal else {}

    def calls(self, batch: Batch) -> LayerCalls:
        """Finds out how the model calls its layers on a batch.

        Raises:
            DataError: the batch has no ``input_ids``, or one that the model has no embedding of.
        """
        feed = self._feed(batch)
        self._check_ids(feed["input_ids"])
        with _without_layers(self.layers) as seen:
            self.model.base_model(**{k: v for k, v in feed.items() if k not in _TARGETS}, **self._options)
        hidden = seen[0][0]
        mask = feed.get("attention_mask")
        kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        return LayerCalls(hidden, tuple((args, kwargs) for _, args, kwargs in seen), kept)

    def _check_ids(self, ids: Tensor) -> None:
        known = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        if not ids.numel():
            raise DataError("a calibration batch has no tokens; leave empty texts out")
        if not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise DataError(
                f"a calibration batch has the token {int(ids.max() if ids.min() >= 0 else ids.min())}, the model knows "
                f"0 to {known - 1}; tokenize the text with the model's own tokenizer"
            )

    def run(self, index: int, hidden: Tensor, calls: LayerCalls) -> Tensor:
        """Runs one layer, ``(B, T, D) -> (B, T, D)``."""
        args, kwargs = calls.arguments[index]
        output = self.layers[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def finish(self, batch: Batch, hidden: Tensor) -> Any:
        """The model's outputs when ``hidden`` of ``(B, T, D)`` leaves its last layer."""
        return self._behind(self.model, self._feed(batch), hidden)

    def finish_base(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The last hidden state of the model without its head, ``(B, T, D)``, when ``hidden`` leaves its last layer."""
        feed = {name: value for name, value in self._feed(batch).items() if name not in _TARGETS}
        result: Tensor = self._behind(self.model.base_model, feed, hidden)[0]
        return result

    def _behind(self, model: nn.Module, feed: Mapping[str, Tensor], hidden: Tensor) -> Any:
        with _without_layers(self.layers):
            self.layers[len(self.layers) - 1].register_forward_hook(lambda *_: hidden)
            return model(**feed, **self._options)

    def _feed(self, batch: Batch) -> dict[str, Tensor]:
        if "input_ids" not in batch:
            raise DataError(f"a calibration batch has no 'input_ids', only {sorted(batch)}")
        return {name: value.to(self.model.device) for name, value in batch.items()}


_TARGETS = ("labels", "next_sentence_label", "start_positions", "end_positions")


class _Enough(Exception):
    """Ends the run of a layer once its projection has run."""


class Sublayers:
    """Watches the output projections of a layer while it runs inside the ``with`` block.

    Args:
        part: the layer.
        until: stop the layer behind this sublayer's projection; the layer's output is not needed.

    Attributes:
        inputs: what entered the projection of each sublayer that ran, ``(B, T, N)``.
        outputs: what came out, ``(B, T, D)``.
    """

    def __init__(self, part: LayerPart, *, until: Sublayer | None = None) -> None:
        self.part, self.until = part, until
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._before_mlp: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Sublayers:
        part, row = self.part, self.part.family
        self._hook(part.layer.get_submodule(row.ffn_in[0]), self._on_mlp)
        for sublayer in SUBLAYERS:
            projection = output_projection(part, sublayer)
            self._hook(projection, lambda module, args, name=sublayer: self._on_inputs(name, args))
            handle = projection.register_forward_hook(
                lambda module, args, output, name=sublayer: self._on_output(name, output)
            )
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._hooks.close()
        return kind is _Enough

    def _hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        self._hooks.callback(module.register_forward_pre_hook(function).remove)

    def _on_mlp(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._before_mlp = args[0]

    def _on_inputs(self, name: str, args: tuple[Tensor, ...]) -> None:
        self.inputs[name] = args[0]

    def _on_output(self, name: str, output: Tensor) -> None:
        self.outputs[name] = output
        if name == self.until:
            raise _Enough

    def residual(self, sublayer: Sublayer, hidden: Tensor) -> Tensor:
        """What the layer adds the projection's output to, where ``hidden`` of ``(B, T, D)`` entered it."""
        if sublayer == "attention":
            return hidden
        if self.part.family.pre_norm:
            mixed = self.outputs.get("attention")  # missing where attention is skipped
            return hidden if mixed is None else hidden + mixed.reshape(hidden.shape)
        assert self._before_mlp is not None
        return self._before_mlp.reshape(hidden.shape)

    def stream(self, sublayer: Sublayer, hidden: Tensor) -> Tensor:
        """The sum of residual and output right behind a sublayer's projection, ``(B, T, D)``."""
        return self.residual(sublayer, hidden) + self.outputs[sublayer].reshape(hidden.shape)


@contextmanager
def shaped(part: LayerPart, shape: LayerShape) -> Iterator[None]:
    """Gives one layer a shape inside the block, whatever is active."""
    before = part.current
    part.apply(shape)
    try:
        yield
    finally:
        part.apply(before)


def output_projection(part: LayerPart, sublayer: Sublayer) -> ElasticProjection:
    """The projection through which a sublayer adds to the residual stream."""
    return part.projections()[output_path(part, sublayer)]


def output_path(part: LayerPart, sublayer: Sublayer) -> str:
    """Path of :func:`output_projection` in the layer."""
    return part.family.attention_out if sublayer == "attention" else part.family.ffn_out


def kept_weight(projection: ElasticProjection, inputs: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The first ``inputs`` rows of a projection, or all, as ``(I, O)``, and its bias ``(O,)``."""
    weight = projection.weight
    kept = weight[:, :inputs].t() if isinstance(projection, ElasticLinear) else weight[:inputs]
    return kept, projection.bias


class HiddenStates:
    """Hidden states of a list of batches; what does not fit into memory waits in temporary files.

    Args:
        memory: bytes that may stay in memory.
        folder: where temporary files go; by default the system's.
    """

    def __init__(self, *, memory: int = MEMORY_LIMIT, folder: str | Path | None = None) -> None:
        self._memory, self._place = memory, folder
        self._kept: dict[int, Tensor] = {}
        self._used = 0
        self._devices: dict[int, str] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        old = self._kept.pop(index, None)
        self._used -= 0 if old is None else old.nbytes
        if self._used + hidden.nbytes <= self._memory:
            self._kept[index] = hidden
            self._used += hidden.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hf-elastic-", dir=self._place)
        self._devices[index] = str(hidden.device)
        save_file({"hidden": hidden.contiguous()}, self._file(index))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept.get(index)
        return load_file(self._file(index), device=self._devices[index])["hidden"] if kept is None else kept

    def _file(self, index: int) -> str:
        assert self._folder is not None
        return str(Path(self._folder.name) / f"{index}.safetensors")

    def close(self) -> None:
        """Frees memory and files."""
        self._kept.clear()
        self._used = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """A batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def checked_batches(batches: Iterable[Batch] | Batch) -> list[Batch]:
    """Returns calibration batches as a list.

    Raises:
        DataError: there is none, or one is no dict of tensors.
    """
    data = [batches] if isinstance(batches, Mapping) else list(batches)
    if not data:
        raise DataError("there is no calibration batch; pass a list of at least one")
    for batch in data:
        entries = batch if isinstance(batch, Mapping) else {"the batch": None}
        if bad := [name for name, value in entries.items() if not isinstance(value, Tensor)]:
            got = batch[bad[0]] if isinstance(batch, Mapping) else batch
            raise DataError(
                f"a calibration batch must be a dict of tensors such as input_ids, got a {type(got).__name__} for "
                f"{bad[0]}; use a data collator with return_tensors='pt'"
            )
    return data
