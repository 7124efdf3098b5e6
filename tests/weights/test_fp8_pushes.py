"""A server that has loaded fp8 is pushed what it has loaded: codes and scales, together, of the trainer's numbers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.sglang_engine.staging import expected_target
from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import BlockScheme, coded_names
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig
from slime_spec.errors import PushError
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.transports.ipc import IpcTransport
from slime_spec.transports.kept import KeptWeights, packed_for_ray, unpacked_from_ray
from slime_spec.transports.server_ipc import ServerIpcTransport
from slime_spec.weights.checksums import tensor_checksum
from slime_spec.weights.messages import Manifest, Opening, PushBucket, TensorMeta
from slime_spec.weights.receive import PushReceiver, check_values
from slime_spec.weights.run import bucket_of, bucketed, push_messages
from slime_spec.weights.served import ServedForm
from slime_spec.weights.together import check_together, in_order, units
from tests.support.fp8_checkpoints import dequantised_by_loop, numbers_of, store_in_fp8
from tests.support.make_stand_ins import make_deepseek

BLOCK = (16, 16)
UP = "model.layers.0.mlp.up_proj.weight"
A_PROJS = ("model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight")


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_in_fp8(make_deepseek(tmp_path_factory.mktemp("r1")).target, BLOCK)


def config_of(folder: Path, engine: str) -> Config:
    return Config(model=ModelConfig(str(folder)), rollout=RolloutConfig(engine=engine), engine=EngineConfig("bfloat16"))


def sent(folder: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What is pushed of the checkpoint's own numbers, times ``scale``."""
    numbers = load_tensors(folder, ModelSpec.from_folder(folder))
    weights = ((name, tensor * scale) for name, tensor in numbers.items())
    return dict(ServedForm.of(config_of(folder, "sglang")).tensors(weights))


def test_a_server_of_fp8_is_announced_the_names_shapes_and_dtypes_of_its_checkpoint(r1: Path) -> None:
    spec, stored = ModelSpec.from_folder(r1), CheckpointFolder(r1).tensors
    metas = ServedForm.of(config_of(r1, "sglang")).metas(expected_shapes(spec))
    target = TargetFiles.read(str(r1))
    assert {meta.name: meta.shape for meta in metas} == target.shapes
    assert {meta.name: meta.dtype for meta in metas if "bias" not in meta.name} == {
        name: stored[name].dtype for name in target.shapes if "bias" not in name
    }
    assert {meta.dtype for meta in metas if "bias" in meta.name} == {"float32"}
    tensors = sent(r1)
    assert [(name, tuple(each.shape), each.dtype) for name, each in tensors.items()] == [
        (meta.name, meta.shape, meta.torch_dtype) for meta in metas
    ]


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_engines_of_numbers_are_pushed_numbers(engine: str, r1: Path, tmp_path: Path) -> None:
    folder = r1 if engine == "embedded" else make_deepseek(tmp_path).target
    spec = ModelSpec.from_folder(folder)
    metas = ServedForm.of(config_of(folder, engine)).metas(expected_shapes(spec))
    assert [meta.name for meta in metas] == list(expected_shapes(spec))
    assert {meta.dtype for meta in metas if "bias" not in meta.name} == {"bfloat16"}


def test_an_untrained_policy_is_pushed_as_the_codes_of_its_checkpoint(r1: Path) -> None:
    stored, tensors = load_file(r1 / "model.safetensors"), sent(r1)
    for name in coded_names(tensors):
        assert torch.equal(tensors[name].float(), stored[name].float()), name
        torch.testing.assert_close(tensors[name + "_scale_inv"], stored[name + "_scale_inv"], rtol=2**-22, atol=0)


