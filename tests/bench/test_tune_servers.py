"""``slime-spec tune`` on SGLang's servers, which are fakes: what rounds take and accept is written here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
from slime_spec.bench.sglang.servers import Server, started
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.bench.tune.push import check_push
from slime_spec.bench.tune.results import Rounds, Swept
from slime_spec.bench.tune.server_settings import Judged, Setting, server_settings
from slime_spec.bench.tune.server_sweep import ServerPlan, assumed_of, fit_together, reason_of, sweep_servers
from slime_spec.bench.tune.server_turns import Turn, acceptance_of_server, rounds_of
from slime_spec.bench.tune.verdict import overall, verdict_of
from slime_spec.bench.tune.workload import KnownPrompt, Workload
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose, composed
from slime_spec.speculation.draft_length import rate_of_length
from slime_spec.types import SamplingParams, SpecCounters
from slime_spec.weights.messages import PushMessage
from tests.bench.test_tune import OneEngine, Pusher
from tests.sglang.conftest import rows_of
from tests.support.pushes import DirectTransport
from tests.support.sglang_checkpoints import make_draft, make_target

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "sglang_fake"
STEP_S = 0.02  # of a server that does not speculate
PATTERN = (3, 2, 0, 1)  # accepted drafts, round by round: 2.5 tokens a round
NUM_TOKENS = 1 + sum(PATTERN) + len(PATTERN)  # the prefill's, and four whole rounds
PLAN = ServerPlan(batch_sizes=(4,), num_repetitions=2, seconds=60.0, time="seconds", assumed_lengths=(3.0,))
CHAIN = SpeculativeConfig("EAGLE3", "draft", num_steps=3, eagle_topk=1, num_draft_tokens=4)
BY_TABLE = "It could draft by a table of batches."
GREEDY = ("--rollout-temperature", "0", "--debug-rollout-only")
Script = Callable[[Config], FakeServer]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("tune") / "target")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return make_draft(tmp_path_factory.mktemp("tune") / "mine", target, "EAGLE3")


def flags_of(target: Path, *flags: str) -> list[str]:
    """Flags of a run on this machine's CPU, where no SGLang is installed; only prompts of its context's length."""
    engine = ["--rollout-engine", "sglang", "--rollout-num-gpus-per-engine", "0", "--skip-check", "sglang-version"]
    lengths = ["--rollout-max-prompt-len", "64", "--rollout-max-response-len", "64"]
    attention = [] if "--sglang-attention-backend" in flags else ["--sglang-attention-backend", "intel_amx"]
    return ["--hf-checkpoint", str(target), *engine, *lengths, *attention, *flags]


def setting_of(draft: Path, name: str = "EAGLE3 mine, 3 drafts", **numbers: int) -> Setting:
    return Setting(Candidate(name, replace(CHAIN, draft_model_path=str(draft), **numbers), "target_only"))


def workload(num_tokens: int = NUM_TOKENS) -> Workload:
    prompts = tuple(KnownPrompt((5, 6, number)) for number in range(9))
    return Workload(prompts, SamplingParams(num_tokens, temperature=1.0, ignore_eos=True), num_samples=4)


def fake_server(speculates: bool, **attributes: Any) -> FakeServer:
    server = FakeServer()
    server.speculates, server.step_s, server.delay_s, server.pattern = speculates, STEP_S, STEP_S, PATTERN
    server.only_counts = True
    for name, value in attributes.items():
        setattr(server, name, value)
    return server


def swept(target: Path, settings: list[Setting], folder: Path, script: Script, together: bool, batch: int = 4) -> Swept:
    """What a sweep finds on fakes of this process; the only time is what their requests are said to take.

    All requests of a wave take as long as each other, so that the wave takes as long as one.
    """
    servers: list[FakeServer] = []

    @contextmanager
    def start(config: Config) -> Iterator[Server]:
        servers.append(server := script(config))
        server.rows = rows_of(target)
        with serving(server) as address:
            own = replace(config.sglang_server, external_addrs=(address,))
            with started(replace(config, sglang_server=own, sglang={})) as each:
                yield each

    def clock() -> float:
        return sum(server.slept_s for server in servers) / batch

    share = ["--sglang-mem-fraction-static", "0.4"] if together else []
    judged = Judged(tuple(settings), by_batch={setting.name: BY_TABLE for setting in settings})
    plan = replace(PLAN, batch_sizes=(batch,))
    return sweep_servers(compose(flags_of(target, *share)), judged, plan, workload(), folder, start, clock)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("batch", "round_steps"), [(1, 1.25), (8, 2.75)])
def test_a_draft_pays_where_its_round_costs_less_than_it_brings(
    target: Path, draft: Path, tmp_path: Path, together: bool, batch: int, round_steps: float
) -> None:
    """A round brings 2.5 tokens, and takes 1.25 plain steps of one sequence and 2.75 of eight."""

    def script(config: Config) -> FakeServer:
        return fake_server(config.speculative.record.speculates, delay_s=round_steps * STEP_S)

    found = swept(target, [setting_of(draft)], tmp_path, script, together, batch)
    (acceptance,) = found.acceptance
    assert acceptance.rates == pytest.approx((3 / 4, 2 / 3, 1 / 2))
    assert acceptance.gained == pytest.approx(1.5)
    name = "EAGLE3 mine, 3 drafts, target_only"
    (result,) = found.batches
    assert result.rounds == {name: Rounds(pytest.approx(2.5), pytest.approx(round_steps), most=4)}
    # The prompts' pass takes a round's time here, and so five rounds stand against one step for each token.
    speed_up = NUM_TOKENS / ((1 + len(PATTERN)) * round_steps)
    assert result.speed_ups[name].each == pytest.approx((speed_up,) * (2 if together else 4))
    verdict = verdict_of(result)
    assert verdict.side == (name if speed_up > 1.0 else None)
    if speed_up > 1.0:
        assert compose([*flags_of(target), *verdict.flags]).speculative == setting_of(draft).candidate.settings
    else:
        assert "its round takes 2.75 plain steps and brings 2.50 tokens, 4 at most" in verdict.why
    assert overall(found.batches).side == verdict.side
    assert found.best == setting_of(draft).candidate
    assert len(found.notes) == (0 if together else 1)


def test_a_draft_that_is_never_accepted_pays_nowhere(target: Path, draft: Path, tmp_path: Path) -> None:
    def script(config: Config) -> FakeServer:
        return fake_server(config.speculative.record.speculates, pattern=(0,), delay_s=1.5 * STEP_S)

    found = swept(target, [setting_of(draft)], tmp_path, script, together=True)
    (verdict,) = map(verdict_of, found.batches)
    assert verdict.side is None
    assert "its round takes 1.50 plain steps and brings 1.00 tokens" in verdict.why
    assert found.acceptance[0].rates == (0.0,)
    rate = rate_of_length(3.0, 7)
    better = (1 + rate + rate**2 + rate**3) / 1.5
    assert found.batches[0].assumed == ((3.0, 3, pytest.approx(better)),)


def test_a_machine_that_drifts_widens_the_range_and_is_told(target: Path, draft: Path, tmp_path: Path) -> None:
    times = iter((1.0, 2.0))  # of no speculation: before the settings, and after them

    def script(config: Config) -> FakeServer:
        speculates = config.speculative.record.speculates
        return fake_server(speculates, step_s=STEP_S if speculates else next(times) * STEP_S)

    found = swept(target, [setting_of(draft)], tmp_path, script, together=False)
    (ratios,) = found.batches[0].speed_ups.values()
    speed_up = NUM_TOKENS / (1 + len(PATTERN))
    assert ratios.each == pytest.approx((speed_up, speed_up, 2 * speed_up, 2 * speed_up))
    (note,) = found.notes
    assert "its speed was 0.50x at 4 at once the second time" in note
    assert "--sglang-mem-fraction-static" in note


def test_a_server_without_counters_is_timed_all_the_same(target: Path, draft: Path, tmp_path: Path) -> None:
    def script(config: Config) -> FakeServer:
        return fake_server(config.speculative.record.speculates, counts=False)

    found = swept(target, [setting_of(draft)], tmp_path, script, together=True)
    (batch,) = found.batches
    assert verdict_of(batch).side == "EAGLE3 mine, 3 drafts, target_only"
    assert list(batch.rounds.values()) == [Rounds(None, None, most=4)]
    assert found.acceptance[0].gained is None
    assert batch.assumed == ()
    assert any("no server counted its rounds" in note for note in found.notes)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Any]], None]:
    """``scripted({"NGRAM": {...}})``: ``python -m sglang.launch_server`` is a fake that behaves so by algorithm."""

    def write(script: dict[str, Any]) -> None:
        (tmp_path / "script.json").write_text(json.dumps(script))
        monkeypatch.setenv("SGLANG_FAKE_SCRIPT", str(tmp_path / "script.json"))

    monkeypatch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{ROOT}")
    monkeypatch.setenv("SGLANG_FAKE_DELAY_S", "0.002")
    return write


def tune(target: Path, tmp_path: Path, *argv: str) -> int:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(5)))
    sizes = ["--quick", "--batch-sizes", "2", "--new-tokens", "12", "--n-samples-per-prompt", "2", "--no-push"]
    sizes += ["--sglang-mem-fraction-static", "0.4"]
    return main(["tune", *flags_of(target, "--prompts", str(prompts)), *sizes, *argv])


def test_the_command_goes_on_without_what_cannot_be_started_and_says_why(
    target: Path,
    draft: Path,
    tmp_path: Path,
    scripted: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted({"NGRAM": {"dies": "torch.OutOfMemoryError: CUDA out of memory"}, "EAGLE": {"crashes": True}})
    other = make_draft(tmp_path / "other", target, "EAGLE")
    files = ["--json", str(tmp_path / "tune.json"), "--chart", str(tmp_path / "tune.svg")]
    assert tune(target, tmp_path, "--draft", str(draft), "--draft", str(other), *files) == 0
    found, shown = json.loads((tmp_path / "tune.json").read_text()), capsys.readouterr().out
    measured = "EAGLE3 mine, 3 drafts, target_only"
    assert list(found["batches"][0]["speed_ups"]) == [measured]
    left_out = found["left_out"]
    assert "GPU memory" in left_out["NGRAM, 4 tokens"]
    assert "died" in left_out["EAGLE other, 3 drafts, target_only"]
    assert "the servers run on the CPU" in left_out["EAGLE3 mine, 3 drafts, rejection"], "the doctor knows"
    assert "left out: NGRAM, 4 tokens: its server must start." in shown
    assert "do not speculate" in shown or "--speculative-algorithm EAGLE3" in shown
    assert any("verifies by argmax" in note or "speculate at temperature 1" in note for note in found["notes"])
    assert found["batches"][0]["rounds"][measured]["accept_length"] == pytest.approx(3.0, abs=0.4)
    assert measured in (tmp_path / "tune.svg").read_text()


def test_without_a_server_to_compare_with_there_is_one_clear_error(
    target: Path, tmp_path: Path, scripted: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted({"NONE": {"dies": "unrecognized arguments: --device"}})
    assert tune(target, tmp_path) == 2
    assert "this SGLang does not know a flag" in capsys.readouterr().err
    scripted({"NONE": {"crashes": True}})
    assert tune(target, tmp_path) == 2
    assert "the server without speculation must keep serving: the server died" in capsys.readouterr().err


class LosingPusher(Pusher):
    """A trainer after whose push the server's draft is never accepted again."""

    def __init__(self, weights: Any, server: FakeServer) -> None:
        super().__init__(weights)
        self._server = server

    def push(self, version: int) -> Iterator[PushMessage]:
        self._server.pattern = (0,)
        return super().push(version)


