"""Measures what rules for several sampled paths bring on the real pair, at equal numbers of drafts.

    python -m tests.support.path_study --prompts 64 --seed 0

One sequence decodes at temperature 1 with chains of five, verified as blocks. At each of its rounds the draft also
draws the paths and trees of all other rules, the target's pass judges them all, and every rule is credited with the
tokens that it brings on average over its own uniforms: rules meet the same contexts, those in which rounds begin (at
any token drafts stand more often, as no draft was refused just before). What follows a text's end counts for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from unittest.mock import patch

import numpy as np
import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.step import DrafterSetup, DraftStep, DraftVocab, Heads
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.rl.requests import sample_seed
from slime_spec.tasks.builtin import SUITES, TASKS
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.path_rules import Array, Node, Prefix, Trial, block, greedy, outcomes, traversal

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
DEPTH, NUM_PATHS, PATH_LENGTH, TRUNK_PATHS = 15, 4, 4, 3
ADVANCING = "block, 5"
MAX_NEW_TOKENS = 64
# Trees whose siblings differ, by leaves: a digit a level, the number of the child. "000 1" are three tokens in a row
# and a second first token.
TREES = (
    ("00 1", "01"),
    ("0000 1", "000 01", "000 10", "000 2"),
    ("000000 1", "00000 10", "00000 2", "00000 01 1", "0000 10 2", "000 01 10 2"),
    ("0000000 100 010 20 001",),
)
GREEDY = ((0, 2, 1), (0, 3, 1), (1, 2, 1), (0, 2, 2), (1, 2, 2), (0, 2, 3), (1, 2, 3), (0, 3, 2), (0, 4, 4))
Rules = dict[str, tuple[int, list[Trial]]]  # name -> most drafts, and its trials


def addresses(leaves: str) -> set[Prefix]:
    """Return all nodes of a tree, as numbers of children, from its leaves: every node's elder siblings are there."""
    paths = [tuple(map(int, leaf)) for leaf in leaves.split()]
    return {(*path[:i], child) for path in paths for i in range(len(path)) for child in range(path[i] + 1)}


ALL_NODES = set().union(*(addresses(tree) for trees in TREES for tree in trees), addresses("0" * DEPTH))


class Drawn:
    """Draws the drafts of one round, level by level: differing siblings, independent paths, and those after a trunk.

    ``laws`` are the draft's distributions by prefix, of the draft's own token ids.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self.laws: dict[Prefix, Array] = {}
        self.tree: dict[Prefix, Prefix] = {(): ()}  # address -> tokens
        self.paths: list[Prefix] = [()] * NUM_PATHS
        self.trunk_paths: list[Prefix] = [()] * TRUNK_PATHS

    def draw(self, depth: int) -> list[Prefix]:
        """Draw the tokens at ``depth`` (1 is the first); returns the distinct prefixes that end there."""
        for parent in sorted(address for address in self.tree if len(address) == depth - 1):
            count = sum(len(node) == depth and node[:-1] == parent for node in ALL_NODES)
            if count:
                prefix = self.tree[parent]
                for child, token in enumerate(self._without_replacement(self.laws[prefix], count)):
                    self.tree[*parent, child] = (*prefix, token)
        if depth <= PATH_LENGTH:
            self.paths = [self._longer(path) for path in self.paths]
            trunk = self.tree[0,]
            self.trunk_paths = [trunk if depth == 1 else self._longer(path) for path in self.trunk_paths]
        drawn = {*self.tree.values(), *self.paths, *self.trunk_paths}
        return sorted(prefix for prefix in drawn if len(prefix) == depth)

    def _longer(self, path: Prefix) -> Prefix:
        return (*path, int(self._generator.choice(len(self.laws[path]), p=self.laws[path])))

    def _without_replacement(self, law: Array, count: int) -> list[int]:
        return self._generator.choice(len(law), size=count, replace=False, p=law).tolist()


@dataclass(frozen=True)
class StudyDraft(Draft):
    drawn: Drawn | None = None
    names: tuple[int, ...] = ()  # the target's ids of the draft's tokens


class Sampler:
    """Stands where a network grows its drafts: one sequence, all drafts of the study."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def __call__(
        self,
        setup: DrafterSetup,
        vocab: DraftVocab,
        first: Heads,
        step: DraftStep,
        next_slots: Sequence[RowSpan],
        contexts: Sequence[DraftContext],
    ) -> list[Draft]:
        (slot,), (context,), heads = next_slots, contexts, first
        if context.max_depth < DEPTH:
            return [NO_DRAFT]
        drawn = Drawn(self._generator)
        drawn.laws[()] = law(heads.logits)[0]
        above: dict[Prefix, int] = {(): 0}
        lineage: tuple[int, ...] = ()
        nodes: list[Prefix] = []
        for depth in range(1, DEPTH + 1):
            level = drawn.draw(depth)
            nodes += level
            if depth == DEPTH:
                break
            first_above = len(lineage) - len(above)
            lineage += tuple(-1 if depth == 1 else first_above + above[prefix[:-1]] for prefix in level)
            hidden = heads.hidden[[above[prefix[:-1]] for prefix in level]]
            start = slot.start + len(lineage) - len(level)
            span = replace(slot, start=start, count=len(level), parents=lineage)
            heads = step(vocab.tokens(torch.tensor([prefix[-1] for prefix in level])), hidden, [span])
            drawn.laws.update(zip(level, law(heads.logits), strict=True))
            above = {prefix: place for place, prefix in enumerate(level)}
        names = vocab.tokens(torch.arange(len(drawn.laws[()]))).tolist()
        place = {prefix: index for index, prefix in enumerate(nodes)} | {(): -1}
        tokens = tuple(names[prefix[-1]] for prefix in nodes)
        return [StudyDraft(tokens, tuple(place[prefix[:-1]] for prefix in nodes), drawn=drawn, names=tuple(names))]


