"""Objectives of one's own: agreement with the parent, which is measured, and a cost that is computed, in one search.

    python examples/custom_objective.py --model my-llama --data stories.txt --within 0.8 --output small

An objective is a name and a function of an architecture. ``agreement`` runs the active subnet: how often is its most
likely token the parent's? ``cut_layers`` counts layers that are cut at all; as it is a cost, limits on it are kept
before anything is evaluated. The search keeps its evaluations in ``OUTPUT.work``: killed and started again, it
goes on; the time is that of ``--evaluations`` times a forward of the held-out rows, and a bar tells it.
"""

from __future__ import annotations

import argparse
import hashlib

import torch
from going_on import Batch, search_storage, text_batches, work_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_elastic as he


def agreement(supernet: he.Supernet, batches: list[Batch], *, fingerprint: str) -> he.Objective:
    """Share of positions at which a subnet and the parent find the same token most likely; larger is better."""

    @torch.inference_mode()
    def guesses() -> list[torch.Tensor]:
        return [supernet.model(input_ids=batch["input_ids"]).logits.argmax(-1) for batch in batches]  # (B, T) each

    with supernet.activate(supernet.space.largest()):
        parents = guesses()

    def measure(architecture: he.Architecture) -> float:
        with supernet.activate(architecture):
            hits = [float((own == theirs).float().mean()) for own, theirs in zip(guesses(), parents, strict=True)]
        return sum(hits) / len(hits)

    # A storage takes only the search it was made for; what the function depends on besides the architecture is this.
    return he.Objective("agreement", measure, direction="maximize", fingerprint=fingerprint)


def cut_layers(supernet: he.Supernet) -> he.Objective:
    """How many layers are not whole: a plain number of the architecture, which nothing has to be run for."""
    whole = supernet.space.largest()
    return he.Objective(
        "cut_layers", lambda point: sum(point[name] != whole[name] for name in whole), cost=True, unit="layers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--data", nargs="+", required=True, help="text: .txt, .jsonl, .csv, or names of data sets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--within", type=float, default=0.8, help="parameters, as a share of the parent's")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows to measure on; as many sort the neurons")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    folder = work_folder(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    supernet = he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.25, 0.5, 0.75, 1.0]))
    batches = text_batches(tokenizer, arguments.data, length=arguments.length, count=2 * arguments.rows)
    half = max(1, len(batches) // 2)
    he.sort_by_importance_(supernet, batches[-half:])
    digest = hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in batches)).hexdigest()
    agreed = agreement(supernet, batches[:half], fingerprint=f"{arguments.model} {digest[:16]}")
    # Naming a built-in cost among the objectives is what makes limits on its relatives known to the search.
    goals = [agreed, cut_layers(supernet), he.objectives.parameters(supernet)]
    result = he.search_subnets(
        supernet.space, goals, evaluations=arguments.evaluations, within={"parameters": arguments.within},
        seed=arguments.seed, storage=search_storage(folder),
    )  # fmt: skip
    for evaluation in result.front:
        print("  ".join(f"{name} {value:,.4g}" for name, value in evaluation.values.items()))
    found = result.best("agreement").architecture
    print(he.export(supernet, found, arguments.output, tokenizer=tokenizer, overwrite=True))


if __name__ == "__main__":
    main()
