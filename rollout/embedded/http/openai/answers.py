"""Answers in OpenAI's form: choices with their texts and logprobs, chunks of a stream, and what a call used.

A choice is written twice in the same way: whole, or as its pieces, which a stream sends as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from rollout.embedded.http.answers import Answer, AnswerWriter, Grown, response_text
from rollout.embedded.http.calls import Call, PromptCall
from rollout.embedded.http.generations import Event, Finished
from rollout.embedded.http.json_io import finite
from rollout.embedded.http.openai.tool_calls import Reply, ToolCall, ToolFormat
from rollout.embedded.logprobs import Ranked
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.sglang.metadata import speculative_keys
from slime_spec.types import GeneratedSample

SPEC_DETAILS = "spec_accept_rate spec_accept_length spec_num_correct_drafts spec_num_proposed_drafts spec_verify_ct"
SPEC_DETAILS += " spec_correct_drafts_histogram"


class ScoredToken(NamedTuple):
    """Holds a token with its logprob, None for a prompt's first, and the likeliest tokens in its place."""

    token_id: int
    logprob: float | None
    ranked: Ranked


class Texts:
    """Gives the texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._text)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)

    def with_bytes(self, token_id: int, logprob: float | None) -> Answer:
        return {
            "token": self.of(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class Form(Protocol):
    """Says how one endpoint writes a choice."""

    whole: str
    chunk: str
    prefix: str

    def choice(self, text: str, calls: Sequence[ToolCall]) -> Answer: ...
    def delta(self, text: str, is_first: bool, calls: Sequence[ToolCall]) -> Answer: ...
    def logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> Answer: ...
    def width(self, tokens: Sequence[ScoredToken]) -> int: ...


class CompletionForm:
    """Writes the choices of /v1/completions."""

    whole = chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def choice(self, text: str, calls: Sequence[ToolCall]) -> Answer:
        return {"text": text}

    def delta(self, text: str, is_first: bool, calls: Sequence[ToolCall]) -> Answer:
        return {"text": text}

    def logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> Answer:
        """Return parallel lists; ``top_logprobs`` has the token itself too, and one of several that look alike."""
        texts = [self._texts.of(token.token_id) for token in tokens]
        starts = [offset]
        for text in texts:
            starts.append(starts[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": starts[:-1],
        }

    def width(self, tokens: Sequence[ScoredToken]) -> int:
        """Return the characters that the tokens' offsets advance by."""
        return sum(len(self._texts.of(token.token_id)) for token in tokens)

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for logprob, token_id in (*token.ranked, (token.logprob, token.token_id)):
            # One number for the token itself in both lists: clients compare them to see what is greedy.
            top.setdefault(self._texts.of(token_id), token.logprob if token_id == token.token_id else logprob)
        return top


