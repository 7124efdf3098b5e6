"""The likeliest tokens at each emitted token are those of the distribution that the token was judged by."""

import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.logprobs import LogprobRecord, Wanted
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.ranking import RankingVerifier
from rollout.embedded.verification.reference import adjust_reference
from rollout.embedded.verification.verifier import VerifyRow
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import target_only
from slime_spec.types import SamplingParams

VOCAB = 12
EOS = frozenset({11})
PROMPT = (1, 2, 3, 4)


def test_each_token_of_an_accepted_path_is_ranked_by_its_own_node() -> None:
    """A tree beside a plain row that asks for nothing; penalties, bias, minimum length and temperature apply."""
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    bias = ((0, -1e30), (5, 1.0), (8, 2.0))
    params = SamplingParams(
        temperature=0.7,
        presence_penalty=0.4,
        repetition_penalty=1.3,
        min_new_tokens=9,
        stop_token_ids=(7,),
        logit_bias=bias,
    )
    # Two siblings, and a child of the second: the root's greedy choice leads down the second branch.
    logits[1, 8], logits[3, 9] = 50.0, 50.0
    tree = Draft((6, 8, 9), (-1, -1, 1))
    wanting = VerifyRow(tree, params, Uniforms(0, 99), [*PROMPT, 5], len(PROMPT), wanted=Wanted(4))
    plain = VerifyRow(NO_DRAFT, SamplingParams(), Uniforms(1, 99), PROMPT, len(PROMPT))
    verifier = RankingVerifier(RuleVerifier(target_only, EOS), EOS)
    unranked, verified = verifier(logits[:5], [plain, wanting])
    assert unranked.beside == ()
    assert verified.path == (1, 2)
    assert len(verified.beside) == len(verified.token_ids) == 3
    for place, node in enumerate((1, 3, 4)):
        generated = [5, *verified.token_ids[:place]]
        slow = adjust_reference(logits[node], params, PROMPT, generated, EOS) / params.temperature
        values, token_ids = slow.log_softmax(-1).topk(4)
        assert [token_id for _, token_id in verified.beside[place].ranked] == token_ids.tolist()
        torch.testing.assert_close(
            torch.tensor([logprob for logprob, _ in verified.beside[place].ranked]),
            values.float(),
            atol=1e-5,
            rtol=1e-5,
        )
        at = dict((token_id, logprob) for logprob, token_id in verified.beside[place].ranked)
        if verified.token_ids[place] in at:
            assert abs(at[verified.token_ids[place]] - verified.logprobs[place]) < 1e-5


def test_a_prompt_that_is_computed_again_from_its_start_is_scored_once() -> None:
    """As after a preemption: what is known is not read again, and chunks need not end where they did."""
    states = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1))
    prompt = (3, 1, 4, 1, 5, 9, 2, 6, 5)
    whole, again = LogprobRecord(Wanted(2), of_prompt=True), LogprobRecord(Wanted(2), of_prompt=True)
    whole.read_prompt(0, states, prompt, lambda each: each)
    for start, end in ((0, 5), (0, 3), (3, 7), (7, 9)):
        again.read_prompt(start, states[start:end], prompt, lambda each: each)
    expected = [float(states[place].log_softmax(-1)[token]) for place, token in enumerate(prompt[1:])]
    torch.testing.assert_close(torch.tensor(whole.prompt), torch.tensor(expected))
    assert again.prompt == whole.prompt
    assert again.prompt_ranked == whole.prompt_ranked
    assert [row[0][1] for row in whole.prompt_ranked] == states[:8].argmax(-1).tolist()
