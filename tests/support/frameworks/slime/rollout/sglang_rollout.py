"""slime's generate and its group's (slime/rollout/sglang_rollout.py): the body that it posts, and what it keeps."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import requests

from slime.utils.types import Sample, Status


def load_function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = sample.tokens or list(sample.prompt.encode())  # the tiny policy's tokens are bytes
    sampling_params["max_new_tokens"] -= sample.response_length
    body = {"sampling_params": sampling_params, "return_logprob": True, "input_ids": prompt_ids}
    sample.tokens = sample.tokens or prompt_ids
    answer = (await asyncio.to_thread(requests.post, url, json=body, timeout=60)).json()
    triples = answer["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[token for _, token, _ in triples],
        log_probs=[logprob for logprob, _, _ in triples],
        meta_info=answer["meta_info"],
        text=answer["text"],
    )
    return sample


async def generate_and_rm_group(args: Any, group: list[Sample], sampling_params: dict[str, Any]) -> list[Any]:
    function = load_function(args.custom_generate_function_path)
    made = await asyncio.gather(*(function(args, each, dict(sampling_params), evaluation=False) for each in group))
    for sample in made:
        if isinstance(sample, Sample) and sample.reward is None and sample.status is not Status.ABORTED:
            sample.reward = 1.0
    return list(made)
