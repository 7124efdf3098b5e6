"""The shape of a draft network, whatever family its checkpoint belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slime_spec.checkpoints.families import MIMO, MTP_FAMILIES, NEXTN_DRAFT, MtpFamily
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import CheckpointError

DraftFamily = Literal["eagle", "eagle3", "mtp"]

EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
# config.json's architecture -> the family of the draft's decoder block
EAGLE_ARCHITECTURES = {"LlamaForCausalLMEagle": "LlamaForCausalLM", "Qwen2ForCausalLMEagle": "Qwen2ForCausalLM"}
NORM_OUTPUT_CONVENTIONS = ("sglang", "specforge")
DRAFT_PATH = "speculative.draft_model_path"
ANOTHER_DRAFT = "Pass --sglang-speculative-draft-model-path with a draft made for this target."


@dataclass(frozen=True)
class DraftSpec:
    """One draft network: a projection of [token embedding, target features], then ``block.num_layers`` decoder blocks.

    ``block`` has the draft's own sizes (its ``vocab_size`` is the target's). EAGLE-3 has ``draft_vocab_size`` output
    rows and d2t; elsewhere it equals the target's vocabulary. ``capture_layers`` are the target layers (0-based) whose
    outputs an EAGLE-3 draft reads; the others read the state after the target's final norm. ``hidden_first`` says
    that the projection's columns are [hidden; embedding] (MiMo) instead of [embedding; hidden].
    """

    family: DraftFamily
    block: ModelSpec
    target_hidden_size: int
    draft_vocab_size: int
    capture_layers: tuple[int, ...] = ()
    has_own_embedding: bool = False
    has_own_head: bool = False
    hidden_first: bool = False
    fc_bias: bool = False
    fc_norm: bool = False  # an RMSNorm per captured layer before fc
    norm_before_fc: bool = False  # one RMSNorm over all captured layers before fc
    logits_norm: bool = True  # the norm precedes the head
    recurrent_norm: bool = False  # the next step's hidden state is taken after the norm
    zero_first_embedding: bool = False  # the token embedding at position 0 is zero (MiMo)
    in_target: bool = False  # the draft's tensors are part of the target's checkpoint

    @property
    def feature_size(self) -> int:
        """Width of the target features of one token."""
        return max(1, len(self.capture_layers)) * self.target_hidden_size

    @classmethod
    def from_folder(cls, folder: str | Path, target: ModelSpec, norm_output_convention: str = "sglang") -> DraftSpec:
        """Read ``folder/config.json``; raises CheckpointError for what cannot draft for ``target``."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                DRAFT_PATH, "must be a checkpoint folder with a config.json", str(folder), ANOTHER_DRAFT
            )
        return cls.from_dict(json.loads(path.read_text()), target, norm_output_convention, str(path))

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        target: ModelSpec,
        norm_output_convention: str = "sglang",
        source: str = "config.json",
    ) -> DraftSpec:
        """The draft that ``config`` describes; ``norm_output_convention`` is what EAGLE-3's ``norm_output`` means."""
        architecture = (config.get("architectures") or ["?"])[0]
        if architecture == EAGLE3_ARCHITECTURE:
            spec = _eagle3(config, target, norm_output_convention, source)
        elif architecture in EAGLE_ARCHITECTURES:
            spec = _eagle(config, target, source)
        elif architecture in MTP_FAMILIES:
            spec = _mtp(config, target, architecture, source)
        else:
            known = (EAGLE3_ARCHITECTURE, *EAGLE_ARCHITECTURES, *MTP_FAMILIES)
            raise CheckpointError(
                f"{source}: architectures",
                f"must name a draft: {', '.join(known)}",
                architecture,
                "Correct the config.json if it is such a draft, or use STANDALONE for a whole model.",
            )
        _check_against_target(spec, target, source)
        return spec


