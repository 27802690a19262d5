"""Configuration of ``elastic_gpt2``: GPT-2 whose layers may differ."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .elastic_layers import PerLayerShapes


@strict
class ElasticGPT2Config(PerLayerShapes, GPT2Config):
    """A :class:`~transformers.GPT2Config` with per-layer shapes.

    Per layer (``per_layer_config``): ``n_inner``, ``n_head`` (or by their common names ``intermediate_size``,
    ``num_attention_heads``), ``head_dim``, ``block``, ``bottleneck_head_dim``, ``skip``. With ``candidate_blocks``
    every layer holds several blocks of which one is computed: the body of a supernet, from which
    :func:`hf_elastic.make_elastic` makes a choice per layer.

    Attributes:
        head_dim: size of a head, whatever the number of heads; by default ``n_embd // n_head``.
        n_inner: FFN width; by default ``4 * n_embd``.
        block, bottleneck_size, bottleneck_head_dim, bottleneck_act, candidate_blocks, candidate_widths,
            candidate_heads: as in ``elastic_bert``; the blocks are causal and pre-norm here, with GPT-2's LayerNorm.
        routing: routers by layer, as in ``elastic_bert``.
    """

    model_type = "elastic_gpt2"
    per_layer_names: ClassVar[dict[str, str]] = {"intermediate_size": "n_inner", "num_attention_heads": "n_head"}
    per_layer_extras: ClassVar[tuple[str, ...]] = ("head_dim", "block", "bottleneck_head_dim")
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_elastic_gpt2.ElasticGPT2Config",
        "AutoModel": "modeling_elastic_gpt2.ElasticGPT2Model",
        "AutoModelForCausalLM": "modeling_elastic_gpt2.ElasticGPT2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_elastic_gpt2.ElasticGPT2ForSequenceClassification",
    }

    head_dim: int | None = None
    block: str = "standard"
    bottleneck_size: int | None = None
    bottleneck_head_dim: int | None = None
    bottleneck_act: str = "relu"
    candidate_blocks: list[str] | None = None
    candidate_widths: list[list[int]] | None = None
    candidate_heads: list[list[list[int] | int | None]] | None = None
    routing: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        super().__post_init__(**kwargs)

    def validate_decoder(self) -> None:
        """Checks that nothing asks for an encoder's states.

        Raises:
            ValueError: ``add_cross_attention`` is set.
        """
        if self.add_cross_attention:
            raise ValueError("elastic_gpt2 has no cross-attention: add_cross_attention must be False")


__all__ = ["ElasticGPT2Config"]
