"""What every function of `mdp` and `shaping` keeps to: masks, gradients, shapes, precision, jit and vmap."""

import importlib.util
import inspect
from dataclasses import dataclass, field
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax import mdp, shaping
from qstar_jax.mdp import TokenScores

# Whole, right-padded, left-padded with a hole, left-padded, empty.
MASKS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
TRUNCATED = jnp.array([True, False, True, False, True])
RUBBISH = [jnp.nan, jnp.inf, -jnp.inf, 1e30]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


READINGS = ("log_ratios", "rewards", "returns", "v", "q", "advantages")


@dataclass(frozen=True)
class Case:
    """Arguments of a function, or fields of the scores that a method reads, with one leading batch axis."""

    name: str
    arrays: dict
    options: dict = field(default_factory=dict)
    tag: str = ""

    @property
    def id(self):
        return f"{self.name}-{self.tag}" if self.tag else self.name

    @property
    def key(self):
        """The argument that says what is padding."""
        return next((key for key in ("mask", "present") if key in self.arrays), None)

    @property
    def module(self):
        return shaping if hasattr(shaping, self.name) and not hasattr(mdp, self.name) else mdp

    def __call__(self, arrays=None, module=None, **options):
        module = module or self.module
        arrays = self.arrays if arrays is None else arrays
        if self.name in READINGS:
            fields = {"logp": jnp.zeros(arrays["mask"].shape), "ref_logp": None, "logz": None}
            return [getattr(module.TokenScores(**fields | arrays), self.name)(**self.options | options)]
        owner = module.TokenScores if self.name == "from_logits" else module
        return jax.tree.leaves(getattr(owner, self.name)(**arrays, **self.options | options))

    def total(self, arrays, **options):
        """One number that depends on every entry of the results in its own way."""
        leaves = [x for x in self(arrays, **options) if is_float(x)]
        return sum((x * np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)).sum() for x in leaves)

    def spoil(self, *rubbish):
        """Puts rubbish wherever nothing may be read."""
        mask = np.asarray(self.arrays[self.key])

        def change(name, x):
            read = mask if x.ndim == mask.ndim else mask[..., None]
            if name == "final_values":
                read = np.asarray(self.arrays["truncated"]) & mask.any(-1)
            return jnp.asarray(np.where(read, x, np.resize(np.float32(rubbish), x.shape)))

        return {name: change(name, x) if is_float(x) else x for name, x in self.arrays.items()}


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def tokens(*names):
    return {name: normal(seed, *MASKS.shape) for seed, name in enumerate(names)} | {"mask": MASKS}


