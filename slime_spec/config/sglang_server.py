"""These settings are about the SGLang engine's servers; the servers' own flags are not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime_spec.config.setting import INT32, MAX_WAIT_S, SAMPLES, setting


@dataclass(frozen=True)
class SglangServerConfig:
    """These settings are about the SGLang engine's servers; every flag of the servers is --sglang-<flag>."""

    python: str | None = setting(
        None, "Python of the environment that has sglang; default: this one.", flags=("--sglang-python",)
    )
    host: str | None = setting(
        None,
        "Address that servers listen on; default: loopback, each node's own where other nodes must reach them.",
        flags=("--sglang-host",),
    )
    port: int = setting(
        0,
        "Port of the first engine's server, the next has the next; 0: free ones.",
        flags=("--sglang-port",),
        minimum=0,
        maximum=65535,
    )
    start_timeout_s: float = setting(
        900.0,
        "Longest wait for a server to become healthy.",
        flags=("--sglang-start-timeout",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    stall_timeout_s: float = setting(
        30.0,
        "A server that streams nothing for this long is asked whether it lives; without an answer in the same time it "
        "hangs, and is replaced. Until its first token the limit is the start's, because kernels are compiled then.",
        flags=("--sglang-stall-timeout",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    call_timeout_s: float = setting(
        600.0,
        "Longest wait for the answer to one call of a push, a pause or an offload; then the server is taken for dead.",
        flags=("--sglang-call-timeout",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    external_addrs: tuple[str, ...] = setting(
        (),
        "Servers (host:port) that someone else started, one an engine; they are used, never restarted.",
        flags=("--rollout-external-engine-addrs",),
    )
    api_key_file: str | None = setting(
        None,
        "File of mode 0600 with the servers' API key, or env:NAME of a variable; default: "
        "env:SLIME_SPEC_SGLANG_API_KEY where that is set.",
        flags=("--sglang-api-key-file",),
    )
    router: bool = setting(
        False,
        "Put an sglang-router (of the Python that has sglang) in front of the servers.",
        flags=("--sglang-router",),
    )
    router_addr: str | None = setting(
        None,
        "An sglang-router (host:port) that someone else started, with --disable-retries.",
        flags=("--sglang-router-addr",),
    )
    router_args: tuple[str, ...] = setting(
        (), "Words added to the router's command line, as --policy=round_robin.", flags=("--sglang-router-args",)
    )
    overrides: str | None = setting(
        None,
        "YAML file of flags for single engines: {0: {mem_fraction_static: 0.7}}.",
        flags=("--sglang-config",),
    )
    extra_args: tuple[str, ...] = setting(
        (), "Words added to the servers' command line as they are.", flags=("--sglang-extra-args",)
    )
    transport: str = setting(
        "tensor",
        "How an engine sends its server weights, where a push does not go straight there (--push-transport) and where "
        "a server replaces another: tensor (shared memory, CUDA IPC), distributed (gloo, nccl) or disk.",
        flags=("--sglang-weight-transport",),
        choices=("tensor", "distributed", "disk"),
    )
    canary_prompts: int = setting(
        4,
        "Prompts generated greedily after each push to see that drafts are still accepted; 0: none.",
        minimum=0,
        maximum=SAMPLES,
    )
    canary_tokens: int = setting(32, "Tokens of a canary's response.", minimum=1, maximum=SAMPLES)
    canary_drop: float = setting(
        0.5,
        "Accepted drafts per round below this share of their running mean: the draft is lost.",
        above=0.0,
        maximum=1.0,
    )
    max_restarts: int = setting(3, "Restarts of one engine's server before the run ends.", minimum=0, maximum=INT32)


def size_of(flags: Mapping[str, object], dest: str) -> int:
    """Return a size of SGLang's servers (``dp_size``): 1, SGLang's default, where the flag is not given or null."""
    value = flags.get(dest)
    assert value is None or isinstance(value, int), "typed by the table of flags"
    return 1 if value is None else value
