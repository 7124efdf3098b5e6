"""The command line of a server, and what is refused before one starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import slime_spec
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.launcher import Launcher
from rollout.sglang_engine.nodes import NodeProcess
from slime_spec.config.tree import ClusterConfig, Config, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.train import with_absolute_paths
from slime_spec.run_folder import RunFolder
from slime_spec.sglang.arguments import Place, command_line, config_of_engine, planned_places, server_flags
from slime_spec.sglang.interpreter import checked_in, installed_in
from slime_spec.site import Site
from tests.support.pushes import DirectTransport
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


def overriding(config: Config, path: Path, text: str) -> Config:
    """Two engines with flags of their own."""
    path.write_text(text)
    server = replace(config.sglang_server, overrides=str(path))
    return replace(config, rollout=replace(config.rollout, num_engines=2), sglang_server=server)


def test_one_engine_may_differ_from_the_others(config: Config, tmp_path: Path) -> None:
    config = replace(config, sglang={"mem_fraction_static": 0.7, "enable_metrics": True})
    text = (
        "1: {mem_fraction_static: 0.5, context_length: 256, speculative_num_steps: 1, speculative_num_draft_tokens: 2}"
    )
    config = overriding(config, tmp_path / "engines.yaml", text)
    first, second = words(config, engine=0), words(config, engine=1)
    assert "--mem-fraction-static 0.7" in first
    assert "--speculative-num-steps 3" in first
    for expected in (
        "--mem-fraction-static 0.5",
        "--enable-metrics",
        "--context-length 256",
        "--speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2",
    ):
        assert expected in second


def test_what_one_engine_overrides_holds_for_all_that_the_engine_does(config: Config, tmp_path: Path) -> None:
    plain = overriding(config, tmp_path / "engines.yaml", "1: {speculative_algorithm: NONE}")
    text = "1: {speculative_algorithm: NGRAM, speculative_num_draft_tokens: 8}"
    ngram = overriding(config, tmp_path / "ngram.yaml", text)
    assert config_of_engine(ngram, 0).speculative == config.speculative
    assert config_of_engine(ngram, 1).speculative.algorithm == "NGRAM"
    assert SglangEngine(ngram, 0, DirectTransport())._draft is not None
    assert SglangEngine(ngram, 1, DirectTransport())._draft is None
    assert "speculative" not in words(plain, engine=1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("one: {}", "maps engine numbers"),
        ("2: {mem_fraction_static: 0.5}", "numbers the engines from 0 to 1"),
        ("1: {context_length: long}", "engine.context_length"),
        ("1: {mem_fraction_statik: 0.5}", "mem_fraction_static"),
        ("1: {port: 3000}", "belongs to the engine"),
        ("1: {dp_size: 2}", "sglang.dp_size"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(config: Config, tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        words(overriding(config, tmp_path / "engines.yaml", text), engine=1)


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


def on_gpus(config: Config, num_gpus: int, **cluster: Any) -> Config:
    """A job that trains too: only there is anything offloaded."""
    rollout = replace(config.rollout, num_gpus_per_engine=num_gpus)
    return replace(config, run=replace(config.run, mode="train"), rollout=rollout, cluster=ClusterConfig(**cluster))


def test_gpus_are_tensor_parallel_ranks_shared_by_replicas(config: Config) -> None:
    gpus = on_gpus(config, 4)
    assert "--tp-size 4" in words(gpus)
    assert "--device cpu" not in words(gpus)
    replicas = words(replace(gpus, sglang={"dp_size": 2}))
    assert words(replace(gpus, sglang={"dp_size": None})) == words(gpus)
    assert "--tp-size 2 " in replicas
    assert "--dp-size 2" in replicas
    attention = words(replace(gpus, sglang={"dp_size": 2, "enable_dp_attention": True}))
    assert "--tp-size 4 " in attention


def test_what_survives_an_offload_is_asked_for_only_where_there_is_one(config: Config) -> None:
    kept = "--enable-memory-saver --enable-draft-weights-cpu-backup"
    gpus = on_gpus(config, 1)
    assert kept in words(gpus)
    no_draft = replace(gpus, speculative=SpeculativeConfig(algorithm="NGRAM"))
    assert "--enable-memory-saver" in words(no_draft)
    assert "backup" not in words(no_draft)
    # The weights that come back from an offload are garbage, and not every step pushes others over them.
    seldom = replace(no_draft, push=replace(no_draft.push, interval=2))
    assert "--enable-memory-saver --enable-weights-cpu-backup" in words(seldom)
    for never in (
        replace(gpus, run=replace(gpus.run, mode="rollout_only")),
        on_gpus(config, 1, colocate=False),
        on_gpus(config, 1, offload=False),
    ):
        assert "memory-saver" not in words(never)


def test_an_engine_larger_than_a_node_has_a_place_on_each(config: Config) -> None:
    spanning = on_gpus(config, 16)
    first, second = planned_places(spanning, 1)
    assert first.url == "http://ENGINE1-NODE0:30001"
    assert "--nnodes 2 --node-rank 0 --dist-init-addr ENGINE1-NODE0:PORT" in words(spanning, place=first)
    line = words(spanning, place=second)
    assert "--host ENGINE1-NODE1 " in line
    assert "--tp-size 16" in line
    assert "--nnodes 2 --node-rank 1 --dist-init-addr ENGINE1-NODE0:PORT" in line
    assert "nnodes" not in words(on_gpus(config, 8))
    (alone,) = planned_places(on_gpus(config, 8), 0)
    assert alone == Place("127.0.0.1", 30000)


def test_a_place_is_reached_where_it_listens() -> None:
    assert Place("0.0.0.0", 1).url == "http://127.0.0.1:1"
    assert Place("::1", 2).url == "http://[::1]:2"


def test_a_draft_that_ships_with_the_package_is_a_folder_to_sglang(config: Config) -> None:
    name = next(
        iter(sorted(path.name for path in (Path(slime_spec.__file__).parent / "checkpoints" / "builtin").iterdir()))
    )
    drafting = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=f"builtin:{name}")
    line = words(replace(config, speculative=drafting)).split()
    folder = Path(line[line.index("--speculative-draft-model-path") + 1])
    assert folder.is_absolute()
    assert (folder / "config.json").is_file()
    unknown = replace(drafting, draft_model_path="builtin:nothing-of-the-kind")
    with pytest.raises(ConfigError, match=name):
        words(replace(config, speculative=unknown))


def test_the_log_of_a_server_is_where_the_run_is_wherever_its_actor_is(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = replace(config, run=replace(config.run, output_dir=None, name="here"))
    resolved = with_absolute_paths(relative, RunFolder.create(relative, [], "").path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    log = Launcher(resolved, 0, checked_in(), Site()).server(speculate=True).log
    assert log == tmp_path / "runs" / "here" / "engines" / "sglang-0.log"


def test_servers_listen_on_loopback_unless_other_nodes_must_reach_them(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launcher(config: Config, site: Site, engine: int = 0) -> Launcher:
        return Launcher(config, engine, checked_in(), site)

    site = Site("127.0.0.2", num_cluster_nodes=2)
    assert launcher(config, Site("127.0.0.2")).host == "127.0.0.1"
    assert launcher(config, site).host == "127.0.0.1"
    routed = replace(config, sglang_server=replace(config.sglang_server, router_addr="127.0.0.2:1"))
    assert launcher(routed, site).host == "127.0.0.2"
    assert launcher(routed, Site("127.0.0.2")).host == "127.0.0.1"
    assert launcher(config, replace(site, others=(NodeProcess("127.0.0.3", {}),))).host == "127.0.0.2"
    assert not caplog.records
    asked = replace(config, sglang_server=replace(config.sglang_server, host="0.0.0.0"))
    everywhere = launcher(asked, Site("127.0.0.3", num_cluster_nodes=2))
    assert everywhere.url == f"http://127.0.0.1:{everywhere.place.port}"
    assert everywhere.reachable_url == f"http://127.0.0.3:{everywhere.place.port}"
    assert not caplog.records  # what is asked for is said where the configuration is read
    open_to_all = Site("0.0.0.0", num_cluster_nodes=2)
    launcher(routed, open_to_all, engine=1)
    monkeypatch.setenv("KEY", "secret")
    keyed = replace(routed.sglang_server, api_key_file="env:KEY")
    launcher(replace(routed, sglang_server=keyed), open_to_all)
    assert not caplog.records
    launcher(routed, open_to_all)
    (record,) = caplog.records
    assert "without --sglang-api-key-file" in record.getMessage()


def test_an_interpreter_without_sglang_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a Python that runs"):
        installed_in(str(tmp_path / "no-python"))
    with pytest.raises(ConfigError, match="must have a working sglang"):
        installed_in("python3")
