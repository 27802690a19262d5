"""A text model as a graph of tensors: what goes in, what comes out, and whether a runtime gives the same."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_elastic.errors import ExportError
from hf_elastic.models import MODEL_TYPES
from hf_elastic.models.elastic_layers import skipped_sublayers
from hf_elastic.models.elastic_routing import routed_layers

Int8 = Literal["dynamic", "static"]
Padding = Literal["none", "right", "left"]
Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
"""A runtime: arrays by name of the input to arrays by name of the output."""

TOLERANCE = 1e-3
TRACED = (2, 12)
_CHECKED = ((1, 5, 10), (3, 17, 5), (2, 9, 0))  # sequences, tokens, in a cache before: none as a graph is traced
_PAST = 3  # tokens in the cache of an example
_OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")
_OF_SEQUENCES = ("pooler_output",)


@dataclass(frozen=True)
class GraphReport:
    """What was written for a runtime.

    Attributes:
        directory: the folder.
        model_file: the graph, relative to it.
        runtime: ``onnx`` or ``openvino``.
        int8: how weights were made integers; ``None``: they are floats.
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        max_difference: largest |difference| between outputs of the runtime and of torch, on random token ids with
            padding, before weights were made integers.
        int8_difference: the same of the integers that were written, as a share of the largest |output|.
        size: bytes of the graph and its weights.
        files: names of the other files in the folder.
    """

    directory: Path
    model_file: str
    runtime: str
    int8: Int8 | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_difference: float
    int8_difference: float | None
    size: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        kept = (
            "" if self.int8_difference is None else f"; int8 ({self.int8}) {self.int8_difference:.1%} off the largest"
        )
        return (
            f"{self.directory / self.model_file}: {self.size / 1e6:.1f} MB, outputs equal torch's within "
            f"{self.max_difference:.1e}{kept}\n  {shown(self.inputs)} -> {shown(self.outputs)}"
        )


def shown(names: Sequence[str]) -> str:
    """Names of tensors in a line, the caches in short."""
    plain = [name for name in names if "." not in name]
    caches = sorted({name.split(".", 1)[0] for name in names if "." in name})
    return ", ".join([*plain, *(f"{name}.*" for name in caches)])


class TextGraph(nn.Module):
    """A model whose forward takes and gives plain tensors in a fixed order.

    Args:
        model: in evaluation mode, in fp32, on the CPU.
        with_past: whether the KV cache goes in and comes out: ``past_key_values.0.key`` and ``present.0.key`` of shape
            ``(B, K, T, head_dim)``, for each layer that has attention; with ``position_ids`` of the new tokens.

    Attributes:
        inputs: names of the inputs in order.
        outputs: names of the outputs in order.
        cached: layers that have a KV cache, with their heads and the size of a head.

    Raises:
        ExportError: the model has no outputs that are known here, or with ``with_past`` no KV cache.
    """

    def __init__(self, model: PreTrainedModel, *, with_past: bool = False) -> None:
        super().__init__()
        self.model = model
        self.with_past = with_past
        if with_past and not model.can_generate():
            raise ExportError(f"a {type(model).__name__} does not generate, so it has no KV cache; leave with_past")
        accepted = inspect.signature(model.forward).parameters
        types = getattr(model.config, "type_vocab_size", None) or 0
        self.inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if types > 1 else [])]
        self.inputs = [name for name in self.inputs if name in accepted]
        self.cached: dict[int, tuple[int, int]] = {}
        self._depth = 0
        feed = {name: value for name, value in self.example(*TRACED).items() if name in self.inputs}
        with torch.inference_mode():
            found = model(**feed, **({"use_cache": with_past} if "use_cache" in accepted else {}))
        self._options: dict[str, Any] = {} if "use_cache" not in accepted or with_past else {"use_cache": False}
        self.outputs = [name for name in _OUTPUTS if found.get(name) is not None]
        if not self.outputs:
            raise ExportError(f"a {type(model).__name__} gives {', '.join(found)}, of which a graph here has none")
        if with_past:
            self._add_cache(found.get("past_key_values"))

    def _add_cache(self, cache: Any) -> None:
        if cache is None or "logits" not in self.outputs:
            raise ExportError(f"a {type(self.model).__name__} gives no KV cache; leave with_past")
        self._depth = len(cache.layers)
        shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
        lacking = without_attention(self.model.config)
        self.cached = {number: shape for number, shape in enumerate(shapes) if number not in lacking}
        if not self.cached:
            raise ExportError("no layer of the model has attention, so there is no KV cache; leave with_past")
        pairs = [f"{layer}.{part}" for layer in self.cached for part in ("key", "value")]
        self.inputs += ["position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
        self.outputs += [f"present.{pair}" for pair in pairs]

    def example(
        self, batch_size: int, tokens: int, *, past: int = _PAST, padding: Padding = "right", seed: int = 0
    ) -> dict[str, Tensor]:
        """Random inputs whose rows are padded differently, those after the first; with a cache of random states.

        Args:
            batch_size: sequences.
            tokens: new ones of each, padding included.
            past: tokens in the cache, where there is one.
            padding: on which side; ``right`` also ends what a cache holds, as a prefill of padded prompts leaves it.
            seed: of the draws.
        """
        past = past if self.with_past else 0
        generator = torch.Generator().manual_seed(seed)
        config = self.model.config
        choices = (2,) if type(self.model).__name__.endswith("MultipleChoice") else ()
        shape = (batch_size, *choices, tokens)
        ids = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, shape, generator=generator)
        mask = torch.ones(*shape[:-1], past + tokens, dtype=torch.long)
        for row in range(1, batch_size if padding != "none" else 1):
            count = min(2 * row, tokens - 1)
            if padding == "left":
                mask[row, ..., :count] = 0
            else:
                mask[row, ..., past + tokens - count :] = 0
                mask[row, ..., max(past - count, min(past, 1)) : past] = 0
        ids = ids.masked_fill(mask[..., past:] == 0, config.pad_token_id or 0)
        feed = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = (torch.arange(tokens) >= tokens // 2).long().expand(shape).contiguous()
        if self.with_past:
            feed["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:].contiguous()
        for layer, (heads, size) in self.cached.items():
            for part in ("key", "value"):
                states = torch.randn(batch_size, heads, past, size, generator=generator)
                feed[f"past_key_values.{layer}.{part}"] = states
        return {name: feed[name] for name in self.inputs}

    def axes(self) -> tuple[dict[int, str], ...]:
        """The axes of each input whose size may be another than in the example, with their names."""
        choices = {1: "choices"} if type(self.model).__name__.endswith("MultipleChoice") else {}
        tokens = {0: "batch", **choices, 1 + len(choices): "tokens"}
        named = {"attention_mask": {0: "batch", 1: "past_and_tokens"}} if self.with_past else {}
        caches = {name: {0: "batch", 2: "past"} for name in self.inputs if name.startswith("past_key_values.")}
        named |= caches
        return tuple(named.get(name, tokens) for name in self.inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        feed = dict(zip(self.inputs, tensors, strict=True))
        options = dict(self._options)
        cache = None
        if self.with_past:
            cache = self._cache({name: feed.pop(name) for name in list(feed) if name.startswith("past_key_values.")})
            options |= {"past_key_values": cache, "use_cache": True}
        found = self.model(**feed, **options)
        return tuple(_output(found, name, cache) for name in self.outputs)

    def _cache(self, states: Mapping[str, Tensor]) -> DynamicCache:
        """A cache of what came in; a layer without attention holds one zero per token, as its forward writes."""
        first = next(iter(states.values()))
        filler = first.new_zeros(first.shape[0], 1, first.shape[2], 1)  # (B, 1, T, 1)
        cache = DynamicCache()
        for layer in range(self._depth):
            keys, values = (states.get(f"past_key_values.{layer}.{part}", filler) for part in ("key", "value"))
            held: Any = DynamicLayer()
            held.lazy_initialization(keys, values)
            held.keys, held.values = keys, values  # an update would join them to an empty tensor of another rank
            cache.layers.append(held)
        return cache


def _has_routers(model: PreTrainedModel) -> bool:
    """Whether attention has routers, which take a mask of their own."""
    return model.config.model_type in MODEL_TYPES and bool(routed_layers(model.config))


def _mask_without_empty_rows(*arguments: Any, **options: Any) -> Tensor | None:
    """What :func:`sdpa_mask` gives, ``(B, 1, T, T)``; a row that would see nothing sees everything."""
    mask = sdpa_mask(*arguments, **options)
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)


_SEEING = "hf_elastic_graph"  # an attention implementation for graphs alone
AttentionInterface.register(_SEEING, sdpa_attention_forward)
AttentionMaskInterface.register(_SEEING, _mask_without_empty_rows)


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model as it can be traced: in fp32, on the CPU, with attention that is made of plain operations.

    Where a token sees nothing, as padding on the left does, torch's attention gives zeros and that of OpenVINO NaN,
    which the cache would keep. So it sees everything there: nobody reads it, and it is finite everywhere.

    What is not so is copied, the model itself is as before when the block ends.
    """
    fits = model.dtype == torch.float32 and model.device.type == "cpu"
    taken = model if fits else copy.deepcopy(model).float().cpu()
    before, was_training = taken.config._attn_implementation, taken.training
    try:
        taken.eval()
        if before != "eager":
            taken.set_attn_implementation("sdpa" if _has_routers(taken) else _SEEING)
        yield taken
    finally:
        taken.train(was_training)
        if taken.config._attn_implementation != before:
            taken.set_attn_implementation(before)


