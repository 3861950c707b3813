"""`qstar rl`, and the verbs that read its run."""

import json
import shutil

import jax
import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DataOptions, OptimizerOptions, RewardOptions, RlConfig, RlOptions, TrainOptions
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
        (["--reward.kind", "verifier", "--reward.extract", "last"], "reward.extract 'last' is unknown"),
        (["--reward.kind", "verifier", "--reward.answer", "gold"], "no 'gold' (found: prompt, answer)"),
    ],
    ids=str,
)
def test_rewards_that_cannot_be_had_are_refused(words, message, hf_folder, sums, tmp_path, one_device_only, capsys):
    out = str(tmp_path / "rl")
    assert main(["rl", "--model", str(hf_folder), "--out", out, "--data.train", str(sums), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_dpo_run_is_a_reward_model_whose_program_is_compiled_once(
    dpo_run, hf_folder, train_file, tmp_path, one_device_only
):
    programs, at_line = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.append(event) if "backend_compile" in event else None
    )
    config = RlConfig(
        model=str(hf_folder),
        out=str(tmp_path / "rl"),
        data=DataOptions(train=str(train_file), layout="shared"),
        rl=RlOptions(max_new_tokens=6, samples_per_prompt=2),
        reward=RewardOptions(kind="reward_model", model=str(dpo_run), batch_size=8),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        train=TrainOptions(steps=12, batch_size=8, log_every=1, reference_samples=0),
    )
    train_rl(config, reward_maker(config), Console(quiet=True), lambda: at_line.append(len(programs)))
    scores = read_metrics(tmp_path / "rl")["objective/scores"][1]
    assert at_line[1] == at_line[-1] and sum(scores[-3:]) > sum(scores[:3])
