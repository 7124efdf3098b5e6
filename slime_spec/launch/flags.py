"""The table of flags gives every flag, in slime's, SGLang's and RTP-LLM's spellings, with the setting it sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from slime_spec.algorithms import ALGORITHMS
from slime_spec.config.schema import Setting, settings
from slime_spec.config.setting import AUTO, INT32
from slime_spec.config.texts import NULLS, PARSERS, whole_number
from slime_spec.errors import ConfigError
from slime_spec.launch.groups import EXPERIMENT, GROUPS, check_choice
from slime_spec.launch.others.names import counterpart_of, nearest
from slime_spec.launch.slime import model_shape, together
from slime_spec.launch.slime.megatron import refused_of_megatron, without_effect_of_megatron
from slime_spec.launch.slime.miles import REFUSED_OF_MILES
from slime_spec.launch.slime.refused import REFUSED_OF_ROUTER, REFUSED_OF_SLIME
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT, WithoutEffect
from slime_spec.sglang.flags import SglangFlag, sglang_flags, typed_elsewhere
from slime_spec.suggest import did_you_mean

IS_NO_FLAG = "is not a flag"
# A token that is an override ends a flag's list of values; a value that looks like one is written --flag=VALUE.
OVERRIDE = re.compile(rf"[a-z_]+\.[a-z0-9_.]+=|({'|'.join(GROUPS)})=")
_DTYPES = {True: "bfloat16", False: "float32"}
SP_TYPES = {each.rtp_llm: each.name for each in ALGORITHMS.values() if each.rtp_llm is not None}


@dataclass(frozen=True)
class Flag:
    """Describes a flag and the setting that it sets.

    ``path`` is a setting's, or the flag itself where there is no setting: slime_spec.launch.slime says what it means.
    ``num_values`` is "0" for a switch (``on`` and ``off`` are its two values), "1", "?", "+" or "*";
    ``convert`` makes the setting's value from the texts after the flag and raises ConfigError.
    """

    path: str
    num_values: str
    convert: Callable[[Sequence[str]], Any]
    on: object = True
    off: object = False


@cache
def flags() -> Mapping[str, Flag]:
    """Return every flag by its spelling (with hyphens)."""
    table: dict[str, Flag] = {}

    def add(name: str, flag: Flag) -> None:
        assert name not in table, f"two settings have the flag {name}: {table[name].path} and {flag.path}"
        table[name] = flag

    for entry in sglang_flags().values():
        home = typed_elsewhere().get(entry.dest)
        flag = _typed_sglang_flag(settings()[home], entry) if home else _sglang_flag(entry)
        for name in entry.flags:
            add(f"--sglang-{name[2:]}", flag)
            if name.startswith("--speculative-"):
                add(name, flag)
    for setting in settings().values():
        flag = _tree_flag(setting)
        for name in setting.flags:
            for spelling in _spellings(name):
                if not (spelling in table and table[spelling].path == setting.path):
                    add(spelling, flag)
    for name, flag in _aliases().items():
        add(name, flag)
    return table


def _spellings(name: str) -> tuple[str, ...]:
    """Return the spellings of a flag: SGLang's speculative flags have one with and one without their prefix."""
    return (name, name.replace("--sglang-", "--")) if name.startswith("--sglang-speculative-") else (name,)


def find_flag(name: str) -> tuple[Flag, bool]:
    """Find the flag spelled ``name``, and whether it is on (``--no-colocate`` is ``--colocate``, switched off)."""
    spelling = name.replace("_", "-")
    if spelling in flags():
        return flags()[spelling], True
    for negated, plain in (("--no-", "--"), ("--sglang-no-", "--sglang-")):
        positive = spelling.replace(negated, plain, 1)
        if spelling.startswith(negated) and positive in flags() and flags()[positive].num_values == "0":
            return flags()[positive], False
    if spelling in without_effect_of_megatron():
        return _without_effect(spelling, without_effect_of_megatron()[spelling]), True
    if (refusal := refusal_of(spelling)) is not None:
        rule, remedy = refusal
        raise ConfigError(spelling, rule, name, remedy)
    if (theirs := counterpart_of(spelling)) is not None:
        raise theirs.refusal(name)
    raise ConfigError(name, IS_NO_FLAG, name, f"{_suggestion(spelling)}`slime-spec train --help` lists every flag.")


