"""These are the bounds of sampling parameters: SGLang's, and within them what 32-bit numbers can compute.

Settings, HTTP bodies and requests to either engine are held to the same bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Added to a logit and divided by the least temperature that is not greedy, it is still a 32-bit number.
MAX_LOGIT_BIAS = 1e30
# Beyond it a logit divided by the temperature is 0 times infinity where a token is masked.
MAX_TEMPERATURE = 1e30
# Below it a logit that is divided by the penalty, and then by a temperature, is no 32-bit number.
MIN_REPETITION_PENALTY = 1e-9
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024  # of one stop string: after every token a text of its length is decoded and searched


@dataclass(frozen=True)
class Bound:
    """Holds the bounds of a number, both allowed; ``open`` leaves out the least.

    Example: ``Bound(0.0, 1.0, "Pass 1.", open=True).holds(0.5)``
    """

    least: float
    most: float
    remedy: str
    open: bool = False

    @property
    def rule(self) -> str:
        return f"must be {'above' if self.open else 'at least'} {self.least:g} and at most {self.most:g}"

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is within the bounds; NaN never is."""
        return (self.least < value if self.open else self.least <= value) and value <= self.most


BOUNDS: Mapping[str, Bound] = {
    "temperature": Bound(0.0, MAX_TEMPERATURE, "Pass 0 for greedy decoding."),
    "top_p": Bound(0.0, 1.0, "Pass 1 to keep every token.", open=True),
    "min_p": Bound(0.0, 1.0, "Pass 0 to keep every token."),
    "frequency_penalty": Bound(-2.0, 2.0, "Pass 0 for no penalty."),
    "presence_penalty": Bound(-2.0, 2.0, "Pass 0 for no penalty."),
    "repetition_penalty": Bound(MIN_REPETITION_PENALTY, 2.0, "Pass 1 for no penalty."),
}
