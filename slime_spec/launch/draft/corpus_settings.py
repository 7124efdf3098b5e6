"""CorpusSettings holds the settings of a draft's corpus."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LENGTH = 2048  # of a sequence of conversations, where no option says it
CORPUS_FILE = "corpus.jsonl"  # file in the folder of the draft


@dataclass(frozen=True)
class CorpusSettings:
    """Holds the settings of a corpus's prompts and of the sampling of its replies.

    Every prompt is a task's, or with probability ``chat_share`` an everyday request. With probability
    ``greedy_share`` it gets one greedy reply, otherwise ``samples_per_prompt`` replies at ``temperature``. Replies end
    where they end, as rollouts do, or after ``max_new_tokens``. With a file of ``conversations`` its replies are the
    corpus instead, each with its prompt cut after ``max_length`` tokens.
    """

    tasks: tuple[str, ...] = ("arithmetic_sentences",)
    prompt_data: str | None = None
    input_key: str = "prompt"
    num_prompts: int = 2000
    samples_per_prompt: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    greedy_share: float = 0.5
    chat_share: float = 0.05
    seed: int = 0
    conversations: str | None = None
    max_length: int | None = None
