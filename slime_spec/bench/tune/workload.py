"""The workload is the user's prompts as groups of requests: each side is asked the same, each repetition another part.

Prompts come from a run's samples (with the replies, which a drafter that reads replies may draft from, as in the run's
next epoch), from a jsonl file, or from the task of the configuration.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime_spec.bench.pays.scenarios import Waves
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.files import shortened
from slime_spec.rl.reply_history import MAX_REPLIES
from slime_spec.rl.requests import sampling_params
from slime_spec.tasks.data_file import data_rows
from slime_spec.tasks.source import PromptSource
from slime_spec.types import EarlierReply, GroupRequest, SamplingParams

SAMPLES = "samples.jsonl"  # file of a run's folder
MOST_PROMPTS = 256
FLAG = "--prompts"
WAVES = 4  # of one sequence; a repetition over fewer tokens says little


@dataclass(frozen=True)
class KnownPrompt:
    """Holds a prompt's tokens, and earlier replies to it, oldest first."""

    token_ids: tuple[int, ...]
    earlier: tuple[EarlierReply, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Draws requests: ``num_samples`` replies a prompt, sampled by ``params``, which end by themselves."""

    prompts: tuple[KnownPrompt, ...]
    params: SamplingParams
    num_samples: int
    seed: int = 0

    @property
    def has_earlier(self) -> bool:
        return any(prompt.earlier for prompt in self.prompts)

    def waves(self, batch: int, repetition: int, num_new_tokens: int | None = None) -> Waves:
        """Return the requests of one repetition, ``batch`` sequences at once; every repetition has its own seeds.

        The prompts go on where those of the repetition before ended.
        """
        uniforms = random.Random(f"{self.seed} {batch} {repetition}")
        num_waves = max(1, WAVES // batch)
        sizes = [self.num_samples] * (batch // self.num_samples)
        if rest := batch % self.num_samples:
            sizes.append(rest)
        params = replace(self.params, max_new_tokens=num_new_tokens or self.params.max_new_tokens)
        first, made = repetition * num_waves * len(sizes), []
        for number in range(num_waves * len(sizes)):
            prompt = self.prompts[(first + number) % len(self.prompts)]
            seeds = tuple(uniforms.randrange(1 << 31) for _ in range(sizes[number % len(sizes)]))
            name = f"{batch}.{repetition}.{number}"
            made.append(GroupRequest(name, prompt.token_ids, seeds, params, earlier=prompt.earlier))
        return [made[start : start + len(sizes)] for start in range(0, len(made), len(sizes))]


def read_workload(
    config: Config,
    path: Path | None,
    num_new_tokens: int,
    key: str = "prompt",
    may_lack: frozenset[str] = frozenset(),
) -> Workload:
    """Read and tokenize the prompts, which a jsonl has under ``key``; raises ConfigError where none fits.

    ``may_lack`` is PromptSource's, of the configuration's own data.
    """
    task = config.task
    tokenizer = Tokenizer.load(config.model.hf_checkpoint, task.chat_date, task.template_values)
    prompts = _of_task(config, tokenizer, may_lack) if path is None else _of_file(config, tokenizer, path, key)
    params = sampling_params(config.rollout)
    params = replace(params, max_new_tokens=min(params.max_new_tokens, num_new_tokens))
    return Workload(prompts, params, config.rollout.n_samples_per_prompt, config.run.seed)


def _of_task(config: Config, tokenizer: Tokenizer, may_lack: frozenset[str]) -> tuple[KnownPrompt, ...]:
    source = PromptSource(config, tokenizer, is_scored=False, may_lack=may_lack)
    taken = source.take(MOST_PROMPTS, start_prompt_id=0)
    return tuple(KnownPrompt(ids) for ids in dict.fromkeys(prompt.token_ids for prompt in taken))


def _of_file(config: Config, tokenizer: Tokenizer, path: Path, key: str) -> tuple[KnownPrompt, ...]:
    file = path / SAMPLES if path.is_dir() else path
    if not file.exists():
        rule = "must be a run's folder with samples.jsonl, such a file, or a jsonl of prompts"
        raise ConfigError(FLAG, rule, str(path), "Pass a file that is there; slime-spec rollout writes samples.jsonl.")
    rows, is_samples = list(data_rows(FLAG, str(file))), file.name == SAMPLES
    key = "prompt" if is_samples else key
    longest = config.rollout.max_prompt_len
    replies: dict[tuple[int, ...], list[EarlierReply]] = {}
    for place, row in rows:
        ids = _tokenized(config.task, tokenizer, place, row, key)
        if len(ids) > longest or (ids not in replies and len(replies) == MOST_PROMPTS):
            continue
        kept = replies.setdefault(ids, [])
        if is_samples and isinstance(row.get("reply"), str) and (reply := tokenizer.encode(row["reply"], False)):
            kept.append(EarlierReply(reply, weight_version=_version(row)))
    if not replies:
        rule = f"must hold a prompt of at most {longest} tokens (rollout.max_prompt_len); it has {len(rows)} rows"
        raise ConfigError(FLAG, rule, str(file), "Pass another file, or a larger --rollout-max-prompt-len.")
    return tuple(KnownPrompt(ids, tuple(kept[-MAX_REPLIES:])) for ids, kept in replies.items())


def _tokenized(task: TaskConfig, tokenizer: Tokenizer, place: str, row: Mapping[str, Any], key: str) -> tuple[int, ...]:
    prompt = row.get(key)
    is_chat = isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt)
    if not prompt or not (isinstance(prompt, str) or is_chat):
        rule = f"{place}: {key!r} must be a text that is not empty, or a list of messages"
        raise ConfigError(FLAG, rule, shortened(str(prompt)), "Correct the line, or pass --prompt-key KEY.")
    if isinstance(prompt, str) and not task.apply_chat_template:
        return tokenizer.encode(prompt)
    return tokenizer.chat(prompt, task.system_prompt)


def _version(row: Mapping[str, Any]) -> int:
    """Return the step whose weights generated a reply: weights and steps count alike."""
    step = row.get("rollout_id")
    return step if isinstance(step, int) else 0
