"""The shapes that training.py measures are those of the real models, for this library and for transformers."""

import sys
from pathlib import Path

import jax
import pytest

from qstar_jax.models import CausalLM

sys.path.append(str(Path(__file__).parent))
import contests

PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "qwen3-0.6b": 596_049_920, "llama-3-8b lora": 8_030_261_248}
CONTESTS = {contest.name: contest for group in contests.GROUPS for contest in group}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = CausalLM.from_hf(CONTESTS[name].config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params())) == PARAMETERS[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONTESTS[name].config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert config.rope_parameters["rope_theta"] == 500000.0 or name.startswith("qwen3")


@pytest.mark.parametrize("contest", CONTESTS.values(), ids=CONTESTS.keys())
def test_batches_divide(contest):
    assert all(len(parts) in (0, len(contest.shapes)) for parts in (contest.accumulate, contest.trl_accumulate))
    assert all(contest.batch % parts == 0 for parts in (*contest.accumulate, *contest.trl_accumulate))
