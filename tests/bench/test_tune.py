"""``slime-spec tune`` on tiny models, and what it concludes from made-up measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.bench.pays.sides import Result
from slime_spec.bench.tune.acceptance import Acceptance, acceptance_of
from slime_spec.bench.tune.candidates import Candidate, text_candidates
from slime_spec.bench.tune.push import PushCheck, accept_length, check_push, problem_of
from slime_spec.bench.tune.report import Found, show
from slime_spec.bench.tune.results import BatchResult, Choice, Lengths, SpeedUp, Swept
from slime_spec.bench.tune.sides import OFF, Cores, Side
from slime_spec.bench.tune.sweep import lengths_of, text_speed_up
from slime_spec.bench.tune.verdict import overall, verdict_of
from slime_spec.bench.tune.workload import KnownPrompt, Workload
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.interfaces import RolloutEngine
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.round_costs import DraftTimes, PassCurve, RoundCosts
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams, SpecCounters
from slime_spec.weights.messages import PushMessage, PushReply
from tests.support.embedded_harness import random_prompt
from tests.support.pushes import DirectTransport, other_weights, push_of

Capture = pytest.CaptureFixture[str]
PROMPTS = tuple(KnownPrompt(random_prompt(6 + i, seed=i)) for i in range(10))
DRAFT = Candidate("EAGLE3 d", SpeculativeConfig(algorithm="EAGLE3", draft_model_path="d"), "target_only")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tune") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(6)))
    return file


def test_the_command_measures_everything_and_names_flags_or_why_not(
    policy: Path, draft: Path, prompts: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = ["--hf-checkpoint", str(policy), "--draft", str(draft), "--prompts", str(prompts), "--no-push"]
    sizes = ["--batch-sizes", "1", "3", "--new-tokens", "8", "--rounds", "2", "--n-samples-per-prompt", "3"]
    assumed = ["--assume-accept", "2.5", "5"]
    written = ["--json", str(tmp_path / "tune.json"), "--chart", str(tmp_path / "tune.svg")]
    assert main(["tune", *argv, *sizes, *assumed, *written]) == 0
    assert "EAGLE3 draft" in (tmp_path / "tune.svg").read_text()
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "tune.json").read_text())
    rules = [(each["name"], each["rule"]) for each in found["acceptance"]]
    assert rules[3:] == [("EAGLE3 draft", rule) for rule in ("target_only", "gumbel", "block")]
    assert {name for name, _ in rules[:3]} == {"LOOKUP", "HISTORY", "NGRAM"}
    for batch, number in zip(found["batches"], (1, 3), strict=True):
        assert batch["batch"] == number
        assert batch["off_tokens_per_s"] > 0.0
        automatic = [name for name in batch["speed_ups"] if name.startswith("EAGLE3 draft") and name.endswith("auto")]
        assert len(automatic) == 1, "one rule of the draft takes turns"
        assert all(len(each["each"]) == 2 for each in batch["speed_ups"].values())
        assert set(batch["speed_ups"]).isdisjoint(batch["predicted"])
        assert [each["accept_length"] for each in batch["assumed"]] == [2.5, 5.0]
        assert batch["lengths"]["draft"] == "EAGLE3 draft"
        assert f"{number} at once: " in shown
    assert len(found["verdicts"]) == 2
    assert found["push"] is None
    assert found["command"].startswith("slime-spec tune ")
    assert found["costs"]["drafting"] == "measured"


def test_without_a_draft_texts_alone_take_turns(policy: Path, prompts: Path, tmp_path: Path) -> None:
    argv = ["--hf-checkpoint", str(policy), "--prompts", str(prompts), "--no-push", "--quick"]
    sizes = ["--batch-sizes", "1", "--new-tokens", "8", "--n-samples-per-prompt", "1", "--assume-accept", "3"]
    argv += ["--debug-rollout-only"]
    assert main(["tune", *argv, *sizes, "--json", str(tmp_path / "tune.json")]) == 0
    found = json.loads((tmp_path / "tune.json").read_text())
    assert {each["name"] for each in found["acceptance"]} == {"LOOKUP", "NGRAM"}
    assert found["batches"][0]["lengths"] is None
    assert found["costs"]["drafting"] == "free"


def test_sides_share_the_targets_weights_and_say_the_same(policy: Path) -> None:
    config = compose(["--hf-checkpoint", str(policy)])
    cores = Cores(config, max_running=4)
    workload = Workload(PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.0), num_samples=2)
    off = cores.off()
    plain = off.run(workload.waves(4, 0)).replies
    for candidate in text_candidates(has_texts=True):
        side = cores.side(candidate)
        assert side.core.decoder is off.core.decoder
        assert side.run(workload.waves(4, 0)).replies == plain
        assert Side(candidate, side.core, side.max_depth).run(workload.waves(4, 0)).replies == plain


def test_a_fixed_depth_is_drafted_in_every_round_and_leaves_the_engines_controller_alone(
    policy: Path, draft: Path
) -> None:
    config = compose(["--hf-checkpoint", str(policy)])
    cores = Cores(config, max_running=4)
    settings = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=str(draft))
    side = cores.side(Candidate("d", settings, "target_only"), depth=2)
    own = side.core.speculation.controller
    params = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    result = side.run(Workload(PROMPTS, params, num_samples=2).waves(4, 0))
    assert side.core.speculation.controller is own
    spec = [sample.spec for sample in result.samples]
    # Only a sample's last round may be short of drafts: it has one or two tokens left.
    assert all(2 * each.num_rounds - 1 <= each.num_drafted <= 2 * each.num_rounds for each in spec)
    assert all(each.num_off_steps <= 1 for each in spec)
    assert side.costs.knows_drafting


def test_acceptance_is_counted_by_position_where_a_draft_came_so_far() -> None:
    spec = SpecCounters(
        num_rounds=10, num_proposed=30, histogram=(4, 2, 1, 3), num_drafted=26, num_steps=3, num_tried=(10, 6, 3),
        num_off_steps=3,
    )  # fmt: skip
    sample = GeneratedSample("g", 0, (1,), (0.0,), "length", 0, 4, spec=spec)
    found = acceptance_of(DRAFT, Result((sample,), NetBenefit()))
    assert found.rates == pytest.approx((6 / 10, 4 / 6, 3 / 3))
    assert found.cumulative == pytest.approx((0.6, 0.4, 0.4))
    assert found.gained == pytest.approx((2 + 2 + 9) / 13)
    assert found.drafted == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rates", "passed"), [((0.9, 0.9, 0.9), 3), ((0.85, 0.72, 0.5), 2), ((0.8, 0.99, 0.99), 0), ((0.81,), 1), ((), 0)]
)
def test_positions_count_as_passed_up_to_the_first_below_the_bar(rates: tuple[float, ...], passed: int) -> None:
    assert Acceptance("x", "", rates, (), 0.0, 0.0).num_passed == passed


def test_a_texts_speed_up_counts_the_rows_of_its_drafts_and_nothing_for_finding_them() -> None:
    costs = RoundCosts(PassCurve(((1, 0.02), (8, 0.02), (16, 0.04))))
    found = Acceptance("text", "", (0.5,), (10,), gained=0.5, drafted=1.0)
    assert text_speed_up(costs, found, batch=4, context=0) == pytest.approx(1.5)
    assert text_speed_up(costs, found, batch=8, context=0) == pytest.approx(0.75)


def made_up(batch: int, lengths: Lengths | None = None, **each: tuple[float, ...]) -> BatchResult:
    """A result whose sides are named by their speed-ups: ``auto`` and ``fixed3`` of one draft."""
    depths = {name: int(name[-1]) if name[:-1] == "fixed" else None for name in each}
    sides = {name: Choice(DRAFT.flags(depth), depth) for name, depth in depths.items()}
    return BatchResult(batch, 100.0, sides, {name: SpeedUp(ratios) for name, ratios in each.items()}, {}, lengths)


def test_a_side_is_chosen_only_where_it_is_faster_in_every_repetition_and_by_more_than_noise() -> None:
    chosen = verdict_of(made_up(4, auto=(1.2, 1.3, 1.1)))
    assert (chosen.side, chosen.speed_up) == ("auto", SpeedUp((1.2, 1.3, 1.1)))
    assert chosen.flags == ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "d")
    assert verdict_of(made_up(4, auto=(1.2, 1.3, 0.99))).side is None
    assert verdict_of(made_up(4, auto=(1.01, 1.02, 1.01))).side is None


def test_a_fixed_length_is_chosen_over_the_engine_only_where_it_is_clearly_faster_each_time() -> None:
    fixed = verdict_of(made_up(4, auto=(1.2, 1.2), fixed3=(1.3, 1.4)))
    assert fixed.side == "fixed3"
    assert compose([*fixed.flags]).speculative == replace(DRAFT.settings, num_steps=3, eagle_topk=1)
    assert verdict_of(made_up(4, auto=(1.2, 1.3), fixed3=(1.3, 1.32))).side == "auto"


def test_a_side_that_pays_is_chosen_also_where_a_faster_one_does_not_pay_each_time() -> None:
    """Two repetitions of a measurement in which the engine's own choice was slow once and a fixed length never was."""
    measured = made_up(4, auto=(0.909, 1.536), fixed2=(1.227, 1.611), fixed7=(0.926, 1.9))
    assert verdict_of(measured).side == "fixed2"
    assert verdict_of(made_up(4, auto=(1.1, 1.2), fixed3=(0.9, 9.0))).side == "auto"
    why = verdict_of(made_up(4, auto=(0.909, 1.536))).why
    assert why.startswith("the fastest, auto, was 1.22x (0.91 to 1.54) of none, but not faster in every repetition")


