import pytest

from qstar_jax.config import DataOptions, DpoConfig, LoraOptions, LossOptions, SftConfig
from qstar_jax.errors import InputError
from qstar_jax.training.plan import make_plan

DATA = DataOptions(train="pairs.jsonl")


def plan_of(**options):
    return make_plan(DpoConfig(model="model", out="out", data=DATA, **options))


def test_fine_tuning_has_no_reference():
    plan = make_plan(SftConfig(model="model", out="out", data=DATA))
    assert plan.verb == "sft" and plan.objective.kind == "completions" and plan.reference.mode == "none"
    assert not plan.holds_reference and not plan.runs_reference and not plan.moves_reference


def test_preferences_are_compared_with_a_live_reference_unless_there_is_an_adapter():
    plan = plan_of()
    assert plan.verb == "dpo" and plan.objective.kind == "preferences" and plan.config.reference.mode == "live"
    assert plan.holds_reference and plan.runs_reference and not plan.moves_reference
    adapter = plan_of(lora=LoraOptions(rank=4))
    assert adapter.reference.mode == "adapter" and adapter.runs_reference and not adapter.holds_reference


def test_defaults_of_the_loss_are_filled_in_for_the_record():
    loss = plan_of(loss=LossOptions(name="simpo", gamma=1.0)).config.loss
    assert (loss.beta, loss.gamma, loss.label_smoothing, loss.tau) == (2.0, 1.0, 0.0, None)
    mixture = LossOptions(name=["sigmoid", "sft"])  # one default for two losses would be wrong
    assert plan_of(loss=mixture).config.loss == mixture


def test_the_day_of_chat_templates_is_kept():
    assert plan_of().with_date("2026-03-04").config.data.date == "2026-03-04"


def test_missing_training_data_are_named():
    with pytest.raises(InputError, match=r"--data\.train is missing"):
        make_plan(SftConfig(model="model", out="out"))
