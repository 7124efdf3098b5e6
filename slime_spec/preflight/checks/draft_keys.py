"""These checks say which keys and names of a draft SGLang does not read: it serves such a draft, and computes another.

Read in 0.5.21 and 0.5.23: models/llama_eagle3.py, llama_eagle.py, qwen2_eagle.py, dspark.py, eagle_worker_v2.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slime_spec.checkpoints.draft_keys import unknown_keys
from slime_spec.checkpoints.draft_writers import CONVERT
from slime_spec.checkpoints.families.dflash import FROM_ROOT, NESTED
from slime_spec.checkpoints.families.draft_format import DraftFamily
from slime_spec.checkpoints.families.dspark import KIND, OWN, RANK, VANILLA
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, speculating, trap

COMPUTED = "Pass --rollout-engine embedded, which computes it, or choose a draft without it."
RETRAIN = "Choose a draft without it."
# Of an EAGLE-3 draft's config.json: the key, and the value with which the draft is what SGLang computes.
NOT_READ: Mapping[str, Any] = {
    "norm_before_residual": False,
    "attention_bias": False,
    "eagle_config.use_input_layernorm_in_first_layer": True,
    "eagle_config.use_last_layernorm": True,
    "eagle_config.use_mtp_layernorm": False,
    "eagle_config.parallel_draft_step": 1,
}
WINDOW = "--speculative-draft-window-size"


@trap(
    "draft-layout",
    "Writers name and nest a draft's config.json in ways of their own. SGLang knows its own names: under another the "
    "server does not start, or loads a whole model of that name with most of its weights at random.",
    "https://github.com/Tencent/AngelSlim",
    "https://github.com/vllm-project/speculators",
)
def draft_layout(facts: Facts) -> Sighting | None:
    draft = facts.draft
    if draft is None or not draft.named_by_its_writer:
        return None
    return Sighting(
        Severity.ERROR,
        f"{draft.folder}/config.json names {draft.named_by_its_writer}, and the draft is a {draft.architecture}",
        f"Write it for SGLang: {CONVERT} --draft {draft.folder} --target {facts.target.folder} --out NEW",
    )


@trap(
    "draft-keys",
    "SGLang ignores keys of a draft's config.json that it does not know, and tensors without a place in its own "
    "module. The draft then computes something else than it was trained for: the output stays the target's "
    "distribution, and few drafts stand.",
    "https://github.com/vllm-project/speculators",
    "https://github.com/NVIDIA/TensorRT-Model-Optimizer",
    "https://github.com/sgl-project/SpecForge",
)
def draft_keys(facts: Facts) -> Sighting | None:
    draft, draft_format = facts.draft, facts.draft_format
    if draft is None or draft is facts.target or draft_format is None:
        return None
    ignored = list(_ignored(draft_format.family, draft.config, facts.flags))
    if not ignored:
        return None
    read = f"{draft.folder}/config.json: SGLang does not read {'; '.join(what for what, _ in ignored)}"
    remedies = dict.fromkeys(remedy for _, remedy in ignored)
    return Sighting(Severity.ERROR, read, " ".join(remedies))


def _ignored(family: DraftFamily, config: Mapping[str, Any], flags: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each thing that SGLang does not read, with the remedy."""
    if family == "eagle3":
        for key, computed in NOT_READ.items():
            outer, _, inner = key.partition(".")
            value = (config.get(outer) or {}).get(inner) if inner else config.get(outer)
            if value is not None and value != computed:
                yield f"{key} {_shown(value)}", RETRAIN if inner else COMPUTED
        if config.get("tie_word_embeddings") and config.get("draft_vocab_size") not in (None, config.get("vocab_size")):
            untie = 'Set "tie_word_embeddings" to false there: tied, the head is the embedding of all tokens.'
            yield "lm_head.weight beside tie_word_embeddings true", untie
    if family in ("eagle3", "eagle") and (window := _window(config)) and not flags.get(WINDOW[2:].replace("-", "_")):
        yield f"sliding_window {window}", f"Pass --sglang{WINDOW[1:]} {window - 1}."
    if family == "dspark":
        yield from _of_markov_head(config)


def _of_markov_head(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what SGLang would read at another place: SpecForge nests it, SGLang builds the head from the top level."""
    for key, default in ((RANK, 0), (KIND, VANILLA), (FROM_ROOT, True)):
        places = {place: each for place in (OWN, NESTED) if isinstance(each := config.get(place), dict)}
        nested = {f"{place}.{key}": each[key] for place, each in places.items() if each.get(key) is not None}
        for name, value in nested.items():
            if value != config.get(key, default):
                yield f"{name} {_shown(value)} but {key}", f'Add "{key}": {_shown(value)} at the top level there.'
                break


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the window that a draft's layer has, None where it sees everything."""
    window = config.get("sliding_window")
    types = config.get("layer_types") or ()
    if type(window) is not int or config.get("use_sliding_window") is False:
        return None
    is_short = window < (config.get("max_position_embeddings") or window)
    return window if is_short and (not types or "sliding_attention" in types) else None


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


@trap(
    "draft-unknown-keys",
    "Writers of drafts add keys of their own, some of which change what the draft computes. A key that is unknown here "
    "is read by nobody: if it has a meaning, drafts are others than they were trained to be, and few of them stand.",
    "https://github.com/sgl-project/SpecForge",
    applies=speculating,
)
def draft_unknown_keys(facts: Facts) -> Sighting | None:
    if facts.draft is None or facts.draft is facts.target:
        return None
    unknown = unknown_keys(facts.draft.config)
    if not unknown:
        return None
    return Sighting(
        Severity.WARNING,
        f"{facts.draft.folder}/config.json has keys that nobody here knows: {', '.join(unknown)}",
        "Watch rollout/spec_accept_length, and ask the draft's writer what they mean; remove those without effect.",
    )


@trap(
    "draft-embedding",
    "SGLang gives a draft that drafts by steps the target's embedding in place of the draft's own, if both have one "
    "width. Most files hold a copy of it; a draft that was trained with its own then reads another one.",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/speculative/eagle_worker_v2.py",
)
def draft_embedding(facts: Facts) -> Sighting | None:
    draft = facts.draft
    if draft is None or not facts.draft_embeds_otherwise:
        return None
    if draft.config.get("target_hidden_size") not in (None, draft.config.get("hidden_size")):
        return None  # then SGLang reads the draft's own
    return Sighting(
        Severity.ERROR,
        f"the embedding in {draft.folder} is not the target's, and SGLang would read the target's",
        "Choose a draft that was trained on the target's embedding, or pass --rollout-engine embedded.",
    )


@trap(
    "eagle-bias",
    "SGLang builds the projection of [embedding, hidden state] with a bias, whatever the config.json says. A bias "
    "that the file lacks stays as torch draws it, another one at each start, and moves every draft.",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/models/llama_eagle.py",
)
def eagle_bias(facts: Facts) -> Sighting | None:
    draft, draft_format = facts.draft, facts.draft_format
    if draft is None or draft_format is None or draft_format.family != "eagle" or draft.tensors is None:
        return None
    if "fc.bias" in {name.removeprefix("model.") for name in draft.tensors}:
        return None
    return Sighting(
        Severity.WARNING,
        f"the draft in {draft.folder} has no fc.bias",
        f"Add fc.bias to its weights, {draft.config.get('hidden_size', 'as many as hidden_size')} zeros.",
    )
