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


def is_held(folder: Path) -> bool:
    """Return whether a process of this machine and user holds the folder's lock; the lock itself is not touched.

    A process that died has no open files, and another process that got its number has not this one.
    """
    path = folder / FILE
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
        if len(words) != 4 or words[0] != "pid" or not words[1].isdecimal() or words[3] != socket.gethostname():
            return False
        return any(os.path.samefile(link, path) for link in Path(f"/proc/{words[1]}/fd").iterdir() if link.exists())
    except OSError:
        return False
