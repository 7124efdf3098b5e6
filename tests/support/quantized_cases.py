"""Cases of the checks of quantised weights: servers whose form of the weights a push knows, and those it does not."""

from __future__ import annotations

from slime_spec.preflight.finding import Severity
from tests.support.doctor_facts import LEARNING, MIMO, MTP, ON_CPU, PLAIN, ROLLOUTS, TARGET, case
from tests.support.fp8_checkpoints import PUBLISHED

ERROR = Severity.ERROR
IN_FP8 = {**TARGET, "quantization_config": PUBLISHED}
DROPPED = '{"quantization_config": null}'
ROUNDED = ("--speculative-draft-model-quantization", "fp8")
QUANTIZED = (
    case("fp8-dtype", (*PLAIN, "--sglang-dtype", "float32"), ERROR, target=IN_FP8),
    case("fp8-dtype", (*PLAIN, "--sglang-dtype", "float32")),
    case("fp8-dtype", PLAIN, target=IN_FP8),
    case("push-quantization", (*PLAIN, *ON_CPU), ERROR, target=IN_FP8),
    case("push-quantization", (*PLAIN, *ON_CPU)),
    case("push-quantization", (*PLAIN, "--sglang-quantization", "fp8"), ERROR),
    case("push-quantization", (*PLAIN, "--sglang-quantization", "fp8", ROLLOUTS)),
    case("push-quantization", (*PLAIN, "--sglang-quantization", "fp8"), target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-quantization", "w8a8_fp8"), ERROR, target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-quantization", "unquant")),
    case("push-quantization", (*PLAIN, "--sglang-rl-quant-profile", "profile.pt"), ERROR),
    case("push-quantization", (*PLAIN, "--sglang-json-model-override-args", DROPPED), ERROR, target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-json-model-override-args", '{"rope_theta": 1}'), target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-moe-runner-backend", "marlin"), ERROR, target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-moe-runner-backend", "triton"), target=IN_FP8),
    case("push-quantization", (*PLAIN, "--sglang-moe-runner-backend", "marlin")),
    case("push-quantization", PLAIN, ERROR, target=IN_FP8, environ={"SGLANG_FORCE_FP8_MARLIN": "1"}),
    case("push-quantization", PLAIN, environ={"SGLANG_FORCE_FP8_MARLIN": "1"}),
    case("push-quantization", (*MTP, LEARNING, *ROUNDED), ERROR, target=MIMO),
    case("push-quantization", (*MTP, *ROUNDED), target=MIMO),
)
