"""Games of one player of the package textarena, as dialogues in which the game speaks as the user."""

import contextlib
import difflib
import random
from collections.abc import Iterator
from typing import Any

from qstar_jax.errors import InputError

Messages = list[dict[str, str]]


class Game:
    """A game that has begun.

    Attributes:
        messages: What was said so far, the last of it by the game.
        reward: Return of the player; None until the game has ended.
        reason: Why it ended, in the game's words.
        turns: Turns of the player.

    Args:
        name: Its name in textarena, such as GuessTheNumber-v0.
        seed: Seed of its secret and of everything else that it draws.

    Raises:
        InputError: textarena is not installed, has no such game, or it is not for one player or lacks its data.
    """

    def __init__(self, name: str, seed: int):
        self._random = random.Random(seed).getstate()
        self.messages: Messages = []
        self.reward: float | None = None
        self.reason, self.turns = "", 0
        try:
            with self._own_random():
                self._game = _make(name)
                self._game.reset(num_players=1, seed=seed)
        except AssertionError as error:
            raise InputError(f"{name} is not a game of one player ({error}); choose another") from error
        except (LookupError, OSError) as error:
            raise InputError(
                f"{name} lacks data that textarena would download: {' '.join(str(error).split())}"
            ) from error
        self._listen()

    def say(self, text: str):
        """Takes a turn: the game replies, or ends and says what the turns were worth."""
        self.messages.append({"role": "assistant", "content": text})
        self.turns += 1
        with self._own_random():
            ended, _ = self._game.step(action=text)
        if not ended:
            self._listen()
            return
        rewards, info = self._game.close()
        self.reward, self.reason = float(rewards[0]), str(info[0].get("reason", ""))

    def _listen(self):
        player, heard = self._game.get_observation()
        # The player's own words come back to it.
        texts = [text for speaker, text, _ in heard if speaker != player]
        self.messages.append({"role": "user", "content": "\n".join(texts)})

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Textarena draws from the generator of the process; here, games that are played together have their own."""
        outside = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(outside)


def _make(name: str) -> Any:
    """Makes a game without wrappers, which would repeat everything said so far in each turn."""
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError as error:
        raise InputError(f"games need the package textarena ({error}): pip install 'qstar_jax[textarena]'") from error
    if f"{name}-raw" not in ENV_REGISTRY:
        known = [other.removesuffix("-raw") for other in ENV_REGISTRY if other.endswith("-raw")]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise InputError(
            f"{name}: textarena {textarena.__version__} has no such game; the nearest: {', '.join(nearest)}"
        )
    return textarena.make(f"{name}-raw")
