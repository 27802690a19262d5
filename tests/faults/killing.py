"""Kills operations at random points, looks at what is there, lets them go on, and compares with a run never killed.

    python tests/faults/killing.py FOLDER --points 12 --seed 0 --operations export merge --json faults.json

Every attempt is a fork of this process, which itself only imports. An attempt is ended by the operating system, so that
no handler of its own runs:

* ``moment``: SIGKILL at a random moment of the time that the whole work took;
* ``call``: SIGKILL before a random one of its file-system calls (a file opened to be written, a rename, a folder made
  or removed, fsync, a safetensors or torch file, a statement of the database);
* ``byte``: from such a call on, at a random byte of the first file that grows to it (RLIMIT_FSIZE and SIGXFSZ).

Every third round kills the attempt after, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).parent))

import safetensors.torch
import sqlalchemy
import torch
import transformers
from looking import differences, leftovers, loaded, torn
from operations import OPERATIONS, prepared

KINDS = ("moment", "call", "byte")
REDRAWS = 30  # of a point that the work ends before
ATTEMPTS = 3  # that may be needed to end the work; one should do
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink", "sqlite3.connect")
_LARGEST_BYTE = 18  # as a power of two: of a file that is torn

# -- in the attempt ----------------------------------------------------------------------------------------------------


class Calls:
    """Counts the file-system calls of this process that change something below a folder; cannot be taken back.

    Args:
        folder: which.
        on_call: told of each, before it is done: its number from 0, and what it is.
        on_leaving: told of each folder that is about to be removed or moved.
    """

    def __init__(
        self,
        folder: Path,
        *,
        on_call: Callable[[int, str], None],
        on_leaving: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.on_call, self.on_leaving = str(folder), on_call, on_leaving
        self.count, self._inside = 0, False
        self._wrap(os, "fsync", "os.fsync")
        self._wrap(safetensors.torch, "serialize_file", "safetensors")
        self._wrap(torch, "save", "torch.save")
        for event in ("before_cursor_execute", "commit"):
            sqlalchemy.event.listen(sqlalchemy.Engine, event, lambda *args: self._count("database"))
        sys.addaudithook(self._heard)

    def _wrap(self, owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(what)
            return function(*args, **kwargs)

        setattr(owner, name, counted)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR) and self._concerns(path):
                self._count("open")
        elif event in CHANGES:
            handles = [one for one in args[1:] if isinstance(one, int) and one > 2] if event != "os.mkdir" else []
            if self._concerns(args[0], *handles[-1:]):
                if event == "os.rename" and os.path.isdir(args[0]):
                    self._leaves(args[0])
                self._count(event)
        elif event == "shutil.rmtree" and self._concerns(args[0]):
            self._leaves(args[0])

    def _leaves(self, folder: Any) -> None:
        """A folder is about to be removed, or to be moved, which is how folders are removed as a whole."""
        if not self._inside:
            self._inside = True
            self.on_leaving(Path(os.fsdecode(folder)))
            self._inside = False

    def _concerns(self, path: Any, handle: int | None = None) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if handle is not None and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), name)
        return os.path.abspath(name).startswith(self.folder)

    def _count(self, what: str) -> None:
        if not self._inside:
            self.on_call(self.count, what)
            self.count += 1


def at_call(number: int, act: Callable[[str], None]) -> Callable[[int, str], None]:
    """What :class:`Calls` may be told: to act at one call."""

    def heard(count: int, what: str) -> None:
        if count == number:
            act(what)

    return heard


# -- around the attempt ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where an attempt is killed.

    Attributes:
        kind: one of :data:`KINDS`.
        call: number of a file-system call.
        second: seconds from the start.
        size: bytes that no file may exceed.
    """

    kind: str
    call: int = 0
    second: float = 0.0
    size: int = 0


@dataclass
class Kill:
    """An attempt that was killed: where that was meant to be, at which call it was, and what was wrong there then."""

    point: Point
    what: str
    wrong: list[str]


