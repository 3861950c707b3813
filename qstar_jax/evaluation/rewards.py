"""Rewards of responses for training: a task's own, a reward model's, or that of the right final answer."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from qstar_jax.config import DataOptions, RlConfig
from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.evaluation.final_answers import Extractor, final_answer, find_extractor, right_answer
from qstar_jax.evaluation.judges.reward_model import load_reward
from qstar_jax.sharding import make_mesh
from qstar_jax.tasks import find
from qstar_jax.training.rl.prompts import Prompts, RewardMaker
from qstar_jax.training.rl.rewards import Reward


def reward_maker(config: RlConfig) -> RewardMaker:
    """Makes the reward that `config.reward` names, for the prompts of any file; models are opened once.

    Raises:
        InputError: If an option does not fit the others.
    """
    options = config.reward
    if options.kind == "function":
        raise InputError("reward.kind function is for `qstar_jax.rl` in Python, which takes one; choose another kind")
    if options.kind == "true_reward":
        for source in filter(None, (config.data.train, config.data.eval)):
            _true_reward(source)
    if options.kind == "verifier":
        names = ("--reward.extract", "--reward.pattern")
        extract = find_extractor(options.extract or "marked", options.pattern, options=names)

    @cache
    def reward_model() -> Reward:
        return load_reward(
            options.model,
            mesh=make_mesh(config.mesh),
            reference=options.reference,
            beta=options.beta,
            data=DataOptions(
                as_chat=options.as_chat or False,
                max_length=options.max_length or 1024,
                max_prompt_length=options.max_prompt_length or 512,
            ),
            batch_size=options.batch_size or 16,
            compute=config.compute,
            mesh_options=config.mesh,
            block="reward",
        )

    def make(prompts: Prompts) -> Reward | None:
        match options.kind:
            case "true_reward":
                return _true_reward(prompts.dataset.source)
            case "reward_model":
                reward = reward_model()
                if not options.as_chat:
                    return reward
                # Its template wraps all turns of a dialogue.
                turns_of = {text: prompts.turns[row] for row, text in prompts.texts.items()}
                return lambda pairs: reward([(turns_of[prompt], response) for prompt, response in pairs])
            case "verifier":
                rows = read_rows(prompts.dataset.source, prompts.split, max(prompts.texts) + 1, config.data.name)
                return Verifier(prompts, rows, options.answer or "answer", extract)
        return None

    return make


def _true_reward(source: str) -> Reward:
    task = find(source)
    if task is None or task[0].true_reward is None:
        raise InputError(
            f"reward.kind true_reward: {source} is no built-in task that knows the true reward of a "
            "response, such as builtin:tiny-tldr; choose reward_model or verifier"
        )
    true_reward = task[0].true_reward
    return lambda pairs: [true_reward(*pair) for pair in pairs]


class Verifier:
    """1 for a response whose final answer is that of its prompt's row, else 0.

    Args:
        prompts: The prompts.
        rows: All rows of their file.
        column: Column of the right answer.
        extract: Finds final answers.

    Raises:
        InputError: If a row has no answer, or two rows with one prompt have different ones.
    """

    def __init__(self, prompts: Prompts, rows: Sequence[dict[str, Any]], column: str, extract: Extractor):
        self._extract, self._answers = extract, {}
        source = prompts.dataset.source
        for row, prompt in prompts.texts.items():
            where = f"{source} row {row + 1}"
            answer = right_answer(rows[row], column, self._extract, where=where, option="--reward.answer")
            if self._answers.setdefault(prompt, answer) != answer:
                raise InputError(
                    f"{where}: its prompt occurs before with the answer {self._answers[prompt]!r}, and "
                    f"here it is {answer!r}; keep one of them"
                )

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Verifies (prompt, response) pairs."""
        return [float(final_answer(response, self._extract) == self._answers[prompt]) for prompt, response in pairs]
