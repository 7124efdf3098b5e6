"""docs/http.md: its examples run as they stand, its command is one, its table lists every endpoint."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.embedded.http.generations import Generations
from rollout.embedded.http.server import EngineServer, ServerOptions, make_app
from rollout.embedded.http.serving import OneThread
from slime_spec.config.tree import Config
from slime_spec.launch.serve import read_serve_arguments
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_policy import make_tiny_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def example_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return engine_config(make_tiny_policy(tmp_path_factory.mktemp("docs") / "policy"), "LOOKUP")


@pytest.fixture(scope="module")
def example_server(example_config: Config) -> Iterator[Served]:
    with served(example_config) as running:
        yield running


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(example_server: Served, example: str) -> None:
    assert "http://127.0.0.1:30000" in example
    exec(compile(example.replace("http://127.0.0.1:30000", example_server.url), "docs/http.md", "exec"), {})


def test_the_command_is_understood() -> None:
    (command,) = re.findall(r"```bash\nslime-spec serve (.*?)\n```", PAGE, re.DOTALL)
    arguments = read_serve_arguments(shlex.split(command))
    assert (arguments.port, arguments.config.speculative.algorithm) == (30000, "LOOKUP")


def test_the_table_lists_every_endpoint_and_method(example_config: Config) -> None:
    server = EngineServer(example_config, ServerOptions(port=0))
    server._socket.close()
    app, _ = make_app(
        server._serving(Generations(server._engine, 99), OneThread("control"), OneThread("reading")),
        ServerOptions(),
    )
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    listed = set()
    for paths, methods in re.findall(r"^\| (`/[^|]*) \| ([A-Z, ]+) \|", PAGE, re.MULTILINE):
        for path in re.findall(r"`(/\w+)`", paths):
            listed |= {(method.strip(), path) for method in methods.split(",")}
    assert listed == {(method, path) for method, path in routes if method != "HEAD"}
