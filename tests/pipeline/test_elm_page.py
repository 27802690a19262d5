"""The Python of docs/elm.md runs as it is printed, one piece after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_checkpoints import language_model, masked_model, write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "elm.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:growth ended", "ignore:.*blocks were measured")
def test_the_page_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_text(tmp_path / "text.txt")
    masked_model(tmp_path / "teacher", num_hidden_layers=4)
    language_model(tmp_path / "decoder", "gpt2")
    pieces = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(pieces) == 4
    names: dict[str, object] = {}
    # the piece on fusion goes on with what the first one found
    for piece in (pieces[0], pieces[3], pieces[1], pieces[2]):
        exec(compile(piece, str(PAGE), "exec"), names)
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "smaller" / "config.json").is_file()
