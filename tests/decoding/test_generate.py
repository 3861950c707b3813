"""From a `decode:` block and token ids to answers, on tiny models; `test_options` has what needs no model."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, get_args

import jax
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, DecodeOptions, MeshOptions, Method
from qstar_jax.config.variants import declarations
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import Guide, generate, params_for, prepare
from qstar_jax.decoding.options import interpret
from qstar_jax.decoding.responses import Finish
from qstar_jax.errors import InputError
from qstar_jax.models.causal_lm import is_unstacked
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import LoadedModel, load_model

WORDS = [f"w{i}" for i in range(56)]
PROMPTS = [np.array([1, 20, 7, 33], np.int32), np.array([1, 5], np.int32)]
# Of each method, something small.
SMALL = {
    "greedy": {},
    "sample": {"return_sequences": 2},
    "beam": {"beams": 3, "return_sequences": 2},
    "best_of_n": {"num_samples": 3, "return_sequences": 2, "report_reference": True},
    "chunk": {"beams": 2, "samples": 2, "chunk_length": 2, "return_sequences": 2},
    "mcts": {"num_simulations": 8, "num_actions": 3, "return_sequences": 2},
    "exact": {"return_sequences": 2, "max_new_tokens": 2},
}


def block(method, **options):
    return DecodeOptions(**{"method": method, "max_new_tokens": 4, **SMALL[method], **options})


@dataclass(frozen=True)
class Small:
    """A policy of conftest.py where a `CausalLM` is expected; it compiles in no time."""

    policy: Any
    config: Any = field(compare=False)

    def unstack(self, params):
        return params

    def prefill(self, *args):
        return self.policy.prefill(*args)

    def extend(self, *args):
        return self.policy.extend(*args)


@pytest.fixture(scope="module")
def make_loaded(history_lm, tiny_tokenizer, hf_folder):
    """`make_loaded(seed)`: a model of the tiny tokenizer's words, which depends on all that was said."""

    def make(seed, size=len(WORDS) + 4, scale=1.5):
        policy, params = history_lm(seed, size, size, scale)
        return LoadedModel(Small(policy, SimpleNamespace(vocab_size=size)), params, tiny_tokenizer, hf_folder)

    return make


@pytest.fixture(scope="module")
def loaded(make_loaded):
    return make_loaded(0)


@pytest.fixture(scope="module")
def other(loaded, make_loaded):
    """One that says other things, though not quite."""
    logits = 0.8 * loaded.params["logits"] + 0.5 * make_loaded(1).params["logits"]
    return replace(loaded, params={"logits": logits})


@pytest.fixture(scope="module")
def next_logp(history_logp):
    """`next_logp(member, prompt, tokens)`: log pi of every next token after each prefix, [T + 1, V], in float64."""
    return lambda member, prompt, tokens: history_logp(member.params, prompt, tokens)


def total(logp, tokens):
    return logp[np.arange(len(tokens)), list(tokens)].sum()


def run(loaded, one_device, options, prompts=PROMPTS, other=None, **more):
    with_reference = options.report_reference or (options.objective or "likelihood") != "likelihood"
    models = {"reference": other, "beta": 0.3} if with_reference else {}
    return generate(loaded, prompts, options, one_device, **models, **more)


@pytest.mark.parametrize("method", get_args(Method))
def test_answers_of_every_method(method, loaded, other, one_device, next_logp):
    options = block(method, report_reference=True)
    found = run(loaded, one_device, options, other=other)
    assert len(found) == 2 and all(1 <= len(answers) <= (options.return_sequences or 1) for answers in found)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids = {answer.tokens for answer in answers}
        assert len(ids) == len(answers) or method in ("sample", "best_of_n")
        for rank, answer in enumerate(answers):
            assert answer.length == len(answer.tokens) <= options.max_new_tokens
            assert answer.text == loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            ended = answer.tokens[-1] == loaded.tokenizer.eos_token_id
            assert answer.finish == ("eos" if ended else "length") and answer.finished == ended
            logp = total(next_logp(loaded, prompt, answer.tokens), answer.tokens)
            ref_logp = total(next_logp(other, prompt, answer.tokens), answer.tokens)
            # float32 against a pass over the whole text
            np.testing.assert_allclose([answer.logp, answer.ref_logp], [logp, ref_logp], atol=2e-4)
            np.testing.assert_allclose(answer.reward, 0.3 * (logp - ref_logp), atol=2e-4)
            score = answer.reward if method == "best_of_n" else answer.logp
            assert answer.score == pytest.approx(score, abs=2e-4)
            assert answer.seed == (0 if method in ("sample", "best_of_n", "chunk") else None)
            proves = rank == 0 and method in ("beam", "exact")
            assert (answer.certified is not None) == proves
        if method != "sample":
            assert [a.score for a in answers] == sorted([a.score for a in answers], reverse=True)
    if method in ("greedy", "sample"):
        without = run(loaded, one_device, replace(options, report_reference=False))
        assert without[0][0].ref_logp is None and without[0][0].reward is None
        assert [a.tokens for a in without[0]] == [a.tokens for a in found[0]]


