"""A family that hf-elastic does not know: a table row for OPT, the promises proved on it, a model made smaller with it.

    python examples/custom_family.py --output small                          # a tiny random OPT, under a minute
    python examples/custom_family.py --model facebook/opt-125m --within 0.7 --output small

A row names what shrinks together, and what a skipped sublayer returns; nothing else has to be written. The checks are
those that every built-in family passes. There is no static class for OPT, so the result is an ordinary checkpoint where
all layers have one shape, which is what the space below keeps to.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import hf_elastic as he
from hf_elastic.testing import Case, check_family

OPT = he.Family(
    model_type="opt",
    layers="decoder.layers",  # relative to model.base_model; all other paths are relative to a layer
    ffn_in=("fc1",),
    ffn_out="fc2",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.out_proj",
    attention="self_attn",
    head_size="head_dim",
    attributes={"num_heads": "heads"},  # what of the attention module follows the active heads
    # A skipped sublayer adds nothing: its norm passes the stream through, its last module returns zeros.
    skip_attention=(he.Skip("self_attn_layer_norm", "input"), he.Skip("self_attn", "zero", outputs=2)),
    skip_mlp=(
        *(he.Skip(name, "input") for name in ("final_layer_norm", "fc1", "activation_fn")),
        he.Skip("fc2", "zero"),
    ),
    pre_norm=True,
    causal=True,
    config_names={"intermediate_size": "ffn_dim"},
)


def tiny() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=101, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an OPT model; by default a tiny random one")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--within", type=float, default=0.7, help="parameters, as a share of the parent's")
    arguments = parser.parse_args()

    rich = he.ElasticConfig(intermediate_size=[0.25, 0.5], num_attention_heads=[1, 3], num_hidden_layers=[2, 3])
    check_family(Case(tiny, rich, family=OPT))
    print("the row keeps every promise")

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) if arguments.model else tiny()
    layers = model.config.num_hidden_layers
    config = he.ElasticConfig(
        intermediate_size=[0.25, 0.5, 0.75, 1.0], num_hidden_layers=range(max(1, layers // 2), layers + 1),
        loadability="stock",
    )  # fmt: skip
    supernet = he.make_elastic(model.eval(), config, family=OPT)
    print(supernet)
    result = he.search_subnets(
        supernet.space, [he.objectives.proxy(supernet, "zerolm"), he.objectives.parameters(supernet)],
        algorithm="exact", within={"parameters": arguments.within},
    )  # fmt: skip
    found = result.best("zerolm").architecture
    print(he.export(supernet, found, arguments.output, overwrite=True))


if __name__ == "__main__":
    main()
