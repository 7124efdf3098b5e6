"""slime's Sample (slime/utils/types.py, revision 624b824a8) as far as hooks see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass
class SpecInfo:
    """Adds up the oldest names alone, as slime does."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    def add(self, meta_info: dict[str, Any]) -> None:
        for name in ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct"):
            setattr(self, name, getattr(self, name) + meta_info.get(name, 0))
        self.completion_token_num += meta_info.get("completion_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        return dict(self.__dict__)

    @property
    def spec_accept_rate(self) -> float:
        return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

    @property
    def spec_accept_length(self) -> float:
        return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0


@dataclass
class PrefixCacheInfo:
    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    def add(self, meta_info: dict[str, Any]) -> None:
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        return dict(self.__dict__)


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


ENDS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass
class Sample:
    group_index: int | None = None
    index: int | None = None
    prompt: Any = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Any = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    def to_dict(self) -> dict[str, Any]:
        plain = {"status": self.status.value, "spec_info": self.spec_info.to_dict()}
        return {**self.__dict__, **plain, "prefix_cache_info": self.prefix_cache_info.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Sample:
        known = {key: value for key, value in data.items() if key in Sample.__dataclass_fields__}
        infos = {"spec_info": SpecInfo(**data["spec_info"])}
        infos["prefix_cache_info"] = PrefixCacheInfo(**data["prefix_cache_info"])
        sample = Sample(**{**known, **infos, "status": Status(data["status"])})
        for key in data.keys() - known.keys():
            setattr(sample, key, data[key])
        return sample

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Any = None,
        log_probs: Any = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
    ) -> None:
        assert len(tokens) == len(log_probs)
        self.tokens = [*self.tokens, *tokens]
        self.rollout_log_probs = [*(self.rollout_log_probs or []), *log_probs]
        self.response_length += len(tokens)
        self.response += text or ""
        if meta_info is None:
            return
        if getattr(args, "sglang_speculative_algorithm", False):
            self.spec_info.add(meta_info=meta_info)
        self.prefix_cache_info.add(meta_info=meta_info)
        self.weight_versions.append(meta_info["weight_version"])
        self.status = ENDS[meta_info["finish_reason"]["type"]]
