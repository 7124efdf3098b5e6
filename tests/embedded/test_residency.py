"""Offloading: what an engine gives back, and what it must not duplicate on the way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.embedded.assemble import Assembly
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.linear import Packing
from rollout.embedded.model import Decoder
from rollout.embedded.rope import RopeTable
from rollout.embedded.weights import DecoderBuilder
from slime_spec.memory import release_freed_memory
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import VOCAB, engine_config
from tests.support.tiny_models import make_tiny_checkpoint


def unpacked_decoder(folder: Path) -> Decoder:
    """The decoder as an engine on a GPU keeps it."""
    spec, cpu = Assembly(engine_config(folder)).spec, torch.device("cpu")
    builder = DecoderBuilder(spec, RopeTable(spec, 64, torch.float32, cpu), torch.float32, cpu, packing=Packing.PLAIN)
    for name, tensor in load_file(folder / "model.safetensors").items():
        builder.add(name, tensor)
    return builder.finish()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_and_its_embedding_are_one_tensor_wherever_they_move(tmp_path: Path, tied: bool) -> None:
    decoder = unpacked_decoder(make_tiny_checkpoint(tmp_path, tie_word_embeddings=tied))
    assert (decoder.head.unpacked() is decoder.embedding) == tied
    decoder.move(torch.device("meta"))  # a device that copies nothing, yet makes new tensors as CUDA does
    assert (decoder.head.unpacked() is decoder.embedding) == tied
    assert {decoder.embedding.device.type, decoder.head.unpacked().device.type} == {"meta"}
    assert decoder.layers[-1].down.unpacked().device.type == decoder.norm.device.type == "meta"


def test_every_offload_on_the_cpu_gives_the_kv_memory_back_to_the_machine(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # The first time glibc unmaps it by itself, and learns from it to take such blocks from the heap, which it keeps.
    folder = make_tiny_checkpoint(
        tmp_path, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8, head_dim=128
    )
    engine = EmbeddedEngine(engine_config(folder), 0, RayObjectStoreTransport())
    engine.start()
    request.addfinalizer(engine.stop)
    ends_at_once = SamplingParams(max_new_tokens=128, stop_token_ids=tuple(range(VOCAB)))
    release_freed_memory()
    for _ in range(3):
        before_bytes = engine.stats().rss_bytes
        for num_samples in (4, 9, 48):
            list(engine.generate(GroupRequest("g", (1, 2, 3), tuple(range(num_samples)), ends_at_once)))
        kv_bytes = engine._core.cache.own.nbytes
        served_bytes = engine.stats().rss_bytes
        assert kv_bytes > 300e6
        assert served_bytes - before_bytes > 0.9 * kv_bytes
        engine.set_resident(False)
        assert served_bytes - engine.stats().rss_bytes > 0.9 * kv_bytes
        engine.set_resident(True)
