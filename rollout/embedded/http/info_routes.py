"""These endpoints report the server's health, the model it serves, its settings and its counters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict
from time import time
from typing import Any
from uuid import uuid4

from aiohttp import web

import slime_spec
from rollout.embedded.http.json_io import json_response
from rollout.embedded.http.serving import Serving
from slime_spec.sglang.draft_shape import embedded_shape
from slime_spec.sglang.releases import SELECTOR, since
from slime_spec.types import GroupRequest, SamplingParams

HEALTH_TIMEOUT_S = 20.0  # SGLang's
CONTRACT = since(SELECTOR)  # of SGLang's HTTP API: selectors, and sessions around weight updates


class InfoRoutes:
    """Handles the info endpoints; ``can_generate`` is false while generation is paused or memory is released.

    Both are healthy states.
    """

    def __init__(self, serving: Serving, can_generate: Callable[[], bool]) -> None:
        self._config, self._spec, self._limits = serving.config, serving.spec, serving.limits
        self._engine, self._generations = serving.engine, serving.generations
        self._names, self._totals, self._can_generate = serving.names, serving.totals, can_generate
        self._model_name, self._started_at_s = serving.model_name, time()
        self.stopping = False

    def routes(self) -> list[web.RouteDef]:
        paths = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/weight_version": self._weight_version,
            "/get_weight_version": self._weight_version,
            "/workers": self._workers,
        }
        return [web.get(path, handler) for path, handler in paths.items()]

    async def _health(self, request: web.Request) -> web.Response:
        """Answer 200 if the engine's loop comes round in time."""
        return await self._answers_in_time(asyncio.to_thread(self._engine.ping))

    async def _health_generate(self, request: web.Request) -> web.Response:
        """Answer 200 if one token can be generated; while prompts run, or none may, if the loop comes round in time."""
        if self._generations.num_prompts or not self._can_generate():
            return await self._health(request)
        return await self._answers_in_time(self._one_token())

    async def _answers_in_time(self, proof: Any) -> web.Response:
        if self.stopping:
            proof.close()
            return web.Response(status=503)
        try:
            await asyncio.wait_for(proof, HEALTH_TIMEOUT_S)
        except (TimeoutError, RuntimeError):  # RuntimeError: the engine has ended
            return web.Response(status=503)
        return web.Response()

    async def _one_token(self) -> None:
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        rid = f"HEALTH_CHECK_{uuid4().hex}"
        async with aclosing(self._generations.events(rid, [GroupRequest(rid, (0,), (0,), params)])) as events:
            async for _ in events:
                pass

    async def _model_info(self, request: web.Request) -> web.Response:
        """Describe the served model, and name the version of its weights."""
        folder = self._config.model.hf_checkpoint
        return json_response(
            {
                "model_path": folder,
                "served_model_name": self._model_name,
                "tokenizer_path": folder,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._names.current(),
                "load_format": "safetensors",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "architectures": [self._spec.architecture],
            }
        )

    async def _weight_version(self, request: web.Request) -> web.Response:
        """Name the version of the weights in use."""
        return json_response({"weight_version": self._names.current()})

    async def _workers(self, request: web.Request) -> web.Response:
        """List this server as sglang-router lists its servers: clients of a router may call it directly."""
        return json_response(
            {"workers": [{"url": f"{request.scheme}://{request.host}", "is_healthy": True}], "total": 1}
        )

    async def _server_info(self, request: web.Request) -> web.Response:
        """Answer the server's settings, and its counters since it started."""
        return json_response({**self._settings(), "internal_states": [self._state()]})

    def _settings(self) -> dict[str, Any]:
        """Return the server's settings under SGLang's names; the speculative numbers as they were resolved."""
        config, folder = self._config, self._config.model.hf_checkpoint
        shape = embedded_shape(config.speculative, self._spec.architecture)
        speculative = {f"speculative_{name}": value for name, value in asdict(config.speculative).items()}
        if not config.speculative.record.speculates:
            shown: dict[str, Any] = {"speculative_algorithm": None}
        else:
            shown = {
                "speculative_num_steps": shape.num_steps,
                "speculative_eagle_topk": shape.topk,
                "speculative_num_draft_tokens": shape.num_draft_tokens,
            }
        return {
            "model_path": folder,
            "tokenizer_path": folder,
            "served_model_name": self._model_name,
            "device": "cuda" if config.rollout.num_gpus_per_engine else "cpu",
            "dtype": config.engine.dtype,
            "context_length": self._limits.context_length,
            "max_running_requests": config.engine.max_running_requests,
            "max_total_num_tokens": self._limits.max_total_tokens,
            "max_req_input_len": self._limits.context_length - 1,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "random_seed": config.run.seed,
            "weight_version": self._names.current(),
            **speculative,
            **shown,
            "startup_time": self._started_at_s,
            "version": slime_spec.__version__,
            "engine": "slime_spec embedded",
            "sglang_contract": CONTRACT,
        }

    def _state(self) -> dict[str, Any]:
        stats, totals = self._engine.stats(), self._totals
        benefit = stats.benefit
        return {
            "weight_version": self._names.current(),
            "draft_version": self._engine.draft_version,
            "num_running_reqs": stats.num_running,
            "num_queue_reqs": stats.num_waiting,
            "num_used_tokens": stats.kv_tokens_used,
            "max_total_num_tokens": stats.kv_tokens_capacity,
            "memory_released": not stats.resident,
            "num_answered_samples": totals.num_samples,
            "num_generated_tokens": totals.num_tokens,
            "avg_spec_accept_length": totals.mean_accept_length,
            "spec_break_even_length": benefit.drafted_s / benefit.one_step_s if benefit.one_step_s else None,
            "net_benefit": benefit._asdict(),
            "time_in_forward_s": stats.time_in_forward_s,
            "time_total_s": stats.time_total_s,
        }
