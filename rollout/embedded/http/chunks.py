"""The chunks of one streamed call."""

from __future__ import annotations

from rollout.embedded.http.answers import Answer, AnswerWriter, Grown
from rollout.embedded.http.calls import Call
from rollout.embedded.http.generations import Finished, NewTokens


class Chunks:
    """Turns events into chunks. With ``incremental`` a chunk has only what its sample's last one had not."""

    def __init__(self, call: Call, writer: AnswerWriter, incremental: bool) -> None:
        self._call, self._writer, self._incremental = call, writer, incremental
        self._grown: dict[tuple[int, int], Grown] = {}
        # Per sample: characters and tokens that its client has.
        self._sent: dict[tuple[int, int], tuple[int, int]] = {}

    def gained(self, event: NewTokens) -> Answer | None:
        """The chunk for new tokens; None while fewer than ``stream_interval`` of them have gathered."""
        place, prompt = (event.prompt, event.progress.sample_index), self._call.prompts[event.prompt]
        if place not in self._grown:
            self._grown[place] = Grown(event.progress.sample_index, self._writer.growing(prompt))
        grown = self._grown[place]
        grown.add(event.progress)
        _, num_sent = self._sent.get(place, (0, 0))
        if len(grown.token_ids) - num_sent < prompt.sampling.stream_interval:
            return None
        return self._marked(place, self._writer.partial(self._call, prompt, grown))

    def last(self, event: Finished, answer: Answer) -> Answer:
        """The chunk of a finished sample."""
        return self._marked((event.prompt, event.sample.sample_index), answer)

    def _marked(self, place: tuple[int, int], answer: Answer) -> Answer:
        num_chars, num_tokens = self._sent.get(place, (0, 0))
        self._sent[place] = len(answer["text"]), len(answer["output_ids"])
        if self._incremental:
            info = answer["meta_info"]
            answer = {**answer, "text": answer["text"][num_chars:], "output_ids": answer["output_ids"][num_tokens:]}
            if "output_token_logprobs" in info:
                answer["meta_info"] = {**info, "output_token_logprobs": info["output_token_logprobs"][num_tokens:]}
        if self._call.is_list:
            prompt, sample_index = place
            answer["index"] = prompt * self._call.prompts[0].sampling.num_samples + sample_index
        return answer
