"""What the server has done since it started, for /server_info."""

from __future__ import annotations

from slime_spec.metrics.alarm import AcceptanceAlarm
from slime_spec.types import GeneratedSample


class Totals:
    """Sums over every sample that was answered; ``alarm`` sees them too."""

    def __init__(self, alarm: AcceptanceAlarm | None = None) -> None:
        self._alarm = alarm
        self.num_samples = self.num_tokens = self.num_rounds = self.num_correct = 0

    def count(self, sample: GeneratedSample) -> None:
        self.num_samples += 1
        self.num_tokens += len(sample.token_ids)
        self.num_rounds += sample.spec.num_rounds
        self.num_correct += sample.spec.num_correct
        if self._alarm is not None:
            num_rounds = sample.spec.num_rounds - sample.spec.num_empty_rounds
            self._alarm.see(num_rounds, sample.spec.num_correct, f"samples={self.num_samples}")

    @property
    def mean_accept_length(self) -> float | None:
        """Tokens a round emits, the bonus token included; None before the first round."""
        return 1 + self.num_correct / self.num_rounds if self.num_rounds else None
