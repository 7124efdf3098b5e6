"""The core and a drafter talk through this interface: the Drafter protocol and the types of its calls.

    prompts, pass by pass:    prefill(prefills)                    the target has just cached these tokens
    every round:              propose(contexts) ──► drafts         one per speculating sequence
                              verify (target) ──► observe(outcomes) accepted nodes, and the target's features
    rounds without drafts:    observe(outcomes) all the same; catch_up(contexts) where much has piled up
    end or preemption:        forget(request_key); a LearningDrafter is shown finished samples before it
    weights:                  bind(decoder) after every change of the target's; ``weights`` for the drafter's own

A drafter with a network keeps keys and values in a cache of its own, whose rows are the target's: row r of the target's
own store and row r of the drafter's belong to the same sequence, and the batch grows, moves and frees both together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from rollout.embedded.kv_cache import KvCache
from rollout.embedded.model import Decoder
from rollout.embedded.uniforms import Noise
from rollout.embedded.unread import AnyDraft
from slime_spec.speculation.confidence import StopRule
from slime_spec.types import EarlierReply, SamplingParams

# Takes what was built beside the serving weights into use: it swaps references and cannot fail
Swap = Callable[[], None]


class KvRow(NamedTuple):
    """Says in which rows a sequence's keys and values lie at this moment; rows change when other sequences finish.

    ``prefix_row`` is the row of the group's shared prompt in the prefix store, -1 when the prompt is in the row itself.
    """

    row: int
    prefix_row: int = -1
    prefix_len: int = 0


@dataclass(frozen=True)
class FeatureNeed:
    """Names the hidden states of the target that a drafter wants with every prefill and every outcome.

    ``layers`` are target layers (0-based) whose output, the residual stream, is taken before any norm, in the order
    given; ``final`` adds the hidden state after the final norm. Features are concatenated along the last dimension.
    """

    layers: tuple[int, ...] = ()
    final: bool = False

    @property
    def any(self) -> bool:
        return bool(self.layers) or self.final


@dataclass(frozen=True)
class Prefill:
    """Hands over known tokens that the target has just cached at absolute positions ``start ..``, pieces in order.

    ``shared`` says that they are a group's prompt in the prefix store (row ``kv_row.prefix_row``) and ``key`` is the
    prompt's; otherwise they lie in the sequence's own row and ``key`` is the request's. A sequence whose prompt was
    shared, or that was preempted, may be given its generated tokens this way. ``features`` is [tokens, width] in the
    compute dtype, None for a drafter that needs none. ``prompt_key`` is the prompt's in either case.
    """

    key: int
    shared: bool
    kv_row: KvRow
    start: int
    token_ids: tuple[int, ...]
    features: torch.Tensor | None = None
    prompt_key: int = 0


class DraftContext(NamedTuple):
    """Holds all that a drafter may read about one sequence; ``token_ids`` are all committed tokens, prompt first.

    The last token is the root of the round: the target has not cached it yet. A draft may have ``max_draft_tokens``
    nodes and paths of ``max_depth``. ``uniforms[t]`` is the uniform to sample the draft of generated token t with, so
    that the first draft of this round uses ``uniforms[len(token_ids) - num_prompt_tokens]``. ``noise`` is the target's
    own in the races of these tokens. ``earlier`` are whole replies to the same prompt that came with the request,
    oldest first.

    A drafter with texts before its network asks the network for ``network_depth`` tokens at most where it is not None,
    for none where it is 0. ``stop``, where there is one, wants the network's confidence in
    each token, and says where chains end before their depth.

    Drafts that are sampled are drawn at ``draft_temperature`` times the request's own. ``on_first_distribution``, where
    there is one, wants what the first of them was drawn from [vocab]; no other drafter calls it.
    """

    request_key: int
    prompt_key: int
    kv_row: KvRow
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_draft_tokens: int
    max_depth: int
    params: SamplingParams
    uniforms: Sequence[float]
    earlier: Sequence[EarlierReply] = ()
    noise: Noise | None = None
    network_depth: int | None = None
    stop: StopRule | None = None
    draft_temperature: float = 1.0
    on_first_distribution: Callable[[torch.Tensor], None] | None = None


class Outcome(NamedTuple):
    """Reports the result of one sequence's round: ``path`` are the draft's accepted nodes, from the root down.

    A sequence that did not draft has an empty path. ``features`` [1 + accepted, width] belong to the root and the
    accepted nodes: the tokens whose keys and values the target has committed this round. The round also emitted one
    token more, the next round's root. ``num_verified`` is the number of the draft's nodes that were
    verified, None for all.
    """

    request_key: int
    path: tuple[int, ...]
    features: torch.Tensor | None = None
    prompt_key: int = 0
    num_verified: int | None = None


class DraftWeights(Protocol):
    """Holds a drafter's own weights, under the names of their checkpoint format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a push of side "draft" must bring."""

    @property
    def exact(self) -> bool:
        """Return whether ``tensors`` are the loaded ones bit for bit (in the engine's dtype).

        Quantised weights are not.
        """

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Swap:
        """Build what drafts with ``tensors``, already checked against ``shapes``, on any thread.

        Nothing changes before the swap is called; the tensors' memory is not kept.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights in use, read back out of whatever form the drafter keeps them in."""

    def move(self, device: torch.device) -> None:
        """Move the weights in use; only where nothing is packed (CUDA and back)."""


class Drafter(Protocol):
    """Proposes tokens for the target to verify; whatever it proposes, the output's distribution stays the target's."""

    @property
    def needs(self) -> FeatureNeed: ...

    @property
    def cache(self) -> KvCache | None:
        """Return the drafter's own keys and values, rows as the target's; None for a drafter without a network."""

    @property
    def weights(self) -> DraftWeights | None: ...

    def bind(self, decoder: Decoder) -> Swap:
        """Build what the drafter shares with the target's weights, on any thread; nothing changes before the swap.

        The core swaps before the first round and with every change of the target's weights.
        """

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        """Take pieces of different sequences or prompts, all of one pass: all are ``shared``, or none is."""

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[AnyDraft]:
        """Return one draft per context; an empty draft is a plain decode step."""

    def observe(self, outcomes: Sequence[Outcome]) -> None: ...

    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        """Read committed tokens that rounds without drafts have left, without drafting: all but the last round's."""

    def forget(self, request_key: int) -> None:
        """Drop the state of a request that is finished or preempted, or of a prompt that is no longer needed."""


@runtime_checkable
class LearningDrafter(Protocol):
    """Is implemented, besides Drafter, by a drafter that learns from whole replies."""

    def finished(self, prompt_key: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take all tokens of a sample that has finished, prompt first, while others of its group have not.

        A preempted or aborted sample has not finished.
        """

    def ended(self, prompt_key: int) -> None:
        """Drop what was kept for a group: none of its samples is unfinished."""


class WeightlessDrafter:
    """Implements the parts of a drafter that every drafter without a network has in common."""

    needs = FeatureNeed()
    cache: KvCache | None = None
    weights: DraftWeights | None = None

    def bind(self, decoder: Decoder) -> Swap:
        return lambda: None

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        pass

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        pass

    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        pass

    def forget(self, request_key: int) -> None:
        pass
