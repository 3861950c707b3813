"""The paper's three insights as measurements on the demo's task, where the true reward is known."""

import json
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from qstar_jax.config import DataOptions, DecodeOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.decoding.generate import generate
from qstar_jax.demo import task
from qstar_jax.evaluation.scored import ScoredResponse, by_row
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.loading import LoadedModel

BETA = 0.1
LENGTHS = {"max_length": 96, "max_prompt_length": 64}  # every post fits, and all but the longest run-on summaries
DECODERS = {
    "sampled": DecodeOptions(method="sample", max_new_tokens=32),
    "greedy": DecodeOptions(max_new_tokens=32),
    "5 beams": DecodeOptions(method="beam", max_new_tokens=32, beams=5),
}


def credit_assignment(
    policy: LoadedModel, reference: LoadedModel, path: Path, mesh: Mesh
) -> tuple[dict[str, float], list[ScoredResponse]]:
    """Insight 1: in a summary with one wrong word, does that word get the lowest reward?"""
    scored = _score(policy, reference, path, "preferences", mesh)
    wrong_word = [json.loads(line)["wrong_word"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = by_row(scored)
    hits = [int(np.argmin(bad.reward)) == wrong_word[bad.row] for _, bad in pairs]
    wins = [good.total_reward > bad.total_reward for good, bad in pairs]
    gap = [bad.reward[wrong_word[bad.row]] - good.reward[wrong_word[bad.row]] for good, bad in pairs]
    return {
        "pairs": len(pairs),
        "wrong_word_is_lowest": float(np.mean(hits)),
        "chance": float(np.mean([1 / len(bad.reward) for _, bad in pairs])),
        "right_summary_preferred": float(np.mean(wins)),
        "reward_of_wrong_word_minus_right_word": float(np.mean(gap)),
    }, [answer for pair in pairs for answer in pair]


def search(
    models: dict[str, LoadedModel], posts: list[task.Post], mesh: Mesh
) -> tuple[dict[str, dict[str, dict[str, float]]], list[dict[str, str]]]:
    """Insight 2: true rewards of sampled, greedy and beam answers to new posts; and the samples of the SFT model."""
    best = [task.true_reward(post, task.reference_summary(post)) for post in posts]
    results: dict[str, dict[str, dict[str, float]]] = {}
    texts = {}
    for name, loaded in models.items():
        prompts = [np.array(loaded.tokenizer(post.prompt)["input_ids"], np.int32) for post in posts]
        results[name] = {}
        for decoder, options in DECODERS.items():
            answers = [found[0] for found in generate(loaded, prompts, options, mesh)]
            texts[name, decoder] = [answer.text for answer in answers]
            rewards = [task.true_reward(post, answer.text) for post, answer in zip(posts, answers, strict=True)]
            results[name][decoder] = {
                "true_reward": float(np.mean(rewards)),
                "best_possible": float(np.mean(best)),
                "perfect": float(np.mean(np.isclose(rewards, best))),
                "tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            }
    pairs = zip(posts, texts["sft", "sampled"], strict=True)
    return results, [{"prompt": post.prompt, "completion": text} for post, text in pairs if text]


def reward_of_samples(
    policy: LoadedModel, reference: LoadedModel, samples: list[dict[str, str]], path: Path, mesh: Mesh
) -> float:
    """Insight 3: the mean implicit reward of the reference's own samples, which Eq. 16 says is not positive."""
    path.write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    return float(np.mean([answer.total_reward for answer in _score(policy, reference, path, "completions", mesh)]))


def findings(summary: dict) -> list[str]:
    """Says in three sentences what the figures of a tour show."""
    credit, search, decline = summary["credit"], summary["search"], summary["decline"]
    sft, dpo = search["sft"], search["dpo"]
    return [
        f"1. Credit. In {credit['wrong_word_is_lowest']:.0%} of {credit['pairs']} summaries with one wrong word, that "
        f"word got the lowest reward of all (chance: {credit['chance']:.0%}), although training saw labels of whole "
        "answers only.",
        f"2. Search. Mean true reward, of {dpo['greedy']['best_possible']:.2f} possible, before DPO and after it: "
        + ", ".join(f"{name} {sft[name]['true_reward']:.2f} and {dpo[name]['true_reward']:.2f}" for name in DECODERS)
        + ". Greedy decoding and beams look for what is likely under the policy, which is what its rewards favour.",
        f"3. Decline. The reference's own samples get an implicit reward of {decline['reference_samples']:+.2f} on "
        f"average: theory says that its expectation is never positive (Eq. 16). On held-out pairs chosen "
        f"summaries are at {decline['chosen']:+.2f} and rejected ones at {decline['rejected']:+.2f}; "
        f"{decline['accuracies']:.0%} of pairs are ranked right. What counts is the margin.",
    ]


def _score(policy: LoadedModel, reference: LoadedModel, path: Path, kind: str, mesh: Mesh) -> list[ScoredResponse]:
    dataset = load_examples(str(path), "test", kind, policy.tokenizer, DataOptions(**LENGTHS))
    return score_dataset(policy, reference.params, dataset, beta=BETA, batch_size=32, mesh=mesh)
