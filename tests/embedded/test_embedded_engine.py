"""The engine behind the seam: threads, refusals, failures, pushes, residency."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import ConfigError, PushError
from slime_spec.launch.train import log_started
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import BeginPush, CancelPush, Manifest, PreparePush, PushBucket, PushMessage
from slime_spec.weights.run import run_push
from tests.support.embedded_harness import engine_config, greedy, make_core, random_prompt, run
from tests.support.pushes import DirectTransport, checksum_of, other_weights, push_of
from tests.support.tiny_models import make_tiny_checkpoint


@pytest.fixture
def config(tiny_llama: Path) -> Config:
    return engine_config(tiny_llama, "LOOKUP", max_total_tokens=3000)


@pytest.fixture
def engine(config: Config) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(config, 0, DirectTransport())
    engine.start()
    yield engine
    engine.stop()


def test_several_threads_generate_at_once_and_each_gets_its_own_samples(config: Config, engine: EmbeddedEngine) -> None:
    params = SamplingParams(max_new_tokens=25)
    requests = [GroupRequest(f"g{i}", random_prompt(4 + i, seed=i), (i, i + 50), params) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda request: list(engine.generate(request)), requests))
    expected = run(make_core(config), requests)
    for request, samples in zip(requests, answers, strict=True):
        assert sorted(sample.sample_index for sample in samples) == [0, 1]
        for sample in samples:
            assert sample.group_id == request.group_id
            assert sample.token_ids == expected[request.group_id, sample.sample_index].token_ids
            assert sample.e2e_latency_s > 0
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert 0 < stats.time_in_forward_s < stats.time_total_s


def test_abort_ends_a_long_generation(engine: EmbeddedEngine) -> None:
    generation = engine.generate(GroupRequest("g", random_prompt(5, seed=0), (1, 2), SamplingParams(500)))
    generation.abort()
    assert [sample.finish_reason for sample in generation] == ["abort", "abort"]


BAD_REQUESTS = {
    "max_position|context_length": {"params": greedy(600)},
    "at least one token": {"prompt_token_ids": ()},
    "from 0 to 130": {"prompt_token_ids": (3, 131)},
    "n_samples_per_prompt": {"seeds": ()},
    "max_new_tokens": {"params": greedy(0)},
    "temperature": {"params": SamplingParams(temperature=-0.1)},
    "top_p": {"params": SamplingParams(top_p=0.0)},
    "top_k": {"params": SamplingParams(top_k=0)},
    "min_p": {"params": SamplingParams(min_p=1.1)},
    "empty string": {"params": SamplingParams(stop=("",))},
    "repetition_penalty": {"params": SamplingParams(repetition_penalty=0.0)},
    "min_new_tokens": {"params": SamplingParams(max_new_tokens=4, min_new_tokens=5)},
    "logit_bias.*0 to 130": {"params": SamplingParams(logit_bias=((131, 1.0),))},
    "logit_bias.*numbers": {"params": SamplingParams(logit_bias=((3, float("nan")),))},
    "logit_bias.*at most": {"params": SamplingParams(logit_bias=((3, float("inf")),))},
    "stop_token_ids": {"params": SamplingParams(stop_token_ids=(5, -1))},
    "frequency_penalty": {"params": SamplingParams(frequency_penalty=float("nan"))},
    "presence_penalty": {"params": SamplingParams(presence_penalty=float("inf"))},
    "temperature: must be at least 0 and at most 1e.30": {"params": SamplingParams(temperature=1e39)},
    "repetition_penalty: must be at least 1e-09": {"params": SamplingParams(repetition_penalty=1e-300)},
    "repetition_penalty.*at most 2": {"params": SamplingParams(repetition_penalty=1e300)},
    "at most 32 strings": {"params": SamplingParams(stop=("a",) * 33)},
    "at most 1024 characters": {"params": SamplingParams(stop=("a" * 1025,))},
    "logit_bias: must name a token once": {"params": SamplingParams(logit_bias=((3, 1.0), (3, 1.0)))},
    "logit_bias: must leave a token": {"params": SamplingParams(logit_bias=tuple((i, -inf) for i in range(131)))},
    "min_new_tokens: must leave a token": {
        "params": SamplingParams(
            min_new_tokens=1, stop_token_ids=tuple(range(2, 131)), logit_bias=((0, -inf), (1, -inf))
        )
    },
}


@pytest.mark.parametrize("message", BAD_REQUESTS)
def test_a_request_that_can_never_run_is_refused(engine: EmbeddedEngine, message: str) -> None:
    """Case audit/01 among them: a distribution that would be NaN."""
    request = GroupRequest("g", (1, 2, 3), (0,), greedy(4))
    with pytest.raises(ConfigError, match=message):
        engine.generate(replace(request, **BAD_REQUESTS[message]))
    assert next(iter(engine.generate(request))).finish_reason == "length"


def test_a_request_beyond_the_kv_bound_is_refused(tiny_llama: Path) -> None:
    engine = EmbeddedEngine(engine_config(tiny_llama, max_total_tokens=40), 0, DirectTransport())
    engine.start()
    with pytest.raises(ConfigError, match="max_total_tokens"):
        engine.generate(GroupRequest("g", (1,) * 21, (0,), greedy(20)))
    samples = list(engine.generate(GroupRequest("g", (1,) * 20, (0, 1, 2), greedy(20))))
    assert len(samples) == 3
    engine.stop()


def test_a_context_beyond_the_models_is_refused_before_loading(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        EmbeddedEngine(engine_config(tiny_llama, context_length=513), 0, DirectTransport())


def test_an_error_in_the_loop_reaches_every_waiting_caller_and_later_ones(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_step() -> None:
        raise ZeroDivisionError("a bug in the forward pass")

    monkeypatch.setattr(engine._core, "step", broken_step)
    generation = engine.generate(GroupRequest("a", (1, 2), (0, 1), greedy(5)))
    with pytest.raises(RuntimeError, match="stopped before") as caught:
        list(generation)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="not running"):
        engine.generate(GroupRequest("b", (1, 2), (0,), greedy(5)))
    with pytest.raises(RuntimeError, match="not running"):
        engine.set_resident(False)


def test_an_error_in_a_command_reaches_its_caller_and_everyone_else(engine: EmbeddedEngine) -> None:
    generation = engine.generate(GroupRequest("a", (1, 2), (0,), greedy(500)))
    with pytest.raises(KeyError, match="a bug"):
        engine._thread.call(lambda: {}["a bug"])
    with pytest.raises(RuntimeError, match="stopped before"):
        list(generation)


def test_stopping_an_engine_that_never_started_is_harmless(config: Config) -> None:
    engine = EmbeddedEngine(config, 0, DirectTransport())
    engine.stop()
    engine.start()
    assert len(list(engine.generate(GroupRequest("g", (1, 2), (0,), greedy(3))))) == 1
    engine.stop()
    engine.stop()
    with pytest.raises(RuntimeError, match="not running"):
        engine.generate(GroupRequest("g", (1, 2), (0,), greedy(3)))


def test_stopping_wakes_callers(config: Config) -> None:
    engine = EmbeddedEngine(config, 0, DirectTransport())
    engine.start()
    generation = engine.generate(GroupRequest("g", (1, 2), (0,), greedy(500)))
    engine.stop()
    with pytest.raises(RuntimeError, match="stopped before"):
        list(generation)


FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_push_the_engine_computes_with_exactly_the_pushed_weights(tmp_path: Path, family: str) -> None:
    architecture, overrides = FAMILIES[family]
    folder = make_tiny_checkpoint(tmp_path / "old", architecture, **overrides)
    engine = EmbeddedEngine(engine_config(folder), 2, DirectTransport())
    engine.start()
    assert engine.weights_checksum() == checksum_of(load_file(folder / "model.safetensors"))
    weights = other_weights(folder, seed=1)
    before = next(iter(engine.generate(GroupRequest("g", (1, 2, 3), (0,), greedy(20)))))
    report = run_push(push_of(weights, version=7), lambda message: [engine.update_weights(message)])
    assert report.checksum == engine.weights_checksum() == checksum_of(weights)
    after = next(iter(engine.generate(GroupRequest("g", (1, 2, 3), (0,), greedy(20)))))
    assert (before.weight_version, after.weight_version, engine.stats().weight_version) == (0, 7, 7)
    assert (before.token_ids, before.engine) != (after.token_ids, after.engine)
    assert after.engine == 2
    engine.stop()


def test_the_engine_keeps_no_reference_into_pushed_memory(tiny_llama: Path, engine: EmbeddedEngine) -> None:
    weights = other_weights(tiny_llama, seed=2)
    run_push(push_of(weights, version=1), lambda message: [engine.update_weights(message)])
    committed = engine.weights_checksum()
    for tensor in weights.values():
        tensor.zero_()
    assert engine.weights_checksum() == committed


def send(engine: EmbeddedEngine, messages: list[PushMessage]) -> None:
    for message in messages:
        engine.update_weights(message)


def damaged(messages: list[PushMessage], how: str) -> list[PushMessage]:
    bucket = messages[2]
    assert isinstance(bucket, PushBucket)
    if how == "lost bucket":
        return [*messages[:2], *messages[3:]]
    if how == "flipped bit":
        handle = [tensor.clone() for tensor in bucket.handle]
        handle[0].view(torch.int32).flatten()[0] ^= 1
        return [*messages[:2], replace(bucket, handle=handle), *messages[3:]]
    if how == "wrong checksum":
        return [*messages[:-2], PreparePush(9, "0" * 32)]
    if how == "missing tensor":
        begin = messages[0]
        assert isinstance(begin, BeginPush)
        return [BeginPush(replace(begin.manifest, tensors=begin.manifest.tensors[1:]))]
    if how == "no begin":
        return messages[1:]
    if how == "commit before prepare":
        return [*messages[:-2], messages[-1]]
    assert how == "draft side"
    return [BeginPush(Manifest("draft", 9, ()))]


@pytest.mark.parametrize(
    "how",
    [
        "lost bucket",
        "flipped bit",
        "wrong checksum",
        "missing tensor",
        "no begin",
        "commit before prepare",
        "draft side",
    ],
)
def test_a_failed_push_leaves_version_and_weights_untouched(tiny_llama: Path, engine: EmbeddedEngine, how: str) -> None:
    before = engine.weights_checksum()
    *buckets, commit = push_of(other_weights(tiny_llama, seed=3), version=9)
    messages = [*buckets, PreparePush(9, commit.checksum), commit]
    with pytest.raises(PushError):
        send(engine, damaged(messages, how))
    assert engine.update_weights(CancelPush(9)).version == 0
    assert engine.weights_checksum() == before
    with pytest.raises(PushError, match="outside a push"):
        engine.update_weights(messages[-1])
    send(engine, messages)
    assert engine.stats().weight_version == 9


def test_a_push_while_requests_run_disturbs_none_and_new_ones_use_it(tiny_llama: Path, engine: EmbeddedEngine) -> None:
    started = Event()
    request = GroupRequest("old", (1, 2, 3), tuple(range(8)), SamplingParams(400))
    running = engine.generate(request, lambda progress: started.set())
    assert started.wait(timeout=60)
    run_push(push_of(other_weights(tiny_llama, seed=4), version=1), lambda message: [engine.update_weights(message)])
    new = next(iter(engine.generate(GroupRequest("new", (1, 2, 3), (0,), greedy(3)))))
    assert new.weight_version == 1
    assert {(len(sample.token_ids), sample.weight_version) for sample in running} == {(400, 0)}


def test_offloading_frees_the_kv_memory_and_coming_back_serves_again(engine: EmbeddedEngine) -> None:
    request = GroupRequest("g", random_prompt(9, seed=1), (1, 2), greedy(20))
    before = [sample.token_ids for sample in engine.generate(request)]
    assert engine._core.cache.own.nbytes > 0
    engine.set_resident(False)
    assert engine._core.cache.own.nbytes == engine._core.cache.prefixes.nbytes == 0
    assert not engine.stats().resident
    with pytest.raises(RuntimeError, match="offloaded"):
        engine.generate(request)
    engine.set_resident(True)
    assert [sample.token_ids for sample in engine.generate(request)] == before


def test_offloading_while_requests_run_is_refused(engine: EmbeddedEngine) -> None:
    generation = engine.generate(GroupRequest("g", (1, 2), (0,), greedy(400)))
    with pytest.raises(RuntimeError, match="requests are running"):
        engine.set_resident(False)
    assert len(next(iter(generation)).token_ids) == 400


def test_a_stop_string_ends_the_response_with_the_token_that_completes_it(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    engine = EmbeddedEngine(engine_config(folder, "LOOKUP"), 0, DirectTransport())
    engine.start()
    full = next(iter(engine.generate(GroupRequest("g", (1, 2, 3), (0,), greedy(30)))))
    text = f"w{full.token_ids[7]} w{full.token_ids[8]}"
    params = greedy(30, stop=("never there", text))
    cut = next(iter(engine.generate(GroupRequest("g", (1, 2, 3), (0,), params))))
    assert (cut.finish_reason, cut.matched_stop) == ("stop", text)
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert cut.token_ids[-2:] == full.token_ids[7:9]
    engine.stop()


def test_an_engine_says_from_its_start_on_what_its_rounds_cost_and_a_run_logs_that_once(
    config: Config, engine: EmbeddedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    stats = engine.stats()
    assert stats.costs is not None
    assert stats.costs.drafting == "free"
    assert {line.batch for line in stats.costs.lines} == {1, 2, 4, 8, 16, 32, 64}
    assert all(line.context < 512 for line in stats.costs.lines), "no longer than the engine's longest sequence"
    plain = EmbeddedEngine(replace(config, speculative=SpeculativeConfig()), 0, DirectTransport())
    plain.start()
    without = plain.stats()
    plain.stop()
    assert without.costs is None
    with caplog.at_level("INFO"):
        log_started([without, stats, stats])
    messages = [record.getMessage() for record in caplog.records]
    assert [text.partition(" kv")[0] for text in messages[:3]] == [f"engine started engine={i}" for i in range(3)]
    (table,) = messages[3:]
    assert table.splitlines() == ["timed rounds engine=1", *stats.costs.text()]
