"""verl's rollouts on SGLang are counted by the manager class that its configuration names.

    actor_rollout_ref.rollout.agent.agent_loop_manager_class=slime_spec.integrations.verl.AgentLoopManagerTQ

verl's servers drop a response's meta_info: its servers are started with a tally, and the class asks for it.

    who starts the servers     name of the class        told of a step
    AgentLoopManager, 0.7.1    AgentLoopManager         when its sequences are generated
    LLMServerManager, 0.8.0    AgentLoopManager         likewise
    the same, trainer.use_v1   AgentLoopManagerTQ       when the next batch begins

LLMServerManager starts its servers before it asks for the class: there VERL_USE_EXTERNAL_MODULES brings the tally.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.integrations.answers import Answer, algorithm_named, responses_from
from slime_spec.integrations.verl_servers import REMEDY, REPLICAS, SERVED, SERVERS, SETTING, SGLANG, counting_replica
from slime_spec.metrics.rollout import acceptance_metrics
from slime_spec.sglang.metadata import UnknownMetadataError

logger = logging.getLogger(__name__)

BLOCKING, DISPATCHING = "AgentLoopManager", "AgentLoopManagerTQ"
HOMES = {BLOCKING: "verl.experimental.agent_loop.agent_loop", DISPATCHING: "verl.trainer.ppo.v1"}
AWAITING = "verl.utils.ray_utils"
BATCHES = "verl.utils.tensordict_utils"
REGISTER = "Export VERL_USE_EXTERNAL_MODULES=slime_spec.integrations.verl_register where verl and its Ray actors run; "
Step = tuple[int | None, bool]  # verl's number of a step, and whether it validates


def measured(answers: Sequence[Answer], algorithm_name: str | None) -> dict[str, float]:
    """Return the acceptance of a step's answers; nothing where none had a round, or their counters are unknown."""
    try:
        responses = responses_from(answers, algorithm_named(algorithm_name))
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
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _manager(name)


@cache
def _manager(name: str) -> type:
    try:
        base: Any = getattr(importlib.import_module(HOMES[name]), name)
    except (ModuleNotFoundError, AttributeError) as error:
        rule = f"serves {SERVED}; this verl has no {HOMES[name]}.{name}: {error}"
        raise ConfigError(SETTING, rule, f"{__name__}.{name}", REMEDY) from error
    parameters = inspect.signature(base.__init__).parameters
    if name == DISPATCHING:
        return _dispatching(_of_client(base, name))
    if "llm_client" in parameters:
        return _awaited(_of_client(base, name))
    if "worker_group" not in parameters:
        rule = f"serves {SERVED}; this verl's manager is given neither its workers nor a client of its servers"
        raise ConfigError(SETTING, rule, f"{__name__}.{name}", REMEDY)
    is_async = inspect.iscoroutinefunction(inspect.unwrap(base.generate_sequences))
    return (_awaited if is_async else _blocking)(_of_servers(base))


class _Counting:
    """Asks servers for their answers and reports them; ``counts`` says whether they are SGLang's."""

    config: Any
    counts: bool

    def see_engine(self, config: Any) -> None:
        engine = config.actor_rollout_ref.rollout.name
        self.counts = engine == SGLANG
        if not self.counts:
            logger.warning("acceptance is counted on SGLang alone rollout=%s", engine)

    def handles(self) -> list[Any]:
        raise NotImplementedError

    def asked(self) -> list[Any]:
        """Return what the servers will answer of what they generated until now."""
        return [handle.take_answers.remote() for handle in self.handles()]

    def fetched(self) -> Any:
        return importlib.import_module(SERVERS).ray.get(self.asked())

    def told(self, of: Step, taken: Iterable[Sequence[Answer]]) -> None:
        """Report a step's answers, by server; a validation's in the log alone."""
        step, is_validation = of
        metrics = measured([answer for answers in taken for answer in answers], _algorithm_of(self.config))
        report(None if is_validation else step, metrics)


def _of_servers(base: Any) -> Any:
    class ServerManager(_Counting, base):
        """Is verl's manager that starts the servers itself, with those that count."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            self.see_engine(config)
            if self.counts:
                self.rollout_replica_class = counting_replica(importlib.import_module(SERVERS).SGLangReplica)
            super().__init__(config, *args, **kwargs)

        def handles(self) -> list[Any]:
            return list(self.server_handles)

    return ServerManager


def _of_client(base: Any, name: str) -> Any:
    class ClientManager(_Counting, base):
        """Is verl's manager whose servers run already."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            self.see_engine(config)
            if name == BLOCKING and config.trainer.get("use_v1", False):
                remedy = f"Name {__name__}.{DISPATCHING}, or set trainer.use_v1=False."
                raise ConfigError(SETTING, "must dispatch batches for trainer.use_v1", f"{__name__}.{name}", remedy)
            if self.counts and not REPLICAS:
                rule = "needs servers that count, and none was started in this process"
                remedy = f"{REGISTER}prefill and decode on servers of their own are not counted. {REMEDY}"
                raise ConfigError(SETTING, rule, f"{__name__}.{name}", remedy)
            super().__init__(config, *args, **kwargs)

        def handles(self) -> list[Any]:
            return [replica._server_handle for replica in REPLICAS]

    return ClientManager


def _blocking(base: Any) -> type:
    class BlockingManager(base):
        """Is verl's manager as of b178a3c, whose calls return when they are done."""

        def generate_sequences(self, prompts: Any) -> Any:
            output = super().generate_sequences(prompts)
            if self.counts:
                self.told(_step_of(prompts.meta_info), self.fetched())
            return output

    return BlockingManager


def _awaited(base: Any) -> type:
    class AwaitedManager(base):
        """Is verl's manager from v0.7.1 on, whose callers await or not, as verl's decorator lets them."""

        @importlib.import_module(AWAITING).auto_await
        async def generate_sequences(self, prompts: Any) -> Any:
            output = await super().generate_sequences(prompts)
            if self.counts:
                self.told(_step_of(prompts.meta_info), await asyncio.gather(*self.asked()))
            return output

    return AwaitedManager


def _dispatching(base: Any) -> type:
    class DispatchingManager(base):
        """Is verl's manager of trainer.use_v1, whose calls return as a batch begins; a step may have several."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._step: Step | None = None
            self._answers: list[Sequence[Answer]] = []
            super().__init__(*args, **kwargs)

        def generate_sequences(self, prompts: Any) -> Any:
            if self.counts:
                read = importlib.import_module(BATCHES).get_non_tensor_data
                self._begin((read(prompts, "global_steps", None), bool(read(prompts, "validate", False))))
            return super().generate_sequences(prompts)

        def _begin(self, step: Step) -> None:
            """Report the step before, where another begins."""
            self._answers += self.fetched()
            if step != self._step:
                if self._step is not None:
                    self.told(self._step, self._answers)
                self._step, self._answers = step, []

    return DispatchingManager


def _step_of(meta_info: Mapping[str, Any]) -> Step:
    return meta_info.get("global_steps"), bool(meta_info.get("validate", False))


def _algorithm_of(config: Any) -> str | None:
    """Return the algorithm that verl starts its servers with: its flags for SGLang, else those of MTP."""
    rollout = config.actor_rollout_ref.rollout
    flags = (rollout.get("engine_kwargs") or {}).get(SGLANG) or {}
    mtp = rollout.get("mtp") or {}
    return flags.get("speculative_algorithm") or mtp.get("speculative_algorithm")
