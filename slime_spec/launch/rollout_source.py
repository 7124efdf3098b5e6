"""A run's source of samples: the engines, with functions of the user's own or without, or a saved rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial

from slime_spec.agents.function_groups import FunctionGroups
from slime_spec.agents.hooks import one_turn
from slime_spec.agents.own import own_function, own_functions
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config
from slime_spec.interfaces import Engines
from slime_spec.rl.custom_rollouts import CustomRollouts
from slime_spec.rl.dynamic_filter import make_filter
from slime_spec.rl.function_rollouts import FunctionRollouts
from slime_spec.rl.groups import EngineGroups
from slime_spec.rl.ordered_rollouts import OrderedRollouts
from slime_spec.rl.rollout_data import load_rollout
from slime_spec.rl.rollouts import GeneratedRollouts, RolloutSource, SavedRollouts
from slime_spec.slime_sample import Args
from slime_spec.tasks.eval_prompts import EvalPrompts
from slime_spec.tasks.source import PromptSource


@contextmanager
def rollout_source(
    config: Config, prompts: PromptSource, tokenizer: Tokenizer, engines: Engines | None
) -> Iterator[RolloutSource]:
    """Yield the source that the settings name; leaving the context ends what it started."""
    custom, args = config.custom, Args(**by_flag(config))
    post_process = own_function(custom, "reward_post_process")
    with ExitStack() as parts:
        if engines is None:
            template = config.run.load_debug_rollout_data
            assert template is not None, "checks.py refuses train_only without saved rollouts"
            source: RolloutSource = SavedRollouts(partial(load_rollout, template))
            sample_filter = rollout_log = None
        else:
            source = _generating(config, prompts, tokenizer, engines, args, parts)
            sample_filter, rollout_log = own_function(custom, "sample_filter"), own_function(custom, "rollout_log")
        if any(each is not None for each in (sample_filter, post_process, rollout_log)):
            source = CustomRollouts(source, args, sample_filter, post_process, rollout_log)
        yield source


@contextmanager
def own_evaluation_sources(
    config: Config, sets: Sequence[EvalPrompts], tokenizer: Tokenizer, engines: Engines
) -> Iterator[Mapping[str, RolloutSource]]:
    """Yield what makes each set's samples by the user's function; nothing where the settings name none."""
    with ExitStack() as parts:
        sources: dict[str, RolloutSource] = {}
        for each in sets if config.custom.makes_samples else ():
            rollout = replace(each.rollout, batch_size=len(each.prompts), over_sampling_batch_size=None)
            of_set = replace(config, rollout=rollout, run=replace(config.run, seed=each.seed))
            groups = _function_groups(of_set, tokenizer, evaluates=True)
            source = OrderedRollouts(of_set, engines, each.take, each.source.score, groups)
            sources[each.name] = parts.enter_context(closing(source))
        yield sources


def _generating(
    config: Config, prompts: PromptSource, tokenizer: Tokenizer, engines: Engines, args: Args, parts: ExitStack
) -> RolloutSource:
    custom = config.custom
    if (rollout := own_function(custom, "rollout")) is not None:
        choose = own_function(custom, "buffer_filter")
        return FunctionRollouts(config, engines, prompts.take, rollout, tokenizer, args, choose)
    if not custom.makes_samples and custom.dynamic_filter is None:
        return GeneratedRollouts(config, engines, prompts.take, prompts.score)
    groups = _function_groups(config, tokenizer) if custom.makes_samples else EngineGroups(config)
    name, dynamic_filter = custom.dynamic_filter, None
    if name is not None:
        dynamic_filter = make_filter(name, own_function(custom, "dynamic_filter"), args)
    source = OrderedRollouts(config, engines, prompts.take, prompts.score, groups, dynamic_filter)
    return parts.enter_context(closing(source))


def _function_groups(config: Config, tokenizer: Tokenizer, evaluates: bool = False) -> FunctionGroups:
    generate = own_function(config.custom, "generate") or one_turn
    hooks = own_functions(config.custom, "sample_hooks")
    return FunctionGroups(config, generate, tokenizer, evaluates=evaluates, hooks=hooks)
