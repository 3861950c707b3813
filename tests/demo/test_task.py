"""The demo's language, its tokenizer and its true rewards."""

from random import Random

import pytest

from qstar_jax.demo import task
from qstar_jax.demo.task import (
    completion_rows,
    corrupt,
    hasty_summary,
    make_post,
    preference_rows,
    pretraining_rows,
    reference_summary,
    run_on,
    true_reward,
    true_rewards,
)
from qstar_jax.demo.vocabulary import CATEGORIES, CUE, build_tokenizer, split_words

SEEDS = range(300)
MAKERS = [completion_rows, preference_rows, pretraining_rows]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts_of(rows):
    return [text for row in rows for key, text in row.items() if key != "kind"]


def test_no_word_belongs_to_two_categories():
    words = [word for values in CATEGORIES.values() for word in values]
    assert len(words) == len(set(words))


def test_the_post_states_every_fact_and_distractor():
    for seed in SEEDS:
        post = make_post(Random(seed))
        words = split_words(post.text)
        assert set(post.facts.values()) <= set(words)
        assert set(post.distractors.values()) <= set(words)
        assert all(post.facts[category] != value for category, value in post.distractors.items())
        assert post.prompt == post.text + CUE


@pytest.mark.parametrize("form", range(3))
def test_the_reference_summary_has_the_greatest_reward(form):
    for seed in SEEDS:
        rng = Random(seed)
        post = make_post(rng)
        best = true_reward(post, reference_summary(post, form))
        assert best == len(post.facts) + 1
        assert best > true_reward(post, corrupt(post, rng)[0])
        assert best > true_reward(post, run_on(post, rng))


def test_only_the_wrong_word_is_punished():
    kinds = set()
    for seed in SEEDS:
        rng = Random(seed)
        post = make_post(rng)
        summary, kind, index = corrupt(post, rng)
        words = split_words(summary)
        rewards = true_rewards(post, words)
        assert [i for i, reward in enumerate(rewards) if reward < 0] == [index]
        assert (words[index] in post.distractors.values()) == (kind == "distractor")
        kinds.add(kind)
    assert kinds == {"distractor", "invented"}


def test_running_on_costs_every_late_word_and_the_end():
    post = make_post(Random(0))
    summary = reference_summary(post)
    n = len(split_words(summary))
    rewards = true_rewards(post, split_words(summary + " It rained."))
    assert rewards[:n] == true_rewards(post, split_words(summary))[:n]
    assert rewards[n:] == [-0.2, -0.2, -0.2, 0.0]


@pytest.mark.parametrize(
    "text", ["", " ", ".", "...", "\n\nTL;DR:", "<unk> <eos>", "Anna " * 200, "the " * 50, "é§ 7_7"]
)
def test_any_text_has_a_reward_below_the_best(text):
    for seed in range(20):
        post = make_post(Random(seed))
        assert -1000 < true_reward(post, text) < len(post.facts)


def test_repeating_a_right_fact_gains_nothing():
    post = make_post(Random(0))
    value = next(iter(post.facts.values()))
    assert true_rewards(post, [value, value]) == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("make", MAKERS)
def test_texts_survive_the_tokenizer(make, tokenizer):
    for text in texts_of(make(300, seed=0)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.strip(" ")
        answer = text.split(CUE)[-1]
        assert len(tokenizer(answer)["input_ids"]) == len(split_words(answer))


def test_prompt_and_answer_may_be_tokenised_apart(tokenizer):
    for row in completion_rows(100, seed=0):
        apart = [tokenizer(row[key])["input_ids"] for key in ("prompt", "completion")]
        assert apart[0] + apart[1] == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_the_tokenizer_survives_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    row = completion_rows(1, seed=0)[0]
    ids = tokenizer(row["prompt"])["input_ids"]
    assert loaded(row["prompt"])["input_ids"] == ids
    assert loaded.decode(ids) == row["prompt"]
    special = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2, 3]
    assert special == [loaded.unk_token_id, loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id]


@pytest.mark.parametrize("make", MAKERS)
def test_rows_are_pure_functions_of_the_seed(make):
    assert make(50, seed=1) == make(50, seed=1)
    assert not set(texts_of(make(200, seed=1))) & {row["prompt"] for row in make(200, seed=2) if row["prompt"]}


def test_lengths_stay_within_bounds(tokenizer):
    rows = preference_rows(2000, seed=0)
    assert max(len(ids) for ids in tokenizer([row["prompt"] for row in rows])["input_ids"]) <= 66
    assert max(len(ids) for ids in tokenizer([row["chosen"] for row in rows])["input_ids"]) <= 15
    assert max(len(ids) for ids in tokenizer([row["rejected"] for row in rows])["input_ids"]) <= 48


def test_a_hasty_summary_has_one_wrong_number():
    summaries = {seed: hasty_summary(make_post(Random(seed)), Random(seed)) for seed in SEEDS}
    late = {seed: summary for seed, summary in summaries.items() if summary}
    assert 0.2 < len(late) / len(SEEDS) < 0.4
    for seed, summary in late.items():
        post = make_post(Random(seed))
        rewards = true_rewards(post, split_words(summary))
        assert split_words(summary)[rewards.index(-1.0)] == post.distractors["number"]
        assert sum(rewards) == len(post.facts) - 1


def test_shares_of_flawed_rows(monkeypatch):
    posts = []
    monkeypatch.setattr(task, "make_post", lambda rng: posts.append(make_post(rng)) or posts[-1])
    rows = completion_rows(2000, seed=0)
    perfect = [
        true_reward(post, row["completion"]) == len(post.facts) + 1 for post, row in zip(posts, rows, strict=True)
    ]
    assert 0.2 < 1 - sum(perfect) / 2000 < 0.32
    kinds = [row["kind"] for row in preference_rows(2000, seed=0)]
    assert 0.25 < kinds.count("run-on") / 2000 < 0.4
    assert kinds.count("invented") > 400 < kinds.count("distractor")
