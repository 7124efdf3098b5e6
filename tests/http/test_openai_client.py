"""OpenAI's own client gets from this server what it gets from OpenAI: choices, streams, logprobs, usage, errors."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_policy import make_tiny_policy

PROMPT = "the cat sat on the cat sat on"
MESSAGES: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who sat on the mat?"}]
TEMPLATE = (
    "{% if tools %}[{{ tools | map(attribute='function.name') | join(' ') }}]{% endif %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} {{ c.function.arguments.x }}>{% endfor %};{% endfor %}{{ mood }}:"
)
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(config: Config) -> Tokenizer:
    return Tokenizer.load(config.model.hf_checkpoint)


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Tokenizer]]:
    """A server of a checkpoint whose template shows tools, tool calls and a value of its own."""
    folder = make_tiny_policy(tmp_path_factory.mktemp("templated") / "policy", max_position_embeddings=1000)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    with served(engine_config(folder, "LOOKUP")) as running:
        yield running, Tokenizer.load(folder)


def ids_by_byte(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of every byte that a text can have (some never occur in UTF-8), by encoding texts that have it."""
    texts = [chr(code) for code in (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000))]
    return {byte: token for text in texts for byte, token in zip(text.encode(), tokenizer.encode(text), strict=True)}


def test_greedy_completions_are_what_transformers_generates(
    client: openai.OpenAI, config: Config, tokenizer: Tokenizer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32)
    ids = tokenizer.encode(PROMPT)
    whole = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
    for prompt in (PROMPT, list(ids)):
        made = client.completions.create(
            model="m", prompt=prompt, max_tokens=40, temperature=0, extra_body={"return_token_ids": True}
        )
        (choice,) = made.choices
        assert choice.model_extra is not None
        assert choice.model_extra["token_ids"] == whole[len(ids) :]
        assert choice.model_extra["prompt_token_ids"] == list(ids)
        assert choice.text == tokenizer.decode(whole[len(ids) :])
        assert (made.object, made.model, choice.finish_reason) == ("text_completion", "m", "length")
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 40)
        assert made.usage.total_tokens == len(ids) + 40


def test_the_choices_of_several_prompts_and_samples_come_in_order(
    client: openai.OpenAI, server: Served, tokenizer: Tokenizer
) -> None:
    made = client.completions.create(model="m", prompt=["abc", "x"], n=2, seed=5, max_tokens=9, temperature=1.0)
    params = {"max_new_tokens": 9, "n": 2, "sampling_seed": 5}
    native = server.generate(text=["abc", "x"], sampling_params=params)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in made.choices] == [answer["text"] for answer in native]
    assert made.usage is not None
    assert made.usage.prompt_tokens == 4  # a prompt counts once, however many samples it has
    assert made.usage.completion_tokens == sum(answer["meta_info"]["completion_tokens"] for answer in native)
    prompts = [list(tokenizer.encode(text)) for text in ("abc", "x")]
    ids = client.completions.create(model="m", prompt=prompts, n=2, seed=5, max_tokens=9)
    assert [choice.text for choice in ids.choices] == [choice.text for choice in made.choices]


def test_a_stream_of_completions_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "m",
        "prompt": PROMPT,
        "n": 2,
        "seed": 3,
        "max_tokens": 20,
        "logprobs": 1,
        "echo": True,
    }
    whole = client.completions.create(**asked)
    texts, logprobs, reasons = {0: "", 1: ""}, {0: list[float](), 1: list[float]()}, {}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
            offsets[choice.index] += choice.logprobs.text_offset or []
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.logprobs is not None
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert reasons[choice.index] == choice.finish_reason


def test_logprobs_of_an_echo_begin_with_the_prompts(client: openai.OpenAI, server: Served) -> None:
    made = client.completions.create(model="m", prompt="abcabc", echo=True, logprobs=2, max_tokens=3, temperature=0)
    (choice,) = made.choices
    logprobs = choice.logprobs
    assert choice.text.startswith("abcabc")
    assert logprobs is not None
    params = {"temperature": 0, "max_new_tokens": 3}
    native = server.generate(text="abcabc", sampling_params=params, return_logprob=True, logprob_start_len=0)
    expected = [*native["meta_info"]["input_token_logprobs"], *native["meta_info"]["output_token_logprobs"]]
    assert logprobs.token_logprobs == [logprob for logprob, _, _ in expected]
    assert logprobs.tokens is not None
    assert logprobs.tokens[:6] == list("abcabc")
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    for token, logprob, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert 2 <= len(top) <= 3 or "\ufffd" in top  # two tokens that are parts of characters look alike
        assert top[token] >= logprob


