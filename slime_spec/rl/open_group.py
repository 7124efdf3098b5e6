"""``OpenGroup`` is a prompt's group in progress, over as many steps as it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from slime_spec.partial_samples import request_for_rest, with_siblings
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt


@dataclass
class OpenGroup:
    """Holds a group in progress: ``request`` asks for all of it, ``partials`` are samples cut by an abort, by index.

    ``shares_replies`` says that its finished samples go with the request for the rest of them.
    """

    prompt: Prompt
    request: GroupRequest
    shares_replies: bool = False
    finished: list[GeneratedSample] = field(default_factory=list)
    partials: dict[int, GeneratedSample] = field(default_factory=dict)
    scored: PendingSamples | None = None  # of a complete group

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == len(self.request.seeds)

    def finish(self, response: GeneratedSample) -> None:
        self.partials.pop(response.sample_index, None)
        self.finished.append(response)

    def rest(self) -> GroupRequest:
        """Return the request for the missing samples.

        An abort has left a partial sample, perhaps empty, of each of them.
        """
        if not self.partials:
            return self.request
        rest = request_for_rest(self.request, self.partials.values())
        return with_siblings(rest, self.finished) if self.shares_replies else rest
