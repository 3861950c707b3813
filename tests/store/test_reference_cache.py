import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.store import reference_cache
from qstar_jax.store.reference_cache import ReferenceCache, fingerprint


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Makes ten examples three parts: four, four and two."""
    monkeypatch.setattr(reference_cache, "PART_EXAMPLES", 4)


@pytest.fixture(scope="module")
def examples():
    """Ten examples with 0 to 3 responses of 0 to 6 tokens each, from every other row of a file."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(0, 60, length).astype(np.int32)

    lengths = [(3, 2), (1,), (), (0, 4), (5, 6, 2), (2, 2), (0,), (6, 1), (4, 0), (3, 5)]
    return [
        Example(ids(4), False, tuple(Response(ids(n), False) for n in of_row), 2 * row)
        for row, of_row in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def logps(examples):
    rng = np.random.default_rng(1)
    return [[-rng.exponential(size=len(r.ids)).astype(np.float32) for r in e.responses] for e in examples]


@pytest.fixture(scope="module")
def key(examples):
    return fingerprint(examples, "a model", "float32")


def fill(cache, logps, batch_size=3, stop=None):
    """Writes batch by batch from where the cache ends, as a run does; `stop` interrupts the run."""
    for start in range(cache.done, len(logps) if stop is None else stop, batch_size):
        cache.write(start, logps[start : start + batch_size])
    return cache


@pytest.fixture
def full(tmp_path, key, examples, logps):
    return fill(ReferenceCache.open(tmp_path, key, examples), logps)


def names(cache):
    return sorted(path.name for path in cache.path.iterdir())


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.path.iterdir()}


def assert_same(actual, expected):
    assert [[(x.dtype, x.tolist()) for x in responses] for responses in actual] == [
        [(x.dtype, x.tolist()) for x in responses] for responses in expected
    ]


PARTS = ["part-000000.safetensors", "part-000001.safetensors", "part-000002.safetensors"]


def test_a_cache_of_two_examples(tmp_path):
    one = Example(np.array([5]), False, (Response(np.array([7, 2]), False), Response(np.array([2]), False)), row=0)
    two = replace(one, prompt=np.array([6]), row=1)
    key = fingerprint([one, two], "a model", "float32")
    cache = ReferenceCache.open(tmp_path, key, [one, two])
    assert cache.done == 0 and not cache.complete
    cache.write(0, [[np.array([-0.5, -1.0]), np.array([-2.0])], [np.array([-3.0, -4.0]), np.array([-5.0])]])
    logps = ReferenceCache.open(tmp_path, key, [one, two]).read()
    assert [[x.tolist() for x in responses] for responses in logps] == [[[-0.5, -1.0], [-2.0]], [[-3.0, -4.0], [-5.0]]]


# --- fingerprints


def test_the_fingerprint_depends_on_tokens_reference_and_dtype_only(examples):
    def same():
        return [replace(e, prompt=e.prompt.copy(), row=e.row + 1, prompt_truncated=True) for e in examples]

    def with_prompt(ids):
        return [*examples[:4], replace(examples[4], prompt=np.asarray(ids, np.int32)), *examples[5:]]

    def with_responses(index, *responses):
        responses = tuple(Response(np.asarray(ids, np.int32), False) for ids in responses)
        return [*examples[:index], replace(examples[index], responses=responses), *examples[index + 1 :]]

    e = examples[4]
    prompt, (a, b, c) = e.prompt, [r.ids for r in e.responses]
    moved = replace(e, prompt=prompt[:-1], responses=(Response(np.append(prompt[-1:], a), False), *e.responses[1:]))
    base = fingerprint(examples, "a model", "float32")
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert fingerprint(same(), "a model", "float32") == base
    others = {
        "reference": fingerprint(examples, "b model", "float32"),
        "dtype": fingerprint(examples, "a model", "bfloat16"),
        "boundary of reference and dtype": fingerprint(examples, "a modelf", "loat32"),
        "prompt token": fingerprint(with_prompt([*prompt[:-1], prompt[-1] + 1]), "a model", "float32"),
        "shorter prompt": fingerprint(with_prompt(prompt[1:]), "a model", "float32"),
        "response token": fingerprint(with_responses(4, a, [b[0] + 1, *b[1:]], c), "a model", "float32"),
        "responses swapped": fingerprint(with_responses(4, b, a, c), "a model", "float32"),
        "one response less": fingerprint(with_responses(4, a, b), "a model", "float32"),
        "token moved between responses": fingerprint(with_responses(4, [*a, b[0]], b[1:], c), "a model", "float32"),
        "token moved from prompt to response": fingerprint([*examples[:4], moved, *examples[5:]], "a model", "float32"),
        "one empty response more": fingerprint(with_responses(2, []), "a model", "float32"),
        "order of rows": fingerprint(examples[::-1], "a model", "float32"),
        "one row less": fingerprint(examples[:-1], "a model", "float32"),
    }
    assert len({base, *others.values()}) == 1 + len(others)