def _likelihood(method):
    return {"objective": "likelihood"} if method == "best_of_n" else {}


def test_greedy_takes_the_likeliest_token(loaded, one_device, next_logp):
    for prompt, (answer,) in zip(PROMPTS, run(loaded, one_device, block("greedy")), strict=True):
        assert list(answer.tokens) == next_logp(loaded, prompt, answer.tokens).argmax(-1)[: answer.length].tolist()


@pytest.mark.thin("sample", "beam")
@pytest.mark.parametrize("method", declarations(DecodeOptions)["seed"].defaults)
def test_answers_depend_on_seed_and_row_and_not_on_the_batch(method, loaded, one_device):
    needed = {"beam": {"stochastic": True}, "mcts": {"selection": "gumbel"}}.get(method, {})
    options = block(method, **_likelihood(method), **needed, report_reference=False)
    decoder = prepare(loaded, interpret(options), one_device)

    def tokens(found):
        return [[answer.tokens for answer in answers] for answers in found]

    both = tokens(decoder(PROMPTS, [3, 8]))
    assert tokens(decoder(PROMPTS[::-1], [8, 3])) == both[::-1]
    assert tokens(decoder(PROMPTS[1:], [8], fill_to=2)) == both[1:]
    assert tokens(decoder([PROMPTS[0]] * 2, [3, 3])) == [both[0]] * 2
    # Whoever draws nothing would pass all this; and each row and each seed draws for itself.
    differ = [tokens(decoder(PROMPTS, [row, row + 1])) != both for row in (0, 20, 30)]
    differ += [tokens(generate(loaded, PROMPTS, replace(options, seed=1), one_device, rows=[3, 8])) != both]
    assert sum(differ) >= 3
    assert decoder(PROMPTS)[0][0].seed == 0


def test_a_stop_string_cuts_what_would_have_been_said(loaded, one_device):
    options = block("sample", return_sequences=4, max_new_tokens=8)
    free = [answer for answers in run(loaded, one_device, options) for answer in answers]
    words = [loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True).split() for answer in free]
    # One spans two tokens, one is part of one, and one is never said.
    stop = [" ".join(words[0][1:3]), words[-1][2][1:], "w0 w0 w0"]
    cut = [answer for answers in run(loaded, one_device, replace(options, stop=stop)) for answer in answers]
    stopped = 0
    for whole, answer in zip(free, cut, strict=True):
        said = [loaded.tokenizer.decode(whole.tokens[: n + 1]) for n in range(whole.length)]
        hits = [n + 1 for n, text in enumerate(said) if any(string in text for string in stop)]
        if not hits:
            same = {"logp": None, "score": None, "drawn": None}  # tokens drawn are those of all samples of the prompt
            assert replace(answer, **same) == replace(whole, **same)
            continue
        stopped += 1
        assert answer.tokens == whole.tokens[: hits[0]] and answer.finish == "stop" and answer.finished
        text = loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.text == min((text.split(string)[0] for string in stop if string in text), key=len)
    assert 2 <= stopped < len(free)


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        (["w5 w6"], "w1 w5 w6", "w1 "),
        ([" w5"], "w1 w2 w5", "w1 w2"),
        ([" w5"], "w5", ""),  # the first token says " w5" behind a prompt
        (["5"], "w1 w5", "w1 w"),
        (["[EOS]"], "w1 [EOS]", "w1 "),  # special tokens are not in the text
        (["w5 [EOS]", "w7"], "w1 w5 [EOS]", "w1 "),
        (["6", "5 w6"], "w1 w5 w6", "w1 w"),  # both complete at once: the one that begins first
    ],
)
def test_texts_before_stop_strings(stop, tokens, text, loaded, one_device):
    decoder = prepare(loaded, interpret(block("sample", stop=stop)), one_device)
    ids = tuple(loaded.tokenizer.convert_tokens_to_ids(tokens.split()))
    assert decoder._text(ids, Finish.STOP).rstrip() == text.rstrip()
    assert decoder._text(ids, Finish.LENGTH) == loaded.tokenizer.decode(ids, skip_special_tokens=True)


