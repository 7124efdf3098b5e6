"""This table says which charts a page has, of which metrics; ``charts_of`` fills them with the values of runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slime_spec.report.evaluation import evaluation_charts
from slime_spec.report.folder import NO_DRAFT, ReportedRun
from slime_spec.report.series import ChartData, Line, by_position, line_of, phase_lines, staleness_lines

NUMBER = re.compile(r"\d+$")


@dataclass(frozen=True)
class Chart:
    """Describes one chart: the metrics drawn solid, those drawn dashed beside them, and what the axis of y is.

    A metric ``"train/draft_accept_pos_*"`` stands for all that begin so. ``error`` is the metric of what the first one
    may be off by. ``per_run`` makes a chart of each run, where one has several lines already. ``rule`` is a level that
    is marked, ``log`` a logarithmic axis.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str
    note: str = ""
    dashed: tuple[str, ...] = ()
    error: str | None = None
    rule: float | None = None
    log: bool = False
    per_run: bool = False


@dataclass(frozen=True)
class Section:
    """Holds charts under one heading."""

    title: str
    charts: tuple[Chart, ...]


SECTIONS = (
    Section(
        "Learning",
        (
            Chart("Reward", ("rollout/reward_mean",), "reward", "Mean of the step's scored samples."),
            Chart("Reward by task", ("rollout/reward_mean/*",), "reward", per_run=True),
            Chart(
                "Response length",
                ("rollout/response_len_mean",),
                "tokens",
                "Mean; dashed: the longest.",
                dashed=("rollout/response_len_max",),
            ),
            Chart("Replies cut at the limit", ("rollout/truncated_ratio",), "share"),
            Chart("Entropy", ("train/entropy",), "nats/token"),
            Chart("KL to the reference", ("train/kl_loss",), "nats/token"),
            Chart("Gradient norm", ("train/grad_norm",), "norm", "Before clipping."),
            Chart(
                "Train/rollout logprob difference",
                ("train/train_rollout_logprob_abs_diff",),
                "nats/token",
                "Mean |trainer's − engine's logprob| of the same tokens; logarithmic.",
                log=True,
            ),
            Chart("Clipped tokens", ("train/clip_fraction",), "share"),
            Chart("Prompts with a gradient", ("rollout/mixed_group_ratio",), "share", "Groups whose rewards differ."),
        ),
    ),
    Section("Evaluation", ()),
    Section(
        "Speculation",
        (
            Chart(
                "Accepted length and break-even",
                ("rollout/spec_accept_length",),
                "tokens/round",
                "Speculation pays where the solid line is above the dashed one (spec/break_even_length).",
                dashed=("spec/break_even_length",),
            ),
            Chart(
                "Net speed-up of decoding",
                ("spec/net_speedup_est",),
                "x",
                "Over plain decoding of the same tokens, with its uncertainty; below 1 speculation loses.",
                error="spec/net_speedup_err",
                rule=1.0,
            ),
            Chart("Acceptance rate", ("rollout/spec_accept_rate",), "share", "Accepted over proposed drafts."),
            Chart(
                "Acceptance by draft position over steps",
                ("spec/accept_rate_cum_pos_*",),
                "share of rounds",
                "Rounds that accepted this position and all before it.",
                per_run=True,
            ),
            Chart("Plain steps", ("spec/off_ratio",), "share", "Where the engine left speculation off."),
            Chart("Pays up to", ("spec/pays_up_to_batch",), "sequences"),
            Chart("Age of the draft", ("spec/draft_version_lag",), "versions", "Target's version less the draft's."),
        ),
    ),
    Section(
        "Draft learning",
        (
            Chart("Draft loss", ("train/draft_loss",), "loss"),
            Chart("Acceptance while learning", ("train/draft_accept_pos_*",), "share", "By position.", per_run=True),
            Chart("Right argmaxes while learning", ("train/draft_accuracy_pos_*",), "share", per_run=True),
            Chart("Accepted length to expect", ("train/draft_accept_length/*",), "tokens/round", per_run=True),
            Chart("Updates a step", ("train/draft_updates",), "updates", dashed=("train/draft_skipped_updates",)),
            Chart(
                "What an update costs and saves",
                ("spec/draft_update_cost",),
                "s",
                "Solid: cost; dashed: saving.",
                dashed=("spec/draft_update_saving",),
            ),
        ),
    ),
    Section(
        "Time",
        (
            Chart("Throughput of rollouts", ("perf/tokens_per_s",), "tokens/s"),
            Chart("Throughput of training", ("perf/train_tokens_per_s",), "tokens/s"),
            Chart(
                "Latency of a response",
                ("perf/request_latency_mean",),
                "s",
                "Mean; dashed: the slowest.",
                dashed=("perf/request_latency_max",),
            ),
            Chart("Engine time in the target", ("perf/engine_forward_share",), "share"),
            Chart("Engine time in the drafter", ("perf/engine_draft_share",), "share"),
        ),
    ),
    Section(
        "Pushes",
        (
            Chart("Push time", ("sync/seconds",), "s", "Dashed: checking.", dashed=("sync/verify_seconds",)),
            Chart(
                "Bytes to each engine", ("sync/bytes",), "bytes", "Dashed: the draft's.", dashed=("sync/draft_bytes",)
            ),
            Chart("Checksums equal", ("sync/checksum_ok",), "0 or 1"),
            Chart(
                "Canary's accepted length",
                ("sync/canary_accept_length",),
                "tokens/round",
                "Dashed: the engine with the lowest.",
                dashed=("sync/canary_accept_length_min",),
            ),
            Chart("Version that engines serve", ("sync/weight_version",), "version"),
        ),
    ),
    Section(
        "Engines",
        (
            Chart("Restarts", ("engine/restarts",), "restarts"),
            Chart("Interrupted samples", ("engine/interruptions",), "times"),
            Chart("Preempted sequences", ("engine/preemptions",), "times"),
        ),
    ),
)


