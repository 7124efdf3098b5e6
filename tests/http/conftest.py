"""One tiny policy and one server of it for most tests; tests that change weights or pause it serve their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slime_spec.config.tree import Config
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens are bytes; the context is long enough for a generation that outlives a test's other requests."""
    return make_tiny_policy(tmp_path_factory.mktemp("http") / "policy", max_position_embeddings=40_000)


@pytest.fixture(scope="session")
def config(policy: Path) -> Config:
    return engine_config(policy, "LOOKUP")


@pytest.fixture(scope="session")
def server(config: Config) -> Iterator[Served]:
    with served(config) as running:
        yield running


@pytest.fixture
def own_server(config: Config) -> Iterator[Served]:
    """A server of the test's own, whose state it may change."""
    with served(config) as running:
        yield running
