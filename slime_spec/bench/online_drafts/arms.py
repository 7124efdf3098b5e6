"""Run the main job once per arm, with the same seed, and read what each step's metrics say of its draft.

All arms draw tokens by races whose noise drafts share (Gumbel coupling), so that no draft changes a token: the policies
of all arms are the same, bit for bit, with a draft and without, and so are the replies that their drafts are judged
on. A draft that stays as it is has a learning rate of 0: it takes the same passes, and its acceptance is known by the
same sums. Drafts have three tokens in every round, whether that pays or not.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from slime_spec.algorithms import NEXTN, NONE
from slime_spec.bench.online_drafts.drift import CURRICULUM, STEPS_OF_STAGE
from slime_spec.bench.rows import BenchOptions
from slime_spec.checkpoints.draft_location import builtin_folder
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.draft.build import make_network, network_tensors
from slime_spec.draft.training.online import hot_token_ids
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.draft.training.warm_start import warm_start
from slime_spec.launch.draft.provenance import PROVENANCE
from slime_spec.metrics.jsonl import FILE as METRICS
from slime_spec.metrics.jsonl import read_metrics

DEPTH = 3
JOB = (
    *("--config", "smollm2-135m", "--no-console"),
    *("--no-speculative-use-rejection-sampling", "--speculative-use-gumbel-coupling"),
)
PLAIN = (*JOB, "--speculative-algorithm", NONE.name, "--no-speculative-history")
DRAFTING = (
    *(*JOB, "--enable-draft-training", "--draft-ttt-length", str(DEPTH)),
    *("--speculative-num-steps", str(DEPTH), "--speculative-draft-temperature", "1.0"),
)
UNTRAINED = (*DRAFTING, "--draft-loss", "soft_ce", "--draft-lr", "1e-3", "--draft-optimizer-steps", "16")
FROZEN = (*DRAFTING, "--draft-lr", "0")
# The finished policy stays as it is, and the shipped draft learns from one rollout of it.
ONE_STEP = (*DRAFTING, "--lr", "0", "--num-rollout", "1")
# An MTP layer is made first, from the replies of the policy before training, and learns by its own loss.
MTP = (*DRAFTING, "--speculative-algorithm", NEXTN.name)
MTP_TRAINING = (
    *("--kind", "mtp", "--task", "sum_sentence", "--num-prompts", "400", "--max-new-tokens", "40"),
    *("--greedy-share", "0", "--chat-share", "0", "--epochs", "3", "--batch-size", "16", "--num-steps", str(DEPTH)),
    *("--loss", "lk_hybrid", "--autocast"),
)
WHEN_IT_PAYS = ("--draft-update-policy", "when_it_pays")
DRIFT = (
    *DRAFTING,
    *("--task", "slime_spec.bench.online_drafts.drift:CURRICULUM"),
    *("--num-rollout", str(STEPS_OF_STAGE * len(CURRICULUM.stages))),
)
# By name: the arm's flags, and what is said of it.
ARMS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "plain": (PLAIN, "no speculation"),
    "frozen": (FROZEN, "the shipped draft, as it is"),
    "online": (DRAFTING, "the shipped draft, learning with each step"),
    "one_step": (ONE_STEP, "the shipped draft, after one step of learning"),
    "untrained": (UNTRAINED, "a draft of the target's last block, learning with each step"),
    "mtp_frozen": ((*MTP, "--draft-lr", "0"), "an MTP layer, as it is"),
    "mtp_online": (MTP, "an MTP layer, learning with each step"),
    "drift_frozen": ((*DRIFT, "--draft-lr", "0"), "changing tasks, the shipped draft, as it is"),
    "drift_online": (DRIFT, "changing tasks, the shipped draft, learning with each step"),
    "drift_paying": ((*DRIFT, *WHEN_IT_PAYS), "changing tasks, the shipped draft, learning when it pays"),
}
Step = Mapping[str, float | None]


@dataclass(frozen=True)
class Arm:
    """Holds a finished run: its folder, and its steps' metrics."""

    name: str
    folder: Path
    steps: Sequence[Step]

    @property
    def what(self) -> str:
        return ARMS[self.name][1]

    def values(self, metric: str) -> list[float]:
        """Return the metric of every step that has it."""
        return values_of(self.steps, metric)


def values_of(steps: Sequence[Step], metric: str) -> list[float]:
    """Return the metric of each of the steps that has it."""
    return [value for step in steps if (value := step.get(metric)) is not None]


def finished_arm(name: str, options: BenchOptions) -> Arm:
    """Return the arm's run in the benchmark's folder, which is run now if it is not there."""
    folder = folder_of(options) / name
    if not (folder / "hf").is_dir():  # the last that a run writes
        _run(name, folder, options)
    return Arm(name, folder, read_metrics(folder / METRICS))


def folder_of(options: BenchOptions) -> Path:
    return (options.runs or (Path("runs") / f"bench-drafts-seed{options.seeds[0]}",))[0].absolute()


def _run(name: str, folder: Path, options: BenchOptions) -> None:
    draft = _draft_of(name, folder.parent, options)
    flags, _ = ARMS[name]
    policy = finished_arm("online", options).folder / "hf" if name == "one_step" else options.model
    command = [sys.executable, "-m", "slime_spec", "train", *flags, "--hf-checkpoint", str(policy)]
    if flags != PLAIN:
        command += ["--speculative-draft-model-path", draft]
    command += ["--seed", str(options.seeds[0]), "--output-dir", str(folder)]
    Console(stderr=True).print(f"running {name}: {folder}", markup=False, highlight=False, soft_wrap=True)
    subprocess.run(command, check=True)


def _draft_of(name: str, folder: Path, options: BenchOptions) -> str:
    """Return the draft that an arm begins with, which is made in ``folder`` if it is not the shipped one."""
    if name == "untrained":
        made = folder / "untrained-draft"
        write_untrained(made, options)
    elif name.startswith("mtp"):
        made = folder / "mtp-draft"
        if not (made / PROVENANCE).is_file():  # the last that a training writes
            resumed = ["--resume"] if made.exists() else []
            command = [sys.executable, "-m", "slime_spec", "draft", "train", "--target", str(options.model)]
            subprocess.run([*command, "--out", str(made), *MTP_TRAINING, *resumed], check=True)
    else:
        return options.draft
    return str(made)


def write_untrained(folder: Path, options: BenchOptions) -> None:
    """Write a draft of the shipped draft's shape and vocabulary, as ``slime-spec draft train`` starts one."""
    target = ModelSpec.from_folder(options.model)
    shipped = builtin_folder(options.draft)
    spec = DraftSpec.from_folder(shipped, target)
    ids = hot_token_ids(load_draft(shipped, spec))
    network = make_network(spec)
    tensors = load_tensors(options.model, target)
    warm_start(network, tensors, target, DraftVocabulary(ids, target.vocab_size), options.seeds[0])
    kept = {name: tensor.to(torch.float32) for name, tensor in network_tensors(network).items()}
    save_draft_checkpoint(folder, spec, kept, ids)