@pytest.mark.parametrize("loses", [False, True])
def test_a_push_goes_through_the_engine_to_its_server_and_the_draft_is_looked_for_after_it(
    target: Path, draft: Path, tmp_path: Path, loses: bool
) -> None:
    candidate = setting_of(draft).candidate
    server = fake_server(True)
    weights = load_file(target / "model.safetensors")

    @contextmanager
    def parts(config: Config) -> Iterator[Any]:
        assert config.speculative == candidate.settings, "the numbers that the server was measured with"
        server.rows = rows_of(target)
        with serving(server) as address:
            own = replace(config.sglang_server, external_addrs=(address,), canary_prompts=0)
            own_run = replace(config.run, mode="rollout_only", output_dir=str(tmp_path))
            engine = SglangEngine(replace(config, sglang_server=own, run=own_run), 0, DirectTransport())
            engine.start()
            try:
                yield OneEngine(engine), LosingPusher(weights, server) if loses else Pusher(weights)
            finally:
                engine.stop()

    check = check_push(compose(flags_of(target)), candidate, workload(), parts)
    assert server.told("/update_weights_from_tensor")
    assert (check.num_replies, check.num_same) == (8, 8)
    assert check.length_before == pytest.approx(1 + 15 / 9), (
        "23 tokens after the first: two rounds of each, and one more"
    )
    if loses:
        assert "the draft was lost" in check.problem
    else:
        assert (check.problem, check.length_after) == ("", check.length_before)


