"""Hostile inputs made of valid ones: JSON changed in its structure, bytes flipped and cut, rows and pages broken."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Random = random.Random


@dataclass(frozen=True)
class Raw:
    """JSON text that is written as it is, however malformed."""

    text: str


NAMES = (
    "", " ", ".", "..", "../escaped", "../../../../../../tmp/escaped", "/escaped", "/tmp/escaped", "a/b", "a\\b", "~",
    "~nobody-of-that-name/x", "a\0b", "line\nbreak", "tab\t", "\ud800", "\u202egnp", "\U0001f600", "x" * 300,
    "x" * 70_000,
    "%s%n%x", "{0.__class__}", "${HOME}", "$(touch escaped)", "<script>alert(1)</script>", "`|*_[x](y)", "__class__",
    "__init__", "layers.0.intermediate_size", "layers.99999999.skip", "layers..skip", "file:///etc/passwd", "-1",
    "0", "con",
    "http://127.0.0.1:9/x", "\x1b[31mred", "a,b;c", "#1", "'", '"',
)  # fmt: skip
"""Names that a file, a tensor, a module or a choice may be given."""
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 10**6, 10**9, 10**12, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    -(10**12), -(2**63) - 1, 0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-320, 1e300, -1e308, float("nan"), float("inf"),
    float("-inf"), Raw("9" * 5000), Raw("1e999"), Raw("-0"), Raw("0.1e-999"),
)  # fmt: skip
DEEP = (Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 50_000 + "1" + "}" * 50_000), Raw("[" * 900 + "]" * 900))
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": None}, [{}], [[], {}], "none", "auto", ["x"] * 1000, [0] * 100_000,
    {str(n): n for n in range(1000)}, Raw("NaN"), Raw("nul"), Raw("'single'"), Raw(""), Raw("{}{}"), *DEEP,
    Raw('{"name": 1, "name": 2}'), Raw('"\\ud800"'), Raw('"\t"'),
)  # fmt: skip


def hostile_value(rng: Random) -> Any:
    """Any value that does not belong where it is put."""
    return rng.choice(rng.choice((NAMES, NUMBERS, NUMBERS, OTHERS)))


def written(value: Any) -> str:
    """JSON text; :class:`Raw` stands as it is."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


# -- structure -----------------------------------------------------------------------------------------------------

Holder = Any
"""A dict or a list."""


def _place(rng: Random, data: Any) -> tuple[Holder, Any] | None:
    """A container inside of the data and one of its keys, by a random walk from the root."""
    found, here = None, data
    while isinstance(here, dict | list) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        found = (here, key)
        if rng.random() < 0.15:
            break
        here = here[key]
    return found


def _delete(rng: Random, holder: Holder, key: Any) -> None:
    del holder[key]


def _replace(rng: Random, holder: Holder, key: Any) -> None:
    holder[key] = hostile_value(rng)


def _number(rng: Random, holder: Holder, key: Any) -> None:
    value = holder[key]
    if type(value) not in (int, float) or abs(value) > 1e100:
        holder[key] = rng.choice(NUMBERS)
    else:
        holder[key] = rng.choice((-value, value + 1, value - 1, value * 10**12, value / 3, str(value), 0))


def _wrap(rng: Random, holder: Holder, key: Any) -> None:
    value = holder[key]
    holder[key] = rng.choice(([value], {"x": value}, [value, value], str(value)))


def _rename(rng: Random, holder: Holder, key: Any) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((*NAMES, str(key) + "s", str(key).upper(), f"{key}/../x"))] = holder.pop(key)
    else:
        holder.insert(key, hostile_value(rng))


def _add(rng: Random, holder: Holder, key: Any) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(NAMES)] = hostile_value(rng)
    else:
        holder.append(rng.choice((hostile_value(rng), copy.deepcopy(holder[key]))))


def _shorten(rng: Random, holder: Holder, key: Any) -> None:
    value = holder[key]
    if isinstance(value, list | str):
        holder[key] = value[: rng.randrange(len(value) + 1)]
    elif isinstance(value, dict):
        holder[key] = dict(list(value.items())[: rng.randrange(len(value) + 1)])
    else:
        holder[key] = None


def _repeat(rng: Random, holder: Holder, key: Any) -> None:
    value = holder[key]
    holder[key] = value * rng.choice((2, 100)) if isinstance(value, list | str) else [copy.deepcopy(value)] * 3


def _name(rng: Random, holder: Holder, key: Any) -> None:
    holder[key] = rng.choice(NAMES) if isinstance(holder[key], str) else hostile_value(rng)


