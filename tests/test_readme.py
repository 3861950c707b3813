"""The documents' code, run as it stands there; their commands, parsed; their paths and links, there."""

import contextlib
import copy
import importlib.util
import io
import itertools
import re
import shlex
import string
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.cli.main import build_parser
from qstar_jax.store import hub

ROOT = Path(__file__).parents[1]
IGNORED = (".venv", "build", "node_modules")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("**/README.md"), *ROOT.glob(".github/*.md")]
    if not any(part.startswith(".pytest") or part in IGNORED for part in path.relative_to(ROOT).parts)
)


def blocks(document, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_the_five_lines(hf_folder, tiny_model, tiny_params, tiny_tokenizer, tmp_path, monkeypatch, on_devices):
    """The README's lines, on a tiny chat model instead of the one of the hub."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    folder = tmp_path / "model"
    hub.write_folder(folder, tiny_model, tiny_params, tokenizer, "float32")
    [code] = blocks("README.md")
    lines = [line for line in code.splitlines() if line and not line.startswith("import")]
    assert len(lines) == 5
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder))
    names = {"pairs": [{"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}] * 32}
    with on_devices(1), contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    assert len(names["answers"]) == 1 and names["run"].summary["steps"] == 1
    assert len(names["rewards"]) == len(names["q"]) == len(names["v"]) > 0


def test_five_lines_of_research_code():
    logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 7))
    lengths = jnp.array([[5, 3], [1, 4], [2, 2]])
    mask = jnp.arange(5) < lengths[..., None]
    tokens = jnp.where(mask, jax.random.randint(jax.random.key(1), (3, 2, 5), 0, 7), -100)
    [code] = blocks("qstar_jax/README.md")
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) == 5
    names = {"logits": logits, "ref_logits": ref_logits, "tokens": tokens, "mask": mask}
    exec(code, names)
    chosen = np.take_along_axis(np.asarray(logits), np.where(mask, tokens, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(names["q"], np.where(mask, 0.1 * chosen, 0), atol=1e-6)
    np.testing.assert_allclose(names["v"], np.where(mask, 0.1 * jax.nn.logsumexp(logits, -1), 0), atol=1e-6)
    # The gradient of -log sigma(m) by hand: -beta sigma(-m), times +-(one-hot - softmax) at every token.
    margins = names["rewards"].sum(-1)[:, 0] - names["rewards"].sum(-1)[:, 1]
    sign = np.array([1, -1])[:, None, None]
    direction = sign * (jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits)) * mask[..., None]
    expected = -0.1 / 3 * jax.nn.sigmoid(-margins)[:, None, None, None] * direction
    np.testing.assert_allclose(names["gradient"], expected, atol=1e-7)


def test_a_training_step_of_ones_own():
    names = {}
    exec(blocks("qstar_jax/training/README.md")[0], names)
    assert names["state"].step == 20 and names["means"]["loss"] < np.log(2) / 2
    # By hand: the loss after the last step is a little below that before it.
    network, state = names["network"], names["state"]
    tokens = jnp.arange(16)
    logp, ref_logp = (jax.nn.log_softmax(network.apply(p, tokens)) for p in (state.params, state.ref_params))
    ratios = np.asarray(logp - ref_logp)  # [last token, next token]
    margins = [
        ratios[3, 5] + ratios[5, 1] - ratios[3, 6] - ratios[6, 1],
        ratios[4, 7] + ratios[7, 8] + ratios[8, 1] - ratios[4, 9] - ratios[9, 1],
    ]
    loss = float(np.mean(np.log1p(np.exp(-0.1 * np.array(margins)))))
    assert names["means"]["loss"] * 0.8 < loss < names["means"]["loss"]
    # What the text warns of.
    for gone in (names["params"], names["reference"]):
        assert all(x.is_deleted() for x in jax.tree.leaves(gone))


def test_a_loss_of_arrays():
    names = {}
    exec(blocks("qstar_jax/losses/README.md")[0], names)
    np.testing.assert_allclose(names["values"], np.log(2), atol=1e-6)


def test_another_kind_of_stage():
    """The lines as they are; and labels of places alone teach both stages to go to the right."""
    names = {}
    [code] = blocks("qstar_jax/pipeline/README.md")
    exec(code, names)
    stages, sample, joint_loss = names["stages"], names["pipeline"].sample, names["pipeline"].joint_loss
    np.testing.assert_allclose(names["losses"], np.log(2), atol=1e-6)
    # Log-ratios are those of the densities.
    means, word = jnp.arange(6.0).reshape(3, 2) / 5, jnp.array([2, 0])
    place = jnp.array([[0.3, -1.0], [2.0, 0.1]])
    density = jax.scipy.stats.norm.logpdf
    expected = (density(place, means[word]) - density(place)).sum(-1)
    np.testing.assert_allclose(names["move_ratio"](means, None, (word,), place), expected, atol=1e-5)
    # One word sends the arm to the right, the others up; the right is preferred.
    params, x = (jnp.zeros(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])), jnp.zeros(256)
    first, second = (sample(stages, params, jax.random.key(seed), x) for seed in (0, 1))
    better = first[1][:, 0] > second[1][:, 0]
    chosen, rejected = (
        (jnp.where(side, first[0], second[0]), jnp.where(side[:, None], first[1], second[1]))
        for side in (better, ~better)
    )
    gradient = jax.grad(lambda params: joint_loss(stages, params, x, chosen, rejected)[0].mean())(params)
    assert gradient[0][0] < 0 < min(gradient[0][1:])  # the word that means right becomes more likely
    assert (gradient[1][:, 0] < 0).all()  # and every word moves the arm further right


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_module_and_link_of_a_document_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:qstar_jax|tests|configs|launch|\.github)/[\w./-]+)`", text))
    paths |= set(re.findall(r"(?<![\w/.])(?:tests|configs|launch)/[\w/-]+\.\w+", text))
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]
    modules = re.findall(r"python -m (qstar_jax[\w.]+)|from (qstar_jax[\w.]*) import", text)
    assert not [module for module in map("".join, modules) if importlib.util.find_spec(module) is None]
    # Links to files and pictures, and to headings.
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        linked = (ROOT / name).parent / path if path else ROOT / name
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_a_document_is_one(name, monkeypatch):
    """Commands of the program are parsed as they stand, with every option; nothing is run."""
    monkeypatch.chdir(ROOT)  # where configurations are found
    verbs = set()
    for block in blocks(name, "sh"):
        for command in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"--config runs/\S+", "--model m", command)  # of a run, which is not here
            words = shlex.split(string.Template(command).safe_substitute(MODEL="m", S="1"), comments=True)
            words = words[words.index("&&") + 1 :] if "&&" in words else words
            words = [*itertools.dropwhile(lambda word: re.match(r"\w+=", word), words)]  # variables
            if words[:1] == ["qstar"]:
                verbs.add(build_parser(words[1:]).parse_args(words[1:]).verb)
    if name == "README.md":  # or nothing would be found anywhere
        assert verbs == {"demo", "dpo", "view"}
