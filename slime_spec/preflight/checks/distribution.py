"""These checks test that samples under speculation follow the distribution that the settings ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from slime_spec.algorithms import EAGLE3, NEXTN, NONE, listed, names
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, asking_sglang_to_speculate, speculating, trap
from slime_spec.types import is_greedy

DOCS = "https://docs.sglang.ai/advanced_features/speculative_decoding.html"
NEUTRAL: Mapping[str, float] = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}


def _samples(facts: Facts) -> bool:
    return not is_greedy(facts.config.rollout.temperature)


def _default_sampling(facts: Facts) -> Mapping[str, object]:
    """Return the sampling parameters that the servers' flags set for every request."""
    values = facts.flags.get("preferred_sampling_params") or {}
    return values if isinstance(values, Mapping) else {}


@trap(
    "rejection-sampling",
    f"SGLang verifies sampled drafts by rejection only for {listed(names(lambda each: each.runs_as_eagle), 'and')}, as "
    "chains, at thresholds of 1, on a GPU, with a draft whose head has the target's whole vocabulary; anything else "
    "ends the server at the start or in the first round.",
    "26312",
    "36516",
)
def rejection_sampling(facts: Facts) -> Sighting | None:
    spec = facts.config.speculative
    if not spec.samples_drafts:
        return None
    reasons = list(_against_rejection(facts))
    if not reasons:
        return None
    return Sighting(
        Severity.ERROR,
        f"drafts are to be sampled, but {'; '.join(reasons)}",
        "Drop --speculative-use-rejection-sampling and --speculative-use-block-verification: the default verification "
        "is exact for every draft.",
        ("--no-speculative-use-rejection-sampling", "--no-speculative-use-block-verification"),
    )


def _against_rejection(facts: Facts) -> Iterator[str]:
    spec = facts.config.speculative
    if not spec.record.runs_as_eagle:
        yield f"the algorithm is {spec.algorithm}"
    if facts.shape.topk > 1:
        yield f"topk is {facts.shape.topk}"
    if (spec.accept_threshold_single, spec.accept_threshold_acc) != (1.0, 1.0):
        yield "an acceptance threshold is not 1"
    if has_reduced_vocabulary(facts):
        yield "the draft's vocabulary is smaller than the target's"
    if spec.token_map is not None and not spec.record.has_own_head:
        yield "a token map cuts the draft's head"
    if facts.flags.get("enable_deterministic_inference"):
        yield "--sglang-enable-deterministic-inference is on"
    if not facts.on_gpu:
        yield "the servers run on the CPU"


def has_reduced_vocabulary(facts: Facts) -> bool:
    draft = facts.draft.config.get("draft_vocab_size") if facts.draft is not None else None
    return draft is not None and draft != facts.target.vocab_size


@trap(
    "accept-thresholds",
    "Below 1 the thresholds accept drafts that the target would not have drawn: samples follow neither the policy nor "
    "their logprobs. A training run refuses them; in rollouts alone every sample is marked.",
    DOCS,
    applies=speculating,
)
def accept_thresholds(facts: Facts) -> Sighting | None:
    spec = facts.config.speculative
    thresholds = spec.accept_threshold_single, spec.accept_threshold_acc
    if thresholds == (1.0, 1.0):
        return None
    return Sighting(
        Severity.WARNING,
        f"--speculative-accept-threshold-single {thresholds[0]:g}, -acc {thresholds[1]:g}",
        "Leave both at 1.",
        ("--speculative-accept-threshold-single", "1", "--speculative-accept-threshold-acc", "1"),
    )


@trap(
    "min-p",
    "SGLang's verify pass knows top-k and top-p but not min-p: tokens that min-p forbids are emitted, with logprobs "
    "as if they were allowed.",
    "10617",
    applies=asking_sglang_to_speculate,
)
def min_p(facts: Facts) -> Sighting | None:
    asked = facts.config.rollout.min_p or _default_sampling(facts).get("min_p")
    if not asked:
        return None
    return Sighting(
        Severity.ERROR,
        f"min_p {asked} with speculation",
        f"Pass --rollout-min-p 0, or --speculative-algorithm {NONE.name}.",
        ("--rollout-min-p", "0"),
    )


@trap(
    "penalties",
    "Penalties are computed once a round and not advanced along the drafted path, so every token but the first of a "
    "round sees stale ones.",
    "10617",
)
def penalties(facts: Facts) -> Sighting | None:
    asked = {name: value for name, value in _default_sampling(facts).items() if value != NEUTRAL.get(name, value)}
    if not asked:
        return None
    return Sighting(
        Severity.WARNING,
        f"--sglang-preferred-sampling-params sets {', '.join(f'{name} {value}' for name, value in asked.items())}",
        "Leave penalties out of an RL rollout: they are no part of the policy that is trained.",
    )


@trap(
    "joint-filters",
    "Without speculation SGLang cuts top-k and top-p on the same distribution; its verify pass renormalises after "
    "top-k before it cuts top-p. With both set the two distributions differ.",
    DOCS,
    applies=asking_sglang_to_speculate,
)
def joint_filters(facts: Facts) -> Sighting | None:
    rollout = facts.config.rollout
    if not _samples(facts) or rollout.top_k <= 0 or rollout.top_p == 1.0:
        return None
    return Sighting(
        Severity.WARNING,
        f"top_k {rollout.top_k} and top_p {rollout.top_p:g} with speculation",
        "Set one of them: --rollout-top-k -1, or --rollout-top-p 1.",
        ("--rollout-top-k", "-1"),
    )


@trap(
    "greedy-verify",
    "On a CPU (and on AMD without rejection sampling) SGLang verifies by argmax whatever the temperature: all samples "
    "of a prompt are the same greedy one, and nothing says so.",
    "31214",
    "32922",
    "37134",
    "39253",
)
def greedy_verify(facts: Facts) -> Sighting | None:
    if facts.on_gpu or facts.config.sglang_server.external_addrs or not _samples(facts):
        return None
    return Sighting(
        Severity.WARNING,
        f"servers on the CPU speculate at temperature {facts.config.rollout.temperature:g}",
        "Use it to test behaviour at --rollout-temperature 0; sample with --rollout-engine embedded or on a GPU.",
    )


@trap(
    "ngram-padding",
    "Trees with fewer nodes than num_draft_tokens are padded with token 0 below the root, and the sampling kernel "
    "takes each pad for a drafted token: token 0 is emitted more often than the policy would.",
    DOCS,
)
def ngram_padding(facts: Facts) -> Sighting | None:
    if facts.config.speculative.record.fills_rounds or not _samples(facts):
        return None
    config = facts.config
    return Sighting(
        Severity.WARNING,
        f"{config.speculative.algorithm} at temperature {config.rollout.temperature:g} with "
        f"{facts.shape.num_draft_tokens} draft tokens",
        f"Where token 0 is a likely token, draft with {EAGLE3.name} or {NEXTN.name}, or sample with --rollout-engine "
        "embedded, whose n-gram trees are not padded.",
    )


@trap(
    "sampling-seed",
    "Up to 0.5.16 a verify pass draws from the engine's own generator: a request's seed has no effect under "
    "speculation, and a rollout cannot be repeated.",
    "https://github.com/radixark/miles/issues/2002",
    "30822",
)
def sampling_seed(facts: Facts) -> Sighting | None:
    if facts.release.does("seeds_verify") or not _samples(facts) or not facts.on_gpu:
        return None
    return Sighting(
        Severity.INFO,
        f"SGLang {facts.release.text} speculates at temperature {facts.config.rollout.temperature:g}",
        "Use a newer SGLang where rollouts must be repeatable.",
    )