def test_settings_are_few_and_what_a_server_cannot_take_is_left_out_with_the_reason(target: Path, draft: Path) -> None:
    def judged(*flags: str, quick: bool = False) -> Judged:
        made = composed(flags_of(target, *flags))
        return server_settings(made.config, made.given, [str(draft)], quick)

    texts = ["NGRAM, 4 tokens", "NGRAM, 12 tokens"]
    chains = [f"EAGLE3 mine, {words}, target_only" for words in ("3 drafts", "1 draft", "5 drafts", "a tree of 8")]
    greedy = judged(*GREEDY)
    assert [each.name for each in greedy.settings] == [*texts, *chains]
    assert greedy.left_out == {}
    assert not any("temperature" in warning for warning in greedy.warnings)
    assert [each.name for each in judged(*GREEDY, quick=True).settings] == [texts[0], chains[0]]
    sampled = judged()
    assert [each.name for each in sampled.settings] == [*texts, *chains]
    assert list(sampled.left_out) == ["EAGLE3 mine, 3 drafts, block", "EAGLE3 mine, 3 drafts, rejection"]
    block, rejection = sampled.left_out.values()
    assert "speculative_use_block_verification is no flag of SGLang" in block
    assert "the servers run on the CPU (check rejection-sampling)" in rejection
    assert any("temperature 1" in warning for warning in sampled.warnings)
    assert "--speculative-adaptive" in sampled.by_batch[chains[0]]
    assert "--speculative-adaptive" not in sampled.by_batch[chains[-1]], "a tree has no table"


