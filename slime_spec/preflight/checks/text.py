"""These checks test that the replies of a run end."""

from __future__ import annotations

from collections.abc import Iterable

from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, trap


@trap(
    "end-of-text",
    "A reply ends at a token that config.json, generation_config.json or the tokenizer names as EOS. Where the chat "
    "template closes a turn with another token, the engine goes on into an invented next turn of the user: every reply "
    "is as long as max_response_len allows, and rewards read the invented text.",
    "https://github.com/huggingface/open-r1/issues/663",
    "https://github.com/QwenLM/Qwen3/issues/927",
    applies=always,
)
def end_of_text(facts: Facts) -> Sighting | None:
    ends, rollout = facts.reply_ends, facts.config.rollout
    if ends is None:
        return None
    ending, turn = ends.token_ids.union(rollout.stop_token_ids), ends.turn
    if not ending and not rollout.stop:
        return Sighting(
            Severity.ERROR,
            "no token ends a reply: config.json, generation_config.json and the tokenizer name no EOS",
            'Write "eos_token_id" into config.json, or pass --rollout-stop-token-ids ID or --rollout-stop TEXT.',
        )
    if turn is None or not facts.config.task.apply_chat_template:
        return None
    if not ending.isdisjoint(turn.token_ids) or any(stop in turn.text for stop in rollout.stop):
        return None
    if turn.is_closed:
        closing = min(turn.special, key=turn.token_ids.index)
        return Sighting(
            Severity.ERROR,
            f"the chat template closes an assistant's turn with {turn.special[closing]} (token {closing}), and only "
            f"{_listed(ending)} end a reply",
            f"Pass --rollout-stop-token-ids {closing}, or write {closing} into generation_config.json as eos_token_id.",
            ("--rollout-stop-token-ids", *map(str, [*rollout.stop_token_ids, closing])),
        )
    return Sighting(
        Severity.INFO,
        f"the chat template writes {turn.text!r} behind a reply, which is none of the tokens that end a reply "
        f"({_listed(ending)})",
        "Nothing to do where the model was trained to write its EOS; else pass --rollout-stop TEXT.",
    )


def _listed(token_ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(token_ids))) or "stop strings"
