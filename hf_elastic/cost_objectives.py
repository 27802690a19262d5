"""Costs as objectives: closed forms with the tables that exact search reads, and measured latency."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_elastic import costs
from hf_elastic.blocks import BlockPart
from hf_elastic.errors import DataError
from hf_elastic.fingerprints import fingerprint, state_of
from hf_elastic.layers import without_autocast
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.routers import RouterPart
from hf_elastic.search import Objective
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import on_device
from hf_elastic.supernet import Supernet
from hf_elastic.tables.additive import OfAdapter, OfBlock, OfLayer, OfRouter, layer_table
from hf_elastic.tables.block_latencies import BlockLatencyTable
from hf_elastic.tables.budgets import LATENCY, MEMORY, Budgets, Workload, block_memory, layer_memory, memory_bytes
from hf_elastic.tables.latencies import NANOSECONDS, LatencyTable
from hf_elastic.tables.timing import Setting


def parameters(supernet: Supernet) -> Objective:
    """Parameters without embeddings, see :func:`hf_elastic.costs.parameters`."""
    return _parameter_count(supernet, "parameters", costs.parameters)


def total_parameters(supernet: Supernet) -> Objective:
    """Parameters with embeddings, see :func:`hf_elastic.costs.total_parameters`."""
    return _parameter_count(supernet, "total_parameters", costs.total_parameters)


def _parameter_count(supernet: Supernet, name: str, count: Callable[[Supernet, Architecture], int]) -> Objective:
    return _cost(
        supernet,
        name,
        lambda architecture: count(supernet, architecture),
        layer=_added_parameters,
        block=_held,
        router=_routers,
    )


def _added_parameters(part: LayerPart, shape: LayerShape) -> int:
    return -costs.removed_parameters(part, shape)


def _held(part: BlockPart, block: str) -> int:
    return part.parameters(block)


def _routers(part: RouterPart, point: Mapping[str, Value]) -> int:
    return part.parameters(point)


def macs(supernet: Supernet, *, seq_len: int = costs.LATENCY_TOKENS, batch_size: int = 1) -> Objective:
    """MACs of one forward at a stated length, see :func:`hf_elastic.costs.macs`."""
    return _cost(
        supernet,
        "macs",
        lambda a: costs.macs(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
        layer=lambda part, shape: batch_size * costs.layer_macs(part, shape, seq_len=seq_len),
        block=lambda part, block: batch_size * part.macs(block, seq_len=seq_len),
        router=lambda part, point: -batch_size * part.saved_macs(point, seq_len=seq_len),
    )


def adapter_parameters(supernet: Supernet) -> Objective:
    """Parameters of the adapters, see :func:`hf_elastic.costs.adapter_parameters`."""
    return _cost(
        supernet,
        "adapter_parameters",
        lambda a: costs.adapter_parameters(supernet, a),
        adapter=lambda part, point: part.parameters(point),
    )


def adapter_macs(supernet: Supernet, *, seq_len: int = costs.LATENCY_TOKENS, batch_size: int = 1) -> Objective:
    """MACs of the adapters beside their bases, see :func:`hf_elastic.costs.adapter_macs`."""
    return _cost(
        supernet,
        "adapter_macs",
        lambda a: costs.adapter_macs(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
        adapter=lambda part, point: batch_size * part.macs(point, seq_len=seq_len),
    )


def kv_cache_bytes(supernet: Supernet, *, seq_len: int, batch_size: int = 1) -> Objective:
    """Bytes of the KV cache after ``seq_len`` tokens, see :func:`hf_elastic.costs.kv_cache_bytes`."""
    return _cost(
        supernet,
        "kv_cache_bytes",
        lambda a: costs.kv_cache_bytes(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
    )


def memory(
    supernet: Supernet, *, batch_size: int = 1, seq_len: int | None = None, dtype: torch.dtype | None = None
) -> Objective:
    """Bytes of the exported weights and of the KV cache, see :func:`hf_elastic.tables.budgets.memory_bytes`.

    Args:
        batch_size: sequences in the cache.
        seq_len: tokens of each; by default 128, or fewer where the model has fewer positions.
        dtype: of the export; by default the model's.

    Raises:
        DataError: the model has no positions for so many tokens.
    """
    workload = Workload(batch_size, seq_len)
    return _cost(
        supernet,
        MEMORY,
        lambda a: memory_bytes(supernet, a, workload=workload, dtype=dtype),
        arguments=(workload, dtype),
        layer=lambda part, shape: layer_memory(supernet, part, shape, workload=workload, dtype=dtype),
        block=lambda part, block: block_memory(supernet, part, block, workload=workload, dtype=dtype),
        router=lambda part, point: (dtype or supernet.base.dtype).itemsize * part.parameters(point),
    )


def predicted_latency(supernet: Supernet, table: LatencyTable | BlockLatencyTable) -> Objective:
    """Whole nanoseconds of a forward of the exported subnet as a latency table predicts them, a sum over layers.

    A limit on it in nanoseconds is an integer; ``within={"predicted_latency": 0.5}`` is a speed-up of two over the
    parent, of a space of candidate blocks over its largest path.

    Raises:
        CheckpointError: the table is of another model, or not finished.
        DataError: the table does not reach every size of the space.
    """
    table.require(supernet)
    constant = round(NANOSECONDS * table.fit.constant)
    measured = (table.setting, table.fit)
    if isinstance(table, BlockLatencyTable):
        of_block = table.nanoseconds

        def of_path(architecture: Architecture) -> int:
            return constant + sum(of_block(part, part.chosen(architecture)) for part in supernet.block_parts)

        return _cost(supernet, LATENCY, of_path, arguments=measured, unit="ns", block=of_block)
    of_layer = table.nanoseconds

    def of_layers(architecture: Architecture) -> int:
        pairs = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
        return constant + sum(of_layer(part, shape) for part, shape in pairs)

    return _cost(supernet, LATENCY, of_layers, arguments=measured, unit="ns", layer=of_layer)


def latency(
    supernet: Supernet, *, inputs: Mapping[str, Tensor] | None = None, repeats: int = 9, reference: float | None = None
) -> Objective:
    """Seconds of one forward, measured on the model's device beside the largest architecture.

    The value is ``median(subnet) / median(largest) · reference``, so that a machine that slows down between two
    evaluations does not change their order.

    Args:
        inputs: of one forward; by default one sequence of 128 tokens.
        repeats: timed rounds of each evaluation.
        reference: seconds that the largest architecture counts for. By default what it takes at first use in this
            process, which is another number in every other one: a search in a storage, or with an executor, then
            refuses the objective. Give it one number everywhere, such as
            ``costs.architecture_latency(supernet, {"": supernet.space.largest()})[""].median``, measured once.

    Raises:
        DataError: ``reference`` is no positive number.
    """
    if reference is not None and not (isinstance(reference, int | float) and 0 < reference < math.inf):
        raise DataError(f"reference={reference!r} must be the seconds of the largest architecture, above 0")
    largest = supernet.space.largest()
    feed = None if inputs is None else on_device(inputs, supernet.model)
    timed_on = _timed_on(supernet, feed if feed is not None else costs.default_inputs(supernet))
    scaled_by = None if reference is None else float(reference)
    identity = fingerprint(supernet.model, rest=[state_of(supernet), timed_on, scaled_by])

    def measure(architecture: Architecture) -> float:
        with without_autocast(supernet.model):
            timed = costs.architecture_latency(
                supernet, {"largest": largest, "subnet": architecture}, inputs=feed, repeats=repeats
            )
        whole = timed["largest"].median
        return timed["subnet"].median / whole * (first_use(identity, whole) if reference is None else reference)

    related = partial(related_costs, supernet)
    portable = reference is not None
    return Objective("latency", measure, unit="s", related=related, fingerprint=identity, portable=portable)


def first_use(identity: str, seconds: float) -> float:
    """Seconds that an architecture took when this process first measured it in a setting; ``seconds``, if now."""
    return _FIRST_USES.setdefault(identity, seconds)


_FIRST_USES: dict[str, float] = {}  # by fingerprint of the objective


def _timed_on(supernet: Supernet, feed: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What decides about a latency besides the architecture: shapes of the inputs, precision, processor, threads."""
    where = Setting.of(supernet)
    shapes = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in feed.items())
    return "latency", shapes, str(supernet.base.dtype), where.device, where.threads


