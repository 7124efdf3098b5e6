"""The HTTP client of one server."""

import asyncio

from aiohttp import web

from rollout.sglang_engine.client import KEEP_ALIVE_S, SglangClient


def test_a_connection_that_was_idle_is_not_used_again() -> None:
    """SGLang closes those, and a request that meets the closing could not be told from a server that died."""
    peers: list[tuple[str, int]] = []

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.append(request.transport.get_extra_info("peername"))
        return web.json_response({})

    async def call() -> None:
        app = web.Application()
        app.add_routes([web.post("/pause_generation", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        client = SglangClient(f"http://{host}:{port}")
        await client.open()
        for idle_s in (0.0, KEEP_ALIVE_S + 0.2, 0.0):
            await client.post("/pause_generation")
            await asyncio.sleep(idle_s)
        await client.close()
        await runner.cleanup()

    asyncio.run(call())
    first, at_once, after_idling = peers
    assert first == at_once != after_idling
