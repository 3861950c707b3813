"""Questions and scorers of the package reasoning-gym."""

import re
import sys

import pytest

from qstar_jax.cli.main import main
from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.store.hub import open_folder
from qstar_jax.tasks import find
from qstar_jax.tasks.reasoning_gym import open_task


@pytest.fixture
def package():
    return pytest.importorskip("reasoning_gym", reason="these questions need the extra `reasoning-gym`")


def test_questions_and_rewards_of_a_sum(package):
    source = "reasoning-gym:chain_sum?seed=3&size=40&max_terms=3"
    rows = read_rows(source, "train")
    assert len(rows) == 40 and rows[:5] == read_rows(source, "train", 5)
    task, seed = find(source)
    assert seed is None and task.splits == ("train", "test")
    for row in rows:
        # The sum is worked out here, from its text.
        terms = re.findall(r"[-+]?\d+", re.search(r"([-+]?\d+(?: [-+] \d+)+)", row["prompt"])[1].replace(" ", ""))
        assert len(terms) <= 3 and sum(map(int, terms)) == int(row["answer"])
        assert task.true_reward(row["prompt"], row["answer"]) == 1.0
        assert task.true_reward(row["prompt"], f"So <answer>{row['answer']}</answer>, not <answer >") == 1.0
        assert task.true_reward(row["prompt"], f"<answer>{row['answer']}</answer> <answer>x</answer>") < 1.0
        assert task.true_reward(row["prompt"], "") < 1.0
    assert task.true_reward("What is 1 + 1?", "2") is None
    held_out = read_rows(source, "test")
    assert held_out and not {row["prompt"] for row in held_out} & {row["prompt"] for row in rows}


def test_seeds_and_options_change_the_questions(package):
    assert read_rows("reasoning-gym:chain_sum?seed=1", "train", 3) != read_rows("reasoning-gym:chain_sum", "train", 3)
    assert len(read_rows("reasoning-gym:chain_sum", "train")) == 500


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:chain_summ", "has no generator 'chain_summ'; the nearest: chain_sum"),
        ("reasoning-gym:countdown", "its scorer runs responses as code"),
        ("reasoning-gym:chain_sum?term=3", "refuses these options"),
        ("reasoning-gym:chain_sum?min_terms=9&max_terms=2", "refuses these options"),
        ("reasoning-gym:chain_sum?size=0", "size is 0; expected a whole number, at least 1"),
        ("reasoning-gym:chain_sum?seed=x", "seed is 'x'; expected a whole number"),
    ],
)
def test_what_cannot_be_used_is_refused(package, source, message):
    with pytest.raises(InputError, match=message):
        read_rows(source, "train")


def test_the_verb_reads_them(package, capsys):
    assert main(["data", "reasoning-gym:chain_sum?size=20"]) == 0
    assert "20 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="no split 'dev'; expected one of train, test"):
        read_rows("reasoning-gym:chain_sum", "dev")
    with pytest.raises(InputError, match="has data but no base model"):
        open_folder("reasoning-gym:chain_sum")


def test_without_the_package_the_extra_is_named(monkeypatch):
    open_task.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'qstar_jax\[reasoning-gym\]'"):
        read_rows("reasoning-gym:chain_sum", "train")
