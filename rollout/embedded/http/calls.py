"""A reader turns the body of POST /generate into one checked group request per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

from rollout.embedded.http.json_io import LONGEST_NAME, MAX_COUNT, Fields, as_object, is_text, is_whole
from rollout.embedded.http.sampling import UNSERVED_FIELDS, Sampling, check_unserved, read_sampling
from rollout.embedded.logprobs import MOST_RANKED, MOST_TOKEN_IDS, LogprobRecord, Wanted
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import RequestLimits, check_request
from slime_spec.rl.requests import sample_seed
from slime_spec.speculation.request_fields import ADVICE, RTP_OBJECTS, with_rtp_fields
from slime_spec.types import GeneratedSample, GroupRequest, SpecCounters

SERVED = ("text", "input_ids", "sampling_params", "rid", "stream")
LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob")
MASK = "return_sampling_mask"
SHOWN = (MASK, "sampling_logprobs_mode", "return_text_in_logprobs", "return_prompt_token_ids")
# Fields that a client may send and this server does not use: labels, routing, keys of a cache across requests. One
# model is served, whatever its client calls it.
LABELS = ("log_metrics", "no_logs", "session_id", "conversation_id", "custom_labels", "external_trace_header")
ROUTING = ("model", "routing_key", "priority", "extra_key", "cache_salt", "received_time", "http_worker_ipc")
AUX_INFO = "aux_info"  # RTP-LLM's; it may stand in one of the objects too
RTP_PREFIX = "extra_config."
KNOWN = frozenset((*SERVED, *LOGPROBS, *SHOWN, AUX_INFO, *RTP_OBJECTS, *LABELS, *ROUTING, *UNSERVED_FIELDS))


@dataclass(frozen=True)
class PromptCall:
    """Holds one prompt of a call: its request to the engine, and how its answers are written.

    ``record`` is there where something is wanted that samples do not have: logprobs of the prompt from
    ``logprob_start`` on, or what is beside each token.
    """

    rid: str
    request: GroupRequest
    sampling: Sampling
    return_logprob: bool
    return_mask: bool
    logprob_start: int
    record: LogprobRecord | None

    def shown(self, sample: GeneratedSample) -> GeneratedSample:
        """Return the sample as its client sees it."""
        if not self.sampling.prefill_only:
            return sample
        nothing = replace(sample, token_ids=(), logprobs=(), version_spans=(), spec=SpecCounters())
        return (
            nothing if sample.finish_reason == "abort" else replace(nothing, finish_reason="length", matched_stop=None)
        )


@dataclass(frozen=True)
class Call:
    """Holds one POST /generate; ``is_list``: the answer is a list, of a batch or of several samples of one prompt."""

    prompts: tuple[PromptCall, ...]
    rid: str
    is_list: bool
    stream: bool
    logprob_text: bool
    prompt_ids: bool
    aux_info: bool


class CallReader:
    """Reads bodies; seeds that no client gave derive from the server's seed and a counter of prompts.

    A call has at most ``max_samples`` prompts times samples.
    """

    def __init__(self, limits: RequestLimits, tokenizer: Tokenizer, server_seed: int, max_samples: int) -> None:
        self._limits, self._tokenizer, self._server_seed = limits, tokenizer, server_seed
        self._max_samples = max_samples
        self.longest_text_bytes = limits.context_length * tokenizer.longest_token_bytes
        self._unseeded = count(1)  # read from two threads

    def read(self, body: object) -> Call:
        """Read a call's body; raises ConfigError naming the field for whatever can never run."""
        data = as_object(body, "body")
        fields = Fields(data)
        fields.check_names(KNOWN)
        check_unserved(data, UNSERVED_FIELDS)
        prompts, is_batch = self._prompts(fields)
        rtp = _rtp_objects(fields, len(prompts))
        sampling = self._sampling(fields, prompts, rtp)
        rid, rids = _rids(fields.raw("rid"), len(prompts), is_batch or sampling[0].num_samples > 1)
        logprobs = _per_prompt(fields, "return_logprob", len(prompts), False)
        starts = _per_prompt(fields, "logprob_start_len", len(prompts), -1)
        ranked = _per_prompt(fields, "top_logprobs_num", len(prompts), 0)
        masks = _per_prompt(fields, MASK, len(prompts), False)
        fields.choice("sampling_logprobs_mode", ("selected",), "selected")
        token_ids = self._token_ids(fields.raw("token_ids_logprob"), len(prompts))
        calls = tuple(map(self._prompt_call, rids, prompts, sampling, logprobs, starts, ranked, token_ids, masks))
        return Call(
            prompts=calls,
            rid=rid,
            is_list=is_batch or sampling[0].num_samples > 1,
            stream=fields.switch("stream"),
            logprob_text=fields.switch("return_text_in_logprobs"),
            prompt_ids=fields.switch("return_prompt_token_ids"),
            aux_info=fields.switch(AUX_INFO) or any(each.get(AUX_INFO) is True for each in rtp),
        )

    def _prompt_call(
        self,
        rid: str,
        prompt: tuple[int, ...],
        sampling: Sampling,
        return_logprob: object,
        logprob_start: object,
        top_logprobs_num: object,
        token_ids: tuple[int, ...],
        return_mask: object,
    ) -> PromptCall:
        returns_logprob, returns_mask = _switch("return_logprob", return_logprob), _switch(MASK, return_mask)
        start = _whole("logprob_start_len", logprob_start, -1, len(prompt))
        num_ranked = _whole("top_logprobs_num", top_logprobs_num, 0, MOST_RANKED)
        of_prompt = returns_logprob and 0 <= start < len(prompt)
        of_logprobs = (num_ranked, token_ids) if returns_logprob else (0, ())
        wanted = Wanted(*of_logprobs, kept=sampling.returns_kept or returns_mask)
        seeds = tuple(self._seeds(sampling))
        request = GroupRequest(rid, prompt, seeds, sampling.params)
        try:
            check_request(request, self._limits)
        except ConfigError as error:
            raise _in_clients_words(error) from None
        return PromptCall(
            rid=rid,
            request=request,
            sampling=sampling,
            return_logprob=returns_logprob,
            return_mask=returns_mask,
            logprob_start=start if of_prompt else len(prompt),
            record=LogprobRecord(wanted, of_prompt) if wanted or of_prompt else None,
        )

    def _token_ids(self, value: object, count: int) -> list[tuple[int, ...]]:
        """Return, for each prompt, the tokens whose logprobs are wanted; the field is one list for all, or one each."""
        if not value:
            return [()] * count
        lists = value if isinstance(value, list) and not any(map(is_whole, value)) else [value] * count
        if len(lists) != count:
            rule = f"must have one list for each of the {count} prompts"
            raise ConfigError("token_ids_logprob", rule, value, "Send one list of token ids for all.")
        return [self._of_vocabulary(each) for each in lists]

    def _of_vocabulary(self, token_ids: Any) -> tuple[int, ...]:
        if token_ids is None:
            return ()
        most, vocabulary = MOST_TOKEN_IDS, range(self._limits.vocab_size)
        is_short_list = isinstance(token_ids, list) and len(token_ids) <= most
        if not is_short_list or not all(is_whole(each) and each in vocabulary for each in token_ids):
            rule = f"must be at most {most} token ids from 0 to {vocabulary[-1]}"
            raise ConfigError("token_ids_logprob", rule, token_ids, "Correct it or leave it out.")
        return tuple(token_ids)

    def _prompts(self, fields: Fields) -> tuple[list[tuple[int, ...]], bool]:
        """Return the prompts' token ids, and whether the client sent a list of prompts."""
        text, ids = fields.raw("text"), fields.raw("input_ids")
        if (text is None) == (ids is None):
            raise ConfigError(
                "text", "a request has either text or input_ids", text, "Send one of them, a prompt or a list of them."
            )
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not (isinstance(texts, list) and texts and all(map(is_text, texts))):
                raise ConfigError("text", "must be a text or a list of texts", text, "Send at least one prompt.")
            self._check_samples("text", len(texts), 1)
            if any(len(each.encode()) > self.longest_text_bytes for each in texts):
                rule = f"must have at most {self.longest_text_bytes} bytes: more cannot fit in the context"
                raise ConfigError("text", rule, text, "Shorten the prompt.")
            return [self._tokenizer.encode(each) for each in texts], not isinstance(text, str)
        lists = [ids] if isinstance(ids, list) and all(map(is_whole, ids)) else ids
        if not (isinstance(lists, list) and all(isinstance(each, list) for each in lists)):
            raise ConfigError(
                "input_ids", "must be a list of token ids or a list of such lists", ids, "Send [1, 2, 3]."
            )
        self._check_samples("input_ids", len(lists), 1)
        if not all(map(is_whole, (token for each in lists for token in each))):
            raise ConfigError("input_ids", "must hold whole numbers", ids, "Send the ids of the tokenizer.")
        return [tuple(each) for each in lists], lists is ids

    def _sampling(
        self, fields: Fields, prompts: Sequence[tuple[int, ...]], rtp: Sequence[Mapping[str, Any]]
    ) -> list[Sampling]:
        given = _per_prompt(fields, "sampling_params", len(prompts), {})
        # Read once where one object stands for all prompts; only what "as many as fit" means depends on the prompt.
        read: dict[tuple[int, int, int], Sampling] = {}
        sampling = []
        for each, prompt, extra in zip(given, prompts, rtp, strict=True):
            data = as_object(each, "sampling_params")
            key = id(data), id(extra), len(prompt) if data.get("max_new_tokens", 1) is None else 0
            if key not in read:
                read[key] = self._with_rtp(read_sampling(data, self._limits, len(prompt)), extra)
            sampling.append(read[key])
        if len(counts := {each.num_samples for each in sampling}) > 1:
            raise ConfigError(
                "sampling_params.n",
                "must be the same for every prompt of a batch",
                sorted(counts),
                "Send two requests.",
            )
        self._check_samples("sampling_params.n", len(prompts), sampling[0].num_samples)
        return sampling

    def _check_samples(self, name: str, num_prompts: int, num_samples: int) -> None:
        if num_prompts * num_samples > self._max_samples:
            rule = f"prompts times samples must be at most {self._max_samples}"
            raise ConfigError(name, rule, num_prompts * num_samples, "Send several requests, or serve a longer queue.")

    def _with_rtp(self, sampling: Sampling, extra: Mapping[str, Any]) -> Sampling:
        """Add the params that a request sets under RTP-LLM's names."""
        speculative = {name: value for name, value in extra.items() if name != AUX_INFO}
        Fields(speculative, RTP_PREFIX).text(ADVICE, longest=MAX_COUNT)
        encode = partial(self._tokenizer.encode, special=False)
        params = with_rtp_fields(sampling.params, speculative, encode, RTP_PREFIX)
        return replace(sampling, params=params)

    def _seeds(self, sampling: Sampling) -> Iterator[int]:
        """Yield one seed per sample; the first of a seeded prompt is the client's own."""
        if sampling.seed is None:
            base, number = self._server_seed, next(self._unseeded)
            yield from (sample_seed(base, number, index) for index in range(sampling.num_samples))
            return
        yield sampling.seed
        yield from (sample_seed(sampling.seed, 0, index) for index in range(1, sampling.num_samples))


