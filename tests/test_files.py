"""Damaged files are one error that names file and line; lines are appended whole or not at all."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.files import LineFile, json_rows, parse_json, read_json_object, read_text, write_whole

DAMAGED = {
    "cut": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 200_000,
    "nested in an object": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "half of a pair": rb'{"a": ["x", {"b": "\ud83d"}]}',
    "half of a pair in a key": rb'{"\udc00": 1}',
    "a list": b"[1]",
    "empty": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(CheckpointError) as raised:
        read_json_object(path, CheckpointError)
    assert raised.value.setting == str(path)
    str(raised.value).encode()
    assert len(str(raised.value)) < 500


def test_what_is_no_file_is_one_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 5_000), tmp_path / "a\0b"):
        with pytest.raises(ConfigError):
            read_text(path)


def test_a_whole_pair_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + rb'{"a": "\ud83d\ude00"}')
    assert read_json_object(path) == {"a": "😀"}
    assert parse_json('{"rope": Infinity}', "here")["rope"] == float("inf")


def test_rows_name_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\u2028"}\n\n{"a": 2}\r\n')
    assert list(json_rows(path)) == [(f"{path}:1", {"a": "\u2028"}), (f"{path}:3", {"a": 2})]
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: must be valid JSON"):
        list(json_rows(path))


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "lo', b"x" * 3_000_000])
def test_a_torn_last_line_is_dropped_when_the_file_is_opened_again(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    with LineFile(path) as file:
        assert file.dropped_bytes == len(torn)
        file.append('{"step": 2}', '{"step": 3}')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_costs_the_new_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with LineFile(path) as file:
            file.append("first")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # as a disk with 1000 bytes
            with pytest.raises(ConfigError, match="must be writable"):
                file.append("x" * 5_000)
            file.append("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "first\nsecond\n"


def test_writing_never_fails_on_text(tmp_path: Path) -> None:
    with LineFile(tmp_path / "a") as file:
        file.append("\ud800")
    assert (tmp_path / "a").read_text() == "\\ud800\n"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
