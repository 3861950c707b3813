from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from qstar_jax.config import TrainOptions
from qstar_jax.errors import InputError
from qstar_jax.training.loop import Loop
from qstar_jax.training.profile import StepProfile, make_profile
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, make_train_step


class Numbers(Source):
    """Batches are the numbers of their steps; it notes what is being traced."""

    def __init__(self, monkeypatch, fail_at=None):
        self.traced, self._is_tracing, self._fail_at = [], False, fail_at
        start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: (self._set(True), start(folder)))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (self._set(False), stop()))

    def _set(self, is_tracing):
        assert is_tracing != self._is_tracing
        self._is_tracing = is_tracing

    def at_step(self, step, state):
        self.traced += [step] * self._is_tracing
        if step == self._fail_at:
            raise ZeroDivisionError
        return jnp.float32(step)


def linear(params, ref_params, batch):
    total = params["x"] * batch
    return total, {"loss": (total, jnp.ones(()))}


def run(source: Numbers, profile: StepProfile, start: int = 0):
    params = {"x": jnp.ones(())}
    step = jax.jit(make_train_step(linear, optax.sgd(0.1)))
    loop = Loop(TrainOptions(), steps=6, train_step=step, source=source, profile=profile)
    loop.run(TrainState(jnp.int32(start), params, optax.sgd(0.1).init(params)), start)
    return source.traced


def traces(folder: Path) -> list[Path]:
    return list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_trace_has_the_steps_of_its_range(tmp_path, monkeypatch):
    assert run(Numbers(monkeypatch), make_profile("2:4", tmp_path, 6)) == [2, 3]
    (trace,) = traces(tmp_path)
    assert b"train_step" in trace.read_bytes()  # the program that ran


@pytest.mark.parametrize(("start", "traced"), [(3, [3, 4]), (5, [])])
def test_a_resumed_run_traces_what_is_left_of_the_range(start, traced, tmp_path, monkeypatch):
    assert run(Numbers(monkeypatch), make_profile("2:5", tmp_path, 6), start) == traced
    assert len(traces(tmp_path)) == bool(traced)


def test_a_trace_in_which_a_run_fails_is_kept(tmp_path, monkeypatch):
    source = Numbers(monkeypatch, fail_at=3)
    with pytest.raises(ZeroDivisionError):
        run(source, make_profile("2:5", tmp_path, 6))
    assert source.traced == [2, 3] and not source._is_tracing and len(traces(tmp_path)) == 1


@pytest.mark.parametrize("text", ["3:3", "4:2", "-1:2", "a:b", "3", "3:", "3:5:1", "", "1_0:12", "²:³"])
def test_what_is_no_range_is_refused(text, tmp_path, make_config, tiny_train):
    with pytest.raises(InputError, match=r"train\.profile .*expected FIRST:LAST"):
        tiny_train(make_config(tmp_path / "out", train={"profile": text}))
    assert not (tmp_path / "out").exists()


def test_steps_that_the_run_does_not_have_are_refused(tmp_path, make_config, tiny_train):
    with pytest.raises(InputError, match=r"train\.profile 5:7: the run has 6 steps"):
        tiny_train(make_config(tmp_path / "out", train={"profile": "5:7"}))
