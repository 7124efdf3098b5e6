"""These functions make the parts of an engine from its configuration and from what its server reports."""

from __future__ import annotations

import logging

import torch

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.contract import detect
from rollout.sglang_engine.delivery import Delivery
from rollout.sglang_engine.direct import Direct
from rollout.sglang_engine.draft_watch import DraftWatch
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.reply_corpus import ReplyCorpus
from rollout.sglang_engine.reply_texts import MAX_CORPUS_TOKENS, ReplyTexts
from rollout.sglang_engine.returned_experts import ReturnedExperts
from rollout.sglang_engine.transports.bucket import ServerTransport
from slime_spec.checkpoints.model_files import DraftFiles, TargetFiles
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.speculation import feeds_corpus
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.interfaces import WeightTransport
from slime_spec.preflight.routing import check_servers_return_experts, replayed_experts
from slime_spec.sglang.labels import label_suffix
from slime_spec.transports.server_ipc import ServerIpcTransport
from slime_spec.transports.to_servers import ToServers
from slime_spec.transports.torch_handles import check_torch

logger = logging.getLogger(__name__)

# SGLang keeps some positions of the context for drafts.
CANARY_MARGIN = 64


def make_watch(config: Config, target: TargetFiles, draft: DraftFiles | None) -> DraftWatch:
    settings = config.sglang_server
    longest = (config.engine.context_length or target.context_length) - settings.canary_tokens - CANARY_MARGIN
    canary = Canary(settings.canary_prompts, settings.canary_tokens, settings.canary_drop, longest)
    return DraftWatch(canary, has_weights=draft is not None)


def make_experts_reader(config: Config) -> ReturnedExperts | None:
    """Make what reads the experts that servers return, None for a run that does not replay them.

    Raises ConfigError where this engine's server would return others.
    """
    if not config.rollout.routing_replay:
        return None
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    check_servers_return_experts(config, spec)
    experts = replayed_experts(config, spec)
    return None if experts is None else ReturnedExperts(experts, spec.num_layers)


def make_corpus(config: Config, server: KeptServer) -> ReplyCorpus | None:
    """Make what feeds a server with replies, None for a run that feeds none; raises CheckpointError."""
    if not feeds_corpus(config):
        return None
    tokenizer = Tokenizer.load(config.model.hf_checkpoint)
    # A server counts the corpus that it is given beside the one that is taken away next.
    max_tokens = min(MAX_CORPUS_TOKENS, config.speculative.ngram_external_corpus_max_tokens // 2)
    return ReplyCorpus(server, ReplyTexts(max_tokens), lambda ids: tokenizer.decode(ids, skip_special=False))


def make_delivery(config: Config, engine_index: int, draft: DraftFiles | None, server: KeptServer) -> Delivery:
    """Make the delivery to a started server, which is asked for its contract."""
    contract = server.loop.call(detect(server.client))
    logger.info("server ready version=%s contract=%s", server.info.version, contract)
    transport = config.sglang_server.transport
    return Delivery(
        server.client,
        contract,
        _transport(transport, config, engine_index, server),
        transport,
        draft is not None and not draft.in_target,
        config.push.bucket_bytes,
        label_suffix(config, engine_index),
    )


def make_direct(transport: WeightTransport, engine_index: int, delivery: Delivery, server: KeptServer) -> Direct | None:
    """Return how pushes go straight to a started server; None where the engine receives them. Raises ConfigError."""
    if not isinstance(transport, ToServers):
        return None
    info, planned = server.info, transport.ranks_per_server
    if info.num_ranks != planned:
        raise ConfigError(
            "push.transport",
            f"straight to servers needs servers of {planned} ranks, and {server.client.url} has {info.num_ranks}",
            info.num_ranks,
            "Pass --push-transport object_store.",
        )
    if isinstance(transport, ServerIpcTransport):
        check_torch(server.sglang.torch_version, "push.transport", "ipc", "--push-transport object_store")
    return Direct(transport, engine_index, delivery, server)


def _transport(name: str, config: Config, engine_index: int, server: KeptServer) -> ServerTransport:
    num_ranks, on_gpu = server.info.num_ranks, config.rollout.num_gpus_per_engine > 0
    if name == "disk":
        from rollout.sglang_engine.transports.disk import DiskTransport

        return DiskTransport(config.model.hf_checkpoint)
    if name == "distributed":
        from rollout.sglang_engine.transports.distributed import DistributedTransport

        return DistributedTransport(server.own_host, num_ranks, on_gpu, f"push-{engine_index}")
    from rollout.sglang_engine.transports.tensor import TensorTransport

    check_torch(server.sglang.torch_version)
    return TensorTransport(num_ranks, on_gpu and torch.cuda.is_available())
