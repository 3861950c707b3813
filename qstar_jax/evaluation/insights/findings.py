"""What measurements say of the paper's three claims: a sentence with numbers, and whether the direction agrees."""

from collections.abc import Mapping
from typing import Any

from qstar_jax.evaluation.insights.credit import CEILING, REWARD

Record = Mapping[str, Any]
GOOD_AUC = 0.9


def findings(
    *, credit: Record | None = None, sweep: Record | None = None, decline: Record | None = None
) -> list[dict[str, Any]]:
    """Judges what was measured.

    Args:
        credit: What credit.json holds.
        sweep: What sweep.json holds.
        decline: What decline.json holds.

    Returns:
        For each that is there: insight, title, claim, the paper's statement, measured numbers with 95 % intervals,
        whether the paper's direction was reproduced (None where the numbers cannot tell), and the command.
    """
    made = [
        make(record)
        for make, record in ((_credit, credit), (_search, sweep), (_decline, decline))
        if record is not None
    ]
    return made


def _credit(credit: Record) -> dict[str, Any]:
    reward, differences = credit["detectors"][REWARD], credit["differences"]
    controls = [f"{name} {_interval(credit['detectors'][name])}" for name in differences]
    ceiling = credit["detectors"].get(CEILING)
    found = reward["mean"] >= GOOD_AUC and all(difference["low"] > 0 for difference in differences.values())
    lost = any(difference["high"] < 0 for difference in differences.values())
    return {
        "insight": "credit",
        "title": "Credit assignment",
        "claim": "Trained on labels of whole answers, the policy gives its lowest token rewards to the tokens that are "
        f"wrong: as a detector of them, the reward has an area under the ROC curve of at least {GOOD_AUC}, and more "
        "than detectors without preferences.",
        "paper": "Coloured by beta (log pi - log pi_ref), the wrong spans of hand-corrupted summaries stand out, and "
        "the rest hardly changes (Fig. 1, App. C; pictures, no number).",
        "measured": f"AUC {_interval(reward)} for {credit['mistakes']} mistakes among {credit['tokens']} tokens of "
        f"{credit['answers']} answers. Controls: {', '.join(controls)}."
        + (f" Ceiling, the true advantage: {_interval(ceiling)}." if ceiling else ""),
        "reproduced": True if found else False if lost or reward["high"] < GOOD_AUC else None,
        "command": "qstar score --wrong COLUMN",
    }


def _search(sweep: Record) -> dict[str, Any]:
    gains, said = [], []  # the verdict speaks of the first run
    for run in sweep["runs"]:
        pivot = next(p for p in run["points"] if p["decoder"] == "beam" and p["width"] == run["pivot"])
        own = {name: gain for name, gain in run["differences"].items() if name.startswith(f"{run['pivot']} beams - ")}
        gains += own.values() if run is sweep["runs"][0] else []
        more = [f"{_signed(gain)} against {name.partition(' - ')[2]}" for name, gain in own.items() if gain is not None]
        wider = [
            f"; {name.partition(' ')[0]} beams {_signed(gain)} against {run['pivot']}"
            for name, gain in run["differences"].items()
            if name not in own and gain is not None
        ]
        rate = _interval(pivot["win_rate"]) if pivot["win_rate"] else "undecided"
        said.append(f"{run['name']}: {rate} with {run['pivot']} beams, {', '.join(more)}{''.join(wider)}")
    known = [gain for gain in gains if gain is not None]
    found = bool(known) and all(gain["low"] > 0 for gain in known)
    return {
        "insight": "search",
        "title": "Search",
        "claim": "Beam search by likelihood, which is search by reward (Eq. 13), improves a DPO policy over one beam, "
        "sampled or greedy; very wide beams gain nothing more, or lose.",
        "paper": "Five beams win 10 to 15 % more often against the preferred summary than one, which was sampled; "
        "beyond five, win rates fall and answers grow long (Fig. 2; no greedy control).",
        "measured": f"Win rates against the preferred answer ({sweep['judge']}, {sweep['prompts']} prompts). "
        + ". ".join(said)
        + ".",
        "reproduced": True if found else False if any(gain["high"] < 0 for gain in known) else None,
        "command": "qstar sweep",
    }


def _decline(decline: Record) -> dict[str, Any]:
    runs = {run["name"]: run for run in decline["runs"]}
    both = [runs.get("with SFT"), runs.get("without SFT")]
    return {
        "insight": "decline",
        "title": "Falling rewards",
        "claim": "Implicit rewards of chosen answers fall in training where the reference was fitted to them, as "
        "-beta KL(reference || policy) of the reference's own answers must (Eq. 16), and not where it was not.",
        "paper": "With SFT on the chosen answers both rewards decline while the margin grows; without it chosen "
        "rewards stay above 0 (Fig. 3).",
        "measured": " ".join(_moved(run) for run in runs.values()),
        "reproduced": None if None in both else _falls_with_sft_only(*map(_end, both)),
        "command": "qstar decline",
    }


def _end(run: Record) -> tuple[float, float]:
    """Chosen rewards at the end of a run, and two standard errors; infinite where the run logged none."""
    return run["curves"]["chosen"][-1], 2 * run["stderr"].get("chosen", [float("inf")])[-1]


def _falls_with_sft_only(with_sft: tuple[float, float], without: tuple[float, float]) -> bool | None:
    """Whether the one falls and the other does not, or clearly less and not beyond noise; None where noise hides it."""
    (fallen, error), (other, other_error) = with_sft, without
    if fallen > error or other < -other_error:
        return False
    return True if fallen < -error and other - fallen > (error**2 + other_error**2) ** 0.5 else None


def _moved(run: Record) -> str:
    def last(curve: str) -> str:
        error = run["stderr"].get(curve)
        return f"{run['curves'][curve][-1]:+.3f}" + (f" +- {2 * error[-1]:.3f}" if error else "")

    reference = f", the reference's own answers at {last('reference')}" if "reference" in run["curves"] else ""
    return (
        f"{run['name'][0].upper()}{run['name'][1:]}, after {run['steps'][-1]} steps: chosen {last('chosen')}, rejected "
        f"{last('rejected')}, margin {last('margin')}{reference}."
    )


def _interval(interval: Record) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _signed(interval: Record) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
