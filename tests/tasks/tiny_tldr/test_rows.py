import math
import re

import numpy as np
import pytest

from qstar_jax.tasks.tiny_tldr import read_post, reward_of_text, split_rows
from qstar_jax.tasks.tiny_tldr.posts import CUE, FACTS, FILLERS
from qstar_jax.tasks.tiny_tldr.rewards import LATE_WORD, WORD, split_words, true_rewards
from qstar_jax.tasks.tiny_tldr.rows import KINDS, ROWS, documents
from qstar_jax.tasks.tiny_tldr.summaries import EXTRAS


def test_splits_are_functions_of_the_seed_and_share_no_post():
    assert split_rows("test", 1, 20) == split_rows("test", 1, 20) != split_rows("test", 2, 20)
    prompts = [{row["prompt"] for row in split_rows(split)} for split in ("train", "test", "corrupted")]
    assert [len(part) for part in prompts] == [ROWS["train"], ROWS["test"], ROWS["corrupted"]]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_a_limit_takes_the_first_rows():
    assert split_rows("train", 0, 5) == split_rows("train", 0, 9)[:5]
    assert len(split_rows("corrupted", 0, 10**6)) == ROWS["corrupted"]


def test_labels_are_bradley_terrys():
    rows = split_rows("train")
    rewards = np.array([[reward_of_text(row["prompt"], row[name]) for name in ("chosen", "rejected")] for row in rows])
    gap, won = np.abs(rewards[:, 0] - rewards[:, 1]), rewards[:, 0] > rewards[:, 1]
    for low, high in ((0.1, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)):
        part = (gap > low) & (gap <= high)
        expected = np.mean(1 / (1 + np.exp(-gap[part])))
        assert won[part].mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / part.sum()))


def differing(right, wrong):
    """[start, end) of all words of `wrong`, and digits of its numbers, that are others in `right`."""
    found, start = [], 0
    for whole, other in zip(right.split(" "), wrong.split(" "), strict=True):
        one, bare = whole.rstrip(".,"), other.rstrip(".,")
        assert whole[len(one) :] == other[len(bare) :]
        if bare.isdigit():
            digits = enumerate(zip(one, bare, strict=True), start)
            found += [[i, i + 1] for i, (before, after) in digits if before != after]
        elif bare != one:
            found.append([start, start + len(bare)])
        start += len(other) + 1
    return found


@pytest.fixture(scope="module")
def corrupted():
    rows = split_rows("corrupted")
    assert [row["kind"] for row in rows] == list(KINDS) * (ROWS["corrupted"] // len(KINDS))
    return [(read_post(row["prompt"]), row) for row in rows]


def test_what_is_right_in_a_corrupted_row_states_no_wrong_fact(corrupted):
    for post, row in corrupted:
        rewards = true_rewards(post, row["chosen"])
        assert min(rewards) == pytest.approx(WORD)
        assert sum(reward > 0.2 for reward in rewards) >= 3  # who, what, the end


def test_the_mark_reaches_from_the_first_word_or_digit_that_differs_to_the_last(corrupted):
    fillers, lengths = set(), {kind: set() for kind in KINDS}
    for _, row in corrupted:
        right, wrong = row["chosen"], row["rejected"]
        ((first, last),) = row["wrong"]
        lengths[row["kind"]].add(len(wrong[first:last].split()))
        if row["kind"] == "run-on":
            start = len(right) + 1
            fillers.add(filler := wrong[start:])
            assert wrong == f"{right} {filler}"
            assert (first, last) == (start, start + len(filler.split()[0]))
        else:
            parts = differing(right, wrong)
            assert (first, last) == (parts[0][0], parts[-1][1])
    assert fillers == set(FILLERS)
    assert lengths["distractor"] == {1, 2} and lengths["run-on"] == {1}
    assert {1, 2, 4} <= lengths["invented"] <= {1, 2, 3, 4}  # values have four words at most


def test_the_mark_begins_where_the_reward_is_lowest_and_no_other_fact_is_wrong(corrupted):
    for post, row in corrupted:
        wrong, ((start, end),) = row["rejected"], row["wrong"]
        rewards = true_rewards(post, wrong)
        lowest, words = int(np.argmin(rewards)), split_words(wrong)
        assert len(split_words(wrong[:start])) in (lowest, lowest + 1)  # in a number, digits may stand before it
        assert wrong[start:end].split()[0] in words[lowest]
        if row["kind"] == "run-on":
            before = true_rewards(post, row["chosen"])[:-1]
            assert rewards[:lowest] == before and rewards[lowest] == LATE_WORD
        else:
            assert sum(reward < -1 for reward in rewards) == 1 and rewards[lowest] < -1.5


def test_distractors_stand_in_the_post_and_what_is_invented_does_not(corrupted):
    seen = {kind: set() for kind in KINDS}
    for post, row in corrupted:
        swapped = [row["chosen"].replace(post.facts[fact], value) for fact, value in post.distractors.items()]
        assert (row["rejected"] in swapped) == (row["kind"] == "distractor")
        right = [fact for fact in FACTS if post.facts[fact] in row["chosen"]]
        lost = [fact for fact in right if post.facts[fact] not in row["rejected"]]
        assert len(lost) == (row["kind"] != "run-on")
        seen[row["kind"]].update(lost)
    assert seen == {"distractor": {*FACTS}, "invented": {*FACTS}, "run-on": set()}


def test_corrupted_rows_have_words_that_change_nothing_on_both_sides(corrupted):
    for phrases in EXTRAS.values():
        said = [[re.findall("|".join(phrases), row[name]) for name in ("chosen", "rejected")] for _, row in corrupted]
        assert all(right == wrong for right, wrong in said)
        assert 100 < sum(right != [] for right, _ in said) < 500


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev'; expected one of train, test, corrupted"):
        split_rows("dev")


def test_documents_teach_the_language_and_not_the_task():
    texts = [row["completion"] for row in documents(2000, 0)]
    assert documents(5, 0) != documents(5, 1) and all(row["prompt"] == "" for row in documents(5, 0))
    assert not any(CUE.strip() in text for text in texts)
    assert all("\nA: " in text for text in texts)
    # All words of summaries that change nothing do.
    assert all(any(phrase in text for text in texts) for phrases in EXTRAS.values() for phrase in phrases)
    assert all(any(filler in text for text in texts) for filler in FILLERS)


def test_posts_are_told_again_under_any_heading_in_more_sentences_than_a_summary_has():
    headings, lengths, confused = [], set(), []
    for row in documents(2000, 0):
        post = read_post(row["completion"].split("\n")[0])
        for heading, story in re.findall(r"\n([A-Z;]{2,6}): (.+)", row["completion"]):
            headings.append(heading)
            lengths.add(len(re.split(r"(?<=[.?]) ", story)))
            if "what" in post.distractors:
                confused.append(" ".join(post.distractors["what"].split()[-2:]) in story)
            right = [value for value in (post.facts["what"], post.distractors.get("what")) if value]
            assert any(" ".join(value.split()[-2:]) in story for value in right)
    assert 1000 < len(headings) < 1400 and len(set(headings)) > 0.9 * len(headings)
    assert lengths == {2, 3, 4}
    assert sum(confused) / len(confused) == pytest.approx(0.4, abs=0.06)
