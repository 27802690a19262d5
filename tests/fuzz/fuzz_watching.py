"""What a call does besides returning: files written, code run, pickles read, memory taken, seconds spent."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_elastic.errors import ElasticError

MEMORY, SECONDS = 512 * 2**20, 10.0
"""Bytes by which the peak of a case may grow, and seconds of the processor that it may take."""
_ROOM = 3 * 2**30  # address space beyond what the process has; a case that asks for more is refused by the system
_LARGEST_FILE = 256 * 2**20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGED: Mapping[str, tuple[int, ...]] = {
    "os.rename": (0, 1), "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.copyfile": (1,),
    "shutil.rmtree": (0,), "shutil.move": (1,), "tempfile.mkstemp": (0,), "tempfile.mkdtemp": (0,),
}  # fmt: skip
_DIRECTORY_FD: Mapping[str, int] = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 2}
_STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "socket.connect", "os.fork")


@dataclass(frozen=True)
class Place:
    """Where a case lives: ``inside`` holds its input, ``out`` and ``tmp`` are all it may write to."""

    root: Path

    @property
    def inside(self) -> Path:
        """Folder of the input."""
        return self.root / "inside"

    @property
    def out(self) -> Path:
        """Folder of the output."""
        return self.root / "out"

    @property
    def tmp(self) -> Path:
        """Folder of temporary files."""
        return self.root / "tmp"

    @property
    def marker(self) -> Path:
        """Written by hostile code and pickles, where they run."""
        return self.root / "marker"

    def prepare(self) -> None:
        """Empties it."""
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in (self.inside, self.out, self.tmp):
            folder.mkdir(parents=True)

    def listing(self) -> dict[str, tuple[int, int]]:
        """Sizes and times of all files that may not change."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            if folder == str(self.root):
                folders[:] = [name for name in folders if name not in ("out", "tmp")]
            for name in files:
                stat = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (stat.st_size, stat.st_mtime_ns)
        return found


@dataclass
class Verdict:
    """What one case did.

    Attributes:
        target: name of the target.
        number: of the case.
        outcome: ``accepted``, ``refused``, ``raised`` (another exception), or ``killed``.
        error: class and first line of what was raised.
        trace: the whole traceback of a finding.
        findings: what must not be, by kind.
        memory: bytes that the peak grew by.
        seconds: it took.
    """

    target: str
    number: int
    outcome: str
    error: str = ""
    trace: str = ""
    findings: dict[str, str] = field(default_factory=dict)
    memory: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Watch:
    """An audit hook that notes what a case does while it is on; only in a child, as hooks cannot be taken away."""

    def __init__(self) -> None:
        self.place: Place | None = None
        self.seen: dict[str, str] = {}
        self._allowed: tuple[str, ...] = ()
        self._inside = ""

    def install(self) -> None:
        """From now on events are seen."""
        import torch

        sys.addaudithook(self._hook)
        original = torch.load

        def load(f: Any, *arguments: Any, **options: Any) -> Any:
            if self.place is not None:
                self._note("pickle", f"torch.load({f!r})")
            return original(f, *arguments, **options)

        torch.load = load

    def start(self, place: Place) -> None:
        """Begins to note."""
        self.seen, self._inside = {}, f"{os.path.realpath(place.inside)}/"
        self._allowed = tuple(f"{os.path.realpath(folder)}" for folder in (place.out, place.tmp)) + ("/dev/null",)
        self.place = place

    def stop(self) -> dict[str, str]:
        """Ends noting; what was seen, by kind."""
        self.place = None
        return self.seen

    def _note(self, kind: str, what: str) -> None:
        self.seen.setdefault(kind, what[:500])

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING:
                self._check(path, event)
        elif event in _CHANGED:
            if arguments[_DIRECTORY_FD.get(event, 0)] in (-1, None) or event not in _DIRECTORY_FD:
                for position in _CHANGED[event]:
                    self._check(arguments[position], event)
        elif event == "exec":
            if str(getattr(arguments[0], "co_filename", "")).startswith(self._inside):
                self._note("code", f"exec {arguments[0].co_filename}")
        elif event == "import":
            if str(arguments[1] or "").startswith(self._inside):
                self._note("code", f"import {arguments[1]}")
        elif event == "builtins.input":
            self._note("asked", f"input {arguments!r}")
        elif event == "pickle.find_class":
            self._note("pickle", f"find_class {arguments!r}")
        elif event in _STARTED:
            self._note("code", f"{event} {arguments!r}")

    def _check(self, path: Any, event: str) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        text = os.fsdecode(path)
        if "\0" in text:
            return
        folder, name = os.path.split(os.path.abspath(text))
        real = os.path.join(os.path.realpath(folder), name)
        if not any(real == allowed or real.startswith(f"{allowed}/") for allowed in self._allowed):
            self._note("write", f"{event} {text}")


