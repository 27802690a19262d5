"""Compression of a base in place: sparsity by Wanda, integers by GPTQ; one block of the model at a time."""

from __future__ import annotations

from hf_elastic.compression.blocks import LayerInputs, layer_by_layer
from hf_elastic.compression.quantization import QuantizationReport, quantize_
from hf_elastic.compression.sparsity import SparsityReport, sparsify_, sparsity_of

__all__ = [
    "LayerInputs", "QuantizationReport", "SparsityReport", "layer_by_layer", "quantize_", "sparsify_", "sparsity_of",
]  # fmt: skip