def _swap(rng: Random, holder: Holder, key: Any) -> None:
    other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]


_CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    _delete, _replace, _replace, _number, _number, _wrap, _rename, _add, _shorten, _repeat, _name, _swap,
)  # fmt: skip


def hostile_data(rng: Random, data: Any) -> Any:
    """A copy of JSON data in which one to three things are not as they should be."""
    if rng.random() < 0.02:
        return hostile_value(rng)
    changed = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = _place(rng, changed)
        if place is None:
            return hostile_value(rng)
        rng.choice(_CHANGES)(rng, *place)
    return changed


def _bom(rng: Random, text: str) -> bytes:
    return b"\xef\xbb\xbf" + _encoded(text)


def _duplicated(rng: Random, text: str) -> bytes:
    """The first key of some object once more."""
    places = [match for match in re.finditer(r'\{\s*("(?:[^"\\]|\\.){0,80}"\s*:)', text)]
    if not places:
        return _encoded(text)
    place = rng.choice(places)
    return _encoded(f"{text[: place.start() + 1]}{place[1]} {written(hostile_value(rng))}, {text[place.start() + 1 :]}")


def _utf16(rng: Random, text: str) -> bytes:
    return text.encode("utf-16", errors="surrogatepass")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def hostile_json(rng: Random, data: Any) -> bytes:
    """The bytes of a JSON file that is not what it should be; one in twenty is."""
    chance = rng.random()
    if chance < 0.05:
        return _encoded(written(data))
    if chance < 0.15:
        return rng.choice((_bom, _duplicated, _duplicated, _utf16))(rng, written(data))
    if chance < 0.25:
        return hostile_bytes(rng, _encoded(written(data)))
    return _encoded(written(hostile_data(rng, data)))


def hostile_text(rng: Random, data: Any) -> str:
    """As :func:`hostile_json`, as a text."""
    return hostile_json(rng, data).decode("utf-8", errors="surrogateescape")


# -- bytes ---------------------------------------------------------------------------------------------------------


def hostile_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes that are cut, flipped, doubled, zeroed, or of something else."""
    if not data:
        return rng.randbytes(rng.choice((1, 8, 100)))
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 2, 8, 100, 1000)))
    chance = rng.randrange(8)
    if chance < 2:
        return data[:start]
    if chance == 2:
        return data[:start] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:stop]) + data[stop:]
    if chance == 3:
        return data[:stop] + data[start:]
    if chance == 4:
        return data[:start] + bytes(stop - start) + data[stop:]
    if chance == 5:
        return data[:start] + rng.randbytes(stop - start) + data[stop:]
    if chance == 6:
        return data[:start] + data[stop:]
    return rng.choice((b"", b"\0" * 100, b"\xff" * 8 + data, rng.randbytes(200), data + b"\n\0", b"\x80\x04K\x01."))


def hostile_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file whose length, header or tensors are not what they should be."""
    if rng.random() < 0.25:
        return hostile_bytes(rng, data)
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        assert all(
            {"shape", "dtype", "data_offsets"} <= entry.keys() for name, entry in header.items() if name[:2] != "__"
        )
        assert len(header.keys() - {"__metadata__"}) > 1
    except (ValueError, OverflowError, AttributeError, AssertionError, RecursionError, struct.error):
        return hostile_bytes(rng, data)  # it was changed before
    if rng.random() < 0.15:
        said = rng.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1, 100 * 2**20))
        return struct.pack("<Q", said) + data[8:]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    change = rng.randrange(7)
    if change == 0:
        entry["shape"] = rng.choice(
            ([10**12], [-1], [], [0], [2**63, 2], entry["shape"][::-1], [*entry["shape"], 1], "x")
        )
    elif change == 1:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "X", None, 3))
    elif change == 2:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([stop, start], [start, stop + 8], [0, stop], [start, 2**63], [-1, stop], [start], [0.5, stop])
        )
    elif change == 3:
        header[rng.choice(NAMES)] = header.pop(name)
    elif change == 4:
        header["__metadata__"] = rng.choice(({"format": "x"}, {"format": 1}, [], None, {"a": "b" * 10**6}, {}))
    elif change == 5:
        del header[name]
    else:
        header = hostile_data(rng, header)
    text = _encoded(written(header))
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# -- rows and pages --------------------------------------------------------------------------------------------------

_CELLS = (
    "", "nan", "inf", "-inf", "1e999", "1" * 400, "abc", "1,2", '"', '"open', "\0", "\ud800", "0x10", "1_000",
    "=1+1", "½",
    "٣", " 3 ", "None", "x" * 140_000, "true", "[1]", "\x0c", "\u2028",
)  # fmt: skip


