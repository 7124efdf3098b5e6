"""This fake server answers as recorded SGLang servers did, for tests of everything that calls a server.

It generates nothing: its next token is a function of the last one and its position, so that a response continued on
another server is the same as one that was not interrupted. Tests can read the calls it got (updates, pauses, aborts).

    with serving(FakeServer("0.5.20", contract="0.5.20")) as url: ...
    python -m rollout.sglang_engine.fake --port 30000       # as a process, in place of sglang.launch_server
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from aiohttp import web

from rollout.sglang_engine.fake_corpora import FakeCorpora
from rollout.sglang_engine.fake_http import Body, Handlers
from rollout.sglang_engine.fake_weights import FakeWeights
from rollout.sglang_engine.recordings import recordings
from slime_spec.algorithms import NONE
from slime_spec.config.addresses import address_of
from slime_spec.files import read_json_object
from slime_spec.sglang.flags import sglang_version
from slime_spec.sglang.speculation_control import SAMPLING_PARAMS, RequestSwitch

VOCABULARY = 64
CONTEXT_LENGTH = 512
DRAFTS = 3


def next_token(last: int, position: int) -> int:
    """Return the next token: this function is the whole model."""
    return (31 * last + 7 * position + 3) % VOCABULARY


class FakeServer(FakeWeights, FakeCorpora):
    """Answers as recorded: ``generation`` names the recorded metadata, ``contract`` the recorded update fields.

    ``accepted`` is how many of ``num_drafts`` drafts every round accepts, unless ``pattern`` gives the rounds of a
    request in turn; ``delay_s`` is what a round takes. ``slept_s`` sums what all requests took, which a server that
    ``only_counts`` does not really wait for. ``model`` and ``server_args`` are added to its /model_info and
    /server_info. Requests opt out of speculation by ``switch``, where there is one, all of them where the server does
    not speculate, and their steps take ``step_s``. A server that ``crashes`` ends its process at the first request.
    """

    def __init__(
        self,
        generation: str = sglang_version(),
        contract: str = sglang_version(),
        accepted: int = 2,
        delay_s: float = 0.0,
        incremental: bool = False,
        hides_openapi: bool = False,
        api_key: str | None = None,
    ) -> None:
        super().__init__(contract, api_key)
        self.meta_info = recordings()["meta_info"][generation]
        self.accepted, self.delay_s, self.incremental = accepted, delay_s, incremental
        self.num_drafts = DRAFTS
        self.pattern: Sequence[int] = ()
        self.speculates = self.counts = True
        self.crashes = False
        self.hides_openapi = hides_openapi
        self.model: Body = {}
        self.server_args: Body = {}
        self.switch: RequestSwitch | None = None
        self.step_s = self.slept_s = 0.0
        self.only_counts = False
        self.num_layers, self.num_chosen, self.num_experts = 0, 0, 0  # of the experts that it returns, if it does
        self._running: dict[str, asyncio.Event] = {}
        self._going = asyncio.Event()
        self._going.set()

    def posts(self) -> Handlers:
        posts = {
            "/generate": self._generate,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._ok,
        }
        return {**super().posts(), **posts}

    def gets(self) -> Handlers:
        gets = {
            "/health": self._health,
            "/server_info": self._info,
            "/model_info": self._model,
            "/v1/loads": self._loads,
        }
        if not self.hides_openapi:
            gets["/openapi.json"] = self._openapi
        return {**super().gets(), **gets}

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if self.crashes:
            os._exit(1)
        sampling = body["sampling_params"]
        body.setdefault("rid", uuid4().hex)
        if len(body["input_ids"]) + sampling["max_new_tokens"] > CONTEXT_LENGTH:
            return await self._answer(request, body, _once(recordings()["errors"]["too_long"]), status=400)
        if SAMPLING_PARAMS.field in sampling and self.switch != SAMPLING_PARAMS:
            return web.Response(status=500, text="Internal Server Error")
        return await self._answer(request, body, self._chunks(body))

    async def _answer(
        self, request: web.Request, body: Body, chunks: AsyncIterator[Body], status: int = 200
    ) -> web.StreamResponse:
        if not body.get("stream"):
            answers = [chunk async for chunk in chunks]
            return web.json_response(answers[-1], status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async for chunk in chunks:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _chunks(self, body: Body) -> AsyncIterator[Body]:
        """Yield one chunk a round: its token and ``accepted`` more; without drafts one a step."""
        opts_out = self.switch is not None and body.get(self.switch.parent, {}).get(self.switch.field)
        drafts = self.speculates and not opts_out
        prompt, limit = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        aborted = self._running[body["rid"]] = asyncio.Event()
        ids: list[int] = []
        spans: list[Body] = []
        rounds: list[int] = []
        last, sent = prompt[-1], 0
        while len(ids) < limit and not aborted.is_set():
            await self._take(self.delay_s if drafts else self.step_s)
            await self._going.wait()
            if aborted.is_set():
                break
            is_round = drafts and bool(ids)
            accepted = self.pattern[len(rounds) % len(self.pattern)] if self.pattern else self.accepted
            count = accepted + 1 if is_round else 1
            rounds += [accepted] if is_round else []
            first = len(ids)
            for _ in range(min(count, limit - len(ids))):
                last = next_token(last, len(prompt) + len(ids))
                ids.append(last)
            if not spans or spans[-1]["version"] != self.weight_version:
                spans.append({"version": self.weight_version, "start": first})
            if len(ids) < limit:
                yield self._chunk(body, ids, sent, None, rounds, spans)
                sent = len(ids) if self.incremental else 0
        reason = {"type": "abort", "message": "Abort"} if aborted.is_set() else {"type": "length", "length": len(ids)}
        del self._running[body["rid"]]
        yield self._chunk(body, ids, sent, reason, rounds, spans)

    async def _take(self, seconds: float) -> None:
        self.slept_s += seconds
        await asyncio.sleep(0.0 if self.only_counts else seconds)

    def _chunk(
        self,
        body: Body,
        ids: Sequence[int],
        sent: int,
        reason: Body | None,
        rounds: Sequence[int],
        spans: Sequence[Body],
    ) -> Body:
        meta = dict(self.meta_info) | {
            "id": body["rid"],
            "finish_reason": reason,
            "weight_version": self.weight_version,
        }
        meta |= {"prompt_tokens": len(body["input_ids"]), "completion_tokens": len(ids)}
        triples = [[-0.5 - token / 100, token, None] for token in ids[sent:]] if body.get("return_logprob") else []
        meta |= {"output_token_logprobs": triples}
        ends = [*(span["start"] for span in spans[1:]), len(ids)][: len(spans)]
        if "weight_versions" in meta:
            meta["weight_versions"] = [{**span, "end": end} for span, end in zip(spans, ends, strict=True)]
        counts = self._spec_keys(rounds, len(ids))
        for key in list(meta):
            if key.startswith("spec_"):
                del meta[key]
                if reason is not None and rounds and self.counts:
                    meta[key] = counts[key]
        if reason is None:
            meta.pop("weight_versions", None)
        elif self.num_layers and body.get("return_routed_experts"):
            meta["routed_experts"] = self._routed_experts([*body["input_ids"], *ids][:-1])
        return {"text": "", "output_ids": list(ids[sent:]), "meta_info": meta}

    def _routed_experts(self, token_ids: Sequence[int]) -> str:
        """Return the experts of tokens, a function of each token and its position, as SGLang encodes them."""
        shape = len(token_ids), self.num_layers, self.num_chosen
        ids = np.fromfunction(lambda token, layer, place: 7 * token + 3 * layer + place, shape, dtype=np.int32)
        ids = (ids + np.array(token_ids, dtype=np.int32)[:, None, None]) % self.num_experts
        return b64encode(ids.astype("<i4").tobytes()).decode()

    def _spec_keys(self, accepted: Sequence[int], num_tokens: int) -> Body:
        rounds, correct = len(accepted), sum(accepted)
        proposed = rounds * self.num_drafts
        histogram = [accepted.count(number) for number in range(max(accepted, default=0) + 1)]
        pairs = (("correct_drafts", "proposed_drafts"), ("accept_token_num", "draft_token_num"))
        return {
            "spec_verify_ct": rounds,
            "spec_accept_rate": correct / proposed if proposed else 0.0,
            "spec_accept_length": num_tokens / rounds if rounds else 0.0,
            "spec_num_correct_drafts": correct,
            "spec_num_proposed_drafts": proposed,
            "spec_accepted_drafts": correct,
            "spec_proposed_drafts": proposed,
            f"spec_{pairs[1][0]}": correct,
            f"spec_{pairs[1][1]}": proposed,
            "spec_correct_drafts_histogram": histogram,
            "spec_accept_histogram": histogram,
        }

    async def _abort(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        for rid, aborted in self._running.items():
            if body.get("abort_all") or rid == body.get("rid"):
                aborted.set()
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        if body.get("mode", "abort") == "abort":
            for aborted in self._running.values():
                aborted.set()
        else:
            self._going.clear()
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await self._body(request)
        self._going.set()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _health(self, request: web.Request) -> web.Response:
        """Answer as SGLang does, which generates a token for the answer and cannot while it is paused."""
        return web.Response(status=200 if self._going.is_set() else 503)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": "fake",
                "max_total_num_tokens": 4096,
                "tp_size": 1,
                "dp_size": 1,
                "speculative_num_steps": self.num_drafts,
                "memory_released": self.memory_released,
                **self.server_args,
            }
        )

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weight_version, **self.model})

    async def _loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_running_reqs": len(self._running), "num_waiting_reqs": 0}]})

    async def _openapi(self, request: web.Request) -> web.Response:
        bodies: dict[str, list[str]] = {"/update_weights_from_tensor": self.tensor_fields}
        if self.has_session:
            bodies |= {"/begin_weight_update": ["selector"], "/end_weight_update": [], "/weights_checker": ["selector"]}
        schemas: Body = {path[1:]: {"properties": {name: {} for name in names}} for path, names in bodies.items()}
        paths = {
            path: {"post": {"requestBody": {"content": {"application/json": {"schema": _reference(path)}}}}}
            for path in bodies
        }
        return web.json_response({"paths": paths, "components": {"schemas": schemas}})


def _reference(path: str) -> Body:
    return {"anyOf": [{"$ref": f"#/components/schemas/{path[1:]}"}, {"type": "null"}]}


async def _once(body: Body) -> AsyncIterator[Body]:
    yield body


@contextmanager
def serving(server: FakeServer, port: int = 0) -> Iterator[str]:
    """Serve in a thread on ``port`` of loopback, or a free port; yields ``host:port``."""
    loop = asyncio.new_event_loop()
    started: list[str] = []
    up = threading.Event()
    runner = web.AppRunner(server.app(), shutdown_timeout=0.01)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        started.append(address_of(*runner.addresses[0][:2]))
        up.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    up.wait()
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def main(argv: Sequence[str] | None = None, make: Callable[..., FakeServer] = FakeServer) -> None:
    """Serve as a process until it is ended; unknown flags are SGLang's and have no effect.

    ``--script`` names a JSON object of scripts by algorithm, also that of a server without speculation: attributes of
    FakeServer and their values; or ``{"dies": text}``, and the process ends with the text instead of serving.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key")
    parser.add_argument("--weight-version", default="0")
    parser.add_argument("--delay-s", type=float, default=0.005)
    parser.add_argument("--speculative-algorithm", default=NONE.name)
    parser.add_argument("--speculative-num-draft-tokens", type=int, default=DRAFTS + 1)
    parser.add_argument("--script", type=Path)
    known, _ = parser.parse_known_args(argv)
    server = make(delay_s=known.delay_s, api_key=known.api_key)
    server.weight_version, server.step_s = known.weight_version, known.delay_s
    server.speculates = known.speculative_algorithm != NONE.name
    server.num_drafts = known.speculative_num_draft_tokens - 1
    scripts = read_json_object(known.script) if known.script else {}
    for name, value in scripts.get(known.speculative_algorithm, {}).items():
        if name == "dies":
            sys.exit(value)
        assert hasattr(server, name), f"a script may set {name}"
        setattr(server, name, value)
    web.run_app(server.app(), host=known.host, port=known.port, print=None)


if __name__ == "__main__":
    main()
