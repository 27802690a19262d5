"""Model families as table rows: what shrinks together, what a skip means, what a stock config can hold.

A row is all that hf_elastic knows of a family; nothing else in the package names a module path. A user passes
a row for a family we lack (``make_elastic(model, config, family=Family(...))``) and has
:func:`hf_elastic.testing.check_family` prove the promises on a tiny random model of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.layers import Skip

StockHeads = Literal["parent", "divides_hidden", "any"]


@dataclass(frozen=True)
class Family:
    """How one model type is laid out. Paths are relative to a layer unless said otherwise.

    Attributes:
        model_type: ``config.model_type`` of the stock models.
        layers: path of the ``ModuleList`` of layers, relative to ``model.base_model``.
        ffn_in: projections whose outputs are FFN neurons.
        ffn_out: projection whose inputs are FFN neurons.
        query, key, value: attention projections; the same path three times when they are fused in one Conv1D.
        attention_out: projection whose inputs are the concatenated heads.
        attention: module that computes attention (its ``layer_idx`` addresses the KV cache).
        head_size: attribute of ``attention`` that holds the size of a head.
        attributes: attributes of ``attention`` that follow the active heads: ``"heads"`` (count) or
            ``"width"``.
        skip_attention, skip_mlp: what each module returns while the sublayer is skipped.
        pre_norm: the residual stream passes a skipped sublayer unchanged *and* zero weights do the same, so
            that a skip can be written as a padded stock checkpoint.
        causal: the model decodes left to right and fills a KV cache.
        grouped: heads are chosen as key/value groups (``num_key_value_heads``).
        config_names: names of sizes in this family's config where they differ from the common ones.
        stock_heads: which head counts the stock config holds with the size of a head kept: only the parent's,
            those that divide ``hidden_size``, or any.
        one_token_heads: linears outside the layers that see one token of a sequence (a pooler, a classifier).
        static_type: ``model_type`` of the static class that holds per-layer shapes, ``None`` when there is
            none.
    """

    model_type: str
    layers: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    query: str
    key: str
    value: str
    attention_out: str
    attention: str
    head_size: str
    skip_attention: tuple[Skip, ...]
    skip_mlp: tuple[Skip, ...]
    pre_norm: bool
    causal: bool = False
    grouped: bool = False
    attributes: Mapping[str, Literal["heads", "width"]] = field(default_factory=dict)
    config_names: Mapping[str, str] = field(default_factory=dict)
    stock_heads: StockHeads = "parent"
    one_token_heads: tuple[str, ...] = ()
    static_type: str | None = None

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one projection."""
        return self.query == self.key == self.value

    @property
    def heads_choice(self) -> str:
        """Name of the choice of heads: ``num_key_value_heads`` for grouped-query attention."""
        return "num_key_value_heads" if self.grouped else "num_attention_heads"

    def config_name(self, name: str) -> str:
        """Name of a common size in this family's config: ``intermediate_size`` is GPT-2's ``n_inner``."""
        return self.config_names.get(name, name)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict; :meth:`from_dict` reads it."""
        skips = {name: [vars(rule) for rule in getattr(self, name)] for name in _SKIP_FIELDS}
        mappings = {name: dict(getattr(self, name)) for name in _MAPPING_FIELDS}
        return {**vars(self), **mappings, **skips}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Family:
        """Inverse of :meth:`to_dict`.

        Raises:
            UnsupportedModelError: a field is missing or unknown.
        """
        try:
            skips = {name: tuple(Skip(**rule) for rule in data[name]) for name in _SKIP_FIELDS}
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
            return cls(**{**values, **skips})
        except (KeyError, TypeError) as error:
            raise UnsupportedModelError(f"not a family row: {error}; its fields are those of Family") from error


_SKIP_FIELDS = ("skip_attention", "skip_mlp")
_MAPPING_FIELDS = ("attributes", "config_names")


_BERT = Family(
    model_type="bert",
    layers="encoder.layer",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    attention="attention.self",
    head_size="attention_head_size",
    attributes={"num_attention_heads": "heads", "all_head_size": "width"},
    skip_attention=(Skip("attention", "input", outputs=2),),
    skip_mlp=(Skip("intermediate", "input"), Skip("output", "residual")),
    pre_norm=False,
    one_token_heads=("pooler.dense", "classifier", "cls.seq_relationship"),
    static_type="elastic_bert",
)

_LLAMA = Family(
    model_type="llama",
    layers="layers",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    attention="self_attn",
    head_size="head_dim",
    skip_attention=(Skip("input_layernorm", "input"), Skip("self_attn", "zero", outputs=2)),
    skip_mlp=(Skip("post_attention_layernorm", "input"), Skip("mlp", "zero")),
    pre_norm=True,
    causal=True,
    grouped=True,
    stock_heads="divides_hidden",
    static_type="elastic_llama",
)

_GPT2 = Family(
    model_type="gpt2",
    layers="h",
    ffn_in=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    attention_out="attn.c_proj",
    attention="attn",
    head_size="head_dim",
    attributes={"num_heads": "heads", "split_size": "width"},
    skip_attention=(Skip("ln_1", "input"), Skip("attn", "zero", outputs=2)),
    skip_mlp=(Skip("ln_2", "input"), Skip("mlp", "zero")),
    pre_norm=True,
    causal=True,
    config_names={
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    static_type="elastic_gpt2",
)


def _like(row: Family, **changes: object) -> Family:
    return Family(**{**vars(row), **changes})  # type: ignore[arg-type]


FAMILIES: tuple[Family, ...] = (
    _BERT,
    _like(
        _BERT,
        model_type="roberta",
        one_token_heads=("pooler.dense", "classifier", "classifier.dense", "classifier.out_proj"),
    ),
    _like(
        _BERT,
        model_type="distilbert",
        layers="transformer.layer",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        attention="attention",
        attributes={"n_heads": "heads", "dim": "width"},
        skip_attention=(Skip("attention", "zero", outputs=2), Skip("sa_layer_norm", "input")),
        skip_mlp=(Skip("ffn", "zero"), Skip("output_layer_norm", "input")),
        config_names={
            "intermediate_size": "hidden_dim",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
        },
        one_token_heads=("pre_classifier", "classifier"),
    ),
    _LLAMA,
    _like(_LLAMA, model_type="qwen2"),
    _like(_LLAMA, model_type="qwen3", stock_heads="any"),
    _like(_LLAMA, model_type="mistral"),
    _GPT2,
)


def family_of(model: PreTrainedModel, family: Family | None = None) -> Family:
    """Finds the row of a model, or checks that the row given fits it.

    Raises:
        UnsupportedModelError: no row names the model's type, or the row's layers are not in the model.
    """
    rows = {row.model_type: row for row in FAMILIES}
    model_type = model.config.model_type
    found = family or rows.get(model_type)
    if found is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no family row; known: {', '.join(sorted(rows))}; "
            "pass family=hf_elastic.Family(...) for another one"
        )
    layers_of(model, found)
    return found


def submodule(root: nn.Module, path: str, *, family: Family) -> nn.Module:
    """Returns ``root.path``, or raises an error that names the row that asked for it."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(root).__name__} has no {path!r}, which the family row of {family.model_type!r} names"
        ) from None


def projection_of(layer: nn.Module, path: str, *, family: Family) -> nn.Module:
    """Returns ``layer.path``, of an adapter's wrapper what is inside it."""
    found = submodule(layer, path, family=family)
    return dict(found.named_children()).get("base_layer", found)


def layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """Returns the ``ModuleList`` of layers that the row names."""
    layers = submodule(model.base_model, family.layers, family=family)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(f"{family.layers!r} of {type(model).__name__} is not a non-empty list of layers")
    return layers


def ffn_neurons(model: PreTrainedModel, family: Family) -> int:
    """Returns the FFN width of the first layer."""
    weight = layers_of(model, family)[0].get_parameter(f"{family.ffn_out}.weight")
    return weight.numel() // int(model.config.hidden_size)


def shifts_labels(model: nn.Module) -> bool:
    """Returns whether position ``t`` is scored against label ``t + 1``, by the model's own loss.

    transformers names the loss of a model (``loss_type``) after its class; GPT-2's class has an older name.
    """
    heads = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(
        getattr(module, "loss_type", None) == "ForCausalLM" or type(module).__name__ in heads
        for module in model.modules()
    )
