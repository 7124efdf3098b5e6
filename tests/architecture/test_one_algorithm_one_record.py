"""An algorithm is one record: nothing but slime_spec/algorithms.py names it in code, and one drafter runs it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from slime_spec.algorithms import ALGORITHMS, Algorithm
from tests.architecture.test_one_family_one_file import PRODUCT, files_that_name, strings_of_code

HOME = "slime_spec/algorithms.py"


def words_of_code(source: str) -> set[str]:
    """Words with their hyphens: EAGLE-3 is a paper's name."""
    return {word for text in strings_of_code(source) for word in re.findall(r"[\w-]+", text)}


@cache
def words_of_product() -> Mapping[str, set[str]]:
    return {name: words_of_code(path.read_text()) for name, path in PRODUCT.items()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_named_in_its_record_alone(name: str) -> None:
    assert files_that_name((name,), words_of_product()) == {HOME}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_an_algorithm_of_the_embedded_engine_names_a_drafter_that_exists(algorithm: Algorithm) -> None:
    if algorithm.drafter is None:
        return
    module, _, attribute = algorithm.drafter.partition(":")
    drafter = getattr(importlib.import_module(module), attribute)
    assert Path(str(importlib.import_module(module).__file__)).parent.name == "drafters"
    assert isinstance(drafter, type)


def test_a_file_that_compares_names_is_found() -> None:
    words = {
        **words_of_product(),
        "rollout/stray.py": words_of_code('def f(name):\n    return name in ("EAGLE3", "NEXTN")'),
    }
    assert files_that_name(("EAGLE3",), words) == {HOME, "rollout/stray.py"}
