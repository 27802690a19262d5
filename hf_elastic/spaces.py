"""Search spaces as papers have published them, by name, as functions of a model's config.

At the size of the paper's model each is exactly the published one; other sizes get the same fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_elastic import costs
from hf_elastic.adapters import ElasticLoraConfig, add_lora
from hf_elastic.blocks import BlockPart, config_width
from hf_elastic.conversion import make_elastic
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import SpaceError
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.space import Choice, Condition, SearchSpace
from hf_elastic.supernet import Supernet


@dataclass(frozen=True)
class PublishedSpace:
    """A space of the base, of its adapters, or of both.

    Attributes:
        source: where it was published.
        elastic: which dimensions of the base are choices; ``None``: none (Mode A).
        lora: the adapters.
    """

    source: str
    elastic: ElasticConfig | None
    lora: ElasticLoraConfig

    def make(self, model: PreTrainedModel, *, seed: int | None = None) -> Supernet:
        """Makes a model elastic in this space, in place, and returns the handle.

        Args:
            model: of the config that the space was made for.
            seed: of the adapters' first weights.
        """
        if self.elastic is not None:
            make_elastic(model, self.elastic)
        return add_lora(model, self.lora, seed=seed)


_BERT_HEADS, _BERT_NEURONS = 12, 3072
_BERT_LAYERS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((384,), (2634, 216)), ((320,), (2634, 181)), ((256,), (2627, 208)), ((512,), (2676, 226)), ((512,), (2628, 179)),
    ((704,), (2662, 175)), ((576,), (2706, 182)), ((576,), (2687, 169)), ((640,), (2616, 165)), ((192,), (2400, 160)),
    ((704, 192), (2198, 163)), ((320,), (1940, 150)),
)  # fmt: skip
"""Widths of query, key and value below 768, and of the FFN below 3072, of each layer of BERT-base."""


def lonas_bert(config: PreTrainedConfig) -> PublishedSpace:
    """LoNAS on BERT: heads and FFN of every layer, and ranks 8, 4, 2 of its query and value (3^25 · 2^11 at BERT-base).

    Muñoz et al., LoNAS (LREC-COLING 2024); table V of ZeroLM (arXiv 2503.18646) and the official NNCF configuration
    agree. The widths are in heads of 64; another model gets the nearest numbers of its own heads and neurons, and layer
    ``i`` of ``n`` the row of BERT's layer nearest to ``11 i / (n - 1)``.

    Raises:
        SpaceError: the config is of no BERT, RoBERTa or DistilBERT.
    """
    _require(config, ("bert", "roberta", "distilbert"), name="lonas_bert")
    distil = config.model_type == "distilbert"
    layers = config.n_layers if distil else config.num_hidden_layers
    heads = config.n_heads if distil else config.num_attention_heads
    neurons = config.hidden_dim if distil else config.intermediate_size
    rows = [_BERT_LAYERS[round(i * (len(_BERT_LAYERS) - 1) / max(1, layers - 1))] for i in range(layers)]
    elastic = ElasticConfig(
        num_attention_heads={i: _scaled(row[0], whole=64 * _BERT_HEADS, to=heads) for i, row in enumerate(rows)},
        intermediate_size={i: _scaled(row[1], whole=_BERT_NEURONS, to=neurons) for i, row in enumerate(rows)},
    )
    targets = ["q_lin", "v_lin"] if distil else ["query", "value"]
    lora = ElasticLoraConfig(r=8, lora_alpha=16, ranks=[8, 4, 2], target_modules=targets)
    return PublishedSpace("LoNAS (LREC-COLING 2024); arXiv 2503.18646, table V", elastic, lora)


_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
_LLAMA_NEURONS = 11008
_LLAMA_WIDTHS = (9632, 8256, 6880, 5504)


def lonas_llama(config: PreTrainedConfig) -> PublishedSpace:
    """LoNAS on LLaMA: FFN widths, and ranks 32 and 28 of attention and of gate and up (2^64 · 5^32 at LLaMA-7B).

    Muñoz et al., LoNAS (LREC-COLING 2024); table VI of ZeroLM (arXiv 2503.18646). ``down_proj`` has an adapter of fixed
    rank; heads are not chosen. At 13B the published widths are the same fractions.

    Raises:
        SpaceError: the config is of no LLaMA family.
    """
    _require(config, _LLAMAS, name="lonas_llama")
    widths = _scaled(_LLAMA_WIDTHS, whole=_LLAMA_NEURONS, to=config.intermediate_size)
    lora = ElasticLoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.1, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"],
        ranks={"q_proj|k_proj|v_proj": [32, 28], "up_proj|gate_proj": [32, 28]},
    )  # fmt: skip
    source = "LoNAS (LREC-COLING 2024); arXiv 2503.18646, table VI"
    return PublishedSpace(source, ElasticConfig(intermediate_size=widths), lora)


def shears_llama(config: PreTrainedConfig) -> PublishedSpace:
    """Shears on LLaMA: ranks 32, 24 and 16 of attention, of up, and of down in every layer, on a sparse frozen base.

    Muñoz et al., Shears (NAACL 2024 industry track, arXiv 2404.10934). The sparsity is that of the weights as they are.

    Raises:
        SpaceError: the config is of no LLaMA family.
    """
    _require(config, _LLAMAS, name="shears_llama")
    modules = ("q_proj|k_proj|v_proj", "up_proj", "down_proj")
    return _ranks_alone("Shears (arXiv 2404.10934)", {name: [32, 24, 16] for name in modules})


def sqft_llama(config: PreTrainedConfig) -> PublishedSpace:
    """SQFT on Llama-3 and Mistral: ranks 32, 28, 24, 20, 16 of attention; up and down have fixed rank.

    Muñoz et al., SQFT (EMNLP 2024 findings, arXiv 2410.03750), the configuration of its runs.

    Raises:
        SpaceError: the config is of no LLaMA family.
    """
    _require(config, _LLAMAS, name="sqft_llama")
    return _ranks_alone("SQFT (arXiv 2410.03750)", {"q_proj|k_proj|v_proj": [32, 28, 24, 20, 16]})


def _ranks_alone(source: str, ranks: dict[str, list[int]]) -> PublishedSpace:
    """Adapters of rank 32 on attention, up and down, as Shears and SQFT have them."""
    lora = ElasticLoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.1, task_type="CAUSAL_LM", ranks=ranks,
        target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    return PublishedSpace(source, None, lora)


def flexibert() -> SearchSpace:
    """FlexiBERT (Tuli et al. 2022, arXiv 2205.11656; arXiv 2503.18646, table VIII): 10,621,440 = 2 (48^2 + 48^4).

    Width and number of layers are one for all; of each layer the operator with its parameter (self-attention
    ``SA-SDP`` or ``SA-WMA``, linear transform ``LT-DFT`` or ``LT-DCT``, dynamic convolution ``DSC-5`` or ``DSC-9``),
    the heads, the width of the FFN and how many FFNs are stacked. Its model is none of transformers'; the space is for
    rankings and searches by closed forms. Operators are ordered by the matrices that they have.
    """
    choices = [Choice("hidden_size", (128, 256)), Choice("num_hidden_layers", (2, 4))]
    operators = ("SA-WMA", "SA-SDP", "DSC-9", "DSC-5", "LT-DFT", "LT-DCT")
    for layer in range(4):
        when = () if layer < 2 else (Condition("num_hidden_layers", (4,)),)
        choices += [
            Choice(f"layers.{layer}.operator", operators, "categorical", parameters=(5, 4, 3, 2, 1, 1), when=when),
            Choice(f"layers.{layer}.num_attention_heads", (2, 4), when=when),
            Choice(f"layers.{layer}.intermediate_size", (512, 1024), when=when),
            Choice(f"layers.{layer}.num_feed_forward", (1, 3), when=when),
        ]
    return SearchSpace(choices)


_LTS_DEPTHS, _LTS_WIDTHS = tuple(range(2, 17)), tuple(range(128, 1025, 64))


def lts_gpt2(*, width_per_layer: bool = False) -> SearchSpace:
    """LiteTransformerSearch's GPT-2 (Javaheripi et al. 2022, arXiv 2203.02094; arXiv 2503.18646, table VII).

    2 to 16 layers, widths 128 to 1024 in steps of 64, and of each layer 2, 4 or 8 heads and an FFN of 256 to 4096 in
    steps of 64, at least twice the width; embeddings of 128, 256 or 512 with a factor of 1, 2 or 4. The width is one
    for all layers, as in every model: 10^37 architectures. The published "more than 10^54" counts it for each layer.

    The least FFN depends on the width, so each width has an FFN choice of its own. Rows of the benchmark lie off this
    grid (their FFNs are in steps of 1); the readers take them.

    Args:
        width_per_layer: the space as it was counted.
    """
    choices = [
        Choice("num_hidden_layers", _LTS_DEPTHS), Choice("embedding_size", (128, 256, 512)),
        Choice("adaptive_embedding_factor", (1, 2, 4)),
    ]  # fmt: skip
    choices += [] if width_per_layer else [Choice("hidden_size", _LTS_WIDTHS)]
    for layer in range(_LTS_DEPTHS[-1]):
        deeper = tuple(depth for depth in _LTS_DEPTHS if depth > layer)
        there = (Condition("num_hidden_layers", deeper),) if len(deeper) < len(_LTS_DEPTHS) else ()
        choices.append(Choice(f"layers.{layer}.num_attention_heads", (2, 4, 8), when=there))
        width = f"layers.{layer}.hidden_size" if width_per_layer else "hidden_size"
        choices += [Choice(width, _LTS_WIDTHS, when=there)] if width_per_layer else []
        for size in _LTS_WIDTHS:
            inner = tuple(range(max(256, 2 * size), 4097, 64))
            when = (*there, Condition(width, (size,)))
            choices.append(Choice(f"layers.{layer}.intermediate_size.{size}", inner, when=when))
    return SearchSpace(choices)


@dataclass(frozen=True)
class ElmSize:
    """One size of ELM (Wang 2025, arXiv 2510.27037).

    Attributes:
        layers: layers, each a choice of one of six blocks.
        hidden_size: width of the residual stream; bottleneck blocks work in a quarter of it.
        start: FFN width of every block before any growth.
        largest: FFN width that a block can grow to, of both kinds of blocks.
        step: neurons that a growth adds.
        heads: of attention, in both kinds of blocks.
        total_parameters: what the mean path is to have when growth ends.
    """

    layers: int
    hidden_size: int
    start: int
    largest: int
    step: int
    heads: int
    total_parameters: float


ELM_SIZES: Mapping[str, ElmSize] = {
    "small": ElmSize(12, 528, 132, 792, 132, 12, 15.7e6),
    "tiny": ElmSize(6, 528, 132, 792, 132, 12, 10e6),
    "micro": ElmSize(6, 192, 48, 384, 48, 12, 5e6),
}
"""Sizes of ELM by name. Published are the numbers of three configurations of 15.7, 10 and 5 million parameters, and
that there are an ELM-Small (of 15.6 million), an ELM-Tiny and an ELM-Micro; which of the smaller configurations is
which of these two is inferred from their sizes. That ``micro`` grows in steps of 48, its start, is ours."""

ElmTask = Literal["masked-lm", "causal-lm"]
_LANGUAGE_MODELS: Mapping[str, tuple[str, str]] = {
    "masked-lm": ("elastic_bert", "ElasticBertForMaskedLM"), "causal-lm": ("elastic_gpt2", "ElasticGPT2ForCausalLM"),
}  # fmt: skip
_PUBLISHED_VOCABULARY, _PUBLISHED_POSITIONS = 30522, 512
_NO_FIELDS = ("num_labels", "attn_implementation", "output_attentions")  # that every config class takes beside its own


def elm_config(
    size: str | ElmSize,
    *,
    task: ElmTask = "masked-lm",
    vocab_size: int = _PUBLISHED_VOCABULARY,
    positions: int = _PUBLISHED_POSITIONS,
    layers: int | None = None,
    blocks: Sequence[str] = BLOCKS,
    **changes: Any,
) -> Any:
    """Config of an ELM supernet (Wang 2025, arXiv 2510.27037): every layer holds six blocks, all at their first width.

    Published, for encoders: sizes (see :data:`ELM_SIZES`), BERT's block and a bottleneck block of a quarter of the
    width with ReLU, each with three projections and with a shared one; GELU in its tanh form; token embeddings of 128,
    three neighbouring ones side by side mapped to the width; BERT's vocabulary. Ours, as the paper's is not known:
    which projections are shared (query with value, key with value), and all of the decoder, GPT-2 with the same blocks.
    Its embeddings are as wide as the model: of three neighbours one is the next token, which a decoder must not see,
    and ``elastic_gpt2`` has no smaller embedding.

    Args:
        size: name in :data:`ELM_SIZES`, or a size of one's own.
        task: ``masked-lm`` gives an ``elastic_bert`` config, ``causal-lm`` an ``elastic_gpt2`` one.
        vocab_size: that of the teacher.
        positions: longest sequence in tokens.
        layers: another depth than that of the size.
        blocks: candidates of each layer.
        changes: passed to the config class, such as ids of special tokens or rates of dropout.

    Raises:
        SpaceError: there is no such size or task, the config class has no such field, or it refuses a value.
    """
    chosen = _elm_size(size)
    if task not in get_args(ElmTask):
        raise SpaceError(f"task={task!r} is not one of {', '.join(get_args(ElmTask))}")
    depth = chosen.layers if layers is None else layers
    for name, value in {"layers": depth, "vocab_size": vocab_size, "positions": positions}.items():
        if type(value) is not int or value < 1:
            raise SpaceError(f"{name}={value!r} must be an integer of at least 1")
    kind = config_class(_LANGUAGE_MODELS[task][0])
    known = {*(entry.name for entry in fields(kind)), *kind.attribute_map, *_NO_FIELDS}
    if unknown := sorted(changes.keys() - known):
        near = get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise SpaceError(f"a config of {kind.model_type} ({task}) has no {unknown[0]}; {hint}")
    shared = {
        "vocab_size": vocab_size, "candidate_blocks": list(blocks),
        "candidate_widths": [[chosen.start] * len(blocks) for _ in range(depth)],
    }  # fmt: skip
    if task == "masked-lm":
        settings: dict[str, Any] = {
            "hidden_size": chosen.hidden_size, "num_hidden_layers": depth, "num_attention_heads": chosen.heads,
            "intermediate_size": chosen.largest, "max_position_embeddings": positions, "embedding_size": 128,
            "trigram_input": True, "hidden_act": "gelu_pytorch_tanh",
        }  # fmt: skip
    else:
        settings = {
            "n_embd": chosen.hidden_size, "n_layer": depth, "n_head": chosen.heads, "n_inner": chosen.largest,
            "n_positions": positions, "activation_function": "gelu_pytorch_tanh", "bos_token_id": None,
            "eos_token_id": None,
        }  # fmt: skip
    try:
        return kind(**{**settings, **shared, **changes})
    except Exception as error:  # of validators of huggingface_hub, which are no ValueError
        raise SpaceError(f"an ELM cannot have this config: {' '.join(str(error).split())}") from error


def elm_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The language model that :func:`elm_config` made a config for."""
    return model_class(*next(names for names in _LANGUAGE_MODELS.values() if names[0] == config.model_type))


