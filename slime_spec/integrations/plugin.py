"""A Plugin is what one process of another framework keeps between the calls of its hooks.

generate ──► framework's generate, whose answers are heard ──► samples
   └──────► Servers: the canary as a rollout begins, replies for n-gram servers
log  ◄──── samples, Servers ──► metrics ──► the framework's own log function
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slime_spec.errors import ConfigError
from slime_spec.integrations.answers import (
    algorithm_of,
    answers_of,
    heard,
    is_heard,
    num_rounds,
    num_steps_of,
    responses_of,
    settle,
)
from slime_spec.integrations.framework import ALGORITHM, Framework, Generate, first_of, generated, own_generate
from slime_spec.integrations.scores import score
from slime_spec.integrations.settings import PluginSettings, plugin_settings
from slime_spec.metrics.alarm import AcceptanceAlarm
from slime_spec.metrics.evaluation import OF_ROLLOUT
from slime_spec.metrics.rollout import acceptance_metrics, sudden_drop_metrics
from slime_spec.rl.draft_updates import EVERY, SUDDEN, DraftUpdates
from slime_spec.sglang.metadata import UnknownMetadataError

if TYPE_CHECKING:
    from slime_spec.integrations.draft_learner import DraftLearner

logger = logging.getLogger(__name__)

ACCEPT_LENGTH = "rollout/spec_accept_length"
OF_EVALUATION = {own: name for own, name in OF_ROLLOUT.items() if own.startswith("spec_")}
LEAST_ROUNDS = 400  # of a rollout that is compared with the one before: 15 % is then about four standard errors
AXIS, CHARTED = "rollout/step", ("spec/*", "sync/*")


class Source(Protocol):
    """Hears of every sample, and says what no sample says of a rollout."""

    def began(self, sample: Any) -> None: ...

    def ended(self, sample: Any, made: Sequence[Any]) -> None:
        """Note the samples that were made of one that ``began``, none where that failed."""

    def measured(self) -> dict[str, float]:
        """Return metrics of the rollout that is over; the next sample begins another."""

    def leave_out(self) -> None:
        """Count what was generated until now in no rollout."""

    def close(self) -> None: ...


class Plugin:
    """Serves the hooks of one framework in this process; ``framework`` says where its own functions are."""

    def __init__(self, framework: Framework) -> None:
        self._framework = framework
        self._settings: PluginSettings | None = None
        self._source: Source | None = None
        self._updates = DraftUpdates(EVERY, interval=1, horizon=1)  # knows a sudden loss
        self._alarm: AcceptanceAlarm | None = None
        self._learner: DraftLearner | None = None
        self._learned_rollout = -1
        self._is_charted = self._has_told_of_silence = False

    async def generate(self, args: Any, sample: Any, sampling_params: Any, evaluation: bool) -> Any:
        """Generate a sample, or several of one, as the framework or the user's own function does; keep the answers."""
        settings = self._settings_of(args)
        function = (
            first_of(self._framework.name, self._framework.generate)
            if settings.generate is None
            else own_generate(settings.generate)
        )
        return await self._heard(function, self._source_of(args, settings), args, sample, sampling_params, evaluation)

    async def generate_embedded(self, args: Any, sample: Any, sampling_params: Any, evaluation: bool) -> Any:
        """Generate a sample on an engine in this process; keep its answer."""
        from slime_spec.integrations.embedded import Embedded

        if not isinstance(self._source, Embedded):
            self._source = Embedded.of(args, self._settings_of(args))
        return await self._heard(self._source.generate, self._source, args, sample, sampling_params, evaluation)

    async def _heard(
        self, function: Generate, source: Source, args: Any, sample: Any, sampling_params: Any, evaluation: bool
    ) -> Any:
        source.began(sample)
        made: list[Any] = []
        try:
            with heard(sample):
                given = await generated(function, args, sample, sampling_params, evaluation)
            made = list(_leaves(given))
        finally:
            source.ended(sample, made)
        for each in made:
            settle(each)
        if (name := self._settings_of(args).reward) is not None:
            await score(made, name, args)
        return given

    def log_rollout(
        self, rollout_id: int, args: Any, samples: Sequence[Any], extra: Mapping[str, Any] | None, rollout_s: float
    ) -> bool:
        """Log a rollout with its acceptance; False, and the framework logs by itself, where that cannot be said."""
        args.logged_rollout_id = rollout_id
        if not self._framework.can_log(args):
            return False
        measured = self._rollout_metrics(rollout_id, args, samples)
        if measured is None:
            return False
        self._chart(args)
        self._framework.log(
            self._framework.log_rollout,
            args,
            {**(extra or {}), **measured},
            lambda log, quiet, metrics: log(rollout_id, quiet, samples, metrics, rollout_s),
        )
        return True

    def log_eval(
        self, rollout_id: int, args: Any, data: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any] | None
    ) -> bool:
        """Log an evaluation with the acceptance of each set; see ``log_rollout``."""
        args.logged_eval_rollout_id = rollout_id
        if not self._framework.can_log(args):
            return False
        measured: dict[str, float] = {}
        for name, of_set in data.items():
            found = self._acceptance(args, of_set.get("samples") or ())
            if found is None:
                return False
            measured |= {f"eval/{name}/{own}": found[key] for own, key in OF_EVALUATION.items() if key in found}
        if self._source is not None:
            self._source.leave_out()
        self._framework.log(
            self._framework.log_eval,
            args,
            {**(extra or {}), **measured},
            lambda log, quiet, metrics: log(rollout_id, quiet, data, metrics),
        )
        return True

    def before_train_step(self, args: Any, rollout_id: int, model: Sequence[Any]) -> None:
        """Have the draft learn from the last step's passes, and see this step's; publish it as a rollout begins.

        In the last rollout it is published anew before each step: no hook is called when training ends.
        """
        settings = self._settings_of(args)
        if settings.learned_draft is None:
            remedy = (
                "Name a folder there, or leave the hook out: MTP layers learn by slime's own --enable-mtp-training."
            )
            raise ConfigError("slime_spec.learned_draft", "must be set for before_train_step", None, remedy)
        if self._learner is None:
            from slime_spec.integrations.draft_learner import DraftLearner

            self._learner = DraftLearner(args, settings, model)
            self._learned_rollout = rollout_id
        self._learner.before_step()
        if rollout_id != self._learned_rollout:
            self._learner.publish(self._learned_rollout)
            self._learned_rollout = rollout_id
        elif self._learner.last_loss is not None and rollout_id + 1 == getattr(args, "num_rollout", None):
            self._learner.publish(rollout_id)  # the last one's: how many steps are to come, no hook is told

    def close(self) -> None:
        """End what the plug-in has started; a process that ends needs no call."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _rollout_metrics(self, rollout_id: int, args: Any, samples: Sequence[Any]) -> dict[str, float] | None:
        measured = self._acceptance(args, samples)
        if measured is None or getattr(args, "load_debug_rollout_data", None):
            return measured
        self._warn(rollout_id, args, measured)
        settings, length = self._settings_of(args), measured.get(ACCEPT_LENGTH)
        of_servers = self._source_of(args, settings).measured()
        if length is not None and settings.break_even_length is not None:
            known = {
                "spec/break_even_length": settings.break_even_length,
                "spec/net_speedup_est": length / settings.break_even_length,
            }
            of_servers = {**known, **of_servers}
        return {**measured, **self._drop(measured, of_servers), **of_servers}

    def _acceptance(self, args: Any, samples: Sequence[Any]) -> dict[str, float] | None:
        """Return the acceptance of samples; None where their counters cannot be read, which is told."""
        try:
            responses = responses_of(samples, algorithm_of(args), num_steps_of(args))
        except UnknownMetadataError as error:
            logger.error("ALARM acceptance is not known: %s", error)
            return None
        self._tell_of_silence(args, samples)
        return acceptance_metrics(responses) if any(each.spec.num_rounds for each in responses) else {}

    def _tell_of_silence(self, args: Any, samples: Sequence[Any]) -> None:
        """Warn once where servers speculate and no sample knows of a verify round."""
        if self._has_told_of_silence or not samples or getattr(args, ALGORITHM, None) is None:
            return
        if num_rounds(answer for sample in samples for answer in answers_of(sample)):
            return
        self._has_told_of_silence = True
        hint = (
            "the servers sent no counters: see whether they speculate"
            if any(map(is_heard, samples))
            else f"pass --custom-generate-function-path slime_spec.integrations.{self._framework.name}.generate: "
            "the servers' names for counters are newer than the sample's"
        )
        logger.warning("no sample has a verify round algorithm=%s remedy=%r", getattr(args, ALGORITHM), hint)

    def _warn(self, rollout_id: int, args: Any, measured: Mapping[str, float]) -> None:
        """Warn once of a draft that is never accepted, with the likely causes of the algorithm's."""
        algorithm = algorithm_of(args)
        if self._alarm is None and algorithm is not None:
            self._alarm = AcceptanceAlarm(algorithm)
        if self._alarm is not None:
            self._alarm.write(rollout_id, measured)

    def _drop(self, measured: Mapping[str, float], of_servers: Mapping[str, float]) -> dict[str, float]:
        """Return whether the accept length fell at once, which no drift of the policy does; rollouts of many rounds."""
        if measured.get("spec/verify_rounds", 0.0) < LEAST_ROUNDS:
            return {}
        length, before = measured[ACCEPT_LENGTH], self._updates.record.accept_length
        self._updates.saw_rollout(length, 0.0)
        is_sudden = self._updates.record.is_sudden
        if is_sudden:
            logger.error(
                "ALARM accept length fell by more than %.0f %% in one step, look for a fault of the weight sync first "
                "accept_length=%.3f before=%.3f canary=%s",
                100 * SUDDEN,
                length,
                before,
                of_servers.get("sync/canary_accept_length"),
            )
        return sudden_drop_metrics(is_sudden)

    def _chart(self, args: Any) -> None:
        if getattr(args, "use_wandb", False) and not self._is_charted:
            from slime_spec.metrics.wandb import chart_over

            self._is_charted = True
            chart_over(AXIS, CHARTED)

    def _settings_of(self, args: Any) -> PluginSettings:
        if self._settings is None:
            self._settings = plugin_settings(args)
        return self._settings

    def _source_of(self, args: Any, settings: PluginSettings) -> Source:
        if self._source is None:
            from slime_spec.integrations.servers import Servers  # with an HTTP client: an import of hooks is light

            self._source = Servers.of(args, settings)
        return self._source


def _leaves(made: Any) -> Iterable[Any]:
    """Yield the samples that a generate function returned: one, or several in lists."""
    if isinstance(made, list | tuple):
        for each in made:
            yield from _leaves(each)
    elif made is not None:
        yield made
