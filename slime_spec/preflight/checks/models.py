"""These checks test that trainer and engines can run the target's architecture."""

from __future__ import annotations

from shutil import which

from slime_spec.checkpoints.families import TRAINED_ARCHITECTURES, family_of, model_type_comes_as_code
from slime_spec.checkpoints.parameters import expanded_kv_elements, has_latent_attention
from slime_spec.engines import kind_of
from slime_spec.preflight.activation_memory import ITEMSIZES
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, on_sglang, trap

REPOSITORY = "https://github.com/sgl-project/sglang"


def lacking(facts: Facts) -> str:
    """Return what the target has that keeps it from being computed here, in words."""
    config, architecture = facts.target.config, facts.target.architecture
    experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    parts = []
    if experts:
        parts.append(f"a mixture of {experts} experts")
    if config.get("kv_lora_rank"):
        parts.append("latent attention (MLA)")
    return f"{architecture} has {' and '.join(parts)}" if parts else f"{architecture} is another family"


@trap(
    "trainer-architecture",
    "The Megatron bridge of this version builds the decoders of some families, each without its MTP layers.",
    "https://github.com/NVIDIA/Megatron-LM",
    applies=always,
)
def trainer_architecture(facts: Facts) -> Sighting | None:
    if family_of(facts.target.architecture).is_trained:
        return None
    told = f"{lacking(facts)}, which the trainer cannot build; it trains {', '.join(TRAINED_ARCHITECTURES)}"
    if facts.config.run.mode == "rollout_only":
        return Sighting(Severity.INFO, told, "Nothing to do: this run only generates.")
    return Sighting(
        Severity.ERROR,
        told,
        "Pass --debug-rollout-only: rollouts with speculation do not need the trainer.",
        ("--debug-rollout-only",),
    )


MOST_EXPANDED_BYTES = 1 << 20  # of a token's keys and values: a context of 16,384 fills 16 GB


@trap(
    "engine-architecture",
    "The embedded engine runs the same decoders, latent attention with a key and a value for every head in its cache, "
    "which only small models can afford; everything that SGLang runs, runs on the sglang engine.",
    REPOSITORY,
    applies=always,
)
def engine_architecture(facts: Facts) -> Sighting | None:
    generates = facts.config.run.mode != "train_only"
    if not (generates and kind_of(facts.config).runs_built_decoders):
        return None
    config, architecture = facts.target.config, facts.target.architecture
    reason = "" if family_of(architecture).is_built else lacking(facts)
    if not reason and has_latent_attention(config):
        num_bytes = (expanded_kv_elements(config) or 0) * ITEMSIZES[facts.config.engine.dtype]
        if num_bytes > MOST_EXPANDED_BYTES:
            told = f"{architecture}'s latent attention would take {num_bytes:,} bytes of cache for a token"
            reason = f"{told} (at most {MOST_EXPANDED_BYTES:,})"
    if not reason:
        return None
    return Sighting(
        Severity.ERROR,
        f"{reason}, which the embedded engine does not run",
        "Pass --rollout-engine sglang.",
        ("--rollout-engine", "sglang"),
    )


@trap(
    "model-type",
    "A server finds the class of a configuration by its model_type, for the target and for the draft; without the "
    "key it does not start.",
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
    "A family that transformers does not know (MiMo) brings its configuration as code in the checkpoint folder; a "
    "server runs it only when told to, and without either does not start.",
    "https://github.com/XiaomiMiMo/MiMo",
    applies=on_sglang,
)
def remote_code(facts: Facts) -> Sighting | None:
    checkpoints = {each.folder: each for each in (facts.target, facts.draft) if each is not None}
    for folder, checkpoint in checkpoints.items():
        model_type, has_code = checkpoint.config.get("model_type"), "auto_map" in checkpoint.config
        if not model_type or _is_known(facts, str(model_type)):
            continue
        if not has_code:
            return Sighting(
                Severity.ERROR,
                f"{folder}/config.json has model_type {model_type}, which the servers do not know, and no auto_map "
                "that names the code of it",
                "Copy the checkpoint again with its configuration_*.py, or use a newer SGLang that knows the family.",
            )
        if not facts.flags.get("trust_remote_code"):
            return Sighting(
                Severity.ERROR,
                f"{folder}/config.json (model_type {model_type}) names code in its auto_map",
                "Read that code, then pass --sglang-trust-remote-code.",
                ("--sglang-trust-remote-code",),
            )
    return None


def _is_known(facts: Facts, model_type: str) -> bool:
    """Return whether SGLang knows ``model_type``.

    Without an interpreter to ask, whether no family here says otherwise.
    """
    known = facts.release.model_types
    return model_type in known if known else not model_type_comes_as_code(model_type)


@trap(
    "sglang-version",
    "Servers are started with an interpreter that has sglang. Most traps exist in some versions only; without an "
    "interpreter to ask, the checks assume the pinned version.",
    f"{REPOSITORY}/releases",
    applies=on_sglang,
)
def sglang_version(facts: Facts) -> Sighting | None:
    if facts.release.is_installed or facts.config.sglang_server.external_addrs:
        return None
    asked = facts.config.sglang_server.python
    python = asked or "this environment's Python"
    if asked is not None and which(asked) is None:
        python = f"{asked}, which is no program"
    return Sighting(
        Severity.ERROR,
        f"no sglang in {python}; judged as {facts.release.text}",
        f"Pass --sglang-python (or set SGLANG_PYTHON for a script) with the Python of an environment that has it: "
        f"python3.11 -m venv ENV && ENV/bin/pip install sglang=={facts.release.text}; for a CPU "
        "scripts/install-sglang-cpu.sh makes one.",
    )
