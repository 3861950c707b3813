"""The `judge:` block."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JudgeOptions:
    """Who decides which of two answers is better. An option that the kind does not read is an error.

    Where an option begins with names of kinds, these read it, and others do not.

    Args:
        kind: `true_reward` is the task's own reward, where it is known; `reward_model` scores each answer by a model of
            ours or a classifier, and the larger reward wins; `llm` asks a language model which one is better.
        model: reward_model: folder of a DPO run, whose implicit reward beta * log(pi / pi_ref) is summed over the
            answer, or folder or hub name of a classifier with one label (LlamaForSequenceClassification); llm: name
            of the model at its server.
        tolerance: true_reward, reward_model: rewards that differ by no more than this tie.
        reference: reward_model: folder or hub name of the reference of a language model; a DPO run carries its own.
        beta: The same: temperature of its rewards; a DPO run carries its own.
        as_chat: reward_model: wrap prompt and answer as messages and apply the model's chat template.
        max_length: reward_model: longest prompt and answer together, in tokens; a longer answer loses its end; where a
            classifier reads chats, a longer chat loses its beginning.
        max_prompt_length: reward_model: longest prompt, in tokens; a longer one loses its beginning. Not read by
            classifiers of chats.
        batch_size: reward_model: answers scored at once.
        base_url: llm: address of a server with OpenAI's chat interface, such as http://localhost:8000/v1; not set: the
            client's default. The key is taken from the variable OPENAI_API_KEY only; with an address there may be none.
        prompt: llm: the question: `tldr`, `hh` (both after the paper's), or a text file with {prompt}, {a} and {b}.
        seed: llm: decides, with the texts, which answer is shown first.
        both_orders: llm: ask in both orders; where the two replies disagree, it is a tie.
        retries: llm: further calls where a reply names no letter; a comparison without one is undecided, no tie.
        temperature: llm: of sampling; null leaves it to the server.
        max_tokens: llm: longest reply.
        concurrency: llm: calls on their way at once.
        http_retries: llm: further tries of a request that fails on its way or at the server, after longer and longer
            waits.
        timeout: llm: seconds that a request may take.
        cache: llm: folder of the replies, which are never paid for twice; by default under the user's cache folder.
        price_in: llm: dollars a million tokens of questions, for the estimate before the first call.
        price_out: llm: dollars a million tokens of replies.
        max_cost: llm: dollars; if the estimate is above, nothing is asked, and if repeated calls reach it, no more.
    """

    kind: Literal["true_reward", "reward_model", "llm"] = "reward_model"
    model: str | None = None
    tolerance: float = 1e-6
    reference: str | None = None
    beta: float | None = None
    as_chat: bool = False
    max_length: int = 1024
    max_prompt_length: int = 512
    batch_size: int = 4
    base_url: str | None = None
    prompt: str = "tldr"
    seed: int = 0
    both_orders: bool = False
    retries: int = 2
    temperature: float | None = 0.0
    max_tokens: int = 256
    concurrency: int = 8
    http_retries: int = 5
    timeout: float = 120.0
    cache: str | None = None
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
