"""An assembly builds a ready GenerationCore from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from rollout.embedded.core import CoreSettings, GenerationCore
from rollout.embedded.cuda.graphs import CudaCapturer, Graphs
from rollout.embedded.drafters import make_drafter
from rollout.embedded.drafting import Drafter
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.linear import best_packing
from rollout.embedded.rope import RopeTable
from rollout.embedded.stop import StopRule
from rollout.embedded.validate import limits_of
from rollout.embedded.verification import make_verifier
from rollout.embedded.verification.ranking import RankingVerifier
from rollout.embedded.verification.verifier import Verifier
from rollout.embedded.weights import DecoderBuilder
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.preflight.routing import replayed_experts
from slime_spec.sglang.draft_shape import embedded_shape
from slime_spec.speculation.draft_temperature import draft_temperatures


def make_graphs(config: Config, spec: ModelSpec, device: torch.device) -> Graphs | None:
    """Return what passes are captured with; None on a CPU, and where they run operator by operator, as mixed blocks."""
    captures = config.engine.cuda_graphs and spec.has_plain_blocks
    return Graphs(CudaCapturer()) if device.type == "cuda" and captures else None


def share_target(core: GenerationCore, first: GenerationCore) -> None:
    """Let a core compute with the copy of the target's weights that ``first`` has, where both are on a CPU.

    A virtual machine's memory is not equally fast everywhere: cores that did the same work with a copy each differed by
    17 %. On a GPU the graphs of each core are captured over its own.
    """
    if core.settings.device.type == "cpu":
        core.use(first.decoder, first.version)


class Assembly:
    """Holds one engine's limits, device and dtype as the configuration gives them, and builds the engine's parts."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.spec = ModelSpec.from_folder(config.model.hf_checkpoint)
        self.device = torch.device("cuda" if config.rollout.num_gpus_per_engine > 0 else "cpu")
        self.dtype: torch.dtype = getattr(torch, config.engine.dtype)
        ends = end_token_ids(config.model.hf_checkpoint)
        self._routing = replayed_experts(config, self.spec)
        self.limits = replace(limits_of(config, self.spec), eos_token_ids=ends)
        self.graphs = make_graphs(config, self.spec, self.device)
        self._drafter = make_drafter(config, self.spec, self.device, self.dtype, self.limits, self.graphs)
        self._rope: RopeTable | None = None
        self._tokenizer: Tokenizer | None = None

    def builder(self, device: torch.device) -> DecoderBuilder:
        """Return a builder that collects weights on ``device``; packed only for an engine whose home is the CPU."""
        if self._rope is None:
            # No sequence is longer than the cache, whatever context a config.json promises.
            positions = min(self.limits.context_length, self.limits.max_total_tokens)
            self._rope = RopeTable(self.spec, positions, self.dtype, self.device)
        return DecoderBuilder(self.spec, self._rope, self.dtype, device, packing=best_packing(self.device, self.dtype))

    def core(
        self,
        engine_index: int,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
        verifier: Verifier | None = None,
        cost_clock: Callable[[], float] | None = None,
    ) -> GenerationCore:
        """Load the checkpoint; ``drafter`` and ``verifier`` replace the configured ones (for tests and studies).

        What rounds cost is told by ``cost_clock``, or by ``clock``.
        """
        speculative, builder = self.config.speculative, self.builder(self.device)
        for name, tensor in self.tensors():
            builder.add(name, tensor)
        shape = embedded_shape(speculative, self.spec.architecture)
        settings = CoreSettings(
            shape=shape,
            speculates=drafter is not None or speculative.record.speculates,
            max_running=self.config.engine.max_running_requests,
            engine_index=engine_index,
            dtype=self.dtype,
            device=self.device,
            cost_probe_interval=self.config.engine.cost_probe_interval,
            graphs=self.graphs,
            is_automatic=drafter is None and speculative.is_automatic,
            cuts_network=self.device.type == "cpu" and shape.topk == 1,
            draft_temperatures=draft_temperatures(speculative, shape),
            cost_clock=cost_clock,
            keeps_prompts=not self.config.engine.disable_radix_cache,
            max_positions=min(self.limits.context_length, self.limits.max_total_tokens),
        )
        cache = KvCache(self.spec, self.dtype, self.device, self.limits.max_total_tokens, self._routing)
        stop_ids = self.limits.eos_token_ids
        stop_rule = StopRule(stop_ids, self.decode)
        verifier = RankingVerifier(verifier or make_verifier(speculative, stop_ids, self.device), stop_ids)
        return GenerationCore(builder.finish(), cache, drafter or self._drafter, stop_rule, settings, clock, verifier)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the target's weights under their Hugging Face names: the checkpoint's."""
        tensors = load_tensors(self.config.model.hf_checkpoint, self.spec, [self.dtype])
        for name in list(tensors):
            yield name, tensors.pop(name)

    def load_tokenizer(self) -> None:
        """Read the tokenizer, once; only stop strings need it."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.config.model.hf_checkpoint)

    def decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None, "requests with stop strings load the tokenizer first"
        return self._tokenizer.decode(token_ids, skip_special=False)  # a stop string may be a special token's text
