"""These are the errors that a user meets; each error says what to change."""

from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Sequence

LONGEST_SHOWN = 300  # characters of a bad value that an error repeats


def shown(value: object) -> str:
    """Return how an error shows a value, whatever it is: a batch of prompts, deep lists, a number of many digits."""
    if isinstance(value, str | bytes):
        value = value[: LONGEST_SHOWN + 1]
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - nested too deeply, more digits than Python writes, a class of a user's own
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"


def raised(error: BaseException) -> str:
    """Return an exception's type and message; a class of a user's own may have a message that raises itself."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - as above
        text = "a message that cannot be read"
    return f"{type(error).__name__}: {text}"


# What a call of a user's function may raise: sys.exit() and a cancellation are no Exception, and would end a run
# without a word. In the main thread a KeyboardInterrupt is a signal's, in every other thread the function's own.
RAISED_BY_FUNCTIONS: tuple[type[BaseException], ...] = (Exception, SystemExit, CancelledError)
RAISED_IN_THREADS: tuple[type[BaseException], ...] = (*RAISED_BY_FUNCTIONS, KeyboardInterrupt)


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


class ConfigErrors(ConfigError):
    """Several settings cannot work; the error tells all of them, a line each.

    Its own setting, rule, value and remedy are the first error's, for a reader that shows one.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.setting, first.rule, first.value, first.remedy)
        self.args = ("\n".join([f"{len(self.errors)} mistakes", *(f"  {error}" for error in self.errors)]),)

    def __reduce__(self) -> tuple[type, tuple[tuple[ConfigError, ...]]]:  # type: ignore[override]
        return type(self), (self.errors,)


def each_of(error: ConfigError) -> tuple[ConfigError, ...]:
    """Return the errors that an error holds: itself, where it is one."""
    return error.errors if isinstance(error, ConfigErrors) else (error,)


def raise_all(errors: Iterable[ConfigError]) -> None:
    """Raise the errors: one as it is, several as ConfigErrors, each text once; return where there are none."""
    told = list({str(each): each for error in errors for each in each_of(error)}.values())
    if len(told) == 1:
        raise told[0]
    if told:
        raise ConfigErrors(told)


def refused_by(*checks: Callable[[], object]) -> Iterator[ConfigError]:
    """Make every check, whatever those before it refuse, and yield the errors."""
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield error


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
    """A weight push was refused or failed; every engine that lives stays on, or returned to, its previous version."""
