"""miles' generate (miles/rollout/sglang_rollout.py)."""

from __future__ import annotations

import asyncio
from typing import Any

import requests


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = list(sample.prompt.encode())
    body = {"sampling_params": sampling_params, "return_logprob": True, "input_ids": sample.tokens}
    answer = (await asyncio.to_thread(requests.post, url, json=body, timeout=60)).json()
    new = [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]]
    sample.tokens, sample.response_length = [*sample.tokens, *new], len(new)
    sample.update_from_meta_info(args, answer["meta_info"])
    return sample