BETA = {"beta": 0.3}
ENDS = {"truncated": TRUNCATED, "final_values": normal(9, 5)}
LOGITS = {"logits": 2 * normal(10, 5, 4, 6), "ref_logits": 2 * normal(11, 5, 4, 6)}
RESPONSES = {
    "rewards": normal(12, 2, 5, 4),
    "other": normal(13, 2, 5, 4),
    "mask": jnp.stack([MASKS, MASKS[::-1, ::-1]]),
}
STEP_IDS = jnp.array([[0, 0, 1, 2], [1, 1, 0, 0], [5, -1, 2, 2], [-7, 3, 0, 1], [0, 1, 2, 3]])
CASES = [
    Case("from_logits", LOGITS | {"tokens": jnp.where(MASKS, jnp.arange(20).reshape(5, 4) % 6, -100), "mask": MASKS}),
    Case("log_ratios", tokens("logp", "ref_logp")),
    Case("rewards", tokens("logp", "ref_logp"), BETA),
    Case("returns", tokens("logp", "ref_logp"), BETA),
    Case("v", tokens("logz"), BETA),
    Case("q", tokens("logp", "logz"), BETA),
    Case("advantages", tokens("logp"), BETA),
    Case("endogenous_rewards", tokens("q", "next_values")),
    Case("implicit_rewards", {name: x for name, x in tokens("logp", "ref_logp").items() if name != "mask"}, BETA),
    Case("masked", tokens("values")),
    Case("successor_values", tokens("values")),
    Case("successor_values", tokens("values") | ENDS, tag="truncated"),
    Case("shape_rewards", tokens("rewards", "potentials", "next_potentials")),
    Case("are_equivalent", RESPONSES),
    Case("are_equivalent", RESPONSES | {"truncated": jnp.stack([TRUNCATED, ~TRUNCATED])}, tag="truncated"),
    Case("preference_log_prob", {"returns": 3 * normal(14, 5, 4)}),
    Case("preference_log_prob", {"returns": 3 * normal(14, 5, 4), "present": MASKS}, tag="present"),
    Case("kl_divergence", {"logits": LOGITS["logits"], "other_logits": LOGITS["ref_logits"], "mask": MASKS}),
    Case("entropy", {"logits": LOGITS["logits"], "mask": MASKS}),
    Case("prefix_values", tokens("rewards")),
    Case("step_rewards", tokens("rewards") | {"step_ids": STEP_IDS}, {"num_steps": 3}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
padded_case = pytest.mark.parametrize("case", [case for case in CASES if case.key], ids=lambda case: case.id)


@cache
def compiled(number):
    case = CASES[number]

    def run(floats, rest):
        return case(floats | rest)

    def total(floats, rest):
        return case.total(floats | rest)

    return jax.jit(run), jax.jit(jax.grad(total))


def split(arrays):
    return tuple({k: x for k, x in arrays.items() if is_float(x) == wanted} for wanted in (True, False))


def value_and_grad(case, arrays):
    run, grad = compiled(CASES.index(case))
    return run(*split(arrays)), grad(*split(arrays))


def assert_same(found, expected, **tolerance):
    check = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: check(a, b, **tolerance), found, expected)


def float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64) if is_float(x) else x, tree)


def test_the_table_covers_every_public_function():
    public = {
        name
        for module in (mdp, shaping)
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and not name.startswith("_")
    }
    assert {case.name for case in CASES} == public | {*READINGS, "from_logits"}
    methods = {name for name, _ in inspect.getmembers(TokenScores, inspect.isroutine) if not name.startswith("_")}
    assert methods == {*READINGS, "from_logits", "require"}


@pytest.mark.parametrize("rubbish", RUBBISH)
@padded_case
def test_what_stands_under_the_mask_changes_neither_value_nor_gradient(case, rubbish):
    assert_same(value_and_grad(case, case.spoil(rubbish)), value_and_grad(case, case.arrays))


@padded_case
def test_neither_does_it_without_jit(case):
    with jax.disable_jit():
        dirty = case.spoil(*RUBBISH)
        found = case(dirty), jax.grad(lambda x, y: case.total(x | y))(*split(dirty))
    assert_same(found, value_and_grad(case, case.arrays), rtol=1e-5, atol=1e-6)


@padded_case
def test_results_and_gradients_are_zero_under_the_mask(case):
    mask = np.asarray(case.arrays[case.key])
    value, grad = value_and_grad(case, case.spoil(jnp.nan))
    for x in (*value, *grad.values()):
        if x.shape[: mask.ndim] == mask.shape:
            assert not np.asarray(x)[~mask].any()


@padded_case
def test_an_empty_response_is_worth_nothing(case):
    empty = case.arrays | {case.key: jnp.zeros_like(case.arrays[case.key])}
    broken = {k: jnp.full_like(x, jnp.nan) if is_float(x) else x for k, x in empty.items()}
    for arrays in (empty, broken):
        value, grad = value_and_grad(case, arrays)
        assert not any(x.any() for x in (*value, *grad.values()) if is_float(x))


@every_case
def test_batched_equals_vmapped_and_takes_any_leading_axes(case):
    def row(x):
        return x[1]

    def more(x):
        return jnp.stack([x, x[::-1]])[None]

    @jax.jit
    def run(arrays):
        value = case(arrays)
        found = jax.vmap(case)(arrays), case(jax.tree.map(row, arrays)), case(jax.tree.map(more, arrays))
        return found, (value, jax.tree.map(row, value), jax.tree.map(more, value))

    found, expected = run(case.arrays)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_compiled_equals_eager(case):
    assert_same(value_and_grad(case, case.arrays)[0], case(), rtol=1e-5, atol=1e-6)