def law(logits: torch.Tensor) -> Array:
    return logits.double().softmax(dim=-1).numpy()


class Judge:
    """Credits every rule at every round, and lets one of them say what is emitted."""

    lossy = takes_unread = False

    def __init__(self, generator: np.random.Generator, eos_token_ids: Iterable[int]) -> None:
        self._generator, self._ends = generator, set(eos_token_ids)
        self.brought: dict[str, list[float]] = {}
        self.most_drafts: dict[str, int] = {}
        self.emitted: list[int] = []  # by the rule that decodes, up to the end of the text

    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        verified, first = [], 0
        for row in rows:
            of_nodes = law(logits[first : first + row.num_nodes])
            verified.append(self._judge(row.draft.read(), of_nodes))
            first += row.num_nodes
        return verified

    def _judge(self, draft: Draft, of_nodes: Array) -> Verified:
        if not isinstance(draft, StudyDraft):
            return Verified([self._token(of_nodes[0])], [0.0], ())
        assert draft.drawn is not None, "the sampler says what it drew"
        names, place = np.array(draft.names), node_places(draft)

        def p(prefix: Prefix) -> Array:
            """Return the target's distribution over the draft's tokens, and as the last the mass of all others."""
            of_drafts = of_nodes[place[prefix] + 1][names]
            return np.append(of_drafts, max(0.0, 1.0 - of_drafts.sum()))

        rules = all_rules(draft.drawn, {prefix: p(prefix) for prefix in place})
        for name, (most, trials) in rules.items():
            self.most_drafts[name] = most
            tokens = sum(chance * self._num_tokens(trial.prefix, names) for trial, chance in outcomes(trials))
            self.brought.setdefault(name, []).append(tokens)
        return self._emit(rules[ADVANCING][1], names, of_nodes, place)

    def _emit(self, trials: Iterable[Trial], names: np.ndarray, of_nodes: Array, place: dict[Prefix, int]) -> Verified:
        passed = next(trial for trial in trials if self._generator.random() < trial.passes)
        last, of_target = self._token(passed.after), of_nodes[place[passed.prefix] + 1].copy()
        if last == len(names):  # one of the others, as likely as the target says
            of_target[names] = 0.0
            last = self._token(of_target)
        else:
            last = int(names[last])
        self.emitted.append(self._num_tokens(passed.prefix, names))
        path = tuple(place[passed.prefix[: i + 1]] for i in range(len(passed.prefix)))
        return Verified([*(int(names[x]) for x in passed.prefix), last], [0.0] * (len(path) + 1), path)

    def _token(self, weights: Array) -> int:
        return int(self._generator.choice(len(weights), p=weights / weights.sum()))

    def _num_tokens(self, prefix: Prefix, names: np.ndarray) -> int:
        ended = [names[x] in self._ends for x in prefix]
        return ended.index(True) + 1 if any(ended) else len(prefix) + 1


