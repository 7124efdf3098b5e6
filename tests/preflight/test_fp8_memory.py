"""Memory plans of checkpoints in fp8: a byte a weight in servers, two where the numbers are computed with."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.folder import StoredTensor
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.launch.compose import composed
from slime_spec.launch.dry_run.plan import make_plan
from slime_spec.launch.preflight import look
from slime_spec.preflight.memory import MemoryPlan, plan_memory
from tests.support.chat_templates import QWEN2_5, save_tokenizer
from tests.support.doctor_facts import CHAIN, SERVERS, make_facts
from tests.support.fp8_checkpoints import is_linear, store_in_fp8
from tests.support.launched import run_in_process
from tests.support.make_stand_ins import STAND_INS
from tests.support.published_served import FP8
from tests.support.recipes import DEEPSEEK_R1, ONE_NODE


def headers_of(config: dict[str, Any], folder: Path) -> dict[str, StoredTensor]:
    """A folder with the config.json and the header of a model's one file, whose numbers are a hole in the file.

    Projections are in fp8, as DeepSeek's are, all else in bfloat16 and the routers' biases in float32.
    """
    spec = ModelSpec.from_dict(config)
    draft = draft_shapes(DraftSpec.from_dict(config, spec))
    own = f"model.layers.{spec.num_layers}."
    copies = {
        own + "embed_tokens.weight": "model.embed_tokens.weight",
        own + "shared_head.head.weight": "lm_head.weight",
    }
    shapes = {**expected_shapes(spec), **draft}
    shapes |= {copy: shapes[name] for copy, name in copies.items()}
    stored: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        size = prod(shape)
        if is_linear(name):
            scales = (-(-shape[0] // 128), -(-shape[1] // 128))
            stored[name] = StoredTensor("F8_E4M3", shape, size)
            stored[name + "_scale_inv"] = StoredTensor("F32", scales, 4 * prod(scales))
        elif name.endswith("bias"):
            stored[name] = StoredTensor("F32", shape, 4 * size)
        else:
            stored[name] = StoredTensor("BF16", shape, 2 * size)
    end, header = 0, {}
    for name, each in stored.items():
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [end, end + each.num_bytes]}
        end += each.num_bytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return stored


def test_the_dry_run_of_deepseek_r1_counts_a_byte_a_weight_in_fp8_and_two_of_the_others(tmp_path: Path) -> None:
    """The published config.json and the header of such a file: 671 GB of codes, and what is not in fp8."""
    folder = save_tokenizer(tmp_path / "DeepSeek-R1", QWEN2_5, eos_token="<|im_end|>")
    stored = headers_of(FP8["deepseek-ai/DeepSeek-R1"], folder)
    argv = ["--config", "deepseek-r1-mtp", "--hf-checkpoint", str(folder), "--task", "max4", "--skip-check"]
    argv += ["sglang-version", "gpus", "end-of-text", *ONE_NODE]
    made = make_plan(look(composed(argv)))
    engine = made.memory.engine
    assert engine is not None
    mtp = {name for name in stored if name.startswith("model.layers.61.")}
    of_target = sum(each.num_bytes for name, each in stored.items() if name not in mtp)
    of_mtp = sum(
        each.num_bytes
        for name, each in stored.items()
        if name in mtp and "embed" not in name and "head.head" not in name
    )
    counted = count_parameters(DEEPSEEK_R1)
    assert counted is not None
    # Each of the eight replicas of attention has its own embedding.
    replicas = 7 * (counted.attention + 2 * counted.tables // 2)
    assert engine.target_bytes == of_target + replicas
    assert engine.draft_bytes == of_mtp
    assert of_target == pytest.approx(671.0e9 + 2 * 0.93e9, rel=0.002)
    assert of_mtp == pytest.approx(counted.mtp + 2 * 7168**2, rel=1e-3)  # its projection is in bfloat16
    done = run_in_process("run-deepseek-r1-mtp.sh", *argv[4:], "--dry-run", environ={"MODEL_DIR": str(folder)})
    assert done.returncode == 0, done.stdout
    assert "memory (from config.json and the weights' headers" in done.stdout
    assert done.stdout.rstrip().endswith("a launch would go on")
    # By config.json alone: without headers the plan does not know which tensors beside embedding and head are wider.
    (folder / "model.safetensors").unlink()
    alone = make_plan(look(composed(argv))).memory.engine
    assert alone is not None
    assert alone.target_bytes == pytest.approx(engine.target_bytes, rel=1e-3)
    assert alone.draft_bytes == pytest.approx(engine.draft_bytes, rel=0.02)


def test_a_run_that_pushes_fp8_sends_what_its_servers_have_and_trains_two_bytes_a_weight(tmp_path: Path) -> None:
    target = store_in_fp8(STAND_INS["deepseek-r1"](tmp_path).target)
    checkpoint = Checkpoint.read(str(target))
    assert checkpoint.tensors is not None
    argv = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN, "--train-dtype", "bfloat16")

    def planned(*words: str) -> MemoryPlan:
        return plan_memory(replace(make_facts(tmp_path, (*argv, *words), target=checkpoint.config), target=checkpoint))

    memory, embedded = planned(), planned("--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "1")
    counted = count_parameters(checkpoint.config)
    assert counted is not None
    mtp = f"model.layers.{checkpoint.config['num_hidden_layers']}."
    served = {name: each.num_bytes for name, each in checkpoint.tensors.items() if not name.startswith(mtp)}
    # The stand-in stores its routers' biases in bfloat16, and servers have them in float32.
    biases = sum(each.num_bytes for name, each in checkpoint.tensors.items() if "bias" in name and name in served)
    assert memory.engine is not None
    assert memory.trainer is not None
    assert memory.push_bytes == memory.engine.target_bytes == sum(served.values()) + biases
    corrections = sum(
        prod(each.shape) for name, each in checkpoint.tensors.items() if name in served and name.endswith(CORRECTION)
    )
    assert corrections
    assert memory.trainer.weights_bytes == 2 * counted.decoder + 2 * corrections  # which are in float32
    assert embedded.engine is not None
    assert embedded.push_bytes == embedded.engine.target_bytes == 2 * counted.decoder
    assert embedded.engine.draft_bytes == 2 * counted.mtp