def test_delimiters_become_the_tokens_that_end_with_them(loaded, one_device):
    options = block("chunk", delimiters=["5", "w7"])
    ids = prepare(loaded, interpret(options), one_device).plan.method.delimiter_ids
    words = loaded.tokenizer.convert_ids_to_tokens(list(ids))
    assert words == ["w5", "w7", "w15", "w25", "w35", "w45", "w55"]
    plain = run(loaded, one_device, block("chunk", max_new_tokens=6, chunk_length=6))
    assert run(loaded, one_device, block("chunk", max_new_tokens=6, chunk_length=6, delimiters=WORDS)) != plain
    with pytest.raises(InputError, match=r"no token ends with 'w5 w6'"):
        prepare(loaded, interpret(replace(options, delimiters=["w5 w6"])), one_device)


def test_a_guided_policy_is_the_sum_of_logits(loaded, other, one_device, next_logp):
    guides = [Guide(other, loaded, 1.5)]
    ((answer,), _) = generate(loaded, PROMPTS, block("greedy"), one_device, guides=guides)
    base, tuned = (next_logp(member, PROMPTS[0], answer.tokens) for member in (loaded, other))
    combined = base + 1.5 * (tuned - base)
    combined -= np.log(np.exp(combined).sum(-1, keepdims=True))
    assert list(answer.tokens) == combined.argmax(-1)[: answer.length].tolist()
    assert answer.logp == pytest.approx(total(combined, answer.tokens), abs=2e-4)
    assert answer.ref_logp == pytest.approx(total(base, answer.tokens), abs=2e-4) and answer.reward is None
    # Weight 1 on (tuned, base) is the tuned model, and 0 is the base.
    for weight, same in ((1.0, other), (0.0, loaded)):
        expected = generate(same, PROMPTS, block("greedy"), one_device)
        found = generate(loaded, PROMPTS, block("greedy"), one_device, guides=[Guide(other, loaded, weight)])
        assert [a[0].tokens for a in found] == [a[0].tokens for a in expected]
    assert generate(loaded, PROMPTS, block("greedy"), one_device) != generate(
        other, PROMPTS, block("greedy"), one_device
    )


def test_a_vocabulary_that_is_cut(loaded, other, make_loaded, one_device):
    wide = make_loaded(2, size=64)
    cut = replace(other, params={"logits": wide.params["logits"][:, :60]})
    with pytest.raises(InputError, match=r"vocabulary of 64 tokens.*one of 60.*--decode.vocabulary 60"):
        generate(loaded, PROMPTS, block("greedy"), one_device, guides=[Guide(wide, loaded, 1.0)])
    guides = [Guide(wide, loaded, 1.0)]
    found = generate(loaded, PROMPTS, block("greedy", vocabulary=60), one_device, guides=guides)
    assert [a[0].tokens for a in found] == [a[0].tokens for a in generate(cut, PROMPTS, block("greedy"), one_device)]
    narrow = generate(loaded, PROMPTS, block("sample", vocabulary=10), one_device, guides=guides)
    assert max(token for answers in narrow for answer in answers for token in answer.tokens) < 10
    with pytest.raises(InputError, match="vocabulary 61 is larger"):
        generate(loaded, PROMPTS, block("greedy", vocabulary=61), one_device, guides=guides)
    with pytest.raises(InputError, match="none of the first 2 tokens ends a response"):
        generate(loaded, PROMPTS, block("greedy", vocabulary=2), one_device, guides=guides)
    with pytest.raises(InputError, match=r"a prompt: the token None has id 62, but one of the models has only 60"):
        generate(
            wide,
            [np.array([1, 62])],
            block("greedy", vocabulary=60),
            one_device,
            guides=[Guide(loaded, loaded, 1.0)],
        )


