import pickle

import numpy as np
import pytest

from qstar_jax.control.segments import Episodes, draw_pairs, draw_segments, pair_up, read_episodes, split_episodes
from qstar_jax.errors import InputError


def arrays(**changed):
    rng = np.random.default_rng(0)
    given = {
        "observations": rng.normal(size=(4, 6, 3)),
        "actions": rng.normal(size=(4, 5, 2)),
        "rewards": rng.normal(size=(4, 5)),
        "lengths": np.array([5, 3, 4, 5]),
        "values": rng.normal(size=(4, 6)),
    } | changed
    return {name: array for name, array in given.items() if array is not None}


def saved(path, **changed):
    np.savez(path / "episodes.npz", **arrays(**changed))
    return path / "episodes.npz"


def test_a_file_is_read_as_it_was_written(tmp_path):
    episodes = read_episodes(saved(tmp_path))
    for name, array in arrays().items():
        np.testing.assert_array_equal(getattr(episodes, name), array)
    assert read_episodes(saved(tmp_path, values=None)).values is None
    assert read_episodes(saved(tmp_path, rewards=np.ones((4, 5), np.float32))).rewards.dtype == np.float64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": None}, "no array rewards"),
        ({"returns": np.zeros(4)}, "unknown array returns"),
        ({"rewards": np.zeros((4, 6))}, r"rewards has shape \[4, 6\]; expected \[4, 5\]"),
        ({"observations": np.zeros((4, 5, 3))}, r"observations has shape \[4, 5, 3\]; expected \[4, 6, 3\]"),
        ({"actions": np.zeros((4, 5))}, r"actions has shape \[4, 5\]; expected \[E, T, A\]"),
        ({"lengths": np.ones(4)}, "lengths has dtype float64; expected integers"),
        ({"lengths": np.array([5, 3, 6, 5])}, r"lengths must lie in \[1, 5\]"),
        ({"lengths": np.array([5, 0, 4, 5])}, r"lengths must lie in \[1, 5\]"),
        ({"values": np.full((4, 6), np.inf)}, "values holds infinity"),
        ({"rewards": np.full((4, 5), np.nan)}, "rewards holds NaN"),
        ({"actions": np.full((4, 5, 2), "a")}, "actions has dtype <U1; expected numbers"),
        ({"rewards": np.full((4, 5), {}, dtype=object)}, "no .npz file of plain arrays"),
    ],
)
def test_other_files_are_refused_by_the_name_of_the_array(changed, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_episodes(saved(tmp_path, **changed))


def test_what_is_padding_need_not_be_finite(tmp_path):
    padded = arrays()["rewards"]
    padded[1, 3:] = np.nan
    assert np.isnan(read_episodes(saved(tmp_path, rewards=padded)).rewards[1, 3])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", pickle.dumps([1]), b"text"])
def test_what_is_no_npz_file_is_refused_and_never_unpickled(content, tmp_path):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz: no \.npz file of plain arrays"):
        read_episodes(tmp_path / "x.npz")
    with pytest.raises(InputError, match="no such file"):
        read_episodes(tmp_path / "y.npz")
    np.save(tmp_path / "z.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"no \.npz file"):
        read_episodes(tmp_path / "z.npy")


def test_segments_are_stretches_of_episodes_each_once():
    episodes = Episodes(**arrays())
    segments = draw_segments(episodes, length=4, count=5, label="regret", discount=0.9, seed=1)  # 2 + 0 + 1 + 2
    expected = {}
    for e, length in enumerate(episodes.lengths):
        for t in range(length - 3):
            steps = slice(t, t + 4)
            score = sum(0.9**k * episodes.rewards[e, t + k] for k in range(4))
            score += 0.9**4 * episodes.values[e, t + 4] - episodes.values[e, t]
            expected[round(score, 9)] = (episodes.observations[e, steps], episodes.actions[e, steps])
    assert {round(score, 9) for score in segments.scores} == expected.keys()
    for observations, actions, score in zip(segments.observations, segments.actions, segments.scores, strict=True):
        np.testing.assert_array_equal(observations, expected[round(score, 9)][0])
        np.testing.assert_array_equal(actions, expected[round(score, 9)][1])


def test_segments_by_regret_begin_and_end_where_the_value_is_known():
    values = arrays()["values"]
    values[0, 1] = values[3, 0] = values[2, 4] = np.nan
    segments = draw_segments(Episodes(**arrays(values=values)), length=4, count=2, label="regret", discount=1.0, seed=0)
    expected = [arrays()["actions"][0, 0:4], arrays()["actions"][3, 1:5]]
    assert sorted(a.tobytes() for a in segments.actions) == sorted(a.tobytes() for a in map(np.array, expected))


def test_segments_that_cannot_be_drawn_are_refused():
    with pytest.raises(InputError, match=r"no episode has 6 steps .*\(the longest has 5\)"):
        draw_segments(Episodes(**arrays()), length=6, count=5, label="reward", discount=1.0, seed=0)
    with pytest.raises(InputError, match="the array values"):
        draw_segments(Episodes(**arrays(values=None)), length=2, count=5, label="regret", discount=1.0, seed=0)
    with pytest.raises(InputError, match="equal scores"):
        draw_pairs(np.ones(5), count=3, sampled=False, seed=0)
    with pytest.raises(InputError, match="one episode cannot be split"):
        split_episodes(Episodes(**arrays()).select(np.array([1])), held_out=0.5, seed=0)


def test_held_out_episodes_are_others():
    parts = split_episodes(Episodes(**arrays()), held_out=0.25, seed=0)
    assert [len(part.lengths) for part in parts] == [3, 1]
    rewards = np.concatenate([part.rewards for part in parts])
    assert {row.tobytes() for row in rewards} == {row.tobytes() for row in arrays()["rewards"]}


def test_pairs_follow_the_scores():
    scores = np.array([0.0, 1.0, 1.0, 3.0])
    pairs = draw_pairs(scores, count=500, sampled=False, seed=0)
    assert pairs.shape == (500, 2) and (scores[pairs[:, 0]] > scores[pairs[:, 1]]).all()
    drawn = draw_pairs(np.array([0.0, 1.0]), count=20_000, sampled=True, seed=0)
    share = (drawn[:, 0] == 1).mean()
    assert abs(share - 1 / (1 + np.exp(-1))) < 4 * (0.2 / 20_000) ** 0.5


def test_disjoint_pairs_use_every_segment_once():
    scores = np.random.default_rng(0).normal(size=11)
    pairs = pair_up(scores, sampled=False, seed=0)
    assert pairs.shape == (5, 2) and len(set(pairs.ravel())) == 10
    assert (scores[pairs[:, 0]] > scores[pairs[:, 1]]).all()
    with pytest.raises(InputError, match="2 held-out segments make 1 pairs"):
        pair_up(scores[:2], sampled=True, seed=0)
