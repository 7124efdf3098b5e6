"""Candidates are the drafters that may pay, each as the settings of a run: those that read texts, and every draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime_spec.algorithms import ALGORITHMS, STANDALONE, algorithm_of_family
from slime_spec.bench.eagle3 import VERIFICATIONS
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.draft_location import BUILTIN, builtin_folder
from slime_spec.checkpoints.families import FORMAT_OF
from slime_spec.checkpoints.folder import DRAFT_PATH, CheckpointFolder, architecture_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.schema import settings
from slime_spec.config.speculation import check_speculation, draft_quantization
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

RULES = ("target_only", "gumbel", "block")  # block verification accepts what rejection sampling does, and more
OF_RULES = sorted({name for settings in VERIFICATIONS.values() for name in settings})
NODE = "speculative"


@dataclass(frozen=True)
class Candidate:
    """Holds one drafter's settings, its number of drafts left to the engine; ``rule`` is "" where no network drafts.

    ``quantization`` is what the engine rounds a network's draft to where it decides the number of drafts.
    """

    name: str
    settings: SpeculativeConfig
    rule: str = ""
    quantization: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.rule}" if self.rule else self.name

    @property
    def has_network(self) -> bool:
        return self.settings.record.has_weights

    @property
    def changes_tokens(self) -> bool:
        """Return whether a seed's tokens differ from those without speculation."""
        return any(getattr(self.settings, name) for name in OF_RULES)

    @property
    def alone(self) -> Candidate:
        """Return the candidate with nothing before its network: acceptance and fixed lengths are of the network."""
        if not self.has_network:
            return self
        return replace(self, settings=replace(self.settings, history=False))

    def flags(self, depth: int | None = None) -> tuple[str, ...]:
        """Return flags of train; with ``depth`` of a chain as long in every round, of the network alone."""
        chosen = self.settings
        if depth is not None:
            chosen = with_depth(chosen, depth)
        if depth is not None and self.has_network:
            rounded = self.quantization or chosen.draft_model_quantization
            chosen = replace(chosen, history=None, draft_model_quantization=rounded)
        return flags_of(chosen)


def with_depth(chosen: SpeculativeConfig, depth: int) -> SpeculativeConfig:
    """Return the settings of a chain as long in every round, by the numbers that the algorithm reads."""
    if "num_steps" not in chosen.record.reads:
        return replace(chosen, num_draft_tokens=depth + 1)
    topk = 1 if chosen.record.has_numbers else chosen.eagle_topk
    return replace(chosen, num_steps=depth, eagle_topk=topk, num_draft_tokens=None)


def flags_of(chosen: SpeculativeConfig) -> tuple[str, ...]:
    """Return the flags of train that make these settings of the defaults."""
    words: list[str] = []
    for setting in settings().values():
        if setting.node != NODE:
            continue
        value = getattr(chosen, setting.path.partition(".")[2])
        if value == setting.default:
            continue
        flag = setting.flags[0].replace("--sglang-speculative-", "--speculative-")
        words.append(f"--no-{flag[2:]}" if value is False else flag)
        if setting.type is not bool:
            words.append(str(value))
    return tuple(words)


def text_candidates(has_texts: bool) -> list[Candidate]:
    """Return the drafters without a network; those that read other replies only where there are any to read."""
    records = [each for each in ALGORITHMS.values() if each.drafter is not None and each.sources == ("text",)]
    return [
        Candidate(each.name, SpeculativeConfig(algorithm=each.name))
        for each in records
        if has_texts or not each.reads_replies
    ]


def draft_candidates(config: Config, drafts: Sequence[str], target: ModelSpec) -> list[Candidate]:
    """Return a candidate for the configuration's own draft, and for each of ``drafts``; refuses one that does not fit.

    Every file that says whether a draft fits is read; weights are not.
    """
    candidates = named_drafts(config, drafts)
    for each in candidates:
        of_draft = replace(config, speculative=each.settings)
        check_speculation(of_draft)
        choose_draft(of_draft, target)
    return candidates


def named_drafts(config: Config, drafts: Sequence[str]) -> list[Candidate]:
    """Return a candidate for the configuration's own draft and for each of ``drafts``, whether they fit or not."""
    found = [config.speculative] if config.speculative.record.has_weights else []
    found += [_settings_of(config.speculative, draft) for draft in drafts]
    cleared = [replace(each, num_steps=None, eagle_topk=None, num_draft_tokens=None) for each in found]
    candidates: dict[str, Candidate] = {}
    for each in dict.fromkeys(cleared):
        name = _name(each)
        while name in candidates:
            name += "'"
        candidates[name] = Candidate(name, each, quantization=draft_quantization(replace(config, speculative=each)))
    return list(candidates.values())


def configured(config: Config) -> Candidate | None:
    """Return the configuration's own settings where they fix the numbers of a draft; None where the engine decides."""
    chosen = config.speculative
    if not chosen.record.speculates or chosen.is_automatic:
        return None
    return Candidate(f"{_name(chosen)}, as configured", chosen)


def by_rule(candidate: Candidate, config: Config) -> Iterator[Candidate]:
    """Yield the candidate with each rule of verification that the run may use; at temperature 0 all are one."""
    for rule in RULES if config.rollout.temperature > 0.0 else RULES[:1]:
        own: dict[str, Any] = dict.fromkeys(OF_RULES, False) | VERIFICATIONS[rule]
        with_rule = replace(candidate.settings, **own)
        try:
            check_speculation(replace(config, speculative=with_rule))
        except ConfigError:
            continue  # the engine or its device does not have it
        yield replace(candidate, settings=with_rule, rule=rule)


def _settings_of(base: SpeculativeConfig, draft: str) -> SpeculativeConfig:
    """Return the settings of a draft's own algorithm, by its config.json; a whole model drafts by itself."""
    folder = Path(builtin_folder(draft) if draft.startswith(BUILTIN) else draft)
    stored = CheckpointFolder(folder, DRAFT_PATH)
    draft_format = FORMAT_OF.get(architecture_of(stored.config))
    record = STANDALONE if draft_format is None else algorithm_of_family(draft_format.family)
    kept = base if base.record.has_weights else SpeculativeConfig()
    return replace(kept, algorithm=record.name, draft_model_path=draft)


def _name(chosen: SpeculativeConfig) -> str:
    path = chosen.draft_model_path
    if path is None:
        return chosen.algorithm
    return f"{chosen.algorithm} {path if path.startswith(BUILTIN) else Path(path).name}"
