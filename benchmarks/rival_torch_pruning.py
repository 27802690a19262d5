"""Torch-Pruning's side of ``rivals.py``: run by the Python of its own environment, imports nothing of hf_elastic.

Pruning is set up as in Torch-Pruning's examples for language models: ``BasePruner``, heads as groups of ``q``, ``k``
and ``v``, ``prune_num_heads``; the width of the residual stream stays. ``use_cache`` is off, since tracing a model that
returns its KV cache does not end with transformers 5.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import transformers
from rival_serving import Step, Stopwatch, serve
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

RATIO = 0.5
CLASSES = {"llama": AutoModelForCausalLM, "bert": AutoModel}
KEY = {"llama": "logits", "bert": "last_hidden_state"}


def output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V), or hidden states (B, T, D) of an encoder."""
    with torch.inference_mode():
        return model(input_ids=ids)[KEY.get(model.config.model_type, "last_hidden_state")]


def prune(model: PreTrainedModel, importance: Any, *, heads: bool) -> None:
    """Halves FFN widths and, if asked for, head counts, in place, and states the new sizes in modules and config."""
    llama = model.config.model_type == "llama"
    ratios: dict[torch.nn.Module, float] = {}
    groups: dict[torch.nn.Module, int] = {}
    ignored: list[torch.nn.Module] = [model.lm_head] if llama else [model.pooler]
    for name, module in model.named_modules():
        attention = {"self_attn": "q_proj k_proj v_proj", "self": "query key value"}.get(name.rpartition(".")[2])
        if attention is not None:
            queries, *others = (getattr(module, part) for part in attention.split())
            projections = (queries, *others)
            count = model.config.num_attention_heads
            key_heads = getattr(model.config, "num_key_value_heads", count)
            if heads:
                groups |= {queries: count, **dict.fromkeys(others, key_heads)}
                ratios |= dict.fromkeys(projections, RATIO)
            else:
                ignored += [module]
        elif name.endswith(".mlp"):
            ratios |= {module.gate_proj: RATIO, module.up_proj: RATIO}
        elif name.endswith(".intermediate"):
            ratios |= {module.dense: RATIO}
    pruner = tp.pruner.BasePruner(
        model, example_inputs={"input_ids": torch.arange(8)[None]}, importance=importance, global_pruning=False,
        pruning_ratio=0.0, pruning_ratio_dict=ratios, ignored_layers=ignored, num_heads=groups,
        prune_num_heads=heads, prune_head_dims=False, head_pruning_ratio=RATIO if heads else 0.0,
        output_transform=lambda out: out.logits if llama else out.pooler_output.sum(),
    )  # fmt: skip
    for group in pruner.step(interactive=True):
        group.prune()
    state_sizes(model)


def state_sizes(model: PreTrainedModel) -> None:
    """Writes the sizes of the weights into the modules and the config, as the examples do after pruning."""
    config = model.config
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            config.num_attention_heads = module.q_proj.out_features // module.head_dim
            config.num_key_value_heads = module.k_proj.out_features // module.head_dim
            module.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        elif name.endswith(".attention.self"):
            module.all_head_size = module.query.out_features
            module.num_attention_heads = module.all_head_size // module.attention_head_size
            config.num_attention_heads = module.num_attention_heads
        elif name.endswith(".mlp"):
            config.intermediate_size = module.intermediate_size = module.gate_proj.out_features
        elif name.endswith(".intermediate"):
            config.intermediate_size = module.dense.out_features


class Steps:
    """Steps of Torch-Pruning on models that are loaded once."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.models: dict[str, PreTrainedModel] = {}

    def named(self) -> Mapping[str, Step]:
        return {
            "about": self.about, "load": self.load, "prune": self.prune, "save": self.save, "reload": self.reload,
            "cut": self.cut,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Versions, and what the kernels may use."""
        return {
            **{name: version(name) for name in ("torch", "transformers", "torch-pruning")},
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
        }  # fmt: skip

    def load(self, family: str, folder: str) -> dict[str, Any]:
        """Loads a checkpoint and writes what it gives for the ids of the folder."""
        model = CLASSES[family].from_pretrained(folder).eval()
        model.config.use_cache = False
        self.models[family] = model
        torch.save(output(model, torch.load(f"{folder}/ids.pt")), f"{folder}/theirs.pt")
        return {"attention": model.config._attn_implementation, "dtype": str(model.dtype)}

    def pruned(self, family: str, *, heads: bool) -> PreTrainedModel:
        model = copy.deepcopy(self.models[family])
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        self.stopwatch(lambda: prune(model, importance, heads=heads))
        return model

    def prune(self, family: str) -> dict[str, Any]:
        """Prunes widths and heads by magnitude, out of a copy; the copy is not counted."""
        return {"shapes": sorted(list(weight.shape) for weight in self.pruned(family, heads=True).parameters())}

    def save(self, *, family: str, heads: bool, folder: str, ids: str) -> None:
        """Saves a pruned model, and what it gives for some ids."""
        model = self.pruned(family, heads=heads)
        model.save_pretrained(folder)
        torch.save(output(model, torch.load(ids)), f"{folder}/expected.pt")

    def reload(self, *, family: str, folder: str, ids: str, remote_code: bool = False) -> dict[str, Any]:
        """Loads a folder by stock transformers alone and compares with what its model gave."""
        try:
            model = CLASSES[family].from_pretrained(folder, trust_remote_code=remote_code).eval()
        except (RuntimeError, ValueError, OSError) as error:
            return {"reloads": False, "why": str(error).strip().splitlines()[0]}
        found, expected = output(model, torch.load(ids)), torch.load(f"{folder}/expected.pt")
        worst = float((found - expected).abs().max())
        return {"reloads": worst <= 1e-5 * float(expected.abs().max()), "why": f"differs by {worst:.1e}"}

    def cut(self, *, folder: str, importance: str, batches: str, out: str) -> dict[str, Any]:
        """Halves FFN widths of a LLaMA by magnitude or by first-order Taylor scores on batches with labels."""
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        model.config.use_cache = False

        def whole() -> None:
            if importance == "taylor":
                for batch in torch.load(batches):
                    model(**batch).loss.backward()
                prune(model, tp.importance.GroupTaylorImportance(), heads=False)
            else:
                prune(model, tp.importance.GroupMagnitudeImportance(p=2), heads=False)

        self.stopwatch(whole)
        model.config.use_cache = True
        model.save_pretrained(out)
        return {"width": json.loads((Path(out) / "config.json").read_text())["intermediate_size"]}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    serve(lambda stopwatch: Steps(stopwatch).named())
