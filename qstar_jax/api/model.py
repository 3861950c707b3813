"""A model with its tokenizer, its reference and its devices: what `load` returns."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from qstar_jax.api.results import Answers, Scores
from qstar_jax.config import ComputeOptions, DataOptions, DecodeOptions, MeshOptions
from qstar_jax.config.compute import Dtype
from qstar_jax.console import visible
from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import Dataset
from qstar_jax.data.preferences import completion_records, prompt_records
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import resolve_date, tokenize
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import prepare
from qstar_jax.decoding.generations_file import prompt_texts
from qstar_jax.decoding.options import interpret
from qstar_jax.errors import InputError
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import IDENTICAL, are_identical, find_beta, open_reference
from qstar_jax.store.user_cache import keep_programs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNLIMITED = 2**30  # tokens


def load(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    beta: float | None = None,
    dtype: Dtype = "float32",
    compute: ComputeOptions | None = None,
    mesh: MeshOptions = MeshOptions(),
) -> "Model":
    """Opens a model; by default on all devices.

    Args:
        source: Folder of a run or of one of its checkpoints, a Hugging Face folder, the folder of a PEFT adapter, or a
            name on the Hub.
        reference: The model that scores compare it with, in any of these forms; None: that of its run, if it has one.
        beta: Temperature of the rewards: reward per nat; None: that of its run.
        dtype: Dtype of parameters and matrix products; sums, log-probabilities and scores are always float32.
        compute: All options of the computation, instead of `dtype`.
        mesh: How the parameters are sharded over the devices.

    Raises:
        InputError: There is no usable model, or `dtype` contradicts `compute`.
    """
    if compute is not None and dtype not in ("float32", compute.dtype):
        raise InputError(f"dtype {dtype!r} and compute.dtype {compute.dtype!r} contradict each other; leave one out")
    keep_programs()
    compute = compute or ComputeOptions(param_dtype=dtype, dtype=dtype)
    devices = make_mesh(mesh)
    with use_mesh(devices, compute.dtype):
        loaded = load_model(source, compute, devices, mesh)
    return Model(str(source), loaded, compute, mesh, devices, None if reference is None else str(reference), beta)


@dataclass(frozen=True)
class Model:
    """A language model that answers, and whose logits are read as Q-values. `load` makes it.

    Attributes:
        source: What it was loaded from.
        loaded: The model, its parameters and its tokenizer.
        compute: Options of the computation.
        mesh_options: How parameters are sharded.
        mesh: The devices.
        reference: The reference that `load` was given.
        beta: The beta that `load` was given.
    """

    source: str
    loaded: LoadedModel = field(repr=False)
    compute: ComputeOptions = field(repr=False)
    mesh_options: MeshOptions = field(repr=False)
    mesh: Mesh = field(repr=False)
    reference: str | None = None
    beta: float | None = None

    @property
    def params(self) -> Params:
        """The parameters, a dictionary of arrays."""
        return self.loaded.params

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The Hugging Face tokenizer."""
        return self.loaded.tokenizer

    def logits(self, tokens: Int[ArrayLike, "*B S"] | Sequence[int]) -> Float[Array, "*B S V"]:
        """Computes the logits of the next token at every position: Q-values, in units of beta (Eq. 5).

        Args:
            tokens: Token ids of one text [S], or of several of the same length [B, S].

        Returns:
            Float32 logits. Shape [S, V] or [B, S, V].
        """
        tokens = jnp.asarray(tokens)
        with self._mesh():
            logits = _logits(self.loaded.model, self.params, jnp.atleast_2d(tokens))
        return logits if tokens.ndim == 2 else logits[0]

    def generate(
        self,
        prompts: Turns | Sequence[Turns],
        *,
        beams: int | None = None,
        max_new_tokens: int = 128,
        method: Literal["greedy", "sample", "best_of_n", "beam", "chunk", "mcts", "exact"] | None = None,
        as_chat: bool = False,
        batch_size: int = 8,
        **options: Any,
    ) -> Answers:
        """Answers prompts; the most likely token at every step, unless the options say otherwise.

        Args:
            prompts: A text or a list of chat messages, or several of them.
            beams: Width of a beam search.
            max_new_tokens: Longest response, EOS included.
            method: How to decode; None: greedily, or by beam search if `beams` are given.
            as_chat: Wrap texts as a user's message, by the tokenizer's chat template.
            batch_size: Prompts at a time.
            **options: Further options of `qstar generate --decode`, such as temperature, seed, num_samples or
                objective.

        Returns:
            The responses to each prompt, best first.

        Raises:
            InputError: An option is unknown or not read by the method, or a prompt cannot be used.
        """
        if batch_size < 1:
            raise InputError(f"generate: batch_size is {batch_size}; expected at least 1 prompt")
        plan = interpret(self._decode_options(method, beams, max_new_tokens, options))
        several = _several(prompts)
        data = _data_options(as_chat)
        records, bad = prompt_records([{data.prompt: prompt} for prompt in several], data, "prompts")
        dataset = self._dataset(records, bad, "prompts", data, max_new_tokens)
        with self._mesh():
            models = {}
            if plan.needs_reference:
                models = {"reference": self._reference, "beta": self._beta(plan.block.beta)}
            decoder = prepare(self.loaded, plan, self.mesh, **models)
            generations = []
            for i in range(0, len(several), batch_size):
                examples = dataset.examples[i : i + batch_size]
                batch, rows = [example.prompt for example in examples], [example.row for example in examples]
                generations += decoder(batch, rows, fill_to=min(batch_size, len(several)))
        texts = prompt_texts(dataset, self.tokenizer)
        return Answers(tuple(texts[example.row] for example in dataset.examples), tuple(map(tuple, generations)))

    def score(
        self, prompt: Turns, *responses: Turns, as_chat: bool = False, alternatives: int = 5, beta: float | None = None
    ) -> Scores:
        """Scores every token of responses to one prompt: log pi, log pi_ref, reward, Q and V.

        Args:
            prompt: A text or a list of chat messages.
            *responses: Each a text or a list of chat messages; an EOS token is appended.
            as_chat: Wrap texts as messages, by the tokenizer's chat template.
            alternatives: How many of the tokens that the policy preferred to keep at each position.
            beta: Temperature of the rewards: reward per nat; None: that of the model.

        Returns:
            One record per response; in a notebook, a heatmap.

        Raises:
            InputError: There is no response or no reference, or a text cannot be used.
        """
        if not responses:
            raise InputError("score(prompt, response, ...): give at least one response")
        data = _data_options(as_chat)
        rows = [{data.prompt: prompt, data.completion: response} for response in responses]
        records, bad = completion_records(rows, data, "responses")
        dataset = self._dataset(records, bad, "responses", data)
        with self._mesh():
            batch = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            scored = score_dataset(
                self.loaded,
                self._reference.params,
                dataset,
                beta=self._beta(beta),
                batch_size=max(batch, -(-len(responses) // batch) * batch),
                mesh=self.mesh,
                alternatives=alternatives,
            )
        return Scores(tuple(replace(response, row=0) for response in scored))

    def save(self, folder: str | Path, dtype: Dtype = "float32") -> None:
        """Writes a Hugging Face folder: weights, configuration and tokenizer.

        Raises:
            InputError: The folder holds a model already.
        """
        folder = Path(folder)
        hub.check_free(folder)
        with self._mesh():
            hub.write_folder(folder, self.loaded.model, self.params, self.tokenizer, dtype, self.loaded.generation)

    @contextmanager
    def _mesh(self) -> Iterator[None]:
        with use_mesh(self.mesh, self.compute.dtype):
            yield

    def _load(self, source: str | Path) -> LoadedModel:
        return load_model(source, self.compute, self.mesh, self.mesh_options)

    @cached_property
    def _reference(self) -> LoadedModel:
        try:
            reference = open_reference(self.loaded, self.reference, self.source, self._load)
        except InputError as error:
            raise InputError(str(error).replace("--reference", "qstar_jax.load(..., reference=...)")) from error
        if are_identical(self.loaded, reference):
            warnings.warn(IDENTICAL, stacklevel=4)  # of what reads this property
        return reference

    def _beta(self, given: float | None) -> float:
        given = self.beta if given is None else given
        return find_beta(self.loaded, given, self.source, "beta, an argument of load and score")

    def _decode_options(
        self, method: str | None, beams: int | None, max_new_tokens: int, options: dict[str, Any]
    ) -> DecodeOptions:
        known = DecodeOptions.__dataclass_fields__
        if unknown := sorted(options.keys() - known.keys()):
            raise InputError(f"generate: unknown option {unknown[0]!r}; expected some of {', '.join(known)}")
        method = method or ("greedy" if beams is None else "beam")
        return DecodeOptions(method=method, beams=beams, max_new_tokens=max_new_tokens, **options)

    def _dataset(
        self, records: list[Record], bad: list[Dropped], source: str, data: DataOptions, new_tokens: int = 0
    ) -> Dataset:
        """Tokenizes what was given in Python, where no row may be dropped, and warns of texts that are too long."""
        data = resolve_date(data, records, self.tokenizer)
        tokens = {"vocabulary": self.loaded.model.config.vocab_size, "eos_ids": eos_token_ids(self.loaded)}
        examples, also_bad = tokenize(records, self.tokenizer, data, source=source, **tokens)
        for dropped in sorted(bad + also_bad, key=lambda dropped: dropped.row):
            raise InputError(f"{source}[{dropped.row}]: {dropped.fault or dropped.reason}")
        dataset = Dataset(examples, (), source)
        if warning := self.loaded.model.check_length(dataset.longest(new_tokens), source):
            warnings.warn(visible(warning.removeprefix("warning: ")), stacklevel=3)
        return dataset


def _data_options(as_chat: bool) -> DataOptions:
    """Texts are read as they are given: nothing is truncated, nothing removed."""
    limits = {"max_prompt_length": _UNLIMITED - 1, "max_length": _UNLIMITED}
    return DataOptions(as_chat=as_chat, repeated_prompt="keep", **limits)


def _several(prompts: Turns | Sequence[Turns]) -> list[Turns]:
    """A list of prompts, each a text or a list of messages."""
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(entry, dict) for entry in prompts))
    several = [prompts] if is_single else list(prompts)
    if not several:
        raise InputError("generate: give at least one prompt")
    return several


_logits = jax.jit(lambda model, params, tokens: model.logits(params, tokens), static_argnums=0)
