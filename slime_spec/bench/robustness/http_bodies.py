"""Random HTTP requests: fields of hostile values, damaged JSON, weights that are none, and headers that lie."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save

from slime_spec.bench.robustness.tiny import make_target
from slime_spec.checkpoints.families.llama import LLAMA

VOCAB_SIZE, CONTEXT = 257, 96  # of the model being served
DEEP, DIGITS = "<deep>", "<digits>"  # written into the JSON as no encoder writes it
NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 16, 95, 96, 97, 256, 257, 4096, 4097, -1, -2, 2**31, 2**53, 2**63, -(2**63), 10**40, DIGITS),
    *(0.0, -0.0, 0.5, 0.9, 1.0, 1.5, 2.0, 2.5, 1e-6, 9e-7, 1e-9, 1e-10, 1e-39, 1e-300, 5e-324, 1e30, 1e39, 1e300),
    *(float("nan"), float("inf"), float("-inf"), True, False, None),
)
TEXTS: tuple[str, ...] = (
    *("", "a", "abcabc", " ", "\0", "é", "日本語", "🙂", "\N{REPLACEMENT CHARACTER}", "\ud800", "<|end|>", "a" * 90),
    *("a" * 5000, "a" * 50_000, "1", "-1", "NaN", "null", "auto", "all", "target", "draft", "safetensors", "in_place"),
)
ODD: tuple[Any, ...] = ([], {}, [[]], [None], [1, "a"], {"a": 1}, DEEP, [DEEP], {"a": DEEP}, [0] * 3000, ["a"] * 2000)
PARAMETERS = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n"),
    *("max_new_tokens", "min_new_tokens", "sampling_seed", "stream_interval", "stop", "stop_token_ids", "logit_bias"),
    *("ignore_eos", "skip_special_tokens", "no_stop_trim", "regex", "beam_width", "json_schema", "custom_params"),
    "temprature",
)
# Values at the bounds of what is allowed, all of which may come together.
EXTREMES: Mapping[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-6, 2e-6, 0.5, 1, 1e6, 1e30, 1e-300),
    "top_p": (5e-324, 1e-300, 0.5, 1),
    "top_k": (-1, 1, 5, 1 << 30, 10**30),
    "min_p": (0, 5e-324, 0.5, 1),
    "frequency_penalty": (-2, 0, 2),
    "presence_penalty": (-2, 0, 2),
    "repetition_penalty": (1e-9, 0.5, 1, 2),
    "min_new_tokens": (0, 1),
    "n": (1, 2, 5),
    "sampling_seed": (0, -1, 10**40),
    "stream_interval": (1, 3, 2**53),
}
FIELDS = (
    *("text", "input_ids", "sampling_params", "rid", "stream", "return_logprob", "logprob_start_len", "aux_info"),
    *("return_text_in_logprobs", "return_prompt_token_ids", "extra_config", "generate_config", "custom_labels"),
    *("image_data", "lora_path", "top_logprobs_num", "return_hidden_states", "session_params", "priority", "txt"),
    *("token_ids_logprob", "return_sampling_mask", "model"),
)
OPENAI_FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "echo", "seed", "best_of", "suffix"),
    *("stream_options", "tools", "tool_choice", "chat_template_kwargs", "prediction", "response_format", "rid", "user"),
    *(
        "return_token_ids",
        "return_spec_tokens_details",
        "min_tokens",
        "custom_params",
        "prompt",
        "messages",
        "maxtokens",
    ),
)
# Endpoints and their fields; what they change is undone after the request.
CONTROL: Mapping[str, tuple[str, ...]] = {
    "/abort_request": ("rid", "abort_all", "abort_message"),
    "/pause_generation": ("mode",),
    "/continue_generation": ("torch_empty_cache",),
    "/flush_cache": ("a",),
    "/release_memory_occupation": ("tags",),
    "/resume_memory_occupation": ("tags",),
    "/update_weights_from_disk": ("model_path", "load_format", "selector", "weight_version", "abort_all_requests"),
    "/begin_weight_update": ("selector",),
    "/end_weight_update": ("a",),
    "/update_weight_version": ("new_version", "abort_all_requests"),
    "/weights_checker": ("action", "selector", "skip_tensor_list"),
    "/init_weights_update_group": ("a",),
    "/update_weights_from_tensor": ("serialized_named_tensors", "load_format", "selector"),
}
PATHS = (
    *("/", "*", "//generate", "/generate/", "/generate?a=b", "/generate#a", "/%67enerate", "/health/../generate"),
    *("/" + "a" * 5000, "/" + "a" * 9000, "/%ff%fe", "/%00", "/\udcff", "/é", "http://x/generate", "/server_info"),
    *("/health", "/health_generate", "/model_info", "/get_server_info", "/weights_checker", "/generate"),
    *("/v1/models", "/v1/models/a%2Fb", "/v1/loads", "/metrics", "/openapi.json", "/docs"),
    *("/v1/loads?include=core", "/get_load", "/get_weight_version"),
)
METHODS = ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND", "BREW", "get")
HEADERS: tuple[tuple[str, str], ...] = (
    *(("Content-Length", value) for value in ("-1", "ten", "0", "3", "99999999999999999999", "1e3", "")),
    *(("Transfer-Encoding", value) for value in ("chunked", "gzip", "identity", "chunked, chunked", "x")),
    *(("Content-Encoding", value) for value in ("gzip", "deflate", "br", "zstd", "rot13", "gzip, gzip")),
    *(("Expect", value) for value in ("100-continue", "a miracle")),
    *(("Content-Type", value) for value in ("text/plain; charset=utf-16", "multipart/form-data", "\udcff", "")),
    *(("Authorization", value) for value in ("Bearer \udcff\udcfe", "Bearer", "Basic a", "Bearer " + "a" * 7000)),
    *(("X", value) for value in ("a" * 9000, "\0", "a\rb", "\udcff")),
    *(("Upgrade", "websocket"), ("Range", "bytes=0-1"), ("If-Modified-Since", "never"), ("Connection", "Upgrade")),
)


@dataclass(frozen=True)
class Exchange:
    """Holds one request, the requests before it, and whether it may change the server's state."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    before: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    changes_state: bool = False


