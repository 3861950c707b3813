import numpy as np
import pytest

pytest.importorskip("metaworld")

from qstar_jax.control import meta_world
from qstar_jax.control.meta_world import Arm


@pytest.fixture(scope="module")
def arm():
    return Arm(seed=3)


def test_a_seed_determines_the_episodes():
    one, other = Arm(seed=5), Arm(seed=5)
    first, second = one.reset(), one.reset()
    np.testing.assert_array_equal(first, other.reset())
    np.testing.assert_array_equal(second, other.reset())
    assert np.abs(first - second).max() > 1e-3  # the object lies elsewhere
    assert first.shape == (35,)


def test_a_stored_state_goes_on_bit_by_bit(arm):
    rng = np.random.default_rng(0)
    arm.reset()
    for _ in range(60):
        arm.step(arm.scripted_action())
    state, actions = arm.state(), rng.uniform(-1, 1, (20, 4))
    first = [arm.step(action) for action in actions]
    arm.restore(state)
    second = [arm.step(action) for action in actions]
    for (one, reward, _), (other, again, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        assert reward == again


def test_the_value_is_that_of_the_script_and_leaves_no_trace(arm):
    """V(s) = r + gamma V(s') along the script's own path, and the path is the same with and without roll-outs."""
    paths = []
    for seen in (False, True):
        arm = Arm(seed=7)
        arm.reset()
        values, rewards, path = [], [], []
        for _ in range(25):
            if seen:
                values.append(arm.value(0.99))
            observation, reward, _ = arm.step(arm.scripted_action())
            rewards.append(reward)
            path.append(observation)
        paths.append(np.array(path))
    np.testing.assert_array_equal(*paths)
    expected = np.array(rewards[:-1]) + 0.99 * np.array(values[1:])
    np.testing.assert_allclose(values[:-1], expected, rtol=1e-6)


def test_flaws_cost_value(monkeypatch):
    """Episodes with a gripper that never closes fail, and those without a flaw succeed."""
    rng, arm = np.random.default_rng(0), Arm(seed=1)
    monkeypatch.setattr(meta_world, "SPACING", 10**6)
    best = {}
    for flaw in ("none", "never_closes"):
        monkeypatch.setattr(meta_world, "FLAWS", {flaw: 1.0})
        best[flaw] = meta_world.play_episode(arm, rng, 0.99)["rewards"].max()
    assert best["none"] == 1.0 and best["never_closes"] < 1.0


def test_another_simulator_plays_other_episodes(monkeypatch):
    folder = meta_world.episodes_folder(seed=0, discount=0.99)
    assert folder == meta_world.episodes_folder(seed=0, discount=0.99)
    folders = {folder, meta_world.episodes_folder(seed=1, discount=0.99), meta_world.episodes_folder(0, discount=0.9)}
    real = meta_world.version
    for updated in ("metaworld", "mujoco"):
        monkeypatch.setattr(meta_world, "version", lambda name, updated=updated: real(name) + "1" * (name == updated))
        folders.add(meta_world.episodes_folder(seed=0, discount=0.99))
    assert len(folders) == 5
