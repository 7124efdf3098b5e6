"""verl's servers (verl/workers/rollout/sglang_rollout/async_sglang_server.py, b178a3c); ray is in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator
from types import SimpleNamespace
from typing import Any


class _Answer:
    """A remote call's: awaited in a loop, or fetched outside one."""

    def __init__(self, running: Coroutine[Any, Any, Any]) -> None:
        self._running = running

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._running.__await__()

    def get(self) -> Any:
        return asyncio.run(self._running)


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> _Answer:
        return _Answer(self._method(*args, **kwargs))


class _Handle:
    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.actor, name))


ray = SimpleNamespace(
    remote=lambda cls: SimpleNamespace(remote=lambda *args, **kwargs: _Handle(cls(*args, **kwargs))),
    get=lambda answers: [each.get() for each in answers],
)


class TokenizerManager:
    """SGLang's, in the server's process: ``answers`` are what it generates, in order."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self._answers = iter(answers)

    async def generate_request(self, request: Any, _: Any) -> AsyncIterator[dict[str, Any]]:
        yield next(self._answers)


class SGLangHttpServer:
    def __init__(self, config: Any, node_rank: int) -> None:
        self.config, self.node_rank = config, node_rank

    async def launch_server(self, master_address: str | None = None, master_port: int | None = None) -> None:
        self.tokenizer_manager = TokenizerManager(self.config.answers)

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> list[int]:
        output = await self.tokenizer_manager.generate_request({"rid": request_id}, None).__anext__()
        return output["output_ids"]  # verl's TokenOutput has no place for meta_info


class SGLangReplica:
    def __init__(
        self,
        replica_rank: int,
        config: Any,
        model_config: Any,
        gpus_per_node: int = 8,
        is_reward_model: bool = False,
        is_teacher_model: bool = False,
    ) -> None:
        self.config, self.is_reward_model, self.is_teacher_model = config, is_reward_model, is_teacher_model
        self.server_class = ray.remote(SGLangHttpServer)

    def launch_servers(self) -> None:
        self._server_handle = self.server_class.remote(config=self.config, node_rank=0)
        # verl awaits this; a stand-in's server has nothing to wait for.
        launched = self._server_handle.launch_server.remote(master_address="127.0.0.1", master_port=1).__await__()
        assert next(launched, None) is None
