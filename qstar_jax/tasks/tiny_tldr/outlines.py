"""Two writers of tiny-tldr: one lists facts of a post, the other makes a summary of the list; both make mistakes.

The second never sees the post. So who is to blame for a bad summary is known: the first if its list has a wrong value,
the second if it states what is not on the list, or runs on.
"""

from dataclasses import replace
from random import Random

from qstar_jax.tasks.tiny_tldr.posts import CUE, FACTS, Post, make_post
from qstar_jax.tasks.tiny_tldr.rewards import END, is_wrong, stated_facts, true_rewards
from qstar_jax.tasks.tiny_tldr.summaries import FORMS, fill, invent, run_on

FAULTY = 0.4  # probability that a writer makes a mistake
_LISTED = {"who": 1.0, "what": 1.0, "much": 1.0, "where": 0.5, "when": 0.5}  # probability that a fact is listed


def outline_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Makes posts with lists, to fine-tune the first writer on: columns `prompt`, `completion`."""
    rng = Random(f"outlines {seed}")
    posts = [make_post(rng) for _ in range(count)]
    return [{"prompt": post.prompt, "completion": draw_outline(post, rng)} for post in posts]


def text_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Makes lists with summaries, to fine-tune the second writer on: columns `prompt`, `completion`."""
    rng, rows = Random(f"texts {seed}"), []
    for _ in range(count):
        outline = draw_outline(make_post(rng), rng)
        rows.append({"prompt": outline + CUE, "completion": draw_text(outline, rng)})
    return rows


def prompts(count: int, seed: int) -> list[str]:
    """Makes prompts of the first writer: those of tiny-tldr."""
    rng = Random(f"posts for two writers {seed}")
    return [make_post(rng).prompt for _ in range(count)]


def draw_outline(post: Post, rng: Random) -> str:
    """Draws a list of facts; in `FAULTY` of them one value is wrong: that of a distractor, if the post has one."""
    listed = [fact for fact in FACTS if rng.random() < _LISTED[fact]]
    values = {fact: post.facts[fact] for fact in listed}
    if rng.random() < FAULTY:
        fact = rng.choice(listed)
        values[fact] = post.distractors.get(fact) or invent(post, fact, rng)
    return " " + "; ".join(values[fact] for fact in listed) + "."


def draw_text(outline: str, rng: Random) -> str:
    """Draws a summary of a list; in `FAULTY` of them one value is wrong, or the summary runs on."""
    values = stated_facts(outline)
    forms = [form for form in FORMS if set(form.facts) <= values.keys()]
    form = rng.choices(forms, [one.weight for one in forms])[0]
    kind = rng.choice(("invented", "run-on")) if rng.random() < FAULTY else None
    if kind == "invented":
        fact = rng.choice(form.facts)
        values[fact] = invent(Post("", {name: values.get(name, "") for name in FACTS}, {}, {}), fact, rng)
    text = fill(form, {name: values.get(name, "") for name in FACTS}, rng)
    return run_on(text, rng) if kind == "run-on" else text


def faults(post: Post, outline: str, text: str) -> tuple[bool, bool]:
    """Says who is at fault.

    Args:
        post: The post.
        outline: What the first writer wrote.
        text: What the second made of it.

    Returns:
        Whether the first listed a wrong value, and whether the second stated something that is not on the list, or did
        not end with its first full stop.
    """
    listed = stated_facts(outline)
    as_listed = replace(post, facts={fact: listed.get(fact, "") for fact in FACTS})
    return is_wrong(post, outline), is_wrong(as_listed, text) or true_rewards(as_listed, text)[-1] != END