# --- writing and reading


def test_round_trip(full, tmp_path, key, examples, logps):
    assert names(full) == ["complete.json", *PARTS]
    assert_same(full.read(), logps)
    again = ReferenceCache.open(tmp_path, key, examples)
    assert again.complete and again.done == 10
    assert_same(again.read(), logps)
    seal = json.loads((full.path / "complete.json").read_text())
    assert {k: v for k, v in seal.items() if k != "sha256"} == {"key": key, "examples": 10, "tokens": 46}


def test_files_are_plain_float32_safetensors(full, examples, logps):
    arrays = load_file(full.path / PARTS[1])
    assert arrays["logps"].dtype == np.float32
    np.testing.assert_array_equal(arrays["logps"], np.concatenate([x for row in logps[4:8] for x in row]))
    np.testing.assert_array_equal(arrays["lengths"], [5, 6, 2, 2, 2, 0, 6, 1])


@pytest.mark.parametrize("empty", [(0,), ()], ids=["empty responses", "no responses"])
def test_a_cache_without_any_token(tmp_path, empty):
    made = tuple(Response(np.zeros(n, np.int32), False) for n in empty)
    examples = [Example(np.ones(2, np.int32), False, made, row) for row in range(5)]
    logps = [[np.zeros(n, np.float32) for n in empty]] * 5
    cache = fill(ReferenceCache.open(tmp_path, "k", examples), logps)
    assert_same(ReferenceCache.open(tmp_path, "k", examples).read(), logps)
    cache.verify([0, 4], [logps[0], logps[4]])


def test_device_arrays_of_other_dtypes_are_stored_as_float32(tmp_path, key, examples, logps):
    halves = [[jnp.asarray(x, jnp.bfloat16) for x in row] for row in logps]
    cache = fill(ReferenceCache.open(tmp_path, key, examples), halves)
    assert_same(cache.read(), [[np.asarray(x, np.float32) for x in row] for row in halves])


def test_the_caller_may_reuse_its_buffer(tmp_path, key, examples, logps):
    cache = ReferenceCache.open(tmp_path, key, examples)
    for start, row in enumerate(logps):
        buffer = [x.copy() for x in row]
        cache.write(start, [buffer])
        for x in buffer:
            x[...] = 7.0
    assert_same(cache.read(), logps)


def test_no_folder_exists_before_the_first_write(tmp_path, key, examples):
    cache = ReferenceCache.open(tmp_path / "caches", key, examples)
    assert cache.done == 0 and not cache.complete
    assert not (tmp_path / "caches").exists()


def test_files_do_not_depend_on_batch_sizes_or_interruptions(tmp_path, key, examples, logps):
    makers = {"a": (3, None), "b": (10, None), "c": (1, 7)}
    made = {}
    for name, (batch_size, stop) in makers.items():
        fill(ReferenceCache.open(tmp_path / name, key, examples), logps, batch_size, stop)
        made[name] = contents(fill(ReferenceCache.open(tmp_path / name, key, examples), logps))
    assert made["a"] == made["b"] == made["c"] and len(made["a"]) == 4


# --- interrupted runs


def test_an_interrupted_run_continues_at_done(tmp_path, key, examples, logps):
    for stop, done, files in [(3, 0, 0), (6, 4, 1), (9, 8, 2)]:
        fill(ReferenceCache.open(tmp_path, key, examples), logps, batch_size=1, stop=stop)
        cache = ReferenceCache.open(tmp_path, key, examples)
        assert (cache.done, cache.complete) == (done, False)
        assert len(list(cache.path.glob("*"))) == files
        with pytest.raises(InputError, match=rf"{key}: not complete \({done} of 10 examples\)"):
            cache.read()
    assert_same(fill(cache, logps).read(), logps)


