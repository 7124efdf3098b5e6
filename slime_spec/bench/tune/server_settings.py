"""Server settings are what an SGLang server can be started with: an algorithm, a rule of verification, three numbers.

Each setting is one start, so there are few of them. What the doctor refuses, or this SGLang has no flag for, is left
out with the reason before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollout.sglang_engine.engine import SglangEngine
from slime_spec.algorithms import NGRAM, NONE
from slime_spec.bench.eagle3 import VERIFICATIONS
from slime_spec.bench.tune.candidates import OF_RULES, Candidate, configured, named_drafts
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.config.speculation import check_speculation
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.preflight.checks.shape import speculation_control
from slime_spec.preflight.finding import Finding, Severity
from slime_spec.preflight.gate import examine, not_skipped, refusal
from slime_spec.preflight.gather import gather
from slime_spec.sglang.arguments import config_of_engine
from slime_spec.sglang.draft_shape import draft_shape
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import is_greedy

USUAL_CHAIN, OTHER_CHAINS = 3, (1, 5)
TRIES, QUICK_TRIES = (4, 12), (4,)  # tokens that a round of n-grams verifies; SGLang's own number is 12
SAMPLED_RULES = ("block", "rejection")  # block verification accepts what rejection sampling does, and more
BY_BATCH = speculation_control.id
OFF = Candidate("off", SpeculativeConfig(algorithm=NONE.name))


@dataclass(frozen=True)
class Setting:
    """Holds one way to start a server: a candidate with its numbers.

    Example: ``Setting(Candidate("NGRAM, 4 tokens", SpeculativeConfig("NGRAM", num_draft_tokens=4)))``
    """

    candidate: Candidate

    @property
    def name(self) -> str:
        return self.candidate.title

    @property
    def is_chain(self) -> bool:
        return (self.candidate.settings.eagle_topk or 1) == 1


@dataclass(frozen=True)
class Judged:
    """Holds the settings that may be started, why the others are left out, and what the doctor warns of.

    ``by_batch`` says of each setting whether its servers could draft at some batches and not at others.
    """

    settings: tuple[Setting, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    by_batch: Mapping[str, str] = field(default_factory=dict)


def server_config(config: Config, folder: Path, max_running: int) -> Config:
    """Return the configuration of one server as the run's first engine has it, on its own and with logs in ``folder``.

    A server that dies is not replaced: its times would be wrong.
    """
    config = config_of_engine(config, 0)
    server = replace(
        config.sglang_server, port=0, router=False, router_addr=None, router_args=(), canary_prompts=0, max_restarts=0
    )
    # On a CPU an idle server would keep a core busy that the other one is timed on.
    idle = {} if config.rollout.num_gpus_per_engine else {"sleep_on_idle": True}
    return replace(
        config,
        run=replace(config.run, mode="rollout_only", output_dir=str(folder)),
        rollout=replace(config.rollout, num_engines=1),
        engine=replace(config.engine, max_running_requests=max(max_running, config.engine.max_running_requests)),
        cluster=replace(config.cluster, colocate=False),
        sglang_server=server,
        sglang={**idle, **config.sglang},
    )


def server_settings(config: Config, given: frozenset[str], drafts: Sequence[str], is_quick: bool) -> Judged:
    """Return what is worth starting of what can be started.

    Raises ConfigError for a draft's folder that is none, and where not even a server without speculation may start.
    """
    judge = _Judge(config, given)
    is_own = config.speculative.algorithm == NGRAM.name
    text = config.speculative if is_own else SpeculativeConfig(algorithm=NGRAM.name)  # its corpus, perhaps
    for number in QUICK_TRIES if is_quick else TRIES:
        judge.of(judge.named(Candidate(NGRAM.name, replace(text, num_draft_tokens=number))))
    for draft in named_drafts(config, drafts):
        _judge_draft(judge, draft, is_quick)
    own = configured(config)
    if own is not None and all(own.settings != each.candidate.settings for each in judge.settings):
        judge.of(Setting(own))
    return Judged(tuple(judge.settings), judge.left_out, tuple(judge.warnings), judge.by_batch)


def _judge_draft(judge: _Judge, draft: Candidate, is_quick: bool) -> None:
    """Judge a draft's chains by the rule that accepts most, a chain by the other rule, and SGLang's own shape."""
    plain = _with_rule(draft, "target_only")
    if not draft.settings.record.has_numbers:
        judge.of(judge.named(plain))  # its checkpoint says how long a draft is
        return
    sampled = None
    for rule in () if is_greedy(judge.config.rollout.temperature) else SAMPLED_RULES:
        # A chain of those that are measured anyway tells whether the server has the rule.
        if sampled is None and judge.of(judge.named(_chain(_with_rule(draft, rule), USUAL_CHAIN))):
            sampled = _with_rule(draft, rule)
    wanted = [_chain(plain, USUAL_CHAIN)]
    if not is_quick:
        wanted += [_chain(sampled or plain, depth) for depth in OTHER_CHAINS]
        wanted += _own_tree(plain, judge.architecture)
    for candidate in wanted:
        judge.of(judge.named(candidate))


def _with_rule(draft: Candidate, rule: str) -> Candidate:
    own: dict[str, Any] = dict.fromkeys(OF_RULES, False) | VERIFICATIONS[rule]
    return replace(draft, settings=replace(draft.settings, **own), rule=rule)


def _chain(draft: Candidate, depth: int) -> Candidate:
    return replace(draft, settings=replace(draft.settings, num_steps=depth, eagle_topk=1, num_draft_tokens=depth + 1))


def _own_tree(draft: Candidate, architecture: str) -> list[Candidate]:
    """Return SGLang's automatic shape for this target where it is a tree."""
    shape = draft_shape(draft.settings, architecture)
    numbers: dict[str, Any] = {
        "num_steps": shape.num_steps,
        "eagle_topk": shape.topk,
        "num_draft_tokens": shape.num_draft_tokens,
    }
    return [replace(draft, settings=replace(draft.settings, **numbers))] if shape.topk > 1 else []


