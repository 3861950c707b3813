"""Records as a real comparison of three runs leaves them, with long names and hostile ones."""

import io

import pytest
from rich.console import Console

from qstar_jax.evaluation.insights.credit import Credit
from qstar_jax.evaluation.insights.decline import Decline
from qstar_jax.evaluation.insights.dialogue import Dialogue
from qstar_jax.evaluation.insights.record import Finding
from qstar_jax.evaluation.insights.steps import StepErrors
from qstar_jax.evaluation.insights.sweep import Sweep
from qstar_jax.evaluation.scored import Alternative, ScoredResponse
from qstar_jax.report.insights_page import insights_page

HOSTILE = '<script>alert("x")</script>\u202e'
LONG = "runs/smollm2-135m-instruct-dpo-alpaca-preferences-beta-0.1-lr-1e-6-seed-0/checkpoints/1200"
WIDTHS = (2, 3, 5, 7, 10, 20)


def interval(mean: float, arm: float) -> dict[str, float]:
    return {"mean": round(mean, 4), "low": round(mean - arm, 4), "high": round(mean + arm, 4)}


@pytest.fixture(scope="session")
def credit() -> Credit:
    def detectors(reward, arm):
        means = {"implicit reward": reward, "reference log-probability": 0.67, "uniform split": 0.51}
        return {name: interval(mean, arm) for name, mean in (means | {"true advantage": 0.95}).items()}

    kinds = {"wrong number": 0.91, "wrong name": 0.84, "invented detail": 0.78, HOSTILE: 0.62}
    record = {
        "model": LONG,
        "reference": HOSTILE,
        "beta": 0.1,
        "answers": 412,
        "mistakes": 410,
        "tokens": 18_204,
        "wrong_tokens": 903,
        "detectors": detectors(0.83, 0.015),
        "kinds": {kind: {"answers": 103, "detectors": detectors(auc, 0.04)} for kind, auc in kinds.items()},
        "differences": {
            "reference log-probability": interval(0.162, 0.021),
            "uniform split": interval(0.321, 0.025),
        },
        "by_token": detectors(0.81, 0.02),
    }
    return Credit.from_json(record, "credit.json")


@pytest.fixture(scope="session")
def sweep() -> Sweep:
    def points(beta, lift):
        made = [("sampled", 1), ("greedy", 1), *(("beam", width) for width in WIDTHS)]
        found = []
        for number, (decoder, width) in enumerate(made):
            fall = 0.03 * max(0, number - 4) ** 1.5
            found.append(
                {
                    "decoder": decoder,
                    "width": width,
                    "win_rate": interval(0.34 + lift + 0.05 * min(number, 4) - fall, 0.035),
                    "length": interval(64 - 4.1 * number, 2.5),
                    "logp": interval(-61.3 + 6.5 * number, 1.9),
                    "implicit_reward": interval(beta * (4.0 + 0.9 * min(number, 4) - 8 * fall), 0.04),
                    "true_reward": interval(0.55 + lift + 0.08 * min(number, 4) - 2 * fall, 0.04),
                    "truncated": 0.125 if decoder == "sampled" else 0.02,
                }
            )
        return found

    def run(beta, lift):
        return {
            "name": f"beta {beta}",
            "model": LONG,
            "beta": beta,
            "points": points(beta, lift),
            "pivot": 5,
            "differences": {
                "5 beams - sampled": interval(0.20, 0.04),
                "5 beams - greedy": interval(0.15 + lift, 0.05),
                "20 beams - 5 beams": interval(-0.21 + lift, 0.05),
            },
        }

    judge = "the true reward of the task"
    runs = [run(0.05, 0.0), run(0.1, 0.05), run(0.5, 0.02)]
    return Sweep.from_json({"judge": judge, "prompts": 256, "seeds": [0, 1, 2], "runs": runs}, "sweep.json")


@pytest.fixture(scope="session")
def decline() -> Decline:
    def run(name, chosen, rejected, held_out=True):
        steps = list(range(0, 401, 25))
        part = [step / 400 for step in steps]
        curves = {
            "chosen": [chosen * x for x in part],
            "rejected": [rejected * x**0.8 for x in part],
            "margin": [chosen * x - rejected * x**0.8 for x in part],
        }
        if held_out:
            curves["reference"] = [-0.9 * x for x in part]
        return {
            "name": name,
            "folder": LONG,
            "beta": 0.1,
            "held_out": held_out,
            "steps": steps,
            "curves": curves,
            "stderr": {name: [0.08 * x for x in part] for name in curves} if held_out else {},
            "verdict": "rewards of chosen answers fell to -0.850 +- 0.150 on held-out pairs, which is ordinary",
        }

    names = "with SFT", "without SFT", f"${HOSTILE}$"
    runs = [run(names[0], -0.85, -2.1), run(names[1], 0.42, -1.3), run(names[2], 0.1, -0.6, False)]
    return Decline.from_json({"runs": runs}, "decline.json")


