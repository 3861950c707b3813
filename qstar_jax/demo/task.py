"""A small summarisation task with a known reward for every word.

A post states facts between distractors; its one-line summary must get the facts right and then stop. Everything is a
pure function of the random generator or seed that is passed in.
"""

import re
from dataclasses import dataclass
from random import Random

from qstar_jax.demo.vocabulary import CATEGORIES, CUE, FAMILIES, FILLERS, MEN, WOMEN, Family, split_words

CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
RIGHT_FACT, WRONG_FACT, RIGHT_END, LATE_WORD = 1.0, -1.0, 1.0, -0.2
MAX_SUMMARY_WORDS = 20
HASTY, FLAWED_COMPLETIONS, FLAWED_DOCUMENTS = 0.65, 0.1, 1 / 3


@dataclass(frozen=True)
class Post:
    """A post and what is known about it.

    Args:
        text: The post, without the cue.
        facts: The right value of each category that a summary states.
        distractors: Wrong values that the post mentions, by category.
        family: The kind of post, with the forms of its summaries.
    """

    text: str
    facts: dict[str, str]
    distractors: dict[str, str]
    family: Family

    @property
    def prompt(self) -> str:
        """The post and the cue that asks for its summary."""
        return self.text + CUE


def make_post(rng: Random) -> Post:
    """Draws a post: an opening, the other sentences of its family in any order, and perhaps a filler."""
    family = rng.choice(FAMILIES)
    values = {}
    for category in CATEGORIES:
        values[category], values[category + "2"] = rng.sample(_choices(family, category), 2)
    woman = rng.random() < 0.5
    values["name"], values["name2"] = (rng.choice(names) for names in ((WOMEN, MEN) if woman else (MEN, WOMEN)))
    pronouns = dict(he="she", He="She", his="her", His="Her") if woman else dict(he="he", He="He", his="his", His="His")
    body = [rng.choice(forms) for forms in family.body] + rng.sample(FILLERS, rng.randrange(2))
    rng.shuffle(body)
    form = " ".join([rng.choice(family.opening), *body])
    return Post(
        text=form.format(**values, **pronouns),
        facts={category: values[category] for category in family.facts},
        distractors={category: values[category + "2"] for category in family.facts if f"{{{category}2}}" in form},
        family=family,
    )


def reference_summary(post: Post, form: int = 0) -> str:
    """Writes the right summary in one of the family's surface forms (taken modulo their number)."""
    forms = post.family.summaries
    return forms[form % len(forms)].format(**post.facts)


def corrupt(post: Post, rng: Random) -> tuple[str, str, int]:
    """Writes a summary with one wrong fact.

    Args:
        post: The post to summarise.
        rng: Draws the surface form, the fact and its wrong value.

    Returns:
        The summary, the kind of error (`distractor`: a value from the post, `invented`: from nowhere), and the index
        of the wrong word in `split_words(summary)`.
    """
    category = rng.choice(list(post.facts))
    seen = {post.facts[category], post.distractors.get(category)}
    kind, wrong = "invented", rng.choice([word for word in _choices(post.family, category) if word not in seen])
    if category in post.distractors and rng.random() < 0.5:
        kind, wrong = "distractor", post.distractors[category]
    form = rng.choice(post.family.summaries)
    summary = form.format(**(post.facts | {category: wrong}))
    return summary, kind, split_words(summary).index(wrong)


def run_on(post: Post, rng: Random) -> str:
    """Writes a right summary that goes on with a sentence or two copied from the post."""
    sentences = re.findall(r"[^.?]+[.?]", post.text)
    start = rng.randrange(len(sentences))
    tail = " ".join(sentence.strip() for sentence in sentences[start : start + rng.choice((1, 2))])
    return f"{reference_summary(post, rng.randrange(3))} {tail}"


