import re

import pytest

from qstar_jax.cli.help import loss_defaults, shown_default, shown_readers
from qstar_jax.cli.main import main
from qstar_jax.config import VARIANT_BLOCKS, LossOptions
from qstar_jax.config.variants import declarations
from qstar_jax.losses import LOSSES
from qstar_jax.losses.registry import DECLARED


def entry(verb, option, capsys):
    """The help of one option, in one line."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    return " ".join(re.search(rf"\n  --{option}[ ,](.*?)(?=\n  --|\n\n|\Z)", text, re.DOTALL).group(1).split())


@pytest.mark.parametrize(
    ("verb", "option", "shown"),
    [
        ("generate", "decode.beams", "BEAMS [beam, chunk] Width of the search. (type: int | null, default: 4)"),
        ("generate", "decode.top_p", "[sample, best_of_n, chunk] "),
        ("generate", "decode.min_new_tokens", "[all but mcts, exact] "),
        ("generate", "decode.return_sequences", "[all but greedy] "),
        ("generate", "decode.objective", "default: likelihood; best_of_n: implicit_reward)"),
        ("generate", "decode.stochastic", "default: false)"),
        ("generate", "decode.rejection_interval", "default: null)"),
        ("sweep", "judge.temperature", "[llm] "),
        ("sweep", "judge.temperature", "default: 0.0)"),
        ("dpo", "loss.tau", "TAU [discopop] Width of the blend. (type: float | null, default: 0.05)"),
        ("dpo", "loss.beta", "[all but sft, orpo] "),
        ("dpo", "loss.beta", "default: 0.1; dpop: 0.3; implicit_prm: 0.05; a_star: 0.001; simpo: 2.0)"),
        ("dpo", "loss.normalize", "default: batch_tokens)"),
        ("dpo", "optimizer.beta2", "[adamw, lion] "),
        ("dpo", "optimizer.beta2", "default: 0.999; lion: 0.99)"),
    ],
)
def test_the_help_says_who_reads_an_option_and_its_defaults(verb, option, shown, capsys):
    assert shown in entry(verb, option, capsys)


@pytest.mark.parametrize(("verb", "block"), [("generate", "decode"), ("sweep", "judge"), ("sft", "optimizer")])
def test_the_help_of_every_option_follows_from_its_declaration(verb, block, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, declaration in declarations(VARIANT_BLOCKS[block]).items():
        explained = text.split(f" --{block}.{name}", 1)[1]
        assert explained.split("default: ", 1)[1].startswith(f"{shown_default(declaration.defaults)})")


def test_losses_are_explained_by_their_signatures():
    declared = {option: dict(declaration.defaults) for option, declaration in DECLARED.items()}
    declared.pop("divergence_alpha")  # not in the signatures, where divergences are functions
    assert loss_defaults() == declared


def test_the_help_names_the_losses_that_can_be_trained():
    named = re.search(r"name: (.*?)\n +weights:", LossOptions.__doc__, re.DOTALL).group(1)
    assert set(re.findall(r"\w+", named)) & LOSSES.keys() == LOSSES.keys()


def test_readers_are_named_by_the_shorter_list():
    assert shown_readers({"a": 1, "b": 1}, ["a", "b", "c", "d"]) == "[a, b] "
    assert shown_readers({"a": 1, "b": 1, "c": 1}, ["a", "b", "c", "d"]) == "[all but d] "
    assert shown_readers({"a": 1, "b": 1}, ["a", "b"]) == ""