def test_where_nothing_pays_the_reasons_are_numbers() -> None:
    costs = RoundCosts(
        PassCurve(((1, 0.02), (8, 0.02), (64, 0.16), (128, 0.32))), draft_guess=DraftTimes(0.0, 1e-4, 1e-5, 1e-6)
    )
    found = Acceptance("EAGLE3 d", "target_only", (0.5, 0.5), (40, 20), 0.7, 2.0)
    side = Side(DRAFT, type("Core", (), {"speculation": type("Speculation", (), {"costs": costs})})())  # type: ignore[arg-type]
    lengths = lengths_of(side, found, batch=64, context=0)
    assert lengths.by_formula == 2  # a draft step is nothing beside a pass over 64
    assert (lengths.by_costs, lengths.perfect) == (0, 1.0)
    why = verdict_of(made_up(64, lengths, auto=(0.97, 0.99))).why
    assert "0.98x (0.97 to 0.99)" in why
    assert "a round of one draft costs 2.01 plain steps and brings 1.50 tokens" in why
    assert "drafts that are all accepted would not pay either" in why


def test_one_setting_for_all_batches_loses_at_none_of_them() -> None:
    results = [made_up(1, auto=(1.5, 1.5), other=(2.0, 2.0)), made_up(64, auto=(1.0, 0.99), other=(0.9, 0.9))]
    both = overall(results)
    assert both.side is None, "the fastest on average loses at 64"
    results[1] = made_up(64, auto=(1.0, 0.99), other=(0.99, 0.99))
    assert overall(results).side == "other"
    assert overall([made_up(1, auto=(1.0, 1.02))]).side is None
    assert overall([made_up(1, fixed3=(1.5, 1.5))]).side is None, "a length is chosen batch by batch"
    assert overall([made_up(1, auto=(1.0, 2.0))]).side is None, "no batch at which it pays each time"


