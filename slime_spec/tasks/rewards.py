"""This module has the table of the named rewards, those that end at once, and loads a user's own."""

from __future__ import annotations

import importlib
import random as randomness
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from slime_spec.errors import RAISED_BY_FUNCTIONS, ConfigError
from slime_spec.interfaces import load
from slime_spec.suggest import did_you_mean
from slime_spec.tasks.boxed import last_boxed
from slime_spec.types import Prompt

if TYPE_CHECKING:
    from slime_spec.slime_sample import Sample

Reward = Callable[[Prompt, str], Any]


@dataclass(frozen=True)
class NamedReward:
    """Names a reward's function, and says what it needs.

    ``is_quick`` rewards take time in proportion to the reply's length, and are called where they are asked for; others
    run in processes, which a time limit ends. ``extra`` is the extra of this package that has the reward's library.
    """

    path: str
    is_quick: bool = True
    needs_label: bool = True
    needs_url: bool = False
    extra: str | None = None


REWARDS: Mapping[str, NamedReward] = {
    "last_integer": NamedReward("slime_spec.tasks.rewards:last_integer"),
    "exact": NamedReward("slime_spec.tasks.rewards:exact"),
    "contains": NamedReward("slime_spec.tasks.rewards:contains"),
    "f1": NamedReward("slime_spec.tasks.rewards:f1"),
    "gsm8k": NamedReward("slime_spec.tasks.rewards:gsm8k"),
    "gpqa": NamedReward("slime_spec.tasks.choices:gpqa", needs_label=False),
    "math": NamedReward("slime_spec.tasks.math_answers:math", is_quick=False, extra="math"),
    "math_verify": NamedReward("slime_spec.tasks.math_answers:math_verify", is_quick=False, extra="math"),
    "deepscaler": NamedReward("slime_spec.tasks.math_answers:deepscaler", is_quick=False, extra="math"),
    "dapo": NamedReward("slime_spec.tasks.math_answers:dapo", is_quick=False, extra="math"),
    "random": NamedReward("slime_spec.tasks.rewards:random", needs_label=False),
    "remote_rm": NamedReward("slime_spec.tasks.remote:remote_rm", is_quick=False, needs_label=False, needs_url=True),
}
BOXED = "boxed_"  # before a name: the reward gets what the reply has in its last \boxed{} alone
# Rewards of slime that are not here, with the reason and the remedy.
REFUSED: Mapping[str, tuple[str, str]] = {
    "ifbench": (
        "ifbench's checks are no package: slime clones their repository while the run goes",
        "Install IFBench yourself, and pass --custom-rm-path module:function that calls its evaluation_lib.",
    ),
}
# A thousands separator or a fraction belongs to its number; a hyphen after a digit is a minus or a range, not a sign.
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?!\d)(?:\.\d+)?")
MINUS_SIGNS = str.maketrans("−﹣－", "---")
GSM8K_MARK = "####"
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def last_integer(prompt: Prompt, reply: str) -> float:
    """Return 1 if the last number of the reply equals the answer, an integer, else 0: "2 + 3 = 5." answers 5."""
    found = NUMBER.findall(reply)
    return float(bool(found) and Decimal(found[-1].replace(",", "")) == int(prompt.answer))


def exact(prompt: Prompt, reply: str) -> float:
    """Return 1 if the reply is the answer, white space around it ignored, else 0."""
    return float(reply.strip() == prompt.answer.strip())


def contains(prompt: Prompt, reply: str) -> float:
    """Return 1 if the answer occurs in the reply, else 0."""
    return float(prompt.answer in reply)


def gsm8k(prompt: Prompt, reply: str) -> float:
    """Return 1 if the reply's number after its last "####", or its last number, is the answer's, else 0.

    The answer may be the data set's own, a solution that ends in "#### 72". Numbers are compared by value: 1,234.50.
    """
    given, wanted = _last_number(reply), _last_number(prompt.answer)
    return float(given is not None and given == wanted)


