"""Whether the rewards of the responses that a loss prefers moved as theory expects, in one sentence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Case = Literal["rose", "unmoved", "ordinary", "slight", "displaced", "unsure"]

CLEAR = 2.0  # standard errors beyond which a difference is not noise
ORDINARY = 2.0  # a fall of up to this many times the expected one is ordinary: no reference fits its data exactly
# What a loss reads -> what it prefers (returns name no responses), examples of it, and metrics, of which one is there.
PREFERRED = {
    "preferences": ("chosen responses", "pairs", ("chosen",)),
    "rankings": ("the best responses", "rankings", ("chosen", "place_1")),
    "labels": ("desirable responses", "responses", ("chosen",)),
    "returns": ("all responses", "responses", ("completion",)),
    "segments": ("chosen segments", "pairs", ("chosen",)),  # of `qstar control`, whose expectation is exact
}
SLIGHT = 1.0  # nats per response: a smaller fall makes responses less than e times less likely, and is harmless


@dataclass(frozen=True)
class Evidence:
    """The figures at the end of a run; rewards are means per response, and all were 0 at step 0.

    Attributes:
        chosen: Implicit reward of chosen responses.
        chosen_error: Its standard error.
        chosen_length: Their mean length in tokens.
        expected: Implicit reward of the reference's own samples, -beta KL(reference || policy).
        expected_error: Its standard error.
        expected_length: Mean length of the samples in tokens.
        samples: Number of samples.
        beta: Reward per nat.
        held_out: Whether the chosen responses are held out, or those of the last training steps.
        kind: What the loss reads, a key of `PREFERRED`, which says what "chosen" means.
    """

    chosen: float
    chosen_error: float
    chosen_length: float
    expected: float
    expected_error: float
    expected_length: float
    samples: int
    beta: float
    held_out: bool
    kind: str = "preferences"

    @property
    def scale(self) -> float:
        """How much longer chosen responses are than samples, which are truncated; each further token adds its KL."""
        return self.chosen_length / self.expected_length

    @property
    def ordinary(self) -> tuple[float, float]:
        """Reward of the reference's samples at the chosen responses' length, at most 0, and its standard error."""
        return min(self.expected, 0.0) * self.scale, self.expected_error * self.scale


def collect(
    summary: Mapping[str, float], *, samples: int, length: float, beta: float, kind: str = "preferences"
) -> Evidence | None:
    """Collects the figures from a run's summary, preferably those of held-out examples.

    With `loss.ld_alpha`, rewards of chosen responses are weighted, and so a little smaller than what they are compared
    with.

    Returns:
        The figures; None if the last examples had no such response.
    """
    measured = [(prefix, name) for prefix in ("eval_", "") for name in PREFERRED[kind][2]]
    prefix, name = next(((p, n) for p, n in measured if f"{p}rewards/{n}" in summary), (None, None))
    if name is None:
        return None
    return Evidence(
        chosen=summary[f"{prefix}rewards/{name}"],
        chosen_error=summary.get(f"{prefix}rewards/{name}_stderr", math.inf),  # none from a single one
        chosen_length=summary[f"{prefix}lengths/{name}"],
        expected=summary["eval_rewards/reference_expected"],
        expected_error=summary["eval_rewards/reference_expected_stderr"],
        expected_length=length,
        samples=samples,
        beta=beta,
        held_out=prefix == "eval_",
        kind=kind,
    )


def decide(evidence: Evidence) -> Case:
    """Compares the fall of chosen rewards with the expected one.

    Returns:
        rose: clearly above 0; unmoved: not clearly different from 0. Otherwise they fell, ordinary: clearly by less
        than `ORDINARY` times the expected fall; slight: by less than `SLIGHT` nats; displaced: clearly by more;
        unsure: noise hides which.
    """
    if evidence.chosen > CLEAR * evidence.chosen_error:
        return "rose"
    if abs(evidence.chosen) <= CLEAR * evidence.chosen_error:
        return "unmoved"
    expected, error = evidence.ordinary
    excess = ORDINARY * expected - evidence.chosen  # above 0: they fell by more
    noise = CLEAR * math.hypot(evidence.chosen_error, ORDINARY * error)
    if excess < -noise:
        return "ordinary"
    if -evidence.chosen < SLIGHT * evidence.beta:
        return "slight"
    return "displaced" if excess > noise else "unsure"


def sentence(evidence: Evidence) -> str:
    """States the verdict and its figures in one line of ASCII, for any terminal."""
    expected, error = evidence.ordinary
    responses, examples, _ = PREFERRED[evidence.kind]
    where = f"held-out {examples}" if evidence.held_out else f"training {examples} at the end"
    remedy = " or a higher loss.beta usually helps"
    if evidence.kind == "preferences":
        remedy = ", a higher loss.beta, loss.name dpop or a mixture with sft usually helps"
    more = "more" if evidence.kind == "segments" else "a higher train.reference_samples and more"
    chosen = f"{_number(evidence.chosen)} +- {_number(evidence.chosen_error, '')} on {where}"
    theory = f"{_number(expected)} +- {_number(error, '')}"
    factor = math.exp(min(evidence.chosen / evidence.beta, 700.0))
    sentences = {
        "rose": f"rewards of {responses} rose to {chosen}, where the reference's own responses would be at "
        f"{theory}: the policy moves towards {responses}",
        "unmoved": f"rewards of {responses} are {chosen}, no further from 0 than noise; the reference's own "
        f"responses would be at {theory}",
        "ordinary": f"rewards of {responses} fell to {chosen}, which is ordinary: theory expects {theory} for "
        "responses to which the reference was fitted (Eq. 16: what the reference likes loses beta KL(reference || "
        "policy)); what counts is the margin",
        "slight": f"rewards of {responses} fell to {chosen}, which is little: they are {factor:.2f} times as "
        f"likely as under the reference; its own responses would be at {theory}",
        "displaced": f"rewards of {responses} fell to {chosen}, more than {ORDINARY:g} times the {theory} that "
        "theory expects for responses to which the reference was fitted: probability moves to other responses "
        f"(likelihood displacement); a lower optimizer.learning_rate{remedy}",
        "unsure": f"rewards of {responses} fell to {chosen}; theory expects {theory} for responses to which the "
        f"reference was fitted, and noise hides whether this is more; {more} evaluation {examples} would tell",
    }
    text = sentences[decide(evidence)]
    if evidence.kind == "segments":
        return f"{text} (exact KL at the states of {evidence.samples} held-out segments)".replace(
            "responses", "actions"
        )
    scaled = f", scaled from {evidence.expected_length:.0f} to {evidence.chosen_length:.0f} tokens"
    return f"{text} ({evidence.samples} samples of the reference{scaled})"


def _number(value: float, sign: str = "+") -> str:
    return f"{value:{sign}.2g}" if abs(value) < 1e-2 else f"{value:{sign}.3f}"