def test_a_reference_with_another_tokenizer_is_refused(loaded, other, one_device):
    class Swapped:
        def convert_ids_to_tokens(self, ids):
            names = loaded.tokenizer.convert_ids_to_tokens(ids)
            names[7], names[8] = names[8], names[7]
            return names

    stranger = replace(other, tokenizer=Swapped())
    with pytest.raises(InputError, match=r"another tokenizer.*token 7 is 'w4' there, not 'w3'"):
        run(loaded, one_device, block("beam", objective="implicit_reward"), other=stranger)
    with pytest.raises(InputError, match="needs a reference and beta"):
        prepare(loaded, interpret(block("best_of_n")), one_device)
    with pytest.raises(InputError, match="needs no reference"):
        prepare(loaded, interpret(block("greedy")), one_device, reference=other, beta=0.1)


def test_the_block_s_own_beta_goes_first(loaded, other, one_device):
    options = block("sample", report_reference=True)
    recorded = run(loaded, one_device, options, other=other)[0][0]
    own = run(loaded, one_device, replace(options, beta=0.6), other=other)[0][0]
    assert own.reward == pytest.approx(2 * recorded.reward) and own.tokens == recorded.tokens


def test_ends_of_answers_are_collected(loaded, hf_folder, tmp_path):
    assert eos_token_ids(loaded) == (2,)
    for name in ("config.json", "generation_config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_text(json.dumps({"eos_token_id": [9, 5, 700]}))
        there = replace(loaded, generation=hub.read_generation_config(folder))
        assert eos_token_ids(there) == (2, 5, 9)  # 700 is behind the vocabulary
        assert eos_token_ids(there, 9) == (2, 5)
        (folder / name).write_text(json.dumps({"eos_token_id": 9}))
        assert eos_token_ids(replace(loaded, generation=hub.read_generation_config(folder))) == (2, 9)


def test_every_end_ends(loaded, one_device, tmp_path):
    (free,) = generate(loaded, PROMPTS[:1], block("greedy"), one_device)[0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free.tokens[1]]}))
    (ended,) = generate(
        replace(loaded, generation=hub.read_generation_config(tmp_path)), PROMPTS[:1], block("greedy"), one_device
    )[0]
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[1]) + 1] and ended.finish == "eos"


def test_consumed_models_are_freed_and_others_kept(hf_folder, one_device):
    ours = load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())
    expected = generate(ours, PROMPTS, block("greedy"), one_device)
    assert not any(x.is_deleted() for x in jax.tree.leaves(ours.params))
    decoder = prepare(ours, interpret(block("greedy")), one_device, consume=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(ours.params["layers"]))
    assert decoder(PROMPTS) == expected


def test_layers_stay_stacked_where_slices_cost_nothing(hf_folder, one_device):
    loaded = load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())
    decoder = prepare(loaded, interpret(block("greedy")), one_device)
    (kept,) = params_for("tpu", [loaded], consume=True)
    assert kept is loaded.params and not any(x.is_deleted() for x in jax.tree.leaves(kept))
    assert not is_unstacked(kept) and is_unstacked(decoder.params)
    assert replace(decoder, params=kept)(PROMPTS) == decoder(PROMPTS)


def test_answers_on_a_mesh_equal_those_on_one_device(hf_folder, one_device):
    loaded = load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())
    mesh, options = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2)), MeshOptions(min_shard_size=64)
    sharded = load_model(hf_folder, ComputeOptions(), mesh, options)
    expected = generate(loaded, PROMPTS, block("beam"), one_device)
    found = generate(sharded, PROMPTS, block("beam"), mesh)
    for row, others in zip(found, expected, strict=True):
        assert [answer.tokens for answer in row] == [answer.tokens for answer in others]
        np.testing.assert_allclose([a.logp for a in row], [a.logp for a in others], rtol=0, atol=1e-4)