def hasty_summary(post: Post, rng: Random) -> str | None:
    """Writes a summary with the number that the post mentions last; None where that one is right."""
    numbers = [word for word in split_words(post.text) if CATEGORY_OF.get(word) == "number"]
    if "number" not in post.facts or numbers[-1] == post.facts["number"]:
        return None
    return rng.choice(post.family.summaries).format(**(post.facts | {"number": numbers[-1]}))


def true_rewards(post: Post, summary_words: list[str]) -> list[float]:
    """Gives every word of a summary its true reward.

    The first value stated for a category is right (+1) or wrong (-1); any further one is wrong, and so is a value of a
    category that the summary should not mention. A word after the first full stop or the twentieth word comes late
    (-0.2). Ending right after the first full stop is right (+1). All else is neutral.

    Args:
        post: The post that was summarised.
        summary_words: Any words, as from `split_words`.

    Returns:
        One reward a word, and a last one for ending there: one more than there are words.
    """
    open_facts = dict(post.facts)
    rewards, complete = [], False
    for index, word in enumerate(summary_words):
        category = CATEGORY_OF.get(word)
        if complete or index >= MAX_SUMMARY_WORDS:
            rewards.append(LATE_WORD)
        elif category is None:
            rewards.append(0.0)
        elif open_facts.pop(category, None) == word:
            rewards.append(RIGHT_FACT)
        else:
            rewards.append(WRONG_FACT)
        complete = complete or word == "."
    ended_well = complete and summary_words.index(".") == len(summary_words) - 1
    return [*rewards, RIGHT_END if ended_well else 0.0]


def true_reward(post: Post, summary_text: str) -> float:
    """Sums the true rewards of a summary; any text has one."""
    return sum(true_rewards(post, split_words(summary_text)))


def preference_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Makes preference pairs: a right summary against a hasty one, one with a wrong fact or one that runs on.

    Args:
        n: Number of pairs.
        seed: Fixes them; another seed gives other posts.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` and `kind` (`distractor`, `invented` or `run-on`).
    """
    rng = Random(f"preferences {seed}")
    rows = []
    for _ in range(n):
        post = make_post(rng)
        hasty = hasty_summary(post, rng)
        rejected, kind = (hasty, "distractor") if hasty and rng.random() < HASTY else _flawed(post, rng)
        chosen = reference_summary(post, rng.randrange(3))
        rows.append({"prompt": post.prompt, "chosen": chosen, "rejected": rejected, "kind": kind})
    return rows


def completion_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Makes rows for supervised fine-tuning (`prompt`, `completion`), about a quarter of them flawed, as real data are.

    Most flaws are of one kind: where a wrong number is mentioned last, most writers take it. A model that imitates them
    is wrong on such posts even when it decodes greedily, which leaves something for DPO to mend.
    """
    rng = Random(f"completions {seed}")
    rows = []
    for _ in range(n):
        post = make_post(rng)
        hasty = hasty_summary(post, rng)
        plain = _sometimes_flawed(post, rng, FLAWED_COMPLETIONS)
        rows.append({"prompt": post.prompt, "completion": hasty if hasty and rng.random() < HASTY else plain})
    return rows


def pretraining_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Makes whole documents (`prompt` is empty, `completion` a post with a summary), a third of them flawed."""
    rng = Random(f"pretraining {seed}")
    posts = [make_post(rng) for _ in range(n)]
    documents = [post.prompt + _sometimes_flawed(post, rng, FLAWED_DOCUMENTS) for post in posts]
    return [{"prompt": "", "completion": document} for document in documents]


def _choices(family: Family, category: str) -> list[str]:
    words = CATEGORIES[category]
    low, high = family.numbers
    return [word for word in words if low <= int(word) <= high] if category == "number" else words


def _flawed(post: Post, rng: Random) -> tuple[str, str]:
    if rng.random() < 0.4:
        return run_on(post, rng), "run-on"
    return corrupt(post, rng)[:2]


def _sometimes_flawed(post: Post, rng: Random, share: float) -> str:
    return _flawed(post, rng)[0] if rng.random() < share else reference_summary(post, rng.randrange(3))
