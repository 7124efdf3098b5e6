"""These checks test that a push can send weights in the form in which the servers have them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from slime_spec.checkpoints.quantization import KEY, is_fp8
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, on_sglang, trap

UNQUANTIZED = (None, "unquant")
# Flags with which a server makes codes of its own out of the checkpoint's weights.
MAKES_CODES = ("modelopt_quant", "quantize_and_serve", "rl_quant_profile", "kt_weight_path")
# Kernels for fp8 whose servers lay the codes out anew when they have loaded them, and cannot load a second time.
OTHER_LAYOUTS = {
    "moe_runner_backend": ("marlin", "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_megamoe"),
    "moe_a2a_backend": ("megamoe", "flashinfer_megamoe"),
}
MARLIN = "SGLANG_FORCE_FP8_MARLIN"


@trap(
    "fp8-dtype",
    "SGLang computes with weights in fp8 in 16 bits only; a server in float32 ends while it loads.",
    "https://docs.sglang.ai/advanced_features/quantization.html",
    applies=on_sglang,
)
def fp8_dtype(facts: Facts) -> Sighting | None:
    if not is_fp8(facts.target.config) or facts.config.engine.dtype != "float32":
        return None
    return Sighting(
        Severity.ERROR,
        "engine.dtype is float32, and the target's weights are in fp8",
        "Pass --sglang-dtype bfloat16.",
        ("--sglang-dtype", "bfloat16"),
    )


@trap(
    "push-quantization",
    "A push sends numbers, or to servers of a checkpoint in fp8 its codes and scales. A server that has made other "
    "codes out of the weights, or has laid its codes out anew for a kernel, takes neither: it would load numbers as "
    "codes, or compute with scales that belong to other codes.",
    "https://docs.sglang.ai/advanced_features/quantization.html",
    applies=lambda facts: facts.knows_servers and facts.trains_with_pushes,
)
def push_quantization(facts: Facts) -> Sighting | None:
    unknown = list(_unknown_forms(facts))
    if not unknown:
        return None
    return Sighting(
        Severity.ERROR,
        f"{', '.join(unknown)}: a push does not know the form in which such a server has its weights",
        "Leave it out (of a server that runs already, too), or choose the checkpoint of the unquantised weights. "
        "Quantised servers serve rollouts alone, with --debug-rollout-only.",
    )


def _unknown_forms(facts: Facts) -> Iterator[str]:
    flags, has_fp8 = facts.flags, is_fp8(facts.target.config)
    if flags.get("quantization") not in (*UNQUANTIZED, *(("fp8",) if has_fp8 else ())):
        yield f"--sglang-quantization {flags['quantization']}"
    of_draft = flags.get("speculative_draft_model_quantization")
    if facts.config.draft_training.enable and of_draft not in UNQUANTIZED:
        yield f"--speculative-draft-model-quantization {of_draft} of a draft that is trained"
    yield from (f"--sglang-{name.replace('_', '-')} {flags[name]}" for name in MAKES_CODES if flags.get(name))
    if KEY in json.dumps(flags.get("json_model_override_args") or ""):
        yield f"--sglang-json-model-override-args with a {KEY}"
    if not has_fp8:
        return
    if not facts.on_gpu and not facts.config.sglang_server.external_addrs:
        yield "weights in fp8 on a CPU, whose AMX packs them"
    for name, values in OTHER_LAYOUTS.items():
        if flags.get(name) in values:
            yield f"--sglang-{name.replace('_', '-')} {flags[name]} with weights in fp8"
    if facts.environ.get(MARLIN, "").lower() in ("1", "true"):
        yield f"{MARLIN} with weights in fp8"