def _output(found: Any, name: str, cache: DynamicCache | None) -> Tensor:
    if cache is None or not name.startswith("present."):
        return found[name]
    _, layer, part = name.split(".")
    held: Any = cache.layers[int(layer)]
    return held.keys if part == "key" else held.values


def without_attention(config: Any) -> set[int]:
    """Layers of a static model whose attention is left out."""
    layers = getattr(config, "per_layer_config", None) or ()
    return {number for number, layer in enumerate(layers) if "attention" in skipped_sublayers(layer)}


def longest_checked(*, with_past: bool) -> int:
    """Tokens of the longest sequence that :func:`check_graph` runs, those in a cache included."""
    return max(tokens + (past if with_past else 0) for _, tokens, past in _CHECKED)


def check_graph(graph: TextGraph, run: Run) -> tuple[float, float]:
    """Compares a runtime with torch on random token ids, in shapes that the graph was not traced with.

    Rows are padded on neither side, on the right and on the left. Outputs at padding are not compared: nobody reads
    them, and runtimes differ in what a softmax over nothing is. What a cache holds there must be finite, as the next
    token weighs it by zero.

    Returns:
        Largest |difference|, and the largest |output|.
    """
    worst, largest = 0.0, 0.0
    for number, ((batch_size, tokens, past), padding) in enumerate(product(_CHECKED, get_args(Padding))):
        feed = graph.example(batch_size, tokens, past=past, padding=padding, seed=number + 1)
        with torch.inference_mode():
            wanted = dict(zip(graph.outputs, graph(*feed.values()), strict=True))
        found = run({name: tensor.numpy() for name, tensor in feed.items()})
        for name, tensor in wanted.items():
            got = torch.from_numpy(np.asarray(found[name]))
            if got.shape != tensor.shape:
                raise ExportError(f"the graph gives {name} of shape {tuple(got.shape)}, torch {tuple(tensor.shape)}")
            if name.startswith("present.") and not got.isfinite().all():
                raise ExportError(f"the graph gives {name} that is not finite with padding on the {padding}")
            kept = _compared(feed["attention_mask"].bool(), name, tensor, tokens=tokens)
            worst = max(worst, float((got - tensor)[kept].abs().max()))
            largest = max(largest, float(tensor[kept].abs().max()))
    return worst, largest


def _compared(mask: Tensor, name: str, tensor: Tensor, *, tokens: int) -> Tensor:
    """Where an output is compared: everywhere, or of one that has a row for each token at the real ones."""
    if name.startswith("present."):  # (B, K, T, head_dim), tokens that were in the cache before included
        return mask[:, None, :, None].expand(tensor.shape)
    new = mask[..., mask.shape[-1] - tokens :]
    if name in _OF_SEQUENCES or tensor.shape[: new.dim()] != new.shape:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return new.reshape(*new.shape, *(1 for _ in tensor.shape[new.dim() :])).expand(tensor.shape)


def require_equal(difference: float, *, runtime: str) -> None:
    """Checks what :func:`check_graph` found of a graph of floats.

    Raises:
        ExportError: the runtime gives something else than torch.
    """
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{runtime} differs from torch by {difference:.2e}, more than {TOLERANCE:.0e}; nothing was written; please "
            "report this with the model's config"
        )
