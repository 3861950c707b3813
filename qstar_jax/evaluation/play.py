"""Plays games with a model, and keeps the dialogues with their returns, as `qstar play` does."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from qstar_jax.config import DataOptions, PlayConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import Bar
from qstar_jax.data.loading import make_dataset
from qstar_jax.data.records import Record
from qstar_jax.decoding.decoder import Decoder
from qstar_jax.decoding.generate import prepare
from qstar_jax.decoding.options import DecodePlan, interpret
from qstar_jax.errors import InputError
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.files import write_atomically
from qstar_jax.store.open import load_model
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks.textarena import Game, Messages

GAMES, PAIRS = "games.jsonl", "pairs.jsonl"
# (dialogues, their keys) -> the player's next turn in each, and whether it was truncated; None: it has no room.
Speak = Callable[[Sequence[Messages], Sequence[int]], list[tuple[str, bool] | None]]


def play(config: PlayConfig, console: Console) -> list[dict[str, Any]]:
    """Plays games with a model and writes them.

    Returns:
        The rows of games.jsonl.

    Raises:
        InputError: If options contradict each other, or the model or the game cannot be used.
    """
    plan, out = _check(config), Path(config.out)
    seeds = [config.seed + n // config.repeats for n in range(config.games * config.repeats)]
    games = [Game(config.game, seed) for seed in seeds]
    mesh = make_mesh(config.mesh)
    keep_programs()
    with use_mesh(mesh, config.compute.dtype):
        policy = load_model(config.model, config.compute, mesh, config.mesh)
        if not policy.tokenizer.chat_template:
            raise InputError(f"{config.model} has no chat template, by which dialogues are read; use a chat model")
        decoder = prepare(policy, plan, mesh, consume=True)
        speak = _speaker(decoder, config)
        rows = []
        with Bar(console, f"playing {config.game}", len(games), 0) as bar:
            for first in range(0, len(games), config.batch_size):
                part = slice(first, first + config.batch_size)
                rows += play_games(games[part], seeds[part], speak, config, first)
                bar.update(len(rows), f"{sum(bool(row['label']) for row in rows)} won")
    # Write them.
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(recorded(config), sort_keys=False))
    _write(out / GAMES, rows)
    if config.repeats > 1:
        _write(out / PAIRS, pairs_of(rows))
    return rows


def play_games(
    games: Sequence[Game], seeds: Sequence[int], speak: Speak, config: PlayConfig, first: int = 0
) -> list[dict[str, Any]]:
    """Plays games to their ends, all that have not ended together, turn by turn.

    Args:
        games: Games that have begun.
        seeds: Their seeds.
        speak: The player.
        config: Its `max_turns` and `win`.
        first: Number of the first game, from which the keys of turns are counted.

    Returns:
        A row for each game: `messages`, `reward` (null if it was stopped), `label` and more about it.
    """
    truncated, playing = [0] * len(games), list(range(len(games)))
    for turn in range(config.max_turns):
        if not playing:
            break
        keys = [(first + n) * config.max_turns + turn for n in playing]
        said = speak([games[n].messages for n in playing], keys)
        for n, turn_said in zip(playing, said, strict=True):
            if turn_said is not None:
                games[n].say(turn_said[0])
                truncated[n] += turn_said[1]
        playing = [n for n, turn_said in zip(playing, said, strict=True) if turn_said and games[n].reward is None]
    return [
        {
            "messages": game.messages if game.reward is not None else game.messages[:-1],
            "reward": game.reward,
            "label": None if game.reward is None else game.reward >= config.win,
            "game": config.game,
            "seed": seed,
            "turns": game.turns,
            "truncated_turns": cut,
            "reason": game.reason,
        }
        for game, seed, cut in zip(games, seeds, truncated, strict=True)
    ]


def pairs_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs the best and the worst game of each seed, that is, of each secret, if their returns differ."""
    pairs = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        ended = [row for row in rows if row["seed"] == seed and row["reward"] is not None]
        worst, *_, best = sorted(ended, key=lambda row: row["reward"]) if len(ended) > 1 else [None, None]
        if best and best["reward"] > worst["reward"]:
            pairs.append({"chosen": best["messages"], "rejected": worst["messages"], "seed": seed})
    return pairs


def returns_by_seed(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean return of each seed; NaN where no game has ended."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).extend([] if row["reward"] is None else [row["reward"]])
    return np.array([np.mean(returns) if returns else np.nan for returns in by_seed.values()])


def _check(config: PlayConfig) -> DecodePlan:
    plan = interpret(config.decode)
    if plan.needs_reference or (plan.block.return_sequences or 1) > 1:
        raise InputError(
            f"decode: method {plan.block.method}, objective {plan.block.objective}, return_sequences "
            f"{plan.block.return_sequences}: a player takes one turn at a time, by the policy alone; "
            "choose greedy, sample or beam with objective likelihood and return_sequences 1"
        )
    for name in ("games", "repeats", "max_turns", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: expected at least 1")
    if config.repeats > 1 and not plan.samples:
        raise InputError(
            f"--repeats {config.repeats} plays the same game again, as nothing is sampled; set --decode.method sample"
        )
    if config.decode.max_new_tokens >= config.max_length:
        raise InputError(
            f"--max_length {config.max_length} leaves no room for a dialogue beside a turn of "
            f"{config.decode.max_new_tokens} tokens (decode.max_new_tokens)"
        )
    if (path := Path(config.out) / GAMES).exists():
        raise InputError(f"{path} exists; choose another --out, or remove it")
    return plan


def _speaker(decoder: Decoder, config: PlayConfig) -> Speak:
    """Makes the player of a model, which reads each dialogue by its chat template."""
    room = config.max_length - config.decode.max_new_tokens
    options = DataOptions(max_length=2**30, max_prompt_length=2**30 - 1)

    def speak(dialogues: Sequence[Messages], keys: Sequence[int]) -> list[tuple[str, bool] | None]:
        records = [Record(messages, (), row) for row, messages in enumerate(dialogues)]
        examples = make_dataset(records, [], config.game, decoder.tokenizer, options).examples
        prompts = [example.prompt for example in examples]
        fits = [n for n, prompt in enumerate(prompts) if len(prompt) <= room]
        said: list[tuple[str, bool] | None] = [None] * len(prompts)
        if fits:
            turns = decoder([prompts[n] for n in fits], [keys[n] for n in fits], fill_to=config.batch_size)
            for n, (turn, *_) in zip(fits, turns, strict=True):
                said[n] = (turn.text, not turn.finished)
        return said

    return speak


def _write(path: Path, rows: Sequence[dict[str, Any]]):
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