def _suggestion(spelling: str) -> str:
    """Return the flag that a mistyped one most likely means, also where it is the name that another trainer has."""
    if own := did_you_mean(spelling, flags()):
        return own
    theirs = nearest(spelling)
    return "" if theirs is None else f"If {theirs.trainer}'s {theirs.name} is meant: p{theirs.passing[1:]}. "


def refusal_of(name: str) -> tuple[str, str] | None:
    """Return why a flag of slime, miles, SGLang's router, Megatron or RTP-LLM is refused, and the remedy."""
    tables = (REFUSED, REFUSED_OF_ROUTER, REFUSED_OF_MILES, refused_of_megatron())
    return next((table[name] for table in tables if name in table), None)


def is_flag(token: str) -> bool:
    """Return whether find_flag finds ``token``, a flag that may have =value."""
    try:
        find_flag(token.partition("=")[0])
    except ConfigError:
        return False
    return True


def parse_value(setting: Setting, text: str, kind: str | None = None) -> Any:
    """Read one value of a setting from its text; raises ConfigError with the setting's own words."""
    kind = kind or setting.type.__name__
    if setting.is_optional and (text in NULLS or (setting.is_automatic and text == AUTO)):
        return None
    try:
        return PARSERS[kind](text)
    except ValueError:
        raise ConfigError(setting.path, f"must be {setting.expects}", text, setting.remedy) from None


def _tree_flag(setting: Setting) -> Flag:
    if setting.is_tuple:
        return Flag(setting.path, "*", lambda texts: setting.check([parse_value(setting, text) for text in texts]))
    num_values = "0" if setting.type is bool else "1"
    return Flag(setting.path, num_values, lambda texts: setting.check(parse_value(setting, texts[0])))


def _typed_sglang_flag(setting: Setting, entry: SglangFlag) -> Flag:
    """Make the flag of a ServerArgs field in the tree, with the tree's bounds and SGLang's form of the value."""
    kind = entry.type if entry.type == "suffixed_int" else None
    num_values = "0" if setting.type is bool else "1"
    return Flag(setting.path, num_values, lambda texts: setting.check(parse_value(setting, texts[0], kind)))


def _sglang_flag(entry: SglangFlag) -> Flag:
    return Flag(entry.path, "0" if entry.type == "bool" else entry.nargs or "1", entry.parse)


def _aliases() -> Mapping[str, Flag]:
    """Return the flags that set a value of a setting with another name."""
    return {
        "--config": Flag(EXPERIMENT, "1", lambda texts: check_choice(EXPERIMENT, texts[0])),
        "--debug-rollout-only": _mode_switch("rollout_only"),
        "--debug-train-only": _mode_switch("train_only"),
        "--disable-grpo-std-normalization": Flag(
            "algorithm.normalize_std", "0", lambda texts: not PARSERS["bool"](texts[0]), on=False, off=True
        ),
        "--calculate-per-token-loss": Flag(
            "algorithm.loss_mean",
            "0",
            lambda texts: "token" if PARSERS["bool"](texts[0]) else "sample",
            on="token",
            off="sample",
        ),
        "--bf16": Flag("trainer.dtype", "0", lambda texts: _DTYPES[bool(PARSERS["bool"](texts[0]))], *_DTYPES.values()),
        "--recompute-granularity": Flag("trainer.recompute", "1", lambda texts: _recompute(texts[0])),
        **_of_slime(),
        "--sp-type": Flag("speculative.algorithm", "1", lambda texts: _algorithm_of_sp_type(texts[0])),
        "--gen-num-per-cycle": Flag("speculative.num_steps", "1", lambda texts: _steps_of_cycle(texts[0])),
        "--sp-quantization": Flag(
            "speculative.draft_model_quantization", "1", lambda texts: _quantization(texts[0].lower())
        ),
    }