def test_a_trained_policy_is_pushed_in_fp8_within_half_a_step_of_its_numbers(r1: Path) -> None:
    numbers, tensors = numbers_of(r1), sent(r1, scale=1.7)
    coded = coded_names(tensors)
    assert len(coded) > 20
    for name in coded:
        scales = tensors[name + "_scale_inv"]
        read = dequantised_by_loop(tensors[name], scales, BLOCK)
        wide = scales.repeat_interleave(16, 0)[: read.shape[0]].repeat_interleave(16, 1)[:, : read.shape[1]]
        wanted = 1.7 * numbers[name]
        assert ((read - wanted).abs() <= torch.maximum(wanted.abs() / 16, wide / 1024) * (1 + 2**-20)).all()
        # A scale is the largest number of its block over 448.
        assert float(scales[0, 0]) == pytest.approx(float(wanted[:16, :16].abs().max()) / 448)
    for name in tensors.keys() - coded:
        if not name.endswith("_scale_inv"):
            wanted = 1.7 * numbers[name]
            assert torch.equal(tensors[name], wanted if "bias" in name else wanted.bfloat16()), name


@pytest.mark.parametrize("bucket_bytes", [1, 700, 5000, 10**9])
def test_codes_and_scales_and_the_two_a_projections_are_never_parted(bucket_bytes: int, r1: Path) -> None:
    tensors = sent(r1)
    buckets = [{name for name, _ in bucket} for bucket in bucketed(tensors.items(), bucket_bytes)]
    assert sum(map(len, buckets)) == len(tensors)
    for bucket in buckets:
        for name in bucket:
            assert not name.endswith("_scale_inv") or name.removesuffix("_scale_inv") in bucket
        parts = {name + end for name in A_PROJS for end in ("", "_scale_inv")}
        assert bucket & parts in (set(), parts)
        check_together(bucket, tensors.keys())
    assert (len(buckets) == 1) == (bucket_bytes == 10**9)


@pytest.mark.parametrize("lone", [UP, UP + "_scale_inv", *A_PROJS, A_PROJS[1] + "_scale_inv"])
def test_a_bucket_without_the_other_part_is_refused_by_name(lone: str, r1: Path) -> None:
    names = sent(r1).keys()
    with pytest.raises(PushError, match=rf"{lone.replace('.', '[.]')} came in a bucket without"):
        check_together({lone}, names)


def test_files_in_any_order_are_sent_in_the_order_that_keeps_parts_together(r1: Path) -> None:
    stored = load_file(r1 / "model.safetensors")
    turned = dict(sorted(stored.items(), reverse=True))
    for tensors in (dict(sorted(stored.items())), turned):
        ordered = in_order(tensors)
        assert ordered.keys() == stored.keys()
        for unit in units(ordered.items()):
            check_together({name for name, _ in unit}, stored.keys())
    with pytest.raises(AssertionError, match="which it must travel with"):
        list(units(turned.items()))


def receiver_of(folder: Path, metas: tuple[TensorMeta, ...], engine: str = "sglang") -> PushReceiver:
    manifest, target = Manifest("target", 1, metas), TargetFiles.read(str(folder))
    served = expected_target(manifest, target)
    return PushReceiver(manifest, served if engine == "sglang" else expected_shapes(ModelSpec.from_folder(folder)))


def buckets_of(tensors: dict[str, torch.Tensor], transport: InProcessTransport | IpcTransport) -> Iterator[PushBucket]:
    for index, named in enumerate(bucketed(tensors.items(), 4000)):
        yield bucket_of(named, 1, index, transport)


@pytest.mark.parametrize("transport", [InProcessTransport(), IpcTransport()], ids=["in process", "shared memory"])
def test_checksums_are_of_the_codes_and_scales_that_arrive(
    transport: InProcessTransport | IpcTransport, r1: Path
) -> None:
    tensors = sent(r1)
    receiver = receiver_of(r1, ServedForm.of(config_of(r1, "sglang")).metas(expected_shapes(ModelSpec.from_folder(r1))))
    for bucket in buckets_of(tensors, transport):
        arrived = transport.receive(bucket)
        receiver.take(bucket, arrived)
        check_values([meta.name for meta in bucket.tensors], arrived, torch.bfloat16)
        for meta, tensor, checksum in zip(bucket.tensors, arrived, bucket.checksums, strict=True):
            assert tensor_checksum(tensors[meta.name]) == checksum == tensor_checksum(tensor)
    (*_, commit) = push_messages(tensors, 1, "target", 4000, InProcessTransport())
    receiver.finish(commit.checksum)  # type: ignore[union-attr]
    transport.close()


