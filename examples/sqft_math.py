"""SQFT on arithmetic problems: elastic adapters on a sparse or 4-bit LLaMA, kept apart or merged into one model.

    python examples/sqft_math.py --pipeline qa-sparsepeft --model my-llama --output merged
    python examples/sqft_math.py --pipeline sqft --tiny --steps 4 --rows 40 --test-rows 8 --evaluations 6 --output tuned

* ``sqft``: Wanda, GPTQ to 4 bits, elastic adapters beside it: a compressed-tensors base and a plain adapter.
* ``sqft-bnb``: the same on a bitsandbytes 4-bit base, which is small in memory too; it is not pruned.
* ``sparsepeft``: Wanda, adapters under its mask: one sparse model.
* ``qa-sparsepeft``: Wanda, GPTQ, adapters on the grid of the integers: one sparse 4-bit model.

Rows come from ``HF_ELASTIC_DATA``/math, or of training from ``--data``. Killed and started again with the same options,
it goes on (``OUTPUT.work``): the base is compressed again, and the last fifth of the training is repeated.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from instructions import batches, load, parser
from shears_math import chosen, train, training_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import hf_elastic as he

PIPELINES = ("sqft", "sqft-bnb", "sparsepeft", "qa-sparsepeft")


def base_of(
    arguments: argparse.Namespace, model: PreTrainedModel, calibration: list[dict[str, Any]]
) -> PreTrainedModel:
    """The compressed base of a pipeline."""
    if arguments.pipeline == "sqft-bnb":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=small)
    print(he.sparsify_(model, calibration, sparsity=arguments.sparsity))
    if arguments.pipeline != "sparsepeft":
        print(he.quantize_(model, calibration, bits=4, group_size=arguments.group_size))
    return model


def main() -> None:
    arguments_of = parser(__doc__, steps=300, rows=5000, evaluations=100)
    arguments_of.add_argument("--pipeline", choices=PIPELINES, required=True)
    arguments_of.add_argument("--sparsity", type=float, default=0.5)
    arguments_of.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    arguments = arguments_of.parse_args()
    if arguments.tiny:
        arguments.group_size = min(arguments.group_size, 32)
    model, tokenizer = load(arguments)
    rows, held = training_rows(tokenizer, arguments)
    model = base_of(arguments, model, batches(tokenizer, held))
    space = he.spaces.sqft_llama(model.config)
    space.lora.sparse = "sparsepeft" in arguments.pipeline
    space.lora.quantization_aware = arguments.pipeline == "qa-sparsepeft"
    supernet = space.make(model, seed=arguments.seed)
    statistics = train(supernet, tokenizer, rows, arguments)
    found = chosen(supernet, tokenizer, held, arguments, statistics=statistics)
    output = Path(arguments.output)
    if "sparsepeft" in arguments.pipeline:
        print(he.export(supernet, found, output, merge=True, tokenizer=tokenizer, overwrite=True))
        return
    where, unpacked = str(output / "base"), ""
    with supernet.plain() as base:
        if arguments.pipeline == "sqft":
            print(he.save_quantized(base, where, tokenizer=tokenizer, overwrite=True))
            unpacked = ", quantization_config=CompressedTensorsConfig(dequantize=True)"  # peft needs weights
        else:
            base.save_pretrained(where)
            tokenizer.save_pretrained(where)
    he.extract_adapter(supernet, found, base=where).save_pretrained(output / "adapter", overwrite=True)
    loaded = f"AutoModelForCausalLM.from_pretrained({where!r}{unpacked})"
    print(f"PeftModel.from_pretrained({loaded}, {str(output / 'adapter')!r})")


if __name__ == "__main__":
    main()
