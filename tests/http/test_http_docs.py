"""docs/http.md: its examples run as they stand, its command is one, its table lists every endpoint."""

import inspect
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.embedded.http.generations import Generations
from rollout.embedded.http.server import EngineServer, ServerOptions, make_app
from rollout.embedded.http.serving import OneThread
from slime_spec.config.tree import Config
from slime_spec.launch.serve import read_serve_arguments
from tests.support.embedded_harness import engine_config
from tests.support.http_server import TIMEOUT_S, Served, served
from tests.support.tiny_policy import make_tiny_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
CURLS = re.findall(r"```bash\n(curl .*?)\n```", PAGE, re.DOTALL)
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


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_a_curl_command_is_answered(example_server: Served, command: str) -> None:
    local = command.replace("http://127.0.0.1:30000", example_server.url)
    done = subprocess.run(["bash", "-c", local], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    if "/v1/" in command:
        assert [choice["index"] for choice in json.loads(done.stdout)["choices"]] == [0, 1, 2, 3]
    else:
        assert "sglang:num_running_reqs{" in done.stdout


def test_the_command_of_lm_eval_names_a_model_and_arguments_that_lm_eval_has() -> None:
    registry = pytest.importorskip("lm_eval.api.registry", reason="needs the package lm_eval, which the extra dev has")
    (command,) = re.findall(r"```bash\n(lm_eval .*?)\n```", PAGE, re.DOTALL)
    words = shlex.split(command)
    model = registry.get_model(words[words.index("--model") + 1])
    names = {argument.partition("=")[0] for argument in words[-1].split(",")}
    known = {name for each in model.__mro__[:-1] for name in inspect.signature(each.__init__).parameters}
    assert names <= known


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
        for path in re.findall(r"`(/[^`]+)`", paths):
            listed |= {(method.strip(), path) for method in methods.split(",")}
    assert listed == {(method, path) for method, path in routes if method != "HEAD"}
