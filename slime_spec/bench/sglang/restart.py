"""Kill a server while it generates, and measure the time to the next token and the lost replies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from slime_spec.bench.prompts import Prompts
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.sglang.exactness import exactly
from slime_spec.bench.sglang.push import SIDES
from slime_spec.bench.sglang.replies import Samples, prompts_of
from slime_spec.bench.sglang.servers import Server, started
from slime_spec.bench.sglang.settings import drafting, engine_settings, place
from slime_spec.bench.sglang.weights import disturbed, draft_weights, target_weights
from slime_spec.interfaces import Generation
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

# Other weights than the checkpoints', to detect a server that restarts with the checkpoints' weights.
DISTURBANCE = 0.02
KILL_AT = 0.5  # of the time that the replies take undisturbed


@dataclass(frozen=True)
class Recovery:
    """Holds the replies without and with a kill of the server (None: lost), and the share of weights that came back.

    ``share_restored`` is of all tensors of both sides. Seconds count from the kill.
    """

    undisturbed: Samples
    during: Sequence[GeneratedSample | None]
    share_restored: float
    first_token_s: float
    last_reply_s: float


def measure(options: BenchOptions) -> list[Row]:
    prompts, algorithm = prompts_of(options), drafting(options)
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, algorithm, prompts, len(prompts), Path(log))
        with started(config) as server:
            server.push(disturbed(target_weights(config), DISTURBANCE, options.seeds[0]), "target")
            server.push(disturbed(draft_weights(config), DISTURBANCE, options.seeds[0]), "draft")
            return recovery_rows(options, recover(server, prompts, options.num_new_tokens))


def recover(server: Server, prompts: Prompts, num_new_tokens: int) -> Recovery:
    """Kill the server while it replies to the prompts."""
    server.greedy(prompts, num_new_tokens)  # the first requests of a server are slow
    server.forget()
    start = perf_counter()
    undisturbed = server.greedy(prompts, num_new_tokens)
    usual_s = perf_counter() - start
    server.forget()
    sums = [server.checksums(side) for side in SIDES]
    params = SamplingParams(num_new_tokens, temperature=0.0, ignore_eos=True)
    generations = [server.engine.generate(GroupRequest(f"r{i}", ids, (0,), params)) for i, ids in enumerate(prompts)]
    time.sleep(KILL_AT * usual_s)
    killed = perf_counter()
    server.kill()
    server.greedy(prompts[:1], 1)
    first_token_s = perf_counter() - killed
    during = [_reply(generation) for generation in generations]
    last_reply_s = perf_counter() - killed
    again = [server.checksums(side) for side in SIDES]
    same = [now[name] == then[name] for now, then in zip(again, sums, strict=True) for name in then]
    return Recovery(undisturbed, during, sum(same) / len(same), first_token_s, last_reply_s)


def _reply(generation: Generation) -> GeneratedSample | None:
    """Return the group's only sample; None where the engine failed to generate it."""
    try:
        (sample,) = generation
    except RuntimeError:
        return None
    return sample


def recovery_rows(options: BenchOptions, found: Recovery) -> list[Row]:
    arrived, count = [sample for sample in found.during if sample is not None], len(found.during)
    num_whole = sum(len(sample.token_ids) == options.num_new_tokens for sample in arrived)
    # The rounds of a dead server are unknown: a reply that was resumed after it has no counters.
    num_interrupted = count - sum(sample.spec.num_rounds > 0 for sample in arrived)
    pairs = zip(found.during, found.undisturbed, strict=True)
    same = sum(one is not None and one.token_ids == other.token_ids for one, other in pairs) / count
    where, of_all = f"on {place(options)}", f"of {count} replies, those that"
    restored = "tensors of both sides that the new server has as they were pushed"
    return [
        Row("restart.first_token_s", f"from the kill to a new request's token, {where}", found.first_token_s, "s"),
        Row("restart.last_reply_s", f"from the kill to the last interrupted reply, {where}", found.last_reply_s, "s"),
        at_least("restart.interrupted", f"{of_all} the kill interrupted", num_interrupted, "replies", 1),
        at_most("restart.lost", f"{of_all} did not arrive whole", count - num_whole, "replies", 0),
        exactly(options, "restart.equal", f"{of_all} equal the undisturbed ones, token for token", same),
        at_least("restart.weights", restored, found.share_restored, "share", 1.0),
    ]
