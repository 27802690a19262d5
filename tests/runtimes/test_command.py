"""``hf-elastic convert``: options reach the conversion, and errors are one line that says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from exported import mixed_folder, stock_folder
from typer.testing import CliRunner

from hf_elastic import DataError, ExportError
from hf_elastic.runtimes.command import calibration_batches, convert_command, convert_folder

app = typer.Typer()
app.command("convert")(convert_command)


@pytest.fixture
def convert() -> Any:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_a_checkpoint_becomes_openvino(convert: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = mixed_folder(tmp_path, "bert", "base")
    found = convert(folder, "--format", "openvino", "--output", tmp_path / "out")
    assert found.exit_code == 0 and "outputs equal torch's within" in found.output
    assert (tmp_path / "out" / "openvino" / "openvino_model.xml").is_file()


def test_a_checkpoint_becomes_gguf(convert: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = mixed_folder(tmp_path, "llama")
    found = convert(folder, "--format", "gguf", "--output", tmp_path / "out", "--precision", "f32", "--no-vocabulary")
    assert found.exit_code == 0 and "deci, 3 layers, f32, token ids alone" in found.output


def test_options_of_another_format_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"format": "gguf", "with_past": True}, "its own KV cache"),
        ({"format": "gguf", "int8": "static", "data": ["text.txt"]}, "calibrated on nothing"),
        ({"format": "onnx", "int8": "dynamic", "data": ["text.txt"]}, "what --int8 static is calibrated on"),
        ({"format": "onnx", "precision": "f32"}, "are GGUF's"),
        ({"format": "coreml"}, "not one of onnx, openvino, gguf"),
    ):
        with pytest.raises(ExportError, match=said):
            convert_folder(tmp_path, tmp_path / "out", **changes)


def test_static_integers_are_calibrated_on_lines_of_text(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, "bert", "base")
    (tmp_path / "text.txt").write_text("a b c\n\nc b\n" * 9, encoding="utf-8")
    batches = list(calibration_batches(folder, [str(tmp_path / "text.txt")], sequence_length=2))
    assert sum(len(batch["input_ids"]) for batch in batches) == 18
    assert batches[0]["input_ids"][0].tolist() == [2, 3] and batches[0]["attention_mask"].shape == (8, 2)
    for files, said in (
        ([], "give --data"),
        (["gone.txt"], "cannot read text"),
        ([str(tmp_path / "none.txt")], "no line"),
    ):
        (tmp_path / "none.txt").write_text("\n")
        with pytest.raises(DataError, match=said):
            list(calibration_batches(folder, files, sequence_length=8))


def test_the_module_imports_no_torch() -> None:
    code = (
        "import sys; package = sys.modules['hf_elastic'] = type(sys)('hf_elastic'); package.__path__ = [sys.argv[1]];"
        "import hf_elastic.runtimes.command; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    package = Path(__file__).resolve().parents[2] / "hf_elastic"
    subprocess.run([sys.executable, "-c", code, str(package)], check=True)
