"""Routing replay is refused where it cannot be right: for models without experts, and where servers mix rows up.

SGLang keeps a token's experts by its place in the KV cache, as forward passes write them. What is refused here returns
other tokens' experts, or zeros, without a word, or ends the server: read in 0.5.21.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slime_spec.algorithms import NONE, STANDALONE, listed, names
from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.sglang_server import size_of
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.sglang.draft_shape import draft_shape
from slime_spec.types import TrainSample

SETTING = "rollout.routing_replay"
DROP = "Drop --use-rollout-routing-replay"
FLAG = "enable_return_routed_experts"  # of a server


def replayed_experts(config: Config, spec: ModelSpec) -> Experts | None:
    """Return the experts whose choices are replayed, None without routing replay; raises ConfigError without any."""
    if not config.rollout.routing_replay:
        return None
    experts = spec.experts
    if experts is None or not experts.layers(spec.num_layers):
        raise ConfigError(SETTING, f"replays the choice of experts, and {spec.architecture} has none", True, f"{DROP}.")
    return experts


def check_routed(samples: Sequence[TrainSample], experts: Experts, num_layers: int) -> None:
    """Raise ConfigError for a sample without experts to replay, or with those of another model."""
    of_model = len(experts.layers(num_layers)), experts.num_per_token
    for sample in samples:
        routed = sample.routed_experts
        shape = None if routed is None else (routed.num_layers, routed.num_per_token)
        known = routed is not None and shape == of_model and routed.ids.max(initial=0) < experts.num_experts
        if not known:
            raise ConfigError(
                "train sample",
                f"must have the experts that its engine chose, {of_model[1]} of {experts.num_experts} in each of "
                f"{of_model[0]} layers",
                shape,
                f"Generate it with --use-rollout-routing-replay, or {DROP[0].lower()}{DROP[1:]}.",
            )


def check_routing_replay(config: Config, spec: ModelSpec) -> None:
    """Raise ConfigError for a model, or for servers, whose choices cannot be replayed."""
    if replayed_experts(config, spec) is None or config.run.mode == "train_only":
        return
    kind = kind_of(config)
    if kind.has_servers and not config.rollout.num_gpus_per_engine and not kind.uses_external_servers(config):
        raise _refusal(
            "SGLang registers the memory of returned experts with CUDA: without a GPU a server ends at its start",
            "Pass --rollout-engine embedded",
        )
    if kind.has_servers:
        check_servers_return_experts(config, spec)


def check_servers_return_experts(config: Config, spec: ModelSpec) -> None:
    """Raise ConfigError where the servers of this configuration would return other experts than they choose."""
    if config.rollout.routing_replay:
        for rule, remedy in _against_servers(config, spec):
            raise _refusal(rule, remedy)


def _refusal(rule: str, remedy: str) -> ConfigError:
    return ConfigError(SETTING, rule, True, f"{remedy}, or {DROP[0].lower()}{DROP[1:]}.")


def _against_servers(config: Config, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yield why the servers would return wrong experts, or none, and what to do."""
    flags, record = config.sglang, config.speculative.record
    if flags.get(FLAG) is False:
        yield "needs servers that return the experts they choose", "Drop --no-sglang-enable-return-routed-experts"
    shape = draft_shape(config.speculative, spec.architecture)
    if record.speculates and not (record.runs_as_eagle or record is STANDALONE):
        chains = listed(names(lambda each: each.runs_as_eagle or each in (NONE, STANDALONE)))
        rule = f"SGLang's {record.name} worker does not keep the experts of the tokens that it accepts"
        yield rule, f"Pass --speculative-algorithm {chains}"
    elif record.speculates and shape.topk > 1:
        yield (
            "SGLang moves an accepted path's keys and values to their places and not its experts, so drafts must be "
            f"chains, and eagle_topk is {shape.topk}",
            "Pass --speculative-num-steps 3 --speculative-eagle-topk 1",
        )
    if size_of(flags, "pp_size") > 1:
        yield "a server of several pipeline stages returns the last one's layers alone", "Drop --sglang-pp-size"
    if flags.get("enable_hierarchical_cache"):
        yield (
            "a prefix that comes back from the hierarchical cache has lost its experts",
            "Drop --sglang-enable-hierarchical-cache",
        )
    yield from _against_buffers(config, shape.num_draft_tokens if record.speculates else 1)


def _against_buffers(config: Config, tokens_per_round: int) -> Iterator[tuple[str, str]]:
    """Yield where a pass has more tokens than the servers' buffer of experts, which ends the server.

    It has room for a chunk of prefill or for max_running_requests tokens. Unset, a chunk has 2048 tokens at least.
    """
    chunk = config.sglang.get("chunked_prefill_size")
    size = chunk if isinstance(chunk, int) else 2048
    running = config.engine.max_running_requests * tokens_per_round
    if size < 1:
        yield "the servers' buffer of experts has room for one chunk of prefill", "Drop --sglang-chunked-prefill-size"
    elif running > max(size, config.engine.max_running_requests):
        yield (
            f"the servers' buffer of experts has room for a chunk of prefill ({size} tokens), and "
            f"--sglang-max-running-requests {config.engine.max_running_requests} verify {running} tokens at once",
            f"Pass --sglang-chunked-prefill-size {running}",
        )
