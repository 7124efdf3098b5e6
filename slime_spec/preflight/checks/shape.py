"""These checks are about the draft's shape: numbers that are unset, or that SGLang replaces or refuses."""

from __future__ import annotations

from slime_spec.algorithms import EAGLE, EAGLE3, NONE, STANDALONE
from slime_spec.checkpoints.families import head_format
from slime_spec.engines import kind_of
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, speculating, trap
from slime_spec.sglang.draft_shape import forced_draft_tokens

NAME_SIZE = "Pass --speculative-num-draft-tokens {}, or leave it out."
DOCS = "https://docs.sglang.ai/advanced_features/speculative_decoding.html"


@trap(
    "auto-shape",
    "With all three numbers unset SGLang chooses by the target's architecture, for one request at a time, not for a "
    f"rollout's batches: (5, 4, 8) for Llama and Grok, (3, 1, 4) for the others and for {STANDALONE.name}.",
    DOCS,
    applies=speculating,
)
def auto_shape(facts: Facts) -> Sighting | None:
    spec, shape = facts.config.speculative, facts.shape
    has_rule = kind_of(facts.config).has_servers  # the embedded engine decides round by round
    if not has_rule or not spec.record.has_numbers or spec.num_steps is not None:
        return None
    return Sighting(
        Severity.INFO,
        f"no shape is given: {facts.target.architecture} with {spec.algorithm} gets num_steps {shape.num_steps}, "
        f"topk {shape.topk}, {shape.num_draft_tokens} draft tokens",
        "Name them, so that a new version's rule changes nothing.",
        (
            *("--speculative-num-steps", str(shape.num_steps), "--speculative-eagle-topk", str(shape.topk)),
            *("--speculative-num-draft-tokens", str(shape.num_draft_tokens)),
        ),
    )


@trap(
    "chain-tokens",
    "A chain (topk 1) of S steps is verified as S + 1 tokens; SGLang replaces any other number with a log line.",
    DOCS,
    applies=speculating,
)
def chain_tokens(facts: Facts) -> Sighting | None:
    forced = forced_draft_tokens(facts.config.speculative)
    if forced is None:
        return None
    return Sighting(
        Severity.INFO,
        f"--speculative-num-draft-tokens {facts.config.speculative.num_draft_tokens} becomes {forced}",
        f"Pass --speculative-num-draft-tokens {forced}, or --speculative-eagle-topk 2 for a tree.",
        ("--speculative-num-draft-tokens", str(forced)),
    )


@trap(
    "block-size",
    "A block drafter learned blocks of one size; SGLang runs it over blocks of another with a log line, and drafts are "
    "accepted less.",
    DOCS,
    applies=speculating,
)
def block_size(facts: Facts) -> Sighting | None:
    asked = facts.config.speculative.num_draft_tokens
    draft_format = None if facts.draft is None else head_format(facts.draft.architecture)
    if facts.draft is None or draft_format is None or draft_format.num_block_drafts is None or asked is None:
        return None
    num_drafts = draft_format.num_block_drafts(facts.draft.config)
    size = asked if num_drafts is None else num_drafts + 1
    if asked == size:
        return None
    if facts.on_sglang:
        rule = f"the draft's blocks have {size} tokens and the servers run {asked}"
        return Sighting(Severity.WARNING, rule, NAME_SIZE.format(size), ("--speculative-num-draft-tokens", str(size)))
    if asked < size:
        return None  # the embedded engine runs whole blocks, and verifies as many tokens as it is asked for
    rule = f"a round verifies {size} tokens at most, the draft's block, and not {asked}"
    return Sighting(Severity.INFO, rule, NAME_SIZE.format(size), ("--speculative-num-draft-tokens", str(size)))


@trap(
    "adaptive",
    f"Adaptive speculation works for chains of {EAGLE.name} and {EAGLE3.name} on plain servers; elsewhere SGLang "
    "switches it off with a log line and goes on with fixed numbers.",
    DOCS,
)
def adaptive(facts: Facts) -> Sighting | None:
    if not facts.flags.get("speculative_adaptive"):
        return None
    reasons = _against_adaptive(facts)
    if not reasons:
        return None
    return Sighting(
        Severity.WARNING,
        f"--speculative-adaptive has no effect: {', '.join(reasons)}",
        "Drop --speculative-adaptive, or remove what stands against it.",
        ("--no-speculative-adaptive",),
    )


