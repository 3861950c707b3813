"""Rows of the task: solutions, outcomes of solutions, pairs of a right and a wrong one, and solutions step by step."""

from random import Random

from qstar_jax.tasks.tiny_sums.solver import Solution, solve
from qstar_jax.tasks.tiny_sums.sums import draw_sum

SPLITS = ("train", "test", "solutions", "outcomes", "steps")
ROWS = {"train": 20_000, "test": 1_000, "solutions": 100_000, "outcomes": 40_000, "steps": 2_000}
_HELD_OUT = ("test", "steps")


def split_rows(split: str, seed: int = 0, limit: int | None = None) -> list[dict]:
    """Makes one split of the task; `test` and `steps` have sums that no other split has.

    Args:
        split: `train` and `test` hold pairs of a solution with the right answer and one with a wrong one: `prompt`,
            `chosen`, `rejected`, and `wrong`, the ranges [start, end) of characters of its false results. `solutions`
            are `prompt` and `completion`, to fit a model to the solver, and `outcomes` also have their `label`, whether
            the answer is right. `steps` are outcomes with `first_error`, the first false step from 0, -1 if there is
            none, and `slips`, whether each step is false.
        seed: Seed of the rows.
        limit: Make only the first N rows.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; expected one of {', '.join(SPLITS)}")
    rng, held_out = Random(f"{split} {seed}"), split in _HELD_OUT
    count = ROWS[split] if limit is None else min(limit, ROWS[split])
    make = _pair if split in ("train", "test") else _single
    columns = {"solutions": (), "outcomes": ("label",), "steps": ("label", "first_error", "slips")}.get(split, ())
    return [make(rng, held_out, columns) for _ in range(count)]


def _pair(rng: Random, held_out: bool, _: tuple[str, ...]) -> dict:
    """Pairs a right and a wrong solution of the same sum."""
    asked = draw_sum(rng, held_out=held_out)
    right = wrong = None
    while right is None or wrong is None:
        solution = solve(asked, rng)
        if solution.is_right:
            right = right or solution
        else:
            wrong = wrong or solution
    return {"prompt": asked.prompt, "chosen": right.text, "rejected": wrong.text, "wrong": wrong.marks}


def _single(rng: Random, held_out: bool, columns: tuple[str, ...]) -> dict:
    solution = solve(draw_sum(rng, held_out=held_out), rng)
    row = {"prompt": solution.sum.prompt, "completion": solution.text}
    return row | {name: value for name, value in _truth(solution).items() if name in columns}


def _truth(solution: Solution) -> dict:
    return {"label": solution.is_right, "first_error": solution.first_error, "slips": solution.slips}
