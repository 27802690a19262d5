"""What the three elastic model types share: per-layer shapes in a config, and the cache slot of a skipped attention.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from .elastic_blocks import check_blocks, complete_blocks, head_size
from .elastic_routing import check_routing, with_text_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Base
else:
    # At run time a plain mixin: a config among the bases would bring back the defaults that BertConfig replaces.
    Base = object

SUBLAYERS = ("attention", "mlp")
MOST_LAYERS = 1024
"""More layers than any model has: what a broken config asks for would take hours to make."""


def check_depth(count: Any) -> None:
    """Checks the number of layers, before something is made for each of them.

    Raises:
        ValueError: it is none, or more than :data:`MOST_LAYERS`.
    """
    if type(count) is not int or not 0 <= count <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={str(count)[:40]} must be a number of layers, at most {MOST_LAYERS}")


class PerLayerShapes(Base):
    """Mixin for a config whose layers may differ in width, in heads, in their block and in which sublayers they have.

    The shapes sit in transformers' own ``per_layer_config``: a mapping from layer number to what differs from the
    global config. ``skip`` lists sublayers that a layer does not have. The common names ``intermediate_size`` and
    ``num_attention_heads`` are accepted whatever the family calls them.
    """

    # Field of this family for each size that may differ per layer.
    per_layer_names: ClassVar[dict[str, str]]
    # Further fields that may differ per layer: the block and the sizes of its heads.
    per_layer_extras: ClassVar[tuple[str, ...]] = ()
    # Auto class -> "file.Class", what a checkpoint lists for processes without hf_elastic.
    auto_classes: ClassVar[dict[str, str]]
    # Routers by layer, see elastic_routing.py.
    routing: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        check_depth(self.num_hidden_layers)
        self.routing = with_text_numbers(self.routing)
        shapes = kwargs.get("per_layer_config")
        if shapes is not None:
            if not isinstance(shapes, dict) or not all(isinstance(layer, dict) for layer in shapes.values()):
                raise ValueError("per_layer_config must be a dict from numbers of layers to dicts of what differs")
            names = self.per_layer_names
            kwargs["per_layer_config"] = {
                number: {names.get(name, name): value for name, value in layer.items()}
                for number, layer in shapes.items()
            }
        if self.per_layer_extras:
            complete_blocks(self, kwargs.get("per_layer_config"))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks every layer's shape; runs when a config is made and when it is saved.

        Raises:
            ValueError: a layer sets what may not differ per layer, skips what it does not have, or has an impossible
                size.
        """
        if self.is_heterogeneous:
            allowed = {*self.per_layer_names.values(), *self.per_layer_extras}
            if self.per_layer_extras and self.candidate_blocks is not None:
                raise ValueError(
                    "a config with candidate_blocks says sizes by candidate_widths and candidate_heads; leave out "
                    "per_layer_config"
                )
            unknown = sorted((self.per_layer_attributes or set()) - allowed)
            if unknown:
                raise ValueError(
                    f"per_layer_config sets {', '.join(unknown)}; "
                    f"only {', '.join(sorted(allowed))} and skip may differ per layer"
                )
            for layer in self.per_layer_config:
                layer.validate_architecture()
            return
        unknown = sorted(set(skipped_sublayers(self)) - set(SUBLAYERS))
        if unknown:
            raise ValueError(f"a layer skips {', '.join(unknown)}; it can skip {' and '.join(SUBLAYERS)}")
        for name in ("head_dim", *self.per_layer_names.values()):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; a sublayer is left out by skip")
        if self.per_layer_extras:
            check_blocks(self)

    def validate_routing(self) -> None:
        """Checks what ``routing`` says.

        Raises:
            ValueError: see :func:`~hf_elastic.models.elastic_routing.check_routing`.
        """
        check_routing(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as a dict, the depth of layers that differ under its common name too.

        A Trainer reads the config of a checkpoint as one of no model type, to which ``n_layer`` says nothing.
        """
        stated = super().to_dict()
        if stated.get("per_layer_config"):
            stated["num_hidden_layers"] = self.num_hidden_layers
        return stated

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, naming the classes that load it where hf_elastic is not installed."""
        self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def skipped_sublayers(layer_config: Any) -> list[str]:
    """Sublayers that a layer does not have, out of ``attention`` and ``mlp``."""
    return getattr(layer_config, "skip", None) or []


def write_cache_filler(cache: Any, hidden_states: Any, layer_idx: int) -> None:
    """Keeps the length of a KV cache right where a layer has no attention.

    transformers reads the length of a cache from its first layer, and counts an empty tensor as length 0; one zero per
    token, ``(B, 1, T, 1)``, keeps it right whichever layers have no attention.
    """
    if cache is not None:
        filler = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)  # (B, 1, T, 1)
        cache.update(filler, filler, layer_idx)


def static_cache_shapes(config: Any) -> tuple[list[int], list[int]]:
    """Heads and head sizes of a preallocated KV cache, per layer; (1, 1) where the filler goes."""
    heads, sizes = [], []
    for layer in config.per_layer_config:
        present = "attention" not in skipped_sublayers(layer)
        groups = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        heads.append(groups if present else 1)
        sizes.append(head_size(layer, getattr(layer, "block", "")) if present else 1)
    return heads, sizes