@every_case
def test_takes_numpy_arrays(case):
    assert_same(case({k: np.asarray(x) for k, x in case.arrays.items()}), case())


@pytest.mark.parametrize("case", [case for case in CASES if "beta" in case.options], ids=lambda case: case.id)
def test_temperature_may_be_traced_and_enters_linearly(case):
    total = jax.jit(jax.value_and_grad(lambda beta: case.total(case.arrays, beta=beta)))
    (start, slope), (end, _) = total(0.0), total(1.0)
    np.testing.assert_allclose(slope, end - start, rtol=1e-4)
    np.testing.assert_allclose(total(0.3)[0], case.total(case.arrays), rtol=1e-4, atol=1e-6)


@every_case
def test_gradients_equal_finite_differences(case):
    with jax.enable_x64(True):
        floats, rest = split(float64(case.arrays))
        check_grads(jax.jit(lambda x: case.total(x | rest)), (floats,), order=1, modes="rev", rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@every_case
def test_results_have_the_precision_of_the_arguments(case, dtype):
    with jax.enable_x64(True):
        arrays = {k: jax.ShapeDtypeStruct(x.shape, dtype if is_float(x) else x.dtype) for k, x in case.arrays.items()}
        results = jax.eval_shape(case, arrays)
    # Whole logits are read in float32 at least: log-ratios of bfloat16 log-probabilities are mostly rounding.
    expected = "float32" if "logits" in arrays and dtype == "bfloat16" else dtype
    assert {str(x.dtype) for x in results} - {"bool"} == {expected}


def along(case, change):
    """Changes every argument along the axis of tokens, or of a ranking's places."""
    shape = case.arrays[case.key].shape
    return {k: change(x, len(shape) - 1) if x.shape[: len(shape)] == shape else x for k, x in case.arrays.items()}


def crop(x, axis, start, length):
    return np.asarray(x)[(slice(None),) * axis + (slice(start, start + length),)]


@padded_case
def test_padding_on_either_side_changes_nothing(case, length=3):
    def pad(x, axis):
        widths = [(2, 3) if i == axis else (0, 0) for i in range(x.ndim)]
        return np.pad(crop(x, axis, 0, length), widths, constant_values=np.nan if is_float(x) else 0)

    padded, short = along(case, pad), along(case, lambda x, axis: crop(x, axis, 0, length))
    shape = padded[case.key].shape
    found, expected = jax.jit(lambda padded, short: (case(padded), case(short)))(padded, short)
    found = [crop(x, len(shape) - 1, 2, length) if x.shape == shape else x for x in found]
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@padded_case
def test_arrays_without_tokens_are_allowed(case):
    jax.eval_shape(case, along(case, lambda x, axis: crop(x, axis, 0, 0)))


@pytest.fixture(scope="module")
def unchecked():
    """The modules as users have them, without the checks of shapes that tests install."""
    modules = {}
    for module in (mdp, shaping):
        spec = importlib.util.spec_from_file_location(f"unchecked_{module.__name__}", module.__file__)
        modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[module])
    return modules


def arguments():
    for case in CASES:
        for name in case.arrays if case.key and len(case.arrays) > 1 else ():
            yield pytest.param(case, name, id=f"{case.id}-{name}")


@pytest.mark.parametrize(("case", "name"), arguments())
def test_shapes_that_would_be_broadcast_raise(unchecked, case, name):
    jax.eval_shape(lambda x: case(x, unchecked[case.module]), case.arrays)
    with pytest.raises((ValueError, TypeError)):
        jax.eval_shape(lambda x: case(x, unchecked[case.module]), case.arrays | {name: case.arrays[name][:1]})


def test_swapped_tokens_and_mask_are_named(unchecked):
    logits, tokens, mask = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)
    from_logits = unchecked[mdp].TokenScores.from_logits
    with pytest.raises(ValueError, match=r"tokens \[2, 3\] is bool: expected token ids, as in from_logits\(logits"):
        from_logits(logits, logits, mask, tokens)
    with pytest.raises(ValueError, match=r"mask \[2, 3\] is int32: expected bool"):
        from_logits(logits, logits, tokens, tokens)
