"""Tools go to the chat template, and calls come out of the reply: whole or streamed, and never instead of lost text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.embedded.http.openai.tool_calls import HERMES, MISTRAL, ToolCall, ToolFormat, tool_format
from tests.support.chat_templates import LLAMA3_1, QWEN2_5
from tests.support.chat_templates import MISTRAL as MISTRAL_TEMPLATE
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.scripted_policy import make_scripted_policy

ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)
# Each piece is a token, so a mark comes whole or, in C, in parts.
SCRIPTS = {
    "A": ("I add", ".\n", "<tool_call>", '\n{"name": "add", ', '"arguments": {"x": "ü", "y": 7}}', "\n</tool_call>"),
    "B": ('<tool_call>{"name": "a", "arguments": {}}</tool_call>', '\n<tool_call>{"name": "b"}', "</tool_call>"),
    "C": ("a <b", "> ", "<tool", " and more"),
    "D": ("<tool_call> ", '{"name": "add"', "} ", "and no end"),
    "E": ("first ", "<tool_call>{no JSON}</tool_call>"),
}
CALL_A = ("add", {"x": "ü", "y": 7})


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_scripted_policy(tmp_path_factory.mktemp("scripted") / "policy", SCRIPTS, TEMPLATE)
    with served(engine_config(folder, "LOOKUP")) as running:
        yield running


@pytest.fixture
def client(scripted: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)


def asked(script: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is it, {script}"}]
    return {"model": "m", "messages": messages, "tools": [ADD], "temperature": 0, **fields}


def streamed(client: openai.OpenAI, **body: Any) -> tuple[str, list[Any], list[str | None]]:
    """A stream's content, its calls, and its finish reasons."""
    chunks = list(client.chat.completions.create(**body, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    return "".join(delta.content or "" for delta in deltas), calls, reasons


@pytest.mark.parametrize(
    ("script", "content", "calls", "reason"),
    [
        ("A", "I add.", [CALL_A], "tool_calls"),
        ("B", None, [("a", {}), ("b", {})], "tool_calls"),
        ("C", "a <b> <tool and more", [], "stop"),
        ("D", '<tool_call> {"name": "add"} and no end', [], "stop"),
        ("E", "first <tool_call>{no JSON}</tool_call>", [], "stop"),
    ],
)
def test_openais_client_gets_calls_whole_and_streamed(
    client: openai.OpenAI, script: str, content: str | None, calls: list[Any], reason: str
) -> None:
    (choice,) = client.chat.completions.create(**asked(script, max_tokens=20)).choices
    assert choice.message.content == content
    found = choice.message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == calls
    assert all(call.type == "function" and call.id.startswith("call_") for call in found)
    assert choice.finish_reason == reason
    text, pieces, reasons = streamed(client, **asked(script, max_tokens=20))
    assert text == (content or "")
    assert [(each.function.name, json.loads(each.function.arguments)) for each in pieces] == calls
    assert [each.index for each in pieces] == list(range(len(calls)))
    assert [each for each in reasons if each] == [reason]


def test_a_call_that_is_cut_off_is_text_and_logprobs_are_of_every_token(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**asked("A", max_tokens=4, logprobs=True)).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == 'I add.\n<tool_call>\n{"name": "add", '
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [each.token for each in choice.logprobs.content] == list(SCRIPTS["A"][:4])


def test_without_tools_or_with_none_chosen_nothing_is_read(client: openai.OpenAI) -> None:
    whole = "".join(SCRIPTS["A"])
    for fields in ({"tools": openai.omit}, {"tool_choice": "none"}):
        (choice,) = client.chat.completions.create(**asked("A", max_tokens=20, **fields)).choices
        assert (choice.message.content, choice.message.tool_calls) == (whole, None)
        assert choice.finish_reason == "stop"


def test_a_turn_with_a_call_and_its_result_goes_on(client: openai.OpenAI) -> None:
    """The assistant's message as it came is a message that the template takes."""
    body = asked("A", max_tokens=20)
    message = client.chat.completions.create(**body).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "B"}
    body["messages"] = [*body["messages"], message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(**body).choices[0].message
    assert again.tool_calls is not None
    assert [call.function.name for call in again.tool_calls] == ["a", "b"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_cannot_be_demanded(scripted: Served, choice: Any) -> None:
    status, answer = scripted.post("/v1/chat/completions", asked("A", tool_choice=choice))
    assert (status, answer["error"]["param"]) == (400, "tool_choice")


READ: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (
        HERMES,
        '<tool_call>[{"name":"a"},{"name":"b","arguments":{"x":1}}]</tool_call>',
        "",
        [("a", "{}"), ("b", '{"x": 1}')],
    ),
    (HERMES, ' x\n<tool_call>{"name":"a","parameters":{}}</tool_call>\n y', " x\ny", [("a", "{}")]),
    (HERMES, '<tool_call>{"name":"a","arguments":"{\\"x\\": 1}"}</tool_call>', "", [("a", '{"x": 1}')]),
    (MISTRAL, 'x [TOOL_CALLS][{"name": "a", "arguments": {}}]', "x", [("a", "{}")]),
]
NO_CALLS = [
    '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>',
    "<tool_call>[]</tool_call>",
    "<tool_call></tool_call>",
    '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"',
    "<tool_call>" + "[" * 2000 + "</tool_call>",
    "</tool_call>",
    "",
]


@pytest.mark.parametrize(("form", "reply", "text", "calls"), READ, ids=lambda value: str(value)[:40])
def test_calls_are_read_in_each_way_that_models_write_them(
    form: ToolFormat, reply: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert form.read(reply) == (text, [ToolCall(*call) for call in calls])


@pytest.mark.parametrize("reply", NO_CALLS, ids=lambda value: value[:40])
def test_what_is_no_call_stays_text(reply: str) -> None:
    assert HERMES.read(reply) == (reply, ())


def test_a_format_is_known_by_its_mark_in_the_template() -> None:
    assert tool_format(QWEN2_5) == HERMES
    assert tool_format(MISTRAL_TEMPLATE) == MISTRAL
    assert tool_format(LLAMA3_1) is None


PIECES = (
    "a",
    " ",
    "\n",
    "<",
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "[TOOL_CALLS]",
    '{"name": "f"}',
    '[{"name": "g"}]',
)


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from([HERMES, MISTRAL]), st.data())
def test_a_stream_shows_nothing_that_the_whole_reply_has_not(
    pieces: list[str], form: ToolFormat, data: st.DataObject
) -> None:
    reply = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
    shown = [form.visible(reply[:cut]) for cut in cuts] + [form.read(reply).text]
    for earlier, later in pairwise(shown):
        assert later.startswith(earlier)
    if not form.read(reply).calls:
        assert form.read(reply).text == reply
