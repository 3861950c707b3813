"""Meta-World's bin picking, without a display: episodes of a scripted policy with systematic flaws, and success rates.

Noise alone is no flaw: it averages out, so a clone of noisy episodes succeeds always, and preferences have nothing to
teach. So a part of the episodes has a gripper that never closes, that opens again, or an arm that wanders.

V is that of the scripted policy without noise, played from the stored state of the simulator: it is near the optimum,
so the label by regret is near the true one. It is played to the first success, after which every step earns the full
reward, and for `HORIZON` steps at most, after which it is taken to earn the last reward for ever.
"""

import hashlib
import json
import multiprocessing
import os
import warnings
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from scipy.stats import binomtest

from qstar_jax.console import say, track
from qstar_jax.control.actor import Actor, Params
from qstar_jax.control.segments import Episodes, read_episodes
from qstar_jax.errors import InputError
from qstar_jax.store.user_cache import user_cache

NAME = "bin-picking-v3"
HORIZON = 250  # steps of an episode, and of a roll-out that values a state
EPISODES, PART = 400, 25  # episodes in all, and in a part of the cache
SPACING = 32  # steps between states with a value, from a random one on
AFTER = 30  # steps of an episode after its first success
FLAWS = {"none": 0.6, "never_closes": 0.17, "opens_again": 0.115, "wanders": 0.115}  # -> share of the episodes
NOISE = {"none": (0.2, 0.55)}  # flaw -> range of the noise's standard deviation; others: 0.3
_KEPT = np.r_[0:18, 22:39]  # all but the previous position of the hand, which tells a clone what it did before


class Arm:
    """The robot arm, with observations of 35 numbers and rewards in [0, 1].

    Args:
        seed: Seed of the object's positions.
    """

    def __init__(self, seed: int):
        os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn
        warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")  # the script's actions are clipped
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import SawyerBinPickingV3Policy
        except ImportError as error:
            raise _not_installed(error) from error
        self._mujoco, self._env = mujoco, ALL_V3_ENVIRONMENTS[NAME]()
        self._env._freeze_rand_vec, self._env._set_task_called, self._env._partially_observable = False, True, False
        self._env.seeded_rand_vec = True  # or positions come from numpy's global generator
        self._env.seed(seed)
        self._script = SawyerBinPickingV3Policy()
        self._spec = mujoco.mjtState.mjSTATE_INTEGRATION
        self._all: Float[np.ndarray, " 39"] | None = None

    def reset(self) -> Float[np.ndarray, " 35"]:
        """Begins an episode with a new position of the object."""
        self._all, _ = self._env.reset()
        return self._all[_KEPT]

    def step(self, action: Float[np.ndarray, " 4"]) -> tuple[Float[np.ndarray, " 35"], float, bool]:
        """Moves the arm; returns observation, reward in [0, 1], and whether the object is in its bin."""
        self._all, reward, _, _, info = self._env.step(np.clip(action, -1, 1))
        return self._all[_KEPT], float(reward) / 10, bool(info["success"])

    def scripted_action(self) -> Float[np.ndarray, " 4"]:
        """Returns what the scripted policy does now, clipped to [-1, 1]."""
        return np.clip(self._script.get_action(self._all), -1, 1)

    def state(self) -> tuple:
        """Returns the state of the simulator and of the environment around it."""
        model, data = self._env.model, self._env.data
        physics = np.empty(self._mujoco.mj_stateSize(model, self._spec))
        self._mujoco.mj_getState(model, data, physics, self._spec)
        python = (self._env.curr_path_length, self._env._prev_obs.copy(), self._env._last_stable_obs)
        return physics, python, self._all.copy()

    def restore(self, state: tuple):
        """Returns to a stored state of the same episode."""
        physics, (steps, previous, stable), self._all = state[0], state[1], state[2].copy()
        model, data = self._env.model, self._env.data
        self._mujoco.mj_setState(model, data, physics, self._spec)
        self._mujoco.mj_forward(model, data)  # what is computed from the state
        self._mujoco.mj_setState(model, data, physics, self._spec)  # mj_forward changes the warm start
        self._env.curr_path_length, self._env._prev_obs, self._env._last_stable_obs = steps, previous.copy(), stable

    def value(self, discount: float) -> float:
        """Plays the scripted policy from here; returns its discounted reward, without an end, and comes back."""
        state, total, weight = self.state(), 0.0, 1.0
        self._env.curr_path_length = 0  # the limit of an episode is none of a roll-out
        for _ in range(HORIZON):
            _, reward, success = self.step(self.scripted_action())
            total, weight = total + weight * reward, weight * discount
            if success:
                break
        self.restore(state)
        return total + weight * reward / (1 - discount)