def _rtp_objects(fields: Fields, count: int) -> list[Mapping[str, Any]]:
    """Return, for each prompt, the objects in which RTP-LLM's clients send what concerns it, as one."""
    merged: dict[tuple[int, ...], Mapping[str, Any]] = {}
    rtp = []
    for objects in zip(*(_per_prompt(fields, name, count, {}) for name in RTP_OBJECTS), strict=True):
        key = tuple(map(id, objects))
        if key not in merged:
            merged[key] = {name: value for each in objects for name, value in as_object(each, RTP_PREFIX[:-1]).items()}
        rtp.append(merged[key])
    return rtp


def _per_prompt(fields: Fields, name: str, count: int, default: Any) -> list[Any]:
    """Return the field's value for each prompt; the field is one value for all prompts, or a list."""
    value = fields.raw(name)
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if len(value) != count:
        raise ConfigError(name, f"must have one entry for each of the {count} prompts", value, "Send one for all.")
    return [default if each is None else each for each in value]


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(name, "must be true or false", value, "Correct it or leave it out.")
    return value


def _whole(name: str, value: object, minimum: int, maximum: int) -> int:
    if not (isinstance(value, int) and is_whole(value) and minimum <= value <= maximum):
        rule = f"must be a whole number from {minimum} to {maximum}"
        raise ConfigError(name, rule, value, "Correct it or leave it out.")
    return value


