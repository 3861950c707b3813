"""A stage that is a language model: its prompt is made from earlier texts, and its output is a text.

Its output is a `Batch` with one response per prompt, tokens that scoring reads as they are; `read` spells them. So the
prompt and the outputs before it are already in the output, and its log-ratio looks at nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import Batch
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import Example, tokenize
from qstar_jax.decoding import SampleOptions
from qstar_jax.decoding.decoder import WIDTH
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.pipeline.stage import Outputs, Stage
from qstar_jax.pipeline.template import PROMPT, Template
from qstar_jax.scoring import score_tokens
from qstar_jax.training.rl.batches import Batcher
from qstar_jax.training.rl.sampling import PolicySampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reader = Callable[[Any], list[str]]  # spells the output of a stage, a text per prompt


@dataclass(frozen=True)
class LanguageStage:
    """A language model of a pipeline, with all but its parameters.

    Attributes:
        name: Its name, in templates and rows.
        model: The model, with the adapter that is trained, if any; the reference has the same shape without it.
        tokenizer: Its tokenizer.
        eos_ids: Tokens that end a response.
        mesh: Devices.
        template: Makes its prompt from `{prompt}` and the names in `earlier`.
        earlier: Name -> reader of each stage before it, in their order.
        max_new_tokens: Longest response, EOS included.
        beta: Temperature: reward per nat.
        temperature: Divides the logits when it is sampled.
        data: Longest prompt and response, and whether the prompt is a user's message of a chat.
    """

    name: str
    model: CausalLM
    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    mesh: Mesh
    template: Template = Template(f"{{{PROMPT}}}")
    earlier: Mapping[str, Reader] = field(default_factory=dict)
    max_new_tokens: int = 64
    beta: float = 0.1
    temperature: float = 1.0
    data: DataOptions = field(default_factory=DataOptions)

    def prompts(self, texts: Sequence[Mapping[str, str]]) -> list[str]:
        """Makes its prompts.

        Args:
            texts: For each, the user's prompt and the texts of earlier stages by their names.
        """
        return [self.template.fill(one) for one in texts]

    def examples(
        self, prompts: Sequence[str], responses: Sequence[str] | None = None, *, source: str, rows: Sequence[int] = ()
    ) -> list[Example]:
        """Tokenizes prompts, with a response each if there are any.

        Args:
            prompts: Its prompts.
            responses: A text for each.
            source: Where they come from, for errors.
            rows: Row of each in that source, from 0; counted by default.

        Raises:
            InputError: If one cannot be tokenized; truncated prompts and responses are refused as well.
        """
        rows = rows or range(len(prompts))
        records = [
            Record(
                self._turn("user", prompt), () if responses is None else (self._turn("assistant", responses[i]),), row
            )
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        tokens = {"vocabulary": self.model.config.vocab_size, "eos_ids": self.eos_ids, "source": source}
        examples, dropped = tokenize(records, self.tokenizer, self.data, **tokens)
        if dropped:
            raise InputError(f"{source} row {dropped[0].row + 1}, stage {self.name}: {dropped[0].reason}")
        for example in examples:
            what = "prompt" if example.prompt_truncated else "response"
            if example.prompt_truncated or any(response.truncated for response in example.responses):
                raise InputError(
                    f"{source} row {example.row + 1}, stage {self.name}: the {what} does not fit into "
                    f"data.max_length {self.data.max_length}, of which prompts may have {self.data.prompt_limit} "
                    "tokens (data.max_prompt_length); raise them, or remove the row"
                )
        return examples

    def _turn(self, role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if self.data.as_chat else text

    def draw(self, params: Any, key: PRNGKeyArray, prompt: Sequence[str], before: Outputs) -> Batch:
        """Samples a response to each prompt; all processes of a job call this together.

        Args:
            params: Its parameters, in the layout of training.
            key: Random key.
            prompt: The user's prompts, as many as (data * fsdp) divides.
            before: Outputs of the stages before it.
        """
        read = [reader(output) for reader, output in zip(self.earlier.values(), before, strict=True)]
        texts = [dict(zip((PROMPT, *self.earlier), one, strict=True)) for one in zip(prompt, *read, strict=True)]
        examples = self.examples(self.prompts(texts), source="the prompts")
        # Few widths, so that few programs are compiled.
        width = -(-max(len(example.prompt) for example in examples) // WIDTH) * WIDTH
        drawing = SampleOptions(self.max_new_tokens, self.eos_ids, temperature=self.temperature)
        sampler = PolicySampler.of(self.model, drawing, self.mesh, [width])
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(examples)))
        samples = sampler(params, examples, keys)
        sizes = {"prompts_per_part": len(examples), "samples": 1, "max_new_tokens": self.max_new_tokens}
        return Batcher.of([width], "shared", self.mesh, **sizes)(examples, samples.responses)

    def read(self, output: Batch) -> list[str]:
        """Spells responses, as `qstar generate` does: without special tokens."""
        arrays = output.targets, output.index, output.response_lengths
        targets, index, lengths = multihost_utils.process_allgather(arrays, tiled=True)
        ids = targets.reshape(-1)[index[:, 0]]
        return [
            self.tokenizer.decode(one[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for one, length in zip(ids.tolist(), lengths[:, 0], strict=True)
        ]

    def stage(self, ref_params: Any = None) -> Stage:
        """Makes the stage.

        Args:
            ref_params: Parameters of the reference; None where it is the policy without its adapter.
        """

        def log_ratio(params: Any, prompt: Any, before: Outputs, output: Batch) -> Float[Array, " B"]:
            return _log_ratios(self.model, params, ref_params, output)

        return Stage(self.name, log_ratio, self.draw, self.beta)


@partial(jax.jit, static_argnums=0)
def _log_ratios(model: CausalLM, params: Any, ref_params: Any, batch: Batch) -> Float[Array, " B"]:
    return score_tokens(model, params, ref_params, batch).returns(1.0)[:, 0]
