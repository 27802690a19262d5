"""What README.md and docs/ tell a reader to type is checked, and run on tiny checkpoints as it is printed."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import Command
from page_settings import ORDER, Settings
from page_settings import SETTINGS as METHODS
from page_settings_sharing import ON_THE_HUB
from page_settings_sharing import SETTINGS as SHARING
from page_snippets import DIRECTIVE, RUNNABLE, Snippet, command_lines, complaint, pages, snippets
from tiny_checkpoints import time_by_parameters

from hf_elastic.pipeline import lora_run

for folder in ("pipeline", "evaluation"):
    sys.path.append(str(Path(__file__).parent / folder))

SETTINGS = {**METHODS, **SHARING}
# Blocks that a page marks as not run. A block more has to be a decision.
NOT_RUN = {"docs/evaluation.md": 1, "docs/report.md": 1, "docs/scale.md": 3}


def all_snippets() -> list[Snippet]:
    return [piece for page in pages() for piece in snippets(page)]


def pieces_that_run(page: str) -> list[Snippet]:
    """The blocks of a page that are run, in the order in which they are."""
    found = [piece for piece in snippets(page) if piece.language in RUNNABLE and piece.reason is None]
    code = [piece for piece in found if piece.language == "python"]
    ordered = iter([code[n] for n in ORDER.get(page, range(len(code)))])
    return [next(ordered) if piece.language == "python" else piece for piece in found]


@pytest.mark.parametrize("page", pages())
def test_every_command_of_a_page_names_what_there_is(page: str) -> None:
    wrong = [
        f"{piece}: {said}"
        for piece in snippets(page)
        if piece.language == "bash"
        for words in command_lines(piece)
        if (said := complaint(words, marked=piece.reason is not None))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", pages())
def test_every_block_of_python_can_be_compiled(page: str) -> None:
    for piece in snippets(page):
        if piece.language == "python":
            compile(piece.text, str(piece), "exec")


def test_every_block_says_what_it_is() -> None:
    assert [str(piece) for piece in all_snippets() if piece.language not in (*RUNNABLE, DIRECTIVE)] == []


def test_blocks_that_are_not_run_say_why_and_are_counted() -> None:
    marked = [piece for piece in all_snippets() if piece.reason is not None]
    assert [str(piece) for piece in marked if len(str(piece.reason).split()) < 3] == []
    assert Counter(piece.page for piece in marked) == NOT_RUN
    assert len([piece for piece in all_snippets() if piece.language in RUNNABLE and piece.reason is None]) >= 40


def test_the_settings_are_of_sections_that_there_are_and_of_text_in_them() -> None:
    texts: dict[tuple[str, str], str] = {}
    for piece in all_snippets():
        texts[piece.page, piece.section] = texts.get((piece.page, piece.section), "") + piece.text
    assert sorted(set(SETTINGS) - set(texts)) == []
    lost = [(where, old) for where, one in SETTINGS.items() for old, _ in one.replaced if old not in texts[where]]
    assert lost == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("hf-elastic compres m --data a.txt --output b", "no command compres"),
        ("hf-elastic compress m --data a.txt --outptu b", "--outptu"),
        ("hf-elastic compress m --data a.txt", "--output"),
        ("hf-elastic compress m --data a.txt --output b --recipe slow", "slow"),
        ("make tests", "tests"),
        ("python examples/none.py", "there is no examples/none.py"),
        ("python examples/routing.py --kind experts", "--kind"),
        ('pip install "hf-elastic[everything]"', "everything"),
        ("rm -rf build", "rm is no command"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, words: str) -> None:
    (piece,) = snippets("x.md", f"```bash\n{command}\n```\n")
    (found,) = command_lines(piece)
    said = complaint(found)
    assert said is not None and words in said
    assert (complaint(found, marked=True) is None) == command.startswith("rm")


def test_blocks_are_found_with_their_sections_and_marks() -> None:
    text = (
        "## One\n```bash\nA=1 make \\\n    test  # words\n```\n<!-- not run: needs a cluster -->\n\n"
        "```bash\nsbatch x\n```\n## Two\n  ```python\n  x = 1\n  ```\n"
    )
    first, second, third = snippets("x.md", text)
    assert (first.section, first.line, first.reason) == ("One", 2, None) and command_lines(first) == [["make", "test"]]
    assert (second.reason, third.reason) == ("needs a cluster", None)
    assert (third.section, third.language, third.text) == ("Two", "python", "x = 1\n")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times come from parameters, a minute of adapters is four steps, ELM knows a size of a few dimensions."""
    import elm_runs

    from hf_elastic.pipeline import elm_reproduction
    from hf_elastic.spaces import ELM_SIZES

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    time_by_parameters(monkeypatch)
    elm_runs.prepare(monkeypatch.setattr)
    monkeypatch.setattr(lora_run, "step_seconds", lambda *args, **kwargs: 60 / (4 * lora_run._OVERHEAD))
    small = {**elm_reproduction._SCALES["small"], "size": "nano", "batch_size": 4, "sequence_length": 16}
    monkeypatch.setitem(elm_reproduction._SCALES, "small", small)  # type: ignore[arg-type]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    del ELM_SIZES["nano"]  # type: ignore[attr-defined]
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