def test_the_runs_own_numbers_take_part_as_configured(target: Path, draft: Path) -> None:
    tree = ["--speculative-num-steps", "2", "--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "4"]
    own = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft), *tree]
    made = composed(flags_of(target, *GREEDY, *own))
    judged = server_settings(made.config, made.given, [], is_quick=True)
    names = [each.name for each in judged.settings]
    assert names == ["NGRAM, 4 tokens", "EAGLE3 mine, 3 drafts, target_only", "EAGLE3 mine, as configured"]
    assert judged.settings[-1].candidate.settings == made.config.speculative


def test_a_server_that_may_not_start_even_without_speculation_is_refused_at_once(target: Path) -> None:
    made = composed(flags_of(target, "--sglang-attention-backend", "fa3"))
    with pytest.raises(ConfigError, match="cpu-backend"):
        server_settings(made.config, made.given, [], is_quick=True)


def test_two_servers_run_together_only_where_each_was_told_to_take_less_than_half(target: Path) -> None:
    assert not fit_together(compose(flags_of(target)))
    assert not fit_together(compose(flags_of(target, "--sglang-mem-fraction-static", "0.5")))
    assert fit_together(compose(flags_of(target, "--sglang-mem-fraction-static", "0.45")))


def turn(num_tokens: int, seconds: float, histogram: tuple[int, ...] = (), unbinned: int = 0) -> Turn:
    rounds = sum(histogram) or (4 if unbinned else 0)
    spec = SpecCounters(rounds, 3 * rounds, histogram, num_steps=3, num_correct_unbinned=unbinned)
    return Turn(num_tokens, num_samples=2, seconds=seconds, prompts_s=1.0, spec=spec)