@dataclass
class Round:
    """What became of work that was killed once or twice and went on."""

    operation: str
    kills: list[Kill] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether it ended, at the first attempt that was not killed, with the bits of a run that never was."""
        return not self.failed and not self.differences

    @property
    def short(self) -> bool:
        """Whether something fell short."""
        return not self.equal or bool(self.leftovers) or any(kill.wrong for kill in self.kills)


def forked(action: Callable[[], Any], folder: Path, *, killed_after: float | None = None, quiet: bool = False) -> Any:
    """Runs something in a fork; returns what it returns, ``"killed"``, or the traceback of its error as ``Failed``."""
    answer, log = folder / "answer.json", folder / "attempt.log"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code, said = 1, {}
        try:
            sink = os.open(os.devnull if quiet else log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            torch.set_num_threads(1)
            said = {"value": action()}
            code = 0
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            said = {"error": traceback.format_exc()[-3000:], "kinds": kinds, "message": str(error)}
        finally:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            answer.write_text(json.dumps(said))
            os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    said = json.loads(answer.read_text())
    if "error" in said:
        raise Failed(said["error"], kinds=said["kinds"], message=said["message"])
    return said["value"]


class Failed(Exception):
    """An attempt raised: the traceback, the names of the error's classes, and what it said."""

    def __init__(self, text: str, *, kinds: Sequence[str], message: str) -> None:
        super().__init__(text)
        self.kinds, self.message = tuple(kinds), message


class Harness:
    """One operation, its run that was never killed, and rounds that were.

    Args:
        name: of the operation.
        root: a folder for it.
        seed: of all points.
    """

    def __init__(self, name: str, root: Path, *, seed: int = 0) -> None:
        self.name, self.root, self.seed = name, root, seed
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.inputs, self.start, self.work = root / "inputs", root / "start", root / "work"
        self.whole, self.states = root / "whole", root / "states"
        forked(lambda: str(prepared(name, root)), root)
        self.calls, self.seconds = self._uninterrupted()
        self.right = self._right()

    def _uninterrupted(self) -> tuple[int, float]:
        """Runs to the end; keeps the result, and each state that a folder was removed from or moved in."""
        self.states.mkdir()

        def keep(removed: Path) -> None:
            if removed.exists():
                shutil.copytree(self.work, self.states / str(len(os.listdir(self.states))))

        def run() -> tuple[int, float]:
            calls = Calls(self.work, on_call=lambda number, what: None, on_leaving=keep)
            began = time.perf_counter()
            OPERATIONS[self.name].work(self.inputs, self.work)
            return calls.count, time.perf_counter() - began

        self.restore()
        count, seconds = forked(run, self.root)
        shutil.copytree(self.work, self.whole)
        return count, seconds

    def _right(self) -> dict[str, set[str]]:
        """Digests of all complete states, by what it is and where."""
        right: dict[str, set[str]] = {}
        for folder in (self.start, self.whole, *self.states.iterdir()):
            for what, digest in forked(lambda folder=folder: loaded(folder), self.root).items():
                right.setdefault(what, set()).add(digest)
        kinds = {what.partition(" ")[0] for what in right}
        if missing := set(OPERATIONS[self.name].holds) - kinds:
            raise RuntimeError(f"{self.name} leaves nothing that loads as {', '.join(sorted(missing))}")
        return right

    def restore(self) -> None:
        """Puts back what is there before the first attempt."""
        self.work.mkdir(exist_ok=True)
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.start, self.work, dirs_exist_ok=True)

    def attempt(self, point: Point | None = None) -> tuple[bool, str]:
        """Runs until the end or the point; returns whether it was killed, and at which call."""
        note = self.root / "killed_at"
        note.unlink(missing_ok=True)

        def run() -> None:
            if point is not None and point.kind != "moment":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                at = os.open(note, os.O_WRONLY | os.O_CREAT)

                def act(what: str) -> None:
                    os.write(at, what.encode())
                    if point.kind == "call":
                        os.kill(os.getpid(), signal.SIGKILL)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (point.size, resource.RLIM_INFINITY))

                Calls(self.work, on_call=at_call(point.call, act))
            OPERATIONS[self.name].work(self.inputs, self.work)

        moment = point.second if point is not None and point.kind == "moment" else None
        quiet = point is not None and point.kind == "byte"
        end = forked(run, self.root, killed_after=moment, quiet=quiet)
        return end == "killed", note.read_text() if note.exists() else ""

    def points(self, number: int) -> Iterator[Point]:
        """Points of a round: of one kind, drawn again and again. Operations begin with different kinds."""
        rng = random.Random(f"{self.seed} {self.name} {number}")
        kind = KINDS[(number + list(OPERATIONS).index(self.name)) % len(KINDS)]
        while True:
            call, second = rng.randrange(self.calls), rng.uniform(0.0, self.seconds)
            size = int(2 ** rng.uniform(0.0, _LARGEST_BYTE))
            wanted = {"moment": {"second": second}, "call": {"call": call}, "byte": {"call": call, "size": size}}
            yield Point(kind, **wanted[kind])  # type: ignore[arg-type]

    def round(self, number: int) -> Round:
        """Kills at a random point, or at two, looks, goes on to the end, and compares."""
        began, made, points = time.perf_counter(), Round(self.name), self.points(number)
        for _ in range(REDRAWS):
            self.restore()
            if self._kill(made, next(points)):
                break
        if number % len(KINDS) ** 2 >= 2 * len(KINDS):
            self._kill(made, next(points))
        self._go_on(made)
        if not made.failed:
            made.differences = self.differences(self.whole)
        made.leftovers = leftovers(self.work)
        made.seconds = time.perf_counter() - began
        return made

    def _kill(self, made: Round, point: Point) -> bool:
        try:
            killed, what = self.attempt(point)
        except Failed as error:
            made.failed.append(str(error))
            return True
        if killed:
            made.kills.append(Kill(point, what, self.wrong()))
        return killed

    def _go_on(self, made: Round) -> None:
        for _ in range(ATTEMPTS):
            made.attempts += 1
            try:
                self.attempt()
                return
            except Failed as error:
                made.failed.append(str(error))

    def wrong(self) -> list[str]:
        """What loads and is no complete state of the run that was never killed."""
        found = forked(lambda: loaded(self.work), self.root)
        wrong = [what for what, digest in found.items() if digest not in self.right.get(what, ())]
        return wrong + [f"{name} is no JSON" for name in torn(self.work)]

    def differences(self, folder: Path) -> list[str]:
        """What is not as in another folder; found in a process of its own."""
        found: list[str] = forked(lambda: differences(folder, self.work), self.root)
        return found