def test_what_a_rank_keeps_for_a_server_that_is_lost_survives_the_way_through_ray(r1: Path) -> None:
    """Torch pickles tensors in fp8, and cannot unpickle them."""
    kept = KeptWeights()
    push, tensors = kept.begin(Opening("target", 1, (0,))), sent(r1)
    kept.add(list(tensors.items()))
    for num_rows in (None, 2):
        packed = pickle.loads(pickle.dumps(packed_for_ray(kept.fetch(push, list(tensors), num_rows))))
        fetched = unpacked_from_ray(packed)
        assert fetched.keys() == tensors.keys()
        for name, tensor in fetched.items():
            assert tensor_checksum(tensor) == tensor_checksum(tensors[name][:num_rows])
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name][:num_rows].shape)


def test_a_rank_checks_the_values_of_what_it_sends_straight_to_servers(r1: Path) -> None:
    transport = ServerIpcTransport(1)
    transport.open("127.0.0.1", Opening("target", 1, (0,)))
    named = [(name, tensor) for name, tensor in sent(r1).items() if name.startswith(UP)]
    transport.publish(named)
    spoilt = [(name, tensor.clone()) for name, tensor in named]
    spoilt[0][1].view(torch.uint8)[2, 3] = 0x7F
    with pytest.raises(PushError, match=r"up_proj\.weight \(float8_e4m3fn\) holds NaN"):
        transport.publish(spoilt)
    transport.close()


def test_numbers_are_refused_by_a_server_of_fp8_and_fp8_by_an_engine_of_numbers(r1: Path) -> None:
    spec = ModelSpec.from_folder(r1)
    numbers = ServedForm("bfloat16").metas(expected_shapes(spec))
    codes = ServedForm.of(config_of(r1, "sglang")).metas(expected_shapes(spec))
    with pytest.raises(PushError, match=r"the push lacks .*_scale_inv"):
        receiver_of(r1, numbers)
    with pytest.raises(PushError, match=r"does not know: .*_scale_inv"):
        receiver_of(r1, codes, "embedded")
    mixed = tuple(TensorMeta(each.name, each.shape, "bfloat16") if each.name == UP else each for each in codes)
    with pytest.raises(PushError, match=r"up_proj.weight is bfloat16, and the engine has .* it must be float8_e4m3fn"):
        receiver_of(r1, mixed)
    rounded = tuple(
        TensorMeta(each.name, each.shape, "bfloat16") if each.name == UP + "_scale_inv" else each for each in codes
    )
    with pytest.raises(PushError, match=r"up_proj.weight_scale_inv is bfloat16.* it must be float32"):
        receiver_of(r1, rounded)
    receiver_of(r1, codes)


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.full((4, 4), torch.nan), r"up\.weight \(float8_e4m3fn\) holds NaN"),
        (torch.full((4, 4), torch.inf), r"up\.weight \(float8_e4m3fn\) holds NaN"),
        (torch.full((4, 4), 1e38), r"up\.weight_scale_inv \(float32\) holds 1e\+38, which is infinite"),
    ],
)
def test_numbers_that_overflow_are_refused_by_name(weight: torch.Tensor, told: str) -> None:
    form = ServedForm("float16", BlockScheme(4, 4), frozenset(["up.weight"]))
    named = list(form.tensors([("up.weight", weight)]))
    with pytest.raises(PushError, match=told):
        check_values([name for name, _ in named], [tensor for _, tensor in named], torch.float16)
