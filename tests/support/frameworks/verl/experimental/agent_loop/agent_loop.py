"""verl's manager (verl/experimental/agent_loop/agent_loop.py, b178a3c): what it lets a subclass replace."""

from __future__ import annotations

from typing import Any

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
        return [server.generate.remote(prompt, {}, request_id=str(at)) for at, prompt in enumerate(prompts.ids)]