def _against_adaptive(facts: Facts) -> list[str]:
    """Return what keeps a server from adaptive speculation."""
    spec, reasons = facts.config.speculative, []
    if not spec.record.runs_as_eagle:
        reasons.append(f"the algorithm is {spec.algorithm}")
    if (spec.eagle_topk or 1) > 1:
        reasons.append(f"topk is {spec.eagle_topk}")
    reasons += [
        f"--sglang-{dest.replace('_', '-')} is on"
        for dest in ("enable_dp_attention", "enable_multi_layer_eagle", "enable_two_batch_overlap", "enable_pdmux")
        if facts.flags.get(dest)
    ]
    if not facts.release.adaptive_steps:
        reasons.append(f"SGLang {facts.release.text} does not have it")
    return reasons


@trap(
    "adaptive-on-cpu",
    "At its start adaptive speculation captures a graph for each depth. On a CPU no attention backend can: the server "
    "ends with NotImplementedError, unless graphs are disabled.",
    DOCS,
)
def adaptive_on_cpu(facts: Facts) -> Sighting | None:
    is_off = facts.flags.get("disable_cuda_graph") or facts.flags.get("cuda_graph_backend_decode") == "disabled"
    if facts.on_gpu or is_off or not facts.flags.get("speculative_adaptive") or _against_adaptive(facts):
        return None
    return Sighting(
        Severity.ERROR,
        "--speculative-adaptive on a CPU, without --sglang-disable-cuda-graph",
        "Pass --sglang-disable-cuda-graph.",
        ("--sglang-disable-cuda-graph",),
    )


@trap(
    "speculation-control",
    "Drafts that pay for one sequence cost more than they bring for many. The embedded engine decides in every round. "
    "SGLang's requests cannot opt out, as far as its versions were read (the engine tries it on the running server: "
    "where they can, it decides between rollouts, and reports spec/net_speedup_est), and a running server has no "
    "switch. From 0.5.14 on it has a table of batches for chains, which can draft nothing for large ones.",
    "30263",
    "https://docs.sglang.io/advanced_features/adaptive_speculative_decoding.html",
)
def speculation_control(facts: Facts) -> Sighting | None:
    unknown = "spec/net_speedup_est is absent: no rollout without drafts is there to compare with"
    reasons = _against_adaptive(facts)
    if facts.release.adaptive_steps and not facts.release.does("drafts_by_batch"):
        reasons.append(f"SGLang {facts.release.text} has no table of batches")
    if reasons:
        return Sighting(
            Severity.INFO,
            f"SGLang {facts.release.text} drafts at every batch, whether that pays or not "
            f"({', '.join(reasons)}); {unknown}",
            f"Compare with --speculative-algorithm {NONE.name} at the run's batch: part speed of bench sglang.",
        )
    if facts.flags.get("speculative_adaptive"):
        return Sighting(
            Severity.INFO,
            f"SGLang {facts.release.text} drafts by its table of batches; {unknown}",
            "Nothing to do; --speculative-adaptive-config FILE gives the table, e.g. "
            '{"1": {"candidate_steps": [1, 3]}, "32": {"candidate_steps": [0]}}.',
        )
    return Sighting(
        Severity.INFO,
        f"SGLang {facts.release.text} could draft by a table of batches and was not asked to: it drafts at every "
        f"batch, whether that pays or not; {unknown}",
        "Pass --speculative-adaptive (no drafts from 64 sequences at once), with a table of your own where measured.",
        ("--speculative-adaptive",),
    )


@trap(
    "adaptive-steps",
    "Adaptive speculation moves between candidate numbers of steps and has to start at one of them: from 0.5.14 on the "
    "server refuses any other, before that it starts elsewhere.",
    DOCS,
)
def adaptive_steps(facts: Facts) -> Sighting | None:
    num_steps = facts.config.speculative.num_steps
    if not facts.flags.get("speculative_adaptive") or facts.flags.get("speculative_adaptive_config"):
        return None
    candidates = facts.release.adaptive_steps
    if num_steps is None or not candidates or num_steps in candidates:
        return None
    nearest = max(number for number in candidates if number < num_steps)
    return Sighting(
        Severity.ERROR if facts.release.does("refuses_other_adaptive_steps") else Severity.WARNING,
        f"--speculative-adaptive with num_steps {num_steps}; SGLang {facts.release.text} has "
        f"{', '.join(map(str, candidates))}",
        f"Pass --speculative-num-steps {nearest} --speculative-num-draft-tokens {nearest + 1}, or candidates of your "
        "own with --speculative-adaptive-config.",
        ("--speculative-num-steps", str(nearest), "--speculative-num-draft-tokens", str(nearest + 1)),
    )
