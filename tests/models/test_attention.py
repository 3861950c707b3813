"""Windows, caps and scales in every kind of attention, against sums written out in numpy, float64."""

from functools import cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qstar_jax.config import MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models.attention import masked_attention
from qstar_jax.models.cudnn_attention import cudnn_attention
from qstar_jax.models.flash_attention import flash_attention
from qstar_jax.models.masks import PackedMask, Texts, visible
from qstar_jax.sharding import BATCH, make_mesh

LENGTH, HEADS, GROUPS, WIDTH = 150, 4, 2, 8  # two tiles and two blocks, the second ones short
WINDOWS = (1, 40, 140, 2**31 - 1)  # itself alone; within a tile; more than a tile; more than there is


def text(block, branch, start, count):
    """Block, branch and position of `count` slots."""
    return np.stack([np.full(count, block), np.full(count, branch), start + np.arange(count)])


def padding(count):
    return np.stack([np.full(count, -1), np.zeros(count, int), np.zeros(count, int)])


LAYOUTS = {
    "plain": [text(0, 0, 0, LENGTH)],
    "padded": [text(0, 0, 0, 97), padding(53)],
    "packed": [text(0, 0, 0, 45), text(1, 0, 0, 85), text(2, 0, 0, 13), padding(7)],
    # The second response is near its prompt, from which a long first one parts it.
    "shared": [text(0, 0, 0, 20), text(0, 1, 20, 60), text(0, 2, 20, 30), text(1, 0, 0, 15), text(1, 1, 15, 25)],
}
BLOCKS, BRANCHES, POSITIONS = np.stack([np.concatenate(row, axis=1) for row in LAYOUTS.values()], axis=1)
WAYS = {
    "dense": partial(masked_attention, option="dense"),
    "row by row": partial(masked_attention, option="blockwise"),
    "side by side": partial(masked_attention, option="blockwise"),  # as rows lie on eight devices
    "flash": partial(partial, flash_attention, block_size=128, interpret=True),
    "flash on eight devices": partial(partial, flash_attention, block_size=128, interpret=True),
    "texts": partial(partial, cudnn_attention, windows=WINDOWS, implementation="xla"),
    "texts on eight devices": partial(partial, cudnn_attention, windows=WINDOWS, implementation="xla"),
}
EIGHT_DEVICES = ("side by side", "flash on eight devices", "texts on eight devices")
BY_TEXTS = ("texts", "texts on eight devices")


def texts_of(blocks, branches, shards):
    """The texts of some sequences, found token by token."""
    rows, per_shard = len(blocks), len(blocks) // shards
    texts = [[] for _ in range(shards)]
    for row in range(rows):
        for block in sorted(set(blocks[row]) - {-1}):
            numbers = set(branches[row, blocks[row] == block])
            for branch in sorted(numbers - {0}) or [0]:
                inside = [s for s in range(LENGTH) if blocks[row, s] == block and branches[row, s] in (0, branch)]
                texts[row // per_shard].append([row % per_shard * LENGTH + s for s in inside])
    room, longest = max(map(len, texts)), max(len(text) for shard in texts for text in shard)
    slots = np.full((shards, room, longest), -1, np.int32)
    places = np.full((rows, LENGTH, 2), -1, np.int32)
    for shard, number in np.ndindex(shards, room):
        for token, slot in enumerate(texts[shard][number] if number < len(texts[shard]) else []):
            slots[shard, number, token] = slot
            row = places[shard * per_shard + slot // LENGTH, slot % LENGTH]
            row[int(row[0] >= 0)] = number * longest + token
    return Texts(jnp.asarray(slots.reshape(-1, longest)), jnp.asarray(places), shards)


def seen_by(blocks, branches, positions, window):
    """Mask [B, S, S], by the rule as one would say it."""
    query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    own_branch = (key(branches) == 0) | (key(branches) == query(branches))
    distance = query(positions) - key(positions)
    causal = np.tri(blocks.shape[1], dtype=bool)
    return causal & (query(blocks) == key(blocks)) & own_branch & (distance >= 0) & (distance < window)


def oracle(q, k, v, slope, seen, scale, softcap):
    """Outputs, and gradients of sum(slope * outputs), in float64."""
    q, k, v, slope = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (q, k, v, slope))  # [B, H, S, D]
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat(share, axis=1) for x in (k, v))
    scores, to_products = scale * q @ k.swapaxes(2, 3), scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        to_products = scale * (1 - (scores / softcap) ** 2)
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    dweights = slope @ v.swapaxes(2, 3)
    dproducts = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * to_products
    of_groups = lambda x: x.reshape(x.shape[0], -1, share, *x.shape[2:]).sum(2)  # noqa: E731
    actual = (
        weights @ v,
        dproducts @ k,
        of_groups(dproducts.swapaxes(2, 3) @ q),
        of_groups(weights.swapaxes(2, 3) @ slope),
    )
    return dict(zip(("out", "dq", "dk", "dv"), (np.moveaxis(x, 1, 2) for x in actual), strict=True))


@cache
def arrays(padding=True):
    """Queries, keys, values and slopes of outputs for each window. Shape [W, B, S, H or G, D].

    Without `padding`, values and slopes are 0 there, so that all results are too.
    """
    rng = np.random.default_rng(0)
    q, k, v, slope = (
        rng.normal(size=(len(WINDOWS), len(LAYOUTS), LENGTH, n, WIDTH)).astype(np.float32)
        for n in (HEADS, GROUPS, GROUPS, HEADS)
    )
    in_text = 1 if padding else (BLOCKS >= 0)[..., None, None]
    return q, k, v * in_text, slope * in_text


