"""Small answers to draw."""

from collections.abc import Callable

import pytest

from qstar_jax.evaluation.scored import ScoredResponse


@pytest.fixture
def respond() -> Callable[..., ScoredResponse]:
    """Makes an answer out of pieces and rewards; the other numbers follow from these and can be told apart."""

    def make(pieces, rewards, *, role="answer", row=0, prompt="Say it.", truncated=False) -> ScoredResponse:
        beta, count = 0.1, len(pieces)
        ref_logp = tuple(-1.0 - 0.12 * index for index in range(count))
        logp = tuple(ref + reward / beta for ref, reward in zip(ref_logp, rewards, strict=True))
        v = tuple(2.0 + 0.25 * index for index in range(count))
        return ScoredResponse(
            row=row,
            role=role,
            prompt=prompt,
            pieces=tuple(pieces),
            token_ids=tuple(range(100, 100 + count)),
            logp=logp,
            ref_logp=ref_logp,
            reward=tuple(rewards),
            q=tuple(beta * lp + value for lp, value in zip(logp, v, strict=True)),
            v=v,
            truncated=truncated,
            beta=beta,
        )

    return make
