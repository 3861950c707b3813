"""Environment tokens inside responses are seen by attention, and are no actions for anything else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Response
from qstar_jax.losses import make_loss
from qstar_jax.models.logprobs import CHUNK
from qstar_jax.plan.costs import products
from qstar_jax.plan.hlo import Module
from qstar_jax.scoring import response_alternatives, score_policy
from qstar_jax.sharding import make_mesh
from qstar_jax.training.objectives import preference_loss_fn, sft_loss_fn

LAYOUTS = ["packed", "shared", "plain"]
BETA = 0.5


@pytest.fixture(scope="module")
def examples(random_dialogues):
    """Eight pairs of dialogues; one of their responses has no action at all, and one has nothing else."""
    examples = random_dialogues(8, seed=3)
    chosen, rejected = examples[2].responses
    examples[2] = replace(
        examples[2], responses=(replace(chosen, action_mask=np.zeros(len(chosen.ids), bool)), rejected)
    )
    examples[5] = replace(examples[5], responses=tuple(Response(r.ids, False) for r in examples[5].responses))
    holes = [r for e in examples for r in e.responses if 0 < r.num_actions < len(r.ids)]
    assert len(holes) > 5 and any(r.turns.max() > 1 for r in holes)
    return examples


@pytest.fixture(scope="module")
def ref_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


def batch_of(examples, layout):
    shapes = Shapes.of(examples, layout, batch_size=len(examples), row_length=64, multiple=4)
    return jax.tree.map(jnp.asarray, make_batch(examples, shapes))


def loss_and_gradient(loss_fn, *arguments):
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(*arguments)
    return {"loss": loss, "gradient": gradient}, metrics


def return_by_hand(model, params, example, response):
    """Sum of log pi over the actions, from the whole logits of the whole dialogue (and of zeros that follow it)."""
    ids = np.zeros(25, np.int32)
    ids[: len(example.prompt) + len(response.ids)] = [*example.prompt, *response.ids]
    logp = jax.nn.log_softmax(model.logits(params, ids[None])[0, :-1])[np.arange(24), ids[1:]]
    return logp[len(example.prompt) - 1 + np.flatnonzero(response.action_mask)].sum()


@pytest.fixture(scope="module")
def by_hand(tiny_model, tiny_params, ref_params, examples):
    """Loss and gradient of DPO on four dialogues, without any of the machinery."""
    few = examples[:4]

    def dpo(params):
        total = 0.0
        for e in few:
            chosen, rejected = (
                return_by_hand(tiny_model, params, e, r) - return_by_hand(tiny_model, ref_params, e, r)
                for r in e.responses
            )
            total -= jax.nn.log_sigmoid(BETA * (chosen - rejected)) / len(few)
        return total

    loss, gradient = jax.jit(jax.value_and_grad(dpo))(tiny_params)
    return {"loss": loss, "gradient": gradient}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_of_dialogues_equals_the_sum_over_actions_by_hand(
    layout, tiny_model, tiny_params, ref_params, examples, by_hand, assert_norm_close
):
    few = examples[:4]
    loss_fn = preference_loss_fn(tiny_model, make_loss(beta=BETA))
    result, metrics = loss_and_gradient(loss_fn, tiny_params, ref_params, batch_of(few, layout))
    assert_norm_close(result, by_hand, 1e-5)
    lengths = [[sum(r.action_mask.tolist()) for r in e.responses] for e in few]
    assert metrics["count/scored_tokens"][0] == np.sum(lengths)
    np.testing.assert_allclose(metrics["lengths/chosen"][0] / 4, np.mean(lengths, axis=0)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_is_a_mean_over_actions(layout, tiny_model, tiny_params, examples):
    singles = [replace(e, responses=e.responses[1:]) for e in examples[:4]]
    loss, _ = jax.jit(sft_loss_fn(tiny_model))(tiny_params, None, batch_of(singles, layout))
    returns = [return_by_hand(tiny_model, tiny_params, e, e.responses[0]) for e in singles]
    np.testing.assert_allclose(loss, -sum(returns) / sum(e.responses[0].num_actions for e in singles), rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_actions_enter_the_kernel(layout, examples):
    examples = examples * 16
    batch = batch_of(examples, layout)
    actions = sum(r.num_actions for e in examples for r in e.responses)
    tokens = sum(len(r.ids) for e in examples for r in e.responses)
    assert actions <= batch.slots.size < 1.1 * actions < tokens
    learned = np.asarray(batch.targets[0, batch.index])[np.asarray(batch.action_mask)]
    assert learned.tolist() == np.concatenate([r.ids[r.action_mask] for e in examples for r in e.responses]).tolist()
    assert not batch.targets[0, actions:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_multiplies_actions_only(layout, tiny_model, tiny_params, ref_params, examples):
    """What is compiled for dialogues and for the same texts as single turns differs by products with the head."""
    model = replace(tiny_model, compute=ComputeOptions(scan_layers=False))
    turns = examples * 16
    single = [replace(e, responses=tuple(Response(r.ids, r.truncated) for r in e.responses)) for e in turns]

    def flops(examples):
        batch = batch_of(examples, layout)
        step = jax.jit(jax.grad(lambda *x: preference_loss_fn(model, make_loss())(*x)[0]))
        compiled = step.lower(tiny_params, ref_params, batch).compile()
        return sum(product.total for product in products(Module.parse(compiled.as_text()))), batch.slots.size

    (of_turns, scored), (of_single, all_scored) = flops(turns), flops(single)
    vocabulary, width = tiny_model.config.vocab_size, tiny_model.config.hidden_size
    # Logits of policy and reference, those of the backward pass, and two products for the gradients.
    saved = 5 * 2 * width * vocabulary * (padded(all_scored) - padded(scored))
    assert all_scored > 1.5 * scored and of_single - of_turns == saved


def padded(scored):
    """Slots that the kernel works through, in equal chunks."""
    chunks = -(-scored // CHUNK)
    return chunks * -(-scored // chunks)


def test_attention_sees_the_environment(tiny_model, tiny_params, examples):
    """Other words of the environment change the actions after them, not those before, and are no targets.

    trl#4974: one mask, with holes, served the loss and attention.
    """
    example = next(e for e in examples if -1 in e.responses[0].turns and e.responses[0].turns[-1] > 0)
    response = example.responses[0]
    first = int(np.flatnonzero(~response.action_mask)[0])
    ids = response.ids.copy()
    ids[first] = ids[first] % 50 + 4
    other = replace(example, responses=(replace(response, ids=ids), *example.responses[1:]))
    one, two = (score_policy(tiny_model, tiny_params, batch_of([e], "packed")) for e in (example, other))
    before, after = np.asarray(one.logp[0, 0]), np.asarray(two.logp[0, 0])
    np.testing.assert_array_equal(before[: first + 1], after[: first + 1])
    later = np.flatnonzero(response.action_mask[first:]) + first
    assert (np.abs(before - after)[later] > 1e-4).all()
    assert not before[: len(ids)][~response.action_mask].any()


def test_a_mask_of_ones_is_a_single_turn(random_examples, random_dialogues):
    plain = random_examples(4, length=24, response_length=16)
    explicit = [
        replace(e, responses=tuple(replace(r, action_mask=np.ones(len(r.ids), bool)) for r in e.responses))
        for e in plain
    ]
    for x, y in zip(*(jax.tree.leaves(batch_of(e, "packed")) for e in (plain, explicit)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert examples_identity(plain) == examples_identity(explicit)
    masked = random_dialogues(4)
    for one, other in zip(plain, masked, strict=True):
        jax.tree.map(np.testing.assert_array_equal, *([r.ids for r in e.responses] for e in (one, other)))
    assert examples_identity(plain) != examples_identity(masked)


def test_a_mask_needs_an_entry_per_token():
    with pytest.raises(ValueError, match="action_mask has shape"):
        Response(np.arange(3), False, np.ones(2, bool))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices(layout, tiny_model, tiny_params, ref_params, examples, assert_norm_close):
    loss_fn = preference_loss_fn(tiny_model, make_loss("sigmoid_norm", beta=BETA))
    expected, _ = loss_and_gradient(loss_fn, tiny_params, ref_params, batch_of(examples, "plain"))
    mesh = make_mesh(MeshOptions(data=8))
    feeder = Feeder(Dataset(examples, (), "pairs.jsonl"), 8, mesh, DataOptions(layout=layout), "train.batch_size")
    with jax.set_mesh(mesh):
        actual, _ = loss_and_gradient(loss_fn, tiny_params, ref_params, next(feeder.in_order()))
    assert_norm_close(actual, expected, 1e-5)


def test_alternatives_of_actions_are_those_of_the_whole_logits(tiny_model, tiny_params, ref_params, examples):
    batch = batch_of(examples, "packed")
    ids, logp, _ = response_alternatives(tiny_model, tiny_params, ref_params, batch, 2)
    example, response = examples[0], examples[0].responses[1]
    text = jnp.asarray(np.concatenate([example.prompt, response.ids]))
    expected = jax.nn.log_softmax(tiny_model.logits(tiny_params, text[None])[0])[len(example.prompt) - 1 :]
    for t in np.flatnonzero(response.action_mask):
        np.testing.assert_allclose(logp[0, 1, t], np.sort(expected[t])[::-1][:2], atol=1e-5)
        assert ids[0, 1, t, 0] == int(expected[t].argmax())
