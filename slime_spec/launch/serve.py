"""``slime-spec serve`` runs one embedded engine on a port; it takes the flags of train that concern engines."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime_spec.config.addresses import is_loopback
from slime_spec.config.api_key import FROM_ENVIRONMENT, HIDDEN, read_key
from slime_spec.config.texts import whole_number
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import composed

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "SLIME_SPEC_API_KEY"
API_KEY_REMEDY = f"Put the key into {API_KEY_VARIABLE}, or into a file of mode 0600 and pass --api-key-file FILE."
NODES = ("model", "engine", "speculative", "sglang")
SETTINGS = ("run.seed", "rollout.num_gpus_per_engine", "rollout.num_cpus_per_engine")
# A server takes requests up to its context: a run's own lengths neither bound it nor are checked against the context.
BASE = ("--debug-rollout-only", "rollout.max_prompt_len=1", "rollout.max_response_len=1")
DESCRIPTION = "Serve a checkpoint with the embedded engine over SGLang's and OpenAI's HTTP APIs (docs/http.md)."
EPILOG = """\
Every other flag is one of `slime-spec train` that concerns the model, the engine or speculation:
  slime-spec serve --hf-checkpoint DIR --sp-type deterministic --sglang-dtype bfloat16 --sglang-context-length 2048
"""


@dataclass(frozen=True)
class ServeArguments:
    """Holds the settings of a serve command line; ``notes`` name the settings without effect."""

    config: Config
    host: str
    port: int
    api_key: str | None
    max_request_mb: int
    incremental_streaming: bool
    max_queued_requests: int | None
    client_timeout_s: int
    access_log: bool = True
    served_model_name: str | None = None
    notes: tuple[str, ...] = ()


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slime-spec serve",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", default="30000", help="port; 0 takes a free one (default: 30000)")
    parser.add_argument("--api-key", help=argparse.SUPPRESS)  # SGLang's: refused, for every local user would read it
    parser.add_argument(
        "--api-key-file",
        help=f"refuse requests without the Bearer key in this file of mode 0600 (default: ${API_KEY_VARIABLE}, if set)",
    )
    parser.add_argument("--max-request-mb", default="256", help="largest request body in MB (default: 256)")
    parser.add_argument(
        "--max-queued-requests",
        help="samples that may run or wait; further calls get 503 (default: 64 for each that is decoded at once)",
    )
    parser.add_argument(
        "--client-timeout-s", default="60", help="longest wait for a client to send or to read (default: 60)"
    )
    parser.add_argument("--served-model-name", help="the model's name to clients (default: the checkpoint's folder)")
    parser.add_argument("--no-access-log", action="store_true", help="log no line for each request")
    parser.add_argument(
        "--incremental-streaming-output", action="store_true", help="stream only what is new in each chunk"
    )
    return parser


def read_serve_arguments(argv: Sequence[str]) -> ServeArguments:
    """Read the command line; raises ConfigError for a bad value and for a flag without a use in a server."""
    own, rest = serve_parser().parse_known_args(list(argv))
    for path, value in read_arguments(rest).settings.items():
        if path.partition(".")[0] not in NODES and path not in SETTINGS:
            raise ConfigError(path, "belongs to a training run, and serve only generates", value, "Leave it out.")
    made = composed([*BASE, *rest])
    queued = own.max_queued_requests
    return ServeArguments(
        config=made.config,
        host=own.host,
        port=_whole("--port", own.port, 0, 65535),
        api_key=_api_key(own.api_key, own.api_key_file),
        max_request_mb=_whole("--max-request-mb", own.max_request_mb, 1, 1 << 20),
        incremental_streaming=own.incremental_streaming_output,
        max_queued_requests=None if queued is None else _whole("--max-queued-requests", queued, 1, 1 << 20),
        client_timeout_s=_whole("--client-timeout-s", own.client_timeout_s, 1, 1 << 20),
        access_log=not own.no_access_log,
        served_model_name=own.served_model_name,
        notes=made.notes,
    )


def run_serve(arguments: ServeArguments, announce: Callable[[str], None]) -> int:
    """Serve until a signal ends the process; ``announce`` gets one line when requests are answered."""
    import torch

    from rollout.embedded.http.server import EngineServer, ServerOptions

    config = arguments.config
    torch.set_num_threads(config.rollout.num_cpus_per_engine)
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key,
        max_request_mb=arguments.max_request_mb,
        incremental_streaming=arguments.incremental_streaming,
        max_queued_requests=arguments.max_queued_requests,
        client_timeout_s=arguments.client_timeout_s,
        access_log=arguments.access_log,
        served_model_name=arguments.served_model_name,
    )
    server = EngineServer(config, options)
    what = f"model={config.model.hf_checkpoint} speculation={config.speculative.algorithm}"
    logger.info("loading address=%s %s dtype=%s", server.address, what, config.engine.dtype)
    server.run(lambda address: announce(f"serving {address} {what}{_exposure(arguments)}"))
    return 0


def _api_key(literal: str | None, file: str | None) -> str | None:
    """Read the key from the file, or from the environment where it has one."""
    if literal is not None:
        rule = "must not be on a command line: others can read it there"
        raise ConfigError("--api-key", rule, HIDDEN, API_KEY_REMEDY)
    source = file
    if source is None and os.environ.get(API_KEY_VARIABLE):
        source = f"{FROM_ENVIRONMENT}{API_KEY_VARIABLE}"
    return None if source is None else read_key("--api-key-file", source, API_KEY_REMEDY)


def _whole(flag: str, text: str, minimum: int, maximum: int) -> int:
    try:
        value = whole_number(text)
    except ValueError:
        value = minimum - 1
    if not minimum <= value <= maximum:
        rule = f"must be a whole number from {minimum} to {maximum}"
        raise ConfigError(flag, rule, text, "Correct it or leave it out.")
    return value


def _exposure(arguments: ServeArguments) -> str:
    """Return a warning if anyone on the network can change the weights."""
    is_protected = is_loopback(arguments.host) or arguments.api_key
    return "" if is_protected else " (open to the network: pass --api-key-file to protect it)"
