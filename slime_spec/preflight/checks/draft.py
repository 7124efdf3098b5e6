"""These checks test that the draft is complete and was trained for this target: a wrong draft is never accepted."""

from __future__ import annotations

from slime_spec.algorithms import LOOKUP, NGRAM, STANDALONE, Algorithm, algorithm_of_family
from slime_spec.checkpoints.families import FORMAT_OF, family_of, head_format
from slime_spec.checkpoints.families.eagle3 import CAPTURED, EAGLE3, default_capture_layers, named_layers, reads_layers
from slime_spec.config.speculation import feeds_corpus
from slime_spec.preflight.checks.distribution import has_reduced_vocabulary
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, asking_sglang_to_speculate, speculating, trap
from slime_spec.sglang.releases import since

DRAFT_FLAG = "--sglang-speculative-draft-model-path"


@trap(
    "mtp-path",
    "SGLang takes the target's own MTP layer for the draft only for the architectures on its list (DeepSeek, GLM and "
    "a few more). MiMo, Qwen3-Next and others are not on it: without the path the server does not start.",
    "https://docs.sglang.ai/advanced_features/speculative_decoding.html",
)
def mtp_path(facts: Facts) -> Sighting | None:
    if facts.draft_kind != "in_target" or facts.flags.get("speculative_draft_model_path"):
        return None
    if family_of(facts.target.architecture).sglang_finds_mtp:
        return None
    return Sighting(
        Severity.ERROR,
        f"{facts.target.architecture} drafts with its own MTP layer and the servers are given no draft path",
        f"Pass {DRAFT_FLAG} with the target's folder.",
        (DRAFT_FLAG, facts.target.folder),
    )


@trap(
    "mtp-missing",
    "An MTP layer that is not in the checkpoint starts with random weights: it drafts, nothing is accepted, and "
    "every round costs more than plain decoding.",
    "27908",
    "24795",
    applies=speculating,
)
def mtp_missing(facts: Facts) -> Sighting | None:
    if facts.draft_kind != "in_target":
        return None
    target = facts.target
    if target.num_mtp_layers == 0:
        read = f"{target.architecture} drafts with its own MTP layer, and its config.json counts none"
    elif target.tensors is not None and (layer := family_of(target.architecture).mtp) is not None:
        prefix = layer.prefix_in(target.config.get("num_hidden_layers"))
        if any(name.startswith(prefix) for name in target.tensors):
            return None
        read = f"no tensor of the target's checkpoint begins with {prefix}"
    else:
        return None
    return Sighting(
        Severity.ERROR,
        read,
        f"Pass a checkpoint that kept its MTP layer, {DRAFT_FLAG} with a draft of its own, or {LOOKUP.name} or "
        f"{NGRAM.name}.",
    )


@trap(
    "mtp-layers",
    "SGLang's servers of these families have one MTP layer: DeepSeek's and GLM's end while they load a checkpoint with "
    "more, MiMo's puts all of them into one layer, where the last that is read stays.",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/models/mimo_mtp.py",
)
def mtp_layers(facts: Facts) -> Sighting | None:
    target = facts.target
    is_known = family_of(target.architecture).mtp is not None
    if facts.draft_kind != "in_target" or not is_known or target.num_mtp_layers < 2:
        return None
    return Sighting(
        Severity.ERROR,
        f"{target.architecture} drafts with its own MTP layer, and its checkpoint has {target.num_mtp_layers}",
        "Keep the first layer alone in the checkpoint and set num_nextn_predict_layers to 1, or draft with a head.",
    )


@trap(
    "draft-fit",
    "A draft reads one target's hidden states and writes its vocabulary; for another the server ends while loading, "
    "or worse, drafts noise.",
    "27829",
    "https://github.com/THUDM/slime/issues/1177",
    applies=speculating,
)
def draft_fit(facts: Facts) -> Sighting | None:
    draft, target = facts.draft, facts.target
    if draft is None or draft is target:
        return None
    differences = []
    # Models of one family pad their embedding differently, which the embedded engine accepts and SGLang does not.
    may_pad = facts.draft_kind == "whole" and not facts.on_sglang
    if draft.vocab_size != target.vocab_size and not may_pad:
        differences.append(f"vocab_size is {draft.vocab_size}, the target's {target.vocab_size}")
    if facts.draft_kind == "head":
        size = draft.config.get("target_hidden_size") or draft.config.get("hidden_size")
        if size != target.config.get("hidden_size"):
            differences.append(f"it reads {size} hidden features, the target has {target.config.get('hidden_size')}")
        chosen = facts.config.speculative.record
        made_for = _made_for(draft.architecture) or chosen
        if not {*made_for.families} & {*chosen.families}:
            differences.append(f"it is a {draft.architecture}, for {made_for.name}")
    if not differences:
        return None
    return Sighting(
        Severity.ERROR, f"the draft in {draft.folder}: {'; '.join(differences)}", f"Pass {DRAFT_FLAG} for this target."
    )


