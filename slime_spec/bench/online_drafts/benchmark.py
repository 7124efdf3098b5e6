"""The benchmark of drafts in RL: what a draft brings while the policy moves, and what teaching it costs."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from slime_spec.bench.chart import Panel, Series, write_panels
from slime_spec.bench.online_drafts.arms import ARMS, DEPTH, Arm, finished_arm, folder_of, values_of
from slime_spec.bench.online_drafts.drift import CURRICULUM, STEPS_OF_STAGE
from slime_spec.bench.online_drafts.judged import Judge
from slime_spec.bench.peers.catalogue import PEERS
from slime_spec.bench.peers.install import add_peer_flags, install
from slime_spec.bench.rows import Benchmark, BenchOptions, Row, at_least, at_most
from slime_spec.checkpoints.model_spec import ModelSpec

HERE = "slime_spec.bench.online_drafts.benchmark"
LAST = 5  # steps that a run is judged by at its end
NUM_PROMPTS = 32
SERVED, REWARD = "rollout/spec_accept_length", "rollout/reward_mean"
CLOSED = "train/draft_accept_length/rejection"
ROLLOUT_TIME, TRAIN_TIME, SYNC_TIME = "perf/rollout_time", "perf/draft_train_time", "perf/draft_sync_time"
TIMES = (
    ("perf/tokens_per_s", "tokens_per_s", "tokens/s", "tokens of replies over the rollouts' time"),
    ("perf/step_time", "step_time", "s", "a step"),
)
FEW_STEPS = 6
CAUGHT_UP = 3
mean = statistics.fmean


def measure_main_job(options: BenchOptions) -> list[Row]:
    """Compare a draft that learns, one that stays and none, on the same replies of the main job."""
    plain, frozen, online = (finished_arm(name, options) for name in ("plain", "frozen", "online"))
    draw(folder_of(options) / "main-job.svg", [plain, frozen, online])
    rows = [row for arm in (plain, frozen, online) for row in arm_rows(arm)]
    return [*rows, *against_frozen(frozen, online), reward_row(frozen, plain)]


def measure_untrained(options: BenchOptions) -> list[Row]:
    """Measure how far a draft comes that begins with the target's last block."""
    arm = finished_arm("untrained", options)
    draw(folder_of(options) / "untrained.svg", [arm])
    served = arm.values(SERVED)
    what = f"the most tokens a round of the first {FEW_STEPS} steps, as served, {arm.what}"
    few = at_least("drafts.untrained.few_steps", what, max(served[:FEW_STEPS]), "tokens/round", 2.2)
    what = f"the same, in the last {LAST} steps"
    return [*arm_rows(arm), few, at_least("drafts.untrained.end", what, mean(served[-LAST:]), "tokens/round", 2.9)]


def measure_mtp(options: BenchOptions) -> list[Row]:
    """Compare an MTP layer that learns and one that stays, on the same replies of the main job."""
    frozen, online = (finished_arm(name, options) for name in ("mtp_frozen", "mtp_online"))
    draw(folder_of(options) / "mtp.svg", [frozen, online])
    rows = [row for arm in (frozen, online) for row in arm_rows(arm)]
    return [*rows, *against_frozen(frozen, online)]


def measure_drift(options: BenchOptions) -> list[Row]:
    """Measure how drafts follow tasks that change."""
    arms = [finished_arm(name, options) for name in ("drift_frozen", "drift_online", "drift_paying")]
    draw(folder_of(options) / "drift.svg", arms)
    rows = [row for arm in arms for row in (*arm_rows(arm), *stage_rows(arm))]
    frozen, *learning = arms
    for arm in learning:
        rows += against_frozen(frozen, arm)
        gained = sum(frozen.values(ROLLOUT_TIME)) - sum(arm.values(ROLLOUT_TIME))
        spent = sum(arm.values(TRAIN_TIME)) + sum(arm.values(SYNC_TIME))
        rows.append(Row(f"drafts.{arm.name}.rollouts_gained", f"rollouts' time saved, {arm.what}", gained, "s"))
        rows.append(Row(f"drafts.{arm.name}.spent", f"training and pushing the draft, {arm.what}", spent, "s"))
    return rows


