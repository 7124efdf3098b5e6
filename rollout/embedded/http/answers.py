"""Samples as SGLang writes them: text, output_ids and meta_info, whole or while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.embedded.http.calls import Call, PromptCall
from rollout.embedded.http.text import GrowingText, response_text
from rollout.embedded.http.versions import VersionNames
from rollout.embedded.request import Progress
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.sglang.metadata import aux_info, meta_info
from slime_spec.types import GeneratedSample

Answer = dict[str, Any]
"""``{"text": ..., "output_ids": [...], "meta_info": {...}}``"""


class AnswerWriter:
    """Writes one server's answers; ``eos_token_ids`` end every response that does not ignore them."""

    def __init__(self, tokenizer: Tokenizer, versions: VersionNames, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._versions, self._eos_token_ids = tokenizer, versions, eos_token_ids

    def finished(self, call: Call, prompt: PromptCall, sample: GeneratedSample) -> Answer:
        """A finished sample."""
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
            info |= self._logprobs(call, sample.logprobs, sample.token_ids)
        text = response_text(self._tokenizer, sample, prompt.sampling)
        answer = {"text": text, "output_ids": list(sample.token_ids), "meta_info": info}
        if call.aux_info:
            answer["aux_info"] = aux_info(sample)
        return self._with_prompt(call, prompt, answer)

    def growing(self, prompt: PromptCall) -> GrowingText:
        params = prompt.sampling.params
        enders = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
        return GrowingText(self._tokenizer, prompt.sampling, enders)

    def partial(self, call: Call, prompt: PromptCall, grown: Grown) -> Answer:
        """A sample that is being generated: all of it so far. Its counters come with the last chunk."""
        info = {
            "id": sample_id(prompt, grown.sample_index),
            "finish_reason": None,
            "prompt_tokens": len(prompt.request.prompt_token_ids),
            "completion_tokens": len(grown.token_ids),
            "weight_version": self._versions.current(),
        }
        if prompt.return_logprob:
            info |= self._logprobs(call, grown.logprobs, grown.token_ids)
        answer = {"text": grown.text, "output_ids": list(grown.token_ids), "meta_info": info}
        return self._with_prompt(call, prompt, answer)

    def _logprobs(self, call: Call, logprobs: Sequence[float], token_ids: Sequence[int]) -> Answer:
        """[logprob, token id, text or null] for each token of the response, none for the prompt's."""
        texts: Sequence[str | None] = [None] * len(token_ids)
        if call.logprob_text:
            texts = [self._tokenizer.decode([token_id], skip_special=False) for token_id in token_ids]
        triples = [list(triple) for triple in zip(logprobs, token_ids, texts, strict=True)]
        return {
            "input_token_logprobs": [],
            "output_token_logprobs": triples,
            "output_token_logprobs_length": len(triples),
        }

    def _with_prompt(self, call: Call, prompt: PromptCall, answer: Answer) -> Answer:
        if call.prompt_ids:
            answer["prompt_token_ids"] = list(prompt.request.prompt_token_ids)
        return answer


class Grown:
    """One sample's tokens so far, and what of them is settled text."""

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
    """A single sample goes by its request's id."""
    return prompt.rid if prompt.sampling.num_samples == 1 else f"{prompt.rid}-{sample_index}"
