"""How closely our logits and texts agree with what transformers says."""

from collections.abc import Sequence

import numpy as np

from sarathi_jax.request import Logprob, RequestOutput, SamplingParams
from tests.forward import PagedModel
from tests.golden_file import TOLERANCE, Expected
from tests.tiny_models import NUM_DECODES

TOP = 20
GREEDY = SamplingParams(
    max_tokens=NUM_DECODES + 1,
    temperature=0,
    ignore_eos=True,
    detokenize=False,
    logprobs=TOP,
    prompt_logprobs=TOP,
)
"""One token more than the oracle drew, so that the logits after `NUM_DECODES` steps are used as well."""

ENGINE = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "block_size": 16, "progress": False}
"""How the engine serves a tiny model; the budget is the test's matter."""


def longest_first(expected: Sequence[Expected]) -> list[Expected]:
    """The prompts, longest first: any number of leading ones has a text longer than the window."""
    return sorted(expected, key=lambda one: -one.prompt_length)


def forward_error(model: PagedModel, expected: Sequence[Expected], chunk_size: int) -> float:
    """Largest error of the logits, relative to their scale, with all texts in one batch.

    Also checks the greedy tokens that the logits imply.

    Args:
      model: the model, ready to run.
      expected: at most `tests.forward.MAX_SEQS` texts.
      chunk_size: most tokens of a text in a step.
    """
    logits = model.logits([one.tokens for one in expected], [one.prompt_length for one in expected], chunk_size)
    for one, ours in zip(expected, logits, strict=True):
        assert ours.shape[0] == len(one.tokens)
        assert np.argmax(ours[one.prompt_length - 1 : -1], axis=-1).tolist() == one.greedy
    return max(one.error_of(ours) for one, ours in zip(expected, logits, strict=True))


def check_outputs(outputs: Sequence[RequestOutput], expected: Sequence[Expected]) -> None:
    """Asserts that the engine, asked with `GREEDY`, drew the oracle's tokens with the oracle's probabilities.

    Args:
      outputs: of the engine, one a text.
      expected: what the oracle says, in the same order.
    """
    for output, one in zip(outputs, expected, strict=True):
        assert list(output.prompt_token_ids) == one.prompt
        (completion,) = output.outputs
        assert list(completion.token_ids[:NUM_DECODES]) == one.greedy
        assert output.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        # Entry i of both lists together is the distribution of token i, given by the logits at position i - 1.
        reported = [*output.prompt_logprobs, *completion.logprobs]
        assert len(reported) == len(one.tokens) + 1
        for position, logits in zip(one.positions, one.logits, strict=True):
            drawn = [*one.tokens, completion.token_ids[-1]][position + 1]
            _check_logprobs(reported[position + 1], logits, drawn, np.abs(one.logits).max())


def _check_logprobs(reported: dict[int, Logprob] | None, logits: np.ndarray, drawn: int, scale: float) -> None:
    """The drawn token and the `TOP` likeliest are there, each with its log-probability."""
    assert reported is not None
    assert drawn in reported
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    for token, entry in reported.items():
        assert abs(entry.logprob - logprobs[token]) <= TOLERANCE * scale
    best = sorted((entry.logprob for entry in reported.values()), reverse=True)[:TOP]
    np.testing.assert_allclose(best, np.sort(logprobs)[::-1][:TOP], rtol=0, atol=TOLERANCE * scale)
