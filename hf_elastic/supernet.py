"""The handle: finds the elastic parts of a model, joins their choices, and sets which subnet is active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import costs
from hf_elastic.activation import Activation, adapter_names
from hf_elastic.blocks import BlockPart, BlockShape, blocks_loadability, check_no_adapters
from hf_elastic.downloads import checkpoint_folder
from hf_elastic.errors import (
    ActivationError,
    ArchitectureError,
    CheckpointError,
    ExportError,
    SpaceError,
    UnsupportedModelError,
)
from hf_elastic.families import FAMILIES, Family
from hf_elastic.files import whole_folder
from hf_elastic.layers import PartHolder, Region, plain_children, without_wrappers
from hf_elastic.parts import (
    AdapterPart,
    ElasticPart,
    LayerPart,
    LayerShape,
    Loadability,
    check_wrappers,
    join_choices,
    shapes_loadability,
)
from hf_elastic.routers import RouterPart, require_unrouted
from hf_elastic.routers_folder import ROUTER_FOLDER, write_routers
from hf_elastic.space import Architecture, SearchSpace, Value
from hf_elastic.supernet_folder import (
    SPACE_FILE,
    can_be_read,
    class_named,
    load_model,
    read_record,
    save_generation_config,
    warn_of_companions,
    write_code,
    write_record,
)

ADAPTER_FOLDER = "adapter"


class Supernet:
    """Handle on a model with elastic parts: its space, what is active, what an architecture needs to load.

    Making a handle changes nothing in the model. Several handles on one model share what is active.

    Args:
        model: a model that :func:`hf_elastic.make_elastic` converted, or one with other elastic parts, such as a
            ``PeftModel`` with elastic adapters.

    Attributes:
        model: the model as it was given.
        base: the transformers model in it: the same one, or what a ``PeftModel`` wraps.

    Raises:
        UnsupportedModelError: the model has no elastic part, or an adapter that cannot follow an elastic projection.
        CheckpointError: the model's adapters were trained on another base, or in another space of it.

    Example:
        >>> supernet = hf_elastic.make_elastic(model, hf_elastic.ElasticConfig(intermediate_size=[0.5, 1.0]))
        >>> with supernet.activate(supernet.space.smallest()):
        ...     supernet.model(**inputs)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.base: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
        parts: tuple[ElasticPart, ...] = tuple(
            part for module in model.modules() if isinstance(module, PartHolder) for part in module.elastic_parts
        )
        if not parts:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no elastic part; call hf_elastic.make_elastic(model, ElasticConfig(...)) "
                "first, or get_peft_model(model, ElasticLoraConfig(...))"
            )
        check_wrappers(model, parts)
        if any(isinstance(part, BlockPart) for part in parts):
            check_no_adapters(model)
        adapters = tuple(part for part in parts if isinstance(part, AdapterPart))
        for part in adapters:
            part.link(parts, self.base)
        choices = join_choices(part.choices for part in parts)
        if not choices:
            raise SpaceError(
                "the elastic parts of the model leave nothing to choose; give sizes below the model's own, or "
                "ElasticLoraConfig(ranks=[...]) with ranks below r"
            )
        joined = SearchSpace(choices)
        known = "_hf_elastic_state" in self.base.__dict__
        self._state: Activation = self.base.__dict__.setdefault(
            "_hf_elastic_state", Activation(joined.largest(), joined)
        )
        # A copied state knows no parts; those of the copied model are set as it says.
        changed = self._state.space != joined or (self._state.parts and self._state.parts != parts)
        self._state.parts, self._state.adapter_parts = parts, adapters
        self._state.adapters = adapter_names(self.base)
        if not known or changed:  # new, or parts came or went since the last handle was made
            self._state.space = joined
            self._set(joined.largest())

    @property
    def parts(self) -> tuple[ElasticPart, ...]:
        """The elastic parts of the model, in the order of its modules; all handles on it see the same."""
        return self._state.parts

    @property
    def space(self) -> SearchSpace:
        """The architectures of this model; another one after the order of layers changed, by whichever handle."""
        return self._state.space

    def refresh_space(self) -> None:
        """Joins the choices of the parts again, after the order of layers changed their conditions."""
        self._state.space = self._joined()

    def resized(self) -> None:
        """Joins the choices again after sizes of blocks changed; where the largest was active, the largest now is."""
        was_largest = self.active == self.space.largest()
        self.refresh_space()
        self._restore(self.space.largest() if was_largest else self._carried(self.active))

    def _joined(self) -> SearchSpace:
        return SearchSpace(join_choices(part.choices for part in self.parts))

    @property
    def active(self) -> Architecture:
        """The architecture that is active now. Reading it never changes anything."""
        return self._state.active

    @contextmanager
    def activate(self, architecture: Architecture | Mapping[str, Value]) -> Iterator[Supernet]:
        """Makes an architecture active inside a ``with`` block and restores what was active at its end.

        Blocks may be nested and may be left by an exception.

        Raises:
            ArchitectureError: the architecture is not a point of this space.
            ActivationError: another thread has an activation of this model open, or made one active for good.
        """
        self._state.enter()
        try:
            chosen = self.point(architecture)
            previous, space = self._state.active, self.space
            self._set(chosen)
            try:
                yield self
            finally:
                if self.space is not space:  # it changed inside the block
                    previous = self.space.largest() if previous == space.largest() else self._carried(previous)
                self._restore(previous)
        finally:
            self._state.leave()

    def _carried(self, architecture: Architecture) -> Architecture:
        """An architecture of the space before it changed, as a point of the space now."""
        values: dict[str, Value] = dict(self.space.largest())
        for choice in self.space.choices:
            if architecture.get(choice.name) in choice.values:  # another layer may have become the one that stays
                values[choice.name] = architecture[choice.name]
        return self.space.canonical(values)

    def set_active(self, architecture: Architecture | Mapping[str, Value]) -> None:
        """Makes an architecture active until something else is; prefer :meth:`activate`, which restores.

        Outside of :meth:`activate`, other threads are refused from now on, as long as this one lives.

        Raises:
            ArchitectureError, ActivationError: as :meth:`activate`.
        """
        chosen = self.point(architecture)
        self._state.pin()
        self._set(chosen)

    def point(self, architecture: Architecture | Mapping[str, Value]) -> Architecture:
        """Returns the point of this space that is meant: an architecture itself, or a dict of the choices in effect.

        Raises:
            ArchitectureError: it is not a point of this space.
        """
        if not isinstance(architecture, Mapping):
            raise ArchitectureError(
                f"a {type(architecture).__name__} is no architecture; use a point of supernet.space "
                "or a dict of its choices"
            )
        if isinstance(architecture, Architecture):
            self.space.validate(architecture)
            return architecture
        return self.space.canonical(architecture)

    def _set(self, architecture: Architecture) -> None:
        """Makes an architecture active; nothing changes where that cannot be done for all parts."""
        if self._state.adapters != (now := adapter_names(self.base)):
            raise ActivationError(
                f"the adapters of the model are {', '.join(now) or 'gone'} now, they were "
                f"{', '.join(self._state.adapters) or 'none'} when this handle was made; make another: Supernet(model)"
            )
        self._restore(architecture)

    def _restore(self, architecture: Architecture) -> None:
        """As :meth:`_set`, of the parts that are still there: a block may end after its adapters were unloaded."""
        if any(part.merged and self._holds(part) for part in self.adapter_parts):
            raise ActivationError(
                "an adapter is merged into the weights, where no other subnet can be made active; call "
                "unmerge_adapter() first, and set_active() where a block was left meanwhile"
            )
        gone = {id(part) for part in self.adapter_parts if not part.attached}
        for part in self.parts:
            if id(part) not in gone:
                part.set(architecture)
        self._state.active = architecture

    def expected(self, architecture: Architecture) -> dict[str, int]:
        """Sizes that a forward must show while ``architecture`` is active, 0 for what is skipped.

        Raises:
            ArchitectureError: the architecture is not a point of this space.
        """
        self.space.validate(architecture)
        return {name: size for part in self.parts for name, size in part.expected(architecture).items()}

    def measured(self, **inputs: Any) -> dict[str, int]:
        """Runs one forward and returns the sizes seen in its tensors, to compare with :meth:`expected`.

        Args:
            inputs: passed to the model.
        """
        with ExitStack() as stack, torch.no_grad():
            seen = [stack.enter_context(part.watch()) for part in self.parts]
            self.model(**inputs)
        return {name: size for values in seen for name, size in values.items()}

    def active_regions(self, root: nn.Module | None = None) -> dict[str, tuple[tuple[slice, ...], ...]]:
        """Active boxes of every elastic parameter, by its name in ``model.named_parameters()`` (or in ``root``'s).

        ``()`` means that nothing of it is active (its sublayer is skipped). A parameter that is not named is not
        elastic: all of it is always active.
        """
        by_id: dict[int, Region] = {}
        for part in reversed(self.parts):  # a layer stands before what it holds, and knows that it is skipped
            by_id |= part.regions()
        return {name: by_id[id(p)] for name, p in (root or self.model).named_parameters() if id(p) in by_id}

    @property
    def layer_parts(self) -> tuple[LayerPart, ...]:
        """The parts that are transformer layers, in order."""
        return tuple(part for part in self.parts if isinstance(part, LayerPart))

    @property
    def block_parts(self) -> tuple[BlockPart, ...]:
        """The parts that are a choice between candidate blocks, in order."""
        return tuple(part for part in self.parts if isinstance(part, BlockPart))

    @property
    def adapter_parts(self) -> tuple[AdapterPart, ...]:
        """The parts that are adapters on a projection, in order."""
        return self._state.adapter_parts

    @property
    def router_parts(self) -> tuple[RouterPart, ...]:
        """The parts that are the routers of a layer, in order."""
        return tuple(part for part in self.parts if isinstance(part, RouterPart))

    def _holds(self, part: AdapterPart) -> bool:
        """Whether an adapter is still in the model: ``merge_and_unload`` takes it out."""
        return any(module is part.wrapper for module in self.base.modules())

    def require_plain(self, what: str) -> None:
        """Refuses a model with adapters or routers for what knows nothing of them.

        Raises:
            UnsupportedModelError: it has some.
        """
        require_unrouted(self.base, what)
        if self.adapter_parts:
            raise UnsupportedModelError(
                f"{what} is for models without adapters; do it before they are added, or on "
                "extract(..., merge=True) made elastic again"
            )

    def require_layers(self, what: str, *, instead: str = "extract(supernet, architecture)") -> None:
        """Refuses a model of candidate blocks for what cuts layers; ``instead`` is what to use.

        Raises:
            UnsupportedModelError: it is one.
        """
        if self.block_parts:
            raise UnsupportedModelError(
                f"{what} is for layers with widths, heads or a presence to choose, these are blocks; use {instead}"
            )

    def require_unmerged(self) -> None:
        """Refuses a model whose adapters are in its weights, or gone.

        Raises:
            ExportError: they are.
        """
        gone = any(not self._holds(part) for part in self.adapter_parts)
        if gone or any(part.merged for part in self.adapter_parts):
            cure = "load the adapter again" if gone else "call unmerge_adapter() first"
            raise ExportError(
                f"the adapters were merged into the weights, where no subnet of them can be told apart; {cure}"
            )

    def plain_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules of the transformers model with their names, as if no adapter were there."""
        if not (self.adapter_parts or self.router_parts):
            return self.base.named_modules()
        found = plain_children(self.base, self._inside(), prefix="")
        hidden = {id(module) for part in self.router_parts for module in part.routers.modules()}
        return ((name, module) for name, module in found if id(module) not in hidden)

    def _inside(self) -> dict[int, nn.Module]:
        """What stands inside each adapter, by ``id`` of the adapter."""
        return {id(part.wrapper): part.base for part in self.adapter_parts}

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """Takes adapters and routers out of the transformers model inside the block and yields it; weights stay."""
        with ExitStack() as stack:
            for part in self.router_parts:
                stack.enter_context(part.hidden())
            stack.enter_context(without_wrappers(self.base, self._inside()))
            yield self.base

    @property
    def layer_order(self) -> tuple[int, ...]:
        """Layers from the most to the least important, as ``num_hidden_layers`` keeps them."""
        ranks = {part.rank: part.index for part in self.layer_parts}
        return tuple(ranks[rank] for rank in sorted(ranks))

    @property
    def family(self) -> Family:
        """The row of the model's family.

        Raises:
            UnsupportedModelError: the model has no elastic layers (only adapters or routers).
        """
        if self.block_parts:
            raise UnsupportedModelError(
                "the layers of this model are candidate blocks, which have no family row; extract a subnet and use that"
            )
        if not self.layer_parts:
            raise UnsupportedModelError(
                "the model has no elastic layers, only adapters; call hf_elastic.make_elastic on the model before "
                "get_peft_model to choose widths, heads or layers too"
            )
        return self.layer_parts[0].family

    @property
    def causal(self) -> bool:
        """Whether the model decodes left to right and fills a KV cache."""
        return self.block_parts[0].roles.causal if self.block_parts else self.family.causal

    def layer_shapes(self, architecture: Architecture) -> tuple[LayerShape, ...]:
        """Static shape of every layer in an architecture.

        Raises:
            ArchitectureError: the architecture is not a point of this space.
        """
        self.space.validate(architecture)
        return tuple(part.shape(architecture) for part in self.layer_parts)

    def block_shapes(self, architecture: Architecture) -> tuple[BlockShape, ...]:
        """The block of every layer in an architecture, with its sizes as they are now.

        Raises:
            ArchitectureError: the architecture is not a point of this space.
        """
        self.space.validate(architecture)
        return tuple(part.shape(architecture) for part in self.block_parts)

    def loadability(self, architecture: Architecture) -> Loadability:
        """What the architecture needs to load once exported; known before any search or training.

        * ``stock``: an ordinary checkpoint of the stock class, smaller and faster;
        * ``stock-padded``: the stock class holds it only after padding with zeros to a uniform shape: same
          logits, no speed gain (``export(..., loadability="remote-code")`` writes the compact one);
        * ``remote-code``: needs ``trust_remote_code=True`` (or ``import hf_elastic``), as does whatever routes.

        Raises:
            ArchitectureError: the architecture is not a point of this space.
        """
        shapes = self.layer_shapes(architecture)
        if self.block_parts:
            return blocks_loadability(self.block_shapes(architecture), self.base)
        if any(part.routes(architecture) for part in self.router_parts):
            return "remote-code"
        if not shapes:
            return "stock"  # only adapters are elastic, so the model's shapes are the parent's
        return shapes_loadability(
            shapes,
            self.family,
            hidden_size=self.layer_parts[0].hidden_size,
            parent=self.layer_parts[0].full,
        )

    def to(self, device: str | torch.device) -> Supernet:
        """Moves the model and returns the handle."""
        module: nn.Module = self.model  # transformers types `to` so that mypy cannot read it
        module.to(device)
        return self

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Saves the largest model as a stock checkpoint, with ``search_space.json`` beside it.

        Anyone loads the folder with the stock class (of candidate blocks, all of them, with ``trust_remote_code=True``;
        the largest path is active); :meth:`from_pretrained` restores the supernet bit-equal. The
        parent's tokenizer is not copied, but its folder or Hub name is kept, so that an export finds it. Adapters and
        routers are saved beside the model, in ``adapter`` and ``routers``; :func:`hf_elastic.load_adapter` and
        :func:`hf_elastic.load_routers` put them onto the restored one.

        Args:
            directory: a folder that does not exist or is empty.
            overwrite: whether a non-empty folder may be replaced.

        Raises:
            CheckpointError: the folder is not empty or cannot be written, or transformers refuses to write the
                generation config; nothing is left half-written.
        """
        config = self.base.__dict__.get("_hf_elastic_config")
        if self.block_parts and not self._saves_itself():
            raise CheckpointError("the layers are one block each, with nothing to choose; write the model by export()")
        if config is None and not self._saves_itself():
            raise CheckpointError(
                f"this handle on a {type(self.model).__name__} holds no ElasticConfig, so it cannot be saved; save the "
                "supernet that make_elastic returned, adapters by their save_pretrained, routers by save_routers"
            )
        own = self.block_parts or self.layer_parts
        with whole_folder(directory, overwrite=overwrite) as folder:
            save_generation_config(self.base, folder)
            with self.activate(self.space.largest()):
                with self.plain() as model:
                    model.save_pretrained(folder)
                    write_code(model, folder)
                if self.adapter_parts:
                    self.model.save_pretrained(folder / ADAPTER_FOLDER)
            if self.router_parts:
                (folder / ROUTER_FOLDER).mkdir()
                write_routers(self.base, folder / ROUTER_FOLDER)
            digest = SearchSpace(join_choices(part.choices for part in own)).digest
            row = None if config is None or self.family in FAMILIES else self.family
            write_record(self.base, folder, config=config, row=row, layer_order=self.layer_order, space_digest=digest)

    def _saves_itself(self) -> bool:
        """Whether the model's config says the space: every layer has candidates, of which it keeps the sizes."""
        return bool(self.block_parts) and self.base.config.candidate_blocks is not None

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, model_class: type[PreTrainedModel] | None = None, **kwargs: Any
    ) -> Supernet:
        """Restores a supernet that :meth:`save_pretrained` wrote: same weights, same space, same family row.

        Args:
            directory: the folder, or its name on the Hub.
            model_class: class of the model, where it is none of transformers.
            kwargs: ``revision`` and ``token`` of that name; others, as ``dtype``, go to the model class.

        Raises:
            CheckpointError: a file is missing, truncated, or not the one that was saved.
        """
        from hf_elastic.conversion import ElasticConfig, make_elastic  # conversion builds on this module

        folder = checkpoint_folder(directory, **{key: kwargs.pop(key, None) for key in ("revision", "token")})
        record = read_record(folder)
        config, stated = None, record.get("elastic_config")
        if stated is not None:
            config = ElasticConfig.from_dict({**stated, "layer_order": record["layer_order"]})
        row = None if record.get("family") is None else Family.from_dict(record["family"])
        model = load_model(folder, model_class or class_named(record["class"]), kwargs)
        supernet = make_elastic(model, config, family=row)
        if supernet.space.digest != record["space_digest"]:
            raise CheckpointError(
                f"{folder / SPACE_FILE} was made for another space than its ElasticConfig gives; save it again"
            )
        parent = record.get("parent")
        warn_of_companions(folder, adapters=ADAPTER_FOLDER, routers=ROUTER_FOLDER)
        if isinstance(parent, str) and can_be_read(parent) and not (folder / "tokenizer_config.json").is_file():
            model.config._name_or_path = parent
        return supernet

    def __repr__(self) -> str:
        return f"Supernet({type(self.model).__name__}, {self.space!r})"

    def __str__(self) -> str:
        return costs.describe(self)