def make_policy(folder: Path) -> Path:
    """Write the checkpoint to serve: its tokens are bytes, its context is short, so that answers are too."""
    return make_target(folder, LLAMA, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, num_hidden_layers=2)


def make_exchange(random: Random, policy: Path) -> Exchange:
    """Make one request; ``policy`` is the folder of the model being served."""
    shape = random.random()
    if shape < 0.40:
        return Exchange("POST", "/generate", _written(_call(random)))
    if shape < 0.60:
        return _openai(random)
    if shape < 0.70:
        return Exchange("POST", "/generate", _damaged(random, _written(_call(random))))
    if shape < 0.80:
        return _control(random)
    if shape < 0.90:
        return _weights(random, policy)
    return _odd_request(random)


def _value(random: Random) -> Any:
    return random.choice(random.choice((NUMBERS, TEXTS, ODD)))


def _call(random: Random) -> dict[str, Any]:
    """Make the body of /generate: most is lawful, so that the rest is reached."""
    prompts: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"text": "abcabcabc"},
        lambda: {"text": ["abc", "日本"]},
        lambda: {"text": [random.choice(TEXTS) for _ in range(random.choice((1, 2, 3)))]},
        lambda: {"input_ids": [random.randrange(VOCAB_SIZE) for _ in range(random.choice((1, 5, 50, CONTEXT)))]},
        lambda: {"input_ids": [[random.randrange(VOCAB_SIZE)] for _ in range(random.choice((1, 3, 70, 2000)))]},
        lambda: {random.choice(("text", "input_ids")): _value(random)},
    )
    body = random.choice(prompts)()
    params = {"max_new_tokens": random.choice((1, 3, 8))}
    body["sampling_params"] = params
    for _ in range(random.choice((0, 1, 2, 4))):
        name = random.choice(PARAMETERS)
        params[name] = _parameter(random, name)
    if random.random() < 0.5:
        body["return_logprob"] = True
    if random.random() < 0.2:
        body["stream"] = True
    if random.random() < 0.25:
        body[random.choice(FIELDS)] = _value(random)
    if random.random() < 0.05:
        body["extra_config"] = {"sp_edit": _value(random), "sp_advice_prompt_token_ids": _value(random)}
    if random.random() < 0.05:
        body["sampling_params"] = [params] * random.choice((1, 2, 3))
    return body