def test_the_report_has_a_line_for_each_batch_and_says_what_was_wrong_with_the_push() -> None:
    batches = (made_up(1, auto=(1.5, 1.5)), made_up(64, auto=(0.9, 0.9)))
    found = Found(
        per="CPU second",
        replies="8 replies a prompt",
        swept=Swept((Acceptance("EAGLE3 d", "block", (0.9, 0.9), (10, 9), 1.6, 2.0),), batches, "measured costs"),
        verdicts=tuple(map(verdict_of, batches)),
        overall=overall(batches),
        push=PushCheck(1.5, 10**9, True, 8, 7, 2.5, 1.0, problem="the draft was lost"),
    )
    out = StringIO()
    show(found, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    (row,) = [line for line in lines if line.startswith("│ auto ")]
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["1.50x (1.50 to 1.50)", "0.90x (0.90 to 0.90)"]
    assert "1 at once: auto, 1.50x (1.50 to 1.50)" in lines
    assert any(line.startswith("64 at once: do not speculate here: the fastest, auto, was 0.90x") for line in lines)
    assert any("7 of 8 greedy replies as before, accept length 2.50 before and 1.00 after" in line for line in lines)
    assert "push: WRONG: the draft was lost" in lines


def counted(num_rounds: int, histogram: tuple[int, ...]) -> GeneratedSample:
    spec = SpecCounters(num_rounds=num_rounds, histogram=histogram)
    return GeneratedSample("0", 0, (1,), (0.0,), "length", 1, 4, spec=spec)


def test_a_push_is_wrong_where_versions_or_the_draft_are_not_what_they_were() -> None:
    fine = PushCheck(length_before=2.8, length_after=2.7)
    assert problem_of(fine, {1}) == ""
    assert problem_of(PushCheck(length_before=None, length_after=None), {1}) == ""
    assert "versions [0, 1]" in problem_of(fine, {0, 1})
    assert "the draft was lost: 2.80 tokens a round before the push, 1.10 after" in problem_of(
        replace(fine, length_after=1.1), {1}
    )
    assert accept_length([counted(4, (1, 1, 2)), counted(1, (1,))]) == pytest.approx(2.0)
    assert accept_length([counted(0, ())]) is None


class OneEngine:
    """An engine of this process as the engines of a run."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        for request in requests:
            yield from self._engine.generate(request)

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        return [self._engine.update_weights(message)]


class Pusher:
    """A trainer with these weights that pushes them."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def push(self, version: int) -> Iterator[PushMessage]:
        return iter(push_of(self._weights, version))


def push_to_one_engine(policy: Path, draft: Path, weights: Mapping[str, torch.Tensor]) -> PushCheck:
    """What a push of ``weights`` to an engine with a draft shows."""

    @contextmanager
    def parts(config: Config) -> Iterator[Any]:
        engine = EmbeddedEngine(config, 0, DirectTransport())
        engine.start()
        try:
            yield OneEngine(engine), Pusher(weights)
        finally:
            engine.stop()

    settings = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=str(draft))
    workload = Workload(PROMPTS, SamplingParams(max_new_tokens=8, temperature=1.0), num_samples=1)
    return check_push(compose(["--hf-checkpoint", str(policy)]), Candidate("d", settings), workload, parts)


def test_a_push_of_the_same_weights_leaves_replies_and_acceptance_as_they_were(policy: Path, draft: Path) -> None:
    check = push_to_one_engine(policy, draft, load_file(policy / "model.safetensors"))
    assert check.problem == ""
    assert check.is_verified
    assert (check.num_replies, check.num_same) == (8, 8)
    assert check.length_before == check.length_after is not None
    assert check.nbytes > 0


def test_a_push_of_other_weights_shows_in_the_replies(policy: Path, draft: Path) -> None:
    check = push_to_one_engine(policy, draft, other_weights(policy, seed=1))
    assert check.is_verified
    assert check.num_same < check.num_replies


def test_a_push_that_an_engine_refuses_is_a_problem_of_the_report_and_no_traceback(policy: Path, draft: Path) -> None:
    weights = load_file(policy / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    assert "model.norm.weight" in push_to_one_engine(policy, draft, lacking).problem


def test_off_is_no_candidate_that_drafts() -> None:
    assert not OFF.has_network
    assert not OFF.settings.record.speculates
