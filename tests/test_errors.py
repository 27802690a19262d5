"""What every error of ours is: a builtin too, and one line that any terminal shows."""

from __future__ import annotations

import pickle

import pytest

from hf_elastic import errors
from hf_elastic.errors import CheckpointError, DataError, ElasticError, SpaceError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ElasticError)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain: é ü 漢 'x'", "plain: é ü 漢 'x'"),
        ("two\n  lines\r\nand a third\u2028one", "two lines and a third one"),
        ("\x1b[31mred\x07 \u202etxt", "\\x1b[31mred\\x07 \\u202etxt"),
        ("half \ud800 of a pair", "half \\ud800 of a pair"),
        ("", ""),
    ],
)
def test_a_message_is_one_line_without_codes_for_terminals(kind: type[ElasticError], message: str, shown: str) -> None:
    error = kind(message)
    assert str(error) == shown and error.args == (shown,)
    assert str(pickle.loads(pickle.dumps(error))) == shown
    assert str(error).encode("utf-8").decode("utf-8") == shown


def test_an_endless_name_is_cut_in_the_middle_of_a_message() -> None:
    message = str(SpaceError(f"choice {'x' * 10**6} is unknown; name another"))
    assert len(message) < 2100 and message.startswith("choice xxx") and message.endswith("is unknown; name another")


def test_an_error_is_still_the_builtin_it_resembles() -> None:
    with pytest.raises(OSError, match="cannot read"):
        raise CheckpointError("cannot read it")
    with pytest.raises(ValueError, match="no text"):
        raise DataError("no text")
    assert CheckpointError("x").errno is None and str(ElasticError(3)) == "3"
