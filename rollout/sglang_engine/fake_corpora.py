"""FakeCorpora answers a fake n-gram server's calls about external corpora, as SGLang 0.5.11 to 0.5.23 do."""

from __future__ import annotations

from aiohttp import web

from rollout.sglang_engine.fake_http import Body, FakeHttp, Handlers


class FakeCorpora(FakeHttp):
    """Keeps the texts of named corpora; ``has_corpora = False`` is a release without the calls."""

    def __init__(self, api_key: str | None = None) -> None:
        super().__init__(api_key)
        self.corpora: dict[str, list[str]] = {}
        self.has_corpora = True

    def posts(self) -> Handlers:
        return {**super().posts(), "/add_external_corpus": self._add, "/remove_external_corpus": self._remove}

    def gets(self) -> Handlers:
        return {**super().gets(), "/list_external_corpora": self._list}

    async def _add(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        name, documents = body["corpus_id"], body["documents"]
        if not self.has_corpora:
            return _missing()
        if name in self.corpora:
            return _corpus_answer(400, f"External corpus '{name}' already exists.")
        if not any(documents):
            return _corpus_answer(400, "External corpus is empty \u2014 no tokens were loaded.")
        self.corpora[name] = documents
        loaded = sum(map(len, documents)) + len(documents) - 1
        return _corpus_answer(200, f"Loaded corpus '{name}' with {loaded} tokens.", name, loaded)

    async def _remove(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        self.corpora.pop(body["corpus_id"], None)
        return web.json_response({"success": True, "message": f"Removed corpus '{body['corpus_id']}'."})

    async def _list(self, request: web.Request) -> web.Response:
        await self._body(request)
        if not self.has_corpora:
            return _missing()
        counts = {name: sum(map(len, documents)) for name, documents in self.corpora.items()}
        return web.json_response({"success": True, "corpus_token_counts": counts, "message": ""})


def _missing() -> web.Response:
    return web.json_response({"detail": "Not Found"}, status=404)


def _corpus_answer(status: int, message: str, name: str = "", loaded: int = 0) -> web.Response:
    answer: Body = {"success": status == 200, "corpus_id": name, "message": message, "loaded_token_count": loaded}
    return web.json_response(answer, status=status)
