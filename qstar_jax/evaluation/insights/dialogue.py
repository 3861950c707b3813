"""Dialogue: does DPO on whole dialogues, labelled by their outcome, teach to ask what one does not know?

The paper supposes so (its discussion: "learning information elicitation") and runs nothing. The game of questions has
known returns, and exact values of every turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from qstar_jax.evaluation.games import Decoder, Games, Sums, describe_games, play
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, Statistic, auc, bootstrap, correlation, rank_correlation
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.store.open import LoadedModel
from qstar_jax.tasks.tiny_questions.beliefs import Beliefs, TurnValues, player_return, solve
from qstar_jax.tasks.tiny_questions.game import NOISE, THINGS, Game
from qstar_jax.tasks.tiny_questions.played import Played, split_return
from qstar_jax.tasks.tiny_questions.rows import TEMPERATURE

PLAYER, TURNS, ALL, NOISY = "fitted player", "DPO on turns", "DPO on replies too", "DPO, noisy answers"
SAMPLED, GREEDY, BEAMS = "sampled", "greedy", "5 beams over turns"
REWARD, REFERENCE, CEILING = "turn reward", "log pi_ref", "exact advantage"
RETURN, WASTED, AUC = "return", "wasted questions", "AUC of wasted questions"


@dataclass(frozen=True)
class TurnCredit:
    """How well a score of turns agrees with their exact advantages, on held-out dialogues.

    Attributes:
        policy: Whose turn rewards; empty for other scores.
        score: `turn reward`, `log pi_ref` or `exact advantage`.
        noisy: Whether the answerers erred.
        rank_correlation: Spearman's, with the advantages of all turns.
        wasted_auc: Area under the ROC curve of low scores as a detector of wasted questions among questions.
    """

    policy: str
    score: str
    noisy: bool
    rank_correlation: Interval
    wasted_auc: Interval


@dataclass(frozen=True)
class Luck:
    """What the environment adds to returns, and how implicit rewards follow returns, on held-out pairs.

    The sum of the turns' advantages is the return less the value of the start, less luck.

    Attributes:
        policy: Whose implicit rewards.
        noisy: Whether the answerers erred.
        share: Mean square of the differences in luck of pairs, as a share of that of the returns; luck and skill are
            not independent within a pair, so it may exceed 1.
        with_returns: Correlation of the policy's margins with differences in return.
        with_advantages: Their correlation with differences in the sum of advantages, which theory expects to be larger.
    """

    policy: str
    noisy: bool
    share: Interval
    with_returns: Interval
    with_advantages: Interval


@dataclass(frozen=True)
class Dialogue(Record):
    """dialogue.json: what DPO on whole dialogues taught.

    Attributes:
        seed: Seed of the things, the dialogues and the games.
        beta: Temperature of DPO: reward of the labels per nat.
        pairs: Pairs of dialogues in each training.
        player: Exact expected return of the mediocre player, to which the reference was fitted.
        optimum: That of the optimal policy at this beta.
        games: How each policy plays.
        credit: How well scores of turns find what turns were worth.
        luck: What luck does to implicit rewards, with honest and with noisy answerers.
        differences: Measure -> comparison -> difference of sampled games unless said otherwise, paired by thing; for
            the AUC by dialogue.
    """

    NAME: ClassVar[str] = "dialogue"
    COMMAND: ClassVar[str] = "qstar demo --insight dialogue"

    seed: int
    beta: float
    pairs: int
    player: float
    optimum: float
    games: tuple[Games, ...]
    credit: tuple[TurnCredit, ...]
    luck: tuple[Luck, ...]
    differences: dict[str, dict[str, Interval]]

    def of(self, policy: str, decoder: str = SAMPLED, *, noisy: bool = False) -> Games:
        """How a policy plays in one way."""
        return next(g for g in self.games if (g.policy, g.decoder, g.noisy) == (policy, decoder, noisy))

    def credit_of(self, score: str, policy: str = "", *, noisy: bool = False) -> TurnCredit:
        """How well a score finds what turns were worth."""
        return next(c for c in self.credit if (c.score, c.policy, c.noisy) == (score, policy, noisy))

    def finding(self) -> Finding:
        """Reproduced where DPO on dialogues gains return and wastes fewer questions."""
        before, after = self.of(PLAYER), self.of(TURNS)
        gain, wasted = (self.differences[measure][f"{TURNS} - {PLAYER}"] for measure in (RETURN, WASTED))
        reproduced = None
        if gain.low > 0 and wasted.high < 0:
            reproduced = True
        elif gain.high < 0 or wasted.low > 0:
            reproduced = False
        return Finding(
            insight="dialogue",
            title="Asking questions",
            claim="Trained on labels of whole dialogues, the policy learns which questions to ask: its return rises, "
            "and it wastes fewer questions.",
            paper="DPO on whole conversations might teach information elicitation (discussion; nothing was run).",
            measured=f"Return {after.returns:.2f} after {before.returns:.2f}: {gain:+.2f} (optimum at this beta: "
            f"{self.optimum:.2f}); wasted questions {after.wasted:.2f} after {before.wasted:.2f}: {wasted:+.2f}. Turn "
            f"rewards find wasted questions with AUC {self.credit_of(REWARD, TURNS).wasted_auc:.2f}, log pi_ref with "
            f"{self.credit_of(REFERENCE).wasted_auc:.2f}. {self.compare_masks()} Margins of pairs correlate with "
            f"sums of advantages by {self.luck[0].with_advantages:.2f}, with returns, which have luck, by "
            f"{self.luck[0].with_returns:.2f}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )

    def compare_masks(self) -> str:
        """Says whether training on turns alone beats training on the environment's replies too."""
        gain = self.differences[RETURN][f"{TURNS} - {ALL}"]
        if gain.low > 0:
            verdict = "Training on turns alone beats training on replies too"
        elif gain.high < 0:
            verdict = "Training on turns alone is worse than training on replies too"
        else:
            verdict = "Training on turns alone and on replies too cannot be told apart"
        return f"{verdict}: {gain:+.2f} in return."


