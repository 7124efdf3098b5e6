"""The prompts of benchmarks are everyday questions, requests to repeat a text, and the main job's task."""

from __future__ import annotations

import itertools
from pathlib import Path

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.draft.training.sequence import is_held_out
from slime_spec.tasks.builtin import SUITES, TASKS

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
REPEAT = "Repeat the following text exactly, word for word:\n\n"
COPY = tuple(REPEAT + passage for passage in _PASSAGES)
# Texts of about 190 tokens that a model of this size mostly repeats. EARLIER holds the words of one place (all texts
# mention the harbour), and the words that stood there in an earlier version.
LONG_TEXTS = tuple(
    "\n\n".join(_PASSAGES[index] for index in chosen) for chosen in ((7, 0, 2, 4), (4, 5, 0, 3), (0, 5, 7, 3))
)
EARLIER = ("at the blue house next to the lighthouse", "in the old station behind the market")
KINDS = {"copy": COPY, "ordinary": ORDINARY}

Prompts = tuple[tuple[int, ...], ...]
# A problem is a function of an index: no run and no draft's corpus reaches the indices from here on. One task has
# only a hundred prompts, so whether a prompt is held out must be a property of the prompt.
FIRST_INDEX = 10_000_000
HELD_OUT_PERCENT = 5  # the default of `slime-spec draft train`


def tokenized(model: Path, kind: str) -> Prompts:
    """Return the prompts of one kind in the model's chat template."""
    tokenizer = Tokenizer.load(model)
    return tuple(tokenizer.chat(text) for text in KINDS[kind])


def in_domain(model: Path, num_prompts: int, seed: int, suite: str = "arithmetic_sentences") -> Prompts:
    """Return prompts that no draft is trained on, of a task or suite: the main job's, arithmetic answered in sentences.

    A few prompts of the main job repeat: one of the task's two kinds has about five held-out prompts.
    """
    tokenizer = Tokenizer.load(model)
    tasks = [TASKS[name] for name in SUITES.get(suite, (suite,))]
    drawn = (tokenizer.chat(tasks[i % len(tasks)].problem(i, seed).text) for i in itertools.count(FIRST_INDEX))
    return tuple(itertools.islice((ids for ids in drawn if is_held_out(ids, HELD_OUT_PERCENT)), num_prompts))


def rotating(prompts: Prompts, turn: int, count: int) -> Prompts:
    """Return ``count`` prompts, beginning one further on every turn, so that small batches see several prompts."""
    return tuple(prompts[(turn + i) % len(prompts)] for i in range(count))
