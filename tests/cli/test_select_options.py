"""Options of `qstar select` that decide which responses there are: each changes what is sampled or searched."""

import json
from itertools import combinations

import pytest

from qstar_jax.cli.main import main
from qstar_jax.decoding.generations_file import read_generations

pytestmark = pytest.mark.usefixtures("one_device_only")

SAMPLES, LONGEST = 4, 6
EVERY_WORD = json.dumps(list("0123456789"))  # all words of the tiny model end with a digit


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{n} w1", "answer": f"{n}"}) + "\n" for n in (10, 11, 12)))
    return path


@pytest.fixture(scope="module")
def fresh(prompts, dpo_run, tmp_path_factory, on_devices):
    """`fresh(*words)` samples responses; returns the folder."""

    def run(*words):
        out = tmp_path_factory.mktemp("select") / "out"
        base = {"--data.eval": prompts, "--right": "answer", "--final_answer": "number", "--model": dpo_run}
        base |= {"--samples": SAMPLES, "--max_new_tokens": LONGEST, "--batch_size": 12}
        options = [str(word) for option in base.items() for word in option]
        with on_devices(1):
            assert main(["select", "--out", str(out), *options, *map(str, words)]) == 0
        return out

    return run


def sampled(folder, name="samples"):
    return [record for record in read_generations(folder / name) if record["finish"] != "dropped"]


def texts(records):
    return [record["text"] for record in records]


@pytest.fixture(scope="module")
def usual(fresh):
    records = sampled(fresh())
    assert len(records) == 3 * SAMPLES and len(set(texts(records))) > SAMPLES
    assert max(record["length"] for record in records) == LONGEST
    return records


def by_prompt(records):
    rows = [[record["text"] for record in records if record["row"] == row] for row in range(3)]
    assert all(len(several) == SAMPLES for several in rows)
    return rows


@pytest.mark.parametrize(
    "words", [("--top_k", "1"), ("--top_p", "1e-6"), ("--temperature", "1e-6")], ids=lambda words: words[0]
)
def test_sampling_that_leaves_the_most_likely_token_only_writes_one_response(words, fresh, usual):
    assert all(len(set(several)) > 1 for several in by_prompt(usual))
    assert all(len(set(several)) == 1 for several in by_prompt(sampled(fresh(*words))))


@pytest.mark.parametrize("words", [("--top_k", "5"), ("--top_p", "0.5"), ("--temperature", "0.5")], ids=lambda w: w[0])
def test_sampling_from_fewer_tokens_writes_more_likely_responses(words, fresh, usual):
    """A smaller temperature or fewer tokens, which have values between those of the test above and the defaults."""
    found = sampled(fresh(*words))
    assert any(len(set(several)) > 1 for several in by_prompt(found)) and texts(found) != texts(usual)
    per_token = [sum(r["logp"] for r in records) / sum(r["length"] for r in records) for records in (found, usual)]
    assert per_token[0] > per_token[1]


def test_the_seed_decides_which_responses_are_sampled(fresh, usual):
    assert texts(sampled(fresh("--seed", "0"))) == texts(usual) != texts(sampled(fresh("--seed", "1")))


def test_fresh_responses_end_at_the_limit_and_before_a_stop_string(fresh, usual):
    short = sampled(fresh("--max_new_tokens", "3"))
    assert max(record["length"] for record in short) == 3
    common = max((word for text in texts(usual) for word in text.split()[1:]), key=" ".join(texts(usual)).count)
    stopped = sampled(fresh("--stop", f"[{common}]"))
    assert any(common in text for text in texts(usual)) and not any(common in text for text in texts(stopped))
    assert any(record["finish"] == "stop" for record in stopped)


@pytest.fixture(scope="module")
def searched(fresh):
    """`searched(**options)` searches over steps with one beam: its record in selection.json, and its responses."""

    def run(**options):
        options = {"step_samples": 2, "step_length": 3, "step_ends": "[w3]"} | options
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        out = fresh("--step_beams", "[1]", *words)
        return json.loads((out / "selection.json").read_text())["search"][0], sampled(out, "step-beams-1")

    return run


@pytest.fixture(scope="module")
def usual_search(searched):
    return searched()


def test_the_number_of_continuations_changes_what_a_search_draws_and_finds(searched, usual_search):
    search, found = searched(step_samples=4)
    assert (usual_search[0]["samples"], search["samples"]) == (2, 4)
    assert search["tokens"] > 1.5 * usual_search[0]["tokens"] and texts(found) != texts(usual_search[1])


@pytest.mark.parametrize("options", [{"step_length": 1}, {"step_ends": EVERY_WORD}], ids=["step_length", "step_ends"])
def test_a_search_whose_steps_are_single_tokens_draws_two_for_each(options, searched, usual_search):
    _, found = searched(**options)
    assert texts(found) != texts(usual_search[1])
    assert all(record["drawn"] == 2 * LONGEST for record in found if record["length"] == LONGEST)
    assert any(record["length"] == LONGEST for record in found)


def test_longer_steps_change_what_a_search_finds(searched, usual_search):
    assert texts(searched(step_length=LONGEST)[1]) != texts(usual_search[1])


# Votes, which need no model


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    """`votes(*words)`: accuracies of the majority among five of twelve responses, by question, over subsets."""
    answers = ["5"] * 4 + ["3"] * 4 + ["1", "2", "4", "6"]
    folder = tmp_path_factory.mktemp("votes")
    lines = [json.dumps({"prompt": "q", "completion": f"# {answer}", "answer": "5"}) for answer in answers]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    words = ["--data.eval", str(folder / "rows.jsonl"), "--right", "answer", "--sizes", "[5]"]

    def run(*more):
        out = tmp_path_factory.mktemp("votes") / "out"
        assert main(["select", "--out", str(out), *words, *more]) == 0
        return json.loads((out / "selection.json").read_text())["methods"]["majority"][0]["mean"]

    return answers, run


def test_votes_are_exact_over_all_subsets_and_depend_on_the_seed_over_a_few(votes):
    answers, run = votes
    shares = []
    for voters in combinations(answers, 5):
        counts = {answer: voters.count(answer) for answer in voters}
        elected = [answer for answer, count in counts.items() if count == max(counts.values())]
        shares.append(("5" in elected) / len(elected))
    exact = sum(shares) / len(shares)
    assert run() == run("--seed", "1") == pytest.approx(exact, abs=1e-9)  # there are 792, fewer than --subsets
    few = [run("--subsets", "7", "--seed", seed) for seed in "001"]
    assert few[0] == few[1] != few[2] and exact not in map(pytest.approx, few)