def charts_of(runs: Sequence[ReportedRun]) -> list[tuple[str, list[ChartData]]]:
    """Return the sections that have values, each with its charts; metrics in no chart come last, a chart each."""
    sections = [(section.title, list(_filled(section, runs))) for section in SECTIONS]
    by_title = dict(sections)
    by_title["Evaluation"] = list(evaluation_charts(runs))
    by_title["Speculation"][:0] = _of_draft_kinds(runs)
    by_title["Speculation"] += [*by_position(runs), *_per_run("Acceptance by age of the weights", runs)]
    by_title["Time"][:0] = _per_run("Phases of a step", runs)
    by_title["Other metrics"] = list(_others(runs))
    return [(title, charts) for title, charts in by_title.items() if charts]


def _filled(section: Section, runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    for chart in section.charts:
        groups = [[(index, run)] for index, run in enumerate(runs)] if chart.per_run else [list(enumerate(runs))]
        for group in groups:
            lines = [line for index, run in group for line in _lines(chart, index, run)]
            if lines:
                owner = f": {group[0][1].name}" if chart.per_run and len(runs) > 1 else ""
                kind = "shades" if chart.per_run else "lines"
                yield ChartData(chart.title + owner, chart.unit, tuple(lines), kind, chart.note, chart.rule, chart.log)


def _lines(chart: Chart, index: int, run: ReportedRun) -> Iterator[Line]:
    solid = [name for pattern in chart.metrics for name in _matching(pattern, run)]
    dashed = [name for pattern in chart.dashed for name in _matching(pattern, run)]
    for shade, name in enumerate([*solid, *dashed]):
        label = _short(name) if name in dashed or name not in chart.metrics else ""
        error = chart.error if name in chart.metrics else None
        yield line_of(run, index, name, label, name in dashed, error, shade=shade)


def _matching(pattern: str, run: ReportedRun) -> list[str]:
    names = [
        name for name in run.names if (name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern)
    ]
    return sorted(
        names, key=lambda name: (NUMBER.sub("", name), int(found[0]) if (found := NUMBER.search(name)) else 0)
    )


def _short(name: str) -> str:
    """Return the part of a metric's name that tells it from its neighbours."""
    position = re.search(r"_pos_(\d+)$", name)
    return f"position {position[1]}" if position else re.sub(r"^\w+/(reward_mean/|draft_accept_length/)?", "", name)


def _of_draft_kinds(runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    """Yield the accepted length of runs whose drafts differ in kind: frozen, learning, of text, or none."""
    kinds = [run.draft_kind for run in runs]
    if len({kind for kind in kinds if kind}) < 2:
        return
    lines = []
    for index, (run, kind) in enumerate(zip(runs, kinds, strict=True)):
        if kind == NO_DRAFT:
            lines.append(Line(index, kind, tuple((step, 1.0) for step in run.steps)))
        elif kind is not None and (points := run.points("rollout/spec_accept_length")):
            lines.append(Line(index, kind, tuple(points)))
    kinds_shown = ", ".join(dict.fromkeys(kind for kind in kinds if kind))
    note = "Tokens of a decode step of the target; without a draft each takes one."
    yield ChartData(f"Accepted length: {kinds_shown}", "tokens/round", tuple(lines), note=note)


def _per_run(title: str, runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    stacked = title == "Phases of a step"
    for index, run in enumerate(runs):
        lines = phase_lines(run, index) if stacked else staleness_lines(run, index)
        owner = f": {run.name}" if len(runs) > 1 else ""
        if lines and stacked:
            yield ChartData(title + owner, "s", lines, "stacked", "The step's seconds, phase upon phase.")
        elif lines:
            note = "Of the samples whose oldest weights are so many versions behind the newest, in steps with several."
            yield ChartData(title + owner, "tokens/round", lines, "shades", note)


def _others(runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    drawn = [pattern for section in SECTIONS for chart in section.charts for pattern in (*chart.metrics, *chart.dashed)]
    drawn += [
        "eval/*",
        "spec/net_speedup_err",
        "spec/accept_rate_pos_*",
        "spec/accept_length_by_version/*",
        "perf/*_time",
    ]
    patterns = re.compile("|".join(re.escape(each).replace(r"\*", ".*") for each in drawn))
    for name in dict.fromkeys(name for run in runs for name in run.names):
        if not patterns.fullmatch(name):
            lines = [line_of(run, index, name) for index, run in enumerate(runs) if name in run.names]
            yield ChartData(name, "", tuple(lines))
