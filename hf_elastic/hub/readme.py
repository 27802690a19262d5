"""Cards that are there already: made by us, left by peft and transformers as a form to fill in, or someone's work."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

MARKER = "<!-- made by hf-elastic from the records beside the weights; remove this line to keep what you change -->"
_DEFAULT = re.compile(r"""\{\{[^}|]*(?:\|\s*default\(\s*"([^"]*)"[^)]*\)\s*)?\}\}""")
_YAML = re.compile(r"\A\s*---\s*\n.*?\n---[ \t]*(\n|\Z)", re.DOTALL)
_VERSIONS = re.compile(r"^### Framework versions\s*\n(\s*- .*\n?)*", re.MULTILINE)
_PUSHED = re.compile(r"^This is the model card of a . transformers model that has been pushed on .*$", re.MULTILINE)


def made_by_us(text: str) -> bool:
    """Whether a card is one of ours that nobody claimed."""
    return MARKER in text


def is_empty_form(text: str) -> bool:
    """Whether a card is the form that peft and transformers write, not filled in; its metadata do not count."""
    form = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    if not form.is_file():
        return False
    blank = _DEFAULT.sub(lambda found: found[1] or "", form.read_text(encoding="utf-8"))
    return _words(text) == _words(blank)


def is_handwritten(text: str) -> bool:
    """Whether a card holds someone's work, which nothing may replace unasked."""
    return bool(text.strip()) and not made_by_us(text) and not is_empty_form(text)


def _words(text: str) -> list[str]:
    text = _YAML.sub("", text.replace("\r\n", "\n"))
    return _PUSHED.sub("", _VERSIONS.sub("", text)).split()
