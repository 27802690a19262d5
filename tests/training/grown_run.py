"""Growing runs of test_growth.py with what watches them; run on its own it kills itself, or is one of two ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_processes import started, wait_for
from tiny_training import TOKENS, VOCABULARY, seeded, settings, weights
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_elastic import Supernet, make_elastic
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.training import PCAGrowthCallback, RandomSubnet, SubnetSamplingCallback
from hf_elastic.training.schedule import Block, GrowthHistory

LAYERS, HIDDEN, INNER, NARROW, WIDEST = 2, 16, 12, 6, 24
PER_EPOCH = 6  # optimizer steps
DENSE = "bert.encoder.layer.{}.candidates.{}.intermediate.dense"
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": WIDEST,
    "vocab_size": VOCABULARY, "max_position_embeddings": 16, "bottleneck_size": INNER,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def candidates(*, blocks: tuple[str, ...] = BLOCKS, seed: int = 0, **changes: Any) -> Supernet:
    """A masked-language model of 2 layers of candidate blocks, all NARROW."""
    narrow = [[NARROW] * len(blocks)] * LAYERS
    config = config_class("elastic_bert")(
        **{**SIZES, "candidate_blocks": list(blocks), "candidate_widths": narrow, **changes}
    )
    return make_elastic(seeded(lambda: model_class("elastic_bert", "ElasticBertForMaskedLM")(config), seed=seed))


def causal_candidates() -> Supernet:
    """The same as a causal language model."""
    config = config_class("elastic_gpt2")(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_inner=WIDEST, vocab_size=VOCABULARY, n_positions=16,
        bottleneck_size=INNER, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        candidate_blocks=list(BLOCKS), candidate_widths=[[NARROW] * len(BLOCKS)] * LAYERS,
    )  # fmt: skip
    return make_elastic(seeded(lambda: model_class("elastic_gpt2", "ElasticGPT2ForCausalLM")(config)))


def padded(count: int = 8 * PER_EPOCH, *, seed: int = 0) -> list[dict[str, Any]]:
    """Language-model examples of unequal lengths; padding has no labels."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=generator)
        mask = (torch.arange(TOKENS) < TOKENS - number % 4).long()
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels})
    return rows


