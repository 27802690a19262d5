"""Loads an adapter with stock peft alone and says how far its logits, and those after merging, are from given ones.

Arguments: folder of the base model, folder of the adapter, file of tensors (inputs by name, ``logits``). Prints the two
largest differences; ends with an error if hf_elastic was imported.
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

base, adapter, file = sys.argv[1:]
tensors = load_file(file)
wanted = tensors.pop("logits")
causal = AutoConfig.from_pretrained(base, trust_remote_code=True).architectures[0].endswith(("CausalLM", "LMHeadModel"))
auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
model = PeftModel.from_pretrained(auto.from_pretrained(base, trust_remote_code=True), adapter).eval()
with torch.no_grad():
    unmerged = model(**tensors)[0]
    merged = model.merge_and_unload()(**tensors)[0]
assert not any(name.split(".")[0] == "hf_elastic" for name in sys.modules), "hf_elastic was imported"
print(float((unmerged - wanted).abs().max()), float((merged - wanted).abs().max()))
