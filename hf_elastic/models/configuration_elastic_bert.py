"""Configuration of ``elastic_bert``: BERT, RoBERTa and DistilBERT whose layers may differ."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from .elastic_layers import PerLayerShapes


@strict
class ElasticBertConfig(PerLayerShapes, BertConfig):
    """A :class:`~transformers.BertConfig` with per-layer shapes, and with what RoBERTa and DistilBERT do differently.

    Per layer (``per_layer_config``): ``intermediate_size``, ``num_attention_heads``, ``head_dim``, ``block``,
    ``bottleneck_head_dim``, ``skip``. With ``candidate_blocks`` every layer holds several blocks of which one is
    computed: the body of a supernet, from which :func:`hf_elastic.make_elastic` makes a choice per layer.

    Attributes:
        head_dim: size of a head, whatever the number of heads; by default ``hidden_size // num_attention_heads``.
        type_vocab_size: 0 leaves out the token type embeddings, as DistilBERT does.
        positions_skip_padding: position ids count non-padding tokens from ``pad_token_id + 1``, as RoBERTa does.
        add_pooling_layer: whether the base model has a pooler; a sequence classifier has one in any case, the other
            heads have none.
        pooler_activation: of the pooler: ``tanh`` for BERT and RoBERTa, ``relu`` for DistilBERT.
        pooler_dropout: dropout before the pooler of a sequence classifier, as RoBERTa has it.
        mlm_activation: of the masked-language head; by default ``hidden_act``.
        attention_output_dropout_prob: dropout after the attention's output projection; by default
            ``hidden_dropout_prob``.
        token_classifier_dropout: dropout before a token classifier; by default as for a sequence classifier.
        qa_dropout: dropout before the question answering head.
        embedding_size: dimensions of the word embeddings where these differ from the hidden size, to which a linear
            map takes them; the masked-language head then maps back before its tied decoder, as ALBERT's does.
        trigram_input: a token is embedded with the next and the one before it side by side, as MobileBERT does; beside
            padding, as ``attention_mask`` says it, with zeros as at the end of a row (MobileBERT embeds the padding).
        block: kind of the layers, one of :data:`~hf_elastic.models.elastic_blocks.BLOCKS`.
        bottleneck_size: width of bottleneck blocks, by default a quarter of the hidden size.
        bottleneck_head_dim: size of a head in a bottleneck block, whatever the number of heads; by default
            ``bottleneck_size // num_attention_heads``.
        bottleneck_act: activation of the FFN in bottleneck blocks.
        candidate_blocks: blocks that every layer holds; ``intermediate_size`` is then the width that is allocated.
        candidate_widths: per layer and candidate, the width that is in use; by default all.
        candidate_heads: per layer and candidate, which heads are in use: ``None`` for all, a list of those that stay,
            or into how many heads all the weights are split.
        routing: routers of ElastiFormer by layer: ``{"layers": {"0": {"hidden": None, "mlp_tokens": {"of": 100,
            "values": [80, 100], "active": 80}, "experts": {...}}}}``, with ``attention_tokens`` and ``heads`` alike.
            Tokens are per cent; heads are all (groups of) heads that a layer has, experts runs of its FFN neurons.
    """

    model_type = "elastic_bert"
    per_layer_names: ClassVar[dict[str, str]] = {
        "intermediate_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
    }
    per_layer_extras: ClassVar[tuple[str, ...]] = ("head_dim", "block", "bottleneck_head_dim")
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_elastic_bert.ElasticBertConfig",
        "AutoModel": "modeling_elastic_bert.ElasticBertModel",
        "AutoModelForMaskedLM": "modeling_elastic_bert.ElasticBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_elastic_bert.ElasticBertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_elastic_bert.ElasticBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_elastic_bert.ElasticBertForQuestionAnswering",
    }

    head_dim: int | None = None
    positions_skip_padding: bool = False
    add_pooling_layer: bool = True
    pooler_activation: str = "tanh"
    pooler_dropout: float | int = 0.0
    mlm_activation: str | None = None
    attention_output_dropout_prob: float | int | None = None
    token_classifier_dropout: float | int | None = None
    qa_dropout: float | int = 0.0
    embedding_size: int | None = None
    trigram_input: bool = False
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
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_encoder(self) -> None:
        """Checks that nothing asks for a decoder or for position ids that cannot be.

        Raises:
            ValueError: ``is_decoder`` or ``add_cross_attention`` is set, or RoBERTa's positions have no padding token.
        """
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("elastic_bert is an encoder: is_decoder and add_cross_attention must be False")
        if self.positions_skip_padding and self.pad_token_id is None:
            raise ValueError("positions_skip_padding=True needs a pad_token_id, got None")


__all__ = ["ElasticBertConfig"]
