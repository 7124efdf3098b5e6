"""FolderLock keeps a second run out of a folder for as long as the first run's process lives."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path

from slime_spec.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = ".lock"


class FolderLock:
    """Locks a folder, which is made if need be; the kernel ends the lock with the process, however that ends.

    Its file ``.lock`` names the holder: ``pid 4711 on node7``. Raises ConfigError where another process holds the lock,
    OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / FILE).open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another run"
            self.close()
            raise ConfigError(
                setting,
                f"its folder is in use by {holder}",
                str(folder),
                "Let that run end, end it, or choose another folder: --output-dir and --save.",
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("the file system has no locks, a second run would not be seen path=%s: %s", folder, error)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