def node_places(draft: Draft) -> dict[Prefix, int]:
    """Return the place in a study's draft of every prefix, -1 for the root."""
    assert isinstance(draft, StudyDraft), "drafts of the study alone"
    number = {name: index for index, name in enumerate(draft.names)}
    paths: list[Prefix] = []
    for token, parent in zip(draft.token_ids, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), number[token]))
    return {(): -1} | {path: index for index, path in enumerate(paths)}


def all_rules(drawn: Drawn, target: dict[Prefix, Array]) -> Rules:
    """Return every rule's trials; ``target`` has the distributions after each prefix, one token wider than q's."""
    p, q = target.__getitem__, {prefix: np.append(row, 0.0) for prefix, row in drawn.laws.items()}.__getitem__
    rules: Rules = {}
    longest = drawn.tree[(0,) * DEPTH]
    for length in range(1, DEPTH + 1):
        path = longest[:length]
        trials = block(path, [p(path[:i]) for i in range(length + 1)], [q(path[:i]) for i in range(length)])
        rules[f"block, {length}"] = length, trials
    for trunk, num_paths, length in GREEDY:
        paths = [path[: trunk + length] for path in (drawn.trunk_paths if trunk else drawn.paths)[:num_paths]]
        name = f"greedy, {num_paths} paths of {length}" + (" after 1" if trunk else "")
        rules[name] = trunk + num_paths * length, greedy(paths, p, q, trunk)
    for tree in (tree for trees in TREES for tree in trees):
        nodes = addresses(tree)
        rules[f"traversal, {tree}"] = len(nodes), list(traversal(subtree(drawn, nodes, ()), p, q))
    return rules


def subtree(drawn: Drawn, nodes: set[Prefix], parent: Prefix) -> tuple[Node, ...]:
    below = sorted(node for node in nodes if node[:-1] == parent and node)
    return tuple(Node(drawn.tree[node][-1], subtree(drawn, nodes, node)) for node in below)


def measure(num_prompts: int, seed: int, dtype: str = "bfloat16") -> Judge:
    """Decode the task's prompts, one after another; returns what every rule brought, round by round."""
    speculative = SpeculativeConfig(
        algorithm="EAGLE3",
        draft_model_path="builtin:smollm2-135m-eagle3",
        num_steps=DEPTH,
        eagle_topk=8,
        num_draft_tokens=128,
    )
    engine = EngineConfig(dtype=dtype, cost_probe_interval=0, max_running_requests=1)
    config = Config(model=ModelConfig(hf_checkpoint=str(MODEL)), engine=engine, speculative=speculative)
    assembly, generator = Assembly(config), np.random.default_rng(seed)
    judge = Judge(generator, assembly.limits.eos_token_ids)
    core = assembly.core(0, process_time, verifier=judge)
    tokenizer, tasks = Tokenizer.load(MODEL), [TASKS[name] for name in SUITES["arithmetic_sentences"]]
    samples: list[GeneratedSample] = []
    with patch("rollout.embedded.drafters.feature_drafter.grow_drafts", Sampler(generator)):
        for index in range(num_prompts):
            prompt = tokenizer.chat(tasks[index % len(tasks)].problem(index // len(tasks), seed).text)
            params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)
            core.add(GroupRequest(str(index), prompt, (sample_seed(seed, index, 0),), params), samples.append)
            while core.has_work:
                core.step()
    assert len(samples) == num_prompts, "every prompt was answered"
    return judge


def table(judge: Judge) -> str:
    """Return a table in Markdown: tokens a round, and against the chain of as many drafts, with its standard error."""
    lines = ["| rule | drafts at most | tokens a round | over the chain of as many |", "|---|---:|---:|---:|"]
    for name in sorted(judge.brought, key=lambda name: (judge.most_drafts[name], name)):
        brought, most = np.array(judge.brought[name]), judge.most_drafts[name]
        chain = np.array(judge.brought[f"block, {min(most, DEPTH)}"])
        gain, error = brought.mean() / chain.mean(), (brought - chain).std() / len(chain) ** 0.5 / chain.mean()
        lines.append(f"| {name} | {most} | {brought.mean():.3f} | {gain:.3f} ± {error:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = measure(arguments.prompts, arguments.seed)
    sys.stdout.write(f"{len(study.brought[ADVANCING])} rounds\n{table(study)}\n")
