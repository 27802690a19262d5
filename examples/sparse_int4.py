"""Wanda and GPTQ on a causal model: half of the weights zero, the rest 4-bit integers, in one ordinary checkpoint.

    python examples/sparse_int4.py --model my-llama --data text.txt --output packed
    python examples/sparse_int4.py --model my-llama --data wikitext-2:train --sparsity 0 --bits 4 --output packed

Minutes for a model of some hundred million parameters on a CPU; a bar shows the blocks done. The sparse model is kept
in ``OUTPUT.work``: killed and started again with the same options, the run goes on behind it. Perplexities are of rows
of the data that calibration does not see. Adapters that keep the zeros and the integers are in ``sqft_math.py``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from going_on import Batch, text_batches, work_folder
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_elastic as he


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--data", nargs="+", required=True, help="text: .txt, .jsonl, .csv, or names of data sets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--sparsity", type=float, default=0.5, help="0 for none")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=128, help="rows to calibrate on; half as many are held out")
    return parser.parse_args()


class Bar:
    """A bar of the blocks done, for ``progress=``."""

    def __init__(self, name: str) -> None:
        self._bar = tqdm(desc=name, unit="block")

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


@torch.inference_mode()
def show(name: str, model: Any, batches: list[Batch]) -> None:
    losses = [float(model(**batch).loss) for batch in batches]
    print(f"{name}: perplexity {math.exp(sum(losses) / len(losses)):.3f}")


def sparse_model(arguments: argparse.Namespace, folder: Path, *, calibration: list[Batch], held: list[Batch]) -> Any:
    """The sparse model, made or as a run before has left it."""
    done = folder / "sparse"
    if (done / "whole").is_file():
        print(f"going on behind {done}")
        return AutoModelForCausalLM.from_pretrained(done).eval()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    show("parent", model, held)
    if arguments.sparsity:
        print(he.sparsify_(model, calibration, sparsity=arguments.sparsity, progress=Bar("Wanda")))
    model.save_pretrained(done)
    (done / "whole").touch()
    return model


def main() -> None:
    arguments = parsed()
    folder = work_folder(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = arguments.rows + arguments.rows // 2
    batches = text_batches(tokenizer, arguments.data, length=arguments.length, count=rows)
    held = max(1, len(batches) // 3)
    calibration = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches[held:]]
    model = sparse_model(arguments, folder, calibration=calibration, held=batches[:held])
    show("before quantisation", model, batches[:held])
    print(he.quantize_(model, calibration, bits=arguments.bits, group_size=arguments.group_size, progress=Bar("GPTQ")))
    show("quantised", model, batches[:held])
    print(he.save_quantized(model, arguments.output, tokenizer=tokenizer, source=arguments.model, overwrite=True))
    print(f"AutoModelForCausalLM.from_pretrained({arguments.output!r})")


if __name__ == "__main__":
    main()