class Stream(IterableDataset):
    """The same examples again and again, of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from padded()


def callbacks(supernet: Supernet, **changes: Any) -> tuple[SubnetSamplingCallback, PCAGrowthCallback]:
    """Uniform paths, and growth by 6 neurons at a time, measured in every other step."""
    rule: dict[str, Any] = {"total_parameters": 4_400, "step": 6, "count": 5, "calc_freq": 2, "eta": 0.9, **changes}
    return SubnetSamplingCallback(supernet, RandomSubnet(seed=1)), PCAGrowthCallback(supernet, **rule)


class Watch(TrainerCallback):
    """Keeps what enters the activations in every training forward, by step, layer and block."""

    def __init__(self, supernet: Supernet, *, padding: bool, dense: str = DENSE) -> None:
        self.step = self.forwards = 0
        self.mask: Tensor | None = None
        self.rows: dict[int, dict[Block, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        self.seen: set[tuple[int, Block]] = set()
        self.padding = padding
        supernet.model.register_forward_pre_hook(self.begin, with_kwargs=True)
        for layer in range(LAYERS):
            for block in BLOCKS:
                entering = supernet.model.get_submodule(dense.format(layer, block))
                entering.register_forward_hook(self.keep((layer, block)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def begin(self, model: nn.Module, inputs: Any, named: dict[str, Tensor]) -> None:
        if model.training:
            self.forwards, self.mask = self.forwards + 1, named["attention_mask"] > 0

    def keep(self, key: Block) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not module.training or (self.forwards, key) in self.seen:
                return
            self.seen.add((self.forwards, key))
            rows = output.detach().double().flatten(0, 1).numpy()
            self.rows[self.step][key].append(rows if self.padding else rows[self.mask.flatten().numpy()])

        return hook

    def scores(self, steps: Sequence[int], *, eta: float = 0.9, normalise: str = "min") -> dict[Block, float]:
        """Mean of k(eta) / min(inputs, width) over those of some steps in which a block ran."""
        found: dict[Block, list[float]] = defaultdict(list)
        for step in steps:
            for key, parts in self.rows[step].items():
                rows = np.concatenate(parts)
                width, inputs = rows.shape[1], INNER if key[1].startswith("bottleneck") else HIDDEN
                spectrum = np.sort(np.linalg.eigvalsh(np.cov(rows, rowvar=False)))[::-1].cumsum()
                k = 1 + int(np.argmax(spectrum > eta * spectrum[-1]))
                found[key].append(k / (min(inputs, width) if normalise == "min" else width))
        return {key: sum(values) / len(values) for key, values in found.items()}


def block_parameters(block: str, width: int) -> int:
    """Of papers.md 1.2, with the projection that serves twice counted once."""
    h, i, dropped = HIDDEN, INNER, "-" in block
    if block.startswith("standard"):
        return (4 - dropped) * (h * h + h) + 4 * h + (h * width + width) + (width * h + h)
    own = (h * i + i) + 2 * i + (3 - dropped) * (h * i + i) + (i * i + i) + 2 * i
    return own + (i * width + width) + (width * i + i) + 2 * i + (i * h + h) + 2 * h


def outside(supernet: Supernet) -> int:
    return sum(p.numel() for name, p in supernet.model.named_parameters() if ".candidates." not in name)


def mean_parameters(supernet: Supernet, widths: Mapping[Block, int]) -> float:
    """Of a path that takes one block of each layer, drawn uniformly."""
    return outside(supernet) + sum(block_parameters(block, w) for (_, block), w in widths.items()) / len(BLOCKS)


def published(
    supernet: Supernet, widths: dict[Block, int], scores: Mapping[Block, float], *, count: int, cap: float, check: str
) -> list[Block]:
    """papers.md 1.5; the mean over random paths is exact, and held against the cap once or before each growth."""
    made: list[Block] = []
    if check == "epoch" and mean_parameters(supernet, widths) > cap:
        return made
    for key in sorted(scores, key=lambda key: (-scores[key], key[0], BLOCKS.index(key[1]))):
        if len(made) == count or (check == "block" and mean_parameters(supernet, widths) >= cap):
            break
        if widths[key] < WIDEST:
            widths[key] += 6
            made.append(key)
    return made


class Bystander(TrainerCallback):
    """Looks at the supernet outside of steps: shapes, space, what is active, and what is not in use."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet, self.initial = supernet, weights(supernet.model)
        self.digests: list[str] = []

    def unused(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        for part in self.supernet.block_parts:
            for block in part.blocks:
                rest, name = slice(part.width(block), None), DENSE.format(part.index, block)
                yield f"{name}.weight", (rest,)
                yield f"{name}.bias", (rest,)
                yield name.replace("intermediate", "output") + ".weight", (slice(None), rest)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.supernet.active == self.supernet.space.largest()
        now = weights(self.supernet.model)
        assert {name: p.shape for name, p in now.items()} == {name: p.shape for name, p in self.initial.items()}
        assert all(torch.equal(now[name][rest], self.initial[name][rest]) for name, rest in self.unused())
        self.digests += [self.supernet.space.digest] if self.supernet.space.digest not in self.digests else []

    on_train_begin = on_epoch_end = on_evaluate = on_save = on_log = on_train_end = on_step_end


def check_new_rows_moved(supernet: Supernet, initial: dict[str, Tensor], history: GrowthHistory) -> None:
    """What grew before the last epoch and ran in it has learnt."""
    before, last = history.widths(len(history.entries) - 1), history.entries[-1]
    new = [key for key in last.scores if before[key] > NARROW]
    assert new
    for layer, block in new:
        name, rows = DENSE.format(layer, block) + ".weight", slice(NARROW, before[layer, block])
        moved = supernet.model.get_parameter(name)[rows] != initial[name][rows]
        assert moved.float().mean() > 0.9, (layer, block)


class Stop(TrainerCallback):
    """Raises behind a step, before or after its checkpoint is written, or asks the Trainer to stop there."""

    def __init__(self, step: int, event: str, *, raises: bool = True) -> None:
        self.step, self.raises = step, raises
        setattr(self, event, self.stop)

    def stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.raises:
            raise RuntimeError("boom")
        control.should_training_stop |= state.global_step == self.step


def hooks(supernet: Supernet) -> int:
    modules = list(supernet.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


class KilledAt(TrainerCallback):
    """Ends the process as the kernel does where memory is short: when a checkpoint was saved, or before a step."""

    def __init__(self, *, saved: int | None = None, step: int | None = None) -> None:
        self.saved, self.step = saved, step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.saved:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


# How a run saves and grows, and where it is killed. Epochs end at steps 6, 12 and 18.
KILLED: dict[str, tuple[dict[str, Any], dict[str, Any], KilledAt]] = {
    "in the middle of an epoch": ({"save_strategy": "steps", "save_steps": 4}, {}, KilledAt(step=10)),
    "behind the last step of an epoch": ({"save_strategy": "steps", "save_steps": 6}, {}, KilledAt(saved=12)),
    "behind the last step of all": ({"save_strategy": "steps", "save_steps": 6}, {}, KilledAt(saved=18)),
    "where every epoch is saved": ({"save_strategy": "epoch"}, {}, KilledAt(saved=12)),
    "on a stream": (
        {"save_strategy": "steps", "save_steps": 4, "max_steps": 18}, {"every": 5, "count": None}, KilledAt(step=14),
    ),
}  # fmt: skip


def growing(case: str, output_dir: str) -> tuple[Trainer, PCAGrowthCallback]:
    """The run of a case, with dropout, shuffling, decay and a learning rate that falls."""
    saving, rule, _ = KILLED[case]
    supernet = candidates(hidden_dropout_prob=0.1)
    args = TrainingArguments(
        **settings(
            f"{output_dir}/{case}",
            **{"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 8, **saving},
        )
    )
    both = callbacks(supernet, **rule)
    rows = Stream() if case == "on a stream" else padded()
    return Trainer(supernet.model, args, train_dataset=rows, callbacks=list(both)), both[1]


def runs_until_killed(case: str, output_dir: str) -> None:
    trainer, _ = growing(case, output_dir)
    trainer.add_callback(KILLED[case][2])
    trainer.train()


def killed_by(case: str, output_dir: str) -> int:
    """The signal that ended a process of its own in which a case ran, 0 for none."""
    child = os.fork()
    if child == 0:
        runs_until_killed(case, output_dir)
        os._exit(0)
    return os.waitpid(child, 0)[1] & 0x7F


def shared(output_dir: str, *, batch: int) -> tuple[Supernet, PCAGrowthCallback]:
    """A run of 2 epochs; one process with ``batch`` examples sees what two ranks see with half of them."""
    supernet = candidates()
    args = TrainingArguments(
        **settings(
            output_dir, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=batch,
            ddp_find_unused_parameters=True, gradient_accumulation_steps=2,
        )
    )  # fmt: skip
    both = callbacks(supernet, calc_freq=1)
    Trainer(supernet.model, args, train_dataset=padded(), callbacks=list(both)).train()
    return supernet, both[1]


def run_alone(task: str, folder: Path, *environments: dict[str, str]) -> None:
    """Run this file in as many processes as there are environments."""
    wait_for([started(__file__, task, str(folder), **environment) for environment in environments])


def main(task: str, folder: str) -> None:
    torch.set_num_threads(1)
    if task == "killed":
        torch.save({case: killed_by(case, folder) for case in KILLED}, Path(folder) / "killed.pt")
    else:
        rank = os.environ["RANK"]
        supernet, growth = shared(f"{folder}/rank{rank}", batch=2)
        found = {"history": growth.history.to_dict(), "weights": weights(supernet.model)}
        torch.save(found, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
