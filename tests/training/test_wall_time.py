"""Shares of wall time, measured with the real loop and compared with a clock outside of it."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

from qstar_jax.config import TrainOptions
from qstar_jax.training.loop import Loop
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.wall_time import PARTS

SECONDS = {"data": 0.05, "saving": 0.2, "evaluation": 0.1}  # of each call, of which there are 4, 2 and 3


class SlowSource(Source):
    def at_step(self, step, state):
        time.sleep(SECONDS["data"])
        return jnp.float32(step)


def linear(params, ref_params, batch):
    total = params["x"] * batch
    return total, {"loss": (total, jnp.ones(()))}


def test_shares_are_those_of_a_clock_outside_and_their_sum_is_one():
    step = jax.jit(make_train_step(linear, optax.sgd(0.1)))

    def take(state, batch):
        time.sleep(0.1)
        return step(state, batch)

    def evaluate(policy, ref_params):
        time.sleep(SECONDS["evaluation"])
        return {"eval_loss": float(policy["x"])}

    loop = Loop(
        TrainOptions(log_every=1, eval_every=2, save_every=2),
        steps=4,
        train_step=take,
        source=SlowSource(),
        evaluators=[evaluate],
        save=lambda state, step, window: time.sleep(SECONDS["saving"]),
    )
    params = {"x": jnp.ones(())}
    began = time.perf_counter()
    _, summary = loop.run(TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params)))
    total = time.perf_counter() - began
    shares = {name: summary[f"perf/time_{name}"] for name in PARTS}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    seconds = {name: share * total for name, share in shares.items()}
    assert seconds["data"] == pytest.approx(0.2, abs=0.05)
    assert seconds["saving"] == pytest.approx(0.4, abs=0.05)
    assert seconds["evaluation"] == pytest.approx(0.3, abs=0.05)
    assert 0.4 < seconds["steps"] < 0.6


def test_compilation_counts_as_itself_wherever_it_happens_and_nothing_twice():
    def compile_slowly(policy, ref_params):
        @jax.jit
        def outer(x):  # tracing takes time, and so does what it holds
            time.sleep(0.2)
            return jax.jit(lambda y: (time.sleep(0.2), y + 1)[1])(x)

        return {"eval_loss": float(outer(policy["x"]))}

    loop = Loop(
        TrainOptions(log_every=1),
        steps=1,
        train_step=jax.jit(make_train_step(linear, optax.sgd(0.1))),
        source=SlowSource(),
        evaluators=[compile_slowly],
    )
    params = {"x": jnp.ones(())}
    began = time.perf_counter()
    _, summary = loop.run(TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params)))
    seconds = {name: summary[f"perf/time_{name}"] * (time.perf_counter() - began) for name in PARTS}
    assert 0.8 <= seconds["compilation"] < 1.6  # two evaluations compile, 0.4 seconds each, and so does the step
    assert seconds["evaluation"] < 0.15 and seconds["steps"] < 0.15
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - began, rel=0.02)
