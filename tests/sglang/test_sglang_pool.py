"""Two engines as one while a server, or an engine's own process, dies under its samples."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from rollout.pool import EnginePool, EngineProcessDied
from rollout.sglang_engine.fake import next_token
from slime_spec.config.tree import (
    Config,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SglangServerConfig,
    SpeculativeConfig,
)
from slime_spec.launch.cluster import Cluster, cluster
from slime_spec.ports import free_port
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.sglang.conftest import Checkpoints
from tests.support.engine_processes import process_of

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "sglang_fake"
PARAMS = SamplingParams(max_new_tokens=240)


@pytest.fixture(scope="module")
def config(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        run=RunConfig(mode="rollout_only", output_dir=str(tmp_path_factory.mktemp("run"))),
        model=ModelConfig(hf_checkpoint=str(checkpoints.target)),
        engine=EngineConfig(max_running_requests=8, max_total_tokens=4096),
        rollout=RolloutConfig(engine="sglang", num_engines=2, num_gpus_per_engine=0, num_cpus_per_engine=1),
        speculative=SpeculativeConfig(
            algorithm="EAGLE3",
            draft_model_path=str(checkpoints.eagle3),
            num_steps=3,
            eagle_topk=1,
            num_draft_tokens=4,
        ),
        sglang_server=SglangServerConfig(start_timeout_s=60.0, canary_prompts=0),
    )


@pytest.fixture(scope="module")
def ray_cluster(config: Config) -> Iterator[Cluster]:
    """A Ray whose actors find the fake under SGLang's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{ROOT}")
        # Eighty rounds take 1.6 s: what happens 0.3 s after they began happens in the middle.
        patch.setenv("SGLANG_FAKE_DELAY_S", "0.02")
        with cluster(config, None) as reserved:
            yield reserved


@pytest.fixture(scope="module")
def pool(config: Config, ray_cluster: Cluster) -> Iterator[EnginePool]:
    with started(config, ray_cluster) as pool:
        yield pool


@contextmanager
def started(config: Config, reserved: Cluster, **settings: object) -> Iterator[EnginePool]:
    port = free_port("127.0.0.1", config.rollout.num_engines)
    server = replace(config.sglang_server, port=port, **settings)  # type: ignore[arg-type]
    # Without cores of their own, so that several pools have room beside each other.
    with EnginePool(replace(config, sglang_server=server), replace(reserved.engines, num_cpus=0.0)) as pool:
        pool.start()
        yield pool


def kill_server(pool: EnginePool, engine: int) -> None:
    port = pool._config.sglang_server.port + engine
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if str(port) in words and words[1:2] == ["-m"]:
                process.send_signal(signal.SIGKILL)


def requests(num_groups: int, num_samples: int = 2) -> list[GroupRequest]:
    return [
        GroupRequest(str(g), (5 + g, 6), tuple(100 * g + i for i in range(num_samples)), PARAMS)
        for g in range(num_groups)
    ]


def whole(request: GroupRequest) -> tuple[int, ...]:
    ids: list[int] = []
    for position in range(PARAMS.max_new_tokens):
        last = ids[-1] if ids else request.prompt_token_ids[-1]
        ids.append(next_token(last, len(request.prompt_token_ids) + position))
    return tuple(ids)


def generate(pool: EnginePool, asked: Sequence[GroupRequest], meanwhile: Callable[[], None]) -> list[GeneratedSample]:
    """All samples; ``meanwhile`` happens once both engines have come some way with theirs."""

    def watch() -> None:
        while min(stats.num_running for stats in pool.stats()) < 8:
            time.sleep(0.02)
        time.sleep(0.3)
        meanwhile()

    watcher = threading.Thread(target=watch)
    watcher.start()
    samples = list(pool.generate(asked))
    watcher.join()
    return samples


def check_complete(samples: Sequence[GeneratedSample], asked: Sequence[GroupRequest]) -> None:
    expected = {(each.group_id, index): whole(each) for each in asked for index in range(len(each.seeds))}
    assert sorted((each.group_id, each.sample_index) for each in samples) == sorted(expected)
    for sample in samples:
        assert sample.token_ids == expected[sample.group_id, sample.sample_index]
        assert len(sample.logprobs) == len(sample.token_ids)
        assert (sample.finish_reason, sample.version_spans, sample.num_prompt_tokens) == ("length", (), 2)