def budget_costs(
    supernet: Supernet, budgets: Budgets, table: LatencyTable | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Objective]:
    """The costs that :meth:`hf_elastic.tables.budgets.Budgets.limits` names, by name, and the related ones.

    Args:
        budgets: what is asked for.
        table: needed for a speed-up or a latency.
        dtype: of the export; by default the model's.
    """
    known = related_costs(supernet)
    if budgets.needs_table and table is not None:
        known[LATENCY] = predicted_latency(supernet, table)
    if budgets.memory is not None:
        held = budgets.held
        known[MEMORY] = memory(supernet, batch_size=held.batch_size, seq_len=held.length, dtype=dtype)
    return known


def _cost(
    supernet: Supernet,
    name: str,
    function: Callable[[Architecture], int],
    *,
    arguments: Sequence[object] = (),
    layer: OfLayer | None = None,
    block: OfBlock | None = None,
    adapter: OfAdapter | None = None,
    router: OfRouter | None = None,
    unit: str = "",
) -> Objective:
    """A cost; ``layer``, ``block``, ``adapter`` and ``router`` are what one of them adds to it, up to a constant."""
    extremes = (supernet.space.largest(), supernet.space.smallest())
    family = supernet.base.config.model_type
    sizes = (supernet.layer_order, [part.choices for part in supernet.block_parts])
    depends_on = (name, tuple(arguments), family, sizes, [function(point) for point in extremes])
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    table = None
    if layer is not None or adapter is not None or block is not None:
        largest = sum(layer(part, part.full) for part in supernet.layer_parts) if layer else 0
        largest += sum(adapter(part, extremes[0]) for part in supernet.adapter_parts) if adapter else 0
        largest += sum(block(part, part.chosen(extremes[0])) for part in supernet.block_parts) if block else 0
        largest += sum(router(part, extremes[0]) for part in supernet.router_parts) if router else 0
        constant = function(extremes[0]) - largest
        table = layer_table(supernet, layer, block=block, adapter=adapter, router=router, constant=constant)
    return Objective(
        name, function, cost=True, unit=unit, related=lambda: related_costs(supernet), additive=table,
        fingerprint=digest,
    )  # fmt: skip


def related_costs(supernet: Supernet) -> dict[str, Objective]:
    """The costs that ``within=`` may name for any search over a supernet (MACs at 128 tokens)."""
    layers = supernet.layer_parts or supernet.block_parts
    made = [parameters(supernet), total_parameters(supernet), macs(supernet)] if layers else []
    made += [adapter_parameters(supernet), adapter_macs(supernet)] if supernet.adapter_parts else []
    return {objective.name: objective for objective in made}
