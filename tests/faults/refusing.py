"""Operations that cannot write: a disk that is full, or a folder that is read-only. They end with one line, and go on.

A disk is full where a tmpfs of few bytes is (``tmpfs``; it takes root), and where the operating system lets no file
grow beyond a size from a random file-system call on (``limit``: RLIMIT_FSIZE, for everybody). ``read-only`` is a tmpfs
again.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from killing import REDRAWS, Calls, Failed, Harness, arguments, at_call, forked, quiet
from looking import leftovers
from operations import OPERATIONS

REFUSALS = ("limit", "tmpfs", "read-only")
PLENTY = 64 * 2**20  # bytes of a tmpfs on which everything fits
_PAGE = 4096


@dataclass
class Refusal:
    """What became of work that could not be written.

    Attributes:
        operation: which.
        kind: one of :data:`REFUSALS`.
        error: the class of what was raised, none where the work ended all the same.
        message: what it said.
        clean: whether that is an ElasticError of one line.
        wrong: what was there and wrong then: loads and is no complete state, or an older result is not as it was.
        leftovers: what was written aside and was not removed by the process itself.
        differences: from the result of a run that could always write, after going on.
    """

    operation: str
    kind: str
    error: str | None = None
    message: str = ""
    clean: bool = False
    wrong: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def why_no_mounts() -> str | None:
    """Why this user cannot mount a tmpfs, if so."""
    if shutil.which("mount") is None:
        return "there is no mount command"
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this user may not mount a tmpfs"


@contextmanager
def mounted(folder: Path) -> Iterator[Callable[[str], None]]:
    """A tmpfs at a folder for the length of the block; yields what mounts it anew with other options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "hf-elastic-faults", str(folder)], check=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(harness: Harness, kind: str, number: int) -> Refusal:
    """Lets the work meet a fault of a kind, looks, takes the fault away, and lets the work go on.

    Args:
        harness: of the operation.
        kind: one of :data:`REFUSALS`.
        number: of the draw.
    """
    made = Refusal(harness.name, kind)
    rng = random.Random(f"{harness.seed} {harness.name} {kind} {number}")
    if kind == "limit":
        for _ in range(REDRAWS):  # the work may write no file as large
            harness.restore()
            _attempt(harness, made, lambda: _limited(harness, rng))
            if made.error is not None:
                break
        _go_on(harness, made)
        return made
    shutil.rmtree(harness.work, ignore_errors=True)
    with mounted(harness.work) as remount:
        harness.restore()
        used, needed = _size(harness.start), _size(harness.whole)
        size = used + _PAGE * rng.randrange(1, max(2, (needed - used) // _PAGE))
        remount("ro" if kind == "read-only" else f"size={size}")
        _attempt(harness, made, harness.attempt)
        remount(f"rw,size={PLENTY}")
        _go_on(harness, made)
    return made


def _limited(harness: Harness, rng: random.Random) -> None:
    call, size = rng.randrange(harness.calls), int(2 ** rng.uniform(0.0, 16.0))

    def act(what: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def run() -> None:
        Calls(harness.work, on_call=at_call(call, act))
        OPERATIONS[harness.name].work(harness.inputs, harness.work)

    forked(run, harness.root, quiet=True)


def _attempt(harness: Harness, made: Refusal, run: Callable[[], Any]) -> None:
    try:
        run()
    except Failed as error:
        made.error, made.message = error.kinds[0], error.message
        made.clean = "ElasticError" in error.kinds and "\n" not in error.message
        made.wrong = harness.wrong()
        if any(harness.start.iterdir()):  # an older result is as it was
            made.wrong += harness.differences(harness.start)
        made.leftovers = leftovers(harness.work)


def _go_on(harness: Harness, made: Refusal) -> None:
    try:
        harness.attempt()
        made.differences = harness.differences(harness.whole) + leftovers(harness.work)
    except Failed as error:
        made.differences = [str(error)]


def _size(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs."""
    return sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in folder.rglob("*") if path.is_file())


def told(one: Refusal) -> str:
    """A line about a refusal."""
    said = f"{one.operation}: {one.kind}: {one.error}: {one.message[:300]!r}"
    parts = [said, "clean" if one.clean else "no ElasticError of one line"]
    for name, what in (("wrong", one.wrong), ("left", one.leftovers), ("differs", one.differences)):
        parts += [f"{name}: {what}"] if what else []
    return "; ".join(parts)


def short(one: Refusal) -> bool:
    """Whether something fell short."""
    return one.error is not None and not (one.clean and not one.wrong and not one.leftovers and not one.differences)


def summary(name: str, found: Sequence[Refusal]) -> dict[str, Any]:
    """One line of the table."""
    met = [one for one in found if one.error is not None]
    return {
        "operation": name,
        **{kind: sum(one.kind == kind for one in met) for kind in REFUSALS},
        "one_line": sum(one.clean for one in met),
        "wrong": sum(bool(one.wrong) for one in met),
        "leftovers": sum(bool(one.leftovers) for one in met),
        "equal": sum(not one.differences for one in met),
        "others": sorted({one.error or "" for one in met if not one.clean}),
    }


def main() -> None:
    """As killing.py, with ``--kinds`` and ``--refusals`` of each instead of ``--points``."""
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=REFUSALS, default=list(REFUSALS))
    parser.add_argument("--refusals", type=int, default=1, help="of each kind")
    given = parser.parse_args()
    quiet()
    rows, notes = [], []
    for name in given.operations:
        harness = Harness(name, given.folder / name.replace(" ", "-"), seed=given.seed)
        found = [refused(harness, kind, number) for kind in given.kinds for number in range(given.refusals)]
        rows.append(summary(name, found))
        notes += [told(one) for one in found]
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows, "short": notes}, indent=1))


if __name__ == "__main__":
    main()
