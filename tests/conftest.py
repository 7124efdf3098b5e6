"""For every test: the proofs of minutes run last, so that a failure elsewhere is seen first."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is not None)