class Reader:
    """Follows a page from top to bottom: a folder for each section, one set of variables for all of it."""

    def __init__(self, root: Path, command: Command, chdir: Any) -> None:
        self.root, self.command, self.chdir = root, command, chdir
        self.names: dict[str, Any] = {}
        self.entered: set[tuple[str, str]] = set()

    def follow(self, piece: Snippet) -> None:
        settings = SETTINGS.get((piece.page, piece.section), Settings())
        folder = self.root / (re.sub(r"\W+", "-", piece.section) or "top")
        if self._first("folder", piece.section):
            folder.mkdir()
            settings.files(folder)
        self.chdir(folder)
        for old, new in settings.replaced:
            piece = Snippet(**{**vars(piece), "text": piece.text.replace(old, new)})
        if piece.language == "bash":
            self._run_commands(piece, settings)
        else:
            if self._first("names", piece.section):
                self.names.update(settings.names())
            # as many lines before it as on the page, so that a traceback names the line of the page
            exec(compile("\n" * piece.line + piece.text, piece.page, "exec"), self.names)

    def _first(self, what: str, section: str) -> bool:
        new = (what, section) not in self.entered
        self.entered.add((what, section))
        return new

    def _run_commands(self, piece: Snippet, settings: Settings) -> None:
        for name, *words in command_lines(piece):
            if name == "hf-elastic":
                ended = self.command(*with_options(words, (settings.added or {}).get(words[0], ())))
                assert ended.code == 0, f"{piece}: hf-elastic {' '.join(words)}: {ended.err[-2000:]}"


def with_options(words: list[str], added: tuple[str, ...]) -> list[str]:
    """A command line with options in place of equal ones, each of which takes a value and is given once."""
    kept = list(words)
    for name in (word for word in added if word.startswith("--") and word in words):
        place = kept.index(name)
        del kept[place : place + 2]
    return [*kept, *added]


def hub(folder: Path) -> AbstractContextManager[Any]:
    """The Hub on loopback of tests/hub."""
    spec = spec_from_file_location("hub_conftest", Path(__file__).parent / "hub" / "conftest.py")
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    found: AbstractContextManager[Any] = loaded.logged_in(folder)
    return found


RUN = sorted({piece.page for piece in all_snippets() if piece.language in RUNNABLE and piece.reason is None})


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN)
def test_the_page_runs_as_it_is_printed(
    page: str, quick: None, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in {name for (of, _), settings in SETTINGS.items() if of == page for name in settings.needs}:
        pytest.importorskip(module)
    reader = Reader(tmp_path, command, monkeypatch.chdir)
    with hub(tmp_path / "hub") if page in ON_THE_HUB else nullcontext():
        for piece in pieces_that_run(page):
            reader.follow(piece)
