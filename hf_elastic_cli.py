"""The console script ``hf-elastic``. It lists the commands by itself, so that help is there at once: importing
``hf_elastic`` registers model types, for which torch and transformers must be loaded."""

from __future__ import annotations

import sys

SUMMARY = "Make Hugging Face language models elastic."
COMMANDS = {
    "compress": (
        "Make a checkpoint smaller and print what that gained and cost. Interrupted, the same command goes on."
    ),
    "elm": "Distil a teacher into a small model by ELM: supernet of blocks, growth, search, head fusion, retraining.",
    "family": "Export several nested sizes of a finished run, with one table. Interrupted, the same command goes on.",
    "info": "Describe any checkpoint, search space or run.",
    "search": "Search the trained supernet of a run again, under other limits; prints the front.",
    "export": "Write one architecture of a supernet as a checkpoint, or for a runtime.",
    "sparsify": "Set the least important weights to zero and print what that cost. Shapes, and so speed, stay.",
    "quantize": "Round the linear layers to integers and print what that cost; sparse models stay sparse.",
    "merge": "Merge elastic adapters into their base; what was sparse or of integers stays so, or the command fails.",
    "reproduce": "Run a published experiment again: what the paper has, what we have, what differs.",
    "score": (
        "Show how well zero-cost proxies rank a benchmark's architectures, or score a checkpoint without loading it."
    ),
    "report": "Write one HTML file that shows what a run did and found; it needs no network.",
    "try": "Put a smaller model beside its parent: what both make of a prompt, how fast, and how large.",
    "evaluate": "Measure checkpoints on data and print one table, the first beside those of --compare.",
    "convert": "Write a checkpoint for ONNX Runtime, OpenVINO or llama.cpp, compared with torch before it is there.",
    "push": "Push a folder to the Hugging Face Hub with a model card, in one commit.",
    "worker": (
        "Evaluate a search together with other workers, started alike. Exit code 143: SIGTERM, evaluation handed back."
    ),
}


def main() -> None:
    """Lists the commands, or loads the package and runs one."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["--help"]:
        print(overview())
        sys.exit(0 if arguments else 2)
    from hf_elastic.cli import main as run

    run()


def overview() -> str:
    """What ``hf-elastic --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {help}" for name, help in COMMANDS.items()]
    usage = "Usage: hf-elastic COMMAND [ARGUMENTS] [OPTIONS]"
    closing = "hf-elastic COMMAND --help says what a command takes."
    return "\n".join([usage, "", SUMMARY, "", "Commands:", *lines, "", closing])


if __name__ == "__main__":
    main()
