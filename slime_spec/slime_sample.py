"""A ``Sample`` has the attributes of slime's: functions of a user's own, written for slime, read and write it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar


class Status(enum.Enum):
    """Says how a sample stands; names and values are slime's, whose own statuses are equal to these."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, enum.Enum) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@dataclass
class Sample:
    """Holds a prompt and a response as functions of a user's own see them.

    ``tokens`` are the prompt's and the response's, of which the last ``response_length`` are the response's;
    ``loss_mask`` and ``rollout_log_probs`` have a value for each of these (None: all count; nobody knows).
    """

    group_index: int | None = None
    index: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Any = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0

    Status: ClassVar[type[Status]] = Status

    @property
    def effective_response_length(self) -> int:
        """Return how many tokens of the response count in the loss."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> Any:
        """Return the reward, or the number in a dict that ``args.reward_key`` names."""
        key = getattr(args, "reward_key", None)
        return self.reward[key] if key and isinstance(self.reward, Mapping) else self.reward

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] = (),
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append tokens to the response: a turn's with their logprobs, or others (not ``trainable``) without any.

        Tokens that are not trainable get loss_mask 0 and logprob 0. ``meta_info`` of a turn says how the sample stands.
        Raises ValueError where logprobs and tokens do not fit.
        """
        if tokens and trainable != (log_probs is not None):
            raise ValueError("tokens of a turn have logprobs, and tokens that are not trainable have none")
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(log_probs)} logprobs")
        before = self.response_length
        if before and self.rollout_log_probs is None and trainable and tokens:
            raise ValueError(f"the {before} tokens before these have no logprobs")
        if tokens:
            logprobs = [0.0] * len(tokens) if log_probs is None else [float(each) for each in log_probs]
            self.tokens = [*self.tokens, *tokens]
            self.loss_mask = [*(self.loss_mask or [1] * before), *[int(trainable)] * len(tokens)]
            self.rollout_log_probs = [*(self.rollout_log_probs or [0.0] * before), *logprobs]
            self.response_length = before + len(tokens)
        self.response += text or ""
        if meta_info is not None and update_terminal_info and "finish_reason" in meta_info:
            ended = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
            self.status = ended[meta_info["finish_reason"]["type"]]
            if "weight_version" in meta_info:
                self.weight_versions.append(meta_info["weight_version"])


class Args(SimpleNamespace):
    """Holds the settings by the names of their flags, as slime's ``args`` does: ``args.n_samples_per_prompt``."""

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name.startswith("sglang_router"):
            hint = (
                "; turns are asked of the client: generate(args, sample, sampling_params, client), see docs/agents.md"
            )
        raise AttributeError(f"args has no {name}: no setting of this project has that flag{hint}")