@pytest.mark.parametrize("broken_call", [1, 2, 3, 4], ids=[*PARTS, "complete.json"])
@pytest.mark.parametrize("killed", [False, True], ids=["exception", "killed"])
def test_an_interrupted_write_leaves_no_partial_file(tmp_path, key, examples, logps, monkeypatch, broken_call, killed):
    class Broken(BaseException):
        pass

    real, calls = os.replace, []

    def breaking(*args):
        calls.append(args)
        if len(calls) == broken_call:
            raise Broken
        real(*args)

    cache = ReferenceCache.open(tmp_path, key, examples)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(os, "replace", breaking)
        if killed:  # a killed process does not clean up
            patch.setattr(Path, "unlink", lambda *args, **options: None)
        fill(cache, logps)
    leftovers = [name for name in names(cache) if name not in [*PARTS, "complete.json"]]
    assert len(leftovers) == killed
    for name in leftovers:
        (cache.path / name).write_bytes(b"torn")
    again = ReferenceCache.open(tmp_path, key, examples)
    assert not again.complete and again.done == 4 * min(broken_call - 1, 2)
    assert_same(fill(again, logps).read(), logps)
    assert_same(ReferenceCache.open(tmp_path, key, examples).read(), logps)


def test_files_are_synced_before_they_are_renamed(tmp_path, key, examples, logps, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(Path(b).name), real_replace(a, b)))
    fill(ReferenceCache.open(tmp_path, key, examples), logps)
    assert events == ["sync", PARTS[0], "sync", PARTS[1], "sync", PARTS[2], "sync", "complete.json"]


def test_two_runs_that_fill_one_cache_at_once_agree(tmp_path, key, examples, logps):
    caches = [ReferenceCache.open(tmp_path, key, examples) for _ in range(2)]
    nearly = [[x - np.float32(1e-6) for x in row] for row in logps]  # as on another kind of device
    for start in range(10):
        for run in (0, 1) if start // 4 == 1 else (1, 0):
            caches[run].write(start, [(logps, nearly)[run][start]])
    read = [cache.read() for cache in [*caches, ReferenceCache.open(tmp_path, key, examples)]]
    assert_same(read[0], read[1])
    assert_same(read[0], read[2])
    assert_same(read[0], nearly[:4] + logps[4:8] + nearly[8:])  # the first to write a part wins
    caches[0].verify(range(10), logps)


def test_a_slower_run_keeps_the_files_of_a_faster_one(tmp_path, key, examples, logps):
    slow = ReferenceCache.open(tmp_path, key, examples)
    slow.write(0, logps[:3])
    fast = fill(ReferenceCache.open(tmp_path, key, examples), logps)
    before = contents(fast)
    assert slow.complete and slow.done == 0
    slow.verify([9], [logps[9]])
    assert_same(slow.read(), logps)
    slow.write(3, logps[3:])
    assert slow.done == 10 and contents(slow) == before


def test_a_cache_may_be_opened_while_another_run_writes_it(tmp_path, key, examples, logps, monkeypatch):
    writer = fill(ReferenceCache.open(tmp_path, key, examples), logps, stop=1, batch_size=1)
    real = Path.is_file

    def is_file(path):
        exists = real(path)
        if path.name.startswith("part") and writer.done == 0:
            writer.write(1, logps[1:])  # right after the first check of a part
        return exists

    monkeypatch.setattr(Path, "is_file", is_file)
    cache = ReferenceCache.open(tmp_path, key, examples)
    assert writer.done == 10 and cache.done == 8
    assert_same(cache.read(), logps)


# --- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_name_the_row(tmp_path, key, examples, logps, value):
    bad = [[x.copy() for x in row] for row in logps]
    bad[3][1][2] = value
    cache = ReferenceCache.open(tmp_path, key, examples)
    cache.write(0, bad[:3])
    with pytest.raises(InputError, match=rf"row 7: .* token 3 of response 2 is {value}"):
        cache.write(3, bad[3:])
    assert not cache.path.exists()
    cache.write(3, logps[3:])  # the refused numbers were not kept
    assert_same(cache.read(), logps)


