"""The configurations that the launch scripts run, with the config.json of the models that they name and their GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.doctor_facts import EAGLE3_HEAD, TARGET
from tests.support.published_configs import BUILT
from tests.support.published_served import FP8, MIXED

GLM_355B, GLM_AIR = MIXED["zai-org/GLM-4.5"], MIXED["zai-org/GLM-4.5-Air"]
DEEPSEEK_R1 = FP8["deepseek-ai/DeepSeek-R1"]
QWEN3_235B, QWEN3_30B = MIXED["Qwen/Qwen3-235B-A22B"], MIXED["Qwen/Qwen3-30B-A3B"]
MIMO_7B = BUILT["XiaomiMiMo/MiMo-7B-RL"]
LLAMA_DRAFT: dict[str, Any] = {**EAGLE3_HEAD, "torch_dtype": "float16", "max_position_embeddings": 2048}
QWEN3_DRAFT: dict[str, Any] = {
    **{**EAGLE3_HEAD, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128},
    **{"vocab_size": 151936, "max_position_embeddings": 40960},
}


@dataclass(frozen=True)
class Recipe:
    """A named configuration, the config.json of its models, and the number and size of the GPUs that it is for."""

    experiment: str
    target: dict[str, Any]
    draft: dict[str, Any] | None
    num_gpus: int
    gpu_gb: int
    more: tuple[str, ...] = ()

    def arguments(self, folder: Path) -> list[str]:
        """Flags of train, with both checkpoints as config.json alone, and the task that needs no file."""
        argv = [
            "--config",
            self.experiment,
            "data=arithmetic",
            "--hf-checkpoint",
            str(write_config(folder / "target", self.target)),
        ]
        if self.draft is not None:
            argv += ["--speculative-draft-model-path", str(write_config(folder / "draft", self.draft))]
        return [*argv, *self.more]


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 131072, **config}))
    return folder


RECIPES: Mapping[str, Recipe] = {
    each.experiment: each
    for each in (
        Recipe("eagle3-llama3.1-8b", TARGET, LLAMA_DRAFT, 8, 80),
        Recipe("mimo-7b-rl-mtp", MIMO_7B, None, 8, 80),
        Recipe(
            "qwen3-30b-a3b-eagle3", QWEN3_30B, {**QWEN3_DRAFT, "hidden_size": 2048, "num_attention_heads": 32}, 8, 80
        ),
        Recipe("glm4.5-air-mtp", GLM_AIR, None, 32, 80),
        Recipe("glm4.5-355b-a32b-mtp", GLM_355B, None, 64, 141),
        Recipe("glm4.6-355b-a32b-mtp", MIXED["zai-org/GLM-4.6"], None, 64, 141),
        Recipe("qwen3-235b-a22b-eagle3", QWEN3_235B, QWEN3_DRAFT, 64, 141),
        Recipe("deepseek-r1-mtp", DEEPSEEK_R1, None, 128, 141),
    )
}
ONE_NODE = ("cluster=gpus8_one_engine", "--debug-rollout-only")
# Rollouts alone of the models that a node of eight GPUs holds.
ROLLOUTS: Mapping[str, Recipe] = {
    each.experiment: each
    for each in (
        Recipe("glm4.5-355b-a32b-mtp", GLM_355B, None, 8, 141, ONE_NODE),
        Recipe("glm4.6-355b-a32b-mtp", MIXED["zai-org/GLM-4.6"], None, 8, 141, ONE_NODE),
        Recipe("qwen3-235b-a22b-eagle3", QWEN3_235B, QWEN3_DRAFT, 8, 141, ONE_NODE),
        Recipe("deepseek-r1-mtp", DEEPSEEK_R1, None, 8, 141, ONE_NODE),
    )
}
# Megatron's stages in place of experts over all ranks, as slime's scripts have them.
STAGED: Mapping[str, tuple[str, ...]] = {
    "glm4.5-355b-a32b-mtp": (
        *("--pipeline-model-parallel-size", "4", "--decoder-last-pipeline-num-layers", "20"),
        *("--expert-model-parallel-size", "16", "--expert-tensor-parallel-size", "1"),
    ),
    "qwen3-235b-a22b-eagle3": (
        *("--pipeline-model-parallel-size", "4", "--decoder-last-pipeline-num-layers", "22"),
        *("--expert-model-parallel-size", "16", "--expert-tensor-parallel-size", "1"),
    ),
    "deepseek-r1-mtp": (
        *("--pipeline-model-parallel-size", "4", "--decoder-last-pipeline-num-layers", "13"),
        *("--expert-model-parallel-size", "32", "--expert-tensor-parallel-size", "1"),
    ),
}
