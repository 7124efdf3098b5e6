"""verl's rollouts on SGLang are counted by the manager class that its configuration names.

    actor_rollout_ref.rollout.agent.agent_loop_manager_class=slime_spec.integrations.verl.AgentLoopManager

verl's servers drop a response's meta_info. The class starts verl's own servers, each with a tally of what passes
through its tokenizer manager, and asks for it when verl's own manager has generated a step's sequences.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from typing import Any

from slime_spec.algorithms import ALGORITHMS
from slime_spec.integrations.answers import Answer, kept, responses_from
from slime_spec.metrics.rollout import acceptance_metrics
from slime_spec.sglang.metadata import UnknownMetadataError

logger = logging.getLogger(__name__)

MANAGER = "AgentLoopManager"
LOOPS = "verl.experimental.agent_loop.agent_loop"
SERVERS = "verl.workers.rollout.sglang_rollout.async_sglang_server"
SGLANG = "sglang"


class Tally:
    """Keeps what a server's finished responses said of speculation, until somebody takes it."""

    def __init__(self) -> None:
        self._answers: list[Answer] = []

    def note(self, output: Any) -> None:
        meta_info = output.get("meta_info") if isinstance(output, Mapping) else None
        if meta_info and meta_info.get("finish_reason") is not None:  # of a stream, the last chunk
            self._answers.append(kept(meta_info))

    def take(self) -> list[Answer]:
        taken, self._answers = self._answers, []
        return taken

    def watch(self, manager: Any) -> None:
        """Note all that one tokenizer manager of SGLang's generates from now on."""
        generate = manager.generate_request

        async def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async for output in generate(*args, **kwargs):
                self.note(output)
                yield output

        manager.generate_request = generate_request


def measured(answers: Sequence[Answer], algorithm_name: str | None) -> dict[str, float]:
    """Return the acceptance of a step's answers; nothing where none had a round, or their counters are unknown."""
    try:
        responses = responses_from(answers, ALGORITHMS.get(algorithm_name or ""))
    except UnknownMetadataError as error:
        logger.error("ALARM acceptance is not known: %s", error)
        return {}
    return acceptance_metrics(responses) if any(each.spec.num_rounds for each in responses) else {}


def report(step: int | None, metrics: Mapping[str, float]) -> None:
    """Show a step's acceptance in the log, and in the process's wandb run, beside what verl logs of the step."""
    if not metrics:
        return
    logger.info("acceptance of the rollout step=%s %s", step, " ".join(f"{k}={v:.4f}" for k, v in metrics.items()))
    if step is not None:
        from slime_spec.metrics.wandb import log_beside

        log_beside(step, metrics)


def __getattr__(name: str) -> Any:
    """Make the class when verl asks for it: nothing here imports verl before."""
    if name != MANAGER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _manager()


@cache
def _manager() -> type:
    base: Any = getattr(importlib.import_module(LOOPS), MANAGER)

    class CountingManager(base):
        """Is verl's manager, with servers that count."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            engine = config.actor_rollout_ref.rollout.name
            self._counts = engine == SGLANG
            if self._counts:
                self.rollout_replica_class = _replica()
            else:
                logger.warning(
                    "acceptance is counted on SGLang alone rollout=%s", config.actor_rollout_ref.rollout.name
                )
            super().__init__(config, *args, **kwargs)

        def generate_sequences(self, prompts: Any) -> Any:
            output = super().generate_sequences(prompts)
            if self._counts:
                ray = importlib.import_module(SERVERS).ray
                taken = ray.get([handle.take_answers.remote() for handle in self.server_handles])
                metrics = measured([answer for answers in taken for answer in answers], _algorithm_of(self.config))
                is_validation = bool(prompts.meta_info.get("validate", False))
                report(None if is_validation else prompts.meta_info.get("global_steps"), metrics)
            return output

    return CountingManager


@cache
def _replica() -> type:
    module: Any = importlib.import_module(SERVERS)

    class CountingServer(module.SGLangHttpServer):
        """Is verl's server, with a tally."""

        async def launch_server(self, *args: Any, **kwargs: Any) -> None:
            self.tally = Tally()
            await super().launch_server(*args, **kwargs)
            if self.node_rank == 0:  # others launch a part of it
                self.tally.watch(self.tokenizer_manager)

        async def take_answers(self) -> list[Answer]:
            return self.tally.take()

    class CountingReplica(module.SGLangReplica):
        """Is verl's replica, of such servers."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = module.ray.remote(CountingServer)

    return CountingReplica


def _algorithm_of(config: Any) -> str | None:
    """Return the algorithm that verl starts its servers with: its flags for SGLang, else those of MTP."""
    rollout = config.actor_rollout_ref.rollout
    flags = (rollout.get("engine_kwargs") or {}).get(SGLANG) or {}
    mtp = rollout.get("mtp") or {}
    return flags.get("speculative_algorithm") or mtp.get("speculative_algorithm")
