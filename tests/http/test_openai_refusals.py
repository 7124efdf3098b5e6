"""What OpenAI's endpoints do not serve is the client's mistake, told by the name of its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.http.test_openai_client import MESSAGES, TOOLS
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_policy import make_tiny_policy

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": [300]}, "prompt", "0 to 256"),
    ({"prompt": 3}, "prompt", ""),
    ({"prompt": "a", "temperature": -1}, "temperature", ""),
    ({"prompt": "a", "n": 0}, "n", ""),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", ""),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", ""),
    ({"prompt": "a", "best_of": 3}, "best_of", "every sample is returned"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not served"),
    ({"prompt": "a", "custom_params": {"a": 1}}, "custom_params", "not served: send it to /generate"),
    ({"prompt": "a", "return_sampling_mask": True}, "return_sampling_mask", "not served"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "constrained decoding"),
    ({"prompt": "a", "stop": ""}, "stop", "empty"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"prompt": "a", "stream_options": 3}, "stream_options", ""),
    ({"prompt": "a", "max_tokens": 10**400}, "max_tokens", ""),
    ({"prompt": "a", "temperature": 10**400}, "temperature", ""),
    ({}, "prompt", "required"),
    ({"messages": []}, "messages", ""),
    ({"messages": [{"content": "a"}]}, "messages.0.role", ""),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text only"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "body", "surrogate"),
    ({"messages": [{"role": "user", "content": "a" * 400_000}]}, "messages", "bytes"),
    ({"messages": MESSAGES, "tool_choice": "required", "tools": TOOLS}, "tool_choice", "cannot be held to calling"),
    ({"messages": MESSAGES, "tools": TOOLS}, "tools", "shows none"),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions", "tools"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "looks at"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "["}}]}]},
        "arguments",
        "JSON object",
    ),
]


def test_messages_that_a_template_refuses_are_the_clients_mistake(tmp_path: Path) -> None:
    """The checkpoint is whole: neither its folder nor a copy of it is of any use to a client."""
    folder = make_tiny_policy(tmp_path / "policy", max_position_embeddings=1000)
    settings = folder / "tokenizer_config.json"
    first = "{% if messages[0].role == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    strict = first + "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": strict}))
    with served(engine_config(folder, "LOOKUP")) as running:
        status, answer = running.post("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]})
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "roles must alternate" in answer["error"]["message"]
    assert str(folder) not in json.dumps(answer)


@pytest.mark.parametrize(("body", "param", "says"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_served_is_refused_by_field_in_openais_form(
    server: Served, body: dict[str, Any], param: str, says: str
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, answer = server.post(path, body)
    assert status == 400
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    assert param in error["param"]
    assert says in error["message"]
    assert param.rpartition(".")[2] in error["message"]