@cache
def expected(scale, softcap, padding=True):
    """The oracle's results for each window, stacked."""
    seen = [seen_by(BLOCKS, BRANCHES, POSITIONS, window) for window in WINDOWS]
    layers = [oracle(*x, own, scale, softcap) for *x, own in zip(*arrays(padding), seen, strict=True)]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


@partial(jax.jit, static_argnums=(0, 1, 2))
def layers_of(way, scale, softcap, q, k, v, slope, blocks, branches, positions, windows, texts):
    """Outputs and gradients of a scan over layers, each with a window of its own."""
    mask = PackedMask(blocks, branches, texts)
    attend = WAYS[way](mask=mask, positions=positions, scale=scale, softcap=softcap)

    def run(q, k, v):
        return jax.lax.scan(lambda _, x: (None, attend(*x[:3], window=x[3])), None, (q, k, v, windows))[1]

    out, pull_back = jax.vjp(run, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *pull_back(slope)), strict=True))


def computed(way, scale, softcap, dtype=jnp.float32):
    """Results of an implementation of attention for each window, stacked."""
    x = [jnp.asarray(y, dtype) for y in arrays(way not in BY_TEXTS)]
    texts = texts_of(BLOCKS, BRANCHES, 4 if way in EIGHT_DEVICES else 1) if way in BY_TEXTS else None
    rows = [jnp.asarray(y, jnp.int32) for y in (BLOCKS, BRANCHES, POSITIONS)]
    windows = jnp.array(WINDOWS, jnp.int32)
    if way not in EIGHT_DEVICES:
        return layers_of(way, scale, softcap, *x, *rows, windows, texts)
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, *BATCH, None, "tensor")))
        rows, texts = jax.device_put((rows, texts), NamedSharding(mesh, BATCH))
        results = layers_of(way, scale, softcap, *x, *rows, windows, texts)
    assert all(y.addressable_shards[0].data.size == y.size // 8 for y in results.values())
    return results


@pytest.mark.parametrize("option", ["dense", "blockwise"])
def test_two_tokens_by_hand(option):
    # The second query has the scores 0 and ln 3, hence the weights 1/4 and 3/4 on the values 0 and 4.
    q, k, v = (jnp.array(x).reshape(1, 2, 1, 1) for x in ([1.0, 1.0], [0.0, np.log(3)], [0.0, 4.0]))
    mask, positions = PackedMask(*jnp.zeros((2, 1, 2), int)), jnp.array([[0, 1]])
    out = masked_attention(mask, positions, option, scale=1.0)(q, k, v)
    np.testing.assert_allclose(out.ravel(), [0.0, 3.0], atol=1e-6)


def test_distance_is_of_positions_and_not_of_slots():
    slots, ids = np.arange(LENGTH), PackedMask(*map(jnp.asarray, (BLOCKS, BRANCHES))).ids(jnp.asarray(POSITIONS))
    within = partial(visible, (slots[:, None], *ids[..., None]), (slots, *ids[..., None, :]))
    for window in WINDOWS:
        np.testing.assert_array_equal(within(window), seen_by(BLOCKS, BRANCHES, POSITIONS, window))
    mask = within(4)
    plain, _, packed, shared = (lambda slot, row=row: np.flatnonzero(mask[row, slot]).tolist() for row in range(4))
    assert plain(9) == [6, 7, 8, 9] and packed(46) == [45, 46]
    assert shared(21) == [18, 19, 20, 21] and shared(81) == [18, 19, 80, 81]


def test_the_oracle_tells_windows_caps_and_scales_apart():
    usual, capped, scaled = expected(0.5, None), expected(0.5, 1.5), expected(0.35, None)
    for name, results in usual.items():
        # Of itself alone, a query sees all whatever the score is.
        pairs = [(usual[name][i], usual[name][j]) for i, j in combinations(range(len(WINDOWS)), 2)]
        pairs += [(results[1:], other[name][1:]) for other in (capped, scaled)]
        for x, y in pairs:
            assert np.linalg.norm(x - y) > 0.02 * np.linalg.norm(x), name


@pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (0.5, 1.5)])
@pytest.mark.parametrize("way", WAYS)
def test_scanned_layers_with_windows_of_their_own(way, scale, softcap, assert_norm_close):
    if way in BY_TEXTS and softcap is not None:
        with pytest.raises(InputError, match=r"cannot cap scores, and this model caps them at 1\.5"):
            computed(way, scale, softcap)
        return
    assert_norm_close(computed(way, scale, softcap), expected(scale, softcap, way not in BY_TEXTS), 1e-5)


@pytest.mark.thin("flash")
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_loses_what_its_eight_bits_lose(way, assert_norm_close):
    softcap = None if way in BY_TEXTS else 1.5
    results = computed(way, 0.5, softcap, jnp.bfloat16)
    assert {x.dtype for x in results.values()} == {jnp.dtype(jnp.bfloat16)}
    rounded = [jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in arrays(way not in BY_TEXTS)]
    seen = [seen_by(BLOCKS, BRANCHES, POSITIONS, window) for window in WINDOWS]
    for layer, (*x, own) in enumerate(zip(*rounded, seen, strict=True)):
        exact = oracle(*x, own, 0.5, softcap)
        assert_norm_close({name: y[layer].astype(jnp.float32) for name, y in results.items()}, exact, 1e-2)
