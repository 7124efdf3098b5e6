"""What the engines are asked: ordinary questions, and requests whose reply repeats the prompt."""

from __future__ import annotations

from pathlib import Path

from slime_spec.hf.tokenizer import Tokenizer

ORDINARY = (
    "Why do leaves change colour in autumn?",
    "Give me three tips for learning to cook.",
    "How does a bicycle stay upright?",
    "Describe a quiet morning by the sea.",
    "What should I pack for a week in the mountains?",
    "Explain to a child what a volcano is.",
    "Write a short letter thanking a neighbour for their help.",
    "What makes bread rise, and why does it matter?",
)
_PASSAGES = (
    "The harbour opens at six. The first boat leaves for the island at seven, the second at nine, and the last one "
    "at noon. Tickets are sold at the blue house next to the lighthouse, and children under five travel free.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('sizes must be positive')\n"
    "    return width * height\n\n\ndef volume(width, height, depth):\n    return area(width, height) * depth",
    "Shopping list: two litres of milk, a dozen eggs, one loaf of rye bread, five hundred grams of butter, four "
    "tomatoes, a bag of rice, a jar of honey, three lemons, and a bunch of parsley.",
    "Monday: staff meeting at ten. Tuesday: visit to the new office at two. Wednesday: no appointments. Thursday: "
    "call with the printing house at eleven. Friday: monthly report due at four.",
    "Dear Ms Okafor, thank you for your letter of the third of May. We have received the documents and will answer "
    "before the end of the month. Please keep the reference number 48213 for any further questions.",
    "To reset the device, switch it off and wait ten seconds. Hold the round button, switch the device on, and keep "
    "holding the button until the green light blinks twice. Then release the button and wait one minute.",
    '{"name": "north station", "height_m": 412, "sensors": ["wind", "rain", "snow"], "active": true, '
    '"contact": "station@example.org", "inspected": "2024-09-12"}',
    "The old mill stands at the end of the lane. Nobody has ground flour there for sixty years, but the wheel still "
    "turns when the river is high, and in spring the children come to watch it turn.",
)
COPY = tuple(f"Repeat the following text exactly, word for word:\n\n{passage}" for passage in _PASSAGES)
KINDS = {"copy": COPY, "ordinary": ORDINARY}

Prompts = tuple[tuple[int, ...], ...]


def tokenized(model: Path, kind: str) -> Prompts:
    """The prompts of one kind in the model's chat template."""
    tokenizer = Tokenizer.load(model)
    return tuple(tokenizer.chat(text) for text in KINDS[kind])
