"""verl's manager of trainer.use_v1 (verl/trainer/ppo/v1/agent_loop_tq.py, 1dda039b9), which returns nothing."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import ClientManager


class AgentLoopManagerTQ(ClientManager):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.running: list[Any] = []
        super().__init__(*args, **kwargs)

    def generate_sequences(self, prompts: dict[str, Any]) -> None:
        self.running += [self.llm_client.generate.remote(each, {}, request_id="0") for each in prompts["ids"]]
