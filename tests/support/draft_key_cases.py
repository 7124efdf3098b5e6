"""Drafts that SGLang would compute otherwise than their config.json says, and others that it computes as they are."""

from __future__ import annotations

from typing import Any

from slime_spec.preflight.finding import Severity
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, MIMO, MTP, SERVERS, TARGET, Case, case

ERROR, WARNING = Severity.ERROR, Severity.WARNING
EAGLE3 = (*SERVERS, "--speculative-algorithm", "EAGLE3", *CHAIN)
EAGLE = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN)
DSPARK = (*SERVERS, "--speculative-algorithm", "DSPARK")
EMBEDDED = ("--speculative-algorithm", "EAGLE3", *CHAIN)
LAYERS = {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}
FIRST = {**TARGET, "architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
SPARK = {
    **{**TARGET, "architectures": ["DSparkDraftModel"], "num_hidden_layers": 5, "block_size": 7},
    **{"dflash_config": {"mask_token_id": 128255, "target_layer_ids": [1, 8, 15]}},
}
MARKOV = {"markov_rank": 256, "markov_head_type": "gated"}
SPECULATORS = {
    **{"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 32000},
    "transformer_layer_config": {**TARGET, "architectures": None, "num_hidden_layers": 1, "model_type": "llama"},
}


def head(**changes: Any) -> dict[str, Any]:
    return {"draft": {**EAGLE3_HEAD, **changes}}


def spark(**changes: Any) -> dict[str, Any]:
    nested = {**SPARK["dflash_config"], **changes.pop("nested", {})}
    return {"draft": {**SPARK, **changes, "dflash_config": nested}}


DRAFT_KEYS: tuple[Case, ...] = (
    case("draft-layout", EAGLE3, ERROR, **head(architectures=["Eagle3LlamaForCausalLM"])),
    case("draft-layout", EAGLE3, ERROR, draft=SPECULATORS),
    case("draft-layout", EAGLE3, ERROR, **head(architectures=["LlamaForCausalLM"]), tensors=["fc.weight", "d2t"]),
    case(
        "draft-layout", EAGLE, ERROR, draft={**FIRST, "architectures": TARGET["architectures"]}, tensors=["fc.weight"]
    ),
    case("draft-layout", EAGLE3, **head()),
    case("draft-layout", EMBEDDED, **head(architectures=["Eagle3LlamaForCausalLM"])),
    case("draft-keys", EAGLE3, ERROR, **head(norm_before_residual=True)),
    case("draft-keys", EAGLE3, ERROR, **head(attention_bias=True)),
    case("draft-keys", EAGLE3, ERROR, **head(eagle_config={**LAYERS, "use_last_layernorm": False})),
    case("draft-keys", EAGLE3, ERROR, **head(eagle_config={**LAYERS, "use_input_layernorm_in_first_layer": False})),
    case("draft-keys", EAGLE3, ERROR, **head(sliding_window=1024, use_sliding_window=True)),
    case("draft-keys", EAGLE3, **head(sliding_window=1024, use_sliding_window=False)),
    case(
        *("draft-keys", (*EAGLE3, "--sglang-speculative-draft-window-size", "1023")),
        **head(sliding_window=1024, use_sliding_window=True),
    ),
    case("draft-keys", EAGLE3, **head(norm_before_residual=False, attention_bias=False)),
    case("draft-keys", EAGLE3, **head(eagle_config={**LAYERS, "use_last_layernorm": True})),
    case("draft-keys", EMBEDDED, **head(norm_before_residual=True)),
    case("draft-keys", EAGLE3, ERROR, **head(tie_word_embeddings=True)),
    case("draft-unknown-keys", EAGLE3, WARNING, **head(norm_of_everything=True)),
    case("draft-unknown-keys", EMBEDDED, WARNING, **head(eagle_config={**LAYERS, "skip_layer": 1})),
    case("draft-unknown-keys", EMBEDDED, **head(modal_type="LLM", use_cache=True, norm_of_everything=None)),
    case("draft-keys", EAGLE, draft={**FIRST, "attention_bias": True}),
    case("draft-keys", DSPARK, ERROR, **spark(nested=MARKOV)),
    case("draft-keys", DSPARK, ERROR, **spark(markov_rank=256, nested={"markov_head_type": "rnn"})),
    case("draft-keys", DSPARK, ERROR, **spark(**MARKOV, nested={"sample_from_anchor": False})),
    case(
        "draft-keys",
        DSPARK,
        **spark(**MARKOV, sample_from_anchor=False, nested={"sample_from_anchor": False}),
    ),
    case("draft-embedding", EAGLE3, ERROR, **head(), draft_embeds_otherwise=True),
    case("draft-embedding", EAGLE3, **head(), draft_embeds_otherwise=False),
    case("draft-embedding", EAGLE3, **head(hidden_size=2048, target_hidden_size=4096), draft_embeds_otherwise=True),
    case("mtp-layers", MTP, ERROR, target={**MIMO, "num_nextn_predict_layers": 2}),
    case("mtp-layers", MTP, target=MIMO),
    case("capture-layers", EAGLE3, **head(eagle_config={"use_aux_hidden_state": False})),
    case("eagle-bias", EAGLE, WARNING, draft=FIRST, tensors=["fc.weight"]),
    case("eagle-bias", EAGLE, draft=FIRST, tensors=["fc.weight", "fc.bias"]),
    case("eagle-bias", EAGLE3, **head(), tensors=["fc.weight", "norm.weight", "lm_head.weight", "d2t"]),
)
