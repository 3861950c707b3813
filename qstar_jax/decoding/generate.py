"""From models and a `decode:` block to a decoder: prompts as token ids in, responses as text out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qstar_jax.config import DecodeOptions
from qstar_jax.decoding.decoder import Decoder, Generation
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.objectives import JudgedReference
from qstar_jax.decoding.options import DecodePlan, interpret
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.stop_strings import compile_stop_strings, token_texts
from qstar_jax.errors import InputError
from qstar_jax.models.causal_lm import is_unstacked
from qstar_jax.store.open import LoadedModel


@dataclass(frozen=True)
class Guide:
    """A model after and before tuning; `weight` times the difference of their log-probabilities guides a policy."""

    tuned: LoadedModel
    untuned: LoadedModel
    weight: float


def prepare(
    loaded: LoadedModel,
    plan: DecodePlan,
    mesh: Mesh,
    *,
    reference: LoadedModel | None = None,
    beta: float | None = None,
    guides: Sequence[Guide] = (),
    consume: bool = False,
) -> Decoder:
    """Makes a decoder of models and options.

    Args:
        loaded: The policy.
        plan: How to decode.
        mesh: Devices of the models.
        reference: Its reference, if the plan needs one.
        beta: Temperature of the rewards: reward per nat; only with a reference. The block's own `beta` wins.
        guides: Pairs of models that guide the policy.
        consume: Free the layers of the models as they were loaded, if decoding reads another layout.

    Returns:
        The decoder, a function of prompts.

    Raises:
        InputError: If reference or beta are missing or not needed, or the models do not know the same tokens.
    """
    block, wanted = plan.block, plan.needs_reference
    beta = beta if block.beta is None else block.beta
    if wanted != (reference is not None) or (wanted and beta is None):
        raise InputError(
            f"decode: method {block.method} with objective {block.objective} and report_reference "
            f"{block.report_reference} needs {'a' if wanted else 'no'} reference{' and beta' if wanted else ''}"
        )
    # All models must know the same tokens, of which some end a response.
    others = [reference] if wanted else [model for guide in guides for model in (guide.tuned, guide.untuned)]
    for other in others:
        _check_same_tokens(loaded, other, block.vocabulary)
    members = [loaded, *others]
    vocabulary = min(member.model.config.vocab_size for member in members)
    scored = block.vocabulary or vocabulary
    eos_ids = eos_token_ids(loaded, scored)
    if not eos_ids:
        raise InputError(f"{loaded.source}: none of the first {scored} tokens ends a response (eos_token_id)")
    delimiter_ids = _delimiter_ids(block.delimiters, loaded.tokenizer, scored, eos_ids) if block.delimiters else ()
    models = [member.model for member in members]
    params = params_for(mesh.devices.flat[0].platform, members, consume=consume)
    return Decoder(
        model=Ensemble(tuple(models)) if others else models[0],
        params=params if others else params[0],
        tokenizer=loaded.tokenizer,
        plan=plan.with_tokens(eos_ids, delimiter_ids),
        objective=plan.objective(beta, [guide.weight for guide in guides]),
        beta=beta if wanted else None,
        stop_strings=compile_stop_strings(block.stop or [], loaded.tokenizer, scored),
        vocabulary=vocabulary,
        mesh=mesh,
    )


def judge_reference(decoder: Decoder) -> Decoder:
    """Lets the reference of a decoder write, while its policy only judges: prefixes compete by their implicit reward.

    Args:
        decoder: One whose objective is `implicit_reward`.
    """
    return replace(decoder, objective=JudgedReference(decoder.beta), beta=None)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    options: DecodeOptions,
    mesh: Mesh,
    *,
    rows: Sequence[int] | None = None,
    **models: Any,
) -> list[list[Generation]]:
    """Decodes one batch of prompts; for several, `prepare` a decoder once.

    Args:
        loaded: Model, parameters and tokenizer.
        prompts: Token ids of each prompt, at least one each.
        options: How to decode.
        mesh: Devices of the model.
        rows: See `Decoder`.
        **models: `reference`, `beta` and `guides` of `prepare`.

    Returns:
        `options.return_sequences` responses per prompt, or as many as there are; best first after a search.

    Raises:
        InputError: If the options do not go together.
    """
    plan = interpret(options, len(models.get("guides", ())))
    return prepare(loaded, plan, mesh, **models)(prompts, rows)


def params_for(platform: str, members: Sequence[LoadedModel], *, consume: bool) -> tuple[Any, ...]:
    """Returns parameters in the layout that decodes best on a platform; members that share theirs still do.

    On CPUs and GPUs that is one dictionary per layer, as XLA copies each slice of a stack there: compiled for an H100,
    five beams of a Llama of 1B read and write half as much, with half as many kernels. A TPU reads slices in place, and
    its compiler takes 20 to 40 s for a stack of 30 layers, but more than ten minutes for 30 separate ones.
    """
    if platform == "tpu":
        return tuple(member.params for member in members)
    unstacked = {}
    for member in members:
        if id(member.params) not in unstacked:
            unstacked[id(member.params)] = _unstack(member.model, member.params)
            if consume and not is_unstacked(member.params):  # otherwise these arrays are the result
                jax.tree.map(lambda x: x.delete(), member.params["layers"])
    return tuple(unstacked[id(member.params)] for member in members)


@partial(jax.jit, static_argnums=0)
def _unstack(model: Any, params: Any) -> Any:
    return model.unstack(params)


def _check_same_tokens(loaded: LoadedModel, other: LoadedModel, vocabulary: int | None):
    sizes = [member.model.config.vocab_size for member in (loaded, other)]
    if vocabulary is None and sizes[0] != sizes[1]:
        raise InputError(
            f"{other.source} has a vocabulary of {sizes[1]} tokens, and {loaded.source} one of {sizes[0]}; only pairs "
            f"can differ: if the first {min(sizes)} mean the same, say so by --decode.vocabulary {min(sizes)}"
        )
    if vocabulary is not None and vocabulary > min(sizes):
        raise InputError(
            f"decode: vocabulary {vocabulary} is larger than that of {other.source} or {loaded.source}, {min(sizes)}"
        )
    ids = list(range(vocabulary or sizes[0]))
    tokens = [member.tokenizer.convert_ids_to_tokens(ids) for member in (loaded, other)]
    for i, token, other_token in zip(ids, *tokens, strict=True):
        if token != other_token:
            raise InputError(
                f"{other.source} has another tokenizer than {loaded.source}: token {i} is {other_token!r} there, not "
                f"{token!r}; models that are compared token by token need the same"
            )


def _delimiter_ids(
    delimiters: Sequence[str], tokenizer: Any, vocabulary: int, eos_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """Finds the tokens whose text ends with a delimiter."""
    texts, delimiter_ids = token_texts(tokenizer, vocabulary), set()
    for delimiter in delimiters:
        ends = {i for i, text in enumerate(texts) if delimiter and text.endswith(delimiter)} - set(eos_ids)
        if not ends:
            raise InputError(
                f"decode: delimiters: no token ends with {delimiter!r}; a chunk ends after one token, so name a short "
                "string, such as a line break"
            )
        delimiter_ids |= ends
    return tuple(sorted(delimiter_ids))