def play_episode(arm: Arm, rng: np.random.Generator, discount: float) -> dict[str, np.ndarray]:
    """Plays one episode of a flaw drawn at random.

    Returns:
        observations [T + 1, 35], actions [T, 4], rewards [T], values [T + 1] with NaN where no roll-out began.
    """
    flaw = rng.choice(list(FLAWS), p=list(FLAWS.values()))
    noise = rng.uniform(*NOISE.get(flaw, (0.3, 0.3)))
    observations, actions, rewards, values = [arm.reset()], [], [], []
    offset, closed_at, drift, end = rng.integers(SPACING), None, np.zeros(4), HORIZON
    for step in range(HORIZON + 1):
        values.append(arm.value(discount) if step % SPACING == offset % SPACING else np.nan)
        if step == end:
            break
        action = arm.scripted_action()
        if closed_at is None and action[3] > 0:
            closed_at = step
        if flaw == "never_closes":
            action[3] = -1.0
        elif flaw == "opens_again" and closed_at is not None and step - closed_at < 40:
            action[2:] = action[2] + 0.5 * (rng.random() < 0.3), -1.0
        elif flaw == "wanders":
            drift = 0.9 * drift + 0.4 * rng.normal(size=4)
            action = drift
        actions.append(np.clip(action + noise * rng.normal(size=4), -1, 1))
        observation, reward, success = arm.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        if success and end == HORIZON:
            end = min(step + 1 + AFTER, HORIZON)
    return {"observations": np.array(observations), "actions": np.array(actions), "rewards": np.array(rewards),
            "values": np.array(values)}  # fmt: skip


def episodes_folder(seed: int, discount: float) -> Path:
    """Names the cached episodes: by all that they depend on, the versions of the simulator included.

    Raises:
        InputError: If Meta-World is not installed.
    """
    try:
        versions = {package: version(package) for package in ("metaworld", "mujoco")}
    except PackageNotFoundError as error:
        raise _not_installed(error) from error
    recipe = [NAME, versions, HORIZON, EPISODES, PART, SPACING, AFTER, FLAWS, NOISE, _KEPT.tolist(), seed, discount]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return user_cache("control") / f"{NAME}-{digest}"


def cached_episodes(seed: int, discount: float, console: Console | None = None) -> Episodes:
    """Plays the episodes with all cores, or reads those of the user's cache, where parts of an interrupted run stay.

    Args:
        seed: Seed of the episodes.
        discount: gamma of the values.
        console: Where to show progress.

    Raises:
        InputError: If Meta-World is not installed.
    """
    folder = episodes_folder(seed, discount)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"part-{number:03d}.npz" for number in range(EPISODES // PART)]
    missing = [(part, seed * 1000 + n, discount) for n, part in enumerate(parts) if not part.exists()]
    if missing:
        Arm(seed)  # says what is missing before processes begin
        say(console, f"{NAME}: playing {len(missing) * PART} episodes of the scripted policy with flaws, into {folder}")
        with multiprocessing.get_context("spawn").Pool(min(len(missing), os.cpu_count() or 1)) as pool:
            for _ in track(console, pool.imap_unordered(_write_part, missing), "parts", len(missing)):
                pass
    return _join([_read_part(part) for part in parts])


def _not_installed(error: ImportError) -> InputError:
    return InputError(f"--task {NAME} needs Meta-World ({error}): pip install 'qstar_jax[control]'")


def _read_part(part: Path) -> Episodes:
    try:
        return read_episodes(part)
    except (InputError, zipfile.BadZipFile) as error:
        raise InputError(f"{error}; delete it, and it is played again") from error


def _write_part(work: tuple[Path, int, float]):
    part, seed, discount = work
    arm, rng = Arm(seed), np.random.default_rng(seed)
    played = [play_episode(arm, rng, discount) for _ in range(PART)]
    lengths = np.array([len(episode["rewards"]) for episode in played])
    arrays = {
        name: np.stack([_padded(episode[name], HORIZON + (name in ("observations", "values"))) for episode in played])
        for name in played[0]
    }
    temporary = part.with_name(f".{part.stem}.{os.getpid()}.npz")
    np.savez_compressed(temporary, lengths=lengths, **arrays)
    os.replace(temporary, part)


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array.astype(np.float32), [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])


def _join(parts: list[Episodes]) -> Episodes:
    names = ("observations", "actions", "rewards", "lengths", "values")
    return Episodes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def success_measure(shift: Float[np.ndarray, " O"], scale: Float[np.ndarray, " O"]):
    """Makes a measure of the share of episodes with a success within `HORIZON` steps, with its 95 % Wilson interval.

    Args:
        shift: Subtracted from observations.
        scale: Divides them then.
    """

    def measure(actor: Actor, params: Params, episodes: int) -> dict[str, float]:
        act = jax.jit(lambda observation: actor.mode(params, (observation - shift) / scale))
        arm, successes = Arm(seed=10**6), 0
        for _ in range(episodes):
            observation = arm.reset()
            for _ in range(HORIZON):
                observation, _, success = arm.step(np.asarray(act(observation.astype(np.float32))))
                if success:
                    successes += 1
                    break
        interval = binomtest(successes, episodes).proportion_ci(method="wilson")
        return {
            "eval_success": successes / episodes,
            "eval_success_low": float(interval.low),
            "eval_success_high": float(interval.high),
        }

    return measure
