from dataclasses import MISSING, fields, is_dataclass, replace

import pytest

from qstar_jax.cli.main import VERBS
from qstar_jax.config import DpoConfig, OptimizerOptions, RlConfig, SftConfig, TrainOptions
from qstar_jax.config.ranges import check_ranges
from qstar_jax.errors import InputError
from qstar_jax.training.plan import make_plan
from qstar_jax.training.rl.plan import make_rl_plan


def blocks(options):
    """Yields the classes of a configuration's blocks, and its own."""
    yield options
    for option in fields(options):
        if option.default_factory is not MISSING and is_dataclass(block := option.default_factory()):
            yield from blocks(type(block))


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_are_within_the_declared_ranges(verb):
    for block in set(blocks(VERBS[verb][0])):
        required = {option.name: "x" for option in fields(block) if option.default is option.default_factory is MISSING}
        check_ranges(block(**required))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": TrainOptions(keep_checkpoints=0)},
            r"--train\.keep_checkpoints is 0; expected a number in \[1, inf\)",
        ),
        ({"train": TrainOptions(seed=10**30)}, r"--train\.seed is 10+; expected a number in \[-9e18, 9e18\]"),
        ({"optimizer": OptimizerOptions(learning_rate=-1.0)}, r"--optimizer\.learning_rate is -1\.0; expected"),
        ({"optimizer": OptimizerOptions(weight_decay=float("nan"))}, r"--optimizer\.weight_decay is nan; expected"),
    ],
)
@pytest.mark.parametrize("options", [SftConfig, DpoConfig, RlConfig])
def test_what_is_out_of_range_is_refused_before_a_run_begins(options, change, message):
    config = replace(options(model="m", out="o"), **change)
    with pytest.raises(InputError, match=message):
        (make_rl_plan if options is RlConfig else make_plan)(config)