@dataclass(frozen=True)
class HeldOut:
    """Held-out dialogues, scored by one policy and its reference.

    Attributes:
        policy: Name of the policy.
        rows: Rows of the task.
        scored: Their chosen and rejected dialogues; dropped rows have none.
        noisy: Whether the answerers erred.
    """

    policy: str
    rows: Sequence[dict]
    scored: Sequence[ScoredResponse]
    noisy: bool = False


def measure_dialogue(
    policies: Mapping[str, LoadedModel],
    held_out: Sequence[HeldOut],
    *,
    seed: int,
    beta: float,
    pairs: int,
    games_per_thing: int,
    out: Path,
) -> Dialogue:
    """Lets all policies play, compares the turn rewards of held-out dialogues with the truth, writes dialogue.json.

    Args:
        policies: The fitted player and the trained policies, by their names in this module.
        held_out: Scored dialogues of trained policies.
        seed: Seed of the things and of the games.
        beta: Temperature of DPO.
        pairs: Pairs in each training.
        games_per_thing: Sampled games per thing.
        out: Folder for the record.
    """
    played = play_all(policies, seed, games_per_thing)
    values = {noisy: solve(_game(seed, noisy), beta * TEMPERATURE) for noisy in (False, True)}
    turns = [_Turns(scored, Beliefs(_game(seed, scored.noisy)), values[scored.noisy]) for scored in held_out]
    record = Dialogue(
        seed=seed,
        beta=beta,
        pairs=pairs,
        player=player_return(_game(seed)),
        optimum=player_return(_game(seed), beta * TEMPERATURE),
        games=tuple(describe_games(games, *key, _game(seed, key[2])) for key, games in played.items()),
        credit=tuple(credit for dialogues in turns for credit in dialogues.credit()),
        luck=tuple(dialogues.luck() for dialogues in turns if dialogues.source.policy != ALL),
        differences=_differences(played, seed)
        | {AUC: {f"{d.source.policy} - {REFERENCE}": d.auc_gain() for d in turns}},
    )
    record.write(out)
    return record


def _game(seed: int, noisy: bool = False) -> Game:
    return Game(seed, NOISE if noisy else 0.0)


_Key = tuple[str, str, bool]  # policy, decoder, whether answerers err


def play_all(policies: Mapping[str, LoadedModel], seed: int, games_per_thing: int) -> dict[_Key, list[Played]]:
    """Lets all policies play: with honest answerers by each decoder, and with noisy ones sampled."""
    sampled, greedy, beams = (
        Decoder(SAMPLED, games_per_thing, temperature=1.0),
        Decoder(GREEDY),
        Decoder(BEAMS, beams=5),
    )
    plan = [(name, d, False) for name in (PLAYER, TURNS, ALL) for d in (sampled, greedy, beams)]
    plan += [(name, sampled, True) for name in (PLAYER, TURNS, NOISY)]
    things = range(len(THINGS))
    return {
        (name, decoder.name, noisy): play(policies[name], _game(seed, noisy), things, decoder, seed=seed)
        for name, decoder, noisy in plan
    }


