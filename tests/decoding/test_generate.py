import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, DecodeOptions, MeshOptions
from qstar_jax.decoding.generate import check_options, generate
from qstar_jax.errors import InputError
from qstar_jax.loading import load_model
from qstar_jax.sharding import make_mesh


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (DecodeOptions(beams=4, temperature=1.0), "beams 4.*temperature 1"),
        (DecodeOptions(top_k=5), "top_k and top_p.*temperature 0"),
        (DecodeOptions(top_p=0.9), "top_k and top_p.*temperature 0"),
        (DecodeOptions(beams=4, top_p=0.9), "top_k and top_p"),
        (DecodeOptions(return_sequences=2), "return_sequences 2.*beams 1"),
        (DecodeOptions(beams=3, return_sequences=4), "return_sequences 4.*beams 3"),
        (DecodeOptions(beams=0), "at least 1"),
        (DecodeOptions(max_new_tokens=0), "at least 1"),
        (DecodeOptions(return_sequences=0), "at least 1"),
        (DecodeOptions(temperature=-1.0), "at least 0"),
        (DecodeOptions(temperature=1.0, top_p=0.0), "top_p"),
        (DecodeOptions(temperature=1.0, top_p=1.5), "top_p"),
        (DecodeOptions(temperature=1.0, top_k=-1), "top_k"),
        (DecodeOptions(temperature=float("nan")), "temperature"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        check_options(options)


def test_good_options_pass():
    check_options(DecodeOptions())
    check_options(DecodeOptions(beams=4, return_sequences=4))
    check_options(DecodeOptions(temperature=0.7, top_k=5, top_p=0.9, return_sequences=3))


@pytest.fixture(scope="module")
def loaded(hf_folder, one_device):
    return load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())


PROMPTS = [np.array([1, 20, 7, 33], np.int32), np.array([1, 5], np.int32)]


def test_beams_come_best_first_with_text_and_tokens(loaded, one_device):
    options = DecodeOptions(beams=3, return_sequences=2, max_new_tokens=4)
    found = generate(loaded, PROMPTS, options, one_device)
    assert [len(answers) for answers in found] == [2, 2]
    for answers in found:
        assert answers[0].logp >= answers[1].logp
        for answer in answers:
            assert answer.text == loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            assert answer.finished == (answer.tokens[-1] == loaded.tokenizer.eos_token_id)


def test_samples_depend_on_seed_and_offset_only(loaded, one_device):
    options = DecodeOptions(temperature=1.0, return_sequences=3, max_new_tokens=4)
    plain = generate(loaded, PROMPTS, options, one_device)
    assert generate(loaded, PROMPTS, options, one_device) == plain
    assert generate(loaded, PROMPTS, options, one_device, seed_offset=1) != plain
    other_seed = DecodeOptions(temperature=1.0, return_sequences=3, max_new_tokens=4, seed=1)
    assert generate(loaded, PROMPTS, other_seed, one_device) != plain
    # Another seed must not draw what this seed draws for a later batch.
    assert generate(loaded, PROMPTS, other_seed, one_device) != generate(
        loaded, PROMPTS, options, one_device, seed_offset=1
    )


def test_answers_on_a_mesh_equal_those_on_one_device(loaded, hf_folder, one_device):
    mesh, options = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2)), MeshOptions(min_shard_size=64)
    sharded = load_model(hf_folder, ComputeOptions(), mesh, options)
    for decode in (DecodeOptions(max_new_tokens=4), DecodeOptions(beams=3, return_sequences=2, max_new_tokens=4)):
        expected = generate(loaded, PROMPTS, decode, one_device)
        found = generate(sharded, PROMPTS, decode, mesh)
        for row, other in zip(found, expected, strict=True):
            assert [answer.tokens for answer in row] == [answer.tokens for answer in other]
            np.testing.assert_allclose([a.logp for a in row], [a.logp for a in other], rtol=0, atol=1e-4)