def test_a_rounds_cost_is_what_it_brought_over_the_speed_without_the_prompts() -> None:
    # 20 tokens of 8 rounds in 5 s, and in 10 s without drafts: 2.5 tokens a round at twice the speed.
    pairs = [(turn(22, 6.0, (2, 2, 2, 2)), turn(22, 11.0))] * 2
    assert rounds_of(pairs, most=4) == Rounds(pytest.approx(2.5), pytest.approx(1.25), 4)
    assert rounds_of([(turn(22, 1.0, (2, 2, 2, 2)), turn(22, 11.0))], most=4) == Rounds(2.5, None, 4)
    assert rounds_of([(turn(22, 6.0), turn(22, 11.0))], most=4) == Rounds(None, None, 4)


def test_acceptance_is_given_as_far_as_the_server_counts_it() -> None:
    candidate = Candidate("x", CHAIN, "block")
    known = acceptance_of_server(candidate, {1: [turn(22, 6.0, (4, 2, 1, 1))], 4: [turn(22, 6.0, (0, 2))]})
    assert known.rates == pytest.approx((6 / 10, 2 / 6, 1 / 2))
    assert (known.num_tried, known.gained, known.drafted) == ((10, 6, 2), pytest.approx(0.9), 3.0)
    in_all = acceptance_of_server(candidate, {1: [turn(22, 6.0, unbinned=6)]})
    assert (in_all.rates, in_all.gained) == ((), 1.5)


def test_an_assumed_draft_is_judged_by_the_chains_that_were_measured(draft: Path) -> None:
    settings = {
        "1": setting_of(draft, num_steps=1, num_draft_tokens=2),
        "3": setting_of(draft),
        "tree": setting_of(draft, eagle_topk=2, num_draft_tokens=6),
        "text": Setting(Candidate("NGRAM", SpeculativeConfig("NGRAM", num_draft_tokens=4))),
    }
    costs = {"1": 1.5, "3": 2.0, "tree": 0.1, "text": 0.1}
    rounds = {name: Rounds(1.0, cost, {"1": 2, "tree": 3}.get(name, 4)) for name, cost in costs.items()}
    # Accepted always: seven of seven drafts, and so three of three.
    assert assumed_of(8.0, settings, rounds) == (8.0, 3, pytest.approx(4 / 2.0))
    assert assumed_of(1.01, settings, rounds) == (1.01, 0, 1.0)
    texts = {"text": rounds["text"]}
    assert assumed_of(8.0, settings, texts) == (8.0, 3, pytest.approx(4 / 0.1))
    assert assumed_of(8.0, settings, {"1": Rounds(None, None, 2)}) is None


def test_of_a_lost_servers_log_the_last_line_stays() -> None:
    rule = "its server must start. The SGLang server ended.\nLikely cause: x.\nThe end of /a/b.log:\nmany\nlines"
    told = reason_of(ConfigError("rollout.engine", rule, "sglang", "Correct it."))
    assert told == "its server must start. The SGLang server ended. Likely cause: x. Its log ends: lines"
    assert reason_of(RuntimeError("gone")) == "gone"
