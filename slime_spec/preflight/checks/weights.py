"""These checks test that the draft survives pushes and memory release, which SGLang's version and transport decide."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed_version

from slime_spec.preflight.checks.distribution import has_reduced_vocabulary
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, trap
from slime_spec.sglang.releases import SELECTOR, since
from slime_spec.transports.choice import OBJECT_STORE, server_update, transport_name

NEWER = f"SGLang {since(SELECTOR)} or newer"


def pushing(facts: Facts) -> bool:
    return facts.knows_servers and facts.trains_with_pushes and not facts.config.sglang_server.external_addrs


def pushing_beside_a_draft(facts: Facts) -> bool:
    return facts.knows_servers and facts.trains_with_pushes and facts.draft is not None


def _transport(facts: Facts) -> str:
    """Return how a push reaches a server."""
    return server_update(facts.config)


def _ways(facts: Facts) -> dict[str, str]:
    """Return by flag how weights reach servers: those of a push that goes straight there have another flag."""
    config = facts.config
    to_replaced = {"--sglang-weight-transport": config.sglang_server.transport}
    return (
        to_replaced
        if transport_name(config) == OBJECT_STORE
        else {"--push-transport": _transport(facts), **to_replaced}
    )


def _instead(flags: Iterable[str], transport: str) -> tuple[str, ...]:
    """Return the words that have weights reach servers as ``transport`` in place of what the flags say."""
    other = {"--push-transport": OBJECT_STORE, "--sglang-weight-transport": transport}
    return tuple(word for flag in flags for word in (flag, other[flag]))


@trap(
    "draft-overwritten",
    "Without a way to say whom an update is for, SGLang loads the target's tensors into the draft as well. Layers of "
    "an external draft share names with the target's: same shapes are overwritten in silence (accept length 2.71 "
    "became 1.00), others end the server.",
    "https://github.com/THUDM/slime/issues/1177",
    "https://github.com/radixark/miles/issues/1926",
    "28257",
    applies=pushing_beside_a_draft,
)
def draft_overwritten(facts: Facts) -> Sighting | None:
    contract = facts.release.weight_contract
    unsafe = {
        flag: transport
        for flag, transport in _ways(facts).items()
        if transport == "disk" or (transport in contract.reaches_draft and transport not in contract.selective)
    }
    if facts.draft_kind == "in_target" or not unsafe:
        return None
    transport = next(iter(unsafe.values()))
    fix = _instead(unsafe, "tensor" if "tensor" in contract.selective else "distributed")
    return Sighting(
        Severity.ERROR,
        f"SGLang {facts.release.text} ({contract.name}) loads a {transport} update into target and external draft"
        if transport in contract.reaches_draft
        else "an update from disk has no side, and the engine sends none beside a draft of its own",
        f"Pass {' '.join(fix)}{'' if contract.draft_alone else f', or use {NEWER}'}.",
        fix,
    )


@trap(
    "disk-reduced-vocabulary",
    "A disk update loads the policy's checkpoint into every runner: a draft with a reduced vocabulary fails an "
    "assertion on the embedding's size, outside of any handler, and the server ends.",
    "28257",
    applies=pushing_beside_a_draft,
)
def disk_reduced_vocabulary(facts: Facts) -> Sighting | None:
    is_reached = "disk" in facts.release.weight_contract.reaches_draft
    if _transport(facts) != "disk" or not is_reached or not has_reduced_vocabulary(facts):
        return None
    return Sighting(
        Severity.ERROR,
        "--sglang-weight-transport disk with a draft whose vocabulary is smaller than the target's",
        "Pass --sglang-weight-transport tensor (or distributed).",
        ("--sglang-weight-transport", "tensor"),
    )


@trap(
    "draft-refresh",
    "A policy moves away from a draft that stays as it was. Whether a push can refresh the draft depends on SGLang's "
    "version and the transport: up to 0.5.20 a distributed update never reaches it; from 0.5.21 an update says "
    "whether it is for the target or the draft.",
    "27718",
    "28257",
    "28710",
    "34495",
    applies=pushing_beside_a_draft,
)
def draft_refresh(facts: Facts) -> Sighting | None:
    contract, transport = facts.release.weight_contract, _transport(facts)
    told = f"SGLang {facts.release.text} ({contract.name}), transport {transport}"
    refreshes = contract.draft_alone and transport in contract.selective
    if facts.config.trains_draft and {"dflash", "dspark"} & {*facts.config.speculative.record.families}:
        return Sighting(
            Severity.ERROR,
            f"{told}: the draft is trained, and the servers keep a copy of the key and value matrices that a block "
            "drafter began with, so that a pushed draft would be half old",
            "Drop --enable-draft-training, or pass --rollout-engine embedded.",
        )
    if facts.config.trains_draft and not refreshes:
        return Sighting(
            Severity.ERROR,
            f"{told}: the draft is trained, and no update reaches the draft alone",
            f"{'Pass --sglang-weight-transport tensor' if contract.draft_alone else f'Use {NEWER}'}, or drop "
            "--enable-draft-training.",
            ("--sglang-weight-transport", "tensor") if contract.draft_alone else (),
        )
    if transport not in contract.reaches_draft:
        # The tensor transport reaches every draft; an external draft must not take the target's tensors.
        helps = facts.draft_kind == "in_target"
        fix = _instead([flag for flag, way in _ways(facts).items() if way == transport], "tensor")
        return Sighting(
            Severity.WARNING,
            f"{told}: an update never reaches the draft",
            f"{'Pass ' + ' '.join(fix) + ', or use' if helps else 'Use'} {NEWER}.",
            fix if helps else (),
        )
    if facts.draft_kind == "in_target":
        # The draft loads its MTP tensors from the target's update, so it is refreshed only if they are pushed.
        how = "by a push of its own" if refreshes else "with the target's tensors, which this trainer does not send"
    elif refreshes:
        how = "by a push of its own"
    else:
        way = "Pass --sglang-weight-transport tensor" if contract.draft_alone else f"Use {NEWER}"
        return Sighting(
            Severity.WARNING,
            f"{told}: an external draft can be spared but not refreshed",
            f"{way} to push a draft of its own; else watch rollout/spec_accept_length.",
            ("--sglang-weight-transport", "tensor") if contract.draft_alone else (),
        )
    return Sighting(
        Severity.INFO,
        f"{told}: the draft can be refreshed {how}",
        "Nothing to do: the trainer trains the draft and pushes it."
        if facts.config.trains_draft
        else "It stays as loaded without --enable-draft-training: watch rollout/spec_accept_length.",
    )


@trap(
    "draft-lost-on-resume",
    "Between rollouts a colocated server gives its weights back; the target's are pushed again, the draft's are not. "
    "Without a copy in memory the draft resumes with whatever the pages hold: accept length 1.0 and a rollout slower "
    "than without speculation. With a copy drafts were reported lost all the same, since it is made of whole "
    "allocations (#31674).",
    "31674",
    "13268",
    "https://github.com/THUDM/slime/issues/971",
    applies=pushing_beside_a_draft,
)
def draft_lost_on_resume(facts: Facts) -> Sighting | None:
    if not (facts.flags.get("enable_memory_saver") and facts.config.cluster.colocate and facts.config.cluster.offload):
        return None
    if not facts.release.does("keeps_draft_copy"):
        return Sighting(
            Severity.ERROR,
            f"servers release memory between rollouts, and SGLang {facts.release.text} cannot keep a copy of the draft",
            f"Pass --no-offload, or use SGLang {since('keeps_draft_copy')} or newer.",
            ("--no-offload",),
        )
    if facts.flags.get("enable_draft_weights_cpu_backup"):
        return _despite_the_copy(facts)
    return Sighting(
        Severity.ERROR,
        "servers release memory between rollouts, and --enable-draft-weights-cpu-backup is off",
        "Pass --sglang-enable-draft-weights-cpu-backup, or --no-offload.",
        ("--sglang-enable-draft-weights-cpu-backup",),
    )


def _despite_the_copy(facts: Facts) -> Sighting:
    read = f"servers release memory between rollouts and keep a copy of the draft (SGLang {facts.release.text})"
    if facts.release.weight_contract.draft_alone:
        return Sighting(
            Severity.INFO,
            read,
            "Nothing to do: the engine compares the draft's checksums after each resume and mends what is lost.",
        )
    return Sighting(
        Severity.WARNING,
        read,
        "Watch rollout/spec_accept_length: this version reports no checksums of the draft. Pass --no-offload where "
        f"memory has room for both, or use {NEWER}.",
    )


@trap(
    "ngram-update",
    "The n-gram worker has no weights and does not know update calls; a disk update was seen to end it.",
    "24343",
    "35403",
    applies=pushing,
)
def ngram_update(facts: Facts) -> Sighting | None:
    record = facts.config.speculative.record
    if not record.speculates or record.has_weights or _transport(facts) != "disk":
        return None
    return Sighting(
        Severity.WARNING,
        f"--sglang-weight-transport disk with {record.name}",
        "Pass --sglang-weight-transport tensor.",
        ("--sglang-weight-transport", "tensor"),
    )


@trap(
    "torch-versions",
    "The tensor transport hands over torch's own serialised handles, which only the same torch reads.",
    "https://docs.sglang.ai/advanced_features/sglang_for_rl.html",
    applies=pushing,
)
def torch_versions(facts: Facts) -> Sighting | None:
    theirs, ours = facts.release.torch, installed_version("torch")
    fix = _instead([flag for flag, way in _ways(facts).items() if way == "tensor"], "distributed")
    if not fix or theirs is None or theirs.partition("+")[0] == ours.partition("+")[0]:
        return None
    return Sighting(
        Severity.ERROR,
        f"the servers have torch {theirs}, the trainer {ours}, and weights travel as tensors",
        f"Pass {' '.join(fix)}, or give both environments one torch.",
        fix,
    )