def test_the_samples_of_a_server_that_dies_go_on_at_the_other_one_at_once(
    pool: EnginePool, caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests(8)
    samples = generate(pool, asked, lambda: kill_server(pool, 0))
    check_complete(samples, asked)
    assert {sample.engine for sample in samples} == {1}, "engine 0 had finished something, or was given it again"
    moved = [sample for sample in samples if int(sample.group_id) % 2 == 0]
    assert all(sample.spec.num_rounds == 0 for sample in moved), "nobody knows the rounds of a server that died"
    assert all(sample.spec.num_rounds > 0 for sample in samples if sample not in moved)
    assert "lost its server engine=0" in caplog.text
    while pool.stats()[0].num_restarts == 0:
        time.sleep(0.1)
    again = list(pool.generate(asked))
    check_complete(again, asked)
    assert {sample.engine for sample in again} == {0, 1}, "engine 0 serves again"


def test_a_server_that_was_replaced_between_generations_gets_its_share_of_the_next(pool: EnginePool) -> None:
    check_complete(list(pool.generate(requests(2))), requests(2))
    num_restarts = pool.stats()[0].num_restarts
    kill_server(pool, 0)
    while pool.stats()[0].num_restarts == num_restarts:
        time.sleep(0.1)
    asked = requests(8)
    samples = list(pool.generate(asked))
    check_complete(samples, asked)
    assert {sample.engine for sample in samples} == {0, 1}


def test_aborted_samples_come_out_and_go_on_in_the_next_generation(pool: EnginePool) -> None:
    asked = requests(24)
    parts = {(each.group_id, each.sample_index): each for each in generate(pool, asked, pool.abort)}
    assert len(parts) == 48
    assert {each.finish_reason for each in parts.values()} == {"abort"}
    assert {bool(each.token_ids) for each in parts.values()} == {True, False}, "some had not had their turn"
    rest = [
        replace(each, partials=tuple(parts[each.group_id, index] for index in range(len(each.seeds))))
        for each in reversed(asked)
    ]
    samples = list(pool.generate(rest))
    check_complete(samples, asked)
    for sample in samples:
        part = parts[sample.group_id, sample.sample_index]
        assert sample.e2e_latency_s > part.e2e_latency_s
        assert sample.spec.num_rounds >= part.spec.num_rounds
        assert sum(sample.spec.histogram) == sample.spec.num_rounds > 0


def test_a_server_that_dies_too_often_ends_the_generation_though_another_serves(
    config: Config, ray_cluster: Cluster
) -> None:
    with (
        started(config, ray_cluster, max_restarts=0) as pool,
        pytest.raises(ray.exceptions.RayTaskError, match=r"EngineFailed.*died 1 times"),
    ):
        generate(pool, requests(8), lambda: kill_server(pool, 0))


def test_an_engine_whose_process_dies_leaves_its_samples_to_the_other_and_another_is_started(
    config: Config, ray_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests(8)
    with started(replace(config, rollout=replace(config.rollout, max_engine_restarts_per_hour=1)), ray_cluster) as pool:
        samples = generate(pool, asked, lambda: os.kill(process_of(pool, 0), signal.SIGKILL))
        check_complete(samples, asked)
        died = [each for each in caplog.records if "engine process died" in each.message]
        assert [each.levelname for each in died] == ["ERROR"]
        while pool.receivers() != (0, 1):
            check_complete(list(pool.generate(asked)), asked)
        assert {sample.engine for sample in pool.generate(asked)} == {0, 1}
        assert pool.stats()[0].num_restarts == 1
        os.kill(process_of(pool, 1), signal.SIGKILL)
        check_complete(list(pool.generate(asked)), asked)
        with pytest.raises(EngineProcessDied, match="--max-engine-restarts-per-hour"):
            list(pool.generate(asked))