def _rids(value: object, count: int, is_list: bool) -> tuple[str, list[str]]:
    """Return the call's own id and each prompt's: ``"a"`` for a batch of two is ``a_0`` and ``a_1``."""
    if isinstance(value, list):
        if len(value) != count or not all(map(_is_rid, value)):
            raise ConfigError("rid", f"must be one text for each of the {count} prompts", value, "Leave it out.")
        if len(set(value)) != count:
            raise ConfigError("rid", "must not hold the same id twice", value, "Give each prompt its own.")
        return uuid4().hex, value
    if value is not None and not _is_rid(value):
        raise ConfigError("rid", f"must be a text of 1 to {LONGEST_NAME} characters", value, "Leave it out.")
    rid = value if isinstance(value, str) else uuid4().hex
    return rid, [f"{rid}_{index}" for index in range(count)] if is_list else [rid]


def _is_rid(value: object) -> bool:
    return isinstance(value, str) and is_text(value) and 0 < len(value) <= LONGEST_NAME


def _in_clients_words(error: ConfigError) -> ConfigError:
    """Return an error about a request's setting under the name that the client sent."""
    node, _, name = error.setting.partition(".")
    setting = f"sampling_params.{name}" if node == "rollout" else error.setting
    return ConfigError(setting, error.rule, error.value, error.remedy)
