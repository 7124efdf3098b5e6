"""The table lists every metric: name, unit, meaning. A name that is not in the table cannot be logged."""

from __future__ import annotations

import re
from functools import lru_cache

from slime_spec.errors import ConfigError
from slime_spec.metrics.evaluation_table import EVALUATION_ROWS
from slime_spec.metrics.metric import Metric
from slime_spec.suggest import did_you_mean

TABLE = (
    Metric("rollout/reward_mean", "reward", "Mean reward of the step's scored samples."),
    Metric("rollout/reward_mean/{task}", "reward", "Mean reward of the scored samples of one task."),
    Metric("rollout/reward_std", "reward", "Standard deviation (population) of the scored samples' rewards."),
    Metric(
        "rollout/mixed_group_ratio",
        "share",
        "Prompts whose samples' rewards differ, over prompts with a scored sample; the others teach nothing where a "
        "prompt's samples are compared.",
    ),
    Metric(
        "rollout/response_len_mean",
        "tokens",
        "Mean response length of all samples; a token that does not count in the loss, such as a tool's result, does "
        "not count here (slime's effective length).",
    ),
    Metric("rollout/response_len_max", "tokens", "Longest response, counted in the same way."),
    Metric("rollout/prompt_len_mean", "tokens", "Mean prompt length of all samples."),
    Metric("rollout/truncated_ratio", "share", "Responses cut at max_response_len, over all responses."),
    Metric("rollout/num_samples", "samples", "Samples generated."),
    Metric(
        "rollout/num_excluded",
        "samples",
        "Samples without a reward (it failed, or the function that generates did, or the response was aborted).",
    ),
    Metric("rollout/num_tokens", "tokens", "Response tokens that the engines generated."),
    Metric("rollout/turns_mean", "turns", "Mean turns of a sample; with --custom-generate-function-path."),
    Metric(
        "rollout/loss_token_share",
        "share",
        "Response tokens that count in the loss; with --custom-generate-function-path.",
    ),
    Metric(
        "rollout/outside_time_mean",
        "s",
        "Mean time of a sample's function without a turn that it waits for, such as a tool's.",
    ),
    Metric(
        "rollout/cached_prompt_share",
        "share",
        "Tokens that turns were asked with whose KV the engine had, over all of them: of the prompt and earlier turns.",
    ),
    Metric(
        "rollout/dynamic_filter/drop_{reason}",
        "groups",
        "Groups that --dynamic-sampling-filter-path dropped, by the reason that the filter gave.",
    ),
    Metric("rollout/weight_version_min", "version", "Oldest weights that generated one of the step's samples."),
    Metric("rollout/weight_version_max", "version", "Newest weights that generated one of the step's samples."),
    Metric(
        "rollout/spec_accept_rate",
        "share",
        "Accepted draft tokens over proposed ones, both summed over all requests; absent where nothing was proposed.",
    ),
    Metric(
        "rollout/spec_accept_length",
        "tokens/round",
        "Response tokens over verify rounds, both summed over the requests with a verify round (SGLang's formula: the "
        "prefill's token and the bonus tokens count); absent where there was no round.",
    ),
    Metric("spec/verify_rounds", "rounds", "Verify rounds of all requests (a prefill is not a round)."),
    Metric(
        "spec/proposed_drafts",
        "tokens",
        "Rounds times (num_draft_tokens - 1): SGLang's convention, whether or not so many were drafted.",
    ),
    Metric("spec/drafted_tokens", "tokens", "Draft tokens that were really proposed and verified."),
    Metric("spec/empty_rounds", "rounds", "Verify rounds in which nothing was drafted."),
    Metric(
        "spec/nonfinite_rounds",
        "rounds",
        "Verify rounds whose draft ended early, or was empty, as the draft model's logits were not finite numbers: "
        "it overflows the engine's dtype, or its weights are damaged. The output stays exact.",
    ),
    Metric("spec/correct_drafts", "tokens", "Draft tokens accepted, bonus tokens excluded."),
    Metric(
        "spec/accept_rate_drafted",
        "share",
        "Accepted draft tokens over drafted ones, both summed over all requests; absent where nothing was drafted.",
    ),
    Metric(
        "spec/accept_rate_pos_{i}",
        "share",
        "Conditional: rounds that accepted draft position i over rounds that accepted every position before it, and "
        "drafted so far where the engine decides how deep to draft, which may verify the likelier tokens alone.",
    ),
    Metric(
        "spec/accept_rate_cum_pos_{i}",
        "share",
        "Cumulative: rounds that accepted draft position i over all rounds, as if all had drafted so far.",
    ),
    Metric(
        "spec/accept_length_by_version/{version}",
        "tokens/round",
        "rollout/spec_accept_length of the samples whose oldest weights are of this version; in steps with several.",
    ),
    Metric(
        "spec/sudden_drop",
        "0 or 1",
        "1: rollout/spec_accept_length fell by more than 15 % from the step before, which is no drift of the policy: "
        "look for a fault of the weight sync first. Of the plug-in for slime and miles.",
    ),
    Metric(
        "spec/draft_version_lag",
        "versions",
        "Mean of the target's version less the draft's, over the samples with a verify round; absent for a draft "
        "without weights.",
    ),
    Metric(
        "spec/lossy_ratio",
        "share",
        "Samples whose verification may have bent the policy's distribution (an acceptance threshold below 1), over "
        "the samples with a verify round; absent where there was no round.",
    ),
    Metric(
        "spec/break_even_length",
        "tokens/round",
        "Time of the step's rounds with drafts over that of one plain decode step of the same batch for each, by the "
        "engine's measured costs: speculation pays above it. The log of a run on embedded engines has it by batch, "
        "context and draft length, as timed at the start. Of an SGLang engine only where its requests can opt out of "
        "speculation (sglang.md).",
    ),
    Metric(
        "spec/net_speedup_est",
        "x",
        "Time that plain decoding would have taken for the tokens of all rounds of the step, by the engine's measured "
        "costs at the batches that the same samples would have had, over the time that the rounds took; plain steps "
        "count on both sides. Below 1 speculation costs more than it saves. Prefill and waiting are not in it. An "
        "SGLang engine compares both in turns between rollouts where its requests can opt out; elsewhere nothing can "
        "be compared, and it is absent.",
    ),
    Metric(
        "spec/net_speedup_err",
        "x",
        "What spec/net_speedup_est may be off by: the recent error of the predicted times of passes, on its rounds "
        "with drafts; of an SGLang engine the standard errors of what it measured in turns, and of the accept length.",
    ),
    Metric(
        "spec/off_ratio",
        "share",
        "Plain steps that the engine chose, or took as no text had a draft, over these and rounds; absent where none.",
    ),
    Metric(
        "spec/pays_up_to_batch",
        "sequences",
        "The most sequences at once at which drafting pays by the costs and the acceptance known now, the least of all "
        "engines; 0 where it pays nowhere. Where the engine decides how deep to draft.",
    ),
    Metric(
        "spec/draft_temperature",
        "x",
        "Temperature of sampled drafts at the step's end over the requests' own, the mean of the engines; it falls as "
        "the policy sharpens, where the embedded engine chooses it.",
    ),
    Metric(
        "engine/speculating",
        "share",
        "Engines that speculate, over all engines; it falls where a canary's alarm has disabled speculation.",
    ),
    Metric(
        "engine/restarts",
        "restarts",
        "Servers and engine processes that replaced one that died, hung or had lost its draft, since the start.",
    ),
    Metric(
        "engine/draft_resends",
        "times",
        "Drafts given to an engine again because they were lost or refused, since the start.",
    ),
    Metric(
        "engine/interruptions",
        "times",
        "Samples that a server refused (a full queue), aborted by itself or lost, and that went on, since the start.",
    ),
    Metric(
        "engine/preemptions",
        "times",
        "Sequences whose KV the embedded engine gave up for lack of room, since the start.",
    ),
    *EVALUATION_ROWS,
    Metric("perf/eval_time", "s", "Generating and scoring the evaluation's samples; not in perf/step_time."),
    Metric("perf/rollout_time", "s", "Generating and scoring the step's samples."),
    Metric("perf/train_time", "s", "Policy training, from the batch to the last optimizer step."),
    Metric("perf/sync_time", "s", "Pushing the weights to every engine."),
    Metric("perf/step_time", "s", "The whole step."),
    Metric("perf/tokens_per_s", "tokens/s", "Response tokens that the engines generated over rollout time."),
    Metric(
        "perf/train_tokens_per_s",
        "tokens/s",
        "Prompt and response tokens of scored samples, trained on or not, over train time.",
    ),
    Metric(
        "perf/engine_forward_share",
        "share",
        "Of the time the engines worked during the step, that in the target's forward; where they time it.",
    ),
    Metric("perf/engine_draft_share", "share", "Likewise, the time in the drafter."),
    Metric("perf/request_latency_mean", "s", "Mean time of a response, from its request to its last token."),
    Metric("perf/request_latency_max", "s", "Time of the slowest response: the tail that the step waits for."),
    Metric("train/loss", "loss", "The loss that was minimised, a mean by algorithm.loss_mean."),
    Metric("train/pg_loss", "loss", "Its policy gradient part."),
    Metric(
        "train/kl_loss",
        "nats/token",
        "KL to the reference, over the tokens of train/entropy; 0 unless in the loss or --use-kl-loss.",
    ),
    Metric("train/reward_kl", "nats/token", "KL to the reference that --kl-coef took from rewards, over all tokens."),
    Metric("train/lr", "rate", "Learning rate of the step's last optimizer step."),
    Metric(
        "train/tis",
        "ratio",
        "Trainer's over rollout's probability of a token before --use-tis bounds it, over the tokens of train/entropy.",
    ),
    Metric("train/tis_clipfrac", "share", "Tokens whose ratio was truncated, or masked, over the same tokens."),
    Metric("train/tis_abs", "ratio", "Mean |ratio - 1| over the same tokens."),
    Metric("train/grad_norm", "norm", "Gradient norm before clipping."),
    Metric(
        "train/entropy",
        "nats/token",
        "Entropy of the policy at the trained tokens (train/trained_token_share), or at all response tokens with "
        "trainer.metrics_of_all_samples; absent where there are none.",
    ),
    Metric(
        "train/clip_fraction",
        "share",
        "Response tokens whose importance ratio was clipped; those with advantage 0 never are.",
    ),
    Metric(
        "train/train_rollout_logprob_abs_diff",
        "nats/token",
        "Mean |trainer's logprob - rollout's logprob| before the step, at the same tokens as train/entropy.",
    ),
    Metric(
        "train/routing_disagreement",
        "share",
        "Choices (a token's experts in a layer) of --use-rollout-routing-replay that are not the set which the "
        "trainer's router would have chosen, over all replayed ones; prompts count.",
    ),
    Metric(
        "train/num_tokens",
        "tokens",
        "Response tokens that the loss is a mean over: those with loss_mask 0 do not count.",
    ),
    Metric(
        "train/trained_token_share",
        "share",
        "Tokens of train/num_tokens that took a forward and backward pass. The others have advantage 0 (a group of "
        "equal rewards) and no gradient; 1 with a KL or entropy in the loss, which pull at every token.",
    ),
    Metric("train/num_optimizer_steps", "steps", "Optimizer steps of this rollout."),
    Metric("train/num_microbatches", "microbatches", "Packed microbatches of this rollout that one rank trained on."),
    Metric("train/draft_loss", "loss", "The draft's loss over its updates of the step (--draft-loss, all positions)."),
    Metric("train/draft_grad_norm", "norm", "Gradient norm of the draft before clipping, mean over its updates."),
    Metric(
        "train/draft_accept_pos_{i}",
        "share",
        "Probability that rejection sampling accepts draft position i, teacher-forced: mean Σ min(p, q) over the rows "
        "of the replies learned from, each as the draft was before it first learned from it.",
    ),
    Metric(
        "train/draft_accuracy_pos_{i}", "share", "Likewise, rows whose likeliest token at position i is the policy's."
    ),
    Metric(
        "train/draft_accept_length/{rule}",
        "tokens/round",
        "Tokens per round, bonus included, that an engine would get of these replies which samples drafts of "
        "--draft-ttt-length tokens at draft temperature 1, by rule of verification: exact, no draft is drawn.",
    ),
    Metric("spec/draft_update", "0 or 1", "1: the draft was to learn from this step (--draft-update-policy)."),
    Metric(
        "spec/draft_update_saving",
        "s",
        "What the rollouts of the next --draft-update-horizon steps were expected to save by an update; 0 where that "
        "is not asked.",
    ),
    Metric("spec/draft_update_cost", "s", "What an update of the draft takes, training and push; 0 before the first."),
    Metric("train/draft_updates", "updates", "Optimizer steps of the draft in this step."),
    Metric(
        "train/draft_skipped_updates",
        "updates",
        "Optimizer steps of the draft that were left out, as their gradient was not finite; the policy goes on.",
    ),
    Metric("perf/draft_train_time", "s", "Training the draft, within perf/train_time."),
    Metric("perf/draft_sync_time", "s", "Pushing the draft to every engine."),
    Metric(
        "sync/draft_pushed",
        "0 or 1",
        "1: every engine drafts with the trainer's draft of this version; 0: the push failed, and they go on with the "
        "draft before.",
    ),
    Metric("sync/draft_bytes", "bytes", "Draft weights sent to each engine."),
    Metric("sync/seconds", "s", "Time of the push, from begin to the last engine's commit."),
    Metric("sync/bytes", "bytes", "Weights sent to each engine."),
    Metric("sync/bytes_per_s", "bytes/s", "Weights sent to each engine over the push's time."),
    Metric("sync/tensors", "tensors", "Tensors sent to each engine."),
    Metric(
        "sync/checksum_ok",
        "0 or 1",
        "1: the weights every engine computes with, read back after the commit, have the trainer's checksum (a push "
        "that differs fails the run); absent with push.verify=false, and where a server shows nothing to compare.",
    ),
    Metric("sync/verify_seconds", "s", "Reading the engines' weights back and comparing, after the push."),
    Metric(
        "sync/canary_accept_length",
        "tokens/round",
        "1 + drafts accepted per verify round of the SGLang engines' canaries (sglang_server.canary_prompts, greedy) "
        "after the push, pooled over the engines; absent where none ran.",
    ),
    Metric("sync/canary_accept_length_min", "tokens/round", "That of the engine with the lowest."),
    Metric("sync/paused_s", "s", "Time the engines paused generation for the push; absent without push.pause_mode."),
    Metric("sync/weight_version", "version", "Version of the weights that every engine now serves."),
)
PLACEHOLDERS = {
    r"\{reason\}": r"[^/]+",
    r"\{i\}": r"\d+",
    r"\{k\}": r"\d+",
    r"\{set\}": r"[^/]+",
    r"\{task\}": r"[^/]+",
    r"\{rule\}": r"[a-z]+",
    r"\{version\}": r"\d+",
}


