"""The loss that is told by turn, `dmpo`: by hand from whole logits, and on every path that batches take."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DataOptions, LossOptions, MeshOptions, ReferenceOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Shapes
from qstar_jax.losses import make_loss
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import make_mesh
from qstar_jax.store.open import param_shardings
from qstar_jax.training.objectives import preference_loss_fn, preference_objective
from qstar_jax.training.step import TrainState, make_train_step

BETA, DISCOUNT = 0.5, 0.6
LOSS = make_loss("dmpo", beta=BETA, discount=DISCOUNT)


@pytest.fixture(scope="module")
def examples(random_dialogues):
    examples = random_dialogues(8, seed=3)
    turns = [[r.turns.max() for r in e.responses] for e in examples]
    assert np.max(turns) > 2 and any(chosen != rejected for chosen, rejected in turns)
    return examples


@pytest.fixture(scope="module")
def ref_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


def phi(turn, count):
    return DISCOUNT**turn * (1 - DISCOUNT ** (count - turn)) / (1 - DISCOUNT**count)


@pytest.fixture(scope="module")
def by_hand(tiny_model, tiny_params, ref_params, examples):
    """Loss and gradient from the whole logits of each dialogue, with a weight per token, turn by turn."""
    texts = [(e.prompt, r) for e in examples for r in e.responses]
    ids, weights = np.zeros((2, len(texts), 24))
    for n, (prompt, response) in enumerate(texts):
        ids[n, : len(prompt) + len(response.ids)] = [*prompt, *response.ids]
        count = max(response.turns) + 1
        for place, turn in enumerate(response.turns, start=len(prompt)):
            weights[n, place] = phi(turn, count) if turn >= 0 else 0.0
    ids = ids.astype(np.int32)

    def sums(params):
        logp = jax.nn.log_softmax(tiny_model.logits(params, ids)[:, :-1])
        return (weights[:, 1:] * jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]).sum(-1)

    def dmpo(params):
        ratios = (sums(params) - sums(ref_params)).reshape(-1, 2)
        return -jax.nn.log_sigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()

    loss, gradient = jax.jit(jax.value_and_grad(dmpo))(tiny_params)
    return {"loss": loss, "gradient": gradient}


def batch_of(examples, layout="packed", **options):
    shapes = Shapes.of(examples, layout, batch_size=len(examples), row_length=64, multiple=4)
    return jax.tree.map(jnp.asarray, make_batch(examples, shapes, **options))


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_dmpo_equals_the_sum_over_turns_by_hand(
    layout, tiny_model, tiny_params, ref_params, examples, by_hand, assert_norm_close
):
    loss_fn = jax.jit(jax.value_and_grad(preference_loss_fn(tiny_model, LOSS), has_aux=True))
    (loss, _), gradient = loss_fn(tiny_params, ref_params, batch_of(examples, layout))
    assert_norm_close({"loss": loss, "gradient": gradient}, by_hand, 1e-5)


def test_a_step_in_micro_batches_on_a_sharded_model_with_a_cached_reference(
    tiny_model, tiny_params, ref_params, examples, by_hand, assert_norm_close
):
    logps = jax.jit(lambda *x: score_policy(tiny_model, *x).logp)(ref_params, batch_of(examples))
    cached = [
        [np.asarray(logps[b, r, : len(response.ids)]) for r, response in enumerate(example.responses)]
        for b, example in enumerate(examples)
    ]
    options = MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=64)
    mesh = make_mesh(options)
    dataset = Dataset(examples, (), "pairs.jsonl")
    feeder = Feeder(dataset, 8, mesh, DataOptions(), "train.batch_size", accumulate=2).with_reference(cached)
    optimizer = optax.sgd(1.0)
    params = jax.device_put(tiny_params, param_shardings(tiny_model, mesh, options))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(preference_loss_fn(tiny_model, LOSS), optimizer, accumulate=2))
        state, metrics = step(state, feeder.at_step(0, 0))
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], by_hand["loss"], rtol=1e-5)
    gradient = jax.tree.map(jnp.subtract, tiny_params, jax.device_get(state.params))
    assert_norm_close(gradient, by_hand["gradient"], 1e-5)


def test_what_the_objective_says_of_its_loss():
    objective = preference_objective(LOSS)
    assert objective.by_turns and not preference_objective(make_loss()).by_turns
    assert objective.kind == "preferences" and not objective.couples_examples and objective.beta == BETA
    assert objective.loss_at_reference == pytest.approx(math.log(2))
    assert objective.description == "dmpo(beta=0.5, discount=0.6)"


def test_a_run_on_single_turns_says_that_it_is_dpo(make_config, tiny_train, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt  # after the data are read, before anything is compiled

    monkeypatch.setattr("qstar_jax.training.run.make_optimizer", stop)
    console = Console(record=True, width=400, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        tiny_train(make_config(tmp_path / "run", loss=LossOptions(name="dmpo")), console)
    assert "is a single turn, on which dmpo is DPO (sigmoid)" in console.export_text()


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A file of pairs of dialogues that part after the first message, and a template whose headers are words."""
    folder, rng = tmp_path_factory.mktemp("dialogues"), np.random.default_rng(0)

    def message(role):
        return {"role": role, "content": " ".join(f"w{n}" for n in rng.integers(0, 50, rng.integers(1, 4)))}

    rows = []
    for _ in range(16):
        prompt = [message("user")]
        chosen, rejected = (
            [message(role) for _ in range(turns) for role in ("assistant", "user")][:-1] for turns in (2, 3)
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ {'user': 'w51', 'assistant': 'w52'}[m.role] }} {{ m.content }} [EOS] {% endfor %}"
        "{% if add_generation_prompt %}w52 {% endif %}"
    )
    return {"train": str(folder / "pairs.jsonl"), "chat_template": str(folder / "template.jinja")}, rows


@pytest.mark.slow
def test_dialogues_train_from_a_file_and_their_turns_are_scored(
    dialogues, make_config, tiny_train, tmp_path, one_device_only, capsys
):
    data, rows = dialogues

    def run(out, **options):
        reference = ReferenceOptions("cached", cache=str(tmp_path / "cache"))
        loss = LossOptions(name="dmpo", beta=1.0, **options)
        config = make_config(
            tmp_path / out, data=data, loss=loss, reference=reference, train={"batch_size": 8, "reference_samples": 4}
        )
        console = Console(record=True, width=400, file=io.StringIO())
        return tiny_train(config, console)["loss"], console.export_text()

    loss, text = run("run")
    assert loss < math.log(2) and "a single turn" not in text and "first turns only" in text
    assert abs(run("other", discount=0.1)[0] - loss) > 1e-4
    # Every turn of the policy has its reward; that of the whole is their sum.
    words = ["--model", tmp_path / "run", "--data.eval", data["train"], "--out", tmp_path / "scores"]
    assert main(["score", *map(str, words)]) == 0
    assert "mean reward of each turn" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        messages = [m for m in rows[line["row"]][line["role"]] if m["role"] == "assistant"]
        assert [turn["actions"] for turn in line["turns"]] == [len(m["content"].split()) + 1 for m in messages]
        assert line["turns"][-1]["value"] == pytest.approx(line["total_reward"], abs=1e-5)
    assert 'class="turns"' in (tmp_path / "scores" / "heatmap.html").read_text()
