"""The `decode:` block."""

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["greedy", "sample", "beam", "best_of_n", "chunk", "mcts", "exact"]


@dataclass(frozen=True)
class DecodeOptions:
    """How answers are decoded. An option that the method does not read is an error, so none is silently ignored.

    Where an option begins with names of methods, these read it, and others do not. Those that are not set take the
    value in brackets.

    Args:
        method: `greedy` takes the likeliest token; `sample` draws; `beam` searches; `best_of_n` draws and keeps the
            best by the objective; `chunk` searches among continuations that are drawn; `mcts` is a tree search,
            `exact` finds the best answer of all, for short ones.
        max_new_tokens: Longest answer, EOS included.
        min_new_tokens: Not mcts, exact: no EOS before so many tokens.
        stop: Not mcts, exact: strings that end an answer; its text is cut before them.
        repetition_penalty: Not mcts, exact: above 1 makes tokens that were said already less likely; 1: no change.
        no_repeat_ngram_size: Not mcts, exact: no sequence of so many tokens occurs twice; 0: no such rule.
        return_sequences: Not greedy: answers a prompt: so many samples, or so many of the best that were found.
        seed: sample, best_of_n, chunk, stochastic beams, gumbel mcts: of what is drawn. Each row of the file has a key
            of its own, whatever batch it is in.
        temperature: sample, best_of_n, chunk: divides log pi before a token is drawn (1).
        top_k: The same: draw among the so many likeliest tokens; 0 for all.
        top_p: The same: among the likeliest tokens whose probabilities reach this sum; 1 for all.
        min_p: The same: among tokens that have at least this fraction of the likeliest one's probability; 0 for all.
        num_samples: best_of_n: answers that are drawn (8).
        rejection_interval: best_of_n: after every so many tokens the worst samples are given up; not set: never.
        rejection_keep: best_of_n: the fraction that stays each time (0.5).
        beams: beam, chunk: width of the search (4).
        preset: beam: does what `hf` (transformers) or `t5x` does, and sets the options that follow.
        eos_rule: beam: which ends of answers are kept: `all`, or those among the `hf` K or `t5x` 2K best candidates of
            a step (all).
        length_rule: beam: divides scores by length ** penalty (`hf`) or ((5 + length) / 6) ** penalty (`gnmt`) (none).
        length_penalty: beam: that exponent, above 0 favours long answers (0; hf 1, t5x 0.6).
        count_prompt: beam: whether these lengths count the prompt (false; t5x true).
        early_stopping: beam: `never` stops a row when nothing can become better, false when nothing is better at its
            present length, true when as many answers as beams have ended (never; hf false).
        truncated: beam: answers that run into the limit `compete`, or are used only if none has ended: `drop`
            (compete; t5x drop).
        groups: beam: so many groups of beams, each avoiding what earlier ones say.
        diversity: beam: what a token costs for each beam of an earlier group that says it, in nats.
        stochastic: beam: draws answers without replacement from the policy instead of searching the best.
        chunk_length: chunk: most tokens of a chunk (16).
        samples: chunk: continuations drawn of each beam (4).
        delimiters: chunk: strings that end a chunk early, such as a line break. A chunk ends after a token whose text
            ends with one of them; a delimiter that takes several tokens is not found.
        num_simulations: mcts: nodes that a tree grows to (64).
        num_actions: mcts: likeliest tokens that a node considers (8).
        selection: mcts: puct or gumbel (puct).
        max_expansions: exact: prefixes that are looked at before it gives up (10000).
        objective: beam, best_of_n, chunk, mcts: what answers are compared by: likelihood, the sum of log pi;
            implicit_reward, of beta * log(pi / pi_ref); regularised_reward, of this and beta * log pi_ref (likelihood;
            best_of_n: implicit_reward).
        beta: Of rewards, in reward a nat; a DPO run carries its own.
        report_reference: Run the reference beside the policy for the columns ref_logp and reward, even where the
            objective does not read it.
        vocabulary: With pairs of models whose vocabularies differ in size: the first so many tokens are the same in
            all, and the others are left out.
    """

    method: Method = "greedy"
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    return_sequences: int = 1
    seed: int = 0
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int | None = None
    rejection_interval: int | None = None
    rejection_keep: float | None = None
    beams: int | None = None
    preset: Literal["none", "hf", "t5x"] = "none"
    eos_rule: Literal["all", "hf", "t5x"] | None = None
    length_rule: Literal["none", "hf", "gnmt"] | None = None
    length_penalty: float | None = None
    count_prompt: bool | None = None
    early_stopping: bool | Literal["never"] | None = None
    truncated: Literal["compete", "drop"] | None = None
    groups: int = 1
    diversity: float = 0.0
    stochastic: bool = False
    chunk_length: int | None = None
    samples: int | None = None
    delimiters: list[str] = field(default_factory=list)
    num_simulations: int | None = None
    num_actions: int | None = None
    selection: Literal["puct", "gumbel"] | None = None
    max_expansions: int | None = None
    objective: Literal["likelihood", "implicit_reward", "regularised_reward"] | None = None
    beta: float | None = None
    report_reference: bool = False
    vocabulary: int | None = None