def test_examples_out_of_order_or_of_other_shapes_are_refused(tmp_path, key, examples, logps):
    cache = ReferenceCache.open(tmp_path, key, examples)
    cache.write(0, logps[:2])
    for start in (0, 1, 3):
        with pytest.raises(ValueError, match="expected to begin at 2"):
            cache.write(start, logps[start : start + 2])
    with pytest.raises(ValueError, match="to end at 10"):
        cache.write(2, [*logps[2:], []])
    with pytest.raises(ValueError, match=r"row 7: .*\(0,\), \(5,\).*\(0,\), \(4,\)"):
        cache.write(2, [logps[2], [logps[3][0], np.zeros(5)], *logps[4:]])
    with pytest.raises(ValueError, match="row 7"):
        cache.write(2, [logps[2], logps[3][1:], *logps[4:]])
    cache.write(2, logps[2:])
    assert_same(cache.read(), logps)


def test_every_byte_of_a_part_is_covered(full, tmp_path, key, examples):
    path = full.path / PARTS[2]
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(InputError, match=r"delete this file"):
            ReferenceCache.open(tmp_path, key, examples).read()
    path.write_bytes(good)
    full.read()


def rewrite(path, **changes):
    save_file(load_file(path) | changes, path)


def rewritten(changes):
    return lambda path: rewrite(path, **changes(load_file(path)))


