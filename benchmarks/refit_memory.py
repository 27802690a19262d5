"""Peak memory and time of the closed-form repair and of both tables on a LLaMA of a billion bf16 parameters.

    python benchmarks/refit_memory.py [--phases refit quality latency] [--device cuda] [--json FILE]

Each phase runs in a process of its own, so that peaks do not mix. Weights and calibration tokens are random, which
changes neither memory nor time. Counted is what a phase holds at its peak beyond ``baseline`` (what the process holds
once the libraries are imported and have multiplied once) and beyond the parent's weights; what a phase returns (the
repaired subnet) is in it. On a CPU the peak is that of resident memory, as the kernel keeps it (``VmHWM``, reset when
the model is there) or, where it cannot be reset, as a thread samples it; on a GPU that of allocated memory, of which
nothing is the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from measuring import environment, print_environment, print_table, write_json
from transformers import LlamaConfig, LlamaForCausalLM

import hf_elastic as he
from hf_elastic.repair.refitting import RefitReport, refit
from hf_elastic.tables.latencies import measure_latency_table
from hf_elastic.tables.quality import measure_quality_table

BAR = 2.0  # GiB
GIB = 2**30
SAMPLED_EVERY = 0.01  # seconds
Batch = dict[str, torch.Tensor]


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _kernel_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Peak:
    """Notes the most memory that is held inside the ``with`` block.

    Attributes:
        value: bytes, once the block is left.
        source: how it was found.
    """

    def __init__(self, device: str) -> None:
        self.device, self.value, self.source = device, 0, "sampled"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        if self.device != "cpu":
            self.source = "cuda"
            torch.cuda.reset_peak_memory_stats()
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM; proc(5)
            self.source = "VmHWM"
        except OSError:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.source == "cuda":
            self.value = torch.cuda.max_memory_allocated()
        elif self.source == "VmHWM":
            self.value = _kernel_peak()
        else:
            self._done.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLED_EVERY):
            self.value = max(self.value, resident())


def held(device: str) -> int:
    """Bytes that are held now."""
    return resident() if device == "cpu" else torch.cuda.memory_allocated()


def parent(options: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights, made in bf16: no copy in fp32 is ever there."""
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, max_position_embeddings=max(options.length, 128) + 1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def supernet_of(model: LlamaForCausalLM, options: argparse.Namespace) -> he.Supernet:
    """Widths and key/value groups of every layer, and ``--left-out`` layers in the middle that may be left out."""
    middle = options.layers // 2
    skips: dict[int, list[Any]] = {middle + number: ["layer"] for number in range(options.left_out)}
    return he.make_elastic(
        model,
        he.ElasticConfig(
            intermediate_size=[0.25, 0.5, 0.75, 1.0], num_key_value_heads=[0.5, 1.0], skip=skips or None,
            multiple_of=16,
        ),
    )  # fmt: skip


