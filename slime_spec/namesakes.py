"""Refuse other packages that have the names of this project's own, of which ``rollout`` is a plain word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

import slime_spec
from slime_spec.errors import ConfigError

MARK = 'PART_OF = "slime_spec"'  # a line of each package's __init__.py


def check_namesakes() -> None:
    """Raise ConfigError where this process or one of Ray's would import another package under a name of this project.

    Nothing is imported, so that a stranger's code does not run. A folder without ``__init__.py`` does no harm: it comes
    after every package, wherever it is on the path.
    """
    root = Path(slime_spec.__file__).resolve().parents[1]
    for name in ("slime_spec", "rollout", "trainer_bridge"):
        own = root / name / "__init__.py"
        for spec in _specs(name):
            found = own if spec is None or spec.origin is None else Path(spec.origin).resolve()
            if found != own:
                raise ConfigError(
                    f"package {name}",
                    f"must be slime_spec's own, {own.parent}; another of that name comes before it on Python's path, "
                    "or on that of Ray's processes, which begins with the current folder",
                    str(found.parent if found.name == own.name else found),
                    "Rename the other, start from another folder, or take its folder off PYTHONPATH. Packages that are "
                    "installed need environments of their own.",
                )
        if not own.is_file() or MARK not in own.read_text(encoding="utf-8", errors="replace").splitlines():
            raise _overwritten(name, own)


def _specs(name: str) -> Iterator[ModuleSpec | None]:
    """Yield what this process finds under a name, and what Ray's processes find first, in the current folder."""
    yield find_spec(name)
    yield PathFinder.find_spec(name, [os.getcwd()])


def _overwritten(name: str, own: Path) -> ConfigError:
    from importlib.metadata import packages_distributions  # it reads every installed package's list of files

    others = sorted({each for each in packages_distributions().get(name, ()) if each != "slime_spec"})
    uninstall = f"pip uninstall {' '.join(others)}, and " if others else ""
    return ConfigError(
        f"package {name}",
        f"must be slime_spec's own; {own} is missing or is another's, installed over it",
        ", ".join(others) or "of an unknown package",
        f"{uninstall}pip install --force-reinstall --no-deps slime_spec. Both need environments of their own.",
    )
