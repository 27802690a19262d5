"""Fenced blocks of README.md and docs/: where they are, what they say, what can be seen to be wrong with a command."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from hf_elastic.cli import app

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(`{3,})(\S*)(.*)$")
NOT_RUN = re.compile(r"^<!--\s*not run:\s*(.*?)\s*-->$")
ASSIGNMENT = re.compile(r"^[A-Z][A-Z0-9_]*=")
RUNNABLE = ("bash", "python")
DIRECTIVE = "text"  # output, drawings, files: nothing to run


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Attributes:
        page: path below the root, such as ``docs/elm.md``.
        section: the nearest ``##`` heading before it.
        line: of the opening fence, counted from 1.
        language: what stands behind the fence.
        text: what is between the fences.
        reason: why it is not run, where the page says so.
    """

    page: str
    section: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and every page of docs/ that is written by hand or by a script, by path below the root."""
    return ["README.md", *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md"))]


def snippets(page: str, text: str | None = None) -> list[Snippet]:
    """The fenced blocks of a page in its order; ``text`` stands for what the file holds."""
    found: list[Snippet] = []
    section, reason, lines = "", None, iter(enumerate((text or _read(page)).splitlines(), 1))
    for number, line in lines:
        marker, fence = NOT_RUN.match(line.strip()), FENCE.match(line.strip())
        if fence:
            body = list(_until(lines, fence.group(1)))
            indent = len(line) - len(line.lstrip())
            found.append(
                Snippet(page, section, number, fence.group(2), "\n".join(row[indent:] for row in body) + "\n", reason)
            )
        if line.startswith("## "):
            section = line[3:].strip()
        if line.strip():
            reason = marker.group(1) if marker else None
    return found


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _until(lines: Iterator[tuple[int, str]], fence: str) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == fence:
            return
        yield line
    raise AssertionError("a fenced block has no end")


def command_lines(snippet: Snippet) -> list[list[str]]:
    """The words of each command of a bash block, without comments and assignments of variables before a command."""
    joined = re.sub(r"\\\n\s*", " ", snippet.text)
    split = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [words for line in split if (words := _without_assignments(line))]


def _without_assignments(words: Sequence[str]) -> list[str]:
    start = next((n for n, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
    return list(words[start:])


def complaint(words: Sequence[str], *, marked: bool = False) -> str | None:
    """What is wrong with a command that can be seen without running it; None if nothing is.

    Args:
        words: of the command.
        marked: whether its block is marked as not run, so that it may be of any program.
    """
    name, *rest = words
    checks = {"hf-elastic": _hf_elastic, "make": _make, "python": _python, "pip": _pip}
    if name in checks:
        return checks[name](rest)
    return None if marked else f"{name} is no command that is checked; mark the block with <!-- not run: reason -->"


def _hf_elastic(words: list[str]) -> str | None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    name, *rest = words or ["--help"]
    if name == "--help":
        return None
    if name not in commands.commands:
        return f"hf-elastic has no command {name}"
    try:
        commands.commands[name].make_context(name, rest)
    except typer.Exit:
        return None  # --help
    except TyperException as error:
        return f"hf-elastic {name}: {error.format_message()}"
    return None


def _make(words: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z-]+):", _read("Makefile"), re.MULTILINE))
    unknown = [word for word in words if "=" not in word and word not in targets]
    return f"make has no target {', '.join(unknown)}" if unknown else None


def _python(words: list[str]) -> str | None:
    script = ROOT / words[0]
    if not script.is_file():
        return f"there is no {words[0]}"
    source = script.read_text(encoding="utf-8")
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    unknown = [option for option in options if f'"{option}"' not in source]
    if unknown:
        return f"{words[0]} has no option {', '.join(unknown)}"
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    return None if f'"{script.stem}"' in tests else f"no test runs {words[0]}"


def _pip(words: list[str]) -> str | None:
    extras = tomllib.loads(_read("pyproject.toml"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:hf-elastic|\.)\[([^\]]*)\]", " ".join(words))
    unknown = sorted({extra for group in named for extra in group.split(",")} - set(extras))
    return f"there is no extra {', '.join(unknown)}" if unknown else None
