"""The Dockerfile copies what .dockerignore lets through, which is what the build needs, and names no releases."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied() -> set[str]:
    """The sources of every COPY from the build's context."""
    lines = re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE)
    return {word for line in lines for word in line.split()[:-1]}


def test_what_is_copied_exists_and_is_all_that_the_build_is_sent() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert copied() == {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert {name for name in copied() if not (ROOT / name).exists()} == set()


def test_the_build_is_sent_all_packages_and_what_setup_reads() -> None:
    packaging = (ROOT / "setup.py").read_text()
    included = re.search(r"INCLUDE = \[(.*)\]", packaging)
    assert included is not None
    packages = {word.strip('" *') for word in included[1].split(",")}
    assert packages | {"conf", "setup.py", "pyproject.toml"} <= copied()
    assert {name for name in re.findall(r'ROOT / "([^"]+)"', packaging) if name not in copied()} == set()


def test_no_release_is_written_in_the_dockerfile() -> None:
    """Torch's comes from constraints.txt, SGLang's from whoever builds; Python is one that the package names."""
    instructions = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    assert re.findall(r"[\w.-]+==\d", instructions) == []
    (python,) = re.findall(r"(?m)^ARG PYTHON=(\S+)$", DOCKERFILE)
    assert f"Programming Language :: Python :: {python}" in (ROOT / "setup.py").read_text()
    images = re.findall(r"(?m)^FROM (\S+)", DOCKERFILE)
    assert all(fnmatch(image, "python:${PYTHON}-*") for image in images)
    (sglang,) = re.findall(r"--build-arg SGLANG=(\S+)", DOCKERFILE)
    assert f'"sglang=={sglang}"' in (ROOT / "setup.py").read_text()
