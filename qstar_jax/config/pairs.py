"""The verb that makes pairs of scored or labelled samples."""

from dataclasses import dataclass

from qstar_jax.config.ranges import ranged
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class PairsConfig:
    """Preference pairs from several samples of each prompt: of whole responses, or of single steps (Step-DPO).

    `qstar dpo` reads pairs.jsonl. A whole pair is the best and the worst sample of a prompt: by total reward in
    scores.jsonl, by `reward` or `label` in other files. A step pair is a prompt with right steps, the wrong step that a
    sample went on with (rejected), and a right one of another sample with the same steps before it (chosen).

    Args:
        samples: scores.jsonl of `qstar score` or its folder; for steps, scored with --steps. Or rows with a prompt and
            a response, in anything that `data.train` may name.
        out: Folder for pairs.jsonl, and pairs.json, which counts what became of the samples.
        steps: Make pairs of steps. Wrong is the first step that `wrong_step` names; in scores.jsonl the first whose
            reward is below `threshold`, or, without one, below those of all other steps that samples took there.
        threshold: Reward from which on a step counts as right.
        margin: Smallest difference between the rewards of a pair, in scores and in the column `reward`.
        wrong_step: Column of the number of the first wrong step, from 0, or -1 if all are right.
        step_delimiter: What ends a step in rows: a text, re:REGULAR_EXPRESSION or column:NAME, as for `qstar score`.
        split: Split to read if `samples` has splits.
        prompt: Column of the prompt, a text.
        completion: Column of the response, a text.
        reward: Column of the reward of a response; null: there is none.
        label: Column that says whether a response is right, for pairs without `reward`.
    """

    samples: str = path()
    out: str = path()
    steps: bool = False
    threshold: float | None = ranged(None, "(-inf, inf)")
    margin: float = ranged(0.0, "[0, inf)")
    wrong_step: str | None = None
    step_delimiter: str = r"\n"
    split: str = "train"
    prompt: str = "prompt"
    completion: str = "completion"
    reward: str | None = None
    label: str = "label"