DAMAGES = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros behind the header": lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "dtype": rewritten(lambda arrays: {"logps": arrays["logps"].astype(np.float64)}),
    "shape": rewritten(lambda arrays: {"logps": arrays["logps"][:-1]}),
    "lengths": rewritten(lambda arrays: {"lengths": arrays["lengths"][::-1].copy()}),
    "number": rewritten(lambda arrays: {"logps": arrays["logps"] + np.float32(0.5)}),
    "one tensor more": rewritten(lambda arrays: {"more": arrays["logps"]}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("complete", [False, True], ids=["broken run", "complete"])
def test_a_damaged_part_is_named(full, tmp_path, key, examples, damage, complete):
    if not complete:
        (full.path / "complete.json").unlink()
        (full.path / PARTS[2]).unlink()
    damage(full.path / PARTS[1])
    with pytest.raises(InputError, match=rf"{PARTS[1]}: .*delete this file"):
        ReferenceCache.open(tmp_path, key, examples).read()


def test_a_part_at_another_place_is_refused(tmp_path):
    ids = np.ones(2, np.int32)
    examples = [Example(ids, False, (Response(ids, False),), row) for row in range(10)]
    rows = [[np.full(2, -row, np.float32)] for row in range(10)]
    caches = [fill(ReferenceCache.open(tmp_path, key, examples), rows, stop=9) for key in "ab"]
    foreign = (caches[1].path / PARTS[1]).read_bytes()
    for content in [(caches[0].path / PARTS[0]).read_bytes(), foreign]:
        (caches[0].path / PARTS[1]).write_bytes(content)
        with pytest.raises(InputError, match=rf"{PARTS[1]}: .*another cache or part"):
            ReferenceCache.open(tmp_path, "a", examples)
    assert ReferenceCache.open(tmp_path, "b", examples).done == 8


def test_missing_and_foreign_parts_are_refused(full, tmp_path, key, examples, logps):
    def opened():
        return ReferenceCache.open(tmp_path, key, examples)

    foreign_part = full.path / "part-000003.safetensors"
    foreign_part.write_bytes((full.path / PARTS[0]).read_bytes())
    with pytest.raises(InputError, match=r"part-000003.safetensors: not a part of this cache, which has 3; "):
        opened()
    foreign_part.unlink()
    middle = (full.path / PARTS[1]).read_bytes()
    (full.path / PARTS[1]).unlink()
    with pytest.raises(InputError, match=rf"{PARTS[1]}: missing, though there is a complete.json"):
        opened()
    with pytest.raises(InputError, match=rf"{PARTS[1]}: not a readable"):
        full.read()
    (full.path / "complete.json").unlink()
    with pytest.raises(InputError, match=rf"{PARTS[2]}: the part before it, {PARTS[1]}, is missing; delete this file"):
        opened()
    (full.path / PARTS[2]).unlink()  # as the message says
    assert opened().done == 4
    (full.path / PARTS[1]).write_bytes(middle)
    assert_same(fill(opened(), logps).read(), logps)


@pytest.mark.parametrize(
    "change",
    [
        lambda seal: {**seal, "key": "other"},
        lambda seal: {**seal, "examples": 9},
        lambda seal: {**seal, "tokens": 45},
        lambda seal: {**seal, "sha256": "0" * 64},
        lambda seal: {name: value for name, value in seal.items() if name != "sha256"},
        lambda seal: [seal],
        lambda seal: "{",
    ],
    ids=["key", "examples", "tokens", "digest", "no digest", "a list", "torn"],
)
def test_an_invalid_complete_json_is_named(full, tmp_path, key, examples, change):
    path = full.path / "complete.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=r"complete\.json: .*delete"):
        ReferenceCache.open(tmp_path, key, examples).read()


def test_a_damaged_part_of_a_faster_run_is_noticed_at_once(tmp_path, key, examples, logps):
    slow, fast = (ReferenceCache.open(tmp_path, key, examples) for _ in range(2))
    fast.write(0, logps[:4])
    rewrite(fast.path / PARTS[0], logps=np.zeros(10, np.float32))
    with pytest.raises(InputError, match=PARTS[0]):
        slow.write(0, logps[:4])


def test_a_damaged_part_is_never_sealed(full, tmp_path, key, examples, logps):
    (full.path / "complete.json").unlink()
    cache = ReferenceCache.open(tmp_path, key, examples)
    rewrite(full.path / PARTS[0], logps=np.zeros(10, np.float32))
    with pytest.raises(InputError, match=PARTS[0]):
        fill(cache, logps)
    assert not cache.complete


def test_pickles_are_never_opened(full, tmp_path, key, examples):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    evil = pickle.dumps(Evil())
    for name in [PARTS[0], "complete.json"]:
        good = (full.path / name).read_bytes()
        (full.path / name).write_bytes(evil)
        with pytest.raises(InputError, match=name):
            ReferenceCache.open(tmp_path, key, examples).read()
        (full.path / name).write_bytes(good)
    assert not marker.exists()
    pickle.loads(evil)  # the test would have noticed
    assert marker.exists()


# --- verification


def test_verify_accepts_what_is_near(full, logps):
    full.verify([9, 0, 4], [[x + np.float32(9e-4) for x in logps[i]] for i in (9, 0, 4)])
    full.verify([4], [[x + 0.5 for x in logps[4]]], tolerance=0.6)
    full.verify([], [])


@pytest.mark.parametrize("off", [0.25, -0.25, np.nan, np.inf])
def test_verify_names_the_row_that_differs_most(full, logps, off):
    fresh = [[x + np.float32(0.01) for x in logps[i]] for i in (9, 0, 4)]
    fresh[2][1][5] = logps[4][1][5] + off
    size = "0.25" if np.isfinite(off) else "inf"
    with pytest.raises(InputError, match=rf"{full.key}: .*row 9 differ by up to {size} nats.*0.001.*delete this"):
        full.verify([9, 0, 4], fresh)


def test_verify_looks_at_every_example_it_is_given(full, logps):
    for bad in range(3):
        fresh = [[x + np.float32(0.01 * (n == bad)) for x in logps[i]] for n, i in enumerate((9, 0, 4))]
        with pytest.raises(InputError, match=f"row {(19, 1, 9)[bad]} "):
            full.verify([9, 0, 4], fresh)


def test_verify_compares_the_finished_part_of_an_interrupted_run(tmp_path, key, examples, logps):
    fill(ReferenceCache.open(tmp_path, key, examples), logps, stop=6)
    cache = ReferenceCache.open(tmp_path, key, examples)
    cache.verify([0, 3], [logps[0], logps[3]])
    for index in (4, -1):
        with pytest.raises(ValueError, match="only 4"):
            cache.verify([index], [logps[index]])
    with pytest.raises(ValueError, match="row 1"):
        cache.verify([0], [logps[0][:1]])
