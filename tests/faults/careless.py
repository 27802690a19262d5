"""An operation that does all wrong, which the harness has to notice; run by test_killing.py as killing.py is."""

from __future__ import annotations

from pathlib import Path

import killing
from operations import OPERATIONS, Operation, tiny


def careless(inputs: Path, folder: Path) -> None:
    """Writes other weights first, counts its attempts, and leaves what it wrote aside."""
    with (folder / "attempts.txt").open("a") as file:
        file.write("one more\n")
    (folder / ".aside").write_text("")
    tiny("bert", seed=1).save_pretrained(folder / "out")
    tiny("bert").save_pretrained(folder / "out")
    (folder / "numbers.json").write_text("{")
    (folder / "numbers.json").write_text("{}")
    (folder / ".aside").unlink()
    (folder / f".left-{len((folder / 'attempts.txt').read_text())}").write_text("")


def broken(inputs: Path, folder: Path) -> None:
    """Does not go on where something is."""
    (folder / "out").mkdir()
    tiny("bert").save_pretrained(folder / "out")


OPERATIONS["careless"] = Operation(careless)  # type: ignore[index]
OPERATIONS["broken"] = Operation(broken)  # type: ignore[index]

if __name__ == "__main__":
    killing.main()