def elm_budget(size: str | ElmSize, config: PreTrainedConfig) -> float:
    """Parameters that the mean path of a supernet is to have when growth ends.

    Where layers, width, blocks, vocabulary and task are the published ones, the published number (which counts
    embeddings and layers; :func:`hf_elastic.costs.total_parameters` counts the output head too, 0.1 million). Else half
    way between the mean path at the first widths and the one at the largest: that is where the published numbers lie,
    at 0.50 (15.7 million), 0.47 (10) and 0.60 (5) of the way.

    Args:
        size: that the config was made of.
        config: from :func:`elm_config`.

    Raises:
        SpaceError: there is no such size, or it is no such config.
    """
    chosen = _elm_size(size)
    if not isinstance(config, PreTrainedConfig) or getattr(config, "candidate_blocks", None) is None:
        raise SpaceError(
            f"elm_budget takes the config of a supernet of candidate blocks, got a {type(config).__name__}; give what "
            "elm_config returned (of a Supernet supernet.model.config)"
        )
    found = (config.model_type, config.vocab_size, config.max_position_embeddings, config.num_hidden_layers)
    published = ("elastic_bert", _PUBLISHED_VOCABULARY, _PUBLISHED_POSITIONS, chosen.layers)
    same_blocks = tuple(config.candidate_blocks or ()) == BLOCKS and config_width(config) == chosen.largest
    if found == published and same_blocks and config.hidden_size == chosen.hidden_size:
        return chosen.total_parameters
    with torch.device("meta"):
        skeleton = make_elastic(elm_model_class(config)(config))
    start, end = mean_path_parameters(skeleton), mean_path_parameters(skeleton, width=config_width(config))
    return float(round((start + end) / 2))


