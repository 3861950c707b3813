"""The `decode:` block."""

from dataclasses import dataclass
from typing import Literal, get_args

from qstar_jax.config.ranges import SEEDS
from qstar_jax.config.variants import option, selector

Method = Literal["greedy", "sample", "beam", "best_of_n", "chunk", "mcts", "exact"]

_ALL = get_args(Method)
_SAMPLING = ("sample", "best_of_n", "chunk")
_TOKEN_BY_TOKEN = ("greedy", "sample", "beam", "best_of_n", "chunk")


@dataclass(frozen=True)
class DecodeOptions:
    """How responses are decoded. Brackets name the methods that read an option; others refuse it.

    Args:
        method: `greedy` takes the most likely token; `sample` samples; `beam` searches; `best_of_n` samples and keeps
            the best by the objective; `chunk` searches among sampled continuations; `mcts` is Monte-Carlo tree search;
            `exact` finds the best response of all, if responses are short.
        max_new_tokens: Longest response, EOS included.
        min_new_tokens: Shortest response: no EOS before this many tokens.
        stop: Strings that end a response; its text is truncated before them.
        repetition_penalty: Above 1, tokens that have occurred become less likely; 1: no penalty.
        no_repeat_ngram_size: No sequence of this many tokens occurs twice; 0: no such rule.
        return_sequences: Responses per prompt: all samples, or the best ones of a search.
        seed: Seed for sampling, stochastic beams and Gumbel MCTS. Each row of the file has its own key, whatever batch
            it is in.
        temperature: Divides log pi before a token is sampled.
        top_k: Sample from the k most likely tokens only; 0: from all.
        top_p: Sample from the most likely tokens whose probabilities add up to p; 1: from all.
        min_p: Sample from tokens with at least this fraction of the highest probability; 0: from all.
        num_samples: Samples per prompt.
        rejection_interval: Prune the worst samples every time this many tokens have been sampled; null: never.
        rejection_keep: Fraction of the samples that is kept each time.
        beams: Width of the search.
        preset: Search as `hf` (transformers) or `t5x` does: sets the next six options.
        eos_rule: Which ended candidates are kept: `all`, or those among the best `hf` K or `t5x` 2K of a step.
        length_rule: Divide scores by length ** penalty (`hf`) or ((5 + length) / 6) ** penalty (`gnmt`; preset
            t5x).
        length_penalty: Exponent of the length rule; above 0 favours long responses (preset hf: 1, t5x: 0.6).
        count_prompt: Whether the length rule counts the prompt (preset t5x: true).
        early_stopping: `never` stops when no live beam can still win, false when none would win at its present length
            (preset hf), true once as many responses have ended as there are beams.
        truncated: Whether responses that reach `max_new_tokens` `compete`, or are used only if none has ended: `drop`
            (preset t5x).
        groups: Diverse beams: number of groups, each of which avoids the tokens of earlier ones.
        diversity: Penalty of a token for each beam of an earlier group that chose it, in nats.
        stochastic: Sample responses without replacement from the policy instead of searching for the best.
        chunk_length: Longest chunk.
        samples: Continuations sampled per beam.
        delimiters: Strings that end a chunk early, such as a line break. A chunk ends after a token whose text ends
            with one of them; a delimiter that spans several tokens is not recognized.
        num_simulations: Simulations per prompt, and so the most nodes of a tree.
        num_actions: Most likely tokens that a node considers.
        selection: How a simulation chooses actions.
        max_expansions: Prefixes to expand before the search ends without proof.
        objective: What a search maximizes: likelihood, the sum of log pi; implicit_reward, that of
            beta * log(pi / pi_ref); regularised_reward, both beta * log(pi / pi_ref) and beta * log pi_ref.
        beta: Temperature of the rewards: reward per nat; a DPO run brings its own.
        report_reference: Run the reference beside the policy for the columns ref_logp and reward, even if the objective
            does not read it.
        vocabulary: For pairs of models with vocabularies of different sizes: the number of leading tokens that all
            share; the others are left out.
    """

    method: Method = selector("greedy")
    max_new_tokens: int = 128
    min_new_tokens: int | None = option(_TOKEN_BY_TOKEN, 0, bounds="[0, inf)")
    stop: list[str] | None = option(_TOKEN_BY_TOKEN, [])
    repetition_penalty: float | None = option(_TOKEN_BY_TOKEN, 1.0, bounds="(0, inf)")
    no_repeat_ngram_size: int | None = option(_TOKEN_BY_TOKEN, 0, bounds="[0, inf)")
    return_sequences: int | None = option(
        ("sample", "beam", "best_of_n", "chunk", "mcts", "exact"), 1, bounds="[1, inf)"
    )
    seed: int | None = option(("sample", "beam", "best_of_n", "chunk", "mcts"), 0, bounds=SEEDS)
    temperature: float | None = option(_SAMPLING, 1.0, bounds="[0, inf)")
    top_k: int | None = option(_SAMPLING, 0, bounds="[0, inf)")
    top_p: float | None = option(_SAMPLING, 1.0, bounds="(0, 1]")
    min_p: float | None = option(_SAMPLING, 0.0, bounds="[0, 1]")
    num_samples: int | None = option(["best_of_n"], 8, bounds="[1, inf)")
    rejection_interval: int | None = option(["best_of_n"], bounds="[1, inf)")
    rejection_keep: float | None = option(["best_of_n"], 0.5, bounds="(0, 1]")
    beams: int | None = option(["beam", "chunk"], 4, bounds="[1, inf)")
    preset: Literal["none", "hf", "t5x"] | None = option(["beam"], "none")
    eos_rule: Literal["all", "hf", "t5x"] | None = option(["beam"], "all")
    length_rule: Literal["none", "hf", "gnmt"] | None = option(["beam"], "none")
    length_penalty: float | None = option(["beam"], 0.0)
    count_prompt: bool | None = option(["beam"], False)
    early_stopping: bool | Literal["never"] | None = option(["beam"], "never")
    truncated: Literal["compete", "drop"] | None = option(["beam"], "compete")
    groups: int | None = option(["beam"], 1, bounds="[1, inf)")
    diversity: float | None = option(["beam"], 0.0, bounds="[0, inf)")
    stochastic: bool | None = option(["beam"], False)
    chunk_length: int | None = option(["chunk"], 16, bounds="[1, inf)")
    samples: int | None = option(["chunk"], 4, bounds="[1, inf)")
    delimiters: list[str] | None = option(["chunk"], [])
    num_simulations: int | None = option(["mcts"], 64, bounds="[1, inf)")
    num_actions: int | None = option(["mcts"], 8, bounds="[1, inf)")
    selection: Literal["puct", "gumbel"] | None = option(["mcts"], "puct")
    max_expansions: int | None = option(["exact"], 10000, bounds="[1, inf)")
    objective: Literal["likelihood", "implicit_reward", "regularised_reward"] | None = option(
        {"beam": "likelihood", "best_of_n": "implicit_reward", "chunk": "likelihood", "mcts": "likelihood"}
    )
    beta: float | None = None
    report_reference: bool = False
    vocabulary: int | None = option(_ALL, bounds="[1, inf)")