def limit_this_process() -> None:
    """Bounds what this process can take: of memory, of files and of core dumps."""
    size = _status()["VmSize"]
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, size + _ROOM))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True


def _status() -> dict[str, int]:
    """Sizes of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}


def _reset_peak() -> int:
    """Bytes in use now, from which the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status()["VmRSS"]


Make = Callable[[Any, Place], Callable[[], object]]
"""Writes the input of a case and returns what is to be called."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "alloc_cpu", "bad_alloc")


def judge(call: Callable[[], object], verdict: Verdict, *, watch: Watch, place: Place) -> Verdict:
    """Runs a case and judges what it did."""
    before = place.listing()
    os.chdir(place.root)
    tempfile.tempdir = str(place.tmp)
    gc.collect()
    base, began = _reset_peak(), time.process_time()
    watch.start(place)
    try:
        call()
        verdict.outcome = "accepted"
    except Refusal as error:
        verdict.outcome, verdict.error = "refused", _described(error.__cause__ or error)
        _judge_memory(error, verdict)
    except ElasticError as error:
        verdict.outcome, verdict.error = "refused", _described(error)
        _judge_message(error, verdict)
        _judge_memory(error, verdict)
    except BaseException as error:
        verdict.outcome, verdict.error = "raised", _described(error)
        verdict.trace = "".join(traceback.format_exception(error))[-6000:]
        verdict.findings["exception"] = verdict.error
        _judge_memory(error, verdict)
    finally:
        seen = watch.stop()
    verdict.seconds = round(time.process_time() - began, 4)
    verdict.memory = max(0, _status()["VmHWM"] - base)
    if verdict.memory > MEMORY:
        verdict.findings["memory"] = f"{verdict.memory / 2**20:.0f} MiB"
    if verdict.seconds > SECONDS:
        verdict.findings["time"] = f"{verdict.seconds:.1f} s"
    verdict.findings |= seen
    if place.marker.exists():
        verdict.findings["code"] = "the marker was written"
    if changed := sorted(set(before.items()) ^ set(place.listing().items())):
        verdict.findings.setdefault("write", f"changed {changed[0][0]}")
    return verdict


class Refusal(Exception):
    """What a library of others says to an input before any code of hf_elastic reads it; counts as refused."""


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _judge_message(error: ElasticError, verdict: Verdict) -> None:
    message = str(error)
    if len(message.splitlines()) > 1 or len(message) > 4000:
        verdict.findings["message"] = f"{len(message.splitlines())} lines, {len(message)} characters: {message[:300]!r}"
        verdict.trace = "".join(traceback.format_exception(error))[-6000:]


def _judge_memory(error: BaseException, verdict: Verdict) -> None:
    """Whether the system refused memory somewhere on the way, also where that was then said in other words."""
    chain: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in chain:
        chain.append(here)
        here = here.__cause__ or here.__context__
    for link in chain:
        if isinstance(link, MemoryError) or any(word in str(link) for word in _NO_MEMORY):
            verdict.findings["memory"] = f"asked for more than there is: {_described(link)}"
            verdict.trace = "".join(traceback.format_exception(error))[-6000:]
