"""A batch from token ids, for models and tokenizers of one's own."""

from collections.abc import Sequence

import jax
import numpy as np

from qstar_jax.data.batches import Batch, make_batch
from qstar_jax.data.packing import Layout, Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError

TokenIds = Sequence[int] | np.ndarray | jax.Array
_LARGEST = np.iinfo(np.int32).max


def token_batch(
    prompts: Sequence[TokenIds], responses: Sequence[Sequence[TokenIds]], *, layout: Layout = "packed"
) -> Batch:
    """Packs prompts and their responses into what `score_tokens` and training steps read.

    Args:
        prompts: Token ids of each of B prompts, at least one each.
        responses: Token ids of the R responses to each prompt, EOS included: (chosen, rejected), or a ranking, best
            first.
        layout: How prompts and responses share sequences; it changes no number.

    Returns:
        The batch. Scores of it have shape [B, R, T], T being the tokens of the longest response, rounded up. An id that
        the model does not have makes them NaN.

    Raises:
        InputError: A prompt or a response is empty or is no list of token ids, or there are not as many responses to
            each.
    """
    if len(prompts) != len(responses) or not len(prompts):
        raise InputError(f"{len(prompts)} prompts, and responses to {len(responses)}; expected responses to each")
    examples = []
    for row, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
        if isinstance(several, str) or not hasattr(several, "__len__") or not len(several):
            raise InputError(f"responses[{row}] is {several!r}: expected the token ids of each response, in a list")
        ids = [_token_ids(f"responses[{row}][{place}]", response) for place, response in enumerate(several)]
        prompt_ids = _token_ids(f"prompts[{row}]", prompt)
        examples.append(Example(prompt_ids, False, tuple(Response(x, False) for x in ids), row))
    if counts := {len(example.responses) for example in examples} - {len(examples[0].responses)}:
        row = next(i for i, example in enumerate(examples) if len(example.responses) in counts)
        raise InputError(
            f"{len(examples[row].responses)} responses to prompt {row}, and {len(examples[0].responses)} to prompt 0; "
            "expected as many to each"
        )
    shapes = Shapes.of(examples, layout, batch_size=len(examples), texts=True)
    return make_batch(examples, shapes)


def _token_ids(name: str, given: TokenIds) -> np.ndarray:
    """Reads the ids of one text, of which numpy would accept more than is meant."""
    expected = "expected a list of token ids, whole numbers from 0 on"
    try:
        ids = np.asarray(given)
    except ValueError:  # nested lists of several lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(f"{name} is {given!r}: {expected}")
    if not ids.size:
        raise InputError(f"{name} has no token; a response has at least its EOS, and its first token follows a prompt")
    if ids.min() < 0 or ids.max() > _LARGEST:
        raise InputError(f"{name} holds {ids.min() if ids.min() < 0 else ids.max()}: {expected}")
    return ids.astype(np.int32)
