"""Any function `(params, tokens) -> logits` as a model, in whatever library its network was written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.errors import InputError
from qstar_jax.models.head import Head
from qstar_jax.models.masks import PackedMask
from qstar_jax.shapes import show_shape


@dataclass(frozen=True, init=False)
class FunctionModel:
    """A causal language model that is given as a function; searches, scores and losses take it like a `CausalLM`.

    Without a cache, every new token of a search runs its whole text again, and all logits of a batch are in memory at
    once: meant for research on small models.

    Attributes:
        apply: A pure function of parameters, any pytree, and token ids [B, S] that returns the logits of the next
            token at every position, [B, S, V]. Logits may depend on no later token: texts are padded at the end.
    """

    apply: Callable[[Any, Int[Array, "B S"]], Float[Array, "B S V"]]
    lora: ClassVar[None] = None

    def __init__(self, apply: Callable[[Any, Int[Array, "B S"]], Float[Array, "B S V"]], *others: Any):
        """Refuses what is no function, and what comes beside it."""
        if others or not callable(apply):
            found = ", ".join(_kind(value) for value in (apply, *others))
            raise InputError(
                f"FunctionModel got {found}: expected a function (params, tokens) -> logits; parameters are not part "
                "of it, and follow the model in calls: score_tokens(model, params, ...)"
            )
        object.__setattr__(self, "apply", apply)

    @property
    def base(self) -> "FunctionModel":
        """The model without an adapter: itself."""
        return self

    def head(self, params: Any) -> Head:
        """Returns a head without a table: what `hidden_states` returns are logits already."""
        return Head(table=None)

    def hidden_states(
        self, params: Any, tokens: Int[Array, "N S"], positions: Int[Array, "N S"], mask: PackedMask
    ) -> Float[Array, "N S V"]:
        """Computes the logits at every slot of packed sequences, text by text.

        Texts with a token that is none of the V get NaN.

        Raises:
            ValueError: The batch does not list its texts, or is sharded.
        """
        texts = mask.texts
        if texts is None or texts.shards > 1:
            raise ValueError(
                "a FunctionModel reads one text after the other: make its batches with `token_batch`, or with "
                "`Shapes.of(..., texts=True)` for one device"
            )
        rows = jnp.where(texts.slots >= 0, tokens.reshape(-1)[texts.slots], 0)
        logits = self.logits(params, rows)
        # A slot that several texts share has the same logits in each: their tokens up to there are the same.
        places = jnp.maximum(texts.places.max(-1), 0)
        # Gather from beyond the end, which is NaN, where the function may have clamped a token.
        unknown = (rows >= logits.shape[-1]).any(-1)[places // rows.shape[1]]
        flat = logits.reshape(-1, logits.shape[-1])
        return flat.at[jnp.where(unknown, len(flat), places)].get(mode="fill", fill_value=jnp.nan)

    def logits(self, params: Any, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Calls the function, and checks the shape of what it returns while it is traced.

        Raises:
            InputError: It returned no logits at every position.
        """
        try:
            logits = self.apply(params, tokens)
        except Exception as error:
            error.add_note(
                f"FunctionModel called its function as function(params, tokens): params are {_kind(params)}, tokens "
                f"{tokens.dtype} {show_shape(tokens.shape)}"
            )
            raise
        shape = getattr(logits, "shape", None)
        if shape is None or len(shape) != 3 or shape[:2] != tokens.shape:
            found = _kind(logits) if shape is None else show_shape(shape)
            raise InputError(
                f"FunctionModel: its function returned {found} for tokens {show_shape(tokens.shape)}; expected "
                f"{show_shape((*tokens.shape, 'V'))}, the logits of the next token at every position"
            )
        return logits

    def prefill(
        self, params: Any, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B V"], "TextMemory"]:
        """See `decoding.policies.Policy`."""
        logits = self.logits(params, prompts)
        last = jnp.take_along_axis(logits, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, TextMemory(prompts, prompt_lengths, jnp.zeros((len(prompts), slots), prompts.dtype))

    def extend(
        self,
        params: Any,
        memory: "TextMemory",
        tokens: Int[Array, "B K"],
        path: Bool[Array, "B K M"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K V"], "TextMemory"]:
        """See `decoding.policies.Policy`."""
        pool = jax.lax.dynamic_update_slice(memory.pool, tokens.astype(memory.pool.dtype), (0, slot))
        memory = replace(memory, pool=pool)
        texts, lengths = memory.texts(path)
        logits = self.logits(params, texts.reshape(-1, texts.shape[-1]))
        logits = logits.reshape(*texts.shape, -1)
        return jnp.take_along_axis(logits, (lengths - 1)[..., None, None], axis=2)[:, :, 0], memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextMemory:
    """The tokens of B prompts, and of M pool slots after each.

    Attributes:
        prompts: Right-padded. Shape [B, P].
        prompt_lengths: Shape [B].
        pool: Shape [B, M].
    """

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    pool: Int[Array, "B M"]

    def reorder(self, slots: Int[Array, "B N"]) -> "TextMemory":
        """Moves the pool: slot n of the new pool holds what slot `slots[:, n]` of this one holds."""
        return replace(self, pool=jnp.take_along_axis(self.pool, slots, axis=1))

    def texts(self, path: Bool[Array, "B K M"]) -> tuple[Int[Array, "B K L"], Int[Array, "B K"]]:
        """Spells out K paths through the pool.

        Returns:
            Prompt and path, right-padded to L = P + M tokens, and their lengths.
        """
        width = self.prompts.shape[1]
        size = width + self.pool.shape[1]
        inside = jnp.arange(width) < self.prompt_lengths[:, None]
        prompts = jnp.pad(jnp.where(inside, self.prompts, 0), ((0, 0), (0, size - width)))
        # The i-th token of a path follows the prompt at distance i; slots off the path go nowhere.
        place = self.prompt_lengths[:, None, None] + jnp.cumsum(path, axis=-1) - 1
        place = jnp.where(path, place, size)
        rows, paths = jnp.ogrid[: path.shape[0], : path.shape[1]]
        texts = jnp.broadcast_to(prompts[:, None], (*path.shape[:2], size))
        texts = texts.at[rows[..., None], paths[..., None], place].set(self.pool[:, None], mode="drop")
        return texts, self.prompt_lengths[:, None] + path.sum(-1)


def check_model(model: Any, method: str):
    """Refuses what is no model.

    Args:
        model: What was passed as one.
        method: A method that models have.

    Raises:
        InputError: It has no such method; says how a function becomes a model.
    """
    if hasattr(model, method):
        return
    fix = "the model comes first, its parameters second"
    if callable(model):
        fix = "wrap a function (params, tokens) -> logits in FunctionModel(function)"
    raise InputError(f"the model is {_kind(model)}: expected a CausalLM or a FunctionModel; {fix}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
