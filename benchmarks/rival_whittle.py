"""whittle's side of ``rivals.py``: run by the Python of its own environment, imports nothing of hf_elastic.

The weights are those of a LLaMA checkpoint, brought into LitGPT's form by LitGPT's own conversion. A shape is
``{"widths": [...], "groups": [...]}``, one FFN width and one count of key/value groups for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from litgpt import Config
from litgpt.model import GPT as LitGPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from rival_serving import Step, Stopwatch, serve
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from whittle.convert import save_as_hf_checkpoint
from whittle.models.gpt import GPT
from whittle.models.gpt.extract import extract_current_sub_network

Shape = Mapping[str, list[int]]


def litgpt_config(folder: Path) -> Config:
    """LitGPT's words for a LLaMA config."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Config(
        name="Llama", block_size=found["max_position_embeddings"], n_layer=found["num_hidden_layers"],
        n_embd=found["hidden_size"], n_head=found["num_attention_heads"], n_query_groups=found["num_key_value_heads"],
        intermediate_size=found["intermediate_size"], vocab_size=found["vocab_size"],
        padded_vocab_size=found["vocab_size"], norm_eps=found["rms_norm_eps"], norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False, bias=False, rope_base=10000,
    )  # fmt: skip


class Steps:
    """Steps of whittle, and of LitGPT's own model, on one model that is loaded once."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.models: dict[str, Any] = {}

    def named(self) -> Mapping[str, Step]:
        return {
            "about": self.about, "load": self.load, "forward": self.forward, "switch": self.switch,
            "active": self.active, "train": self.train, "extract": self.extract, "save": self.save,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Versions, and what the kernels may use."""
        return {
            **{name: version(name) for name in ("torch", "transformers", "whittle", "litgpt")},
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
        }  # fmt: skip

    def load(self, folder: str) -> dict[str, Any]:
        """Loads a checkpoint into both models and writes what they give for the ids of the folder."""
        config = litgpt_config(Path(folder))
        weights: dict[str, torch.Tensor] = {}
        copy_weights_hf_llama(config, {}, weights, load_file(f"{folder}/model.safetensors"))
        for name, kind in (("litgpt", LitGPT), ("whittle", GPT)):
            model = kind(config).eval()
            model.load_state_dict(weights)
            self.models[name] = model
        self.model, self.ids = self.models["whittle"], torch.load(f"{folder}/ids.pt")  # ids (B, T)
        with torch.inference_mode():
            torch.save({name: model(self.ids) for name, model in self.models.items()}, f"{folder}/theirs.pt")
        return {"dtype": str(self.model.lm_head.weight.dtype)}

    def forward(self, model: str) -> None:
        """A forward of the whole model."""
        with torch.inference_mode():
            self.stopwatch(lambda: self.models[model](self.ids))

    def set(self, shape: Shape) -> None:
        config = self.model.config
        per_group = config.n_head // config.n_query_groups
        self.model.set_sub_network(
            sub_network_n_embd=config.n_embd, sub_network_n_layers=config.n_layer,
            sub_network_head_size=config.head_size, sub_network_intermediate_size=list(shape["widths"]),
            sub_network_query_groups=list(shape["groups"]),
            sub_network_num_heads=[per_group * count for count in shape["groups"]],
        )  # fmt: skip

    def switch(self, shapes: list[Shape]) -> None:
        """Switches from shape to shape, to the whole model at the end (not counted)."""
        self.stopwatch(lambda: [self.set(shape) for shape in shapes])
        self.model.reset_super_network()

    def active(self, shape: Shape, out: str | None = None) -> None:
        """Switches, runs a forward, and switches back."""

        def whole() -> torch.Tensor:
            self.set(shape)
            found = self.model(self.ids)
            self.model.reset_super_network()
            return found

        with torch.inference_mode():
            found = self.stopwatch(whole)
        if out is not None:
            torch.save(found, out)

    def train(self, shape: Shape) -> dict[str, Any]:
        """Forward and backward of a subnet, as one draw of whittle's ``RandomStrategy``."""
        self.model.zero_grad(set_to_none=True)

        def whole() -> torch.Tensor:
            self.set(shape)
            logits = self.model(self.ids)  # (B, T, V)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
            loss.backward()
            self.model.reset_super_network()
            return loss

        loss = self.stopwatch(whole)
        squares = [weight.grad.square().sum() for weight in self.model.parameters() if weight.grad is not None]
        return {"loss": loss.item(), "gradient": float(torch.stack(squares).sum().sqrt())}

    def uniform(self, shape: Shape) -> dict[str, Any]:
        """A shape of one width and one count in the words of ``select_sub_network``, which alone can be extracted."""
        config = self.model.config
        (width,), (groups,) = set(shape["widths"]), set(shape["groups"])
        return {
            "embed_dim": config.n_embd, "mlp_ratio": width / config.n_embd, "depth": config.n_layer,
            "num_heads": groups * config.n_head // config.n_query_groups, "n_query_groups": groups,
            "head_size": config.head_size,
        }  # fmt: skip

    def extract(self, shape: Shape, out: str | None = None) -> dict[str, Any]:
        """Extracts a subnet of one width and one count of groups."""

        def whole() -> Any:
            self.model.select_sub_network(self.uniform(shape))
            found = extract_current_sub_network(self.model)
            self.model.reset_super_network()
            return found

        found = self.stopwatch(whole).eval()
        if out is not None:
            with torch.inference_mode():
                torch.save(found(self.ids), out)
        return {"parameters": sum(weight.numel() for weight in found.parameters())}

    def save(self, shape: Shape, folder: str) -> None:
        """Writes the subnet as whittle's Hugging Face checkpoint."""
        save_as_hf_checkpoint(self.model, self.uniform(shape), folder)


if __name__ == "__main__":
    serve(lambda stopwatch: Steps(stopwatch).named())
