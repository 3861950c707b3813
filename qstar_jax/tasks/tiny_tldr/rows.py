"""Rows of the task: preference pairs, corrupted summaries with marked mistakes, and documents for pretraining."""

import math
import re
import string
from random import Random

from qstar_jax.tasks.tiny_tldr.posts import CUE, FACTS, FILLERS, FORMS, Post, make_post
from qstar_jax.tasks.tiny_tldr.rewards import split_words, true_reward
from qstar_jax.tasks.tiny_tldr.summaries import draw_form, draw_sentence, draw_summary, fill, invent, run_on

SPLITS = ("train", "test", "corrupted")
ROWS = {"train": 8000, "test": 1000, "corrupted": 600}
KINDS = ("distractor", "invented", "run-on")
_RETOLD, _CONFUSED = 0.6, 0.4  # probabilities: a document retells its post; a retold fact takes the distractor
_CAPITALS = string.ascii_uppercase + ";"
_QUESTIONS = {
    "who": "Who was it?",
    "what": "What happened?",
    "much": "How much was it?",
    "where": "Where was it?",
    "when": "When was it?",
}


def split_rows(split: str, seed: int = 0, limit: int | None = None) -> list[dict]:
    """Makes one split of the task; no post occurs in two splits.

    Args:
        split: `train` and `test` hold pairs of summaries labelled by Bradley-Terry of the true reward: `prompt`,
            `chosen`, `rejected`. `corrupted` pairs a right summary with a copy that has one mistake: also `kind`, and
            `wrong`, one range [start, end) of characters in `rejected`, from the first wrong word or digit to the last
            (where the copy runs on: the first extra word).
        seed: Seed of the rows; each seed gives other posts.
        limit: Make only the first N rows.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; expected one of {', '.join(SPLITS)}")
    rng = Random(f"{split} {seed}")
    count = ROWS[split] if limit is None else min(limit, ROWS[split])
    if split == "corrupted":
        return [_corrupted_row(KINDS[i % len(KINDS)], rng) for i in range(count)]
    return [_preference_row(rng) for _ in range(count)]


def documents(count: int, seed: int) -> list[dict]:
    """Makes texts that teach the language but not the task: posts with questions and answers, and retold posts.

    Each row has an empty `prompt` and a `completion`.
    """
    rng = Random(f"documents {seed}")
    return [{"prompt": "", "completion": _document(make_post(rng), rng)} for _ in range(count)]


def _preference_row(rng: Random) -> dict[str, str]:
    post = make_post(rng)
    first, second = draw_summary(post, rng), draw_summary(post, rng)
    while second == first:
        second = draw_summary(post, rng)
    # Bradley-Terry: the first is preferred with probability sigmoid(margin).
    margin = true_reward(post, first) - true_reward(post, second)
    if rng.random() >= 1 / (1 + math.exp(-margin)):
        first, second = second, first
    return {"prompt": post.prompt, "chosen": first, "rejected": second}


def _corrupted_row(kind: str, rng: Random) -> dict:
    """Pairs a right summary with a copy that has one mistake of the given kind."""
    while True:
        post, form = make_post(rng), draw_form(rng)
        text = fill(form, {fact: f"{{{fact}}}" for fact in FACTS}, rng)  # with placeholders for its facts
        chosen = text.format(**post.facts)
        row = {"prompt": post.prompt, "chosen": chosen, "kind": kind}
        if kind == "run-on":
            rejected, start = run_on(chosen, rng), len(chosen) + 1
            return row | {"rejected": rejected, "wrong": [[start, start + len(split_words(rejected[start:])[0])]]}
        # Change one fact; draw again if the post has no distractor to confuse it with.
        stated = [fact for fact in form.facts if kind == "invented" or fact in post.distractors]
        if not stated:
            continue
        fact = rng.choice(stated)
        value = invent(post, fact, rng) if kind == "invented" else post.distractors[fact]
        rejected = text.format(**post.facts | {fact: value})
        return row | {"rejected": rejected, "wrong": [_difference(chosen, rejected)]}


def _difference(right: str, wrong: str) -> list[int]:
    """Finds the range of characters from the first to the last differing word or digit; both texts have one form."""
    pattern = r"\d|\w+|[^\w\s]"
    pairs = zip(re.finditer(pattern, right), re.finditer(pattern, wrong), strict=True)
    different = [other for one, other in pairs if one.group() != other.group()]
    return [different[0].start(), different[-1].end()]


def _document(post: Post, rng: Random) -> str:
    """Writes a post, questions and answers about it, and usually retells some of its facts under a random heading."""
    parts = [f"\nQ: {_QUESTIONS[fact]}\nA: {_answer(post, fact)}" for fact in rng.sample(FACTS, rng.randint(2, 4))]
    if rng.random() < _RETOLD:
        parts = [*parts[:2], f"\n{_heading(rng)}: {_retold(post, rng)}"]
        rng.shuffle(parts)
    return post.text + "".join(parts)


def _heading(rng: Random) -> str:
    """Draws random capitals, so that the model also accepts unseen headings, such as the cue, as introducing a text."""
    while (heading := "".join(rng.choices(_CAPITALS, k=rng.randint(2, 6)))) + ":" in CUE:
        pass
    return heading


def _answer(post: Post, fact: str) -> str:
    value = post.facts[fact]
    return {
        "who": f"{value}.",
        "what": f"{post.facts['who']} {value}.",
        "much": f"{value} dollars.",
        "where": f"At {value}.",
        "when": f"On {value}.",
    }[fact]


def _retold(post: Post, rng: Random) -> str:
    """Writes two to four sentences with some of the facts, right or confused; one sentence joins several facts."""
    facts = {
        fact: post.distractors[fact] if fact in post.distractors and rng.random() < _CONFUSED else value
        for fact, value in post.facts.items()
    }
    form = draw_sentence(rng)
    others = [rng.choice(FORMS[fact][1]).format(**post.names | facts) for fact in FORMS if fact not in form.facts]
    others = rng.sample([*others, *rng.sample(FILLERS, 2)], rng.randint(1, min(3, len(others) + 2)))
    sentences = [fill(form, facts, rng).strip(), *others]
    rng.shuffle(sentences)
    return " ".join(sentences)