def _of_slime() -> Mapping[str, Flag]:
    """Return the flags that slime_spec.launch.slime treats, whose path is their own name."""
    table = {name: _without_effect(name, each) for name, each in WITHOUT_EFFECT.items()}
    for name in model_shape.SWITCHES:
        table[name] = _switch_without_effect(name)
    for name in (*model_shape.NUMBERS, *model_shape.VALUES):
        table[name] = Flag(name, "1", tuple)
    for name in model_shape.LISTS:
        table[name] = Flag(name, "+", tuple)
    for name in together.NUMBERS:
        table[name] = Flag(name, "1", partial(_number, name))
    for name in together.TEXTS:
        table[name] = Flag(name, "1", lambda texts: texts[0])
    return table


def _without_effect(name: str, each: WithoutEffect) -> Flag:
    return _switch_without_effect(name) if each.num_values == "0" else Flag(name, each.num_values, tuple)


def _switch_without_effect(name: str) -> Flag:
    return Flag(name, "0", lambda texts: (str(PARSERS["bool"](texts[0])).lower(),), ("true",), ("false",))


def _number(name: str, texts: Sequence[str]) -> int:
    """Read a count; ``name`` is the flag's, for the error."""
    try:
        number = whole_number(texts[0])
    except ValueError:
        number = -1
    if not 0 <= number <= INT32:
        raise ConfigError(name, "must be a whole number", texts[0], f"Pass {name} N.")
    return number


def _recompute(text: str) -> bool:
    if text != "full":
        rule = "must be full, the one choice here: all of a layer is computed again in the backward pass"
        raise ConfigError("--recompute-granularity", rule, text, "Pass full, or leave it out to keep activations.")
    return True


def _mode_switch(mode: str) -> Flag:
    return Flag("run.mode", "0", lambda texts: mode if PARSERS["bool"](texts[0]) else "train", on=mode, off="train")


def _algorithm_of_sp_type(text: str) -> str:
    if text not in SP_TYPES:
        hint = did_you_mean(text, SP_TYPES)
        raise ConfigError("--sp-type", f"must be one of {', '.join(SP_TYPES)}", text, f"{hint}Choose a known type.")
    return SP_TYPES[text]


def _steps_of_cycle(text: str) -> int:
    """Read RTP-LLM's drafts per round of a chain as SGLang's num_steps at topk 1."""
    try:
        num_drafts = whole_number(text)
    except ValueError:
        num_drafts = 0
    if num_drafts < 1:
        raise ConfigError(
            "--gen-num-per-cycle", "must be a whole number of at least 1", text, "Pass --gen-num-per-cycle 4."
        )
    return num_drafts


def _quantization(name: str) -> object:
    """Read RTP-LLM's INT8 as SGLang's int8."""
    return settings()["speculative.draft_model_quantization"].check(name)


_ONE_DISTRIBUTION = ("every token is drawn by its request's own uniform, batched or not", "Leave it out.")
_NO_LORA = (
    "Megatron-Core has no low-rank adapters, and every weight is trained",
    "Leave it out; --optimizer-cpu-offload and --recompute-activations save the trainer's memory.",
)
# Flags of slime or RTP-LLM that this version cannot honour: each with the reason and the remedy.
REFUSED: Mapping[str, tuple[str, str]] = {
    "--sp-model-type": (
        "the draft's config.json names its architecture, and --sp-type how it drafts",
        "Leave it out, with --sp-type vanilla, mtp, eagle or eagle3.",
    ),
    "--sp-act-type": (
        "a draft computes in the engine's dtype, whatever dtype its file has",
        "Pass --sglang-dtype bfloat16 for both, and --sp-quantization int8 for a smaller draft.",
    ),
    "--tree-decode-config": (
        "a tree is shaped by three numbers, not by a file",
        "Pass --speculative-num-steps 5 --speculative-eagle-topk 4 --speculative-num-draft-tokens 8.",
    ),
    "--force-stream-sample": _ONE_DISTRIBUTION,
    "--force-score-context-attention": ("drafts are always scored in one pass over the context", "Leave it out."),
    "--force-sp-accept": (
        "accepting every draft gives samples that have no target's distribution",
        "Leave it out.",
    ),
    **{name: _NO_LORA for name in ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-target-modules")},
    **REFUSED_OF_SLIME,
}
