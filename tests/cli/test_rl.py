"""`qstar rl`, and the verbs that read its run."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from qstar_jax.cli.main import main
from qstar_jax.config import DataOptions, OptimizerOptions, RewardOptions, RlConfig, RlOptions, TrainOptions
from qstar_jax.evaluation.judges.classifier import ClassifierReward
from qstar_jax.evaluation.rewards import reward_maker
from qstar_jax.evaluation.scored import read_scores
from qstar_jax.training.rl.run import train_rl
from qstar_jax.training.run_log import read_metrics


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Prompts with a final answer, which may be a whole number or text that ends with one."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": answer} for i, answer in enumerate(["w1", "so # w2", "3", "w4"] * 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WORDS = ["--reward.kind", "verifier", "--reward.extract", "hash", "--train.steps", "2", "--train.batch_size", "8"]
WORDS += ["--rl.max_new_tokens", "5", "--rl.samples_per_prompt", "2", "--rl.kl_coef", "0.3", "--train.log_every", "1"]


@pytest.mark.slow
def test_verbs_read_its_run_like_that_of_dpo(hf_folder, sums, train_file, tmp_path, one_device_only, capsys):
    model, out = shutil.copytree(hf_folder, tmp_path / "model"), tmp_path / "rl"
    words = ["rl", "--model", str(model), "--out", str(out), "--data.train", str(sums), *WORDS]
    assert main([*words, "--export", str(tmp_path / "exported")]) == 0
    shutil.rmtree(model)
    assert (out / "curves.png").stat().st_size > 1000 and (tmp_path / "exported" / "model.safetensors").exists()
    assert main(words) == 2 and "add --resume" in capsys.readouterr().err
    # Its rewards have the beta of the price per nat.
    common = ["--model", str(out), "--data.eval", str(train_file)]
    assert main(["score", *common, "--out", str(tmp_path / "scores")]) == 0
    scored = read_scores(tmp_path / "scores" / "scores.jsonl")
    assert scored[0].beta == 0.3
    assert any(scored[0].reward) and scored[0].total_reward == pytest.approx(
        0.3 * (sum(scored[0].logp) - sum(scored[0].ref_logp)), abs=1e-5
    )
    decode = ["--decode.method", "beam", "--decode.max_new_tokens", "4", "--decode.report_reference", "true"]
    assert main(["generate", *common, "--data.max_eval_rows", "4", "--out", str(tmp_path / "beams"), *decode]) == 0
    lines = [json.loads(line) for line in (tmp_path / "beams" / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward.kind", "true_reward"], "is no built-in task that knows the true reward"),
        (["--reward.kind", "function"], "reward.kind function is for `qstar_jax.rl` in Python"),
        (["--reward.kind", "verifier", "--reward.extract", "last"], "--reward.extract 'last' is unknown"),
        (["--reward.kind", "verifier", "--reward.answer", "gold"], "column 'gold' is missing (found: 'prompt'"),
    ],
    ids=str,
)
def test_rewards_that_cannot_be_had_are_refused(words, message, hf_folder, sums, tmp_path, one_device_only, capsys):
    out = str(tmp_path / "rl")
    assert main(["rl", "--model", str(hf_folder), "--out", out, "--data.train", str(sums), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rl").exists()


@pytest.fixture
def last_word_classifier(hf_folder, tiny_tokenizer, tmp_path):
    """(folder, score of each word) of a sequence classifier of last words: its layers add nothing."""
    tensors = load_file(hf_folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensors[name])
    embeddings, scale = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    head = tensors["score.weight"] = np.random.default_rng(0).normal(size=(1, len(scale))).astype(np.float32)
    config = json.loads((hf_folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config |= {"pad_token_id": tiny_tokenizer.eos_token_id}  # so it reads the word before the EOS, as transformers does
    folder = tmp_path / "classifier"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer.save_pretrained(folder)
    normalized = embeddings / np.sqrt((embeddings**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale
    scores = (normalized @ head[0]).tolist()
    return folder, {word: scores[token] for word, token in tiny_tokenizer.get_vocab().items()}


@pytest.mark.slow
def test_a_classifier_scores_the_samples(
    last_word_classifier, hf_folder, sums, tmp_path, one_device_only, monkeypatch, capsys
):
    folder, scores = last_word_classifier
    seen, call = [], ClassifierReward.__call__
    monkeypatch.setattr(ClassifierReward, "__call__", lambda self, pairs: seen.append(pairs) or call(self, pairs))
    words = ["rl", "--model", str(hf_folder), "--data.train", str(sums), "--reward.kind", "reward_model"]
    words += ["--reward.model", str(folder), "--train.steps", "2", "--train.batch_size", "8", "--train.log_every", "1"]
    words += ["--rl.max_new_tokens", "5", "--rl.samples_per_prompt", "2"]
    assert main([*words, "--out", str(tmp_path / "rl")]) == 0
    expected = [np.mean([scores[f"{prompt} {response}".split()[-1]] for prompt, response in pairs]) for pairs in seen]
    assert [len(pairs) for pairs in seen] == [16, 16]
    assert read_metrics(tmp_path / "rl")["objective/scores"][1] == pytest.approx(expected, abs=1e-4)
    # What only a language model reads is refused.
    assert main([*words, "--out", str(tmp_path / "other"), "--reward.beta", "0.1"]) == 2
    assert "reward.beta has no effect on a classifier" in capsys.readouterr().err


@pytest.fixture
def train_watched(hf_folder, tmp_path, one_device_only):
    """`train_watched(file, steps, **sections)` trains, and returns how many programs were compiled at each line."""
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.append(event) if "backend_compile" in event else None
    )

    def run(file, steps, rl=RlOptions(), **sections):
        config = RlConfig(
            model=str(hf_folder),
            out=str(tmp_path / "rl"),
            data=DataOptions(train=str(file), layout="shared"),
            rl=replace(rl, max_new_tokens=6, samples_per_prompt=2),
            optimizer=OptimizerOptions(learning_rate=1e-2),
            train=TrainOptions(steps=steps, batch_size=8, log_every=1, reference_samples=0),
            **sections,
        )
        at_line = []
        train_rl(config, reward_maker(config), Console(quiet=True), lambda: at_line.append(len(programs)))
        return at_line

    return run


@pytest.mark.slow
def test_a_dpo_run_is_a_reward_model_whose_program_is_compiled_once(dpo_run, train_file, tmp_path, train_watched):
    reward = RewardOptions(kind="reward_model", model=str(dpo_run), batch_size=8)
    at_line = train_watched(train_file, 12, reward=reward)
    scores = read_metrics(tmp_path / "rl")["objective/scores"][1]
    assert at_line[1] == at_line[-1] and sum(scores[-3:]) > sum(scores[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rl", "reward"),
    [
        (RlOptions(), RewardOptions(kind="verifier", extract="hash")),
        (RlOptions(algorithm="ppo", inner_epochs=2), RewardOptions(kind="reward_model", batch_size=8)),
    ],
    ids=["rloo-verifier", "ppo-reward-model"],
)
def test_a_guide_beside_any_score_compiles_nothing_after_the_first_steps(rl, reward, dpo_run, sums, train_watched):
    model = str(dpo_run) if reward.kind == "reward_model" else None
    at_line = train_watched(sums, 4, rl, reward=replace(reward, model=model, guide=str(dpo_run), guide_clip=0.05))
    assert len(at_line) == 4 and at_line[0] > 0 and at_line[1] == at_line[3]
