"""Reward models in Hugging Face's form: a language model whose last hidden state is multiplied by one vector."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.console import say, track
from qstar_jax.data.chat_templates import ChatTemplate
from qstar_jax.data.columns import Messages, Turns
from qstar_jax.data.dropped import DroppedRow
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import check_vocabulary, tokenize
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.masks import PackedMask
from qstar_jax.sharding import BATCH, use_mesh
from qstar_jax.store import hub
from qstar_jax.store.hub.reader import TensorFiles
from qstar_jax.store.open import param_shardings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX, HEAD = "ForSequenceClassification", "score.weight"
_MULTIPLE = 64  # texts are padded to multiples of it, so that few programs are compiled


@dataclass(frozen=True)
class ClassifierReward:
    """The score of (prompt, response) by a sequence classifier with one label.

    Texts are read as prompt, response and EOS; with `data.as_chat`, as the chat template renders the conversation:
    that is how such models are trained and used.

    Args:
        model: The language model below the head.
        params: Its parameters.
        head: The vector of the head. Shape [D].
        tokenizer: Its tokenizer.
        pad_id: `pad_token_id` of its config.json.
        data: `as_chat`, `max_length` and (without chats) `max_prompt_length` are read.
        batch_size: Responses scored at once; (data * fsdp) of the mesh must divide it.
        mesh: Devices of the model.
        console: Where to show progress, and counts of truncated and unreadable texts; None: nowhere.
        block: Name of its options, for errors.
    """

    model: CausalLM
    params: Params
    head: Float[Array, " D"]
    tokenizer: "PreTrainedTokenizerBase"
    pad_id: int | None
    data: DataOptions
    batch_size: int
    mesh: Mesh
    console: Console | None = None
    block: str = "judge"

    @classmethod
    def load(cls, folder: Path, compute: ComputeOptions, mesh_options: MeshOptions, **more) -> "ClassifierReward":
        """Reads a folder for which `is_classifier` holds.

        Args:
            folder: A Hugging Face folder.
            compute: Dtypes.
            mesh_options: How parameters are sharded.
            **more: `data` and what follows it.

        Raises:
            InputError: If it has another number of labels, or parts that are not built here.
        """
        config = hub.read_config(folder)
        labels = len(config.get("id2label") or ()) or config.get("num_labels") or 2  # transformers leaves two unsaid
        if labels != 1:
            raise InputError(f"{folder}: a classifier with {labels} labels is no reward model; expected one label")
        # There is no unembedding in the folder, and none is needed; a tied one has no parameters of its own.
        model = CausalLM.from_hf(config | {"tie_word_embeddings": True}, compute)
        params = hub.read_params(
            folder, model, param_shardings(model, more["mesh"], mesh_options), besides=(HEAD, "lm_head.weight")
        )
        head = np.asarray(TensorFiles(folder).get(HEAD, (1, model.config.hidden_size))[:], np.float32)[0]
        head = jax.device_put(head, NamedSharding(more["mesh"], PartitionSpec()))
        return cls(model, params, head, hub.read_tokenizer(folder), config.get("pad_token_id"), **more)

    def __call__(self, pairs: Sequence[tuple[Turns, str]]) -> list[float]:
        """Scores (prompt, response) pairs; NaN where one cannot be tokenized."""
        ids = self._encode(pairs)
        longest = max(map(len, ids.values()), default=0)
        if warning := self.model.check_length(longest, f"the longest text for {self.block}.model"):
            say(self.console, warning)
        rewards = [math.nan] * len(pairs)
        order = sorted(ids, key=lambda row: len(ids[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        score = _compiled(
            self.model, NamedSharding(self.mesh, PartitionSpec())
        )  # so that every host can read the result
        with use_mesh(self.mesh, self.model.compute.dtype):
            for rows in track(self.console, batches, "judging", len(batches)):
                arrays = jax.device_put(self._arrays([ids[row] for row in rows]), NamedSharding(self.mesh, BATCH))
                values = jax.device_get(score(self.params, self.head, *arrays))
                for row, value in zip(rows, values, strict=False):  # padding rows come last
                    rewards[row] = float(value)
        return rewards

    def _arrays(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE
        tokens = np.zeros((self.batch_size, width), np.int32)
        lengths, last = np.zeros((2, self.batch_size), np.int32)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], lengths[i] = ids, len(ids)
            # As transformers does it: with pad = EOS, the head was trained on the token before the EOS.
            last[i] = max(np.flatnonzero(ids != self.pad_id), default=0) if self.pad_id is not None else len(ids) - 1
        return tokens, lengths, last

    def _encode(self, pairs: Sequence[tuple[Turns, str]]) -> dict[int, np.ndarray]:
        """Token ids by row, without those that cannot be read."""
        if self.data.as_chat:
            ids, truncated, dropped = self._encode_chats(pairs)
        else:
            records = [Record(prompt, (answer,), row) for row, (prompt, answer) in enumerate(pairs)]
            more = {"vocabulary": self.model.config.vocab_size, "source": f"{self.block}.model, text of"}
            examples, unused = tokenize(records, self.tokenizer, self.data, **more)
            ids = {e.row: np.concatenate([e.prompt, e.responses[0].ids]) for e in examples}
            truncated, dropped = sum(e.responses[0].truncated for e in examples), [one.reason for one in unused]
        if dropped:
            say(self.console, f"no reward for {len(pairs) - len(ids)} responses: {', '.join(sorted(set(dropped)))}")
        if truncated:
            part = "chats lost their beginning" if self.data.as_chat else "responses were truncated"
            say(self.console, f"{truncated} of {len(ids)} {part}: they exceed {self.block}.max_length")
        return ids

    def _encode_chats(self, pairs: Sequence[tuple[Turns, str]]) -> tuple[dict[int, np.ndarray], int, list[str]]:
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.block}.as_chat: the reward model's tokenizer has no chat template; leave it off")
        template = ChatTemplate.find(self.tokenizer, self.data)
        ids, truncated, dropped, longest = {}, 0, [], self.data.max_length
        for row, (prompt, answer) in enumerate(pairs):
            messages = [message for turn in as_messages(prompt, answer) for message in turn]
            try:
                text = template(messages)
            except DroppedRow as reason:
                dropped.append(str(reason))
                continue
            text_ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            check_vocabulary(
                text_ids, self.model.config.vocab_size, self.tokenizer, f"{self.block}.model, text of row {row + 1}"
            )
            truncated += len(text_ids) > longest
            ids[row] = np.asarray(text_ids[-longest:], np.int32)
        return ids, truncated, dropped


def is_classifier(folder: Path) -> bool:
    """Whether config.json of a folder names a sequence classifier."""
    if hub.is_adapter(folder):
        return False
    return any(str(name).endswith(SUFFIX) for name in hub.read_config(folder).get("architectures") or ())


def as_messages(prompt: Turns, answer: str) -> tuple[Messages, Messages]:
    """Wraps a prompt as a user's message, unless it is messages already, and a response as the assistant's."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return asked, [{"role": "assistant", "content": answer}]


@cache
def _compiled(model: CausalLM, sharding: NamedSharding) -> Callable[..., Array]:
    """The program that scores, kept for further calls."""
    return jax.jit(partial(_scores, model), out_shardings=sharding)


def _scores(
    model: CausalLM,
    params: Params,
    head: Float[Array, " D"],
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    last: Int[Array, " B"],
) -> Float[Array, " B"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden_states(params, tokens, positions, PackedMask.of_lengths(lengths, tokens.shape[1]))
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return pooled.astype(jnp.float32) @ head