class ChatForm:
    """Writes the choices of /v1/chat/completions."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def choice(self, text: str, calls: Sequence[ToolCall]) -> Answer:
        shown = [call.shown() for call in calls]
        content = {"role": "assistant", "content": text or (None if shown else text), "refusal": None}
        return {"message": {**content, "tool_calls": shown or None}}

    def delta(self, text: str, is_first: bool, calls: Sequence[ToolCall]) -> Answer:
        delta: Answer = {"role": "assistant", "content": text} if is_first else {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": index, **call.shown()} for index, call in enumerate(calls)]
        return {"delta": delta}

    def logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> Answer:
        """Return the list of tokens; ``offset`` is no part of it."""
        content = [
            {
                **self._texts.with_bytes(token.token_id, token.logprob),
                "top_logprobs": [self._texts.with_bytes(token_id, logprob) for logprob, token_id in token.ranked],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def width(self, tokens: Sequence[ScoredToken]) -> int:
        return 0


@dataclass(frozen=True)
class Asked:
    """Holds a call with what its answers need: when it came (seconds of the epoch), and what they shall show.

    ``echoes`` are the texts with which each prompt's choices begin; by ``tool_format`` calls are read out of replies.
    """

    call: Call
    form: Form
    model: str
    created_s: int
    echoes: tuple[str, ...] | None = None
    tool_format: ToolFormat | None = None
    token_ids: bool = False
    spec_details: bool = False
    usage_in_stream: bool = False


class OpenAIAnswers:
    """Writes the answers of one call, whole or chunk by chunk."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, writer: AnswerWriter) -> None:
        self._asked, self._tokenizer, self._writer = asked, tokenizer, writer
        self._grown: dict[int, Grown] = {}
        # Of each choice, what its client has: characters, tokens, and characters of tokens with logprobs.
        self._sent: dict[int, tuple[int, int, int]] = {}
        self._finished: list[Finished] = []

    def whole(self, finished: Sequence[Finished]) -> Answer:
        """Return the answer of a call whose samples are all finished."""
        choices = []
        for event in finished:
            prompt, sample = self._prompt(event.prompt), self._shown(event)
            start = self._echo(event.prompt)
            reply = self._reply(response_text(self._tokenizer, sample, prompt.sampling), sample)
            choice = self._asked.form.choice(start + reply.text, reply.calls)
            choices.append(self._choice(event.prompt, choice, sample, reply))
        head = self._head(self._asked.form.whole, choices)
        return {**head, "usage": self._usage(finished), **self._details(finished)}

    def chunks(self, event: Event) -> list[Answer]:
        """Return the chunks that an event adds to a stream."""
        if isinstance(event, Finished):
            self._finished.append(event)
            prompt, sample = self._prompt(event.prompt), self._shown(event)
            text = response_text(self._tokenizer, sample, prompt.sampling)
            return self._pieces(event.prompt, sample.sample_index, text, sample, sample.token_ids, sample.logprobs)
        sample_index, prompt = event.progress.sample_index, self._prompt(event.prompt)
        if prompt.sampling.prefill_only:
            return []
        place = self._place(event.prompt, sample_index)
        if place not in self._grown:
            self._grown[place] = Grown(sample_index, self._writer.growing(prompt))
        grown = self._grown[place]
        grown.add(event.progress)
        return self._pieces(event.prompt, sample_index, grown.text, None, grown.token_ids, grown.logprobs)

    def last(self) -> list[Answer]:
        """Return the chunk of the whole call's usage, where it is asked for."""
        if not self._asked.usage_in_stream:
            return []
        return [{**self._head(self._asked.form.chunk, []), "usage": self._usage(self._finished)}]

    def _pieces(
        self,
        prompt_index: int,
        sample_index: int,
        text: str,
        sample: GeneratedSample | None,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
    ) -> list[Answer]:
        """Return the chunk with what is new of a choice, if anything is; ``sample`` is there when it is finished."""
        form, prompt = self._asked.form, self._prompt(prompt_index)
        place = self._place(prompt_index, sample_index)
        is_first = place not in self._sent
        num_chars, num_tokens, offset = self._sent.get(place, (0, 0, 0))
        echo = self._echo(prompt_index)
        reply = self._reply(text, sample)
        added = (echo if is_first else "") + reply.text[num_chars:]
        has_news = added or sample is not None or (prompt.return_logprob and len(token_ids) > num_tokens)
        if not has_news:
            return []
        fields: Answer = {
            **form.delta(added, is_first, reply.calls),
            "index": place,
            "logprobs": None,
            "finish_reason": None,
        }
        if prompt.return_logprob:
            tokens = self._scored(prompt, sample_index, token_ids, logprobs, num_tokens)
            if is_first and self._asked.echoes is not None:
                tokens = [*self._scored_prompt(prompt), *tokens]
            fields["logprobs"] = form.logprobs(tokens, offset)
            offset += form.width(tokens)
        self._sent[place] = len(reply.text), len(token_ids), offset
        if self._asked.token_ids:
            fields["token_ids"] = list(token_ids[num_tokens:])
        if sample is not None:
            fields |= _ending(sample, reply)
        return [self._head(form.chunk, [fields])]

    def _reply(self, text: str, sample: GeneratedSample | None) -> Reply:
        """Return text and calls of a reply; of a reply that grows, the text that is certain to be text."""
        if (tool_format := self._asked.tool_format) is None:
            return Reply(text)
        return Reply(tool_format.visible(text)) if sample is None else tool_format.read(text)

    def _choice(self, prompt_index: int, choice: Answer, sample: GeneratedSample, reply: Reply) -> Answer:
        prompt, logprobs = self._prompt(prompt_index), None
        if prompt.return_logprob:
            of_prompt = [] if self._asked.echoes is None else self._scored_prompt(prompt)
            of_sample = self._scored(prompt, sample.sample_index, sample.token_ids, sample.logprobs, 0)
            logprobs = self._asked.form.logprobs([*of_prompt, *of_sample], 0)
        index = self._place(prompt_index, sample.sample_index)
        made = {"index": index, **choice, "logprobs": logprobs, **_ending(sample, reply)}
        if self._asked.token_ids:
            made["prompt_token_ids"] = list(prompt.request.prompt_token_ids)
            made["token_ids"] = list(sample.token_ids)
        return made

    def _scored(
        self, prompt: PromptCall, sample_index: int, token_ids: Sequence[int], logprobs: Sequence[float], start: int
    ) -> list[ScoredToken]:
        """Return the response's tokens from ``start`` on."""
        record, new = prompt.record, slice(start, len(token_ids))
        ranked: Sequence[Ranked] = [()] * len(token_ids[new])
        if record is not None and record.wanted.num_ranked:
            ranked = [each.ranked for each in record.beside[sample_index][new]]
        return list(map(ScoredToken, token_ids[new], logprobs[new], ranked))

    def _scored_prompt(self, prompt: PromptCall) -> list[ScoredToken]:
        first, *rest = prompt.request.prompt_token_ids
        if (record := prompt.record) is None:
            return []
        scored = map(ScoredToken, rest, map(finite, record.prompt), record.prompt_ranked)
        return [ScoredToken(first, None, ()), *scored]

    def _echo(self, prompt: int) -> str:
        return "" if self._asked.echoes is None else self._asked.echoes[prompt]

    def _head(self, kind: str, choices: list[Answer]) -> Answer:
        asked = self._asked
        return {
            "id": asked.form.prefix + asked.call.rid,
            "object": kind,
            "created": asked.created_s,
            "model": asked.model,
            "choices": choices,
        }

    def _usage(self, finished: Iterable[Finished]) -> Answer:
        """Count tokens; a prompt counts once, and drafted tokens are OpenAI's predictions, accepted or not."""
        samples = [(event.prompt, self._shown(event)) for event in finished]
        prompts = {index: sample.num_prompt_tokens for index, sample in samples}
        cached = {index: min(each.cached_tokens for at, each in samples if at == index) for index in prompts}
        num_prompt, num_new = sum(prompts.values()), sum(len(sample.token_ids) for _, sample in samples)
        num_drafted = sum(sample.spec.num_drafted for _, sample in samples)
        num_accepted = sum(sample.spec.num_correct for _, sample in samples)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens_details": {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": max(0, num_drafted - num_accepted),
            },
        }

    def _details(self, finished: Iterable[Finished]) -> Answer:
        """Return SGLang's details of speculation, one object a choice."""
        if not self._asked.spec_details:
            return {}
        details = []
        for sample in map(self._shown, finished):
            keys = speculative_keys(sample.spec, len(sample.token_ids))
            details.append({name: keys[name] for name in SPEC_DETAILS.split() if name in keys})
        return {"sglext": {"spec_tokens_details": details[0] if len(details) == 1 else details}}

    def _prompt(self, index: int) -> PromptCall:
        return self._asked.call.prompts[index]

    def _shown(self, event: Finished) -> GeneratedSample:
        return self._prompt(event.prompt).shown(event.sample)

    def _place(self, prompt: int, sample_index: int) -> int:
        """Return the index of a choice: the samples of a prompt stand side by side."""
        return prompt * self._asked.call.prompts[0].sampling.num_samples + sample_index


def _ending(sample: GeneratedSample, reply: Reply) -> dict[str, Any]:
    ends_with_calls = reply.calls and sample.finish_reason == "stop"
    return {
        "finish_reason": "tool_calls" if ends_with_calls else sample.finish_reason,
        "matched_stop": sample.matched_stop,
    }
