"""Launcher makes an engine's server: its address, its command line, its process on each of the engine's nodes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rollout.sglang_engine.nodes import Part, SpannedServer
from rollout.sglang_engine.server import SERVER_ENVIRONMENT, ServerProcess, with_key
from slime_spec.config.addresses import ANY_HOST, address_of, is_loopback
from slime_spec.config.api_key import api_key_of
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import check_port, free_port
from slime_spec.sglang.arguments import LOOPBACK, Place, command_line, server_flags
from slime_spec.sglang.interpreter import InstalledSglang
from slime_spec.sglang.labels import label_suffix
from slime_spec.site import Site

logger = logging.getLogger(__name__)

# For an engine of several nodes SGLang takes several ports, beginning with the rendezvous's port.
NUM_RENDEZVOUS_PORTS = 16


def listening_host(config: Config, node_address: str, others_come: bool) -> str:
    """Return the address that a server or a router listens on: its node's where other nodes call it."""
    return config.sglang_server.host or (node_address if others_come else LOOPBACK)


class Launcher:
    """Makes the servers of one engine, each in place of the server before.

    Raises ConfigError at once for a port that is taken and a flag that this SGLang does not know.
    """

    def __init__(self, config: Config, engine_index: int, sglang: InstalledSglang, site: Site) -> None:
        self._config, self._index, self._sglang, self._site = config, engine_index, sglang, site
        is_routed = bool(label_suffix(config, engine_index))
        self._others_come = site.num_cluster_nodes > 1 and (is_routed or bool(site.others))
        self.host = listening_host(config, site.address, self._others_come)
        self.num_nodes = 1 + len(site.others)
        if is_routed and sglang.flag("weight_version") is None:
            raise ConfigError(
                "sglang_server.router",
                f"needs a server that names its weights' version, and SGLang {sglang.version} does not",
                sglang.version,
                "Drop --sglang-router, or use a newer SGLang.",
            )
        self.place = self._choose_place()
        self._commands([self.place] * self.num_nodes, speculate=True)  # for its errors, before anything starts
        is_open = config.sglang_server.host is None and not is_loopback(self.host) and engine_index == 0
        self._key = api_key_of(config)
        if is_open and self._key is None:
            logger.warning("servers listen without --sglang-api-key-file on their nodes' addresses first=%s", self.host)

    @property
    def url(self) -> str:
        """Return the URL at which the engine's node reaches its server."""
        return self.place.url

    @property
    def reachable_host(self) -> str:
        """Return the address of the engine's first node for the whole cluster."""
        return self._site.address if self.host in ANY_HOST else self.host

    @property
    def reachable_url(self) -> str:
        return f"http://{address_of(self.reachable_host, self.place.port)}"

    def server(self, speculate: bool) -> ServerProcess:
        """Make a new server, not yet started."""
        places = self._places()
        own, *others = self._commands(places, speculate)
        own, environment = with_key(own, dict(SERVER_ENVIRONMENT), self._key)  # of the node that answers requests
        if self._site.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._site.devices)
        if not others:
            return ServerProcess(own, environment, self._log(0))
        parts = [
            Part(node, command, self._log(rank))
            for rank, (node, command) in enumerate(zip(self._site.others, others, strict=True), start=1)
        ]
        return SpannedServer(own, environment, self._log(0), parts)

    def _choose_place(self) -> Place:
        port = self._config.sglang_server.port
        if port == 0:
            return Place(self.host, free_port(self.host))
        check_port(self.host, port + self._index)
        return Place(self.host, port + self._index)

    def _places(self) -> list[Place]:
        """Return each node's Place; every start has a new rendezvous, because the old port may still be taken."""
        if not self._site.others:
            return [self.place]
        host = self.reachable_host
        rendezvous = address_of(host, free_port(host, NUM_RENDEZVOUS_PORTS))
        places = [Place(self.host, self.place.port, self.num_nodes, 0, rendezvous)]
        for rank, node in enumerate(self._site.others, start=1):
            node_host = listening_host(self._config, node.address(), self._others_come)
            places.append(Place(node_host, node.free_port(node_host), self.num_nodes, rank, rendezvous))
        return places

    def _commands(self, places: list[Place], speculate: bool) -> list[list[str]]:
        settings = self._config.sglang_server
        python = settings.python or sys.executable
        return [
            command_line(
                python, server_flags(self._config, self._index, place, speculate), settings.extra_args, self._sglang
            )
            for place in places
        ]

    def _log(self, node_rank: int) -> Path:
        run = self._config.run
        folder = Path(run.output_dir or f"runs/{run.name}").absolute()
        of_node = f"-node{node_rank}" if node_rank else ""
        return folder / "engines" / f"sglang-{self._index}{of_node}.log"
