"""These are the errors that a user meets; each error says what to change."""


class ConfigError(ValueError):
    """A setting cannot work, which is found before anything heavy starts.

    Example: ``ConfigError("rollout.n_samples_per_prompt", "must be at least 1", 0, "pass --n-samples-per-prompt 8")``
    """

    def __init__(self, setting: str, rule: str, value: object, remedy: str) -> None:
        self.setting, self.rule, self.value, self.remedy = setting, rule, value, remedy
        super().__init__(f"{setting}: {rule} (got {value!r}). {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, str, object, str]]:
        # Exceptions cross Ray's process boundary by pickling their constructor arguments.
        return type(self), (self.setting, self.rule, self.value, self.remedy)


class CheckpointError(ConfigError):
    """A checkpoint folder is missing, incomplete or damaged."""


class NotComputedError(CheckpointError):
    """A checkpoint describes a model that this project does not compute; SGLang may serve it."""


class TrainingError(RuntimeError):
    """An optimizer step would have ruined the weights, which are as they were before the step."""


class PushError(RuntimeError):
    """A weight push was refused or failed; every engine stays on, or returned to, its previous version."""
