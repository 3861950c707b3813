"""The verb that selects among several responses to a question."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.ranges import ranged
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class SelectConfig:
    r"""Best of N and votes: how often each way to select among N responses finds a right one, beside chance and oracle.

    The responses are those of `data.eval` (a response per row; rows with the same prompt are one question), those that
    `qstar generate` wrote (`generations`), or fresh ones (`samples`). A response is right if its final answer equals
    that of the column `right`, or if the column `data.label` says so. With `model`, its implicit rewards select.

    Args:
        out: Folder for selection.json, selection.png, responses.jsonl, and fresh responses.
        model: Folder of a DPO or implicit_prm run whose rewards score the responses; null: nothing is scored, and
            responses are selected by votes and by the rewards in `scores` or `generations`.
        reference: Folder or hub name of the reference; a run brings its own.
        beta: Temperature of the rewards: reward per nat; a run brings its own.
        generations: Folder that `qstar generate` wrote; its rows are those of `data.eval`.
        scores: Folder that `qstar score --answers single` wrote for the rows of `data.eval`, instead of `model`.
        right: Column of the right answer, or of a solution that ends with it; null: `data.label` says what is right.
        final_answer: How the final answer of a response is found: `marked` is what follows its last "#", or what its
            last \boxed{} holds; `hash` and `boxed` know one of these marks only; `number` is the last number;
            `pattern` what `pattern` matches. Equal numbers are equal answers.
        pattern: Regular expression with one group around the final answer, such as "A: (.+)"; its last match counts.
        sizes: Numbers of responses N to select among; null: 1, 2, 4, ... up to the number that most questions have.
            Questions with fewer responses than the largest N are left out, and counted.
        weight: Weight of a vote by its response's score: `sigmoid` is sigma(score), a probability if the score was
            trained as a logit (implicit_prm); `softmax` exp(score), which ignores what all rewards of a question share,
            as DPO leaves it open; `identity` the score itself.
        subsets: A vote among N is averaged over all subsets of N responses of a question, or over this many random ones
            if there are more. Best of N, chance and oracle are exact.
        seed: Seed of random subsets and of fresh responses.
        samples: Fresh responses per distinct prompt of `data.eval`; null: none are made.
        sampler: Who writes fresh responses: the `policy` of `model`, or its `reference`, whose responses the policy
            only judges.
        temperature: Temperature for sampling.
        top_k: Sample from the k most likely tokens only; 0: from all.
        top_p: Sample from the most likely tokens whose probabilities add up to p; 1: from all.
        max_new_tokens: Longest fresh response, EOS included.
        stop: Strings that end a fresh response; its text is truncated before them.
        step_beams: Widths of beam searches over steps, guided by the implicit reward after each step (q), which are
            compared with best of N and votes among as many sampled tokens. Needs `samples`.
        step_samples: Continuations sampled per beam and step.
        step_length: Longest step.
        step_ends: Strings that end a step of the beam search; a step ends after a token whose text ends with one.
        batch_size: Responses scored, or sampled, at once.
        data: `data.eval` is the file of questions, with or without responses.
    """

    out: str = path()
    model: str | None = path(None)
    reference: str | None = path(None)
    beta: float | None = ranged(None, "(0, inf)")
    generations: str | None = path(None)
    scores: str | None = path(None)
    right: str | None = None
    final_answer: Literal["marked", "hash", "boxed", "number", "pattern"] = "marked"
    pattern: str | None = None
    sizes: list[int] | None = None
    weight: Literal["sigmoid", "softmax", "identity"] = "sigmoid"
    subsets: int = ranged(1024, "[1, inf)")
    seed: int = ranged(0, "[0, 9e18]")
    samples: int | None = None
    sampler: Literal["policy", "reference"] = "policy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    step_beams: list[int] = field(default_factory=list)
    step_samples: int = 4
    step_length: int = 64
    step_ends: list[str] = field(default_factory=lambda: ["\n"])
    batch_size: int = ranged(16, "[1, 1e6]")
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