def default_capture_layers(num_target_layers: int) -> tuple[int, ...]:
    """SGLang's and EAGLE's default: the inputs of layers 2, n // 2 and n - 3, named here as outputs of those before."""
    return tuple(layer - 1 for layer in (2, num_target_layers // 2, num_target_layers - 3))


def mtp_family(architecture: str) -> MtpFamily:
    """The names of the MTP layer that goes with a supported ``DraftSpec.block.architecture``."""
    return MTP_FAMILIES.get(architecture, MIMO)


def mtp_prefix(family: MtpFamily, num_target_layers: int) -> str:
    return family.prefix.format(layers=num_target_layers)


def draft_config(spec: DraftSpec) -> dict[str, Any]:
    """The config.json of ``spec``, as SpecForge and SGLang read it (MTP: this project's own NextN format)."""
    block = spec.block
    architecture = {"eagle3": EAGLE3_ARCHITECTURE, "eagle": "LlamaForCausalLMEagle", "mtp": NEXTN_DRAFT}[spec.family]
    if spec.family == "eagle" and block.qkv_bias:
        architecture = "Qwen2ForCausalLMEagle"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen2" if block.qkv_bias else "llama",
        "hidden_size": block.hidden_size,
        "intermediate_size": block.intermediate_size,
        "num_hidden_layers": block.num_layers,
        "num_attention_heads": block.num_heads,
        "num_key_value_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": "silu",
        "vocab_size": block.vocab_size,
        "max_position_embeddings": block.max_position_embeddings,
        "rms_norm_eps": block.rms_norm_eps,
        "rope_theta": block.rope_theta,
        "tie_word_embeddings": False,
    }
    if block.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **vars(block.rope_scaling)}
    if spec.family == "mtp":
        return {**config, "num_nextn_predict_layers": 1}
    config["bias"] = spec.fc_bias
    if spec.family == "eagle":
        return config
    if spec.has_own_head:
        config["draft_vocab_size"] = spec.draft_vocab_size
    config["target_hidden_size"] = spec.target_hidden_size
    config["num_aux_hidden_states"] = len(spec.capture_layers)
    config["eagle_config"] = {
        "eagle_aux_hidden_state_layer_ids": list(spec.capture_layers),
        "use_aux_hidden_state": True,
        "norm_before_fc": spec.norm_before_fc,
    }
    config["fc_norm"] = spec.fc_norm
    # Absent, the key means logits after the norm and a recurrence before it in both conventions; present, it means
    # the recurrence to SGLang and the logits to SpecForge.
    if (spec.logits_norm, spec.recurrent_norm) != (True, False):
        config["norm_output"] = spec.recurrent_norm
    return config


def _eagle3(config: Mapping[str, Any], target: ModelSpec, convention: str, source: str) -> DraftSpec:
    assert convention in NORM_OUTPUT_CONVENTIONS, convention
    block = _block(config, "LlamaForCausalLM", source)
    eagle = config.get("eagle_config") or {}
    if eagle.get("use_aux_hidden_state") is False:
        raise CheckpointError(
            f"{source}: eagle_config.use_aux_hidden_state",
            "must be true: drafts that read the final hidden state alone are not supported",
            False,
            ANOTHER_DRAFT,
        )
    draft_vocab = config.get("draft_vocab_size")
    tied = bool(config.get("tie_word_embeddings")) and draft_vocab in (None, block.vocab_size)
    if tied and not target.tie_word_embeddings:
        raise CheckpointError(
            f"{source}: tie_word_embeddings",
            "must be false: the draft shares the target's embedding, which is not the target's head",
            True,
            "Set it to false and keep lm_head.weight in the draft, or leave draft_vocab_size out.",
        )
    norm_output = config.get("norm_output")
    return DraftSpec(
        family="eagle3",
        block=block,
        target_hidden_size=config.get("target_hidden_size") or block.hidden_size,
        draft_vocab_size=draft_vocab or block.vocab_size,
        capture_layers=_capture_layers(config, eagle, target, source),
        has_own_embedding=(config.get("target_hidden_size") or block.hidden_size) != block.hidden_size,
        has_own_head=draft_vocab is not None and not tied,
        fc_bias=bool(config.get("bias", False)),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        logits_norm=True if convention == "sglang" or norm_output is None else bool(norm_output),
        recurrent_norm=bool(norm_output) if convention == "sglang" else False,
    )