@lru_cache(maxsize=1024)
def metric(name: str) -> Metric:
    """Return the row of a metric's name; raises ConfigError with the nearest known name where there is none."""
    for row in TABLE:
        if _pattern(row).fullmatch(name):
            return row
    hint = did_you_mean(name, [row.name for row in TABLE], repr)
    raise ConfigError("metrics", "must be rows of slime_spec/metrics/table.py", name, f"{hint}A new name needs a row.")


@lru_cache(maxsize=len(TABLE))
def _pattern(row: Metric) -> re.Pattern[str]:
    pattern = re.escape(row.name)
    for placeholder, values in PLACEHOLDERS.items():
        pattern = pattern.replace(placeholder, values)
    return re.compile(pattern)


def markdown() -> str:
    """Return docs/metrics.md: the table, one section per name's first part."""
    parts = [
        "# Metrics",
        "",
        "Written by `python scripts/make_metrics_doc.py` from `slime_spec/metrics/table.py`. The console, "
        "`metrics.jsonl`, `report.html`, wandb and TensorBoard use these names and say the same.",
        "A metric that has no value in a step (an acceptance rate without speculation) is absent, not zero. Ratios are "
        "pooled: a sum over a sum, never a mean of ratios.",
    ]
    for section in dict.fromkeys(row.name.partition("/")[0] for row in TABLE):
        parts += ["", f"## {section}/", "", "| name | unit | meaning |", "|---|---|---|"]
        rows = [row for row in TABLE if row.name.partition("/")[0] == section]
        parts += [f"| `{row.name}` | {row.unit} | {row.meaning.replace('|', chr(92) + '|')} |" for row in rows]
    return "\n".join(parts) + "\n"
