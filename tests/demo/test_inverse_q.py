import numpy as np
from PIL import Image

from qstar_jax.demo import inverse_q


def test_learned_advantages_are_the_true_ones():
    true, learned, excess, residual = inverse_q.fit(seed=1)
    assert np.abs(learned[0]).max() < 1e-12 < 0.5 < np.abs(true).max()
    np.testing.assert_allclose(learned[-1], true, atol=1e-6)
    assert excess[0] > 0.01 > 1e-9 > excess[-1] and residual[0] > 0.1 > 1e-6 > residual[-1]


def test_the_seed_changes_the_problem():
    assert np.abs(inverse_q.fit(seed=1)[0] - inverse_q.fit(seed=2)[0]).max() > 0.1


def test_the_picture(tmp_path, capsys):
    out = tmp_path / "new" / "advantages.png"
    inverse_q.main([str(out), "--seed", "3"])
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    assert capsys.readouterr().out.count("largest error") == 3