def stage_rows(arm: Arm) -> list[Row]:
    """Return, of each stage behind a change, what is reached within three steps over the most of the stage."""
    served, rows = arm.values(SERVED), []
    for number in range(len(CURRICULUM.stages)):
        stage = served[number * STEPS_OF_STAGE : (number + 1) * STEPS_OF_STAGE]
        prefix = f"drafts.{arm.name}.stage{number + 1}"
        what = f"stage {number + 1}, {arm.what}"
        rows.append(Row(f"{prefix}.first", f"tokens a round, first step of {what}", stage[0], "tokens/round"))
        rows.append(
            Row(f"{prefix}.last", f"tokens a round, last three steps of {what}", mean(stage[-3:]), "tokens/round")
        )
        if number:
            reached = max(stage[: CAUGHT_UP + 1]) / max(stage)
            what = f"most tokens a round within {CAUGHT_UP} steps behind the change, over the most of {what}"
            rows.append(Row(f"{prefix}.caught_up", what, reached, "share"))
    return rows


def arm_rows(arm: Arm) -> list[Row]:
    """Return what one run was: acceptance at its start and end, and what its draft cost."""
    prefix = f"drafts.{arm.name}"
    train_s, draft_s = sum(arm.values("perf/train_time")), sum(arm.values(TRAIN_TIME))
    sync_s, step_s = sum(arm.values(SYNC_TIME)), sum(arm.values("perf/step_time"))
    rows = []
    for metric, name, how in ((SERVED, "served", "as served"), (CLOSED, "rejection", "by rejection sampling")):
        for part, steps in (("first", arm.steps[:LAST]), ("last", arm.steps[-LAST:])):
            what = f"tokens a round {how}, {arm.what}, in the {part} {LAST} steps"
            if lengths := values_of(steps, metric):  # a draft that did not learn in any of them was not judged
                rows.append(Row(f"{prefix}.{name}.{part}", what, mean(lengths), "tokens/round"))
    for metric, name, unit, what in TIMES:
        values = arm.values(metric)[-LAST:]
        rows.append(Row(f"{prefix}.{name}.last", f"{what}, {arm.what}, in the last {LAST} steps", mean(values), unit))
    rewards = arm.values(REWARD)[-LAST:]
    rows.append(Row(f"{prefix}.reward.last", f"mean reward of the last {LAST} steps", mean(rewards), "reward"))
    if arm.name == "plain":
        return rows
    rows.append(Row(f"{prefix}.train_share", "training the draft, of the trainer's time", draft_s / train_s, "share"))
    share = (draft_s + sync_s) / step_s
    rows.append(Row(f"{prefix}.step_share", "training and pushing the draft, of the steps' time", share, "share"))
    return rows


def against_frozen(frozen: Arm, online: Arm) -> list[Row]:
    """Compare two runs of one seed: what learning brought, on the same replies."""
    rows = []
    for metric, name in ((SERVED, "served"), (CLOSED, "rejection")):
        pairs = zip(online.steps[-LAST:], frozen.steps[-LAST:], strict=True)
        both = [(ours[metric], theirs[metric]) for ours, theirs in pairs if metric in ours and metric in theirs]
        ratios = [ours / theirs for ours, theirs in both if ours is not None and theirs is not None]
        what = f"tokens a round over those of the draft as it is, the last {LAST} steps, {name}, {online.what}"
        if ratios:
            rows.append(Row(f"drafts.{online.name}_over_frozen.{name}", what, mean(ratios), "x"))
    return [*rows, reward_row(frozen, online)]


def reward_row(frozen: Arm, other: Arm) -> Row:
    """Compare the rewards of two runs of one seed, which draw the same tokens: nothing may differ."""
    steps = zip(other.values(REWARD), frozen.values(REWARD), strict=True)
    differing = max(abs(ours - theirs) for ours, theirs in steps)
    what = f"largest difference of a step's mean reward from that of the draft as it is, {other.what}"
    return at_most(f"drafts.{other.name}.reward_difference", what, differing, "reward", 0.0)