def summary(name: str, rounds: Sequence[Round], *, harness: Harness) -> dict[str, Any]:
    """One line of the table."""
    kills = [kill for one in rounds for kill in one.kills]
    kinds = {kind: sum(kill.point.kind == kind for kill in kills) for kind in KINDS}
    return {
        "operation": name,
        "goes_on": OPERATIONS[name].goes_on,
        "calls": harness.calls,
        "rounds": len(rounds),
        "kills": len(kills),
        **kinds,
        "equal": sum(one.equal for one in rounds),
        "loads_and_wrong": sum(len(kill.wrong) for kill in kills),
        "leftovers": sum(bool(one.leftovers) for one in rounds),
        "failed": sum(bool(one.failed) for one in rounds),
        "seconds": sum(one.seconds for one in rounds),
        "what": sorted({kill.what for kill in kills if kill.what}),
    }


def killed(harness: Harness, *, points: int, say: Callable[[str], None]) -> list[Round]:
    """Kills an operation at so many points."""
    rounds: list[Round] = []
    while sum(len(one.kills) for one in rounds) < points:
        rounds.append(harness.round(len(rounds)))
        say(told(rounds[-1]))
    return rounds


def quiet() -> None:
    """Lets transformers say nothing that is no error, and this process use one thread."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def told(one: Round) -> str:
    """A line about a round."""
    at = ", ".join(f"{kill.point.kind} {kill.what}".strip() for kill in one.kills)
    wrong = [what for kill in one.kills for what in kill.wrong]
    parts = [f"{one.operation}: killed at {at}", "same bits" if one.equal else "NOT the same"]
    for name, what in (("wrong", wrong), ("differs", one.differences), ("left", one.leftovers), ("failed", one.failed)):
        parts += [f"{name}: {what}"] if what else []
    return "; ".join(parts)


def arguments(text: str | None) -> argparse.ArgumentParser:
    """The options that this script and the benchmark share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12, help="kills of each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="where the result is written")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    quiet()
    rows, notes = [], []
    for name in given.operations:
        harness = Harness(name, given.folder / name.replace(" ", "-"), seed=given.seed)
        rounds = killed(harness, points=given.points, say=lambda text: print(text, flush=True))
        rows.append(summary(name, rounds, harness=harness))
        notes += [told(one) for one in rounds if one.short]
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows, "short": notes}, indent=1))


if __name__ == "__main__":
    main()
