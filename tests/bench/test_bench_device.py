"""``slime-spec bench device`` on a CPU in small sizes: models of known shapes, every part's rows, failing receivers."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout.embedded.drafters.quantized import Fp8Linear
from rollout.embedded.plan import RowSpan
from slime_spec.bench import run_bench
from slime_spec.bench.cost import BY_CLOCK, GPU_VERIFY_REACH, CostSizes, verify_rows
from slime_spec.bench.device.ceilings import CeilingSizes, measure_ceilings
from slime_spec.bench.device.draft_dtype import DraftDtypeSizes, chain_rows, product_rows, sum_error
from slime_spec.bench.device.ipc import IpcSizes, Receive, measure_ipc
from slime_spec.bench.device.push import PushSizes, measure_push
from slime_spec.bench.device.random_model import (
    LLAMA_32_1B,
    SHAPES,
    TINY,
    num_read_weights,
    num_weights,
    random_decoder,
    random_target,
    random_tensors,
    write_random_checkpoint,
)
from slime_spec.bench.device.shapes import measure_shape
from slime_spec.bench.device.trainer import Batch, TrainerSizes, agreement_rows, measure_trainer, tolerance
from slime_spec.bench.random_engine import random_engine, random_prompts
from slime_spec.bench.reference_trainer import reference_steps
from slime_spec.bench.rows import BenchOptions, Row, report_json, report_markdown
from slime_spec.bench.timing import Timed
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, ModelConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.types import TrainReport
from tests.bench.failing_receivers import dies, hangs, loses

CPU = torch.device("cpu")
PARTS = ("", ".bandwidth_share", ".ratio")  # of a draft's products
PUBLISHED = {"135m": 134_515_008, "1b": 1_235_814_400, "8b": 8_030_261_248}


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def hf_config(spec: ModelSpec) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if (scaling := spec.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=spec.tie_word_embeddings,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    spec = SHAPES[name]
    assert num_weights(spec) == PUBLISHED[name]
    with torch.device("meta"):
        reference = LlamaForCausalLM(hf_config(spec))
    assert sum(each.numel() for each in reference.parameters()) == PUBLISHED[name]


def test_a_pass_reads_every_weight_but_an_embedding_that_is_no_head() -> None:
    assert num_read_weights(LLAMA_32_1B) == PUBLISHED["1b"]
    assert num_read_weights(SHAPES["8b"]) == PUBLISHED["8b"] - 128256 * 4096


def test_a_random_model_computes_what_transformers_computes_with_the_same_weights() -> None:
    reference = LlamaForCausalLM(hf_config(TINY)).eval()
    missing, unexpected = reference.load_state_dict(
        dict(random_tensors(TINY, torch.float32, CPU, seed=3)), strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding, which was loaded
    token_ids = [(37 * i) % TINY.vocab_size for i in range(24)]
    decoder = random_decoder(TINY, torch.float32, CPU, num_positions=24, seed=3)
    target = random_target(decoder, CPU, num_rows=1, num_positions=24)
    assert target.cache.reserve((1, 24), (0, 0))
    ours = target.logits(target.run(target.cache.own, [RowSpan(0, 0, 24)], token_ids).hidden)
    with torch.no_grad():
        expected = reference(torch.tensor([token_ids])).logits[0]
    assert expected.abs().max() > 0.1
    assert (ours - expected).abs().max() < 1e-5


def test_the_ceilings_are_a_copy_and_a_product() -> None:
    rows = by_id(measure_ceilings(CPU, CeilingSizes(2**20, 64, 2)))
    assert {id: row.unit for id, row in rows.items()} == {"device.copy": "TB/s", "device.matmul.bf16": "TFLOP/s"}
    assert all(row.value > 0 for row in rows.values())


def test_a_shape_is_timed_for_every_batch_and_width() -> None:
    sizes = CostSizes(2, (1, 8), (1, 4), 8, ("float32",))
    rows = by_id(measure_shape("tiny", TINY, CPU, sizes, copied=1e12))
    cells = {f"device.tiny.eager.b{b}.k{k}" for b in (1, 8) for k in (1, 4)}
    share = "device.tiny.eager.b1.k1.bandwidth_share"
    assert rows.keys() == cells | {"device.tiny.eager.b8.verify4.ratio", share, "device.tiny.weights"}
    assert all(row.holds is None for row in rows.values())
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
    assert rows["device.tiny.weights"].value == pytest.approx(4e-9 * num_weights(TINY))
    one_ms = rows["device.tiny.eager.b1.k1"].value
    assert rows[share].value == pytest.approx(4 * num_weights(TINY) / 1e12 / (one_ms / 1000))


def test_a_gpu_is_held_to_the_verify_pass_at_batch_8_by_the_clock_alone() -> None:
    passes = {
        "1,1": [Timed(1.0, None)],
        "1,4": [Timed(9.0, None)],
        "8,1": [Timed(1.0, None)],
        "8,4": [Timed(1.1, None)],
    }
    (row,) = verify_rows("x", "a model", passes, GPU_VERIFY_REACH, (BY_CLOCK,))
    assert (row.id, row.reach, row.holds) == ("x.b8.verify4.ratio", "<= 1.15", True)


def test_the_trainers_step_has_the_loss_of_hugging_faces_model_and_is_timed(tmp_path: Path) -> None:
    sizes = TrainerSizes("tiny", "float32", Batch(3, 4, 8, 24), Batch(2, 6, 10, 24), num_rounds=1)
    rows = by_id(measure_trainer(CPU, sizes, peak_flops=1e12))
    write_random_checkpoint(tmp_path, TINY, torch.float32, CPU)
    config = Config(model=ModelConfig(hf_checkpoint=str(tmp_path)), trainer=TrainerConfig())
    (expected,), _ = reference_steps(config, [sizes.compared.samples(TINY.vocab_size, seed=0)])
    assert rows["device.tiny.train.fp32.loss"].value == pytest.approx(expected.loss, abs=tolerance(TINY))
    assert rows["device.tiny.train.fp32.loss_diff"].holds
    assert rows["device.tiny.train.fp32.grad_norm_diff"].holds
    seconds = rows["device.tiny.train.fp32.step"].value
    assert rows["device.tiny.train.fp32.tokens_per_s"].value == pytest.approx(36 / seconds)
    assert rows["device.tiny.train.fp32.mfu"].value == pytest.approx(6 * num_weights(TINY) * 36 / seconds / 1e12)
    assert rows["device.tiny.train.fp32.memory_planned"].value > 16 * num_weights(TINY) / 1e9
    assert rows["device.tiny.train.fp32.offload"].value > 0
    assert rows["device.tiny.train.fp32.offload.left"].value == 0.0


def test_a_drafts_step_is_measured_in_every_form_of_its_weights() -> None:
    """The interpreter computes the products of fp8; an engine on a CPU has no such draft, which its row says."""
    sizes = DraftDtypeSizes("float32", (1,), num_rounds=1, num_steps=2)
    rows = by_id(product_rows("x", "tiny", TINY, CPU, sizes, copied=1e12))
    assert rows.keys() == {f"x.{form}.products.b1{part}" for form in ("fp32", "int8", "fp8") for part in PARTS} - {
        "x.fp32.products.b1.ratio"
    } | {"x.fp8.error.b1"}
    assert rows["x.fp8.error.b1"].holds
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
    plain_ms, fp8_ms = (rows[f"x.{form}.products.b1"].value for form in ("fp32", "fp8"))
    assert rows["x.fp8.products.b1.ratio"].value == pytest.approx(plain_ms / fp8_ms)
    # q, k, v over the token and its features; o; gate and up; down; the head.
    num_weights = 128 * 128 + 64 * 64 + 256 * 64 + 64 * 128 + 256 * 64
    share = rows["x.fp8.products.b1.bandwidth_share"].value
    assert share == pytest.approx(num_weights / 1e12 / (fp8_ms / 1000))


def test_a_kernel_that_multiplies_by_other_weights_than_it_says_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Fp8Linear(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    assert sum_error(linear, CPU, batch_size=2) <= 1
    codes = linear._weight.view(torch.uint8)
    kept, codes[5, 3] = linear.unpacked(), codes[5, 3] ^ 1  # the last bit of a weight
    monkeypatch.setattr(linear, "unpacked", lambda: kept)
    assert sum_error(linear, CPU, batch_size=2) > 1


def test_drafting_is_timed_in_the_engine_for_every_form_that_it_has(tmp_path: Path) -> None:
    sizes = DraftDtypeSizes("float32", (1, 2), num_rounds=1, num_steps=1)
    with random_engine(BenchOptions(model_shape="tiny"), torch.float32) as options:
        rows = by_id(list(chain_rows("x", "tiny", options, random_prompts(TINY, 2, seed=0), sizes)))
    assert rows.keys() == {"x.fp32.chain.b1", "x.fp32.chain.b2", "x.int8.chain.b1", "x.int8.chain.b2", "x.fp8.chain"}
    assert math.isnan(rows["x.fp8.chain"].value)
    assert rows["x.fp8.chain"].unit == ""
    assert all(row.value > 0 for id, row in rows.items() if id != "x.fp8.chain")
    assert not Path(options.draft).exists()


@pytest.mark.parametrize(("loss", "norm", "holds"), [(1.09, 2.0, (True, True)), (1.11, 2.7, (False, False))])
def test_a_step_with_another_loss_or_gradient_than_the_cpus_does_not_hold(
    loss: float, norm: float, holds: tuple[bool, bool]
) -> None:
    ours, theirs = (TrainReport(x, 0.0, n, 1.0, 0.5, 0.0, 0.1, 10, 10, 1, 1) for x, n in ((loss, norm), (1.0, 2.0)))
    found = by_id(agreement_rows("a", "a step", ours, theirs, bound=0.1))
    assert (found["a.loss_diff"].holds, found["a.grad_norm_diff"].holds) == holds


def test_bytes_arrive_in_another_process_whole_and_in_buckets() -> None:
    rows = by_id(measure_ipc(CPU, IpcSizes(2**16, 3, 2)))
    assert rows["device.ipc.arrived"].value == 1.0
    speeds = {f"device.ipc.{way}" for way in ("copy", "whole", "buckets")}
    ratios = {f"device.ipc.{way}.ratio" for way in ("whole", "buckets")}
    assert rows.keys() == speeds | ratios | {"device.ipc.arrived"}
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
    assert all(rows[id].holds is None for id in speeds | ratios)


def test_a_push_between_two_processes_arrives_and_is_held_against_a_copy() -> None:
    rows = by_id(measure_push(CPU, PushSizes("tiny", {"": 2**27, "small.": 2**14}, 2)))
    assert rows["device.push.arrived"].value == 1.0
    times = {f"device.push.{way}" for way in ("copy", "checksum", "ipc", "small.ipc")}
    ratios = {f"device.push.{way}.ratio" for way in ("ipc", "small.ipc")}
    assert rows.keys() == times | ratios | {"device.push.arrived"}
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
    assert all(rows[id].holds is None for id in times | ratios)


@pytest.mark.parametrize(
    ("receiver", "says"),
    [(dies, "ended with exit code 7"), (hangs, "gave no answer in 0.5 s"), (loses, "by which all bytes arrived")],
)
def test_a_receiver_that_fails_is_a_row_that_does_not_hold(receiver: Receive, says: str) -> None:
    started = time.monotonic()
    rows = by_id(measure_ipc(CPU, IpcSizes(2**12, 2, 1, answer_s=0.5 if receiver is hangs else 60.0), receiver))
    assert rows["device.ipc.arrived"].holds is False
    assert says in rows["device.ipc.arrived"].what
    assert time.monotonic() - started < 120


def test_the_command_measures_small_sizes_on_a_cpu(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    argv = ["--num-gpus", "0", "--only", "ceilings", "shapes", "--rounds", "1", "--json", str(report)]
    run_bench("device", argv)  # whether a bound holds is the machine's affair
    found = json.loads(report.read_text())
    assert found["machine"]["gpu"] is None
    ids = [row["id"] for row in found["rows"]]
    assert {"device.copy", "device.tiny.eager.b1.k1", "device.tiny.eager.b8.k8"} <= set(ids)
    assert all(row["value"] is not None for row in found["rows"])


def test_a_report_from_a_gpu_names_the_card() -> None:
    report = json.loads(report_json([], ["slime-spec"], (0,)))
    assert report["machine"]["gpu"] is None
    assert "GPU" not in report_markdown(json.dumps(report))
    report["machine"]["gpu"] = {
        "name": "NVIDIA H100",
        "memory_bytes": 85 * 10**9,
        "cuda": "13.0",
        "driver": "580.65.06",
    }
    assert "- GPU: NVIDIA H100, 85.0 GB, CUDA 13.0 of torch, driver 580.65.06" in report_markdown(json.dumps(report))


@pytest.mark.parametrize("bench", ["device", "engine"])
@pytest.mark.parametrize(("count", "says"), [("2", "on one GPU"), ("1", "torch can use")])
def test_a_gpu_that_cannot_be_used_is_refused(
    bench: str, count: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refused:
        run_bench(bench, ["--num-gpus", count, "--only", "plain" if bench == "engine" else "shapes"])
    assert refused.value.setting == "--num-gpus"
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("bench", "argv", "setting", "says"),
    [
        ("device", ["--shapes", "9b"], "--shapes", "must be one of"),
        ("device", ["--batch-sizes", "0"], "--batch-sizes", "at least 1"),
        ("engine", ["--num-gpus", "1", "--only", "plain", "peers"], "--only", "Pass --only plain."),
        ("engine", ["--num-gpus", "1", "--only", "eagle3", "draft_temperature"], "--only", "Pass --only eagle3."),
        ("engine", ["--num-gpus", "-1"], "--num-gpus", "at least 0"),
        ("engine", ["--shapes", "s3k1n5"], "--shapes", "s3k1n4"),
        ("engine", ["--dtypes", "float8"], "slime-spec bench engine", "--dtypes"),
        ("engine", ["--model-shape", "9b", "--only", "cost"], "--model-shape", "135m, 1b, 8b, tiny"),
        ("engine", ["--model-shape", "8b"], "--model-shape", "Pass --only cost"),
        ("engine", ["--model-shape", "8b", "--only", "cost", "--chart", "c.svg"], "--chart", "accept lengths"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(bench: str, argv: list[str], setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_bench(bench, argv)
    assert refused.value.setting == setting
    assert says in str(refused.value)