def _openai(random: Random) -> Exchange:
    """Make a call of OpenAI's endpoints, of the values of a call of /generate."""
    call, is_chat = _call(random), random.random() < 0.4
    params = call["sampling_params"]
    body: dict[str, Any] = {**params} if isinstance(params, dict) else {}
    body["max_tokens"] = body.pop("max_new_tokens", 2)
    body["stream"] = random.random() < 0.4
    if is_chat:
        content = random.choice(("abc", [{"type": "text", "text": "abc"}], _value(random)))
        body["messages"] = [{"role": random.choice(("user", "system", "tool")), "content": content}]
    else:
        body["prompt"] = call.get("text", call.get("input_ids"))
    for name, values in (("logprobs", (0, 3, 20, True)), ("echo", (True,)), ("top_logprobs", (2,))):
        if random.random() < 0.3:
            body[name] = random.choice(values)
    if random.random() < 0.25:
        body[random.choice(OPENAI_FIELDS)] = _value(random)
    return Exchange("POST", "/v1/chat/completions" if is_chat else "/v1/completions", _written(body))


def _parameter(random: Random, name: str) -> Any:
    if name in EXTREMES and random.random() < 0.7:
        return random.choice(EXTREMES[name])
    if name == "logit_bias" and random.random() < 0.8:
        count = random.choice((1, 3, VOCAB_SIZE - 1, VOCAB_SIZE))
        bias = random.choice((*NUMBERS, 1e30, -1e30))
        keys = random.choice((map(str, range(count)), ("05", "5"), ("٣",), ("9" * 5000,), ("-1",), ("\ud800",)))
        return dict.fromkeys(keys, bias)
    if name == "stop_token_ids" and random.random() < 0.8:
        return list(range(random.choice((1, 5, VOCAB_SIZE - 1, VOCAB_SIZE)))) + random.choice(([], [-1], [10**30]))
    if name == "stop" and random.random() < 0.8:
        return [random.choice(TEXTS) for _ in range(random.choice((1, 2, 33)))]
    return random.choice(NUMBERS) if random.random() < 0.8 else _value(random)


def _written(body: object) -> bytes:
    text = json.dumps(body)
    return text.replace(f'"{DEEP}"', "[" * 980 + "]" * 980).replace(f'"{DIGITS}"', "9" * 4300).encode()


def _damaged(random: Random, body: bytes) -> bytes:
    """Damage the text of a body, or its bytes."""
    at = random.randrange(len(body) + 1)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: body[:at],
        lambda: body[:at] + bytes([random.randrange(256)]) + body[at + 1 :],
        lambda: (
            body[:at]
            + random.choice((b"NaN", b"\xff", b"\x00", b"{", b"]", b'"', b",", b"\\ud800", b"1e999"))
            + body[at:]
        ),
        lambda: body + body,
        lambda: body.replace(b"1", b"9" * 5000, 1),
        lambda: body.replace(b":", b":" + b"[" * random.choice((50, 900, 2000, 100_000)), 1),
        lambda: body.decode("latin-1").encode(random.choice(("utf-16", "utf-32", "utf-8-sig"))),
        lambda: bytes(random.randrange(256) for _ in range(random.choice((0, 1, 30)))),
        lambda: random.choice((b"null", b"[]", b"{}", b"1", b'"a"', b"NaN", b"-", b" " * 100_000)),
    )
    return random.choice(kinds)()


def _control(random: Random) -> Exchange:
    path = random.choice(tuple(CONTROL))
    body = {name: _value(random) for name in CONTROL[path] if random.random() < 0.6}
    if path == "/update_weights_from_disk" and random.random() < 0.5:
        body["model_path"] = random.choice(
            ("/", "/dev", "/proc/self", "a" * 5000, "/" + "a/" * 3000, "\0", "/etc/passwd", "~")
        )
    if random.random() < 0.1:
        body[random.choice(TEXTS)] = 1
    return Exchange(random.choice(("POST", "POST", "GET")), path, _written(body), changes_state=True)


