"""A batch from token ids, for models and tokenizers of one's own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from qstar_jax.data.batches import Batch, make_batch
from qstar_jax.data.packing import Layout, Shapes
from qstar_jax.data.tokenization import Example, Response


def token_batch(
    prompts: Sequence[ArrayLike], responses: Sequence[Sequence[ArrayLike]], *, layout: Layout = "packed"
) -> Batch:
    """Packs prompts and their responses into what `score_tokens` and training steps read.

    Args:
        prompts: Token ids of each of B prompts, at least one each.
        responses: Token ids of the R responses to each prompt, EOS included: (chosen, rejected), or a ranking, best
            first.
        layout: How prompts and responses share sequences; it changes no number.

    Returns:
        The batch. Scores of it have shape [B, R, T], T being the tokens of the longest response, rounded up.

    Raises:
        ValueError: A prompt is empty, or there are not as many responses to each.
    """
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts, and responses to {len(responses)}; expected responses to each")
    examples = []
    for row, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
        if not np.size(prompt):
            raise ValueError(f"prompt {row} has no token; the first token of a response must follow something")
        ids = [np.asarray(response, np.int32) for response in several]
        examples.append(Example(np.asarray(prompt, np.int32), False, tuple(Response(x, False) for x in ids), row))
    shapes = Shapes.of(examples, layout, batch_size=len(examples), texts=True)
    return make_batch(examples, shapes)
