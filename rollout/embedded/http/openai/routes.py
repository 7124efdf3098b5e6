"""OpenAI's endpoints answer clients written for OpenAI: models, completions and chat completions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from time import time
from typing import Any

from aiohttp import web

from rollout.embedded.http.answers import AnswerWriter
from rollout.embedded.http.calls import Call, CallReader
from rollout.embedded.http.described import SHARED
from rollout.embedded.http.json_io import error_body, json_response
from rollout.embedded.http.openai.answers import Asked, ChatForm, CompletionForm, OpenAIAnswers, Texts
from rollout.embedded.http.openai.bodies import ChatBody, CompletionBody, OpenAIBody, in_clients_words
from rollout.embedded.http.openai.messages import template_messages, text_of
from rollout.embedded.http.openai.tool_calls import tool_format
from rollout.embedded.http.running import CallRunner
from rollout.embedded.http.serving import Serving
from slime_spec.algorithms import find_algorithm
from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.files import shortened
from slime_spec.speculation.request_fields import ADVICE

logger = logging.getLogger(__name__)
MOST_NAMES_LOGGED = 100
# Fields of OpenAI's that change nothing where one model is served and nothing is kept.
HARMLESS = frozenset(
    (
        *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("parallel_tool_calls", "verbosity", "separate_reasoning", "stream_reasoning"),
    )
)


class OpenAIRoutes:
    """Handles the endpoints under /v1 that OpenAI's clients call."""

    def __init__(self, serving: Serving, runner: CallRunner, reader: CallReader, writer: AnswerWriter) -> None:
        self._runner, self._reader, self._writer = runner, reader, writer
        self._tokenizer, self._limits = serving.tokenizer, serving.limits
        self._name = serving.model_name
        self._started_at_s = int(time())
        texts = Texts(serving.tokenizer)
        self._completion_form, self._chat_form = CompletionForm(texts), ChatForm(texts)
        self._ignored: set[str] = set()
        self._tool_format = tool_format(serving.tokenizer.chat_template)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model:.+}", self._model),
            web.post("/v1/completions", self._complete),
            web.post("/v1/chat/completions", self._chat),
        ]

    @staticmethod
    def bodies() -> dict[str, dict[str, Any]]:
        """Return the schemas of the bodies, by path."""
        return {
            "/v1/completions": CompletionBody.model_json_schema(ref_template=SHARED),
            "/v1/chat/completions": ChatBody.model_json_schema(ref_template=SHARED),
        }

    async def _models(self, request: web.Request) -> web.Response:
        """List the one model that is served."""
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: web.Request) -> web.Response:
        """Describe the served model by its name."""
        name = request.match_info["model"]
        if name not in (self._name, self._name.removeprefix("/")):  # a client cannot send the first slash of a path
            message = f"The model {shortened(name)!r} does not exist"
            error = {**error_body(404, message, "invalid_request_error")["error"], "param": "model"}
            return json_response({"error": {**error, "code": "model_not_found"}}, 404)
        return json_response(self._card())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        """Go on with texts or token ids, in OpenAI's form of completions."""
        return await self._answer(request, lambda body: self._completion(CompletionBody.read(body)))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """Write the next turn of a chat, in OpenAI's form of chat completions."""
        return await self._answer(request, lambda body: self._chat_turn(ChatBody.read(body)))

    async def _answer(self, request: web.Request, read: Callable[[object], Asked]) -> web.StreamResponse:
        asked = await self._runner.read(request, read)
        answers = OpenAIAnswers(asked, self._tokenizer, self._writer)
        if asked.call.stream:
            return await self._runner.stream(request, asked.call, answers.chunks, answers.last)
        return json_response(answers.whole(await self._runner.whole(asked.call)))

    def _completion(self, body: CompletionBody) -> Asked:
        call = self._call(body, body.generate_body())
        return self._asked(body, call, self._completion_form, self._echoes(body, call))

    def _echoes(self, body: CompletionBody, call: Call) -> tuple[str, ...] | None:
        """Return the text with which the choices of each prompt begin; None where they do not."""
        if not body.echoes:
            return None
        if isinstance(body.prompt, str):
            return (body.prompt,)
        decode = self._tokenizer.decode
        texts = [each if isinstance(each, str) else None for each in body.prompt]
        if None not in texts:
            return tuple(body.prompt)
        return tuple(decode(each.request.prompt_token_ids) for each in call.prompts)

    def _chat_turn(self, body: ChatBody) -> Asked:
        messages = template_messages(body.messages, body.shown_tools, self._reader.longest_text_bytes)
        if not self._tokenizer.has_chat_template:
            rule = "need a checkpoint with a chat template, and the served one has none"
            raise ConfigError("messages", rule, self._name, "Send a prompt to /v1/completions.")
        if body.shown_tools and not self._tokenizer.template_reads("tools"):
            rule = "need a chat template that shows tools, and that of the served checkpoint shows none"
            raise ConfigError("tools", rule, self._name, "Leave them out, or write them into a message.")
        values = body.template_values
        try:
            prompt = self._tokenizer.chat(messages, tools=body.shown_tools, template_values=values)
        except CheckpointError as error:  # of a template that says no to these messages
            raise ConfigError("messages", error.rule, len(messages), "Send messages that the template takes.") from None
        made: dict[str, Any] = {**body.generate_body(), "input_ids": list(prompt)}
        takes_advice = find_algorithm(self._limits.algorithm).takes_advice
        if body.prediction is not None and takes_advice:  # a hint: where nothing drafts from it, nothing is lost
            made["extra_config"] = {ADVICE: text_of(body.prediction.content, "prediction.content")}
        asked = self._asked(body, self._call(body, made), self._chat_form)
        return replace(asked, tool_format=self._tool_format) if body.shown_tools else asked

    def _call(self, body: OpenAIBody, generate_body: dict[str, Any]) -> Call:
        for name in body.ignored:
            self._note_ignored(name)
        try:
            return self._reader.read(generate_body)
        except ConfigError as error:
            raise in_clients_words(error) from None

    def _asked(
        self, body: OpenAIBody, call: Call, form: CompletionForm | ChatForm, echoes: tuple[str, ...] | None = None
    ) -> Asked:
        return Asked(
            call=call,
            form=form,
            model=self._name if body.model is None else body.model,
            created_s=int(time()),
            echoes=echoes,
            token_ids=bool(body.return_token_ids),
            spec_details=bool(body.return_spec_tokens_details),
            usage_in_stream=bool(body.stream_options and body.stream_options.include_usage),
        )

    def _note_ignored(self, name: str) -> None:
        """Log once that a field of this name changes nothing."""
        if name not in HARMLESS and name not in self._ignored and len(self._ignored) < MOST_NAMES_LOGGED:
            self._ignored.add(name)
            logger.warning("ignored an unknown field name=%r", shortened(name))

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._started_at_s,
            "owned_by": "slime_spec",
            "root": self._name,
            "parent": None,
            "max_model_len": self._limits.context_length,
        }
