"""RunLog copies what the driver logs into the run's folder."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

from slime_spec.errors import ConfigError

FORMAT = "%(asctime)s %(name)s %(message)s"


class RunLog:
    """Keeps log lines until the run has a folder, then writes them and all later lines, and the error that ends it.

    Example::

        with RunLog() as log:
            ...
            log.write_to(folder / "run.log")
    """

    def __init__(self) -> None:
        self._handler: logging.Handler = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def write_to(self, path: Path) -> None:
        """Append to the file from now on, the lines so far first; raises ConfigError where it cannot be opened."""
        try:
            early, self._handler = self._handler, _LogFile(path)
        except OSError as error:
            rule, remedy = f"must be writable: {error.strerror}", "Choose another --output-dir."
            raise ConfigError(str(path), rule, path.name, remedy) from None
        assert isinstance(early, MemoryHandler), "a run has one folder"
        root = logging.getLogger()
        root.removeHandler(early)
        early.setTarget(self._handler)
        early.flush()
        early.close()
        root.addHandler(self._handler)

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self._handler)
        if isinstance(error, Exception):
            facts = None if isinstance(error, ConfigError) else (type(error), error, at)
            self._handler.handle(
                logging.LogRecord(__name__, logging.ERROR, __file__, 0, "ended by an error: %s", (error,), facts)
            )
        self._handler.close()


class _LogFile(logging.FileHandler):
    """Writes a log file; a file that cannot be written ends no run, and is reported once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter(FORMAT))
        self._has_failed = False

    def close(self) -> None:
        with suppress(OSError):  # what it could not write before
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True
            sys.stderr.write(f"warning: {self.baseFilename} lacks lines: {sys.exc_info()[1]}\n")