def _differences(played: Mapping[_Key, Sequence[Played]], seed: int) -> dict[str, dict[str, Interval]]:
    """Compares games, paired by thing."""
    sums = {key: Sums.of(games, _game(seed, key[2])) for key, games in played.items()}

    def difference(one: _Key, other: _Key, measure: str = "returns", per: str = "games") -> Interval:
        first, second = (sums[key].ratio(measure, per) for key in (one, other))
        return bootstrap(lambda weights: first(weights) - second(weights), len(THINGS))

    player, turns, on_all = ((name, SAMPLED, False) for name in (PLAYER, TURNS, ALL))
    returns = {f"{TURNS} - {PLAYER}": difference(turns, player), f"{TURNS} - {ALL}": difference(turns, on_all)}
    for decoder in (GREEDY, BEAMS):
        key = (TURNS, decoder, False)
        returns[f"{TURNS} - {ALL}, {decoder}"] = difference(key, (ALL, decoder, False))
        returns[f"{TURNS}, {decoder} - {SAMPLED}"] = difference(key, turns)
    returns[f"{TURNS}, {BEAMS} - {GREEDY}"] = difference((TURNS, BEAMS, False), (TURNS, GREEDY, False))
    returns[f"{NOISY} - {PLAYER}"] = difference((NOISY, SAMPLED, True), (PLAYER, SAMPLED, True))
    wasted = {
        f"{TURNS} - {other[0]}": difference(turns, other, "wasted", per="questions") for other in (player, on_all)
    }
    return {RETURN: returns, WASTED: wasted}


class _Turns:
    """The turns of held-out dialogues: their scores beside what they were worth."""

    def __init__(self, source: HeldOut, beliefs: Beliefs, values: TurnValues):
        self.source, self.values = source, values
        self.games = [Played.from_row(source.rows[s.row], s.role) for s in source.scored]
        # What a pair shares is part of its prompt: the scored turns are the last ones.
        rewards = [[turn.reward for turn in scored.turns] for scored in source.scored]
        self.reward, self.ref_logp = np.concatenate(rewards), np.concatenate(list(map(_ref_logps, source.scored)))
        last = [slice(len(game.turns) - len(r), None) for game, r in zip(self.games, rewards, strict=True)]
        games = list(zip(self.games, last, strict=True))
        self.advantage = np.concatenate([game.advantages(values)[part] for game, part in games])
        self.is_question = np.concatenate([game.is_question[part] for game, part in games])
        self.is_wasted = np.concatenate([game.is_wasted(beliefs)[part] for game, part in games])
        # Both dialogues of a pair are resampled together.
        rows = {row: number for number, row in enumerate(dict.fromkeys(s.row for s in source.scored))}
        self.pair = np.array([rows[s.row] for s in source.scored])
        self.owner = np.repeat(self.pair, list(map(len, rewards)))
        self.count = len(rows)

    def credit(self) -> list[TurnCredit]:
        """Compares each score with the advantages; those of no policy once only."""
        policy = self.source.policy
        scores = {(policy, REWARD): self.reward}
        if policy != ALL:
            scores |= {("", REFERENCE): self.ref_logp, ("", CEILING): self.advantage}
        return [
            TurnCredit(
                policy=name,
                score=score,
                noisy=self.source.noisy,
                rank_correlation=bootstrap(rank_correlation(values, self.advantage, self.owner), self.count),
                wasted_auc=bootstrap(self._wasted_auc(values), self.count),
            )
            for (name, score), values in scores.items()
        ]

    def auc_gain(self) -> Interval:
        """AUC of the turn rewards less that of log pi_ref."""
        reward, reference = self._wasted_auc(self.reward), self._wasted_auc(self.ref_logp)
        return bootstrap(lambda weights: reward(weights) - reference(weights), self.count)

    def _wasted_auc(self, scores: Float[np.ndarray, " N"]) -> Statistic:
        asked = self.is_question
        return auc(-scores[asked], self.is_wasted[asked], self.owner[asked])

    def luck(self) -> Luck:
        """Compares margins of pairs with differences in return, and in what the turns contributed to it."""
        sign = np.where([scored.role == "chosen" for scored in self.source.scored], 1.0, -1.0)
        pairs = np.tile(np.arange(self.count), 2)

        def difference(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " 2*pairs"]:
            """Differences within pairs in either order: labels follow returns, and must not decide the order."""
            margins = np.bincount(self.pair, sign * values)
            return np.concatenate([margins, -margins])

        skill, luck = map(difference, split_return(self.games, self.values))
        margin = difference(np.array([scored.total_reward for scored in self.source.scored]))

        def share(weights: np.ndarray) -> np.ndarray:
            return (weights[:, pairs] @ luck**2) / (weights[:, pairs] @ (skill + luck) ** 2)

        return Luck(
            policy=self.source.policy,
            noisy=self.source.noisy,
            share=bootstrap(share, self.count),
            with_returns=bootstrap(correlation(margin, skill + luck, pairs), self.count),
            with_advantages=bootstrap(correlation(margin, skill, pairs), self.count),
        )


def _ref_logps(scored: ScoredResponse) -> Float[np.ndarray, " turns"]:
    """Log pi_ref of each turn, in nats."""
    turn, actions = np.array(scored.turn), np.array(scored.action_mask)
    return np.bincount(turn[actions], np.array(scored.ref_logp)[actions])
