"""verl's manager (verl/experimental/agent_loop/agent_loop.py): what it lets a subclass replace, as of three versions.

``AgentLoopManager`` is b178a3c's; the others are put in its place by tests.
"""

from __future__ import annotations

import asyncio
from typing import Any

from verl.utils.ray_utils import auto_await
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangReplica


class AgentLoopManager:
    def __init__(
        self, config: Any, worker_group: Any = None, rollout_resource_pool: Any = None, rm_resource_pool: Any = None
    ) -> None:
        self.config = config
        if not hasattr(self, "rollout_replica_class"):
            self.rollout_replica_class = SGLangReplica
        replica = self.rollout_replica_class(
            replica_rank=0, config=config.actor_rollout_ref.rollout, model_config=None, gpus_per_node=1
        )
        replica.launch_servers()
        self.server_handles = [replica._server_handle]

    def generate_sequences(self, prompts: Any) -> list[list[int]]:
        (server,) = self.server_handles
        return [server.generate.remote(prompt, {}, request_id=str(at)).get() for at, prompt in enumerate(prompts.ids)]


class AwaitedManager:
    """v0.7.1's (bec9ef747): made by ``create``, and awaited where its caller awaits."""

    def __init__(self, config: Any, worker_group: Any = None) -> None:
        self.config = config
        if not hasattr(self, "rollout_replica_class"):
            self.rollout_replica_class = SGLangReplica

    @classmethod
    @auto_await
    async def create(cls, config: Any, worker_group: Any = None) -> AwaitedManager:
        made = cls(config, worker_group)
        replica = made.rollout_replica_class(
            replica_rank=0, config=config.actor_rollout_ref.rollout, model_config=None, gpus_per_node=1
        )
        replica.launch_servers()
        made.server_handles = [replica._server_handle]
        return made

    @auto_await
    async def generate_sequences(self, prompts: Any) -> list[list[int]]:
        (server,) = self.server_handles
        asked = [server.generate.remote(prompt, {}, request_id=str(at)) for at, prompt in enumerate(prompts.ids)]
        return list(await asyncio.gather(*asked))


class ClientManager:
    """1dda039b9's: the servers are there before it, and belong to LLMServerManager; ``llm_client`` is a server here."""

    def __init__(
        self, config: Any, llm_client: Any, teacher_client: Any = None, reward_loop_worker_handles: Any = None
    ) -> None:
        self.config, self.llm_client = config, llm_client

    @classmethod
    @auto_await
    async def create(cls, *args: Any, **kwargs: Any) -> ClientManager:
        return cls(*args, **kwargs)

    @auto_await
    async def generate_sequences(self, prompts: Any) -> list[list[int]]:
        asked = [self.llm_client.generate.remote(each, {}, request_id=str(at)) for at, each in enumerate(prompts.ids)]
        return list(await asyncio.gather(*asked))
