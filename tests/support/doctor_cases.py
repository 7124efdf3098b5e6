"""Command lines (and config.json keys) at which each check of the doctor speaks up, and others at which it must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from slime_spec.checkpoints.end_of_text import ReplyEnds, TurnEnd
from slime_spec.preflight.facts import DENSE_GRAPH_SIZES
from slime_spec.preflight.finding import Severity
from slime_spec.sglang.served import Difference
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, MIMO, SERVERS, TARGET, TREE
from tests.support.fp8_checkpoints import PUBLISHED

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
EAGLE3 = (*SERVERS, "--speculative-algorithm", "EAGLE3", *CHAIN)
EAGLE3_TREE = (*SERVERS, "--speculative-algorithm", "EAGLE3", *TREE)
MTP = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN)
DFLASH = (*SERVERS, "--speculative-algorithm", "DFLASH")
DSPARK = (*SERVERS, "--speculative-algorithm", "DSPARK")
EMBEDDED_DFLASH = ("--speculative-algorithm", "DFLASH")
NGRAM = (*SERVERS, "--speculative-algorithm", "NGRAM")
PLAIN = SERVERS
ROLLOUTS = "--debug-rollout-only"
LEARNING = "--enable-draft-training"
HEAD: dict[str, Any] = {"draft": EAGLE3_HEAD}
BLOCKS: dict[str, Any] = {
    "draft": {
        **TARGET,
        "architectures": ["DFlashDraftModel"],
        "num_hidden_layers": 5,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 128255, "target_layer_ids": [1, 8, 15]},
    }
}
SPARKS: dict[str, Any] = {"draft": {**BLOCKS["draft"], "architectures": ["DSparkDraftModel"], "markov_rank": 256}}
FP16_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "torch_dtype": "float16"}}
SHORT_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "max_position_embeddings": 2048}}
FULL_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "draft_vocab_size": None}}
GLM = {**TARGET, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 160, "num_nextn_predict_layers": 1}
STANDALONE: dict[str, Any] = {"draft": {**TARGET, "hidden_size": 576}}
ALONE = (*SERVERS, "--speculative-algorithm", "STANDALONE", *CHAIN)
UNSET = SERVERS[:6]  # the engine, no flag of its own
NEXT = {**GLM, "architectures": ["Qwen3NextForCausalLM"]}
LATENT = {
    **{**TARGET, "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "num_attention_heads": 128},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 256, "moe_intermediate_size": 2048},
}
CODED_MIMO = {**TARGET, "model_type": "mimo", "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}}
IN_FP8 = {**TARGET, "quantization_config": PUBLISHED}
DROPPED = '{"quantization_config": null}'
ROUNDED = ("--speculative-draft-model-quantization", "fp8")
ERNIE = {**TARGET, "architectures": ["Ernie4_5_MoeForCausalLM"], "num_nextn_predict_layers": 1}
FLASHINFER = ("--sglang-attention-backend", "flashinfer")
FIVE_STEPS = ("--speculative-num-steps", "5", "--speculative-num-draft-tokens", "6")
EXTERNAL = ("--rollout-external-engine-addrs", "10.0.0.1:30000")
ON_CPU = ("--rollout-num-gpus-per-engine", "0", "--actor-num-gpus", "0")
DENSE = ("--sglang-cuda-graph-bs", *map(str, DENSE_GRAPH_SIZES))
ALLOWED = {"environ": {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}}
CHATML = TurnEnd("<|im_end|>\n", (7, 11), {7: "<|im_end|>"}, is_closed=True)
PLAIN_TURNS = TurnEnd("\n\nUser: ", (11, 11, 12), {}, is_closed=False)
OTHER_BACKEND = Difference("attention_backend", "fa3", "triton", is_decisive=False)
DISK = ("--sglang-weight-transport", "disk")
BY_GROUP = ("--push-transport", "object_store", "--sglang-weight-transport", "distributed")


@dataclass(frozen=True)
class Case:
    """A command line (and config.json keys); ``sees`` is None where the trap must be silent."""

    trap: str
    argv: tuple[str, ...]
    sees: Severity | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def case(trap: str, argv: tuple[str, ...], sees: Severity | None = None, **facts: Any) -> Case:
    return Case(trap, argv, sees, facts)


def reading(*layers: int) -> dict[str, Any]:
    return {**EAGLE3_HEAD, "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}


CASES = (
    case("trainer-architecture", MTP, ERROR, target=NEXT),
    case("trainer-architecture", (*MTP, ROLLOUTS), INFO, target=NEXT),
    case("trainer-architecture", MTP, target=GLM),
    case("trainer-architecture", MTP, target=MIMO),
    case("engine-architecture", (ROLLOUTS,), ERROR, target=NEXT),
    case("engine-architecture", (ROLLOUTS,), ERROR, target=LATENT),
    case("engine-architecture", (ROLLOUTS,), target={**LATENT, "num_hidden_layers": 2}),
    case("engine-architecture", (ROLLOUTS,), target=GLM),
    case("engine-architecture", (*MTP, ROLLOUTS), target=GLM),
    case("sglang-version", PLAIN, ERROR, is_installed=False),
    case("sglang-version", (*PLAIN, "--rollout-external-engine-addrs", "10.0.0.1:30000"), is_installed=False),
    case("sglang-version", PLAIN),
    case("model-type", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "model_type": None}),
    case("model-type", EAGLE3, **HEAD),
    case("remote-code", PLAIN, ERROR, target=CODED_MIMO),
    case("remote-code", (*PLAIN, "--sglang-trust-remote-code"), target=CODED_MIMO),
    case("remote-code", (*PLAIN, "--sglang-trust-remote-code"), ERROR, target={**TARGET, "model_type": "mimo"}),
    case("remote-code", PLAIN, ERROR, target={**CODED_MIMO, "model_type": "phi9"}, model_types=["phi3", "llama"]),
    case("remote-code", PLAIN, target={**CODED_MIMO, "model_type": "phi3"}, model_types=["phi3", "llama"]),
    case("remote-code", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "model_type": "eagle"}, model_types=["llama"]),
    case("end-of-text", (), ERROR, reply_ends=ReplyEnds(frozenset(), None)),
    case("end-of-text", ("--rollout-stop", "."), reply_ends=ReplyEnds(frozenset(), None)),
    case("end-of-text", (), ERROR, reply_ends=ReplyEnds(frozenset({2}), CHATML)),
    case("end-of-text", (), reply_ends=ReplyEnds(frozenset({2, 7}), CHATML)),
    case("end-of-text", (), reply_ends=ReplyEnds(frozenset({2}), None)),
    case("end-of-text", ("--rollout-stop-token-ids", "7"), reply_ends=ReplyEnds(frozenset({2}), CHATML)),
    case("end-of-text", ("--rollout-stop", "<|im_end|>"), reply_ends=ReplyEnds(frozenset({2}), CHATML)),
    case("end-of-text", ("--no-apply-chat-template",), reply_ends=ReplyEnds(frozenset({2}), CHATML)),
    case("end-of-text", (), INFO, reply_ends=ReplyEnds(frozenset({2}), PLAIN_TURNS)),
    case("gpus", PLAIN, ERROR, gpu_bytes=()),
    case("gpus", (*PLAIN, "--rollout-num-engines", "2", "--no-colocate"), ERROR, gpu_bytes=(80, 80)),
    case("gpus", PLAIN, gpu_bytes=(80,)),
    case("gpus", PLAIN, gpu_bytes=None),
    case("gpus", (), gpu_bytes=()),
    case("server-flags", (*PLAIN, "--sglang-extra-args=--enable-warp-drive"), ERROR),
    case("server-flags", (*PLAIN, "--sglang-extra-args=--enable-warp-drive"), is_installed=False),
    case("server-flags", (*PLAIN, "--sglang-extra-args=--enable-metrics")),
    case("external-servers", (*PLAIN, *EXTERNAL), WARNING, silent_servers=("10.0.0.1:30000",)),
    case("external-servers", (*PLAIN, *EXTERNAL)),
    case("external-flags", (*PLAIN, *EXTERNAL), WARNING, differing=(OTHER_BACKEND,)),
    case("external-flags", (*PLAIN, *EXTERNAL), differing=(replace(OTHER_BACKEND, is_decisive=True),)),
    case("draft-dtype", (*UNSET, *EAGLE3[len(SERVERS) :]), ERROR, **FP16_HEAD),
    case("draft-dtype", EAGLE3, **FP16_HEAD),
    case("draft-dtype", (*UNSET, *EAGLE3[len(SERVERS) :]), **HEAD),
    case("float32-attention", (*SERVERS, "--sglang-dtype", "float32"), ERROR),
    case("float32-attention", UNSET, WARNING),
    case("float32-attention", (*SERVERS, "--sglang-dtype", "float32", "--sglang-attention-backend", "triton")),
    case("float16-range", (*SERVERS, "--sglang-dtype", "float16"), INFO),
    case(
        "float16-range",
        (*SERVERS, "--sglang-dtype", "float16"),
        ERROR,
        target={**TARGET, "architectures": ["Qwen2ForCausalLM"]},
    ),
    case("float16-range", (*SERVERS, "--sglang-dtype", "float16"), target={**TARGET, "torch_dtype": "float16"}),
    case("draft-context", EAGLE3, ERROR, **SHORT_HEAD),
    case("draft-context", EAGLE3, WARNING, **SHORT_HEAD, **ALLOWED),
    case("draft-context", EAGLE3, WARNING, **SHORT_HEAD, **ALLOWED, version="0.5.3"),
    case("draft-context", EAGLE3, ERROR, **SHORT_HEAD, **ALLOWED, version="0.5.2"),
    case("draft-context", EAGLE3, ERROR, **SHORT_HEAD, version="0.5.0"),
    case("draft-context", (*EAGLE3, "--sglang-context-length", "2048"), **SHORT_HEAD),
    case("draft-length", (*EAGLE3, "--rollout-max-response-len", "1800"), WARNING, **SHORT_HEAD),
    case("draft-length", (*EAGLE3, "--rollout-max-response-len", "1536"), **SHORT_HEAD),
    case("context-length", (*PLAIN, "--sglang-context-length", "16384"), ERROR),
    case("context-length", (*PLAIN, "--sglang-context-length", "16384"), **ALLOWED),
    case("context-length", (*PLAIN, "--sglang-context-length", "8192")),
    case("draft-fit", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "hidden_size": 2048}),
    case("draft-fit", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "vocab_size": 151936}),
    case("draft-fit", MTP, ERROR, **HEAD),
    case("draft-fit", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "architectures": ["LlamaForCausalLM"]}),
    case("draft-fit", EAGLE3, draft={**EAGLE3_HEAD, "architectures": ["Eagle3DeepseekV2ForCausalLM"]}),
    case("draft-fit", EAGLE3, draft={**EAGLE3_HEAD, "hidden_size": 2048, "target_hidden_size": 4096}),
    case("draft-fit", ALONE, ERROR, draft={**TARGET, "vocab_size": 128000}),
    case("draft-fit", ("--speculative-algorithm", "STANDALONE", *CHAIN), draft={**TARGET, "vocab_size": 128000}),
    case("draft-tensors", EAGLE3, ERROR, **HEAD, tensors=["fc.weight", "norm.weight", "d2t"]),
    case("draft-tensors", EAGLE3, ERROR, **HEAD, tensors=["fc.weight", "norm.weight", "lm_head.weight"]),
    case("draft-tensors", EAGLE3, **HEAD, tensors=["fc.weight", "norm.weight", "lm_head.weight", "d2t"]),
    case("draft-tensors", EAGLE3, **FULL_HEAD, tensors=["fc.weight", "norm.weight"]),
    case("draft-tensors", EAGLE3, **FULL_HEAD, tensors=["model.fc.weight", "model.norm.weight"]),
    case("mtp-path", (*MTP, ROLLOUTS), ERROR, target=ERNIE),
    case("mtp-path", MTP, target=MIMO),
    case("mtp-path", (*MTP, ROLLOUTS), target=GLM),
    case("mtp-missing", MTP, ERROR, target={**MIMO, "num_nextn_predict_layers": 0}),
    case("mtp-missing", MTP, ERROR, target=MIMO, tensors=["model.layers.0.mlp.up_proj.weight"]),
    case("mtp-missing", MTP, target=MIMO, tensors=["model.mtp_layers.0.input_proj.weight"]),
    case("mtp-missing", (*MTP, ROLLOUTS), target=GLM, tensors=["model.layers.32.eh_proj.weight"]),
    case("capture-layers", EAGLE3, ERROR, draft=reading(0, 15, 31)),
    case("capture-layers", EAGLE3, ERROR, **HEAD, target={**TARGET, "num_hidden_layers": 3}),
    case("capture-layers", EAGLE3, draft=reading(1, 15, 30)),
    case("capture-layers", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "eagle_aux_hidden_state_layer_ids": [2, 15, 31]}),
    case("capture-layers", EAGLE3, draft={**EAGLE3_HEAD, "eagle_aux_hidden_state_layer_ids": [2, 16, 29]}),
    case("capture-layers", EAGLE3, **HEAD),
    case("norm-output", EAGLE3, WARNING, draft={**EAGLE3_HEAD, "norm_output": True}),
    case("norm-output", EAGLE3, **HEAD),
    case("token-map", (*MTP, "--speculative-token-map", "hot.pt"), WARNING, target=MIMO),
    case("token-map", (*MTP, "--speculative-token-map", "hot.pt", ROLLOUTS), target=MIMO),
    case("cpu-backend", (*PLAIN, *ON_CPU), ERROR),
    case("cpu-backend", (*PLAIN, *ON_CPU, "--sglang-attention-backend", "intel_amx")),
    case("cpu-backend", PLAIN),
    case("verify-backend", (*EAGLE3, "--sglang-attention-backend", "torch_native"), ERROR, **HEAD),
    case("verify-backend", (*PLAIN, "--sglang-attention-backend", "torch_native")),
    case("draft-backend", (*EAGLE3, "--speculative-draft-attention-backend", "torch_native"), ERROR, **HEAD),
    case("draft-backend", (*EAGLE3, "--speculative-draft-attention-backend", "triton"), **HEAD),
    case("draft-backend", (*MTP, ROLLOUTS, "--sglang-attention-backend", "wave"), ERROR, target=GLM),
    case("draft-backend", (*EAGLE3, "--sglang-attention-backend", "torch_native"), **HEAD),
    case(
        "tree-page-size",
        (*EAGLE3_TREE, "--sglang-page-size", "64", "--sglang-attention-backend", "flashmla"),
        ERROR,
        **HEAD,
    ),
    case("tree-page-size", (*EAGLE3_TREE, "--sglang-attention-backend", "flashmla"), ERROR, **HEAD),
    case(
        "tree-page-size", (*EAGLE3_TREE, "--sglang-page-size", "64", "--sglang-attention-backend=null"), WARNING, **HEAD
    ),
    case("tree-page-size", (*NGRAM, "--sglang-page-size", "64"), ERROR),
    case("tree-page-size", (*EAGLE3_TREE, "--sglang-page-size", "64"), **HEAD),
    case("tree-page-size", (*EAGLE3, "--sglang-page-size", "64", "--sglang-attention-backend", "flashmla"), **HEAD),
    case("trtllm-chain", (*EAGLE3_TREE, "--sglang-attention-backend", "trtllm_mha"), ERROR, **HEAD),
    case("trtllm-chain", (*EAGLE3, "--sglang-attention-backend", "trtllm_mha"), **HEAD),
    case("dp-attention", (*ALONE, "--sglang-enable-dp-attention"), ERROR, **STANDALONE),
    case("dp-attention", (*EAGLE3, "--sglang-enable-dp-attention"), **HEAD),
    case(
        "flashinfer-graph-padding",
        (*EAGLE3, "--sglang-attention-backend", "flashinfer"),
        ERROR,
        **HEAD,
        version="0.5.2",
    ),
    case("flashinfer-graph-padding", (*EAGLE3, "--sglang-attention-backend", "flashinfer"), WARNING, **HEAD),
    case("flashinfer-graph-padding", (*EAGLE3, "--speculative-draft-attention-backend", "flashinfer"), WARNING, **HEAD),
    case("flashinfer-graph-padding", (*EAGLE3, "--sglang-decode-attention-backend", "flashinfer"), WARNING, **HEAD),
    case("flashinfer-graph-padding", (*EAGLE3, "--sglang-attention-backend", "flashinfer", *DENSE), **HEAD),
    case(
        "flashinfer-graph-padding",
        (*EAGLE3, "--sglang-attention-backend", "flashinfer", "--sglang-cuda-graph-bs", "1", "2", "4", "8"),
        WARNING,
        **HEAD,
    ),
    case(
        "flashinfer-graph-padding",
        (*EAGLE3, "--sglang-attention-backend", "flashinfer", "--sglang-disable-cuda-graph-padding"),
        WARNING,
        **HEAD,
    ),
    case(
        "flashinfer-graph-padding",
        (*EAGLE3, "--sglang-attention-backend", "flashinfer", "--sglang-disable-cuda-graph"),
        **HEAD,
    ),
    case("flashinfer-graph-padding", EAGLE3, **HEAD),
    case("graph-padding-switch", (*EAGLE3, "--sglang-disable-cuda-graph-padding"), WARNING, **HEAD),
    case("graph-padding-switch", (*PLAIN, "--sglang-disable-cuda-graph-padding")),
    case("mask-padding", (*EAGLE3_TREE, *FLASHINFER), ERROR, **HEAD, version="0.5.6.post2"),
    case("mask-padding", (*EAGLE3, *FLASHINFER), ERROR, **HEAD, version="0.5.6.post2"),
    case("mask-padding", (*EAGLE3, "--sglang-attention-backend=null"), WARNING, **HEAD, version="0.5.6.post2"),
    case("mask-padding", (*EAGLE3_TREE, *FLASHINFER), **HEAD, version="0.5.7"),
    case("mask-padding", (*NGRAM, *FLASHINFER), ERROR, version="0.5.13.post1"),
    case("mask-padding", (*NGRAM, *FLASHINFER), version="0.5.14"),
    case("mask-padding", EAGLE3_TREE, **HEAD, version="0.5.5.post3"),
    case("running-requests-unset", (*UNSET, *EAGLE3[len(SERVERS) :]), WARNING, **HEAD),
    case("running-requests-unset", EAGLE3, **HEAD),
    case("running-requests-small", (*EAGLE3, "--sglang-max-running-requests", "8"), WARNING, **HEAD),
    case("running-requests-small", EAGLE3, **HEAD),
    case("memory-fraction", (*UNSET, *EAGLE3[len(SERVERS) :]), WARNING, **HEAD),
    case("memory-fraction", EAGLE3, **HEAD),
    case("memory-fraction", UNSET),
    case("engine-memory", EAGLE3, ERROR, **HEAD, gpu_bytes=(20_000_000_000,)),
    case("engine-memory", EAGLE3, INFO, **HEAD, gpu_bytes=(25_000_000_000,)),
    case("engine-memory", (*EAGLE3, "--gpu-memory-gb", "25"), INFO, **HEAD),
    case("engine-memory", EAGLE3, **HEAD, gpu_bytes=(80_000_000_000,)),
    case("engine-memory", EAGLE3, **HEAD, gpu_bytes=None),
    case("gpu-memory", PLAIN, ERROR, gpu_bytes=(80_000_000_000,)),
    case("gpu-memory", (*PLAIN, "--gpu-memory-gb", "80"), ERROR),
    case("gpu-memory", PLAIN),
    case("gpu-memory", PLAIN, gpu_bytes=(200_000_000_000,)),
    case("gpu-memory", (*PLAIN, "--no-offload-train"), ERROR, gpu_bytes=(200_000_000_000,)),
    case("gpu-memory", (*PLAIN, ROLLOUTS), gpu_bytes=(80_000_000_000,)),
    case("gpu-memory", (*PLAIN, ROLLOUTS), ERROR, gpu_bytes=(20_000_000_000,)),
    case("rejection-sampling", (*EAGLE3, "--speculative-use-rejection-sampling"), ERROR, **HEAD),
    case("rejection-sampling", (*ALONE, "--speculative-use-rejection-sampling"), ERROR, **STANDALONE),
    case("rejection-sampling", (*EAGLE3, "--speculative-use-block-verification"), ERROR, **HEAD),
    case("rejection-sampling", (*EAGLE3, "--speculative-use-rejection-sampling"), **FULL_HEAD),
    case(
        "accept-thresholds",
        (*EAGLE3, "--speculative-accept-threshold-single", "0.5", "--speculative-lossy", ROLLOUTS),
        WARNING,
        **HEAD,
    ),
    case("accept-thresholds", EAGLE3, **HEAD),
    case("min-p", (*EAGLE3, "--rollout-min-p", "0.1"), ERROR, **HEAD),
    case("min-p", (*PLAIN, "--rollout-min-p", "0.1")),
    case("min-p", EAGLE3, **HEAD),
    case(
        "penalties",
        (*EAGLE3, "--sglang-preferred-sampling-params", '{"repetition_penalty": 1.05}'),
        WARNING,
        **HEAD,
    ),
    case("penalties", (*EAGLE3, "--sglang-preferred-sampling-params", '{"repetition_penalty": 1.0}'), **HEAD),
    case("joint-filters", (*EAGLE3, "--rollout-top-k", "40", "--rollout-top-p", "0.9"), WARNING, **HEAD),
    case("joint-filters", (*EAGLE3, "--rollout-top-k", "40"), **HEAD),
    case("joint-filters", (*PLAIN, "--rollout-top-k", "40", "--rollout-top-p", "0.9")),
    case("greedy-verify", (*EAGLE3, "--rollout-num-gpus-per-engine", "0", "--actor-num-gpus", "0"), WARNING, **HEAD),
    case(
        "greedy-verify",
        (*EAGLE3, "--rollout-num-gpus-per-engine", "0", "--rollout-temperature", "0", ROLLOUTS),
        **HEAD,
    ),
    case("greedy-verify", (*NGRAM, "--rollout-num-gpus-per-engine", "0", "--actor-num-gpus", "0", *EXTERNAL)),
    case("greedy-verify", EAGLE3, **HEAD),
    case("reply-corpus", (*NGRAM, "--speculative-history"), ERROR, version="0.5.10"),
    case("reply-corpus", (*NGRAM, "--speculative-history"), version="0.5.11"),
    case("reply-corpus", NGRAM, version="0.5.10"),
    case("ngram-padding", NGRAM, WARNING),
    case("ngram-padding", (*NGRAM, "--rollout-temperature", "0", ROLLOUTS)),
    case("ngram-padding", EAGLE3, **HEAD),
    case("sampling-seed", EAGLE3, INFO, **HEAD, version="0.5.16"),
    case("sampling-seed", EAGLE3, **HEAD, version="0.5.17"),
    case("sampling-seed", EAGLE3, **HEAD),
    case("draft-overwritten", EAGLE3, ERROR, **HEAD, version="0.5.9"),
    case("draft-overwritten", DFLASH, ERROR, **HEAD, version="0.5.9"),
    case("draft-overwritten", DSPARK, ERROR, **HEAD, version="0.5.9"),
    case("draft-overwritten", (*EAGLE3, *DISK), ERROR, **HEAD, version="0.5.17"),
    case("draft-overwritten", (*EAGLE3, *DISK), ERROR, **HEAD, version="0.5.10.post1"),
    case("draft-overwritten", EAGLE3, **HEAD, version="0.5.10.post1"),
    case("draft-overwritten", MTP, target=MIMO, version="0.5.9"),
    case("draft-overwritten", (*EAGLE3, ROLLOUTS), **HEAD, version="0.5.9"),
    case("disk-reduced-vocabulary", (*EAGLE3, *DISK), ERROR, **HEAD),
    case("disk-reduced-vocabulary", (*EAGLE3, *DISK), **FULL_HEAD),
    case("disk-reduced-vocabulary", EAGLE3, **HEAD),
    case("draft-refresh", (*MTP, *BY_GROUP), WARNING, target=MIMO, version="0.5.20"),
    case("draft-refresh", EAGLE3, WARNING, **HEAD, version="0.5.20"),
    case("draft-refresh", EAGLE3, INFO, **HEAD),
    case("draft-refresh", (*EAGLE3, LEARNING), INFO, **HEAD),
    case("draft-refresh", (*EAGLE3, LEARNING), ERROR, **HEAD, version="0.5.20"),
    case("draft-refresh", (*MTP, LEARNING, *BY_GROUP), ERROR, target=MIMO, version="0.5.20"),
    case("draft-refresh", (*MTP, LEARNING), INFO, target=MIMO),
    case("draft-refresh", (*EAGLE3, LEARNING, *DISK), ERROR, **HEAD),
    case("draft-refresh", (*EAGLE3, ROLLOUTS), **HEAD),
    case("draft-refresh", PLAIN),
    case("draft-lost-on-resume", (*EAGLE3, "--no-sglang-enable-draft-weights-cpu-backup"), ERROR, **HEAD),
    case("draft-lost-on-resume", (*DFLASH, "--no-sglang-enable-draft-weights-cpu-backup"), ERROR, **HEAD),
    case("draft-lost-on-resume", (*DSPARK, "--no-sglang-enable-draft-weights-cpu-backup"), ERROR, **HEAD),
    case("draft-lost-on-resume", EAGLE3, ERROR, **HEAD, version="0.5.5"),
    case("draft-lost-on-resume", EAGLE3, WARNING, **HEAD, version="0.5.6"),
    case("draft-lost-on-resume", EAGLE3, INFO, **HEAD),
    case("draft-lost-on-resume", (*EAGLE3, ROLLOUTS), **HEAD),
    case("draft-lost-on-resume", (*EAGLE3, "--no-offload"), **HEAD),
    case("ngram-update", (*NGRAM, *DISK), WARNING),
    case("ngram-update", NGRAM),
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
    case("torch-versions", PLAIN, ERROR, torch="2.9.1+cu128"),
    case("torch-versions", PLAIN, torch=version("torch").partition("+")[0] + "+cu130"),
    case("torch-versions", (*PLAIN, *BY_GROUP), torch="2.9.1"),
    case("torch-versions", (*PLAIN, "--sglang-weight-transport", "distributed"), ERROR, torch="2.9.1"),
    case("auto-shape", EAGLE3[: len(SERVERS) + 2], INFO, **HEAD),
    case("auto-shape", EAGLE3, **HEAD),
    case("chain-tokens", (*EAGLE3, "--speculative-num-draft-tokens", "8"), INFO, **HEAD),
    case("chain-tokens", EAGLE3, **HEAD),
    case("block-size", (*DFLASH, "--speculative-num-draft-tokens", "8"), WARNING, **BLOCKS),
    case("block-size", (*DFLASH, "--speculative-num-draft-tokens", "16"), **BLOCKS),
    case("block-size", DFLASH, **BLOCKS),
    case("block-size", (*DSPARK, "--speculative-num-draft-tokens", "16"), WARNING, **SPARKS),
    case("block-size", (*DSPARK, "--speculative-num-draft-tokens", "17"), **SPARKS),
    case("block-size", (*EAGLE3, "--speculative-num-draft-tokens", "4"), **HEAD),
    case("block-size", (*EMBEDDED_DFLASH, "--speculative-num-draft-tokens", "17"), INFO, **BLOCKS),
    case("block-size", (*EMBEDDED_DFLASH, "--speculative-num-draft-tokens", "8"), **BLOCKS),
    case("draft-refresh", (*DFLASH, LEARNING), ERROR, **BLOCKS),
    case("draft-fit", DFLASH, **BLOCKS),
    case("draft-fit", DSPARK, ERROR, **BLOCKS),
    case("draft-fit", MTP, ERROR, **BLOCKS),
    case("draft-fit", MTP, draft={**TARGET, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}),
    case("adaptive", (*EAGLE3_TREE, "--speculative-adaptive"), WARNING, **HEAD),
    case("adaptive", (*EAGLE3, "--speculative-adaptive"), WARNING, **HEAD, version="0.5.10.post1"),
    case("adaptive", (*EAGLE3, "--speculative-adaptive"), **HEAD),
    case("adaptive-steps", (*EAGLE3, "--speculative-adaptive", *FIVE_STEPS), ERROR, **HEAD, version="0.5.19"),
    case("adaptive-steps", (*EAGLE3, "--speculative-adaptive", *FIVE_STEPS), WARNING, **HEAD, version="0.5.13"),
    case("adaptive-steps", (*EAGLE3, "--speculative-adaptive", *FIVE_STEPS), **HEAD, version="0.5.20"),
    case("adaptive-steps", (*EAGLE3, *FIVE_STEPS), **HEAD),
    case("adaptive-on-cpu", (*EAGLE3, *ON_CPU, "--speculative-adaptive"), ERROR, **HEAD),
    case("adaptive-on-cpu", (*EAGLE3, *ON_CPU, "--speculative-adaptive", "--sglang-disable-cuda-graph"), **HEAD),
    case("adaptive-on-cpu", (*EAGLE3, "--speculative-adaptive"), **HEAD),
    case("speculation-control", EAGLE3, INFO, **HEAD),
    case("speculation-control", (*EAGLE3, "--speculative-adaptive"), INFO, **HEAD),
    case("speculation-control", EAGLE3_TREE, INFO, **HEAD),
    case("speculation-control", (*EAGLE3, "--speculative-adaptive"), INFO, **HEAD, version="0.5.13"),
    case("speculation-control", PLAIN),
    case("metadata-keys", EAGLE3, INFO, **HEAD),
    case("metadata-keys", PLAIN),
    case("acceptance-bar", EAGLE3, WARNING, **HEAD, acceptance=(0.85, 0.5, 0.4)),
    case("acceptance-bar", EAGLE3, WARNING, **HEAD, acceptance=(0.7,)),
    case("acceptance-bar", EAGLE3, INFO, **HEAD, acceptance=(0.9, 0.7, 0.5, 0.1)),
    case("acceptance-bar", EAGLE3_TREE, WARNING, **HEAD, acceptance=(0.85, 0.65, 0.3)),
    case("acceptance-bar", (*EAGLE3, "--speculative-num-steps", "1"), INFO, **HEAD, acceptance=(0.85, 0.1)),
    case("acceptance-bar", NGRAM, WARNING, acceptance=(0.85, 0.5)),
    case("acceptance-bar", EAGLE3, **HEAD),
)