def f1(prompt: Prompt, reply: str) -> float:
    """Return the F1 of the words that the reply and the answer share, as SQuAD counts them.

    Case, punctuation, articles and spaces do not count; yes and no must be the whole reply.
    """
    given, wanted = _words(reply), _words(prompt.answer)
    if given != wanted and not CLOSED_ANSWERS.isdisjoint((" ".join(given), " ".join(wanted))):
        return 0.0
    num_shared = (Counter(given) & Counter(wanted)).total()
    return 2 * num_shared / (len(given) + len(wanted)) if num_shared else 0.0


def random(args: Any, sample: Sample) -> float:
    """Return 0 or 1 by the toss of a coin, whatever the reply; the same for the same seed, prompt and sample."""
    return float(randomness.Random(f"{args.seed}/{sample.group_index}/{sample.index}").randrange(2))


def find_reward(setting: str, name: str, where: str = "") -> NamedReward:
    """Return the record of a named reward; raises ConfigError for an unknown name.

    It begins with ``where``, the place of a row that names one: a row cannot name a function.
    """
    plain = name.removeprefix(BOXED)
    if plain in REWARDS:
        return REWARDS[plain]
    if plain in REFUSED:
        reason, remedy = REFUSED[plain]
        raise ConfigError(setting, where + reason, name, remedy)
    rule, hint = f"{where}must be one of {', '.join(sorted(REWARDS))}", did_you_mean(name, REWARDS, repr)
    if where:
        remedy = "Choose a known name; a function of your own judges a whole run (--rm-type module:function)."
        raise ConfigError(setting, rule, name, f"{hint}{remedy}")
    rule = f"{rule}, or a function of your own as module:function"
    raise ConfigError(setting, rule, name, f"{hint}Choose a known name, or write module:function.")


def is_named(name: str) -> bool:
    """Return whether ``name`` is of this package's table, or would be, rather than a function of a user's own."""
    return ":" not in name and "." not in name


def load_named(setting: str, name: str) -> Callable[..., Any]:
    """Return the function of a named reward; raises ConfigError for an unknown name or an absent library."""
    record = find_reward(setting, name)
    try:
        function: Callable[..., Any] = load(record.path)
    except ImportError as error:
        assert record.extra is not None, "what it imports is always installed"
        remedy = f"pip install 'slime_spec[{record.extra}]'."
        raise ConfigError(setting, f"needs the library of the extra {record.extra}: {error}", name, remedy) from None
    if not name.startswith(BOXED):
        return function
    return lambda prompt, reply: function(prompt, last_boxed(reply) or "")


def load_reward(setting: str, name: str) -> Callable[..., Any]:
    """Return a named reward, or the function that ``module:function`` names; slime writes ``module.function``.

    Raises ConfigError for an unknown one.
    """
    if is_named(name):
        return load_named(setting, name)
    if ":" not in name:
        module, _, function = name.rpartition(".")
        name = f"{module}:{function}"
    loaded = load_attribute(setting, name)
    if not callable(loaded):
        raise ConfigError(setting, "must name a function reward(prompt, reply) -> float", name, "Check the attribute.")
    own: Callable[..., Any] = loaded
    return own


def load_attribute(setting: str, name: str) -> Any:
    """Return what ``module:attribute`` names, or a ConfigError that says which half was not found."""
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except RAISED_BY_FUNCTIONS as error:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        remedy = "Set PYTHONPATH to the module's folder." if not kind else "Mend the module."
        rule = f"must name an importable module:function: {kind}{error}"
        raise ConfigError(setting, rule, name, remedy) from None
    if not hasattr(loaded, attribute):
        raise ConfigError(setting, f"{module} has no attribute {attribute}", name, "Check the attribute's spelling.")
    return getattr(loaded, attribute)


def _last_number(text: str) -> Decimal | None:
    marked = text.translate(MINUS_SIGNS).rpartition(GSM8K_MARK)[2]
    found = NUMBER.findall(marked)
    return Decimal(found[-1].replace(",", "")) if found else None


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()