def tokens(options: argparse.Namespace, *, count: int, seed: int) -> list[Batch]:
    """Batches of random tokens, at least ``count`` in all."""
    generator = torch.Generator().manual_seed(seed)
    shape = (options.batch, options.length)
    batches = -(-count // (options.batch * options.length))
    return [{"input_ids": torch.randint(options.vocabulary, shape, generator=generator)} for _ in range(batches)]


def mixed(supernet: he.Supernet) -> he.Architecture:
    """Half of the sizes in every layer but the last, which stays whole: its is the largest solve that there is."""
    point = dict(supernet.space.largest())
    last = f"layers.{len(supernet.layer_parts) - 1}."
    for choice in supernet.space:
        sizes = choice.name.endswith(("intermediate_size", "num_key_value_heads"))
        if sizes and not choice.name.startswith(last):
            point[choice.name] = choice.values[(len(choice.values) - 1) // 2]
    return supernet.space.canonical(point)


def repair(supernet: he.Supernet, options: argparse.Namespace) -> str:
    """Repairs and extracts one subnet."""
    reports: list[RefitReport] = []
    architecture = mixed(supernet)
    small = refit(
        supernet, architecture, tokens(options, count=options.tokens, seed=0), on_report=reports.append
    )  # fmt: skip
    size = sum(parameter.nbytes for parameter in small.parameters()) / GIB
    largest = max(fit.inputs for fit in reports[0].sublayers)
    return f"{len(reports[0].sublayers)} projections of up to {largest} inputs solved, {size:.2f} GiB returned"


def quality(supernet: he.Supernet, options: argparse.Namespace) -> str:
    """Measures a quality table of ``--sizes`` widths a layer."""
    calls: list[int] = []
    table = measure_quality_table(
        supernet, tokens(options, count=options.tokens, seed=0), tokens(options, count=options.held_tokens, seed=1),
        measure=options.measure, sizes=options.sizes, progress=lambda done, total: calls.append(done),
    )  # fmt: skip
    cut = sum(value != 0.0 for row in table.damages for value in row.values())
    return f"{len(calls)} options, {cut} of them cut and evaluated ({table.measure})"


def latency(supernet: he.Supernet, options: argparse.Namespace) -> str:
    """Measures a latency table of one sequence's prefill."""
    length = min(options.length, 128)
    table = measure_latency_table(
        supernet, length=length, sizes=max(2, options.sizes), seconds=options.latency_seconds
    )  # fmt: skip
    return f"{len(table.variants)} models timed in {len(table.rounds)} rounds of {length} tokens"


PHASES: dict[str, Callable[[he.Supernet, argparse.Namespace], str]] = {
    "refit": repair, "quality": quality, "latency": latency,
}  # fmt: skip


def measured(phase: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one phase in this process."""
    one = torch.ones(64, 64, dtype=torch.bfloat16, device=options.device)
    torch.linalg.cholesky(torch.eye(64, dtype=torch.float64, device=options.device) + (one @ one).double() * 0)
    baseline = held(options.device) if options.device == "cpu" else 0
    model = parent(options)
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    weights = sum(parameter.nbytes for parameter in parameters)
    supernet = supernet_of(model, options)
    loaded = held(options.device)
    began = time.perf_counter()
    with Peak(options.device) as peak:
        work = PHASES[phase](supernet, options)
    spent, beyond = time.perf_counter() - began, (peak.value - baseline - weights) / GIB
    return {
        "phase": phase, "parameters": sum(parameter.numel() for parameter in parameters), "seconds": spent,
        "baseline GiB": baseline / GIB, "weights GiB": weights / GIB, "loaded GiB": loaded / GIB,
        "peak GiB": peak.value / GIB, "beyond GiB": beyond, "bar": f"<= {BAR:g}",
        "met": "yes" if beyond <= BAR else "NO", "measured": peak.source, "work": work,
    }  # fmt: skip


def in_process(phase: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs one phase in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        # The last of equal options counts, so these replace what the arguments say.
        extra = ["--phases", phase, "--here", "--json", str(file)]
        subprocess.run([sys.executable, __file__, *arguments, *extra], check=True, stdout=subprocess.DEVNULL)
        row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parsed(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    machine = environment()
    if options.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name(options.device)
    print_environment(machine)
    rows = []
    for phase in options.phases:
        rows.append(measured(phase, options) if options.here else in_process(phase, given))
        print_table(rows[-1:])
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "here")}
    write_json(options.json, {"environment": machine, "settings": settings, "rows": rows})


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--here", action="store_true", help="in this process: for one phase only")
    parser.add_argument("--device", default="cpu", help="or cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with; at least the FFN's width")
    parser.add_argument("--held-tokens", type=int, default=1024, help="to measure damage on")
    parser.add_argument("--measure", choices=("kl", "hidden"), default="kl")
    parser.add_argument("--sizes", type=int, default=2, help="widths a layer in the tables, the whole one among them")
    parser.add_argument("--left-out", type=int, default=1, help="layers that may be left out as a whole")
    parser.add_argument("--latency-seconds", type=float, default=12.0, help="in forwards; three rounds at least")
    parser.add_argument("--threads", type=int, help="by default what torch chooses")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
