"""A prompt's group while it is in progress, over as many steps as it takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample


@dataclass
class OpenGroup:
    """``request`` asks for the whole group; ``begun`` are the parts of samples that an abort left, by their index."""

    prompt: Prompt
    request: GroupRequest
    finished: list[Sample] = field(default_factory=list)
    begun: dict[int, GeneratedSample] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == len(self.request.seeds)

    def finish(self, sample: Sample) -> None:
        self.begun.pop(sample.response.sample_index, None)
        self.finished.append(sample)

    def rest(self) -> GroupRequest:
        """The request for what is missing; an abort has left a part, if an empty one, of every sample of that."""
        if not self.begun:
            return self.request
        indices = sorted(self.begun)
        return replace(
            self.request,
            seeds=tuple(self.request.seeds[index] for index in indices),
            begun=tuple(self.begun[index] for index in indices),
        )
