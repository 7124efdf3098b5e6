"""The command line of a server, and what is refused before one starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang_engine.arguments import Place, command_line, server_flags
from rollout.sglang_engine.installed import checked_in, installed_in
from slime_spec.config.tree import ClusterConfig, Config, RolloutConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from tests.support.sglang_checkpoints import make_target
from tests.support.tiny_drafts import edit_config

PLACE = Place("127.0.0.1", 31000)


def words(config: Config, speculate: bool = True, engine: int = 0, place: Place = PLACE) -> str:
    flags = server_flags(config, engine, place, speculate)
    return " ".join(command_line("python", flags, config.sglang_server.extra_args, checked_in()))


def test_the_settings_of_the_tree_become_sglangs_flags(config: Config) -> None:
    line = words(config)
    assert line.startswith(f"python -m sglang.launch_server --model-path {config.model.hf_checkpoint} ")
    for expected in (
        "--host 127.0.0.1 --port 31000",
        "--weight-version 0",
        "--device cpu",
        "--dtype float32",
        "--max-running-requests 8 --max-total-tokens 4096",
        "--incremental-streaming-output",
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {config.speculative.draft_model_path}",
        "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
    ):
        assert expected in line


def test_a_server_without_speculation_has_no_flag_of_it(config: Config) -> None:
    config = replace(config, sglang={"speculative_attention_mode": "decode"})
    assert "speculative" not in words(config, speculate=False)
    assert "speculative" not in words(replace(config, speculative=SpeculativeConfig(), sglang={}))


def test_flags_of_the_user_come_last_and_are_typed(config: Config) -> None:
    chosen: dict[str, Any] = {
        "mem_fraction_static": 0.7,
        "skip_server_warmup": False,
        "cuda_graph_bs_decode": (1, 2, 8),
        "enable_metrics": True,
    }
    line = words(replace(config, sglang=chosen))
    assert "--mem-fraction-static 0.7" in line
    assert "--cuda-graph-bs-decode 1 2 8" in line
    assert "--enable-metrics" in line
    assert "--skip-server-warmup" not in line


def test_one_engine_may_differ_from_the_others(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text("1: {mem_fraction_static: 0.5}\n")
    server = replace(config.sglang_server, overrides=str(path))
    config = replace(config, sglang_server=server, sglang={"mem_fraction_static": 0.7})
    assert "--mem-fraction-static 0.7" in words(config, engine=0)
    assert "--mem-fraction-static 0.5" in words(config, engine=1)
    path.write_text("one: {}\n")
    with pytest.raises(ConfigError, match="maps engine numbers"):
        words(config)


@pytest.mark.parametrize(("dest", "value"), [("port", 1), ("model_path", "x"), ("weight_version", "7")])
def test_what_the_engine_owns_cannot_be_set(config: Config, dest: str, value: object) -> None:
    with pytest.raises(ConfigError, match="belongs to the engine"):
        words(replace(config, sglang={dest: value}))


def test_a_flag_that_the_version_does_not_know_is_refused_with_the_nearest(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"is no flag of SGLang .*mem_fraction_static"):
        words(replace(config, sglang={"mem_fraction_statik": 0.7}))
    server = replace(config.sglang_server, extra_args=("--enable-metriks",))
    with pytest.raises(ConfigError, match="--enable-metrics"):
        words(replace(config, sglang_server=server))


def test_an_older_version_gets_only_what_it_knows(config: Config) -> None:
    known = checked_in()
    flags = {dest: flag for dest, flag in known.flags.items() if dest != "incremental_streaming_output"}
    line = command_line("python", server_flags(config, 0, PLACE), (), replace(known, flags=flags))
    assert "--incremental-streaming-output" not in line


def test_an_algorithm_that_sglang_lacks_is_refused_with_a_way_out(config: Config) -> None:
    with pytest.raises(ConfigError, match="NGRAM"):
        words(replace(config, speculative=SpeculativeConfig(algorithm="LOOKUP")))


def test_an_mtp_draft_inside_the_target_is_named_for_sglang(config: Config, tmp_path: Path) -> None:
    folder = str(edit_config(make_target(tmp_path / "mimo"), architectures=["MiMoForCausalLM"]))
    config = replace(config, model=replace(config.model, hf_checkpoint=folder))
    line = words(replace(config, speculative=SpeculativeConfig(algorithm="NEXTN")))
    assert f"--speculative-algorithm NEXTN --speculative-draft-model-path {folder}" in line


def test_gpus_are_tensor_parallel_ranks_and_the_draft_survives_the_offload(config: Config) -> None:
    gpus = replace(config, rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=4), cluster=ClusterConfig())
    line = words(gpus)
    assert "--tp-size 4" in line
    assert "--enable-memory-saver --enable-draft-weights-cpu-backup" in line
    assert "--device cpu" not in line
    assert "--tp-size 2" in words(replace(gpus, sglang={"dp_size": 2}))
    second = Place("10.0.0.2", 31000, num_nodes=2, node_rank=1, init_address="10.0.0.1:25000")
    assert "--nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:25000" in words(gpus, place=second)


def test_an_interpreter_without_sglang_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a Python that runs"):
        installed_in(str(tmp_path / "no-python"))
    with pytest.raises(ConfigError, match="must have a working sglang"):
        installed_in("python3")