def measure_base(options: BenchOptions) -> list[Row]:
    """Judge the draft on the policy that training starts from, whose replies differ most."""
    judge = Judge(options.model, options, NUM_PROMPTS, DEPTH)
    of_mean = f"of {len(judge.sequences)} replies, {judge.mean_len:.1f} tokens in the mean"
    what = f"tokens a round where every draft stands, {of_mean}"
    rows = [Row("drafts.base.ceiling", what, judge.ceiling, "tokens/round")]
    judged = judge(options.draft)
    for (rule, temperature), length in judged.items():
        what = f"tokens a round by {rule}, draft temperature {temperature:g}, the policy before training"
        rows.append(Row(f"drafts.base.{rule}.t{temperature:g}", what, length, "tokens/round"))
    what = "block verification at draft temperature 1, the policy before training"
    return [*rows, at_least("drafts.base.own", what, judged["block", 1.0], "tokens/round", 2.2)]


def measure_judged(options: BenchOptions) -> list[Row]:
    """Judge the shipped draft and those that learned on the finished policy's replies to held-out prompts."""
    online, one_step = finished_arm("online", options), finished_arm("one_step", options)
    folders = {
        "frozen": options.draft,
        "one_step": str(one_step.folder / "draft"),
        "online": str(online.folder / "draft"),
    }
    judge = Judge(online.folder / "hf", options, NUM_PROMPTS, DEPTH)
    ceiling, of_mean = judge.ceiling, f"of {len(judge.sequences)} replies, {judge.mean_len:.1f} tokens in the mean"
    rows = [
        Row("drafts.judged.ceiling", f"tokens a round where every draft stands, {of_mean}", ceiling, "tokens/round")
    ]
    best: dict[str, float] = {}
    for name, draft in folders.items():
        judged = judge(draft)
        for (rule, temperature), length in judged.items():
            what = f"tokens a round by {rule}, draft temperature {temperature:g}, {ARMS[name][1]}, the finished policy"
            rows.append(Row(f"drafts.judged.{name}.{rule}.t{temperature:g}", what, length, "tokens/round"))
        best[name] = max(judged.values())
        if name == "online":
            what, own = "rejection sampling at draft temperature 1, learning", judged["rejection", 1.0]
            rows.append(at_least("drafts.judged.own", what, own, "tokens/round", 3.25))
    for name, part, bound in (("online", "best", 3.30), ("one_step", "one_step", 3.15)):
        what = f"the best rule and temperature, {ARMS[name][1]}"
        rows.append(at_least(f"drafts.judged.{part}", what, best[name], "tokens/round", bound))
    what = "the best rule and temperature, learning over as it is"
    return [*rows, Row("drafts.judged.best_over_frozen", what, best["online"] / best["frozen"], "x")]


def draw(path: Path, arms: Sequence[Arm]) -> None:
    """Write the picture of tokens per round over the steps."""
    # A step without a draft brings a token.
    lines = [Series(arm.what, tuple(enumerate(arm.values(SERVED) or [1.0] * len(arm.steps)))) for arm in arms]
    panel = Panel(
        f"tokens a round, chains of {DEPTH}",
        tuple(lines),
        "step",
        top=DEPTH + 1,
        step=1.0,
        value_format="{:.0f}",
        rule=1.0,
        doubles=False,
    )
    write_panels(path, [panel])


PARTS = {
    "main_job": f"{HERE}:measure_main_job",
    "base": f"{HERE}:measure_base",
    "judged": f"{HERE}:measure_judged",
    "untrained": f"{HERE}:measure_untrained",
    "mtp": f"{HERE}:measure_mtp",
    "drift": f"{HERE}:measure_drift",
    "elsewhere": "slime_spec.bench.online_drafts.elsewhere:measure_elsewhere",
}


def prepare(options: BenchOptions) -> None:
    """See Benchmark."""
    ModelSpec.from_folder(options.model)
    if options.install_peers:
        install(PEERS["vllm"], options.peers.expanduser())


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.add_argument(
        "--runs", metavar="FOLDER", nargs=1, type=Path, help="folder of the arms' runs: those that are there are read"
    )
    add_peer_flags(parser)


DRAFTS = Benchmark(
    what="Drafts in an RL run: as they are, learning online, from nothing; acceptance by step, and the cost (slow).",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=BenchOptions(seeds=(0,)),
)
