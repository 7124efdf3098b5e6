"""The core batches continuously, without threads: groups come in, rounds draft and verify, finished samples go out.

                  num_fitting                 first token                    stop, length
    add ──► waiting ────────► being prefilled ───────────► running (rounds) ───────────────► on_sample
               ▲                     │                        │
               └─────────────────────┴──────── preempt ───────┘   tokens, logprobs, counters survive; KV is recomputed

    step():  admit what fits ─► one chunk of prefill ─► one round over every running sequence
    round:   propose drafts ─ one forward over [last token, drafts] of every row ─ verify ─ emit

Sequences are let in by what they need now, not by what they may come to need; when all have grown beyond the bound,
the youngest gives way. The oldest never does, so everything finishes. The caller owns the thread; nothing here blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from rollout.embedded.batch import Batch
from rollout.embedded.cost_probe import CostProbe
from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafting import Drafter, Swap
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.logprobs import LogprobRecord
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan
from rollout.embedded.prefill import Prefiller
from rollout.embedded.prompt_cache import PromptCache
from rollout.embedded.request import Group, OnFailure, OnProgress, OnSample, SampleState, Stamp
from rollout.embedded.speculation import Speculation
from rollout.embedded.stop import Ending, StopRule
from rollout.embedded.target import PassOutput, Target, Timing
from rollout.embedded.tempering import Tempering
from rollout.embedded.unread import AnyDraft, placement
from rollout.embedded.verification.verifier import Verified, Verifier
from slime_spec.errors import GenerationError
from slime_spec.sglang.draft_shape import DraftShape
from slime_spec.speculation.draft_temperature import DraftTemperature
from slime_spec.types import GroupRequest
from slime_spec.weights.messages import PauseMode, Side

ABORTED = Ending("abort")


@dataclass(frozen=True)
class CoreSettings:
    """Holds the settings of a core, which never change while the core runs."""

    shape: DraftShape
    speculates: bool
    max_running: int
    engine_index: int
    dtype: torch.dtype
    device: torch.device
    cost_probe_interval: int = 0
    is_automatic: bool = False  # a controller decides how deep to draft
    cuts_network: bool = False  # and a network's chains are cut, or stopped, by its confidence
    keeps_prompts: bool = True  # to copy what other prompts begin alike with
    max_positions: int = 1 << 20  # of the longest sequence
    draft_temperatures: tuple[float, ...] = ()  # of sampled drafts, to choose from
    cost_clock: Callable[[], float] | None = None  # tells what rounds cost; the core's clock if None
    graphs: Graphs | None = None


class GenerationCore:
    """Owns the running batch, the KV cache and the weights in use; one thread calls it."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        drafter: Drafter,
        stop_rule: StopRule,
        settings: CoreSettings,
        clock: Callable[[], float],
        verifier: Verifier,
    ) -> None:
        drafter.bind(decoder)()
        self.cache, self.version, self.draft_version = cache, 0, 0
        self.paused = False
        self.num_preemptions = 0
        self.timing = Timing()
        self.waiting: list[SampleState] = []  # oldest first
        self.drafter = drafter
        self.target = Target(
            decoder, cache, drafter.needs, settings.dtype, settings.device, clock, self.timing, settings.graphs
        )
        self.cost_clock = settings.cost_clock or clock
        self._probe = CostProbe(settings.cost_probe_interval, self.timing, clock, self.cost_clock)
        self.settings = settings
        self.speculation = Speculation(
            drafter, settings.shape, settings.speculates, self.target, self.timing, clock, self.cost_clock
        )
        self.speculation.cuts_network = settings.cuts_network
        if settings.draft_temperatures:
            self.speculation.tempering = Tempering(DraftTemperature(settings.draft_temperatures))
        self.batch = Batch(cache, settings.max_running, self.speculation.headroom, drafter.cache)
        self._prompts = PromptCache(cache, settings.keeps_prompts)
        self._prefiller = Prefiller(self.batch, self.target, self.speculation, self._prompts)
        self._stop_rule, self._clock, self.verifier = stop_rule, clock, verifier
        self._stamp = Stamp(settings.engine_index, settings.shape, verifier.lossy, settings.is_automatic)
        self._graphs = settings.graphs
        self._next_key = 0

    @property
    def decoder(self) -> Decoder:
        return self.target.decoder

    @property
    def has_work(self) -> bool:
        """Return whether samples are unfinished."""
        return bool(self.waiting or self.batch.sequences)

    @property
    def can_step(self) -> bool:
        return self.has_work and not self.paused

    def add(
        self,
        request: GroupRequest,
        on_sample: OnSample,
        on_progress: OnProgress | None = None,
        on_failure: OnFailure | None = None,
        record: LogprobRecord | None = None,
    ) -> Group:
        """Queue a validated group; ``on_progress`` is called after every round of every sample.

        What goes wrong in this group alone ends the group, and ``on_failure`` hears it (without it ``step`` raises it).
        """
        group = Group(request, self._clock(), on_sample, self._new_key(), on_progress, on_failure, record)
        speculates = self.speculation.applies_to(group)
        for position in range(len(request.seeds)):
            self.waiting.append(SampleState.of(group, position, self._new_key(), speculates))
        return group

    def abort(self, group: Group) -> None:
        """Finish the group's samples with the tokens they have; samples already finished are not touched."""
        self._finish((row, ABORTED) for row, each in enumerate(self.batch.sequences) if each.group is group)
        never_resumed = [each for each in self.waiting if each.group is group]
        self.waiting = [each for each in self.waiting if each.group is not group]
        for sequence in never_resumed:
            self._deliver(sequence, ABORTED)

    def pause(self, mode: PauseMode) -> None:
        """Do nothing until ``resume``; unfinished samples keep their KV, give their KV up, or end, as ``mode`` says."""
        self.paused = True
        if mode == "abort":
            for group in {each.group for each in (*self.waiting, *self.batch.sequences)}:
                self.abort(group)
        elif mode == "retract":
            for row in reversed(range(len(self.batch.sequences))):
                self._send_back(row)
            self._release_idle_prompts()

    def resume(self) -> None:
        self.paused = False

    def use(self, decoder: Decoder, version: int) -> None:
        """Compute with other weights from the next pass on."""
        self.take_over("target", self.prepared(decoder), version)

    def prepared(self, decoder: Decoder) -> Swap:
        """Build, on any thread, what else it takes to compute with other weights of the target."""
        bind = self.drafter.bind(decoder)

        def swap() -> None:
            self.target.use(decoder)
            bind()

        return swap

    def take_over(self, side: Side, swap: Swap, version: int) -> None:
        """Compute with other weights of one side, built already, from the next pass or round on."""
        swap()
        if side == "target":
            self.version = version
            self._prompts.clear()
        else:
            self.draft_version = version

    def move(self, device: torch.device) -> None:
        """Move the weights of both sides to ``device``; passes that were captured over them are forgotten."""
        if self._graphs is not None:
            self._graphs.clear()
        self.decoder.move(device)
        if self.drafter.weights is not None:
            self.drafter.weights.move(device)
        self.drafter.bind(self.decoder)()

    def release_kv(self) -> None:
        """Give the caches' memory back; only while no sample is unfinished."""
        for cache in (self.cache, self.drafter.cache):
            if cache is not None:
                cache.release()

    def step(self) -> None:
        """Admit what fits, prefill a chunk, and run one round."""
        start = self._clock()
        self._admit()
        self._allocate()
        self._prefill()
        if self.batch.num_running:
            self._round()
        self.timing.total_s += self._clock() - start

    def _admit(self) -> None:
        # First come, first served: a sequence that needs much room waits, and later ones do not overtake it for ever.
        count = self.batch.num_fitting(self.waiting)
        admitted, self.waiting = self.waiting[:count], self.waiting[count:]
        for sequence in admitted:
            self._enter(sequence)
        if self.waiting and not self.batch.sequences:
            # The sequence fits alone, as was checked when its group came: only idle shared prompts are in its way.
            self._release_idle_prompts(needed=self.waiting[0].group)
            self._enter(self.waiting.pop(0))

    def _enter(self, sequence: SampleState) -> None:
        self.batch.add(sequence)
        sequence.own_tokens()
        if sequence.wait_s is None:
            sequence.wait_s = sequence.elapsed_s(self._clock())

    def _allocate(self) -> None:
        """Reserve KV for the next round of every sequence, or of as many of the oldest sequences as fit."""
        while not self.batch.allocate():
            if self._release_idle_prompts():
                continue
            assert len(self.batch.sequences) > 1, "a single sequence fits, as was checked when its group came"
            youngest = max(range(len(self.batch.sequences)), key=lambda row: self.batch.sequences[row].key)
            self.batch.sequences[youngest].num_preemptions += 1
            self.num_preemptions += 1
            self._send_back(youngest)

    def _send_back(self, row: int) -> None:
        """Take a sequence's KV away; the sequence waits, before all younger sequences, to have its KV recomputed."""
        sequence = self.batch.remove(row)
        self.speculation.forget(sequence)
        insort(self.waiting, sequence, key=lambda each: each.key)

    def _prefill(self) -> None:
        """Prefill a chunk and draw, all at once, the first tokens of the sequences whose prompts the chunk ends."""
        ready = self._prefiller.step(self.version)
        fresh = [sequence for sequence in ready if not sequence.logprobs]
        if not fresh:
            return
        logits = [each.group.first_logits for each in fresh]
        rows = [each.verify_row(NO_DRAFT) for each in fresh]
        first = self.verifier(torch.cat([each for each in logits if each is not None]), rows)
        for sequence in fresh:
            sequence.note_first_token(self._clock())
            if self.drafter.weights is not None:
                sequence.draft_version = self.draft_version
        self._emit_all(fresh, first, [each.group.prompt_version for each in fresh])

    def _round(self) -> None:
        """Run one draft and one verify for every running sequence."""
        batch = self.batch
        running = batch.running
        # Rounds without drafts, and requests that only decode, time plain steps themselves.
        is_typical = all(self.speculation.applies_to(each.group) for each in running)
        if is_typical and self.speculation.drafted_last and (step_s := self._probe.step_s(self._plain_step)):
            self.speculation.note_step(batch, step_s)
        start = self.cost_clock()
        proposal = self.speculation.propose(batch)
        drafts = proposal.drafts
        if not (self.target.takes_unread and self.verifier.takes_unread):
            drafts = [draft.read() for draft in drafts]
        output, spans, verified = self._verify(drafts)
        batch.compact(spans, [each.path for each in verified])
        self.speculation.observe(batch, output, spans, verified)
        self.speculation.note(batch, proposal, verified, self.cost_clock() - start)
        for row, (sequence, draft, each) in enumerate(zip(running, drafts, verified, strict=True)):
            if self.speculation.applies_to(sequence.group):
                sequence.count_round(draft.read(), len(each.path), proposal.depths[row], self._stamp)
        self._emit_all(running, verified, [self.version] * len(running))

    def _plain_step(self) -> None:
        """Run one plain step for its time alone: it writes the last tokens' KV, and the next round writes it again."""
        self._verify([NO_DRAFT] * self.batch.num_running)

    def _verify(self, drafts: Sequence[AnyDraft]) -> tuple[PassOutput, list[RowSpan], list[Verified]]:
        """Run one pass over every running sequence's last token and draft, and judge the drafts."""
        running = self.batch.running
        spans = [self.batch.span(row, draft) for row, draft in enumerate(drafts)]
        inputs: list[int] = []
        for sequence, draft in zip(running, drafts, strict=True):
            inputs.append(sequence.token_ids[-1])
            inputs.extend(draft.token_ids if isinstance(draft, Draft) else [0] * draft.num_tokens)
        output = self.target.run(self.cache.own, spans, inputs, placement(drafts))
        rows, logits = list(map(SampleState.verify_row, running, drafts)), self.target.logits(output.hidden)
        verified = self.verifier(logits, rows)
        if self.speculation.tempering is not None:
            self.speculation.tempering.weigh(logits, rows)
        return output, spans, verified

    def _emit_all(
        self, sequences: Sequence[SampleState], verified: Sequence[Verified], versions: Sequence[int]
    ) -> None:
        """Give sequences their tokens, then hand out finished samples and give up groups that cannot go on."""
        finished: list[tuple[int, Ending]] = []
        failed: dict[Group, GenerationError] = {}
        for sequence, each, version in zip(sequences, verified, versions, strict=True):
            try:
                ending = self._emit(sequence, each, version)
            except GenerationError as error:
                failed.setdefault(sequence.group, error)
                continue
            if ending is not None:
                finished.append((self.batch.sequences.index(sequence), ending))
        self._finish(finished)
        for group, failure in failed.items():
            self._give_up(group, failure)

    def _emit(self, sequence: SampleState, verified: Verified, version: int) -> Ending | None:
        """Append tokens up to the first token that ends the response; returns why the response ended, if it did."""
        group, before = sequence.group, sequence.num_generated
        ending = None
        sequence.note_version(version)
        for token_id, logprob in zip(verified.token_ids, verified.logprobs, strict=True):
            if not isfinite(logprob):  # exactly where the distribution had no finite mass
                raise not_finite(sequence, version)
            sequence.append(token_id, logprob)
            ending = self._stop_rule.ending(sequence.token_ids, group.num_prompt_tokens, group.request.params)
            if ending is not None:
                break
        if group.record is not None:
            group.record.add(sequence.sample_index, verified.beside[: sequence.num_generated - before])
        if group.on_progress is not None:
            try:
                group.on_progress(sequence.progress_since(before))
            except Exception as error:  # the caller's code, on the thread of everyone
                raise GenerationError(f"on_progress of group {group.request.group_id} raised {error!r}") from error
        return ending

    def _finish(self, finished: Iterable[tuple[int, Ending]]) -> None:
        """Hand out finished samples and free their rows, highest row first so that rows below keep their numbers."""
        for row, ending in sorted(finished, key=lambda pair: pair[0], reverse=True):
            if ending is not ABORTED:
                self._prefiller.keep(row, self.version)
            sequence = self.batch.remove(row)
            if ending is not ABORTED:
                self.speculation.finish(sequence)
            self.speculation.forget(sequence)
            self._deliver(sequence, ending)

    def _deliver(self, sequence: SampleState, ending: Ending) -> None:
        group = sequence.group
        group.num_unfinished -= 1
        if not group.num_unfinished:
            self._end(group)
        group.on_sample(sequence.finished(ending, self._clock(), self._stamp, self.version))

    def _give_up(self, group: Group, error: GenerationError) -> None:
        """Take a group's samples out without handing them out, and say why."""
        for row in reversed(range(len(self.batch.sequences))):
            if self.batch.sequences[row].group is group:
                self.speculation.forget(self.batch.remove(row))
        self.waiting = [each for each in self.waiting if each.group is not group]
        group.num_unfinished = 0
        self._end(group)
        if group.on_failure is None:
            raise error
        group.on_failure(error)

    def _end(self, group: Group) -> None:
        """Drop what is kept for a group as a whole: none of its samples is here any more."""
        if group.prefix_row >= 0:
            self._release_prompt(group)
        self.speculation.end(group)

    def _release_idle_prompts(self, needed: Group | None = None) -> bool:
        """Free the shared prompts that no sequence of the batch reads, except ``needed``'s; whether there were any."""
        idle = [group for group in self.batch.groups if not group.num_in_batch and group is not needed]
        for group in idle:
            self._release_prompt(group)
        return bool(idle)

    def _release_prompt(self, group: Group) -> None:
        self.batch.release_prompt(group)
        self.speculation.forget_prompt(group)

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key


def not_finite(sequence: SampleState, version: int) -> GenerationError:
    return GenerationError(
        f"the target's logits are not finite numbers at token {sequence.num_generated} of sample "
        f"{sequence.sample_index} of group {sequence.group.request.group_id}, weight version {version}. Look for "
        "overflow or damage in the weights (a larger dtype, a lower learning rate), and for sampling parameters that "
        "leave no token."
    )