@pytest.fixture(scope="session")
def questions() -> Dialogue:
    policies = {"fitted player": -0.10, "DPO on turns": 0.36, "DPO on replies too": 0.31}

    def games(policy, decoder, returns, noisy=False):
        return {
            "policy": policy,
            "decoder": decoder,
            "noisy": noisy,
            "games": 512 if decoder == "sampled" else 16,
            "returns": interval(returns, 0.12),
            "success": interval(0.6 + returns / 4, 0.06),
            "questions": interval(4.4, 0.3),
            "bits": interval(0.77, 0.05),
            "wasted": interval(0.2 - returns / 10, 0.02),
        }

    def credit(policy, score, auc, noisy=False):
        return {
            "policy": policy,
            "score": score,
            "noisy": noisy,
            "rank_correlation": interval(auc - 0.2, 0.02),
            "wasted_auc": interval(auc, 0.03),
        }

    lifts = {"sampled": 0.0, "greedy": 0.4, "5 beams over turns": 0.42}
    record = {
        "seed": 0,
        "beta": 0.3,
        "pairs": 6400,
        "player": -0.064,
        "optimum": 0.762,
        "games": [games(p, d, mean + lift) for p, mean in policies.items() for d, lift in lifts.items()]
        + [games("fitted player", "sampled", -0.38, True), games("DPO, noisy answers", "sampled", -0.2, True)],
        "credit": [
            credit("DPO on turns", "turn reward", 0.877),
            credit("", "log pi_ref", 0.772),
            credit("DPO, noisy answers", "turn reward", 0.71, True),
        ],
        "luck": [
            {
                "policy": policy,
                "noisy": noisy,
                "share": interval(share, 0.1),
                "with_returns": interval(0.45, 0.1),
                "with_advantages": interval(0.82, 0.03),
            }
            for policy, noisy, share in (("DPO on turns", False, 0.53), ("DPO, noisy answers", True, 0.93))
        ],
        "differences": {
            "return": {
                "DPO on turns - fitted player": interval(0.46, 0.08),
                "DPO on turns - DPO on replies too": interval(-0.05, 0.02),
                "DPO on turns - DPO on replies too, greedy": interval(-0.02, 0.04),
            },
            "wasted questions": {"DPO on turns - fitted player": interval(-0.04, 0.01)},
        },
    }
    return Dialogue.from_json(record, "dialogue.json")


@pytest.fixture(scope="session")
def step_errors() -> StepErrors:
    def detector(f1, auc):
        shares = {"f1": f1, "erroneous": f1 - 0.05, "correct": f1 + 0.06, "auc": auc}
        return {name: interval(mean, 0.04) for name, mean in shares.items()} | {"threshold": -0.125}

    controls = {"outcome reward": (0.22, 0.61), "lowest reference log-probability": (0.48, 0.74), HOSTILE: (0.3, 0.6)}
    detectors = {"step reward": (0.66, 0.88), "value after the step": (0.5, 0.8), **controls}
    record = {
        "model": LONG,
        "reference": HOSTILE,
        "beta": 0.05,
        "questions": 128,
        "calibration_questions": 127,
        "responses": 512,
        "erroneous": 300,
        "steps": 2048,
        "wrong_steps": 300,
        "right_steps": 1400,
        "detectors": {name: detector(*numbers) for name, numbers in detectors.items()},
        "gains": {
            name: {"f1": interval(0.66 - f1, 0.05), "auc": interval(0.88 - auc, 0.03)}
            for name, (f1, auc) in controls.items()
        },
    }
    return StepErrors.from_json(record, "steps.json")


@pytest.fixture(scope="session")
def findings() -> list[Finding]:
    return [
        Finding(
            insight="credit",
            title="Token rewards find the wrong tokens",
            claim="Trained on labels of whole answers, the implicit reward ranks a wrong token below a right one "
            "more often than the reference's own log-probability does.",
            paper="“DPO-trained models can perform credit assignment”: the token rewards of a corrupted summary "
            "mark the wrong words (Section 4.2, Figure 1).",
            measured="AUC 0.83 [0.82, 0.84]; reference log-probability 0.67 [0.66, 0.69]; uniform split 0.51 "
            "[0.50, 0.53]; 903 wrong tokens in 412 answers.",
            reproduced=True,
            command=f"qstar credit --model {LONG} --out runs/credit",
        ),
        Finding(
            insight="search",
            title="Searching for likely answers is searching for reward",
            claim="Beams raise the win rate of a DPO policy, and very wide beams lower it again.",
            paper="Beam search improves the policy by 10 to 15 % with 5 beams; beyond that it over-optimises "
            "(Section 4.3, Figure 2).",
            measured="5 beams - sampled: +0.20 [0.16, 0.24]; 20 beams - 5 beams: -0.21 [-0.26, -0.16].",
            reproduced=False,
            command=f"qstar sweep --model {LONG} --out runs/sweep",
        ),
        Finding(
            insight="decline",
            title="Rewards of chosen answers fall after SFT",
            claim="They fall where the reference was fitted to the chosen answers, and not where it was not.",
            paper="“…the implicit rewards of chosen responses decrease in training” is to be expected (Eq. 16).",
            measured="with SFT -0.85 ± 0.15; without SFT +0.42 ± 0.11. " + HOSTILE,
            reproduced=None,
            command="qstar insights --out runs/insights",
        ),
    ]


