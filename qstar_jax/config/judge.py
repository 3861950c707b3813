"""The `judge:` block."""

from dataclasses import dataclass
from typing import Literal

from qstar_jax.config.variants import option, selector

_BY_REWARD = ("true_reward", "reward_model")


@dataclass(frozen=True)
class JudgeOptions:
    """Who decides which of two responses is better. Brackets name the kinds that read an option; others refuse it.

    Args:
        kind: `true_reward` is the task's own reward, where it is known; `reward_model` scores each response by a model
            of ours or a classifier, and the larger reward wins; `llm` asks a language model which one is better.
        model: reward_model: folder of a DPO run, whose implicit reward beta * log(pi / pi_ref) is summed over the
            response, or folder or hub name of a classifier with one label (LlamaForSequenceClassification); llm: name
            of the model at its server.
        tolerance: Rewards that differ by no more than this are a tie.
        reference: Folder or hub name of the reference of a language model; a DPO run brings its own.
        beta: Temperature of the rewards of a language model: reward per nat; a DPO run brings its own.
        as_chat: Wrap prompt and response as messages and apply the model's chat template.
        max_length: Longest prompt and response together, in tokens; a longer response loses its end; if a classifier
            reads chats, a longer chat loses its beginning.
        max_prompt_length: Longest prompt, in tokens; a longer one loses its beginning. Classifiers of chats do not read
            it.
        batch_size: Responses scored at once.
        base_url: Address of a server with OpenAI's chat interface, such as http://localhost:8000/v1; null: the client's
            default. The key is taken from the variable OPENAI_API_KEY only; with an address it may be missing.
        prompt: The question: `tldr`, `hh` (both after the paper's), or a text file with {prompt}, {a} and {b}.
        seed: Decides, with the texts, which response is shown first.
        both_orders: Ask in both orders; if the two replies disagree, it is a tie.
        retries: Further calls if a reply names no letter; a comparison without one is undecided, not a tie.
        temperature: Temperature of the replies; null leaves it to the server.
        max_tokens: Longest reply.
        concurrency: Number of calls in flight at once.
        http_retries: Further attempts if a request fails on the way or at the server, with growing pauses.
        timeout: Seconds that a request may take.
        cache: Folder of the replies, which are never paid for twice; null: below the user's cache folder.
        price_in: Dollars per million tokens of questions, for the estimate before the first call.
        price_out: Dollars per million tokens of replies.
        max_cost: Budget in dollars: if the estimate exceeds it, nothing is asked; if repeated calls reach it, no more
            are made.
    """

    kind: Literal["true_reward", "reward_model", "llm"] = selector("reward_model")
    model: str | None = option(["reward_model", "llm"], path=True)
    tolerance: float | None = option(_BY_REWARD, 1e-6, bounds="[0, inf)")
    reference: str | None = option(["reward_model"], path=True)
    beta: float | None = option(["reward_model"])
    as_chat: bool | None = option(["reward_model"], False)
    max_length: int | None = option(["reward_model"], 1024, bounds="[2, inf)")
    max_prompt_length: int | None = option(["reward_model"], 512, bounds="[1, inf)")
    batch_size: int | None = option(["reward_model"], 4, bounds="[1, inf)")
    base_url: str | None = option(["llm"])
    prompt: str | None = option(["llm"], "tldr", path=True)
    seed: int | None = option(["llm"], 0)
    both_orders: bool | None = option(["llm"], False)
    retries: int | None = option(["llm"], 2, bounds="[0, inf)")
    temperature: float | Literal["default"] | None = option(["llm"], 0.0, bounds="[0, inf)", unset="default")
    max_tokens: int | None = option(["llm"], 256, bounds="[1, inf)")
    concurrency: int | None = option(["llm"], 8, bounds="[1, inf)")
    http_retries: int | None = option(["llm"], 5, bounds="[0, inf)")
    timeout: float | None = option(["llm"], 120.0, bounds="(0, inf)")
    cache: str | None = option(["llm"], path=True)
    price_in: float | None = option(["llm"])
    price_out: float | None = option(["llm"])
    max_cost: float | None = option(["llm"])
