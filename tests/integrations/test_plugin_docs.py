"""The YAML files of the page about frameworks are what the hooks read, and the functions that they name are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from slime_spec.config.yaml_file import read_yaml
from slime_spec.integrations.settings import BLOCK, known, read_block
from slime_spec.launch.serve import read_serve_arguments
from tests.support.tiny_policy import make_tiny_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "plug-in-frameworks.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", FILES)
def test_a_file_names_functions_and_settings_that_there_are(text: str, tmp_path: Path) -> None:
    data: dict[Any, Any] = read_yaml(text, "the page")
    settings = read_block(data.pop(BLOCK))
    assert data
    for path in data.values():
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    if settings.engine:
        policy = make_tiny_policy(tmp_path / "policy")
        made = read_serve_arguments(["--hf-checkpoint", str(policy), *settings.engine])
        assert made.config.speculative.algorithm == "LOOKUP"


def test_the_table_has_every_setting() -> None:
    section = PAGE.partition("## Settings of the block")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(path.removeprefix(f"{BLOCK}.") for path in known())
