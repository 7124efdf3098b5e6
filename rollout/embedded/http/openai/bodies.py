"""These models describe the bodies of OpenAI's endpoints; a body becomes the body of POST /generate that asks the same.

``null`` means the default, as it does for SGLang. Fields that SGLang knows beside OpenAI's are read too; fields that
nobody serves are refused with the reason, and fields that change nothing here, or are unknown, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout.embedded.http.calls import MASK
from rollout.embedded.http.json_io import as_object
from rollout.embedded.http.sampling import UNSERVED_FIELDS, UNSERVED_PARAMETERS, check_unserved
from rollout.embedded.logprobs import MOST_RANKED
from slime_spec.errors import ConfigError

MAY_NOT_CALL = "a model cannot be held to calling a tool here, for constrained decoding is not served"
UNSERVED: Mapping[str, str] = {
    **UNSERVED_FIELDS,
    **UNSERVED_PARAMETERS,
    **dict.fromkeys(("custom_params", "token_ids_logprob", MASK, "sampling_logprobs_mode"), "send it to /generate"),
    "response_format": "constrained decoding is not served",
    "suffix": "models are not asked to fill in text",
    "functions": "send tools",
    "function_call": "send tools",
    "audio": "this engine reads and writes text only",
    "modalities": "this engine reads and writes text only",
    "web_search_options": "this server reaches for nothing outside",
    "continue_final_message": "a reply begins where the chat template says",
}
NOTHING: Mapping[str, Any] = {"response_format": {"type": "text"}, "modalities": ["text"], "function_call": "none"}
# Names of POST /generate, and the names by which OpenAI's clients know them.
CLIENTS_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
CLIENTS_NAMES |= {"text": "prompt", "input_ids": "prompt", "top_logprobs_num": "logprobs"}
Count = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """Says what a stream has besides its choices."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="end the stream with a chunk of the whole call's usage")


class Prediction(BaseModel):
    """Holds a text that the reply will resemble, or parts of text."""

    model_config = ConfigDict(strict=True)

    type: Literal["content"] = "content"
    content: str | list[dict[str, Any]]


class OpenAIBody(BaseModel):
    """Holds what completions and chat completions have in common."""

    model_config = ConfigDict(strict=True, extra="allow")
    SAME: ClassVar[tuple[str, ...]] = (
        *("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "logit_bias", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "no_stop_trim", "skip_special_tokens"),
    )

    model: str | None = Field(None, description="any name is taken: one model is served")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # SGLang's
    rid: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: Count | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = Field(None, description="add prompt_token_ids and token_ids to each choice")
    return_spec_tokens_details: bool | None = Field(None, description="add sglext.spec_tokens_details")

    @classmethod
    def read(cls, body: object) -> Self:
        """Read a body; raises ConfigError naming the field."""
        data = as_object(body, "body")
        asked = {name: value for name, value in data.items() if value != NOTHING.get(name)}
        check_unserved(asked, {name: reason for name, reason in UNSERVED.items() if name not in cls.model_fields})
        try:
            made = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(map(str, first["loc"][:3])) or "body"
            raise ConfigError(name, first["msg"], first["input"], "Correct it or leave it out.") from None
        made.check()
        return made

    def check(self) -> None:
        """Raise ConfigError for fields that do not go together."""

    @property
    def ignored(self) -> list[str]:
        """Return the names of the fields that nobody here knows, and that ask for something."""
        asked = {name for name, value in (self.model_extra or {}).items() if value is not None}
        return sorted(asked - UNSERVED.keys())

    @property
    def num_ranked(self) -> int | None:
        """Return how many of the likeliest tokens are wanted; None without logprobs."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        return False

    def generate_body(self) -> dict[str, Any]:
        """Return the body of POST /generate, but for the prompt and the length."""
        params: dict[str, Any] = {name: getattr(self, name) for name in self.SAME}
        params |= {"sampling_seed": self.seed, "min_new_tokens": self.min_tokens}
        return {
            "sampling_params": params,
            "stream": self.stream,
            "rid": self.rid,
            "return_logprob": self.num_ranked is not None,
            "top_logprobs_num": self.num_ranked,
            "logprob_start_len": 0 if self.echoes else -1,
        }


class CompletionBody(OpenAIBody):
    """Asks to go on with texts, or lists of token ids."""

    prompt: Annotated[
        Any, Field(description="a text, a list of texts, token ids, or a list of lists of them", examples=["2 + 3 ="])
    ]
    max_tokens: Count | None = Field(None, description="default 16; 0 with echo scores the prompt alone")
    echo: bool | None = Field(None, description="begin each choice with its prompt; with logprobs, those of it too")
    logprobs: int | None = Field(None, ge=0, le=MOST_RANKED, description="add this many of the likeliest tokens")
    best_of: int | None = Field(None, description="n, or left out")

    def check(self) -> None:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ConfigError("best_of", "must be n: every sample is returned", self.best_of, "Leave it out.")

    @property
    def num_ranked(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    def generate_body(self) -> dict[str, Any]:
        body, prompt = super().generate_body(), self.prompt
        body["sampling_params"]["max_new_tokens"] = 16 if self.max_tokens is None else self.max_tokens
        parts = prompt if isinstance(prompt, list) else [prompt]
        is_text = any(isinstance(each, str) for each in parts)
        return {**body, "text" if is_text else "input_ids": prompt}


class ChatBody(OpenAIBody):
    """Asks for the next turn of a chat."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = Field(None, description="default: as many as the context holds")
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens, which it goes before")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_RANKED)
    tools: list[dict[str, Any]] | None = Field(None, description="shown to the chat template")
    tool_choice: str | dict[str, Any] | None = Field(None, description="auto, or none: the template sees no tools")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further values of the chat template")
    reasoning_effort: str | float | None = Field(None, description="a value of the chat template")
    prediction: Prediction | None = Field(None, description="the reply will resemble it: to draft from")

    def check(self) -> None:
        if self.tool_choice not in (None, "none", "auto"):
            rule = f"must be none or auto: {MAY_NOT_CALL}"
            raise ConfigError("tool_choice", rule, self.tool_choice, "Leave it out.")
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs", "needs logprobs", self.top_logprobs, "Send logprobs: true.")

    @property
    def num_ranked(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def template_values(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools or []

    def generate_body(self) -> dict[str, Any]:
        body = super().generate_body()
        params = body["sampling_params"]
        newer = self.max_completion_tokens
        params["max_new_tokens"] = self.max_tokens if newer is None else newer
        if self.shown_tools:  # the marks of a call are special tokens, and whoever reads the text needs them
            params["skip_special_tokens"] = False
        return body


def in_clients_words(error: ConfigError) -> ConfigError:
    """Return an error about POST /generate under the name that OpenAI's client sent."""
    name = error.setting.removeprefix("sampling_params.")
    return ConfigError(CLIENTS_NAMES.get(name, name), error.rule, error.value, error.remedy)
