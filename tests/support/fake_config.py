"""A configuration whose engines need no weights: the fake engine on a model that is only a config.json."""

import json
from pathlib import Path

from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig, RunConfig

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def fake_engine_config(folder: Path) -> Config:
    """Two fake engines, rollout only."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return Config(
        run=RunConfig(mode="rollout_only"),
        model=ModelConfig(hf_checkpoint=str(folder)),
        rollout=RolloutConfig(engine="fake", num_engines=2, num_cpus_per_engine=1),
        engine=EngineConfig(max_running_requests=4),
    )
