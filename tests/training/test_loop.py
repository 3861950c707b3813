import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.config import TrainOptions
from qstar_jax.training.loop import Loop
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, make_train_step

ARM_REWARDS = jnp.array([0.0, 0.5, 1.0])


class Bandit(Source):
    """Three arms, pulled on policy."""

    name = "a bandit"

    def at_step(self, step, state):
        arms = jax.random.categorical(jax.random.key(step), state.params["logits"], shape=(64,))
        return {"arms": arms, "rewards": ARM_REWARDS[arms]}


def reinforce(params, ref_params, batch):
    """The policy gradient: -(reward - baseline) log pi(arm)."""
    logp = jax.nn.log_softmax(params["logits"])[batch["arms"]]
    advantages = batch["rewards"] - batch["rewards"].mean()
    total, count = -(advantages * logp).sum(), jnp.float32(len(logp))
    return total / count, {"loss": (total, count), "reward": (batch["rewards"].sum(), count)}


def test_a_policy_gradient_on_policy_raises_the_expected_reward():
    optimizer, params = optax.adam(0.1), {"logits": jnp.zeros(3)}
    train_step = jax.jit(make_train_step(reinforce, optimizer))
    loop = Loop(TrainOptions(), steps=60, train_step=train_step, source=Bandit())
    state, summary = loop.run(TrainState(jnp.int32(0), params, optimizer.init(params)))
    expected_reward = jax.nn.softmax(state.params["logits"]) @ ARM_REWARDS  # 0.5 at first
    assert expected_reward > 0.95 and summary["reward"] > 0.9
    assert "epoch" not in summary and "perf/tokens_per_second" not in summary and summary["perf/seconds_per_step"] > 0


class Numbers(Source):
    """Batches are the numbers of their steps, or NaN."""

    name = "numbers"

    def __init__(self, bad_step=None):
        self.bad_step, self.made = bad_step, []

    def at_step(self, step, state):
        self.made.append(step)
        return jnp.float32(np.nan if step == self.bad_step else step)


def linear(params, ref_params, batch):
    total = params["x"] * batch
    return total, {"loss": (total, jnp.ones(())), "number": (batch, jnp.ones(()))}


class Log:
    """Keeps what a log would write."""

    def __init__(self, evaluated=()):
        self.lines, self.summary, self._evaluated = [], {}, evaluated

    def evaluation(self, step):
        return {} if step in self._evaluated else None

    def write(self, step, means):
        self.lines.append((step, "eval" if "eval" in means else means["number"]))

    def advance(self, done):
        """As a progress bar would."""


def run_linear(source, saved, start=0, batch=None, evaluated=(), **options):
    """Minimizes `x * batch` in five steps; appends (step, x) of checkpoints to `saved`, returns the lines logged."""
    log = Log(evaluated)
    loop = Loop(
        TrainOptions(**{"log_every": 2, **options}),
        steps=5,
        train_step=jax.jit(make_train_step(linear, optax.sgd(0.1))),
        source=source,
        evaluators=[lambda policy, ref_params: {"eval": float(policy["x"])}],
        save=lambda state, step, window: saved.append((step, round(float(state.params["x"]), 6))),
        log=log,
    )
    params = {"x": jnp.ones(())}
    loop.run(TrainState(jnp.int32(start), params, optax.sgd(0.1).init(params)), start, batch)
    return log.lines


def test_lines_are_means_since_the_last_and_evaluations_and_checkpoints_follow_their_intervals():
    lines = run_linear(Numbers(), saved := [], eval_every=4, save_every=2)
    # Steps 1 and 3 end a window because a checkpoint follows them.
    assert lines == [(0, "eval"), (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, "eval"), (4, 4.0), (5, "eval")]
    assert saved == [(2, 0.9), (4, 0.4), (5, 0.0)]
    lines = run_linear(Numbers(), saved := [])
    assert lines == [(0, "eval"), (0, 0.0), (2, 1.5), (4, 3.5), (5, "eval")] and saved == [(5, 0.0)]


def test_intervals_may_be_shares_of_all_steps():
    lines = run_linear(Numbers(), saved := [], eval_every=0.4, save_every=0.5, log_every=0.9)
    assert [step for step, mean in lines if mean == "eval"] == [0, 2, 4, 5]
    assert [step for step, _ in saved] == [3, 5] and lines[-2][0] == 4


def test_the_first_batch_is_made_once():
    source = Numbers()
    lines = run_linear(source, [], start=3, batch=jnp.float32(3.0))
    assert source.made == [4] and lines == [(4, 3.5), (5, "eval")]


def test_an_evaluation_that_is_due_is_made_first_unless_the_log_has_it():
    assert run_linear(Numbers(), [], start=3, eval_every=3) == [(3, "eval"), (4, 3.5), (5, "eval")]
    assert run_linear(Numbers(), [], start=3, eval_every=3, evaluated=[3]) == [(4, 3.5), (5, "eval")]
    assert run_linear(Numbers(), [], start=5) == [(5, "eval")]


def test_a_step_that_is_not_finite_ends_the_run_and_the_state_before_it_is_kept():
    saved = []
    with pytest.raises(FloatingPointError, match=r"step 3 of numbers: loss nan, grad_norm nan; .* as checkpoint 3"):
        run_linear(Numbers(bad_step=3), saved)
    assert saved == [(3, 0.7)]
