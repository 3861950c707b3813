"""Runs TRL's own losses on stand-in models; as a program, writes what they give on a small batch to trl_golden.json.

Nothing of TRL is restated: trainers are made without their constructors, given their configuration's defaults and the
case's settings, and asked for the loss. Their models return the batch's log-probabilities, so that torch's gradients
are those with respect to these. Prompts are of one token.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

GOLDEN = Path(__file__).with_name("trl_golden.json")

PAIRWISE = "sigmoid sigmoid_norm hinge ipo exo_pair robust discopop".split()
OTHERS = "nca_pair bco_pair sppo_hard apo_zero apo_down aot aot_unpaired sft".split()
DIVERGENCES = [
    {"divergence": "forward_kl"},
    {"divergence": "js_divergence"},
    {"divergence": "alpha_divergence", "divergence_alpha": 0.5},
    {"divergence": "alpha_divergence", "divergence_alpha": 1.75},
]
# Where TRL's default is not ours, or not allowed.
GIVEN = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
TRL_NAMES = {
    "divergence": "f_divergence_type",
    "divergence_alpha": "f_alpha_divergence_coef",
    "wpo": "use_weighting",
    "weights": "loss_weights",
    "tau": "discopop_tau",
    "nll_weight": "cpo_alpha",
    "gamma": "simpo_gamma",
    "odds_weight": "beta",
}


@dataclass(frozen=True)
class Case:
    """A loss under our name and options, and TRL's trainer with the settings that our options do not translate to."""

    loss: str | list[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = "dpo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    golden: bool = False

    @property
    def id(self) -> str:
        """The trainer, the losses and whatever is not a default."""
        loss = self.loss if isinstance(self.loss, str) else "+".join(self.loss)
        given = [f"{name}={value}".replace(" ", "") for name, value in {**self.options, **self.settings}.items()]
        return "-".join([self.trainer, loss, *given])

    @property
    def in_float32(self) -> bool:
        """TRL's alpha divergence takes no float64."""
        return "divergence_alpha" in self.options

    @property
    def precision(self) -> float:
        """Of TRL's numbers: it computes ORPO's odds and EXO's smoothing in float32, whatever the input's type."""
        return 1e-6 if self.in_float32 or self.loss in ("orpo", "exo_pair") else 1e-9

    @property
    def couples_rows(self) -> bool:
        """Whether a pair's loss depends on the others."""
        losses = {self.loss} if isinstance(self.loss, str) else {*self.loss}
        return bool(losses & {"aot", "aot_unpaired", "sft", "cpo", "orpo", "kto"})


def _cases() -> list[Case]:
    cases = []
    for loss in PAIRWISE + OTHERS:
        given = GIVEN.get(loss, {})
        cases += [Case(loss, given, golden=True)]
        if loss != "sft":
            cases += [Case(loss, given | {"beta": 0.03}), Case(loss, given | {"beta": 1.5}, golden=loss == "hinge")]
    for loss in PAIRWISE:
        for options in DIVERGENCES:
            given = GIVEN.get(loss, {}) | options
            cases += [Case(loss, given, golden=loss in ("sigmoid", "ipo")), Case(loss, given | {"beta": 0.6})]
    for loss in ("exo_pair", "robust", "aot", "aot_unpaired"):
        cases.append(Case(loss, {"label_smoothing": 0.3, "beta": 0.4}))
    cases.append(Case("sigmoid", {"divergence": "alpha_divergence", "divergence_alpha": 1.0}))
    cases.append(Case("discopop", {"tau": 0.4, "beta": 0.7}))

    for loss in set(PAIRWISE + OTHERS) - {"sft"}:
        cases.append(
            Case(loss, GIVEN.get(loss, {}) | {"ld_alpha": 0.3, "beta": 0.5}, golden=loss in ("sigmoid", "aot"))
        )
    cases.append(Case("sigmoid", {"ld_alpha": 0.0}))
    # TRL multiplies in place, which fails on `sft` (expanded) and in the gradient of `hinge`.
    for loss in set(PAIRWISE + OTHERS) - {"sft", "hinge", "aot", "aot_unpaired"}:
        cases.append(Case(loss, GIVEN.get(loss, {}) | {"wpo": True}, golden=loss == "sigmoid"))
    cases.append(Case(["sigmoid", "bco_pair"], {"wpo": True, "ld_alpha": 0.5, "beta": 0.4}))

    mpo = ["sigmoid", "bco_pair", "sft"]
    cases.append(Case(mpo, {"weights": [0.8, 0.2, 1.0]}, golden=True))
    cases.append(Case(mpo, {"weights": [0.8, 0.2, 1.0], "beta": 0.4, "ld_alpha": 0.6}))
    cases.append(Case(["ipo", "hinge", "discopop"], {"divergence": "js_divergence"}))

    balanced = {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    unpaired = {"loss_type": "apo_zero_unpaired", "calculate_KL": False}
    cases += [Case("kto", {}, "kto", golden=True), Case("kto", balanced, "kto", golden=True)]
    cases += [Case("kto", options, "kto", unpaired) for options in ({}, balanced)]

    smoothed = {"beta": 0.5, "label_smoothing": 0.2}
    cases += [
        Case("cpo", {}, "cpo", golden=True),
        Case("cpo", smoothed | {"nll_weight": 0.3}, "cpo", golden=True),
        Case("cpo", smoothed | {"nll_weight": 0.0}, "cpo"),
    ]
    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0}
    for options in ({"beta": 2.0}, {"beta": 2.5, "gamma": 1.4}, {"beta": 1.5, "gamma": 0.8, "label_smoothing": 0.1}):
        cases.append(Case("simpo", options, "cpo", simpo, golden=True))
    # Without a reference; where there is no such loss here, log-probabilities stand for log-ratios.
    for loss in ("simpo", "hinge", "ipo"):
        mixture = {"weights": [1.0, 0.5], "beta": 0.4}
        cases.append(Case([loss, "sft"], mixture, "cpo", {"loss_type": loss, "cpo_alpha": 0.5}))

    cases += [Case("orpo", {}, "orpo", golden=True), Case("orpo", {"odds_weight": 0.7}, "orpo")]
    return sorted(cases, key=lambda case: (case.trainer, case.id))


CASES = _cases()


@dataclass(frozen=True)
class Result:
    """What TRL gives: the mean loss, its gradient with respect to the policy's token log-probabilities, and its log."""

    loss: float
    gradient: np.ndarray
    log: Mapping[str, float]


def random_batch(seed: int, *, rows: int = 7, length: int = 9, grid: int = 1024) -> dict[str, np.ndarray]:
    """Makes pairs whose chosen answers share no length, nor do the rejected ones. Arrays are [rows, 2, length].

    Numbers are multiples of 1 / grid: their sums are exact in float32 too, which TRL computes some losses in.
    """
    rng = np.random.default_rng(seed)
    shape = (rows, 2, length)

    def on_grid(values):
        return np.clip(np.round(values * grid), -6 * grid, -1) / grid

    def some_mask():
        lengths = np.stack([rng.permutation(length)[:rows] + 1 for _ in range(2)], axis=1)
        return np.arange(length) < lengths[..., None]

    ref_logp, kl_ref_logp = (on_grid(rng.uniform(-6, 0, shape)) for _ in range(2))
    # The mean ratio of mismatched answers is positive for even seeds; for odd ones KTO clips it at 0.
    kl_shift = 0.4 if seed % 2 == 0 else -0.4
    return {
        "logp": on_grid(ref_logp + rng.normal(0, 0.4, shape)),
        "ref_logp": ref_logp,
        "mask": some_mask(),
        "log_sum_sq": on_grid(rng.uniform(-3, 0, shape)),
        "labels": rng.random((rows, 2)) < 0.6,
        "kl_logp": on_grid(kl_ref_logp + kl_shift + rng.normal(0, 0.2, shape)),
        "kl_ref_logp": kl_ref_logp,
        "kl_mask": some_mask(),
    }


def run(case: Case, batch: Mapping[str, np.ndarray], **settings: Any) -> Result:
    """Runs TRL's code.

    Args:
        case: What to run.
        batch: See `random_batch`.
        **settings: More of TRL's settings.

    Returns:
        Loss and gradient [rows, 2, length], computed in float64 where TRL allows it.
    """
    import torch

    dtype = torch.float32 if case.in_float32 else torch.float64
    tensors = {name: torch.tensor(x, dtype=dtype if x.dtype.kind == "f" else None) for name, x in batch.items()}
    policy = tensors["logp"].requires_grad_()
    given = {TRL_NAMES.get(name, name): value for name, value in case.options.items()} | {**case.settings, **settings}
    loss, log = _RUNNERS[case.trainer](case, tensors, given)
    (gradient,) = torch.autograd.grad(loss, policy)
    return Result(loss.item(), gradient.numpy().astype(np.float64), log)


def dpo_loss_types() -> set[str]:
    """Names of the losses of TRL's DPO trainer, as it lists them when asked for another."""
    try:
        run(Case("no such loss"), random_batch(0))
    except ValueError as error:
        return set(re.findall(r"'(\w+)'", str(error).split("one of")[1]))
    raise AssertionError("TRL knows every loss")


def _make_trainer(trainer: type, config: type, settings: Mapping[str, Any]):
    import torch

    made = object.__new__(trainer)
    settings = {
        **{f.name: f.default for f in fields(config)},
        **settings,
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(made).update(settings, args=SimpleNamespace(**settings))
    return made


class _LanguageModel:
    """Answers with log-probabilities out of tables; the first token says which."""

    training = True
    is_gradient_checkpointing = False
    _modules: ClassVar[dict[str, Any]] = {}  # where accelerate looks for compiled parts, once PEFT is installed

    def __init__(self, *tables, log_sum_sq=None):
        self.tables, self.log_sum_sq = tables, log_sum_sq

    def __call__(self, input_ids, labels, **kwargs):
        import torch

        answer, nothing = labels[:, 1:] != -100, torch.zeros(labels[:, 1:].shape)
        return SimpleNamespace(
            log_probs=torch.where(answer, self.tables[int(input_ids[0, 0])], 0.0),
            log_sum_sq_probs=None if self.log_sum_sq is None else torch.where(answer, self.log_sum_sq, 0.0),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def _stack(pairs):
    """[rows, 2, ...] to TRL's [2 * rows, ...], the chosen answers first."""
    import torch

    return torch.cat([pairs[:, 0], pairs[:, 1]])


def _with_prompt(mask, table: int = 0) -> dict[str, Any]:
    import torch

    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "input_ids": torch.full((len(mask), mask.shape[1] + 1), table),
        "attention_mask": torch.cat([prompt, mask.long()], dim=1),
        "completion_mask": torch.cat([0 * prompt, mask.long()], dim=1),
    }


def _run_dpo(case: Case, batch, settings):
    from trl import DPOConfig, DPOTrainer

    trainer = _make_trainer(DPOTrainer, DPOConfig, settings)
    trainer.loss_types = [case.loss] if isinstance(case.loss, str) else case.loss
    trainer.loss_weights = settings.get("loss_weights", [1.0] * len(trainer.loss_types))
    trainer.model = _LanguageModel(_stack(batch["logp"]), log_sum_sq=_stack(batch["log_sum_sq"]))
    trainer.ref_model = _LanguageModel(_stack(batch["ref_logp"]))
    loss = trainer._compute_loss(trainer.model, _with_prompt(_stack(batch["mask"])), False)
    return loss, _last(trainer)


def _run_kto(case: Case, batch, settings):
    from trl import KTOConfig, KTOTrainer

    trainer = _make_trainer(KTOTrainer, KTOConfig, {"calculate_KL": True, **settings})
    trainer.model = _LanguageModel(_stack(batch["logp"]), _stack(batch["kl_logp"]))
    trainer.ref_model = _LanguageModel(_stack(batch["ref_logp"]), _stack(batch["kl_ref_logp"]))
    mismatched = _with_prompt(_stack(batch["kl_mask"]), table=1)
    inputs = _with_prompt(_stack(batch["mask"])) | {f"KL_{name}": value for name, value in mismatched.items()}
    loss = trainer._compute_loss(trainer.model, inputs | {"label": _stack(batch["labels"])}, False)
    return loss, _last(trainer)


def _last(trainer) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _run_cpo(case: Case, batch, settings):
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = _make_trainer(CPOTrainer, CPOConfig, {"pad_token_id": 0, **settings})
    return trainer.get_batch_loss_metrics(*_binary_language(batch))


def _run_orpo(case: Case, batch, settings):
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    # TRL's NLL has the prompt's tokens too, save the first, which is all the prompt there is.
    trainer = _make_trainer(ORPOTrainer, ORPOConfig, {"padding_value": 0, **settings})
    return trainer.get_batch_loss_metrics(*_binary_language(batch))


def _binary_language(batch) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A model over two tokens, the answer's (0) and everything else, whose logits give the log-probabilities."""
    import torch

    logp, mask = _stack(batch["logp"]), _stack(batch["mask"])
    token = torch.where(mask, logp, -1.0)
    logits = torch.stack([token, torch.log(-torch.expm1(token))], dim=-1)
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)

    inputs = _with_prompt(mask)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
    halves = {name: value.chunk(2) for name, value in inputs.items()}
    sides = {
        f"{side}_{name}": half[i] for name, half in halves.items() for i, side in enumerate(("chosen", "rejected"))
    }
    return lambda *args, **kwargs: SimpleNamespace(logits=logits), sides


_RUNNERS = {"dpo": _run_dpo, "kto": _run_kto, "cpo": _run_cpo, "orpo": _run_orpo}


def to_lists(array: np.ndarray, mask: np.ndarray) -> list[list[list[float]]]:
    """Numbers of the tokens that the mask has: a list each answer."""
    return [[answer[m].tolist() for answer, m in zip(*row, strict=True)] for row in zip(array, mask, strict=True)]


def from_lists(answers: Sequence[Sequence[Sequence[float]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `to_lists`: numbers, 0 beyond the answers, and the mask."""
    array = np.array([[[*answer, *[0.0] * (length - len(answer))] for answer in pair] for pair in answers])
    return array, np.array([[np.arange(length) < len(answer) for answer in pair] for pair in answers])


def make_golden() -> dict[str, Any]:
    """Runs the golden cases on one batch of few digits, where no margins are equal and no sum is 0."""
    import trl

    batch = random_batch(118, rows=4, length=6, grid=8)
    results = [(case, run(case, batch)) for case in CASES if case.golden]
    masks = {"kl_logp": "kl_mask", "kl_ref_logp": "kl_mask"}
    inputs = {
        name: to_lists(array, batch[masks.get(name, "mask")])
        for name, array in batch.items()
        if array.dtype.kind == "f"
    }
    return {
        "trl": trl.__version__,
        "inputs": inputs | {"labels": batch["labels"].tolist()},
        "cases": {
            case.id: {"loss": result.loss, "gradient": to_lists(result.gradient, batch["mask"])}
            for case, result in results
        },
    }


def read_golden(path: Path = GOLDEN) -> dict[str, Any]:
    """Reads what `main` wrote, with arrays [rows, 2, length] in place of lists."""
    golden = json.loads(path.read_text())
    inputs, length = golden["inputs"], max(len(answer) for pair in golden["inputs"]["logp"] for answer in pair)
    batch = {"labels": np.array(inputs.pop("labels"))}
    for name, lists in inputs.items():
        width = length if not name.startswith("kl_") else max(len(answer) for pair in lists for answer in pair)
        batch[name], mask = from_lists(lists, width)
        batch["kl_mask" if name.startswith("kl_") else "mask"] = mask
    results = {
        name: Result(case["loss"], from_lists(case["gradient"], length)[0], {})
        for name, case in golden["cases"].items()
    }
    return {"trl": golden["trl"], "batch": batch, "results": results}


def main():
    """Writes trl_golden.json beside this file."""
    text = json.dumps(make_golden(), indent=1)
    for inside in (r"[^\[\]{}]*?", r"\[[^\[\]{}]*\],\s+\[[^\[\]{}]*\]"):  # an answer, and a pair, on one line
        text = re.sub(rf"\[\s+({inside})\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    GOLDEN.write_text(text + "\n")


if __name__ == "__main__":
    main()