def test_an_echo_is_the_prompt_as_it_was_sent(tmp_path: Path) -> None:
    """Also where the tokenizer puts a token before every text."""
    folder = make_tiny_policy(tmp_path / "policy", max_position_embeddings=100)
    settings = folder / "tokenizer_config.json"
    fast = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"<|end|>": {"id": "<|end|>", "ids": [256], "tokens": ["<|end|>"]}}
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [text, text],
        "special_tokens": token,
    }
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    bare = {name: value for name, value in json.loads(settings.read_text()).items() if name != "chat_template"}
    settings.write_text(json.dumps(bare))
    with served(engine_config(folder), served_model_name="tiny") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].id == client.models.retrieve("tiny").id == "tiny"
        made = client.completions.create(model="tiny", prompt=["ab", "cd"], echo=True, logprobs=0, max_tokens=0)
        assert [choice.text for choice in made.choices] == ["ab", "cd"]
        for choice in made.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.tokens == ["<|end|>", *choice.text]
        ids = client.completions.create(model="tiny", prompt=[256, 1, 2], echo=True, max_tokens=0)
        assert ids.choices[0].text == Tokenizer.load(folder).decode([1, 2])
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_an_echo_without_new_tokens_scores_the_prompt(client: openai.OpenAI) -> None:
    made = client.completions.create(model="m", prompt="abcabc", echo=True, logprobs=0, max_tokens=0)
    (choice,) = made.choices
    assert (choice.text, choice.finish_reason) == ("abcabc", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == 6
    assert made.usage is not None
    assert made.usage.completion_tokens == 0
    chunks = list(client.completions.create(model="m", prompt="abcabc", echo=True, max_tokens=0, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["abcabc"]


def test_stops_penalties_and_biases_mean_what_they_mean_to_generate(
    client: openai.OpenAI, server: Served, tokenizer: Tokenizer
) -> None:
    whole = client.completions.create(model="m", prompt=PROMPT, max_tokens=30, temperature=0)
    text = whole.choices[0].text
    stop = next(char for char in text[5:] if char != "\ufffd")
    for given in (stop, ["never", stop]):
        (choice,) = client.completions.create(
            model="m", prompt=PROMPT, max_tokens=30, temperature=0, stop=given
        ).choices
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
    (letter,) = tokenizer.encode("A")
    bias = {f"{letter}": 100}
    biased = client.completions.create(model="m", prompt="a", max_tokens=4, temperature=0, logit_bias=bias)
    assert biased.choices[0].text == "AAAA"
    params = {"temperature": 0, "max_new_tokens": 30, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    penalised = client.completions.create(
        model="m", prompt=PROMPT, max_tokens=30, temperature=0, presence_penalty=1.5, frequency_penalty=0.5
    )
    assert penalised.choices[0].text == server.generate(text=PROMPT, sampling_params=params)["text"]
    assert penalised.choices[0].text != text


def test_a_chat_is_its_template_and_its_stream_adds_up(
    client: openai.OpenAI, server: Served, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.chat(MESSAGES)
    params = {"max_new_tokens": 12, "sampling_seed": 4}
    native = server.generate(input_ids=list(ids), sampling_params=params, return_logprob=True, top_logprobs_num=2)
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "seed": 4, "max_completion_tokens": 12}
    made = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content) == ("assistant", native["text"])
    assert choice.message.tool_calls is None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    triples, tops = (native["meta_info"][name] for name in ("output_token_logprobs", "output_top_logprobs"))
    assert [token.logprob for token in choice.logprobs.content] == [logprob for logprob, _, _ in triples]
    ids_of = ids_by_byte(tokenizer)
    for token, top in zip(choice.logprobs.content, tops, strict=True):
        assert [each.logprob for each in token.top_logprobs] == [logprob for logprob, _, _ in top]
        for each, (_, token_id, _) in zip(token.top_logprobs, top, strict=True):
            assert [ids_of.get(byte, token_id) for byte in each.bytes or ()] == [token_id]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == native["text"]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_templates_see_tools_parts_calls_and_values(templated: tuple[Served, Tokenizer]) -> None:
    server, tokenizer = templated
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "8"},
    ]
    rendered = "user:two parts;assistant:<add 7>;tool:8;"
    for choice, expected in ((openai.omit, "[add]" + rendered), ("auto", "[add]" + rendered), ("none", rendered)):
        body = {"return_token_ids": True, "chat_template_kwargs": {"mood": "glad"}}
        made = client.chat.completions.create(
            model="m", messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=1, extra_body=body
        )
        assert made.choices[0].model_extra is not None
        assert tokenizer.decode(made.choices[0].model_extra["prompt_token_ids"]) == expected + "glad:"


def test_a_prediction_makes_the_same_reply_in_fewer_rounds(templated: tuple[Served, Tokenizer]) -> None:
    server, _ = templated
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 40, "logit_bias": {"65": 9, "66": 8.5}}
    asked |= {"temperature": 0, "presence_penalty": 0.3, "extra_body": {"return_spec_tokens_details": True}}
    plain = client.chat.completions.create(**asked)
    text = plain.choices[0].message.content
    assert text is not None
    predicted = client.chat.completions.create(**asked, prediction={"type": "content", "content": text})
    assert predicted.choices[0].message.content == text
    assert predicted.model_extra is not None
    assert plain.model_extra is not None
    details = predicted.model_extra["sglext"]["spec_tokens_details"]
    assert details["spec_verify_ct"] <= plain.model_extra["sglext"]["spec_tokens_details"]["spec_verify_ct"]
    assert predicted.usage is not None
    assert predicted.usage.completion_tokens_details is not None
    accepted = predicted.usage.completion_tokens_details.accepted_prediction_tokens
    assert accepted == details["spec_num_correct_drafts"] > 0


