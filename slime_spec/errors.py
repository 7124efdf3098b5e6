"""These are the errors that a user meets; each error says what to change."""

LONGEST_SHOWN = 300  # characters of a bad value that an error repeats


def shown(value: object) -> str:
    """Return how an error shows a value, whatever it is: a batch of prompts, deep lists, a number of many digits."""
    if isinstance(value, str | bytes):
        value = value[: LONGEST_SHOWN + 1]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; more digits than Python writes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"


class ConfigError(ValueError):
    """A setting cannot work, which is found before anything heavy starts.

    Example: ``ConfigError("rollout.n_samples_per_prompt", "must be at least 1", 0, "pass --n-samples-per-prompt 8")``
    """

    def __init__(self, setting: str, rule: str, value: object, remedy: str) -> None:
        self.setting, self.rule, self.value, self.remedy = setting, rule, value, remedy
        super().__init__(f"{setting}: {rule} (got {shown(value)}). {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, str, object, str]]:
        # Exceptions cross Ray's process boundary by pickling their constructor arguments.
        return type(self), (self.setting, self.rule, self.value, self.remedy)


class CheckpointError(ConfigError):
    """A checkpoint folder is missing, incomplete or damaged."""


class NotComputedError(CheckpointError):
    """A checkpoint describes a model that this project does not compute; SGLang may serve it."""


class RewardError(RuntimeError):
    """No sample of a whole step has a reward; the text has the last error and its traceback."""


class CustomFunctionError(RuntimeError):
    """A function of the user's own has failed in a way that no single sample can pay for."""


class TrainingError(RuntimeError):
    """An optimizer step would have ruined the weights, which are as they were before the step."""


class GenerationError(RuntimeError):
    """One request could not be generated to its end; the engine goes on with all others."""


class PushError(RuntimeError):
    """A weight push was refused or failed; every engine stays on, or returned to, its previous version."""
