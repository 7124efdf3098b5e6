"""The reward remote_rm asks a server: a POST of a sample's prompt, response and label, as slime's does."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import aiohttp

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json, shortened

if TYPE_CHECKING:
    from slime_spec.slime_sample import Sample

logger = logging.getLogger(__name__)

LONGEST_ANSWER_BYTES = 16 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # statuses of a server that is busy or starts


class RemoteRewardError(Exception):
    """The server gave no reward; says why."""


async def remote_rm(args: Any, sample: Sample) -> Any:
    """Return what the server at ``args.rm_url`` answers: a number, or an object with one under --reward-key.

    A server that does not answer, or that is busy, is asked again until nine tenths of --reward-timeout have passed.
    Raises RemoteRewardError.
    """
    asked = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + 0.9 * args.reward_timeout
    pause_s = FIRST_PAUSE_S
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                return await _answer(session, args.rm_url, asked, ends_at - loop.time())
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if loop.time() + pause_s >= ends_at:
                raise RemoteRewardError(f"no reward of {args.rm_url} within {0.9 * args.reward_timeout:g} s: {reason}")
            logger.info("asking again url=%s in_s=%.2f reason=%s", args.rm_url, pause_s, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _answer(session: aiohttp.ClientSession, url: str, asked: dict[str, Any], limit_s: float) -> Any:
    limit = aiohttp.ClientTimeout(total=max(0.001, limit_s))
    async with session.post(url, json=asked, timeout=limit) as response:
        if response.status in MAY_PASS:
            response.raise_for_status()
        text = await _text(response)
        if not response.ok:
            raise RemoteRewardError(f"{url} answered {response.status} {response.reason}: {shortened(text, 200)}")
        try:
            return parse_json(text, url)
        except ConfigError:
            raise RemoteRewardError(f"{url} answered no JSON: {shortened(text, 200)}") from None


async def _text(response: aiohttp.ClientResponse) -> str:
    """Read the whole answer; raises RemoteRewardError beyond what a reward takes: a stranger's file may never end."""
    read = bytearray()
    async for chunk in response.content.iter_any():
        read += chunk
        if len(read) > LONGEST_ANSWER_BYTES:
            raise RemoteRewardError(f"{response.url} answered more than {LONGEST_ANSWER_BYTES >> 20} MiB")
    try:
        return read.decode(response.charset or "utf-8", "replace")
    except LookupError:
        raise RemoteRewardError(f"{response.url} answered in an unknown encoding: {response.charset}") from None