def _made_for(architecture: str) -> Algorithm | None:
    """Return the algorithm that a draft is made for; a head with a plain decoder's architecture was not converted."""
    draft_format = head_format(architecture) or FORMAT_OF.get(architecture)  # or another target's own MTP layer
    if draft_format is not None:
        return algorithm_of_family(draft_format.family)
    return STANDALONE if family_of(architecture).is_built else None


@trap(
    "draft-tensors",
    "SGLang skips names it does not know and starts what is missing at random: a draft without its head or its token "
    "table has an accept length of exactly 1.00.",
    "27908",
    "27829",
    applies=speculating,
)
def draft_tensors(facts: Facts) -> Sighting | None:
    draft = facts.draft
    if draft is None or draft.tensors is None or draft.architecture not in EAGLE3.blocks:
        return None
    wanted = ["fc.weight", "norm.weight"] if reads_layers(draft.config) else ["norm.weight"]
    if draft.config.get("draft_vocab_size") is not None:
        wanted.append("lm_head.weight")
    if has_reduced_vocabulary(facts):
        wanted.append("d2t")
    stored = {name.removeprefix("model.") for name in draft.tensors}
    missing = [name for name in wanted if name not in stored]
    if not missing:
        return None
    return Sighting(
        Severity.ERROR,
        f"the draft in {draft.folder} lacks {', '.join(missing)}",
        f"Export the draft again with all its tensors, or pass {DRAFT_FLAG} with another.",
    )


@trap(
    "capture-layers",
    "An EAGLE-3 draft reads outputs of target layers, which SGLang takes at the input of the next layer: the last "
    "layer has none, so its features are left out silently, and the first draft pass ends the server.",
    "https://github.com/sgl-project/SpecForge",
)
def capture_layers(facts: Facts) -> Sighting | None:
    draft, num_layers = facts.draft, facts.target.config.get("num_hidden_layers")
    if draft is None or draft.architecture not in EAGLE3.blocks or num_layers is None:
        return None
    if not reads_layers(draft.config):
        return None
    named = named_layers(draft.config)
    layers = tuple(named or default_capture_layers(num_layers))
    nested = (draft.config.get("eagle_config") or {}).get(CAPTURED)
    if facts.on_sglang and not nested and layers != default_capture_layers(num_layers):
        return Sighting(
            Severity.ERROR,
            f"{draft.folder}/config.json names its layers for vLLM alone, and SGLang takes its default",
            f'Add "eagle_config": {{"{CAPTURED}": {list(layers)}}} there.',
        )
    if min(layers) >= 0 and max(layers) < num_layers - 1 and len(set(layers)) == len(layers):
        return None
    return Sighting(
        Severity.ERROR,
        f"the draft reads layers {', '.join(map(str, layers))} ({'named' if named else 'the default'}) of a target "
        f"with {num_layers}",
        f"Pass a draft that reads different layers between 0 and {num_layers - 2}, or --rollout-engine embedded.",
    )


@trap(
    "norm-output",
    "norm_output means two things: in SpecForge, where drafts are trained, only that a norm precedes the head; in "
    "SGLang that the next step starts after that norm. A draft trained by the one and served by the other draws its "
    "second and later tokens from the wrong state.",
    "https://github.com/sgl-project/SpecForge",
)
def norm_output(facts: Facts) -> Sighting | None:
    if facts.draft is None or facts.draft_kind != "head" or not facts.draft.config.get("norm_output"):
        return None
    return Sighting(
        Severity.WARNING,
        f"{facts.draft.folder}/config.json has norm_output true",
        "Compare acceptance at the second position with the first; if it falls away, set norm_output to false there.",
    )


@trap(
    "token-map",
    "A token map cuts a copy out of the target's head when the server starts. Each push changes the head and not the "
    "copy, so the draft's head grows stale.",
    "https://docs.sglang.ai/advanced_features/speculative_decoding.html",
)
def token_map(facts: Facts) -> Sighting | None:
    spec = facts.config.speculative
    if spec.token_map is None or spec.record.has_own_head or not facts.trains_with_pushes:
        return None
    return Sighting(
        Severity.WARNING,
        "--speculative-token-map while the target is trained",
        "Drop --speculative-token-map, or watch rollout/spec_accept_length and restart the servers when it falls.",
    )


@trap(
    "reply-corpus",
    "An n-gram server takes finished replies as an external corpus, by calls that releases before 0.5.11 do not have: "
    "there it drafts only from what its own requests said lately.",
    "22203",
    applies=asking_sglang_to_speculate,
)
def reply_corpus(facts: Facts) -> Sighting | None:
    if not feeds_corpus(facts.config) or facts.release.does("takes_corpora"):
        return None
    return Sighting(
        Severity.ERROR,
        f"--speculative-history with SGLang {facts.release.text}",
        f"Use SGLang {since('takes_corpora')} or newer, or drop --speculative-history.",
        ("--no-speculative-history",),
    )
