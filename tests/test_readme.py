"""The README's code, run as it stands there."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.losses import make_loss
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState

README = Path(__file__).parents[1] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_five_lines_of_research_code():
    logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 7))
    lengths = jnp.array([[5, 3], [1, 4], [2, 2]])
    mask = jnp.arange(5) < lengths[..., None]
    tokens = jnp.where(mask, jax.random.randint(jax.random.key(1), (3, 2, 5), 0, 7), -100)
    code = blocks()[0]
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) == 5
    names = {"logits": logits, "ref_logits": ref_logits, "tokens": tokens, "mask": mask}
    exec(code, names)
    chosen = np.take_along_axis(np.asarray(logits), np.where(mask, tokens, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(names["q"], np.where(mask, 0.1 * chosen, 0), atol=1e-6)
    np.testing.assert_allclose(names["v"], np.where(mask, 0.1 * jax.nn.logsumexp(logits, -1), 0), atol=1e-6)
    # The gradient of -log sigma(m) by hand: -beta sigma(-m), times +-(one-hot - softmax) at every token.
    margins = names["rewards"].sum(-1)[:, 0] - names["rewards"].sum(-1)[:, 1]
    sign = np.array([1, -1])[:, None, None]
    direction = sign * (jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits)) * mask[..., None]
    expected = -0.1 / 3 * jax.nn.sigmoid(-margins)[:, None, None, None] * direction
    np.testing.assert_allclose(names["gradient"], expected, atol=1e-7)


def test_a_training_step_of_ones_own(tiny_model, tiny_params, pair_batch):
    names = {"jax": jax, "model": tiny_model}
    exec(blocks()[1], names)
    params, ref_params = (jax.tree.map(jnp.copy, tiny_params) for _ in range(2))
    optimizer = make_optimizer(names["OptimizerOptions"](), steps=1000)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), ref_params)
    batch = pair_batch(4)
    expected, _ = preference_loss_fn(tiny_model, make_loss(beta=0.1))(params, ref_params, batch)
    state, metrics = names["train_step"](state, batch)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], expected, rtol=1e-6)
    assert state.step == 1


@pytest.mark.parametrize("name", ["README.md", ".github/CONTRIBUTING.md"])
def test_every_path_and_module_named_in_a_document_exists(name):
    root = README.parent
    text = (root / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:qstar_jax|tests|configs|launch|\.github)/[\w./-]+)`", text))
    paths |= set(re.findall(r"(?<![\w/])(?:tests|configs|launch)/[\w/-]+\.\w+", text))
    rooms = [
        path for path in re.findall(r"`(\w+/[\w./-]*)`", text) if (root / "qstar_jax" / path.split("/")[0]).is_dir()
    ]
    paths |= {f"qstar_jax/{path}" for path in rooms}
    modules = re.findall(r"python -m (qstar_jax[\w.]+)|from (qstar_jax[\w.]*) import", text)
    assert paths  # or the pattern finds nothing
    assert not [path for path in sorted(paths) if not (root / path).exists()]
    assert not [module for module in map("".join, modules) if importlib.util.find_spec(module) is None]
