"""These small frozen dataclasses, and nothing else, cross the boundaries between actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slime_spec.routed_experts import RoutedExperts
from slime_spec.speculation.cost_table import CostTable
from slime_spec.speculation.net_benefit import NetBenefit

FinishReason = Literal["stop", "length", "abort"]
VersionSpan = tuple[int, int]
"""(first token index, weight version)"""

GREEDY_BELOW_TEMPERATURE = 1e-6  # SGLang's threshold


def is_greedy(temperature: float) -> bool:
    """Return whether samples at this temperature are argmax, their logprobs those of temperature 1."""
    return temperature < GREEDY_BELOW_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams:
    """Says how to sample one response; the names are SGLang's.

    ``top_k=-1`` and ``top_p=1`` switch those filters off; ``temperature=0`` is greedy (see is_greedy). Penalties count
    generated tokens (``repetition_penalty`` the prompt's too, but not on SGLang); ``logit_bias`` are (token id, bias)
    pairs.
    ``advice_token_ids`` and ``edit`` are RTP-LLM's sp_advice_prompt_token_ids and sp_edit, ``speculative=False`` its
    force_disable_sp_run.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    speculative: bool = True
    advice_token_ids: tuple[int, ...] = ()
    edit: bool = False


@dataclass(frozen=True)
class Prompt:
    """A Prompt asks the policy one question: ``Prompt(prompt_id=17, task="add10", text="What is 2 + 3?", ...)``.

    ``advice_token_ids`` are a text that the reply will resemble (task.advice_key), for LOOKUP to draft from. ``label``
    is the answer as the data have it, which may be any JSON value, and ``metadata`` what they say besides; ``rendered``
    is the text that was tokenized, in the chat template.
    """

    prompt_id: int
    task: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    advice_token_ids: tuple[int, ...] = ()
    label: Any = field(default=None, hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rendered: str = ""


@dataclass(frozen=True)
class EarlierReply:
    """Holds a whole reply to the same prompt: ``EarlierReply((17, 4, 198), weight_version=3)``.

    ``sample_index`` is that of a sample of the very group that asks, None for a reply of another step. The version is
    the oldest that generated any of it.
    """

    token_ids: tuple[int, ...]
    weight_version: int
    sample_index: int | None = None

    @property
    def is_sibling(self) -> bool:
        return self.sample_index is not None


@dataclass(frozen=True)
class GroupRequest:
    """Asks for the samples of one prompt, which share the prompt's KV: the caller has derived a seed for each.

    ``partials`` are samples to resume (slime_spec.partial_samples): none, or one for each seed, in the seeds' order, as
    an earlier generation left them (finish_reason "abort", perhaps without a token). Resumed samples come back whole,
    with the token budget and every count over both parts, under the sample_index they had: a request may hold only some
    of a group's samples.

    ``earlier`` are replies that an engine may draft from, oldest first; only a run whose algorithm reads them sends any
    (Algorithm.reads_replies), and they change no sample. ``near`` is the engine that has the keys and values of most of
    the prompt, those of earlier turns; the samples are the same on any other.

    Example: ``GroupRequest("step3-prompt17", (1, 4093, 198), seeds=(11, 12, 13, 14), params=SamplingParams())``
    """

    group_id: str
    prompt_token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    params: SamplingParams
    partials: tuple[GeneratedSample, ...] = ()
    earlier: tuple[EarlierReply, ...] = ()
    near: int | None = None

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Return the sample_index of each seed's sample."""
        return tuple(sample.sample_index for sample in self.partials) or tuple(range(len(self.seeds)))

    def partial_at(self, position: int) -> GeneratedSample | None:
        """Return the partial sample that this seed's sample resumes, if any."""
        return self.partials[position] if self.partials else None


@dataclass(frozen=True)
class SpecCounters:
    """Counts what speculation did for one request; ``histogram[k]`` counts rounds with exactly k accepted drafts.

    A round is one draft and one verify; the prefill is not a round. ``num_proposed`` is rounds times
    (num_draft_tokens - 1), SGLang's server-wide convention, whatever was drafted; ``num_drafted`` counts the tokens
    that really were, and ``num_empty_rounds`` the rounds without any (no match, or one token of the budget left).
    ``num_steps`` is how many drafts a round can accept: the depth of a tree; 0 where it is a chain of all drafts.
    ``num_correct_unbinned`` are accepted drafts that are in no histogram (SGLang before 0.5.9 has none).
    ``num_nonfinite_rounds`` counts rounds whose draft ended early, or was empty, because the draft model's logits were
    not finite numbers. Where the engine decides round by round how deep to draft, ``num_proposed`` are the drafts that
    it asked for, ``num_tried[i]`` counts the rounds that asked for more than i drafts and accepted the i before, and
    ``num_off_steps`` the plain steps that it chose instead of a round, or had to take where a text had nothing to
    draft: they are in no other count.
    Example, 3 rounds with nothing drafted, then 2 of 2 and 3 of 3 accepted:
    ``SpecCounters(num_rounds=3, num_proposed=9, histogram=(1, 0, 1, 1), num_drafted=5, num_empty_rounds=1)``
    """

    num_rounds: int = 0
    num_proposed: int = 0
    histogram: tuple[int, ...] = ()
    num_drafted: int = 0
    num_empty_rounds: int = 0
    num_steps: int = 0
    num_correct_unbinned: int = 0
    num_nonfinite_rounds: int = 0
    num_tried: tuple[int, ...] = ()
    num_off_steps: int = 0

    @property
    def num_correct(self) -> int:
        """Return how many draft tokens were accepted, bonus tokens excluded."""
        return self.num_correct_unbinned + sum(k * count for k, count in enumerate(self.histogram))


@dataclass(frozen=True)
class TurnCounts:
    """Counts the turns of a sample that a function of the user's own made (slime_spec.agents), all of them together.

    Turns whose tokens the sample does not keep count too. ``num_verified_tokens`` are the generated tokens of the turns
    with a verify round, their plain steps left out; ``num_prompt_tokens`` what the turns were asked with, of which
    GeneratedSample.cached_tokens had their KV; ``outside_s`` the function's time without an unanswered turn.
    """

    num_turns: int
    num_generated_tokens: int
    num_verified_tokens: int
    num_prompt_tokens: int
    outside_s: float = 0.0


@dataclass(frozen=True)
class GeneratedSample:
    """Holds a finished response. ``logprobs[i]`` is the target's log softmax(logits / temperature) at ``token_ids[i]``.

    ``matched_stop`` is the token or the string that ended a response whose ``finish_reason`` is stop; ``cached_tokens``
    counts the prompt tokens whose KV another sample of the group had computed. ``weight_version`` is the oldest that
    generated any of it; ``version_spans`` are (first token index, version) pairs, empty where one version generated all
    of it. ``draft_version`` is that of the draft's own weights, None where it has none. ``lossy`` marks a sample whose
    verification may have changed the target's distribution. ``wait_s`` and ``first_token_s`` are the times from its
    arrival to its admission and to its first token, None where nobody measured them. ``num_preemptions`` counts how
    often its KV was freed for lack of room, and recomputed. A resumed sample
    (GroupRequest.partials) sums the times of both; ``spec`` is empty where either part's rounds are unknown.
    ``routed_experts`` are there for routing replay, of a partial sample perhaps of its first tokens only.
    ``loss_mask`` has 1 for each token that counts in the loss and 0 for any other, such as a tool's result, whose
    logprob is 0; it is empty where all count. ``turns`` are those of a function of the user's own, if one made them.
    """

    group_id: str
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    num_prompt_tokens: int
    spec: SpecCounters = field(default_factory=SpecCounters)
    e2e_latency_s: float = 0.0
    engine: int = 0
    matched_stop: int | str | None = None
    cached_tokens: int = 0
    version_spans: tuple[VersionSpan, ...] = ()
    draft_version: int | None = None
    lossy: bool = False
    wait_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    routed_experts: RoutedExperts | None = None
    loss_mask: tuple[int, ...] = ()
    turns: TurnCounts | None = None

    @property
    def spans(self) -> tuple[VersionSpan, ...]:
        """Return the version spans, also where one version generated all tokens; empty without tokens."""
        return self.version_spans or (((0, self.weight_version),) if self.token_ids else ())

    @property
    def num_loss_tokens(self) -> int:
        """Return how many tokens count in the loss: slime's effective response length."""
        return sum(self.loss_mask) if self.loss_mask else len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Return how many tokens the engines generated for the sample."""
        return len(self.token_ids) if self.turns is None else self.turns.num_generated_tokens

    @property
    def num_verified_tokens(self) -> int:
        """Return how many of these came out of verify rounds; for samples with a round."""
        return len(self.token_ids) - self.spec.num_off_steps if self.turns is None else self.turns.num_verified_tokens


@dataclass(frozen=True)
class Sample:
    """Holds a response and its reward; ``error`` says why training excludes the sample (whose reward is then None)."""

    prompt: Prompt
    response: GeneratedSample
    text: str
    reward: float | None
    error: str = ""


@dataclass(frozen=True)
class TrainSample:
    """Holds one sequence for the policy loss: logprobs and advantage apply to the tokens from ``prompt_len`` on.

    ``advantage`` is a number for all of them, or one for each. ``group`` and ``reward`` are what it was estimated from,
    for a trainer that estimates it anew with a KL in the reward. ``trainer_logprobs`` are the trainer's own before the
    rollout's updates, None where nobody asked for them. ``routed_experts`` are those that the trainer's routers shall
    choose, None where the routers choose. ``loss_mask`` has a 1 or a 0 for each of these tokens, one 1 at least, and is
    empty where all count: the loss and its means know nothing of the others.
    """

    token_ids: tuple[int, ...]
    prompt_len: int
    rollout_logprobs: tuple[float, ...]
    advantage: float | tuple[float, ...]
    routed_experts: RoutedExperts | None = None
    loss_mask: tuple[int, ...] = ()
    group: int = 0
    reward: float = 0.0
    trainer_logprobs: tuple[float, ...] | None = None

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_loss_tokens(self) -> int:
        """Return how many of the response's tokens the loss counts."""
        return sum(self.loss_mask) if self.loss_mask else self.num_response_tokens

    @property
    def advantages(self) -> tuple[float, ...]:
        """Return the advantage of each response token."""
        one = self.advantage
        return one if isinstance(one, tuple) else (one,) * self.num_response_tokens


@dataclass(frozen=True)
class DraftReport:
    """Reports a step's updates of the draft, which is judged by each reply before it first learns from it.

    ``acceptance`` and ``accuracy`` are by draft position, teacher-forced: mean Σ min(p, q), and the share of right
    argmaxes. ``tokens_per_round`` is what an engine would get of the step's replies that samples drafts of this length
    (bonus token included), by rule of verification. ``grad_norm`` is the mean before clipping, None where every update
    was left out, as its gradient was not finite.
    """

    loss: float
    grad_norm: float | None
    acceptance: tuple[float, ...]
    accuracy: tuple[float, ...]
    tokens_per_round: Mapping[str, float]
    num_updates: int
    num_skipped: int
    seconds: float


@dataclass(frozen=True)
class DraftUpdateRecord:
    """Records what a run's updates of its draft took and brought (slime_spec.rl.draft_updates).

    ``accept_length`` and ``drafting_s`` are the last rollout's; ``fresh`` is averaged, ``newest_fresh`` the last, of
    rollouts right after an update. ``num_measured`` counts from a sudden loss on, ``num_left_out`` from an update on.
    """

    num_updates: int = 0
    num_measured: int = 0
    num_left_out: int = 0
    accept_length: float | None = None
    drafting_s: float = 0.0
    is_sudden: bool = False
    follows_update: bool = False
    fresh: float | None = None
    newest_fresh: float | None = None
    gain: float | None = None
    lost_per_step: float = 0.0
    cost_s: float = 0.0


@dataclass(frozen=True)
class TisReport:
    """Reports truncated importance sampling by the trainer's probability over the rollout's; all are token means.

    ``ratio`` is before it is truncated, ``clip_fraction`` of those that were, ``abs_distance`` from 1.
    """

    ratio: float
    clip_fraction: float
    abs_distance: float


@dataclass(frozen=True)
class TrainReport:
    """Reports what one training step did on all ranks.

    ``num_tokens`` are the step's response tokens and ``num_trained_tokens`` those with a gradient; the others have
    advantage 0. ``loss`` and ``pg_loss`` are means by algorithm.loss_mean, ``clip_fraction`` over all tokens.
    ``entropy``, ``kl``, ``train_rollout_logprob_abs_diff`` and ``tis`` are means over the trained tokens, or over all
    with trainer.metrics_of_all_samples; None, or a KL of 0, where that is none. ``draft`` is None where no draft
    learned. ``routing_disagreement`` is the share of replayed choices that the trainer's routers would have made
    otherwise, None without routing replay. ``lr`` is the rate of the last optimizer step, ``reward_kl`` the mean KL
    that lowered rewards, None where none did.
    """

    loss: float
    pg_loss: float
    grad_norm: float
    entropy: float | None
    clip_fraction: float
    kl: float
    train_rollout_logprob_abs_diff: float | None
    num_tokens: int
    num_trained_tokens: int
    num_optimizer_steps: int
    num_microbatches: int
    draft: DraftReport | None = None
    routing_disagreement: float | None = None
    lr: float | None = None
    tis: TisReport | None = None
    reward_kl: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """Reports an engine's health at one moment; seconds and counts are sums since its start.

    ``canary`` is what the canary after the last push counted, no rounds where none ran. ``benefit`` is what rounds took
    and what plain decoding would have. ``pays_up_to`` is the largest number of sequences at once at which speculation
    pays, None where nobody decides by it. ``costs`` is what its rounds cost by batch and context, None if not timed.
    ``draft_temperature`` is None where drafts are not sampled. Times are 0 where the engine does not measure.
    """

    weight_version: int
    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    resident: bool
    rss_bytes: int
    time_in_forward_s: float = 0.0  # of the target
    time_total_s: float = 0.0
    time_in_draft_s: float = 0.0
    draft_version: int = 0
    num_preemptions: int = 0
    speculates: bool = False
    num_restarts: int = 0
    num_draft_resends: int = 0
    num_interruptions: int = 0  # parts of samples that a server did not finish
    canary: SpecCounters = field(default_factory=SpecCounters)
    benefit: NetBenefit = field(default_factory=NetBenefit)
    pays_up_to: int | None = None
    costs: CostTable | None = None
    draft_temperature: float | None = None
