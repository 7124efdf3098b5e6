"""``train --dry-run``: the plan, from settings, config.json and headers alone."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slime_spec.checkpoints.folder import StoredTensor
from slime_spec.checkpoints.parameters import count_parameters, kv_elements_per_token
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.launch.cli import main
from slime_spec.launch.compose import composed
from slime_spec.launch.dry_run.plan import make_plan
from slime_spec.launch.dry_run.show import sections
from slime_spec.launch.preflight import look
from slime_spec.preflight.gpu_memory import CACHE
from slime_spec.preflight.memory import draft_parameters, plan_memory
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, MIMO, SERVERS, TARGET, make_facts
from tests.support.make_stand_ins import STAND_INS
from tests.support.recipes import DEEPSEEK_R1, GLM_355B, QWEN3_235B, RECIPES
from tests.support.tiny_policy import make_tiny_policy

Capture = pytest.CaptureFixture[str]
MIXTRAL_8X7B: dict[str, Any] = {
    **{"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8},
}


@pytest.mark.parametrize("name", STAND_INS)
def test_counted_parameters_are_those_that_a_checkpoint_of_the_family_holds(name: str, tmp_path: Path) -> None:
    target = Checkpoint.read(str(STAND_INS[name](tmp_path).target))
    counted = count_parameters(target.config)
    assert counted is not None
    assert target.tensors is not None
    assert counted.stored == sum(tensor.num_elements for tensor in target.tensors.values())


@pytest.mark.parametrize(
    ("config", "billions"),
    [(TARGET, 8.03), (QWEN3_235B, 235.1), (DEEPSEEK_R1, 671.0), (MIXTRAL_8X7B, 46.7)],
    ids=["llama-3.1-8b", "qwen3-235b", "deepseek-r1", "mixtral-8x7b"],
)
def test_counted_parameters_are_the_published_ones(config: dict[str, Any], billions: float) -> None:
    counted = count_parameters(config)
    assert counted is not None
    assert counted.decoder / 1e9 == pytest.approx(billions, rel=0.002)


def test_an_mtp_layer_counts_what_drafting_adds_without_the_copies_in_its_file() -> None:
    """DeepSeek's own account: 671 B for the model, 14 B with MTP's copies of embedding and head, 11.5 B without."""
    counted = count_parameters(DEEPSEEK_R1)
    assert counted is not None
    assert counted.mtp / 1e9 == pytest.approx(11.5, rel=0.01)
    assert count_parameters(GLM_355B).decoder / 1e9 == pytest.approx(355, rel=0.02)  # type: ignore[union-attr]


def test_the_kv_cache_of_a_latent_is_that_of_the_latent() -> None:
    assert kv_elements_per_token(DEEPSEEK_R1) == 61 * (512 + 64)
    assert kv_elements_per_token(TARGET) == 32 * 2 * 8 * 128


def test_a_draft_without_a_file_is_counted_as_its_export_would_be(tmp_path: Path) -> None:
    draft = STAND_INS["llama3.1-8b"](tmp_path).draft
    whole = Checkpoint.read(str(draft))
    config_alone = Checkpoint(whole.folder, whole.config, None)
    assert draft_parameters(config_alone) == draft_parameters(whole)


def test_memory_is_weights_cache_gradients_and_optimizer(tmp_path: Path) -> None:
    argv = (*SERVERS, "--speculative-algorithm", "EAGLE3", *CHAIN, "--train-dtype", "bfloat16")
    memory = plan_memory(make_facts(tmp_path, argv, draft=EAGLE3_HEAD))
    assert memory.engine is not None
    assert memory.trainer is not None
    parameters = count_parameters(TARGET).decoder  # type: ignore[union-attr]
    assert memory.engine.target_bytes == memory.push_bytes == 2 * parameters
    assert memory.engine.draft_bytes == pytest.approx(0.85e9, rel=0.01)
    assert memory.engine.kv_bytes_per_token == 2 * 2 * 8 * 128 * 33
    assert memory.engine.kv_bytes == memory.engine.kv_bytes_per_token * 64 * (512 + 64 + 4)
    assert memory.trainer.kept_bytes == 18 * parameters


ONE_GPU = ("--rollout-num-gpus-per-engine", "1", "--actor-num-gpus", "1")


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_rounded_draft_costs_a_byte_a_weight_but_its_embedding(tmp_path: Path, quantization: str) -> None:
    given = ("--speculative-algorithm", "EAGLE3", *CHAIN, *ONE_GPU, "--sglang-dtype", "bfloat16")
    rounded = ("--speculative-draft-model-quantization", quantization)
    shapes = {"fc.weight": (10, 30), "norm.weight": (10,), "embed_tokens.weight": (200, 10), "d2t": (20,)}

    def draft_bytes(*argv: str) -> int:
        facts = make_facts(tmp_path, argv, draft=EAGLE3_HEAD)
        stored = {name: StoredTensor("bfloat16", shape, 2 * prod(shape)) for name, shape in shapes.items()}
        assert facts.draft is not None
        engine = plan_memory(replace(facts, draft=replace(facts.draft, tensors=stored))).engine
        assert engine is not None
        return engine.draft_bytes

    assert draft_bytes(*given) == 2 * (300 + 10 + 2000)
    assert draft_bytes(*given, *rounded) == 300 + 10 + 2 * 2000


def test_a_rounded_model_keeps_its_tables_and_a_rounded_mtp_layer_nothing(tmp_path: Path) -> None:
    given = (*ONE_GPU, "--sglang-dtype", "bfloat16", *CHAIN)
    given += ("--speculative-draft-model-quantization", "fp8")
    counted, small = count_parameters(MIMO), count_parameters(TARGET)
    assert counted is not None
    assert small is not None
    mtp = plan_memory(make_facts(tmp_path, ("--speculative-algorithm", "NEXTN", *given), target=MIMO)).engine
    whole = plan_memory(make_facts(tmp_path, ("--speculative-algorithm", "STANDALONE", *given), draft=TARGET)).engine
    assert mtp is not None
    assert whole is not None
    assert mtp.draft_bytes == counted.mtp
    assert whole.draft_bytes == small.decoder + small.tables


def test_an_mtp_draft_costs_its_layer_and_its_own_cache(tmp_path: Path) -> None:
    argv = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN)
    memory = plan_memory(make_facts(tmp_path, argv, target=MIMO))
    assert memory.engine is not None
    assert memory.engine.draft_bytes == 2 * count_parameters(MIMO).mtp  # type: ignore[union-attr]
    assert memory.engine.kv_bytes_per_token == 2 * 2 * 8 * 128 * 33


def test_rollouts_alone_plan_no_trainer_and_no_push(tmp_path: Path) -> None:
    memory = plan_memory(make_facts(tmp_path, (*SERVERS, "--debug-rollout-only")))
    assert (memory.trainer, memory.push_bytes) == (None, None)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    policy = make_tiny_policy(tmp_path / "policy", torch_dtype="bfloat16", max_position_embeddings=8192)
    return [*SERVERS, "--hf-checkpoint", str(policy), "--skip-check", "sglang-version", "gpus"]


def test_the_plan_has_a_command_line_for_every_server(job: list[str]) -> None:
    argv = [*job, "--rollout-num-engines", "2", "--actor-num-gpus", "2", "--actor-world-size", "2"]
    plan = make_plan(look(composed(argv)))
    first, second = plan.servers
    assert first.command[1:3] == ("-m", "sglang.launch_server")
    assert ("--attention-backend", "fa3") in pairwise(first.command)
    assert shlex.join(first.command).replace("--port 30000", "--port 30001") == shlex.join(second.command)
    assert [each.address for each in plan.servers] == ["127.0.0.1:30000", "127.0.0.1:30001"]
    assert len(plan.bundles.bundles) == 2


def test_a_dry_run_prints_the_whole_plan_and_starts_nothing(job: list[str], tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    assert main(["train", *job, "--dry-run", "--output-dir", str(run)]) == 0
    told = capsys.readouterr().out
    for heading in ("run", "placement", "engine", "transport", "memory (from ", "preflight"):
        assert any(line.startswith(heading) for line in told.splitlines())
    assert "tensor (CUDA IPC)" in told
    assert "TP 1 x PP 1 x DP 1" in told
    assert told.rstrip().endswith("a launch would go on")
    assert not run.exists()
    assert [line for line in told.splitlines() if len(line) > 120 and " " in line[120:] and "sglang" not in line] == []


def test_a_plan_without_speculation_says_so(job: list[str]) -> None:
    told = {
        algorithm: [
            line for line in sections(make_plan(look(composed([*job, *algorithm]))))["engine"] if "specul" in line
        ]
        for algorithm in ((), ("--speculative-algorithm", "NGRAM"))
    }
    assert [lines[0].partition(":")[0] for lines in told.values()] == ["no speculation", "speculation NGRAM"]


def test_a_dry_run_of_what_preflight_refuses_ends_as_the_launch_would(job: list[str], capsys: Capture) -> None:
    broken = ["--speculative-algorithm", "NGRAM", "--rollout-min-p", "0.1"]
    assert main(["train", *job, *broken, "--dry-run"]) == 2
    told = capsys.readouterr().out
    assert "a launch would stop here: min-p" in told
    assert "to add: --rollout-min-p 0" in told


def test_a_dry_run_shows_the_first_prompt_as_the_run_renders_it(tmp_path: Path, capsys: Capture) -> None:
    """Case reports/01: text and token ids, before anything is spent on them."""
    policy = make_tiny_policy(tmp_path / "policy")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2 + 3?", "label": 5}\n')
    assert (
        main(["train", "--config", "tiny", "--hf-checkpoint", str(policy), "--prompt-data", str(data), "--dry-run"])
        == 0
    )
    ids = list(AutoTokenizer.from_pretrained(policy).encode("2 + 3?:"))
    assert f"first prompt\n  task=data tokens=7 text='2 + 3?:' ids={ids}\n" in capsys.readouterr().out


def test_a_dry_run_tries_a_reward_of_ones_own_once(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_tiny_policy(tmp_path / "policy")
    calls = tmp_path / "calls"
    (tmp_path / "counted_reward.py").write_text(
        f"def reward(prompt, reply):\n    open({str(calls)!r}, 'a').write('x')\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "data.jsonl").write_text('{"prompt": "2 + 3?"}\n')
    data = ["--prompt-data", str(tmp_path / "data.jsonl"), "--custom-rm-path", "counted_reward.reward"]
    assert main(["train", "--config", "tiny", "--hf-checkpoint", str(policy), *data, "--dry-run"]) == 0
    assert "text='2 + 3?:'" in capsys.readouterr().out
    assert calls.read_text() == "x"


def test_a_dry_run_says_what_the_trainer_cannot_train(tmp_path: Path, capsys: Capture) -> None:
    config = {**GLM_355B, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = [*SERVERS, "--hf-checkpoint", str(tmp_path), "--skip-check", "sglang-version", "gpus", "--dry-run"]
    assert main(["train", *argv]) == 2
    told = "Qwen3NextForCausalLM has a mixture of 160 experts, which the trainer cannot build"
    assert told in " ".join(capsys.readouterr().out.split())
    assert main(["train", *argv, "--debug-rollout-only"]) == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "must hold a tokenizer.json" in told
    assert "rollout_only pushes no weights" in told


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_cache_holds_every_sequence_at_its_longest(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    made = make_plan(look(composed(recipe.arguments(tmp_path))))
    engine, cache = made.memory.engine, made.gpus[0].bytes_of(CACHE)
    assert engine is not None
    assert cache is not None
    assert engine.kv_copies * engine.kv_bytes / engine.num_gpus <= cache


def test_ranks_that_cannot_split_a_cache_keep_copies_of_it(tmp_path: Path) -> None:
    """A latent is whole on every rank; of four key-value heads eight ranks hold two copies."""
    wide = (*SERVERS, "--debug-rollout-only", "--rollout-num-gpus-per-engine", "8")
    copies = []
    for number, target in enumerate((TARGET, QWEN3_235B, DEEPSEEK_R1)):
        (tmp_path / str(number)).mkdir()
        memory = plan_memory(make_facts(tmp_path / str(number), wide, target=target))
        assert memory.engine is not None
        copies.append(memory.engine.kv_copies)
    assert copies == [1, 2, 8]
    apart = (*wide, "--sglang-enable-dp-attention", "--sglang-dp-size", "8")
    memory = plan_memory(make_facts(tmp_path, apart, target=DEEPSEEK_R1))
    assert memory.engine is not None
    assert memory.engine.kv_copies == 1
    counted = count_parameters(DEEPSEEK_R1)
    assert counted is not None
    assert memory.engine.target_bytes > counted.decoder + 7 * counted.attention  # a byte a weight


def test_the_plan_of_llama_on_eight_gpus_is_what_a_pencil_says(tmp_path: Path) -> None:
    """8.03 billion float16 weights; 33 layers x 2 x 8 heads x 128 x 2 bytes a token for 32 x (2016 + 33) tokens."""
    argv = RECIPES["eagle3-llama3.1-8b"].arguments(tmp_path)
    memory = make_plan(look(composed(argv))).memory
    assert memory.engine is not None
    assert memory.trainer is not None
    assert memory.engine.target_bytes == 2 * 8_030_261_248
    assert memory.engine.kv_bytes == 33 * 2 * 8 * 128 * 2 * 32 * 2049
    norms = 32 * 2 * 4096 + 4096  # which each tensor rank has whole
    rank = (8_030_261_248 - norms) // 2 + norms
    assert memory.trainer.kept_bytes == 6 * rank + 12 * (rank // 4)
    assert memory.push_bytes == 2 * 8_030_261_248


def test_an_engine_of_several_nodes_has_a_command_on_each_and_its_nodes_in_the_placement(
    job: list[str], capsys: Capture
) -> None:
    two_nodes = ["--rollout-num-gpus-per-engine", "16", "--ray-address", "auto", "--debug-rollout-only"]
    assert main(["train", *job, *two_nodes, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "bundles 0-1: 2 cores, 8 GPUs each: engine 0 node 0, engine 0 node 1" in told
    assert "--nnodes 2 --node-rank 0 --dist-init-addr ENGINE0-NODE0:PORT" in told.replace(" \\\n     ", "")
    assert "the same for engine 0 node 1 at ENGINE0-NODE1:30000, each with its --node-rank" in told


def test_servers_that_differ_in_their_place_alone_are_told_once(job: list[str], capsys: Capture) -> None:
    many = ["--rollout-num-engines", "3", "--no-colocate", "--sglang-router"]
    main(["train", *job, *many, "--dry-run"])
    told = capsys.readouterr().out
    assert told.count("sglang.launch_server") == 1
    assert "the same for engine 1 at 127.0.0.1:30001, engine 2 at 127.0.0.1:30002\n" in told
    assert "requests go through an sglang-router" in told


@pytest.mark.parametrize("changed", [{"intermediate_size": [1, 2]}, {"intermediate_size": None}, {"hidden_size": None}])
def test_a_family_whose_sizes_have_other_names_or_vary_is_planned_without_its_memory(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    memory = plan_memory(make_facts(tmp_path, (*SERVERS, "--debug-rollout-only"), target={**TARGET, **changed}))
    assert memory.engine is None


def test_a_dry_run_says_with_which_loss_a_draft_learns(tmp_path: Path) -> None:
    given = RECIPES["mimo-7b-rl-mtp"].arguments(tmp_path)

    def loss(*argv: str) -> list[str]:
        lines = sections(make_plan(look(composed([*given, *argv]))))["run"]
        return [line for line in lines if line.startswith("draft in training")]

    assert loss("--enable-mtp-training") == ["draft in training: loss top_k_soft_ce"]
    assert loss("--enable-mtp-training", "--draft-loss", "cross_entropy") == ["draft in training: loss cross_entropy"]
