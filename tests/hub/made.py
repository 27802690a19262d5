"""Folders to share, tiny and made by the package itself, and fresh processes that read them from a Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import language_model, options, sentence_encoder, write_text
from tiny_models import point, supernet_of, tiny
from torch import Tensor

import hf_elastic as he
from hf_elastic import ElasticLoraConfig, RoutingConfig, Supernet

LORA: dict[str, Any] = {
    "r": 8, "ranks": [2, 4], "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


def stock(folder: Path) -> Path:
    """A model of one width, which a stock class holds."""
    supernet = supernet_of("llama", num_key_value_heads=[1, 2], skip=[])
    values = {f"layers.{n}.intermediate_size": 24 for n in range(3)}
    he.export(supernet, point(supernet, **values), folder, loadability="stock")
    return folder


def remote(folder: Path, family: str = "llama") -> Path:
    """A model of widths of its own in every layer, with its code."""
    supernet = supernet_of(family)
    he.export(supernet, point(supernet, ffn0=16, ffn1=24, heads2=1), folder, loadability="remote-code")
    return folder


def compressed(root: Path) -> Path:
    """What a whole run made of a sentence encoder; its work is in ``small.run``."""
    parent = sentence_encoder(root / "parent")
    (parent / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\nbase_model: someone/encoder\n---\n\n# Mine\n"
    )
    text = write_text(root / "text.txt")
    he.compress(options(parent, text, root / "small", recipe="fast", loadability="stock"), say=lambda line: None)
    return root / "small"


def integers(folder: Path) -> Path:
    """A model whose linear layers are of 4 bits."""
    model = tiny("llama")
    he.quantize_(model, bits=4, group_size=16, method="rtn")
    he.save_quantized(model, folder)
    return folder


def base(root: Path) -> Path:
    """A language model with its tokenizer, for adapters and routers to stand on."""
    return language_model(root / "base")


def adapted(base: Path) -> Supernet:
    """Elastic adapters on a base, none of whose factors is zero."""
    from transformers import AutoModelForCausalLM

    supernet = he.add_lora(AutoModelForCausalLM.from_pretrained(base), ElasticLoraConfig(**LORA), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in supernet.model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    supernet.model.eval()
    return supernet


def routed(base: Path) -> Supernet:
    """Routers on a base, calibrated, with one capacity turned down."""
    from transformers import AutoModelForCausalLM

    supernet = he.add_routing(AutoModelForCausalLM.from_pretrained(base), RoutingConfig(mlp_tokens=[0.5]))
    generator = torch.Generator().manual_seed(2)
    for part in supernet.router_parts:
        for parameter in part.routers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    batches = [{"input_ids": torch.randint(3, 250, (4, 16), generator=generator)} for _ in range(4)]
    he.calibrate_routing(supernet, batches)
    he.set_capacity(supernet, mlp_tokens=0.5)
    return supernet


def token_ids(*, vocabulary: int = 61) -> Tensor:
    return torch.randint(3, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))


def snippet(card: str) -> str:
    """The Python that a card shows."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]


OWN = "# instead of the snippet\n"
READER = """
import json, re, sys
from pathlib import Path

if sys.argv[2] == "without":
    sys.modules["hf_elastic"] = None  # importing it now raises, whatever is installed
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

root, OWN = Path(sys.argv[1]), sys.argv[3]
ids = load_file(root / "ids.safetensors")["ids"]
results = {}
for name, further in json.loads((root / "jobs.json").read_text()).items():
    card = Path(hf_hub_download(name, "README.md")).read_text()
    code = re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1]
    space = {"ids": ids, "torch": torch}
    if not further.startswith(OWN):
        exec(code, space)
    with torch.no_grad():
        exec(further, space)
        results[name] = torch.as_tensor(space["result"]).contiguous()
save_file(results, root / "results.safetensors")
if sys.argv[2] == "without":
    assert not any(module.split(".")[0] == "hf_elastic" for module in sys.modules if sys.modules[module] is not None)
"""


def read_from(hub: Any, root: Path, jobs: dict[str, str], *, with_us: bool) -> dict[str, Tensor]:
    """Runs the snippets of the cards of repositories in a fresh process with an empty cache, and then some code.

    Args:
        hub: the Hub.
        root: an empty folder.
        jobs: by name of the repository, code that makes ``result`` of what the snippet made and of ``ids``; code that
            begins with ``OWN`` runs instead of the snippet.
        with_us: whether hf_elastic can be imported.
    """
    from safetensors.torch import load_file, save_file

    save_file({"ids": token_ids()}, root / "ids.safetensors")
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    isolated = [] if with_us else ["-I"]
    if with_us:
        environment["PYTHONPATH"] = str(Path(he.__file__).parents[1])
    command = [sys.executable, *isolated, "-c", READER, str(root), "with" if with_us else "without", OWN]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(root / "results.safetensors")
