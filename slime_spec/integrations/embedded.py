"""Embedded generates samples of another framework on an embedded engine in the framework's own process.

The engine serves the checkpoint that it was started with: no push of the framework reaches it. For runs that train,
`slime-spec serve` takes slime's pushes as a server of SGLang's does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.answers import response_text
from rollout.embedded.http.sampling import read_sampling
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.integrations.answers import prompt_and_reply
from slime_spec.integrations.settings import PluginSettings
from slime_spec.launch.serve import read_serve_arguments
from slime_spec.metrics.engines import net_metrics
from slime_spec.rl.reply_history import ReplyHistory
from slime_spec.sglang.metadata import meta_info
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)

CHECKPOINT = "--hf-checkpoint"
BUDGET = "max_new_tokens"


class Embedded:
    """Owns one started engine; implements Source.

    Each sample is a request that a thread waits for: as many as the engine decodes at once. The loop's own threads are
    fewer on a machine of few cores, and rewards wait in them.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tokenizer = Tokenizer.load(config.model.hf_checkpoint)
        self._engine = EmbeddedEngine(config, 0, InProcessTransport())
        self._engine.start()
        self._waiting = ThreadPoolExecutor(config.engine.max_running_requests, "embedded-sample")
        # The framework tells nobody that it ends, and the engine's thread would keep the process alive.
        threading.Thread(target=self._end_with_process, name="embedded-engine-end", daemon=True).start()
        self._before = NetBenefit()
        self._history = ReplyHistory() if config.speculative.record.reads_replies else None
        logger.info("embedded engine started model=%s", config.model.hf_checkpoint)

    @classmethod
    def of(cls, args: Any, settings: PluginSettings) -> Embedded:
        """Make the engine that the settings' flags describe, of the framework's checkpoint where they name none."""
        words = list(settings.engine)
        folder = getattr(args, "hf_checkpoint", None)
        if folder is not None and CHECKPOINT not in words:
            words = [CHECKPOINT, folder, *words]
        return cls(read_serve_arguments(words).config)

    def began(self, sample: Any) -> None:
        """Do nothing: a sample is known here when it is generated."""

    def ended(self, sample: Any, made: Sequence[Any]) -> None:
        """Do nothing, likewise."""

    def measured(self) -> dict[str, float]:
        return net_metrics(self._since_last())

    def leave_out(self) -> None:
        self._since_last()

    def _since_last(self) -> NetBenefit:
        before, self._before = self._before, self._engine.stats().benefit
        return self._before.since(before)

    def close(self) -> None:
        self._engine.stop()
        self._waiting.shutdown(wait=False)

    def _end_with_process(self) -> None:
        threading.main_thread().join()
        self._engine.stop()

    async def generate(self, args: Any, sample: Any, sampling_params: Any, evaluation: bool = False) -> Any:
        """Generate the rest of a sample, as slime's own generate does over HTTP."""
        prompt, reply = prompt_and_reply(sample)
        prompt = prompt or self._encoded(sample.prompt)
        sampling_params = {**sampling_params}
        if BUDGET in sampling_params:
            sampling_params[BUDGET] -= len(reply)
            if sampling_params[BUDGET] <= 0:
                sample.status = type(sample.status)("truncated")
                return sample
        fed = (*prompt, *reply)
        sampling = read_sampling(sampling_params, self._engine.limits, len(fed))
        if sampling.returns_kept:
            rule = "kept tokens, for slime's replay of top-p, come of `slime-spec serve` and of SGLang's servers"
            raise ConfigError("sampling_params.custom_params", rule, True, "Set --rollout-top-p 1, or use a server.")
        seed = _seed(args, sample, evaluation) if sampling.seed is None else sampling.seed
        earlier = self._history.of(prompt) if self._history is not None else ()
        request = GroupRequest(f"{sample.index}", fed, (seed,), sampling.params, earlier=earlier)
        made = await asyncio.get_running_loop().run_in_executor(self._waiting, self._only, request)
        if self._history is not None:
            self._history.note(prompt, [made])
        sample.tokens = list(fed)
        sample.append_response_tokens(
            args,
            tokens=list(made.token_ids),
            log_probs=list(made.logprobs),
            trainable=True,
            meta_info=meta_info(made),
            text=response_text(self._tokenizer, made, sampling),
        )
        return sample

    def _only(self, request: GroupRequest) -> GeneratedSample:
        (made,) = self._engine.generate(request)
        return made

    def _encoded(self, prompt: object) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            remedy = "Pass --apply-chat-template, so that slime makes a text of each chat."
            raise ConfigError("prompt", "must be a text for the embedded engine", prompt, remedy)
        return self._tokenizer.encode(prompt, special=False)


def _seed(args: Any, sample: Any, evaluation: bool) -> int:
    """Return the seed of a sample: the same run gives the same samples, an earlier part's rest is another draw."""
    run = getattr(args, "rollout_seed", 0)
    parts = f"{run}/{evaluation}/{sample.group_index}/{sample.index}/{sample.response_length}"
    return xxhash.xxh3_64_intdigest(parts.encode()) >> 1
