"""Every trap is seen where it is, is silent where it is not, and its fix mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from slime_spec.launch.doctor.checks import TRAPS
from slime_spec.launch.doctor.facts import DENSE_GRAPH_SIZES
from slime_spec.launch.doctor.finding import Severity
from slime_spec.launch.doctor.preflight import examine
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, MIMO, SERVERS, TARGET, TREE, make_facts

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
EAGLE3 = (*SERVERS, "--speculative-algorithm", "EAGLE3", *CHAIN)
EAGLE3_TREE = (*SERVERS, "--speculative-algorithm", "EAGLE3", *TREE)
MTP = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN)
NGRAM = (*SERVERS, "--speculative-algorithm", "NGRAM")
PLAIN = SERVERS
ROLLOUTS = "--debug-rollout-only"
HEAD: dict[str, Any] = {"draft": EAGLE3_HEAD}
FP16_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "torch_dtype": "float16"}}
SHORT_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "max_position_embeddings": 2048}}
FULL_HEAD: dict[str, Any] = {"draft": {**EAGLE3_HEAD, "draft_vocab_size": None}}
GLM = {**TARGET, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 160, "num_nextn_predict_layers": 1}
STANDALONE: dict[str, Any] = {"draft": {**TARGET, "hidden_size": 576}}
ALONE = (*SERVERS, "--speculative-algorithm", "STANDALONE", *CHAIN)
UNSET = SERVERS[:6]  # the engine, no flag of its own
DENSE = ("--sglang-cuda-graph-bs", *map(str, DENSE_GRAPH_SIZES))
ALLOWED = {"environ": {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}}
DISK = ("--sglang-weight-transport", "disk")


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
    case("trainer-architecture", MTP, ERROR, target=GLM),
    case("trainer-architecture", (*MTP, ROLLOUTS), INFO, target=GLM),
    case("trainer-architecture", MTP, target=MIMO),
    case("engine-architecture", (ROLLOUTS,), ERROR, target=GLM),
    case("engine-architecture", (*MTP, ROLLOUTS), target=GLM),
    case("sglang-version", PLAIN, ERROR, is_installed=False),
    case("sglang-version", (*PLAIN, "--rollout-external-engine-addrs", "10.0.0.1:30000"), is_installed=False),
    case("sglang-version", PLAIN),
    case("model-type", EAGLE3, ERROR, draft={**EAGLE3_HEAD, "model_type": None}),
    case("model-type", EAGLE3, **HEAD),
    case("remote-code", PLAIN, ERROR, target={**TARGET, "model_type": "mimo", "auto_map": {"AutoConfig": "code.C"}}),
    case("remote-code", PLAIN, target={**TARGET, "model_type": "deepseek_v3", "auto_map": {"AutoConfig": "code.C"}}),
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
    case("draft-context", EAGLE3, ERROR, **SHORT_HEAD, **ALLOWED, version="0.5.3"),
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
    case("draft-fit", EAGLE3, draft={**EAGLE3_HEAD, "hidden_size": 2048, "target_hidden_size": 4096}),
    case("draft-tensors", EAGLE3, ERROR, **HEAD, tensors=["fc.weight", "norm.weight", "d2t"]),
    case("draft-tensors", EAGLE3, ERROR, **HEAD, tensors=["fc.weight", "norm.weight", "lm_head.weight"]),
    case("draft-tensors", EAGLE3, **HEAD, tensors=["fc.weight", "norm.weight", "lm_head.weight", "d2t"]),
    case("draft-tensors", EAGLE3, **FULL_HEAD, tensors=["fc.weight", "norm.weight"]),
    case("mtp-path", MTP, ERROR, target=MIMO, without_flags=["speculative_draft_model_path"]),
    case("mtp-path", MTP, target=MIMO),
    case("mtp-path", (*MTP, ROLLOUTS), target=GLM, without_flags=["speculative_draft_model_path"]),
    case("mtp-missing", MTP, ERROR, target={**MIMO, "num_nextn_predict_layers": 0}),
    case("mtp-missing", MTP, ERROR, target=MIMO, tensors=["model.layers.0.mlp.up_proj.weight"]),
    case("mtp-missing", MTP, target=MIMO, tensors=["model.mtp_layers.0.input_proj.weight"]),
    case("mtp-missing", (*MTP, ROLLOUTS), target=GLM, tensors=["model.layers.32.eh_proj.weight"]),
    case("capture-layers", EAGLE3, ERROR, draft=reading(0, 15, 31)),
    case("capture-layers", EAGLE3, ERROR, **HEAD, target={**TARGET, "num_hidden_layers": 3}),
    case("capture-layers", EAGLE3, draft=reading(1, 15, 30)),
    case("capture-layers", EAGLE3, **HEAD),
    case("norm-output", EAGLE3, WARNING, draft={**EAGLE3_HEAD, "norm_output": True}),
    case("norm-output", EAGLE3, **HEAD),
    case("token-map", (*MTP, "--speculative-token-map", "hot.pt"), WARNING, target=MIMO),
    case("token-map", (*MTP, "--speculative-token-map", "hot.pt", ROLLOUTS), target=MIMO),
    case("verify-backend", (*EAGLE3, "--sglang-attention-backend", "torch_native"), ERROR, **HEAD),
    case("verify-backend", (*PLAIN, "--sglang-attention-backend", "torch_native")),
    case("draft-backend", (*EAGLE3, "--speculative-draft-attention-backend", "torch_native"), ERROR, **HEAD),
    case("draft-backend", (*EAGLE3, "--speculative-draft-attention-backend", "triton"), **HEAD),
    case(
        "tree-page-size",
        (*EAGLE3_TREE, "--sglang-page-size", "64", "--sglang-attention-backend", "flashmla"),
        ERROR,
        **HEAD,
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
        version="0.5.5",
    ),
    case("flashinfer-graph-padding", (*EAGLE3, "--sglang-attention-backend", "flashinfer"), WARNING, **HEAD),
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
    case(
        "tree-mask-padding",
        (*EAGLE3_TREE, "--sglang-attention-backend", "flashinfer"),
        ERROR,
        **HEAD,
        version="0.5.5.post3",
    ),
    case("tree-mask-padding", (*EAGLE3_TREE, "--sglang-attention-backend", "flashinfer"), **HEAD),
    case("tree-mask-padding", EAGLE3_TREE, **HEAD, version="0.5.5.post3"),
    case("running-requests-unset", (*UNSET, *EAGLE3[len(SERVERS) :]), WARNING, **HEAD),
    case("running-requests-unset", EAGLE3, **HEAD),
    case("running-requests-small", (*EAGLE3, "--sglang-max-running-requests", "8"), WARNING, **HEAD),
    case("running-requests-small", EAGLE3, **HEAD),
    case("memory-fraction", (*UNSET, *EAGLE3[len(SERVERS) :]), WARNING, **HEAD),
    case("memory-fraction", EAGLE3, **HEAD),
    case("memory-fraction", UNSET),
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
    case("greedy-verify", EAGLE3, **HEAD),
    case("ngram-padding", NGRAM, WARNING),
    case("ngram-padding", (*NGRAM, "--rollout-temperature", "0", ROLLOUTS)),
    case("ngram-padding", EAGLE3, **HEAD),
    case("sampling-seed", EAGLE3, INFO, **HEAD, version="0.5.15.post1"),
    case("sampling-seed", EAGLE3, **HEAD),
    case("draft-overwritten", EAGLE3, ERROR, **HEAD, version="0.5.9"),
    case("draft-overwritten", (*EAGLE3, *DISK), ERROR, **HEAD, version="0.5.17"),
    case("draft-overwritten", EAGLE3, **HEAD, version="0.5.10.post1"),
    case("draft-overwritten", MTP, target=MIMO, version="0.5.9"),
    case("draft-overwritten", (*EAGLE3, ROLLOUTS), **HEAD, version="0.5.9"),
    case("disk-reduced-vocabulary", (*EAGLE3, *DISK), ERROR, **HEAD),
    case("disk-reduced-vocabulary", (*EAGLE3, *DISK), **FULL_HEAD),
    case("disk-reduced-vocabulary", EAGLE3, **HEAD),
    case("draft-refresh", (*MTP, "--sglang-weight-transport", "distributed"), WARNING, target=MIMO, version="0.5.20"),
    case("draft-refresh", EAGLE3, WARNING, **HEAD, version="0.5.20"),
    case("draft-refresh", EAGLE3, INFO, **HEAD),
    case("draft-refresh", (*EAGLE3, ROLLOUTS), **HEAD),
    case("draft-refresh", PLAIN),
    case("draft-lost-on-resume", (*EAGLE3, "--no-sglang-enable-draft-weights-cpu-backup"), ERROR, **HEAD),
    case("draft-lost-on-resume", EAGLE3, **HEAD),
    case("draft-lost-on-resume", (*EAGLE3, "--no-offload"), **HEAD),
    case("ngram-update", (*NGRAM, *DISK), WARNING),
    case("ngram-update", NGRAM),
    case("torch-versions", PLAIN, ERROR, torch="2.9.1+cu128"),
    case("torch-versions", PLAIN, torch=version("torch").partition("+")[0] + "+cu130"),
    case("torch-versions", (*PLAIN, "--sglang-weight-transport", "distributed"), torch="2.9.1"),
    case("auto-shape", EAGLE3[: len(SERVERS) + 2], INFO, **HEAD),
    case("auto-shape", EAGLE3, **HEAD),
    case("chain-tokens", (*EAGLE3, "--speculative-num-draft-tokens", "8"), INFO, **HEAD),
    case("chain-tokens", EAGLE3, **HEAD),
    case("adaptive", (*EAGLE3_TREE, "--speculative-adaptive"), WARNING, **HEAD),
    case("adaptive", (*EAGLE3, "--speculative-adaptive"), WARNING, **HEAD, version="0.5.10.post1"),
    case("adaptive", (*EAGLE3, "--speculative-adaptive"), **HEAD),
    case("metadata-keys", EAGLE3, INFO, **HEAD),
    case("metadata-keys", PLAIN),
    case("acceptance-bar", EAGLE3, WARNING, **HEAD, acceptance=(0.85, 0.5, 0.4)),
    case("acceptance-bar", EAGLE3, WARNING, **HEAD, acceptance=(0.7,)),
    case("acceptance-bar", EAGLE3, INFO, **HEAD, acceptance=(0.9, 0.7, 0.5, 0.1)),
    case("acceptance-bar", EAGLE3, **HEAD),
)
# What is mended by another file, version or machine; or whose flag changes a number the check goes on reporting.
NOT_MENDED_BY_FLAGS = {"acceptance-bar", "mtp-path"}


def named(each: Case) -> str:
    return f"{each.trap}-{each.sees or 'silent'}"


@pytest.mark.parametrize("each", CASES, ids=named)
def test_a_trap_is_seen_where_it_is_and_only_there(each: Case, tmp_path: Path) -> None:
    (trap,) = (trap for trap in TRAPS if trap.id == each.trap)
    finding = trap(make_facts(tmp_path, each.argv, **each.facts))
    assert (finding.severity if finding else None) == each.sees
    if finding is not None and finding.fix and each.trap not in NOT_MENDED_BY_FLAGS:
        mended = trap(make_facts(tmp_path, (*each.argv, *finding.fix), **each.facts))
        assert mended is None or mended.severity is INFO, f"{finding.fix} leaves {mended}"


def test_every_trap_has_a_case_that_sees_it_and_one_that_does_not() -> None:
    assert {each.trap for each in CASES if each.sees} == {trap.id for trap in TRAPS}
    assert {each.trap for each in CASES if each.sees is None} == {trap.id for trap in TRAPS}
    assert len({trap.id for trap in TRAPS}) == len(TRAPS)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.id)
def test_every_trap_says_why_it_matters_and_links_to_it(trap) -> None:
    assert trap.why.endswith(".")
    assert trap.links
    assert all(link.startswith("https://") for link in trap.links)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [(EAGLE3, HEAD), (EAGLE3_TREE, HEAD), (MTP, {"target": MIMO}), (PLAIN, {}), (("--num-rollout", "1"), {})],
    ids=["eagle3", "tree", "mtp", "plain", "embedded"],
)
def test_a_sound_configuration_has_nothing_worse_than_information(
    argv: tuple[str, ...], facts: dict[str, Any], tmp_path: Path
) -> None:
    found = examine(make_facts(tmp_path, argv, **facts))
    assert [each.id for each in found if each.severity is not INFO] == []


def test_the_remedy_for_flashinfer_names_the_wider_sizes_and_that_disabling_padding_does_not_help(
    tmp_path: Path,
) -> None:
    argv = (*EAGLE3, "--sglang-attention-backend", "flashinfer", "--sglang-disable-cuda-graph-padding")
    found = {each.id: each for each in examine(make_facts(tmp_path, argv, **HEAD))}
    assert "$(seq 1 32) $(seq 40 8 64) $(seq 80 16 160)" in found["flashinfer-graph-padding"].remedy
    assert "does not help" in found["graph-padding-switch"].why
    assert any(link.endswith("/9888") for link in found["flashinfer-graph-padding"].links)


def test_one_below_the_bar_keeps_the_positions_above_it(tmp_path: Path) -> None:
    facts = make_facts(tmp_path, EAGLE3, **HEAD, acceptance=(0.85, 0.65, 0.3))
    (found,) = (each for each in examine(facts) if each.id == "acceptance-bar")
    assert found.fix[:2] == ("--speculative-num-steps", "2")
    assert "85%, 65%, 30%" in found.read