_LONGEST_LINE = 2**27  # characters; a line may be made longer again and again


def hostile_lines(rng: Random, text: str, *, separator: str = ",") -> bytes:
    """Lines of CSV or JSON of which a few are broken."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 4)):
        number = rng.randrange(len(lines))
        change = rng.randrange(9)
        cells = lines[number].split(separator)
        if change == 0:
            cells[rng.randrange(len(cells))] = rng.choice(_CELLS)
            lines[number] = separator.join(cells)
        elif change == 1:
            lines[number] = separator.join([*cells, rng.choice(_CELLS)])
        elif change == 2:
            lines[number] = separator.join(cells[: rng.randrange(len(cells) + 1)])
        elif change == 3:
            lines.insert(number, rng.choice(("", ",", "\0", "{", "[]", "null", "1", '"', "{}", "\r", "\ufeff")))
        elif change == 4:
            del lines[number]
            lines = lines or [""]
        elif change == 5:
            times = rng.choice((2, 500))
            lines[number] *= times if len(lines[number]) * times <= _LONGEST_LINE else 1
        elif change == 6:
            lines[number] = _broken_row(rng, lines[number])
        elif change == 7:
            lines[number] = lines[number].replace(rng.choice(',":{}[]0123456789'), rng.choice(("", ";", '"', "\t")), 1)
        else:
            lines = lines[:1] if rng.random() < 0.3 else lines
    made = rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines).encode("utf-8", errors="surrogatepass")
    return hostile_bytes(rng, made) if rng.random() < 0.2 else made


def _broken_row(rng: Random, line: str) -> str:
    """A row of JSON changed in its structure; other lines doubled."""
    try:
        data = hostile_data(rng, json.loads(line))
    except (ValueError, RecursionError):  # no JSON, or nested by a change before
        return f"{line}{line}"
    return written(data).replace("\n", " ")


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # nine levels of nine: 387 million entries if written out
_YAML = (
    "license: [a, b", "license: *missing", "license: !!python/object/apply:os.system ['touch escaped']",
    "license: {a: }",
    "license: |\n  a\n b", "\t- x", "license: 2024-13-45", "license: 0x", "license: " + "[" * 3000 + "]" * 3000,
    "license: " + "x" * 100_000, "language: {en: fr}", "language: [en, 3, null, [de]]", "base_model: [a/b, ../c]",
    "base_model: ../../escaped", "base_model: {a: b}", "base_model: 3", "license: '\\ud800'", 'license: "\\ud800"',
    "license: \0", "? [a, b]\n: c", "license: !!binary aGk=", "license: !!set {a, b}", "license: .nan",
    "license: 1e999",
    "license: a: b", "%YAML 9.9", "license: apache-2.0\nlicense: mit", "model-index: 3", "model-index: [{name: x}]",
    "tags: 3", "metrics: {a: b}", "datasets: 2020-01-01", "license: yes", "language: no", "license: 'a\n\n\nb'",
    "license_name: [x]", "license_link: javascript:alert(1)", "eval_results: x", _BOMB + "license: *i", _BOMB,
)  # fmt: skip


def hostile_card(rng: Random, body: str = "# A model\n\nText with {{ a | default('b') }}.\n") -> bytes:
    """A README whose front matter is broken or hostile."""
    lines = [rng.choice(_YAML) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.5:
        lines += ["license: apache-2.0", "language: en", "base_model: someone/encoder"]
        rng.shuffle(lines)
    open_, close = (
        rng.choice(("---\n", "---\n", "---\r\n", "--- \n", "")),
        rng.choice(("\n---\n", "\n---\n", "\n", "\n---")),
    )
    text = (
        open_
        + "\n".join(lines)
        + close
        + rng.choice((body, "", body * 300, "![x](../../x.png) ![y](y.png)\n", "---\n" * 500))
    )
    made = text.encode("utf-8", errors="surrogatepass")
    return hostile_bytes(rng, made) if rng.random() < 0.15 else made


def hostile_values(rng: Random, valid: dict[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Keyword arguments of which one to three are hostile, as Python values."""
    changed = copy.deepcopy(valid)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*valid, *others])
        value = hostile_value(rng)
        if rng.random() < 0.4 and isinstance(valid.get(name), dict | list):
            value = hostile_data(rng, valid[name])
        changed[name] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    """Without :class:`Raw`, which only a text can hold."""
    if isinstance(value, Raw):
        return value.text[:50]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
