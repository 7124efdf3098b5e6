"""This module alone turns files into text and JSON, and appends whole lines: what is damaged is one ConfigError.

Readers name the file (and the line) that is damaged. A text that they return can be written again as UTF-8: JSON can
spell half of a surrogate pair (``"\\ud800"``), which no file, tokenizer or terminal accepts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime_spec.errors import ConfigError

logger = logging.getLogger(__name__)

AGAIN = "Copy the file again."
MEND = "Mend the line."


def read_text(path: Path, kind: type[ConfigError] = ConfigError, remedy: str = AGAIN) -> str:
    """Return the UTF-8 text of ``path``, without a byte order mark; raises ``kind`` where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"must be UTF-8 text: byte {error.start} is not"
    except (OSError, ValueError) as error:  # a ValueError: a path with a NUL byte
        rule = _unreadable(error)
    raise kind(str(path), rule, path.name, remedy)


def read_json(path: Path, kind: type[ConfigError] = ConfigError, remedy: str = AGAIN) -> Any:
    """Return the value of the JSON file ``path``; raises ``kind`` for a damaged file."""
    return parse_json(read_text(path, kind, remedy), str(path), kind, remedy)


def read_json_object(path: Path, kind: type[ConfigError] = ConfigError, remedy: str = AGAIN) -> dict[str, Any]:
    """Return the object of the JSON file ``path``; raises ``kind`` for a damaged file or another value."""
    return parse_json_object(read_text(path, kind, remedy), str(path), kind, remedy)


def parse_json(
    text: str, where: str, kind: type[ConfigError] = ConfigError, remedy: str = AGAIN, *, finite: bool = False
) -> Any:
    """Return the value of a JSON text; raises ``kind`` naming ``where`` (a file, or file:line).

    Refuses what Python's parser gives up on (deep nesting, a number of thousands of digits) and text that cannot be
    encoded. ``NaN`` and ``Infinity`` are numbers here, as they are for transformers: who reads a number checks it.
    ``finite`` refuses them, for JSON has no such numbers.
    """
    try:
        value = json.loads(text, parse_constant=_refuse if finite else None)
    except json.JSONDecodeError as error:
        rule = f"must be valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        rule = "must be JSON that is not nested so deeply"
    except ValueError as error:  # a number beyond int's limit of digits, or refused
        rule = f"must be valid JSON: {str(error).partition(';')[0]}"
    else:
        if "\\u" not in text or (found := _unencodable(value)) is None:
            return value
        rule = f"must be text that can be encoded: it has half of a surrogate pair in {found!a}"
    raise kind(where, rule, shortened(text), remedy)


def parse_json_object(
    text: str, where: str, kind: type[ConfigError] = ConfigError, remedy: str = AGAIN
) -> dict[str, Any]:
    """Return the object of a JSON text; raises ``kind`` as ``parse_json`` does, and for any other value."""
    value = parse_json(text, where, kind, remedy)
    if not isinstance(value, dict):
        raise kind(where, "must be a JSON object", shortened(text), remedy)
    return value


def json_rows(
    path: Path, kind: type[ConfigError] = ConfigError, remedy: str = MEND
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) for every line of a .jsonl file that is not blank; raises ``kind``."""
    for where, line in text_lines(path, kind, remedy):
        yield where, parse_json_object(line, where, kind, remedy)


def text_lines(path: Path, kind: type[ConfigError] = ConfigError, remedy: str = MEND) -> Iterator[tuple[str, str]]:
    """Yield (``file:line``, text) for every line of a UTF-8 file that is not blank, reading one at a time.

    A line ends at a newline alone: JSON strings may hold U+2028 and the like. Raises ``kind`` naming the line.
    """
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # a ValueError: a path with a NUL byte
        raise kind(str(path), _unreadable(error), path.name, "Check the path.") from None
    with file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                rule = f"must be UTF-8 text: byte {error.start} of the line is not"
                raise kind(where, rule, path.name, remedy) from None
            if text.strip():
                yield where, text


def shortened(text: str, length: int = 80) -> str:
    """Return ``text`` as an error shows it: at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def is_encodable(text: str) -> bool:
    """Return whether ``text`` can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text``: a reader, also after a crash, sees the old or the new file."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class LineFile:
    """Appends whole lines to a file that others read while it grows: a line is on disk wholly, or not at all.

    A file that ends within a line (its writer was killed, or the disk was full) is cut back to its last whole line
    when it is opened; ``dropped_bytes`` says by how much. A write that fails takes back what it wrote, so that a full
    disk costs the new line alone.
    """

    def __init__(self, path: Path) -> None:
        """Open or create ``path``; raises ConfigError where it cannot be opened for writing."""
        self._path = path
        try:
            self._file = path.open("ab+", buffering=0)
            self.dropped_bytes = self._cut_torn_line()
        except OSError as error:
            raise self._error(error) from None
        if self.dropped_bytes:
            logger.warning("cut off an unfinished last line path=%s bytes=%d", path, self.dropped_bytes)

    def append(self, *lines: str) -> None:
        """Append each of ``lines``, which have no newline, as one write; raises ConfigError where the disk refuses."""
        data = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        start = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(start)
            raise self._error(error) from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_torn_line(self) -> int:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end:  # the last newline, from the end backwards in blocks: a line of samples can be long
            start = max(0, end - (1 << 20))
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        return size - end

    def _error(self, error: OSError) -> ConfigError:
        rule = f"must be writable: {error.strerror or error}"
        return ConfigError(str(self._path), rule, self._path.name, "Make room on the disk, or write elsewhere.")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _unreadable(error: Exception) -> str:
    return f"must be a file that can be read: {getattr(error, 'strerror', None) or error}"


def _unencodable(value: Any) -> str | None:
    """Return a text within a JSON value that UTF-8 cannot encode, if there is any; walks without recursion."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and not is_encodable(each):
            return shortened(each)
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            waiting += each
    return None