def scored(pieces, rewards, **fields) -> ScoredResponse:
    """An answer with five alternatives to each token; the first is the token itself at every second place."""
    beta, ref_logp = 0.1, [-3.5 - 0.12 * (index % 7) for index in range(len(pieces))]
    logp = [ref + reward / beta for ref, reward in zip(ref_logp, rewards, strict=True)]
    v = [2.0 + 0.01 * index for index in range(len(pieces))]
    others = [" three", HOSTILE, "\n", " several", "\t"]
    return ScoredResponse(
        pieces=tuple(pieces),
        token_ids=tuple(range(100, 100 + len(pieces))),
        logp=tuple(logp),
        ref_logp=tuple(ref_logp),
        reward=tuple(rewards),
        q=tuple(beta * own + value for own, value in zip(logp, v, strict=True)),
        v=tuple(v),
        beta=beta,
        alternatives=tuple(
            tuple(
                Alternative(other, -0.25 - 0.7 * rank, 0.3 - 0.15 * rank)
                for rank, other in enumerate([piece, *others[1:]] if place % 2 else others)
            )
            for place, piece in enumerate(pieces)
        ),
        **{"row": 0, "role": "answer", "truncated": False} | fields,
    )


@pytest.fixture(scope="session")
def heatmaps() -> list[ScoredResponse]:
    """A pair on one prompt, and a hostile answer."""
    prompt = "SUBREDDIT: r/relationships\nTITLE: My neighbour keeps a rooster\nPOST: " + "It crows at four. " * 30
    words = "My neighbour keeps a rooster that crows at four every morning and will not part with it".split()
    good = [words[0], *(f" {word}" for word in words[1:]), "<|im_end|>"]
    bad = [*good[:4], " crocodile", *good[5:-2], HOSTILE, "<|im_end|>"]
    rewards = [0.05 * (-1) ** n + 0.01 * n for n in range(len(good))]
    lower = [-0.6 if "croco" in piece else reward - 0.1 for piece, reward in zip(bad, rewards, strict=True)]
    return [
        scored(good, rewards, role="chosen", prompt=prompt),
        scored(bad, lower, role="rejected", prompt=prompt, truncated=True, wrong=["croco" in piece for piece in bad]),
        scored([HOSTILE, "\n\n", "plain"], [0.2, -0.1, 0.3], row=1, prompt=HOSTILE),
    ]


@pytest.fixture(scope="session")
def solution() -> ScoredResponse:
    """A response of four steps, hostile words in one of them; the third is suspected."""
    texts = ["She eats 3 eggs + bakes 4, so 3 + 4 = 7.", "16 - 7 = 9 are left.", HOSTILE, "9 * 3 = 27, so # 27"]
    steps = [[*(f" {word}" for word in text.split()), end] for text, end in zip(texts, "\n\n\n#", strict=True)]
    pieces = [piece for step in steps for piece in step]
    step = [number for number, of_step in enumerate(steps) for _ in of_step]
    rewards = [0.02 * (-1) ** n - 0.3 * (number == 2) for n, number in enumerate(step)]
    known = {"step": tuple(step), "endogenous": (*rewards[:-1], None), "entropy": (0.5,) * len(step)}
    return scored(pieces, rewards, prompt="How much does she make?", first_error=2, **known)


@pytest.fixture(scope="session")
def whole_page(findings, credit, sweep, decline, questions, step_errors, heatmaps) -> str:
    """The page with everything."""
    records, title = [credit, sweep, decline, questions, step_errors], f"Three insights of {LONG}"
    all_findings = [*findings, questions.finding(), step_errors.finding()]
    return insights_page(all_findings, records, heatmaps=heatmaps, title=title, notes=["<i>\u202e"])


@pytest.fixture(scope="session")
def printed():
    """`printed(show, record, **options)`: what is shown on a terminal of 80 columns, by default without colour."""

    def make(show, record, **options) -> str:
        console = Console(file=io.StringIO(), width=80, **options)
        show(record, console)
        text = console.file.getvalue()
        assert "\u202e" not in text and all(len(line) <= 80 for line in text.splitlines() if "\x1b" not in line)
        return text

    return make