def test_the_served_model_is_listed_by_its_name(client: openai.OpenAI, policy: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == str(policy)
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 40_000
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


def test_what_changes_nothing_is_ignored_and_what_is_unknown_is_logged_once(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    plain = client.completions.create(model="m", prompt="abc", max_tokens=5, temperature=0)
    extra = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logprobs": None, "best_of": None}
    extra |= {"temprature": 2.0, "response_format": {"type": "text"}, "top_k": None, "seed": None}
    for _ in range(2):
        made = client.completions.create(
            model="another", prompt="abc", max_tokens=5, temperature=0, user="me", extra_body=extra
        )
        assert made.choices[0].text == plain.choices[0].text
        assert made.model == "another"
    logged = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert logged == ["ignored an unknown field name='temprature'"]


def test_a_key_a_full_queue_and_an_unknown_path_have_openais_errors(config: Config) -> None:
    with served(config, api_key="secret", max_queued_requests=2) as locked:
        stranger = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        known = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret", max_retries=0)
        assert known.completions.create(model="m", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="at most 2"):
            known.completions.create(model="m", prompt="a", n=3)
        with pytest.raises(openai.NotFoundError):
            known.embeddings.create(model="m", input="a")


def test_a_stream_never_shows_what_a_stop_string_cuts_off(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:23]
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_client_that_closes_its_stream_leaves_nothing_running(client: openai.OpenAI, server: Served) -> None:
    stream = client.completions.create(
        model="m", prompt=PROMPT, max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(iter(stream)).choices
    stream.close()
    server.wait_for(lambda state: state["num_running_reqs"] == 0)


def test_many_at_once_get_what_they_get_alone(client: openai.OpenAI, server: Served) -> None:
    def asked(seed: int) -> dict[str, Any]:
        return {"model": "m", "messages": MESSAGES, "seed": seed, "max_tokens": 20}

    async def together() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:
            made = await asyncio.gather(*(many.chat.completions.create(**asked(seed)) for seed in range(6)))
        return [each.choices[0].message.content for each in made]

    alone = [client.chat.completions.create(**asked(seed)).choices[0].message.content for seed in range(6)]
    assert asyncio.run(together()) == alone
    assert len(set(alone)) == 6
