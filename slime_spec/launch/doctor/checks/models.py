"""What this version's trainer and engines can run."""

from __future__ import annotations

from slime_spec.hf.model_spec import ARCHITECTURES
from slime_spec.launch.doctor.facts import Facts
from slime_spec.launch.doctor.finding import Severity, Sighting, always, on_sglang, trap

# Families with code of their own in older checkpoints that transformers has known for long.
NATIVE_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v3", "deepseek_v32")
REPOSITORY = "https://github.com/sgl-project/sglang"


def lacking(facts: Facts) -> str:
    """What the target has that this project's decoder does not, in words; "" where it has the architecture."""
    config, architecture = facts.target.config, facts.target.architecture
    if architecture in ARCHITECTURES:
        return ""
    experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    parts = []
    if experts:
        parts.append(f"a mixture of {experts} experts")
    if config.get("kv_lora_rank"):
        parts.append("latent attention (MLA)")
    return f"{architecture} has {' and '.join(parts)}" if parts else f"{architecture} is another family"


@trap(
    "trainer-architecture",
    "The Megatron bridge of this version builds dense decoders: Llama, Qwen2, Qwen3, MiMo without its MTP layer.",
    "https://github.com/NVIDIA/Megatron-LM",
    applies=always,
)
def trainer_architecture(facts: Facts) -> Sighting | None:
    if not (reason := lacking(facts)):
        return None
    told = f"{reason}, which the trainer cannot build; it trains {', '.join(ARCHITECTURES)}"
    if facts.config.run.mode == "rollout_only":
        return Sighting(Severity.INFO, told, "Nothing to do: this run only generates.")
    return Sighting(
        Severity.ERROR,
        told,
        "Pass --debug-rollout-only: rollouts with speculation do not need the trainer.",
        ("--debug-rollout-only",),
    )


@trap(
    "engine-architecture",
    "The embedded engine runs the same dense decoders; everything that SGLang runs, runs on the sglang engine.",
    REPOSITORY,
    applies=always,
)
def engine_architecture(facts: Facts) -> Sighting | None:
    is_embedded = facts.config.rollout.engine == "embedded" and facts.config.run.mode != "train_only"
    if not is_embedded or not (reason := lacking(facts)):
        return None
    return Sighting(
        Severity.ERROR,
        f"{reason}, which the embedded engine does not run",
        "Pass --rollout-engine sglang.",
        ("--rollout-engine", "sglang"),
    )


@trap(
    "model-type",
    "A server finds the class of a configuration by its model_type, for the target and for the draft; without one it "
    "does not start.",
    "https://huggingface.co/docs/transformers/main_classes/configuration",
    applies=on_sglang,
)
def model_type(facts: Facts) -> Sighting | None:
    checkpoints = {each.folder: each for each in (facts.target, facts.draft) if each is not None}
    lacking_type = [folder for folder, each in checkpoints.items() if not each.config.get("model_type")]
    if not lacking_type:
        return None
    return Sighting(
        Severity.ERROR,
        f"no model_type in config.json of {', '.join(lacking_type)}",
        'Add "model_type": "llama" (or the family that the checkpoint is of) to that config.json.',
    )


@trap(
    "remote-code",
    "A family that transformers does not know brings its configuration as code in the checkpoint folder; a server "
    "runs it only when told to.",
    "https://github.com/XiaomiMiMo/MiMo",
    applies=on_sglang,
)
def remote_code(facts: Facts) -> Sighting | None:
    config = facts.target.config
    if "auto_map" not in config or config.get("model_type") in NATIVE_TYPES or facts.flags.get("trust_remote_code"):
        return None
    return Sighting(
        Severity.ERROR,
        f"{facts.target.folder}/config.json (model_type {config.get('model_type')}) names code in its auto_map",
        "Read that code, then pass --sglang-trust-remote-code.",
        ("--sglang-trust-remote-code",),
    )


@trap(
    "sglang-version",
    "Servers are started with an interpreter that has sglang. Most traps belong to versions; without one to ask, the "
    "checks speak of the pinned version.",
    f"{REPOSITORY}/releases",
    applies=on_sglang,
)
def sglang_version(facts: Facts) -> Sighting | None:
    if facts.release.is_installed or facts.config.sglang_server.external_addrs:
        return None
    python = facts.config.sglang_server.python or "this environment's Python"
    return Sighting(
        Severity.ERROR,
        f"no sglang in {python}; judged as {facts.release.text}",
        "Pass --sglang-python with the Python of an environment that has sglang.",
    )
