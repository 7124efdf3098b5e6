"""Everyday requests are mixed into a draft's corpus, so that the draft is useful beyond its task."""

from __future__ import annotations

import random

_SUBJECTS = (
    "the tides", "a bicycle", "baking bread", "the moon", "learning a language", "a small garden", "thunderstorms",
    "saving money", "public libraries", "photography", "the human heart", "volcanoes", "a good night's sleep",
    "train travel", "bees", "the printing press", "chess", "healthy breakfasts", "electric cars", "old maps",
    "running a marathon", "the ocean floor", "a job interview", "recycling", "jazz music", "the Roman Empire",
    "computer programming", "a city park", "writing letters", "the water cycle", "mountain hiking", "making coffee",
    "the alphabet", "solar panels", "a school play", "dogs", "deserts", "time management", "the stock market",
    "origami", "fractions", "rainforests", "a birthday party", "dinosaurs", "the internet", "knitting", "black holes",
    "farming", "a neighbourhood meeting", "vaccines", "poetry", "bridges", "playing the piano", "the seasons",
    "a lost key", "gravity", "street food", "teamwork", "owls", "a rainy weekend",
)  # fmt: skip
_REQUESTS = (
    "Explain {} in simple words.",
    "Give me three tips about {}.",
    "Write a short story about {}.",
    "What are the most important facts about {}?",
    "Write a short poem about {}.",
    "What is a common mistake people make with {}?",
    "Summarize the history of {} in a few sentences.",
    "List five questions a child might ask about {}.",
    "Why do people care about {}?",
    "Write an email to a friend about {}.",
    "How would you start learning about {}?",
    "Compare {} with something similar.",
    "Write a dialogue between two people about {}.",
    "What are the advantages and disadvantages of {}?",
    "Describe {} to someone who has never heard of it.",
    "Make a plan for a one-hour lesson on {}.",
    "Write a Python function whose name has to do with {}.",
    "What would happen without {}?",
)


def chat_prompts(seed: int) -> list[str]:
    """Return every request about every subject, in an order drawn from ``seed``."""
    prompts = [request.format(subject) for request in _REQUESTS for subject in _SUBJECTS]
    random.Random(f"{seed}/chat").shuffle(prompts)
    return prompts