def mean_path_parameters(supernet: Supernet, *, width: int | None = None) -> float:
    """Mean number of parameters of paths that take each candidate block of a layer equally often.

    Args:
        supernet: of candidate blocks.
        width: FFN width of all blocks; by default what each has now.
    """

    def held(part: BlockPart, block: str) -> int:
        return part.parameters(block) if width is None else part.parameters_at(block, width)

    means = (sum(held(part, block) for block in part.blocks) / len(part.blocks) for part in supernet.block_parts)
    return costs.parameters_outside_blocks(supernet) + sum(means)


def _elm_size(size: str | ElmSize) -> ElmSize:
    if isinstance(size, ElmSize):
        return size
    if size not in ELM_SIZES:
        raise SpaceError(f"size={size!r} is not one of {', '.join(ELM_SIZES)}")
    return ELM_SIZES[size]


BENCHMARKED: Mapping[str, Callable[[], SearchSpace]] = {"flexibert": flexibert, "lts-gpt2": lts_gpt2}
"""Spaces of benchmarks of trained architectures, by name."""

PUBLISHED: Mapping[str, Callable[[PreTrainedConfig], PublishedSpace]] = {
    "lonas-bert": lonas_bert,
    "lonas-llama": lonas_llama,
    "shears-llama": shears_llama,
    "sqft-llama": sqft_llama,
}
"""The published spaces by the names that the command line uses."""


def _require(config: PreTrainedConfig, allowed: tuple[str, ...], *, name: str) -> None:
    if config.model_type not in allowed:
        raise SpaceError(f"{name} is a space of {', '.join(allowed)} models, got a config of {config.model_type!r}")


def _scaled(sizes: tuple[int, ...], *, whole: int, to: int) -> list[int]:
    """Sizes as the same fractions of another whole, at least 1 and below it."""
    return sorted({min(to, max(1, round(size * to / whole))) for size in sizes})
