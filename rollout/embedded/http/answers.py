"""This module writes answers of POST /generate in SGLang's form: a response's text, whole answers, stream chunks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from rollout.embedded.http.calls import Call, PromptCall
from rollout.embedded.http.generations import Finished, NewTokens
from rollout.embedded.http.json_io import finite
from rollout.embedded.http.sampling import Sampling
from rollout.embedded.http.serving import VersionNames
from rollout.embedded.logprobs import Beside
from rollout.embedded.request import Progress
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.sglang.metadata import aux_info, meta_info
from slime_spec.types import GeneratedSample

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character
PER_TOKEN = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
Answer = dict[str, Any]
"""``{"text": ..., "output_ids": [...], "meta_info": {...}}``"""


def response_text(tokenizer: Tokenizer, sample: GeneratedSample, sampling: Sampling) -> str:
    """Return the response without what ended it: the stop token is not decoded, the text is cut at the stop string.

    ``no_stop_trim`` keeps the token, and the stop string itself. Token ids are never cut.
    """
    matched = sample.matched_stop
    token_ids = sample.token_ids
    if isinstance(matched, int) and sampling.trim_stop:
        token_ids = token_ids[:-1]
    text = tokenizer.decode(token_ids, skip_special=sampling.skip_special_tokens)
    if isinstance(matched, str) and (found := text.find(matched)) >= 0:
        text = text[: found if sampling.trim_stop else found + len(matched)]
    return text


class StopMatch:
    """Follows how much of a stop string a growing text ends with, at constant cost a character (Knuth, Morris, Pratt).

    Example: after ``find("xaab")`` a match of "aabaac" has ``length`` 3.
    """

    def __init__(self, stop: str) -> None:
        self._stop, self._borders = stop, borders(stop)
        self.length = 0

    def find(self, added: str) -> int | None:
        """Take more text; returns how many of its characters end the first whole stop string, None if none is whole."""
        for index, char in enumerate(added):
            while self.length and self._stop[self.length] != char:
                self.length = self._borders[self.length - 1]
            self.length += self._stop[self.length] == char
            if self.length == len(self._stop):
                return index + 1
        return None


@lru_cache(maxsize=1024)  # the samples of a request have the same stop strings
def borders(stop: str) -> tuple[int, ...]:
    """Return, for each prefix of ``stop``, the length of its longest proper prefix that it also ends with."""
    lengths, length = [0], 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = lengths[length - 1]
        length += stop[length] == char
        lengths.append(length)
    return tuple(lengths)


class GrowingText:
    """Decodes a response that is being generated: text that it holds back may still change, text that it shows may not.

    Held back are the first bytes of an unfinished character and whatever may become a stop string that will be cut.
    The text of the token that ends a response is cut too: of a stop token, or one of ``eos_token_ids``.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._sampling = tokenizer, sampling
        self._cut = (sampling.stop_token_ids, eos_token_ids) if sampling.trim_stop else ()
        self._token_ids: list[int] = []
        self._text = ""
        self._stops = [StopMatch(stop) for stop in (sampling.params.stop if sampling.trim_stop else ())]
        self._stop_at: int | None = None  # where the text will be cut
        # Tokens from _context on are decoded again with each addition, those before _settled are part of _text; the
        # context lets a decoder that treats the first token of a text differently see that it is not the first.
        self._context = self._settled = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; the text that is settled so far."""
        self._token_ids.extend(token for token in token_ids if not any(token in enders for enders in self._cut))
        before = self._decode(self._context, self._settled)
        after = self._decode(self._context, len(self._token_ids))
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._find_stop(after[len(before) :])
            self._text += after[len(before) :]
            self._context, self._settled = self._settled, len(self._token_ids)
        return self._text[: len(self._text) - self._held_back()]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special=self._sampling.skip_special_tokens)

    def _find_stop(self, added: str) -> None:
        """Look for the stop string that begins first, in the text and what is added to it."""
        if self._stop_at is None:
            ends = [(stop, stop.find(added)) for stop in self._stops]
            starts = [len(self._text) + end - stop.length for stop, end in ends if end is not None]
            self._stop_at = min(starts, default=None)

    def _held_back(self) -> int:
        """Return how many characters at the end may begin a stop string, or belong to one already."""
        if self._stop_at is not None:
            return len(self._text) - self._stop_at
        return max((stop.length for stop in self._stops), default=0)


class AnswerWriter:
    """Writes one server's answers; ``eos_token_ids`` end every response that does not ignore them."""

    def __init__(self, tokenizer: Tokenizer, versions: VersionNames, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._versions, self._eos_token_ids = tokenizer, versions, eos_token_ids

    def finished(self, call: Call, prompt: PromptCall, sample: GeneratedSample) -> Answer:
        """Return a finished sample."""
        sample = prompt.shown(sample)
        info = meta_info(sample)
        spans = self._versions.spans(sample)
        info |= {
            "id": sample_id(prompt, sample.sample_index),
            "weight_version": spans[-1]["version"],  # as SGLang: the version of the last token
            "weight_versions": spans,
        }
        for name in ("output_token_logprobs", "weight_version_spans"):  # written below, and above
            info.pop(name, None)
        if prompt.return_logprob:
            info |= self._logprobs(call, prompt, sample.sample_index, sample.logprobs, sample.token_ids)
        if prompt.record is not None and sample.token_ids:
            beside = prompt.record.beside[sample.sample_index][: len(sample.token_ids)]
            info |= kept_tokens(beside) if prompt.sampling.returns_kept else {}
            info |= sampling_mask(beside) if prompt.return_mask else {}
        text = response_text(self._tokenizer, sample, prompt.sampling)
        answer = {"text": text, "output_ids": list(sample.token_ids), "meta_info": info}
        if call.aux_info:
            answer["aux_info"] = aux_info(sample)
        return self._with_prompt(call, prompt, answer)

    def growing(self, prompt: PromptCall) -> GrowingText:
        eos_token_ids = () if prompt.sampling.params.ignore_eos else self._eos_token_ids
        return GrowingText(self._tokenizer, prompt.sampling, eos_token_ids)

    def partial(self, call: Call, prompt: PromptCall, grown: Grown) -> Answer:
        """Return a sample that is being generated: all of it so far. Its counters come with the last chunk."""
        info = {
            "id": sample_id(prompt, grown.sample_index),
            "finish_reason": None,
            "prompt_tokens": len(prompt.request.prompt_token_ids),
            "completion_tokens": len(grown.token_ids),
            "weight_version": self._versions.current(),
        }
        if prompt.return_logprob:
            info |= self._logprobs(call, prompt, grown.sample_index, grown.logprobs, grown.token_ids)
        answer = {"text": grown.text, "output_ids": list(grown.token_ids), "meta_info": info}
        return self._with_prompt(call, prompt, answer)

    def _logprobs(
        self, call: Call, prompt: PromptCall, sample_index: int, logprobs: Sequence[float], token_ids: Sequence[int]
    ) -> Answer:
        """Return [logprob, token id, text or null] for each token of the response, and of the prompt from its start on.

        The first of the prompt's has no logprob, as with SGLang.
        """
        start, prompt_ids, record = prompt.logprob_start, prompt.request.prompt_token_ids, prompt.record
        beside = [] if record is None else record.beside[sample_index][: len(token_ids)]
        if prompt.sampling.returns_kept:
            logprobs = [each.kept_logprob for each in beside]

        def triples(pairs: Iterable[tuple[float | None, int]]) -> list[list[Any]]:
            return [[logprob, token_id, self._text(call, token_id)] for logprob, token_id in pairs]

        of_response = triples(zip(logprobs, token_ids, strict=True))
        answer: Answer = {
            "input_token_logprobs": [],
            "output_token_logprobs": of_response,
            "output_token_logprobs_length": len(of_response),
        }
        if record is not None and record.of_prompt:
            of_prompt = [None, *map(finite, record.prompt[start:])]
            scored = prompt_ids[start : max(start, len(record.prompt)) + 1]  # all of them, but for an early abort
            answer["input_token_logprobs"] = triples(zip(of_prompt, scored, strict=True))
        if record is not None and record.wanted.num_ranked:
            of_prompt_ranked = [None, *map(triples, record.prompt_ranked[start:])] if record.of_prompt else []
            answer["output_top_logprobs"] = [triples(each.ranked) for each in beside]
            answer["input_top_logprobs"] = of_prompt_ranked
        if record is not None and (token_ids := record.wanted.token_ids):

            def of_ids(values: Iterable[float]) -> list[list[Any]]:
                return triples(zip(map(finite, values), token_ids, strict=True))

            of_prompt_ids = [None, *map(of_ids, record.prompt_of_ids[start:])] if record.of_prompt else []
            answer["output_token_ids_logprobs"] = [of_ids(each.of_ids) for each in beside]
            answer["input_token_ids_logprobs"] = of_prompt_ids
        return answer

    def _text(self, call: Call, token_id: int) -> str | None:
        return self._tokenizer.decode([token_id], skip_special=False) if call.logprob_text else None

    def _with_prompt(self, call: Call, prompt: PromptCall, answer: Answer) -> Answer:
        if call.prompt_ids:
            answer["prompt_token_ids"] = list(prompt.request.prompt_token_ids)
        return answer


def kept_tokens(beside: Sequence[Beside]) -> Answer:
    """Return the kept token ids of a response, token after token, and where each token's begin, as slime reads them.

    Both are base64 of little-endian 32-bit numbers; there is one offset more than there are tokens.
    """
    offsets = [0, *accumulate(len(each.kept) for each in beside)]
    token_ids = np.concatenate([np.asarray(each.kept, "<i4") for each in beside])
    arrays = {"top_p_token_ids": token_ids, "top_p_token_offsets": np.asarray(offsets, "<i4")}
    return {name: b64encode(each.tobytes()).decode() for name, each in arrays.items()}


def sampling_mask(beside: Sequence[Beside]) -> Answer:
    """Return the same in SGLang's own form: lists of ids, and each token's logprob among those of its place."""
    return {
        "output_token_sampling_mask": [list(each.kept) for each in beside],
        "output_token_sampling_logprobs": [each.kept_logprob for each in beside],
        "output_token_sampling_mask_length": len(beside),
    }


class Grown:
    """Holds one sample's tokens so far, and their settled text."""

    def __init__(self, sample_index: int, text: GrowingText) -> None:
        self.sample_index = sample_index
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self._text = text

    def add(self, progress: Progress) -> None:
        self.token_ids.extend(progress.token_ids)
        self.logprobs.extend(progress.logprobs)
        self.text = self._text.add(progress.token_ids)


def sample_id(prompt: PromptCall, sample_index: int) -> str:
    """Return a sample's id: the request's id where the request has a single sample."""
    return prompt.rid if prompt.sampling.num_samples == 1 else f"{prompt.rid}-{sample_index}"


class Chunks:
    """Turns events into chunks. With ``incremental`` a chunk has only what is new since its sample's last chunk."""

    def __init__(self, call: Call, writer: AnswerWriter, incremental: bool) -> None:
        self._call, self._writer, self._incremental = call, writer, incremental
        self._grown: dict[tuple[int, int], Grown] = {}
        # Per sample: characters and tokens that its client has.
        self._sent: dict[tuple[int, int], tuple[int, int]] = {}

    def gained(self, event: NewTokens) -> Answer | None:
        """Return the chunk for new tokens; None while fewer than ``stream_interval`` of them have gathered."""
        place, prompt = (event.prompt, event.progress.sample_index), self._call.prompts[event.prompt]
        if prompt.sampling.prefill_only:
            return None
        if place not in self._grown:
            self._grown[place] = Grown(event.progress.sample_index, self._writer.growing(prompt))
        grown = self._grown[place]
        grown.add(event.progress)
        _, num_sent = self._sent.get(place, (0, 0))
        if len(grown.token_ids) - num_sent < prompt.sampling.stream_interval:
            return None
        return self._marked(place, self._writer.partial(self._call, prompt, grown))

    def last(self, event: Finished, answer: Answer) -> Answer:
        """Return the chunk of a finished sample."""
        return self._marked((event.prompt, event.sample.sample_index), answer)

    def _marked(self, place: tuple[int, int], answer: Answer) -> Answer:
        num_chars, num_tokens = self._sent.get(place, (0, 0))
        self._sent[place] = len(answer["text"]), len(answer["output_ids"])
        if self._incremental:
            info = answer["meta_info"]
            answer = {**answer, "text": answer["text"][num_chars:], "output_ids": answer["output_ids"][num_tokens:]}
            per_token = [name for name in PER_TOKEN if name in info]
            answer["meta_info"] = {**info, **{name: info[name][num_tokens:] for name in per_token}}
        if self._call.is_list:
            prompt, sample_index = place
            answer["index"] = prompt * self._call.prompts[0].sampling.num_samples + sample_index
        return answer