def _capture_layers(
    config: Mapping[str, Any], eagle: Mapping[str, Any], target: ModelSpec, source: str
) -> tuple[int, ...]:
    named = eagle.get("eagle_aux_hidden_state_layer_ids")
    # The target hands its layers out from the lowest up, in whatever order a config lists them.
    layers = tuple(sorted(named)) if named else default_capture_layers(target.num_layers)
    setting = f"{source}: eagle_config.eagle_aux_hidden_state_layer_ids"
    if min(layers) < 0 or max(layers) >= target.num_layers or len(set(layers)) < len(layers):
        raise CheckpointError(
            setting,
            f"must be different layers of the target, 0 to {target.num_layers - 1}"
            + ("" if named else ", and by default they are the layers before 2, n // 2 and n - 3"),
            list(layers),
            "Name the layers the draft was trained on, or choose a draft made for this target.",
        )
    count = config.get("num_aux_hidden_states")
    if count is not None and count != len(layers):
        raise CheckpointError(
            f"{source}: num_aux_hidden_states",
            f"must be the number of captured layers ({len(layers)}: {', '.join(map(str, layers))})",
            count,
            "Name the layers in eagle_config.eagle_aux_hidden_state_layer_ids.",
        )
    return layers


def _eagle(config: Mapping[str, Any], target: ModelSpec, source: str) -> DraftSpec:
    block = _block(config, EAGLE_ARCHITECTURES[config["architectures"][0]], source)
    return DraftSpec(
        family="eagle",
        block=block,
        target_hidden_size=block.hidden_size,
        draft_vocab_size=block.vocab_size,
        fc_bias=bool(config.get("bias", True)),
        logits_norm=False,
    )


def _mtp(config: Mapping[str, Any], target: ModelSpec, architecture: str, source: str) -> DraftSpec:
    family = MTP_FAMILIES[architecture]
    if family.refused:
        raise CheckpointError(f"{source}: architectures", family.refused, architecture, ANOTHER_DRAFT)
    if not config.get("num_nextn_predict_layers"):
        raise CheckpointError(
            f"{source}: num_nextn_predict_layers",
            "must be at least 1: this checkpoint has no MTP layer",
            config.get("num_nextn_predict_layers"),
            ANOTHER_DRAFT,
        )
    in_target = architecture != NEXTN_DRAFT
    kind = architecture if in_target else "LlamaForCausalLM"
    block = _block({**config, "num_hidden_layers": 1}, kind, source)
    return DraftSpec(
        family="mtp",
        block=block,
        target_hidden_size=block.hidden_size,
        draft_vocab_size=block.vocab_size,
        hidden_first=family.hidden_first,
        recurrent_norm=True,
        zero_first_embedding=family.zero_first_embedding,
        in_target=in_target,
    )


def _block(config: Mapping[str, Any], architecture: str, source: str) -> ModelSpec:
    """The draft's decoder block; a draft without rope_theta rotates by 10000, whatever its target does."""
    return ModelSpec.from_dict({**config, "architectures": [architecture], "tie_word_embeddings": False}, source)


def _check_against_target(spec: DraftSpec, target: ModelSpec, source: str) -> None:
    if spec.block.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{source}: vocab_size", f"must be the target's ({target.vocab_size})", spec.block.vocab_size, ANOTHER_DRAFT
        )
    if spec.target_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{source}: target_hidden_size" if spec.family == "eagle3" else f"{source}: hidden_size",
            f"must be the target's hidden_size ({target.hidden_size})",
            spec.target_hidden_size,
            ANOTHER_DRAFT,
        )
    if not 0 < spec.draft_vocab_size <= target.vocab_size:
        raise CheckpointError(
            f"{source}: draft_vocab_size",
            f"must be from 1 to {target.vocab_size}",
            spec.draft_vocab_size,
            ANOTHER_DRAFT,
        )
    if not spec.has_own_head and spec.block.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{source}: draft_vocab_size",
            f"must be given: the target's head reads {target.hidden_size} columns and the draft has "
            f"{spec.block.hidden_size}, so that it needs a head of its own",
            None,
            ANOTHER_DRAFT,
        )
