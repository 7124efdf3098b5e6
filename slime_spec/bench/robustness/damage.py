"""Damage to the files of a checkpoint folder: bytes, JSON values, headers of safetensors, and no file at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

RAW = "a text that JSON cannot have"  # stands for a value that json.dumps would not write
RAW_VALUES = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e308",
        "1e400",
        "-1e999",
        "9" * 4000,
        "9" * 5000,
        "-" + "1" * 400,
        "5e-324",
        "0.1",
    ),
    *('"\\ud800"', '"\\udc00x"', "[" * 50 + "]" * 50, "[" * 5000 + "]" * 5000, '{"a":' * 2000 + "1" + "}" * 2000),
    *("[1,", "{", '"', "01", "tru", "// x", "\x00"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        7,
        16,
        64,
        255,
        2**31,
        2**63,
        2**64,
        10**30,
        -1,
        -2,
        -(2**63),
        0.0,
        0.5,
        1.0,
        -0.5,
    ),
    *(
        "",
        "x",
        "0",
        "-1",
        "null",
        "default",
        "yarn",
        "llama3",
        "gelu",
        "silu",
        "float16",
        "F16",
        "I64",
        "F8_E4M3",
        "a" * 5000,
    ),
    *(
        "../x",
        "/",
        "\x00",
        "é🙂",
        "model.safetensors",
        [],
        {},
        [[]],
        [None],
        [0],
        [1, 2, 3],
        [-1],
        ["x"],
        {"a": 1},
        {"": None},
    ),
    *(
        [10**12] * 3,
        [0] * 5000,
        {"rope_type": "linear", "factor": 2},
        {"type": "dynamic"},
        {"rope_theta": -1},
        [[0, 1], [1]],
    ),
)


@dataclass(frozen=True)
class Special:
    """Names what stands in the place of a file: nothing, a folder, a link to itself, a pipe, a file of a terabyte."""

    kind: str

    def put(self, path: Path) -> None:
        if self.kind == "a folder":
            path.mkdir()
        elif self.kind == "a link to itself":
            path.symlink_to(path.name)
        elif self.kind == "a link to nothing":
            path.symlink_to("nothing")
        elif self.kind == "a link to a device":
            path.symlink_to("/dev/zero")
        elif self.kind == "a pipe":
            os.mkfifo(path)
        elif self.kind == "a file of a terabyte":
            with path.open("wb") as file:
                file.truncate(2**40)


SPECIALS = tuple(
    Special(kind)
    for kind in (
        *("nothing", "a folder", "a link to itself", "a link to nothing", "a link to a device", "a pipe"),
        "a file of a terabyte",
    )
)
Content = bytes | Special
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Damage:
    """Holds the damaged files of a folder by their names, and what was done."""

    what: str
    files: Mapping[str, Content]

    def put(self, folder: Path) -> None:
        """Replace files of ``folder``."""
        for name, content in self.files.items():
            path = folder / name
            path.unlink(missing_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.put(path)


def damage(files: Files, random: Random, keys: Sequence[str]) -> Damage:
    """Damage one file of a folder, config.json often, or sometimes two; ``keys`` may be added to config.json."""
    first = _damage(files, "config.json" if random.random() < 0.4 else random.choice([*files]), random, keys)
    if random.random() < 0.8:
        return first
    second = _damage(files, random.choice([name for name in files if name not in first.files]), random, keys)
    return Damage(f"{first.what}; {second.what}", {**first.files, **second.files})


def _damage(files: Files, name: str, random: Random, keys: Sequence[str]) -> Damage:
    if random.random() < 0.06:
        special = random.choice(SPECIALS)
        return Damage(f"{name} is {special.kind}", {name: special})
    if random.random() < 0.2:
        what, data = in_bytes(files[name], random)
    elif name.endswith(".safetensors"):
        what, data = in_tensors(files[name], random)
    elif name.endswith(".json"):
        what, data = in_json(files[name], random, keys if name == "config.json" else ())
    else:
        what, data = in_bytes(files[name], random)
    return Damage(f"{name}: {what}", {name: data})


def in_bytes(data: bytes, random: Random) -> tuple[str, bytes]:
    """Flip, remove, insert or repeat some bytes, or cut the end off."""
    at, count = random.randrange(len(data) + 1), random.choice((1, 1, 2, 8, 100, 4096))
    noise = bytes(random.randrange(256) for _ in range(min(count, 100)))
    ways: tuple[tuple[str, Callable[[], bytes]], ...] = (
        (f"cut at byte {at}", lambda: data[:at]),
        (f"{count} bytes removed at {at}", lambda: data[:at] + data[at + count :]),
        (f"{len(noise)} bytes inserted at {at}", lambda: data[:at] + noise + data[at:]),
        (f"{len(noise)} bytes replaced at {at}", lambda: data[:at] + noise + data[at + len(noise) :]),
        (f"{count} bytes repeated at {at}", lambda: data[:at] + data[max(0, at - count) : at] + data[at:]),
        (f"{count} zeros at {at}", lambda: data[:at] + bytes(count) + data[at + count :]),
        ("the bytes of UTF-16", lambda: data.decode("latin-1").encode("utf-16")),
        ("a byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("empty", lambda: b""),
    )
    what, made = random.choice(ways)
    return what, made()


def in_json(data: bytes, random: Random, keys: Sequence[str] = ()) -> tuple[str, bytes]:
    """Replace, remove or add one value of a JSON text, at any depth."""
    value, told = json.loads(data), []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        what, raw = _change(value, random, keys)
        told.append(what)
    return ", ".join(told), _text(value, raw).encode()


def in_tensors(data: bytes, random: Random) -> tuple[str, bytes]:
    """Change the header of a safetensors file: one value of an entry, its length, or numbers among the weights."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    way = random.random()
    if way < 0.15:
        lied = random.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_000, len(data)))
        return f"its header has {lied} bytes", lied.to_bytes(8, "little") + data[8:]
    if way < 0.3:
        at = random.randrange(0, max(1, len(rest) - 4), 4)
        number = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x80\xff"))
        return f"the number {number.hex()} at byte {at}", data[: 8 + length] + rest[:at] + number + rest[at + 4 :]
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    ways: tuple[tuple[str, Callable[[], Any]], ...] = (
        (f"{name} lies where {other} lies", lambda: header[name].update(data_offsets=header[other]["data_offsets"])),
        (f"{name} has the shape of {other}", lambda: header[name].update(shape=header[other]["shape"])),
        (f"{name} twice", lambda: header.update({name + "x": header[name]})),
        (f"no {name}", lambda: header.pop(name)),
        (f"{name} is called {other}", lambda: header.update({other: header.pop(name)})),
        (f"{name} is renamed", lambda: header.update({name[:-1]: header.pop(name)})),
        (
            f"{name} is of other codes",
            lambda: header[name].update(dtype=random.choice(("F16", "I32", "U8", "F64", "X"))),
        ),
    )
    what, raw = "", None
    if random.random() < 0.5:
        what, change = random.choice(ways)
        change()
    else:
        what, raw = _change(header, random, ())
    changed = _text(header, raw).encode()
    return what, len(changed).to_bytes(8, "little") + changed + rest


