"""Tasks of lm-eval in files of their own, with data beside them: nothing comes from the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_checkpoints import WORDS, sentences

ROWS = 12


def _rows(seed: int) -> list[dict[str, Any]]:
    return [
        {"question": text, "choices": [f"{WORDS[(seed + n + k) % len(WORDS)]}{' again' * k}" for k in range(3)],
         "answer": (n + seed) % 3, "reply": WORDS[n]}
        for n, text in enumerate(sentences(ROWS, seed=seed))
    ]  # fmt: skip


_DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}
  cache_dir: {folder}/cache
test_split: test
training_split: train
fewshot_split: train
"""

_TASKS = {
    "tiny_choice": """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_likelihood": """
task: tiny_likelihood
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{reply}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "tiny_rolling": """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "tiny_reply": """
task: tiny_reply
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{reply}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, higher_is_better: true}
""",
    "tiny_group": """
group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
""",
}


def task_folder(folder: Path) -> Path:
    """Writes the tasks and their data, and returns the folder."""
    folder.mkdir()
    for split, seed in (("test", 0), ("train", 1)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in _rows(seed)))
    for name, text in _TASKS.items():
        data = "" if name == "tiny_group" else _DATA.format(folder=folder)
        (folder / f"{name}.yaml").write_text(text + data)
    return folder


def rows() -> list[dict[str, Any]]:
    return _rows(0)
