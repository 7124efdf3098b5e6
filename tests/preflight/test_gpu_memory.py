"""What each GPU holds in each phase, computed here by hand, and every recipe on the GPUs that it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.embedded.prefill import MAX_PADDED_TOKENS, TIMES_ON_GPU
from slime_spec.launch.cli import main
from slime_spec.launch.compose import composed
from slime_spec.launch.dry_run.plan import make_plan
from slime_spec.launch.preflight import look
from slime_spec.preflight.gpu_memory import GpuMemory, Phase, plan_gpus
from slime_spec.preflight.memory import PASS_TOKENS, plan_memory
from tests.support.doctor_facts import SERVERS, TARGET, make_facts
from tests.support.recipes import RECIPES, ROLLOUTS, STAGED, Recipe
from tests.support.tiny_policy import make_tiny_policy

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
CONTEXT = 10**9
ALL = tuple(Phase)
PREFILL = 512 * MIB + 8192 * 3 * MIB // 2  # SGLang's account for a GPU of 60 to 160 GiB


def gpus_of(recipe: Recipe, folder: Path, *more: str) -> tuple[GpuMemory, ...]:
    return make_plan(look(composed([*recipe.arguments(folder), *more]))).gpus


def rows_of(gpu: GpuMemory) -> dict[str, int]:
    return {row.name: row.num_bytes for row in gpu.rows}


def test_every_script_is_a_recipe_that_is_planned_here() -> None:
    scripts = [path.read_text() for path in (ROOT / "scripts").glob("run-*.sh")]
    launched = {line.split()[1] for text in scripts for line in text.splitlines() if line.startswith("launch ")}
    assert launched == {*RECIPES, "smollm2-135m"}, "the latter needs no GPU"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus_in_every_phase(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    assert_fits(gpus_of(recipe, tmp_path), recipe, ALL)


@pytest.mark.parametrize("name", STAGED)
def test_a_recipe_in_slimes_stages_fits_its_gpus_in_every_phase(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    made = make_plan(look(composed([*recipe.arguments(tmp_path), *STAGED[name]])))
    assert [stage.num_stages for stage in made.memory.stages] == [4, 4, 4, 4]
    assert_fits(made.gpus, recipe, ALL)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_alone_fit_one_node(name: str, tmp_path: Path) -> None:
    recipe = ROLLOUTS[name]
    assert_fits(gpus_of(recipe, tmp_path), recipe, (Phase.START, Phase.ROLLOUT))


def assert_fits(gpus: tuple[GpuMemory, ...], recipe: Recipe, phases: tuple[Phase, ...]) -> None:
    assert sum(each.num_gpus for each in gpus) == recipe.num_gpus
    for each in gpus:
        assert each.capacity_bytes == recipe.gpu_gb * 10**9
        assert each.phases == phases
        for phase in each.phases:
            assert 0 < each.total(phase) <= each.capacity_bytes, phase


def test_the_gpus_of_mimo_are_what_a_pencil_says(tmp_path: Path) -> None:
    """36 layers with biases of queries, keys and values; two tensor ranks, bfloat16, AdamW split in four."""
    (gpu,) = gpus_of(RECIPES["mimo-7b-rl-mtp"], tmp_path, "--no-enable-mtp-training")
    attention = 4096 * (32 + 2 * 8) * 128 + (32 + 2 * 8) * 128 + 32 * 128 * 4096
    layer = attention + 3 * 4096 * 11008 + 2 * 4096
    decoder = 36 * layer + 2 * 151680 * 4096 + 4096
    mtp = layer + 2 * 4096 * 4096 + 3 * 4096
    norms_of_all = 36 * 2 * 4096 + 4096  # which each tensor rank has whole
    rank, tokens = (decoder - norms_of_all) // 2 + norms_of_all, 9216
    share_of_rank = -(-rank // 4)
    queries, keys, mlp = 32 * 128 // 2, 8 * 128 // 2, 11008 // 2
    norms = 2 * ((4 + 4 + 2) * 4096 + 4)
    one_layer = norms + 4 * 128 * 2 + (4 * queries + 3 * keys) * 2 + 4 * 16 + (queries + 4 * keys) * 2 + 5 * mlp * 2
    weights = 2 * (decoder + mtp)
    expected = {
        "trainer: context": CONTEXT,
        "trainer: weights": 2 * rank,
        "trainer: gradients": 4 * rank,
        "trainer: optimizer": 12 * share_of_rank,
        "trainer: activations": tokens * (36 * 4096 * 2 + 2 * one_layer + (4 + 4 + 2 + 2) * 4096),
        "trainer: logits": tokens * (151680 // 2) * (2 + 3 * 4),
        "push: buckets": 4 * 151680 * 4096 * 2,
        "engine: context": CONTEXT,
        "engine: weights": weights,
        "engine: KV cache": int(0.8 * (80 * 10**9 - 2 * CONTEXT)) - weights,
        "engine: activations": PREFILL + 128 * MIB,
        "engine: graphs": 3 * 48 * 2 * MIB,
    }
    assert rows_of(gpu) == expected
    trainer = 6 * rank + 12 * share_of_rank
    step = expected["trainer: activations"] + expected["trainer: logits"]
    share = int(0.8 * (80 * 10**9 - 2 * CONTEXT))
    rollout = share + 2 * CONTEXT + expected["engine: activations"] + expected["engine: graphs"]
    assert [gpu.total(phase) for phase in ALL] == [
        CONTEXT + trainer,
        rollout,
        rollout,
        2 * CONTEXT + trainer + step,
        share + 2 * CONTEXT + expected["engine: graphs"] + 2 * rank + expected["push: buckets"],
    ]


def test_a_draft_in_training_has_weights_gradients_and_moments_in_float32(tmp_path: Path) -> None:
    for name in ("plain", "learning"):
        (tmp_path / name).mkdir()
    (plain,) = gpus_of(RECIPES["mimo-7b-rl-mtp"], tmp_path / "plain", "--no-enable-mtp-training")
    (learning,) = gpus_of(RECIPES["mimo-7b-rl-mtp"], tmp_path / "learning")
    attention = 4096 * (32 + 2 * 8) * 128 + (32 + 2 * 8) * 128 + 32 * 128 * 4096
    mtp = attention + 3 * 4096 * 11008 + 2 * 4096 + 2 * 4096 * 4096 + 3 * 4096
    # 64 replies on four data parallel ranks: embedding and final state of 2,048 tokens, of 512 the latter once more.
    replies = 16 * ((2 * 2048 + 512) * 4096 * 2 + 512 * 12)
    of_draft = {"trainer: draft": 16 * mtp, "trainer: draft's weights": 4 * mtp, "trainer: draft's replies": replies}
    assert rows_of(learning) == {**rows_of(plain), **of_draft}
    assert learning.total(Phase.ROLLOUT) == plain.total(Phase.ROLLOUT)
    assert learning.total(Phase.TRAIN) == plain.total(Phase.TRAIN) + 16 * mtp + replies


def test_an_update_of_a_draft_counts_where_it_is_more_than_the_policys_passes(tmp_path: Path) -> None:
    """Short microbatches, of which the target's whole head in float32 is the most; four replies an update and rank."""
    short = ("--max-tokens-per-gpu", "1024", "--rollout-max-prompt-len", "512", "--rollout-max-response-len", "512")
    (gpu,) = gpus_of(RECIPES["mimo-7b-rl-mtp"], tmp_path, *short)
    inputs = 4 * ((1024 * 4096 + 1023 * 4096) * 4 + 511 * 4096 * 2)
    head, row = 151680 * 4096 * 4, 151680 * 4
    logits = int(6.1 * (2**28 // row) * row)
    assert rows_of(gpu)["trainer: draft's update"] == inputs + head + logits
    assert "trainer: activations" not in rows_of(gpu)


def test_the_gpus_of_glm_are_what_a_pencil_says(tmp_path: Path) -> None:
    """Rollouts alone on one engine of eight GPUs: weights and cache within 0.85 of each, and what SGLang adds."""
    (gpu,) = gpus_of(ROLLOUTS["glm4.5-355b-a32b-mtp"], tmp_path)
    attention = 5120 * (96 + 2 * 8) * 128 + (96 + 2 * 8) * 128 + 96 * 128 * 5120 + 2 * 128
    experts = (160 + 1) * 3 * 5120 * 1536 + 160 * 5120 + 160
    layer = attention + 2 * 5120 + experts
    decoder = 2 * 151552 * 5120 + 5120 + 89 * layer + 3 * (attention + 2 * 5120 + 3 * 5120 * 12288)
    mtp = layer + 2 * 5120 * 5120 + 3 * 5120
    weights = (2 * decoder + 2 * mtp) // 8
    share = int(0.85 * (141 * 10**9 - CONTEXT))
    assert rows_of(gpu) == {
        "engine: context": CONTEXT,
        "engine: weights": weights,
        "engine: KV cache": share - weights,
        "engine: activations": PREFILL + 8 * 128 * MIB,
        "engine: graphs": 3 * 64 * 2 * MIB,
    }
    assert gpu.total(Phase.ROLLOUT) == share + CONTEXT + PREFILL + 1024 * MIB + 384 * MIB


def test_the_trainer_of_deepseek_in_stages_is_what_a_pencil_says(tmp_path: Path) -> None:
    """61 layers, three of them dense, as 16, 16, 16 and 13; eight tensor ranks, 256 experts over 32 ranks."""
    memory = make_plan(
        look(composed([*RECIPES["deepseek-r1-mtp"].arguments(tmp_path), *STAGED["deepseek-r1-mtp"]]))
    ).memory
    hidden, heads = 7168, 128
    attention = hidden * 1536 + 1536 * heads * 192 + hidden * 576 + 512 * heads * 256 + heads * 128 * hidden
    expert, dense, table = 3 * hidden * 2048, 3 * hidden * 18432, 129280 * hidden
    norms, router = 2 * hidden + 1536 + 512, 256 * hidden
    with_experts = (attention + expert) // 8 + norms + router + 8 * expert  # one is shared; 256 over 32 ranks are eight
    expected = [
        3 * ((attention + dense) // 8 + norms) + 13 * with_experts + table // 8,
        16 * with_experts,
        16 * with_experts,
        13 * with_experts + table // 8 + hidden,
    ]
    assert [stage.num_parameters for stage in memory.stages] == expected
    tokens, widest = 16384, memory.stages[1]
    of_experts = 16 * 8 * expert  # nobody else has these; all else is on four data parallel ranks
    updated = of_experts + -(-(expected[1] - of_experts) // 4)
    assert widest.optimizer_bytes == 4 * updated  # masters; the moments are on the host
    assert widest.host_bytes == 2 * expected[1] + 16 * 256 * 4 + 12 * updated
    assert widest.weights_bytes == 2 * expected[1] + 16 * 256 * 4  # and the routers' biases
    # Three microbatches in flight keep the inputs of 16 layers, an eighth of the rows each; one layer is at work.
    norm = 2 * ((4 + 4 + 2) * hidden + 4) // 8
    latents = ((4 + 4 + 2) * (512 + 1536) + 2 * 4) // 8
    queries, values = heads * 192 // 8, heads * 128 // 8
    core = (
        (2 * queries + heads * 256 // 8 + 2 * values) * 2 + 4 * 16 + (values + 2 * (queries + values)) * 2 + 4 * 64 * 2
    )
    rows = 8 * hidden * 2 // 8
    routed = (13 * 256 + 8 * (32 + 6 * 2048 * 2) + 5 * 2048 * 2) // 8
    layer = norm + latents + core + routed + rows
    assert widest.activation_bytes == tokens * (3 * 16 * hidden * 2 // 8 + 2 * layer + 2 * rows)


def test_the_mtp_layer_in_training_is_on_the_last_stage_with_its_experts_over_all_its_ranks(tmp_path: Path) -> None:
    """Sixteen bytes a parameter: weights, gradients and two moments in float32."""
    looked = look(composed([*RECIPES["glm4.5-355b-a32b-mtp"].arguments(tmp_path), *STAGED["glm4.5-355b-a32b-mtp"]]))
    facts = looked.engines[0]
    learning = replace(facts.config, draft_training=replace(facts.config.draft_training, enable=True))
    stages = plan_memory(replace(facts, config=learning)).stages
    hidden, expert = 5120, 3 * 5120 * 1536
    attention = hidden * (96 + 2 * 8) * 128 + (96 + 2 * 8) * 128 + 96 * 128 * hidden + 2 * 128
    dense = attention + 2 * hidden + 160 * hidden + 160 + expert + 2 * hidden * hidden + 3 * hidden
    assert [stage.draft_bytes for stage in stages] == [0, 0, 0, 16 * (dense + 160 * expert // 16)]


def test_replayed_experts_are_in_the_host_memory_of_each_rank_the_object_store_and_the_driver(tmp_path: Path) -> None:
    sizes = ("--rollout-batch-size", "16", "--n-samples-per-prompt", "4", "--rollout-max-prompt-len", "1000")
    argv = [*RECIPES["deepseek-r1-mtp"].arguments(tmp_path), *sizes, "--rollout-max-response-len", "3001"]
    without = make_plan(look(composed(argv))).host
    replaying = make_plan(look(composed([*argv, "--use-rollout-routing-replay"]))).host
    assert without is not None
    assert replaying is not None
    assert without.replay_bytes == 0
    # 58 of 61 layers have experts, of whose 256 a token goes to eight; a node has eight ranks.
    assert replaying.replay_bytes == (8 + 1 + 1) * 16 * 4 * 4000 * 58 * 8
    assert replaying.total_bytes == without.total_bytes + replaying.replay_bytes


def test_a_trainer_that_stays_takes_its_memory_from_the_engines(tmp_path: Path) -> None:
    recipe = RECIPES["mimo-7b-rl-mtp"]
    (gpu,) = gpus_of(recipe, tmp_path, "--no-offload-train", "--no-enable-mtp-training")
    rows = rows_of(gpu)
    kept = sum(rows[f"trainer: {part}"] for part in ("context", "weights", "gradients", "optimizer"))
    assert rows["engine: KV cache"] == int(0.8 * (80 * 10**9 - kept - CONTEXT)) - rows["engine: weights"]
    assert gpu.total(Phase.ROLLOUT) - gpu.total(Phase.LOAD) == sum(
        rows[f"engine: {part}"] for part in ("context", "weights", "KV cache", "activations", "graphs")
    )
    assert gpu.overfull == (Phase.START, Phase.ROLLOUT)


def test_a_distributed_optimizer_lets_eight_gpus_train_eight_billion_parameters_unsplit(tmp_path: Path) -> None:
    recipe, whole = RECIPES["eagle3-llama3.1-8b"], ("--tensor-model-parallel-size", "1", "--max-tokens-per-gpu", "2048")
    (gpu,) = gpus_of(recipe, tmp_path, *whole)
    assert rows_of(gpu)["trainer: optimizer"] == 12 * 8_030_261_248 // 8
    assert gpu.total(Phase.TRAIN) < gpu.capacity_bytes
    (unsplit,) = gpus_for(tmp_path, *SERVERS, "--train-dtype", "bfloat16", "--gpu-memory-gb", "80")
    assert rows_of(unsplit)["trainer: optimizer"] == 12 * 8_030_261_248
    assert Phase.TRAIN in unsplit.overfull


def test_moments_on_the_host_take_nothing_of_a_gpu(tmp_path: Path) -> None:
    recipe, whole = RECIPES["eagle3-llama3.1-8b"], ("--tensor-model-parallel-size", "1", "--max-tokens-per-gpu", "2048")
    made = make_plan(look(composed([*recipe.arguments(tmp_path), *whole, "--optimizer-cpu-offload"])))
    (gpu,), trainer = made.gpus, made.memory.trainer
    assert rows_of(gpu)["trainer: optimizer"] == 4 * 8_030_261_248 // 8
    assert trainer is not None
    assert trainer.update_bytes == 0
    assert trainer.host_bytes == 2 * 8_030_261_248 + 12 * 8_030_261_248 // 8


def test_a_trainer_that_stays_leaves_the_cache_fewer_sequences(tmp_path: Path) -> None:
    """Some 19 GB for a cache that takes 44.7 GB with all 32 sequences at their longest."""
    recipe = RECIPES["mimo-7b-rl-mtp"]
    looked = look(composed([*recipe.arguments(tmp_path), "--no-offload-train"]))
    (finding,) = (each for each in looked.findings if each.id == "engine-memory")
    rows = rows_of(make_plan(looked).gpus[0])
    wanted = 32 * (9216 + 4) * 37 * 2 * 8 * 128 * 2
    num_fitting = rows["engine: KV cache"] * 32 // wanted
    assert finding.read.endswith(f"which holds {num_fitting} of 32 sequences at their longest")
    assert num_fitting < 20


def test_engines_that_stay_leave_a_step_no_room(tmp_path: Path) -> None:
    (gpu,) = gpus_of(RECIPES["mimo-7b-rl-mtp"], tmp_path, "--no-offload")
    assert gpu.overfull == (Phase.TRAIN,)


def test_engines_and_trainer_apart_have_gpus_of_their_own(tmp_path: Path) -> None:
    argv = (*SERVERS, "--no-colocate", "--train-dtype", "bfloat16", "--gpu-memory-gb", "180")
    engine, trainer = gpus_for(tmp_path, *argv)
    assert (engine.holders, trainer.holders) == ("an engine's", "a trainer rank's")
    assert not any(name.startswith("engine") for name in rows_of(trainer))
    largest = 128256 * 4096 * 2
    assert [rows_of(each)["push: buckets"] for each in (engine, trainer)] == [2 * largest, 4 * largest]
    assert engine.total(Phase.TRAIN) == engine.total(Phase.ROLLOUT)
    assert trainer.total(Phase.ROLLOUT) == trainer.total(Phase.LOAD)


def test_a_pass_of_the_embedded_engine_is_as_long_as_is_counted() -> None:
    assert PASS_TOKENS == TIMES_ON_GPU * MAX_PADDED_TOKENS


def test_the_embedded_engine_has_a_cache_of_the_size_that_is_set(tmp_path: Path) -> None:
    argv = ("--rollout-num-gpus-per-engine", "1", "--actor-num-gpus", "1", "--sglang-dtype", "bfloat16")
    (gpu,) = gpus_for(tmp_path, *argv, "--kv-cache-gb", "20", "--gpu-memory-gb", "200")
    rows = rows_of(gpu)
    assert rows["engine: KV cache"] == 20 * 10**9
    states = (4 * 4096 + 3 * 14336) * 2  # of a token in a layer
    # 64 sequences' logits in bfloat16 and thrice in float32, and their states; prompts of 512 tokens, as many as go.
    assert rows["engine: graphs"] == 64 * 128256 * 14 + 64 * states
    assert rows["engine: activations"] == 16384 * states
    # A push builds the weights whole before it takes them into use.
    assert rows["engine: new weights"] == 2 * 8_030_261_248
    assert gpu.total(Phase.PUSH) == sum(
        rows[name]
        for name in (
            *("trainer: context", "trainer: weights", "push: buckets", "engine: context"),
            *("engine: weights", "engine: new weights", "engine: KV cache", "engine: graphs"),
        )
    )
    (bounded,) = gpus_for(tmp_path, *argv, "--sglang-max-total-tokens", "1000", "--gpu-memory-gb", "200")
    assert rows_of(bounded)["engine: KV cache"] == 1000 * 32 * 2 * 8 * 128 * 2


def test_a_step_peaks_where_adamw_updates_if_that_takes_more_than_a_microbatch(tmp_path: Path) -> None:
    argv = (*SERVERS, "--train-dtype", "bfloat16", "--recompute-activations", "--gpu-memory-gb", "180")
    (gpu,) = gpus_for(tmp_path, *argv)
    assert rows_of(gpu)["trainer: update"] == 4 * 8_030_261_248
    (longer,) = gpus_for(tmp_path, *argv, "--max-tokens-per-gpu", "32768")
    assert "trainer: update" not in rows_of(longer)


def test_stages_hold_the_embedding_or_the_head_beside_their_layers(tmp_path: Path) -> None:
    wide = ("--rollout-num-engines", "2", "--actor-num-gpus", "2", "--actor-world-size", "2")
    argv = (*SERVERS, *wide, "--pipeline-model-parallel-size", "2", "--train-dtype", "bfloat16")
    plan = plan_memory(make_facts(tmp_path, argv))
    table = 128256 * 4096
    first = (8_030_261_248 - 2 * table - 4096) // 2 + table
    assert [stage.num_parameters for stage in plan.stages] == [first, first + 4096]  # and the last norm
    assert [bool(stage.logits_bytes) for stage in plan.stages] == [False, True]


def gpus_for(folder: Path, *argv: str, target: dict[str, Any] | None = None) -> tuple[GpuMemory, ...]:
    facts = make_facts(folder, argv, target=target or TARGET)
    return plan_gpus(facts, plan_memory(facts))


def test_without_a_gpus_size_nothing_is_judged(tmp_path: Path) -> None:
    assert gpus_for(tmp_path, *SERVERS) == ()


def test_what_does_not_fit_is_refused_with_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = make_tiny_policy(tmp_path / "policy", torch_dtype="bfloat16", max_position_embeddings=8192)
    job = [*SERVERS, "--hf-checkpoint", str(policy), "--skip-check", "sglang-version", "gpus"]
    too_small = [*job, "--gpu-memory-gb", "10"]
    assert main(["doctor", *too_small]) == 2
    told = capsys.readouterr().out
    assert "error gpu-memory" in told
    assert "engine: activations" in told
    assert "too much" in told
    assert main(["train", *too_small, "--dry-run"]) == 2
    assert "a launch would stop here: gpu-memory" in capsys.readouterr().out
    assert main(["doctor", *job, "--gpu-memory-gb", "100"]) == 0
    told = capsys.readouterr().out
    assert "one GPU of 100.0 GB, an engine's and a trainer rank's (GB)" in told
    assert "too much" not in told