def _change(value: Any, random: Random, keys: Sequence[str]) -> tuple[str, str | None]:
    """Change one place within a JSON value; return the words for it, and the text that stands for RAW."""
    raw = random.choice(RAW_VALUES) if random.random() < 0.25 else None
    new = RAW if raw is not None else deepcopy(random.choice(VALUES))
    shown = (raw if raw is not None else json.dumps(new))[:60]
    parts = [part for part in _parts(value) if part]
    holder = value if random.random() < 0.5 and value else random.choice(parts or [value])
    if isinstance(holder, list):
        if not holder or random.random() < 0.3:
            holder.append(new)
            return f"{shown} appended to a list", raw
        at = random.randrange(len(holder))
        holder[at] = new
        return f"item {at} is {shown}", raw
    key = random.choice(keys) if keys and random.random() < 0.4 else random.choice([*holder] or ["a"])
    if key in holder and random.random() < 0.15:
        del holder[key]
        return f"no {key[:60]}", None
    holder[key] = new
    return f"{key[:60]} is {shown}", raw


def _parts(value: Any) -> list[Any]:
    """Return every object and list within a JSON value."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            found.append(each)
            waiting += each.values() if isinstance(each, dict) else each
    return found


def _text(value: Any, raw: str | None) -> str:
    text = json.dumps(value)
    return text if raw is None else text.replace(json.dumps(RAW), raw)
