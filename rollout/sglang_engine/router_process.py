"""RouterProcess runs the sglang-router of a run, which ends with the engine pool."""

from __future__ import annotations

import logging
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from rollout.sglang_engine.launcher import listening_host
from rollout.sglang_engine.server import ServerProcess, ServerStartError, with_key
from slime_spec.config.addresses import ANY_HOST, address_of
from slime_spec.config.api_key import api_key_of
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import free_port
from slime_spec.sglang.interpreter import InstalledSglang, installed_in
from slime_spec.site import Site

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
HEALTH_TIMEOUT_S = 5.0
# As long as the longest response: the router's default would end a response after half an hour.
REQUEST_TIMEOUT_S = 7 * 24 * 3600
# The engines send a failed request again, with the tokens it has, and know whether a server serves: the router must not
# take a server that is paused or has released its memory for dead.
FLAGS = ("--disable-retries", "--disable-circuit-breaker", "--disable-health-check")


class RouterProcess:
    """Implements SharedPart with a router of the run's own; it starts without servers, and engines enter theirs.

    It listens on ``host``; where that is every address, engines reach it at ``node_address``.

    Example::

        router = RouterProcess(config, installed_in(python), "127.0.0.1", "127.0.0.1")
        router.start()
        ...  # start the engines with router.engine_config
        router.wait_until_ready()
        router.stop()
    """

    def __init__(self, config: Config, sglang: InstalledSglang, host: str, node_address: str) -> None:
        self._config = config
        python = config.sglang_server.python or sys.executable
        if sglang.router_version is None:
            raise ConfigError(
                "sglang_server.router",
                "needs sglang-router in the environment that has sglang",
                python,
                f"Run {python} -m pip install sglang-router, or drop --sglang-router.",
            )
        port = free_port(host)
        self.address = address_of(node_address if host in ANY_HOST else host, port)
        self._url = f"http://{self.address}"
        run = config.run
        log = Path(run.output_dir or f"runs/{run.name}").absolute() / "engines" / "router.log"
        command, environment = with_key(
            router_command(config, python, host, port, free_port(host)), {}, api_key_of(config)
        )
        self._process = ServerProcess(command, environment, log)

    @property
    def engine_config(self) -> Config:
        return behind_router(self._config, self.address)

    def start(self) -> None:
        self._process.start()

    def wait_until_ready(self) -> None:
        """Wait for the router; raises ConfigError with the end of its log when it does not start."""
        try:
            self._process.wait_until(self._is_healthy, START_TIMEOUT_S)
        except ServerStartError as error:
            raise ConfigError(
                "sglang_server.router", f"its router must start. {error}", True, "Correct --sglang-router-args."
            ) from None
        logger.info("router ready address=%s", self.address)

    def stop(self) -> None:
        self._process.stop()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/liveness", timeout=HEALTH_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def own_router(config: Config, site: Site) -> RouterProcess | None:
    """Make the router of a run that wants its own router (see EngineKind.shared_part)."""
    if not config.sglang_server.router:
        return None
    host = listening_host(config, site.address, site.num_cluster_nodes > 1)
    return RouterProcess(config, installed_in(config.sglang_server.python or sys.executable), host, site.address)


def behind_router(config: Config, address: str) -> Config:
    """Return the configuration of engines whose router runs at ``address``."""
    server = replace(config.sglang_server, router=False, router_args=(), router_addr=address)
    return replace(config, sglang_server=server)


def router_command(config: Config, python: str, host: str, port: int, metrics_port: int) -> list[str]:
    words = [python, "-m", "sglang_router.launch_router", "--host", host, "--port", str(port)]
    # The router's default is every address of the machine.
    words += ["--prometheus-host", host, "--prometheus-port", str(metrics_port)]
    words += [*FLAGS, "--request-timeout-secs", str(REQUEST_TIMEOUT_S), "--shutdown-grace-period-secs", "1"]
    words += ["--log-level", "warn"]
    return [*words, *config.sglang_server.router_args]