def _weights(random: Random, policy: Path) -> Exchange:
    """Make a session of weights with one damaged tensor, or with a payload that holds none."""
    tensors = dict(_tensors(policy))
    name = random.choice(tuple(tensors))
    tensors[name] = _damaged_tensor(random, tensors[name])
    if random.random() < 0.2:
        tensors[random.choice((name + ".x", "", "\0", "a" * 2000))] = torch.zeros(2)
    if random.random() < 0.2:
        del tensors[random.choice(tuple(tensors))]
    payload = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    if random.random() < 0.4:
        payload = _damaged(random, payload) if random.random() < 0.3 else _damaged_header(random, payload)
    text = base64.b64encode(payload).decode()
    if random.random() < 0.15:
        text = random.choice((text[:-3], "é" + text, text + "!", "", "=" * 8, text.replace("A", "\ud800", 1)))
    body: dict[str, Any] = {"serialized_named_tensors": [text], "load_format": "safetensors"}
    if random.random() < 0.15:
        body[random.choice(("serialized_named_tensors", "selector", "load_format", "weight_version"))] = _value(random)
    before = (("/begin_weight_update", {"selector": "target"}),) if random.random() < 0.9 else ()
    return Exchange("POST", "/update_weights_from_tensor", _written(body), before=before, changes_state=True)


@cache
def _tensors(policy: Path) -> dict[str, torch.Tensor]:
    return load_file(policy / "model.safetensors")


def _damaged_tensor(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    dtypes = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16)
    kinds: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor.to(random.choice(dtypes)),
        lambda: tensor.double() * random.choice((1e39, -1e300, 1.0)),
        lambda: tensor * random.choice((float("nan"), float("inf"), -1.0)),
        lambda: tensor[:0],
        lambda: tensor[..., :-1],
        lambda: tensor.unsqueeze(0),
        lambda: torch.zeros(()),
        lambda: tensor,
    )
    return random.choice(kinds)()


def _damaged_header(random: Random, payload: bytes) -> bytes:
    """Damage the JSON in front of the tensors."""
    size = int.from_bytes(payload[:8], "little")
    header = payload[8 : 8 + size]
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: header.replace(b"F32", random.choice((b"F4", b"X", b"I8", b"F64", b"C64", b"F8_E8M0")), 1),
        lambda: header.replace(b'"shape":[', b'"shape":[1099511627776,', 1),
        lambda: header.replace(b'"shape":[', b'"shape":[-1,', 1),
        lambda: header.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
        lambda: b"[" * 5000,
        lambda: b"{}",
        lambda: header[: len(header) // 2],
    )
    damaged = random.choice(kinds)()
    lengths = (len(damaged), size, 2**62, 0, len(damaged) + 1)
    return random.choice((lengths[0], *lengths)).to_bytes(8, "little") + damaged + payload[8 + size :]


def _odd_request(random: Random) -> Exchange:
    """Make a request whose method, path or headers are odd."""
    body = _written(_call(random))
    headers = tuple(random.choice(HEADERS) for _ in range(random.choice((0, 1, 1, 2))))
    names = [name for name, _ in headers]
    if "Content-Encoding" in names and random.random() < 0.5:
        packed = body if random.random() < 0.7 else b'{"text": "' + b"a" * 10_000_000 + b'"}'
        body = gzip.compress(packed, mtime=0)  # the same bytes of the same seed
    if "Transfer-Encoding" in names and random.random() < 0.7:
        size = random.choice((f"{len(body):x}", "zz", "-1", "f" * 30, "0")).encode()
        body = size + b"\r\n" + body + b"\r\n0\r\n\r\n"
    path = random.choice(PATHS) if random.random() < 0.5 else "/generate"
    method = random.choice(METHODS) if random.random() < 0.5 else "POST"
    return Exchange(method, path, body, headers)
