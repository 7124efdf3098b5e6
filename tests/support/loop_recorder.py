"""Trainer, engines and sample source of a loop in one, which only record what they were asked."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slime_spec.config.tree import Config, PushConfig, RolloutConfig, RunConfig, TrainerConfig
from slime_spec.errors import PushError
from slime_spec.interfaces import RunState
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.loop import Job
from slime_spec.rl.rollouts import Rollout
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.stop import StopSignals
from slime_spec.types import DraftReport, EngineStats, GeneratedSample, Prompt, Sample, SpecCounters, TrainReport
from slime_spec.weights.checksums import combined_checksum
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    CommitPush,
    Manifest,
    PreparePush,
    PushReply,
    Side,
)

DRAFT_REPORT = DraftReport(0.5, 1.0, (0.7,), (0.6,), {"rejection": 2.5, "block": 2.6}, 4, 0, 1.5)


@dataclass
class Recorder:
    """Trainer, engines and sample source in one, writing down what happens in order."""

    rewards: tuple[float | None, ...] = (1.0, 0.0)
    unfinished: tuple[int, ...] = ()
    refuse_version: int | None = None
    refuse_draft: int | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    stop_at: str = ""
    events: list[str] = field(default_factory=list)
    version: int = 0
    draft_version: int = 0
    side: str = "target"
    resumed: RunState | None = None
    num_stats: int = 0
    logged: dict[int, dict[str, float]] = field(default_factory=dict)

    def load(self) -> RunState | None:
        return self.resumed

    def happen(self, event: str) -> None:
        """Write an event down, and have the signal come while it happens."""
        self.events.append(event)
        if event == self.stop_at:
            self.stop.ask(signal.SIGTERM)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.happen(f"log {step}")
        self.logged[step] = values

    def rollout(self, state: RunState, progress) -> Rollout:
        self.happen(f"generate@{self.version}")
        prompt = Prompt(state.next_prompt_id, "task", "?", (1, 2), "x")
        samples = [
            Sample(
                prompt,
                GeneratedSample("g", i, (5,), (-1.0,), "stop", self.version, 2),
                "t",
                reward,
                "the reward raised X",
            )
            for i, reward in enumerate(self.rewards)
        ]
        return Rollout(samples, state.next_prompt_id + 3, self.unfinished)

    def step(self, samples, learns_draft: bool = True) -> TrainReport:
        self.happen(f"train {len(samples)}")
        report = TrainReport(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, len(samples), len(samples), 1, 1)
        return replace(report, draft=DRAFT_REPORT) if learns_draft else report

    def push(self, version: int, side: Side = "target", receivers: Sequence[int] = (), is_new=False):
        yield BeginPush(Manifest(side, version, ()))
        yield CommitPush(version, combined_checksum([]))

    def receivers(self) -> tuple[int, ...]:
        return (0,)

    def leave_out_failed(self, refusing: bool) -> bool:
        return False

    def bring_up_with(self, bring_up) -> None:
        self.bring_up = bring_up

    def broadcast(self, message) -> list[PushReply]:
        if isinstance(message, BeginPush):
            self.side = message.manifest.side
        is_draft = self.side == "draft"
        refused = self.refuse_draft if is_draft else self.refuse_version
        if isinstance(message, PreparePush) and message.version == refused:
            raise PushError("an engine refused")
        if isinstance(message, CommitPush) and is_draft:
            self.draft_version = message.version
            self.happen(f"push draft {message.version}")
        elif isinstance(message, CommitPush):
            self.version = message.version
            self.happen(f"push {message.version}")
        if isinstance(message, CancelPush):
            self.events.append(f"cancel {message.version}")
        return [PushReply(0, self.draft_version if is_draft else self.version, combined_checksum([]))]

    def stats(self) -> list[EngineStats]:
        """After each push the canary accepted one draft more a round."""
        self.num_stats += 1
        canary = SpecCounters(num_rounds=10, num_proposed=30, histogram=(0,) * self.version + (10,))
        return [
            EngineStats(
                *(self.version, 0, 0, 0, 0, True, 0),
                speculates=self.version < 2,
                canary=canary if self.version else SpecCounters(),
                benefit=NetBenefit(
                    *(each * self.num_stats for each in (5.0, 7.0, 0.5, 3.0, 2.0)),
                ),
                pays_up_to=6,
            )
        ]

    def set_resident(self, resident: bool) -> list[EngineStats]:
        self.events.append("resume" if resident else "release")
        return []


def job(recorder: Recorder, config: Config, *, trainer: bool = True, engines: bool = True) -> Job:
    saved: list[RunState] = []
    return Job(
        config=config,
        rollouts=recorder,
        trainer=recorder if trainer else None,  # type: ignore[arg-type]
        engines=recorder if engines else None,  # type: ignore[arg-type]
        log=recorder.log,
        keep_samples=lambda rollout_id, samples: None,
        save=lambda state: (saved.append(state), recorder.happen(f"save {state.rollout_id}"))[0],
        progress=lambda phase: lambda done, wanted: None,
        stop=recorder.stop,
        draft=DraftInTraining(config, recorder, recorder) if config.draft_training.enable else None,  # type: ignore[arg-type]
    )


def config(num_rollout: int = 2, interval: int = 1, save_interval: int | None = None) -> Config:
    return Config(
        run=RunConfig(num_rollout=num_rollout),
        rollout=RolloutConfig(batch_size=3),
        push=PushConfig(interval=interval),
        trainer=TrainerConfig(save_interval=save_interval),
    )


START = RunState(rollout_id=0, next_prompt_id=0, weight_version=0)