class _Judge:
    """Asks of one setting after another whether it may be started; ``known`` is what stands against none of them."""

    def __init__(self, config: Config, given: frozenset[str]) -> None:
        self.config, self._given = config, given
        self.architecture = Checkpoint.read(config.model.hf_checkpoint).architecture
        plain = self._findings(replace(config, speculative=OFF.settings))
        if stopping := not_skipped(plain, config.run.skip_checks):
            raise refusal(stopping)
        self._known = {finding.read for finding in plain}
        self.settings: list[Setting] = []
        self.left_out: dict[str, str] = {}
        self.warnings: dict[str, None] = {}  # each once, in order
        self.by_batch: dict[str, str] = {}

    def of(self, setting: Setting) -> bool:
        """Note the setting where it belongs; returns whether it may be started."""
        own = replace(self.config, speculative=setting.candidate.settings)
        try:
            check_speculation(own)
            findings = [each for each in self._findings(own) if each.read not in self._known]
            # For its errors: it asks the interpreter for its flags, and starts nothing.
            SglangEngine(server_config(own, Path(), own.engine.max_running_requests), 0, InProcessTransport())
        except ConfigError as error:
            self.left_out[setting.name] = f"{error.setting} {error.rule}"
            return False
        if stopping := not_skipped(findings, self.config.run.skip_checks):
            self.left_out[setting.name] = "; ".join(f"{each.read} (check {each.id})" for each in stopping)
            return False
        self.settings.append(setting)
        for each in findings:
            if each.id == BY_BATCH:
                self.by_batch[setting.name] = f"{each.read}. {each.remedy}"
        warned = [each for each in findings if each.severity is Severity.WARNING]
        self.warnings.update(dict.fromkeys(f"{each.read}. {each.remedy}" for each in warned))
        return True

    def named(self, candidate: Candidate) -> Setting:
        """Return the setting under a name that says its shape: ``EAGLE3 mine, 3 drafts, block``."""
        record, shape = candidate.settings.record, draft_shape(candidate.settings, self.architecture)
        if not record.fills_rounds:
            shaped = f"{shape.num_draft_tokens} tokens"
        elif shape.topk > 1 and record.has_numbers:
            shaped = f"a tree of {shape.num_draft_tokens}"
        elif record.has_numbers:
            shaped = "1 draft" if shape.num_steps == 1 else f"{shape.num_steps} drafts"
        else:
            shaped = "its own length"
        return Setting(replace(candidate, name=f"{candidate.name}, {shaped}"))

    def _findings(self, config: Config) -> list[Finding]:
        return examine(gather(config, self._given))
