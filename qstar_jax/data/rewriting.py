"""Rewrites the rows of any format in the columns that `records` reads."""

from collections.abc import Callable, Iterable, Iterator

from qstar_jax.config import DataOptions
from qstar_jax.data.battles import parse_battle
from qstar_jax.data.dropped import Again, BadRow, DroppedRow, kept_like
from qstar_jax.data.formats import File, Rows, prompt_reader, recognize
from qstar_jax.data.outcomes import LABEL, OPEN_END, OTHER, REWARD, find_reward, parse_label, parse_reward
from qstar_jax.data.rankings import (
    IGNORED_SYSTEM,
    SYSTEM_KEYS,
    Ranking,
    by_system,
    comparable,
    keys_of_responses,
    list_column,
    pairs_by_rule,
    parse_ranking,
    without_ties,
)
from qstar_jax.errors import InputError

Numbered = Iterable[tuple[int, dict | DroppedRow]]  # (index of the row, its content or why it is dropped)
Rewrite = Callable[[dict, int], list[dict]]  # (row, its index) -> rows

_STEPS = "initial_reason_steps"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns beside texts that speak of them


def rows_of(kind: str, rows: Rows, options: DataOptions, source: str) -> Numbered:
    """Rewrites the rows of a file as those of a kind of data.

    Args:
        kind: `preferences`: rows with the columns of `options.chosen` and `rejected`; `rankings`: with the columns
            "place 1", "place 2" and so on; `labels` and `returns`: with `options.completion`, and `LABEL` or `REWARD`.
        rows: As they were read.
        options: Names of columns, and the rule that makes pairs.
        source: The user's name for the file, for errors.

    Returns:
        Rows with their indices; one row may become several, or stand for why it is dropped.

    Raises:
        InputError: The columns fit none of the formats, or several.
    """
    file = File.of(rows, options, source)
    name = recognize(kind, file)
    if options.pairs is not None and (kind, name) not in (("preferences", "ranking"), ("labels", "ranking")):
        raise InputError(
            f"data.pairs {options.pairs} has no effect: it chooses pairs from rankings, and {source} is read as "
            f"{kind} from the format {name!r}; remove it"
        )
    rewrite, prompt = _REWRITES[kind, name](file), prompt_reader(file, separate=name != "single")

    def start() -> Iterator[tuple[int, dict | DroppedRow]]:
        for index, row in enumerate(rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                _check_media(row)
                yield from ((index, new) for new in rewrite(prompt(row), index))
            except DroppedRow as error:
                yield index, error

    return kept_like(rows, Again(start))


def _check_media(row: dict):
    for name in _MEDIA:
        if row.get(name):
            more = f": column {name!r}; only texts are read. Remove the column to train on the texts alone"
            raise BadRow("it comes with images, video or audio", more)


def places(numbered: Numbered) -> int:
    """Returns the number of responses of the longest ranking."""
    counts = (sum(name.startswith("place ") for name in row) for _, row in numbered if isinstance(row, dict))
    return max(counts, default=2)


def _pairs(file: File) -> Rewrite:
    if _STEPS not in file.columns:
        return lambda row, index: [row]
    chosen, rejected, prompt = file.options.chosen, file.options.rejected, file.options.prompt

    def continue_steps(row: dict, index: int) -> list[dict]:
        """The steps that both responses share come before them; a step does not end the response."""
        steps = row.get(_STEPS) or ""
        texts = [row.get(name) for name in (prompt, chosen, rejected)]
        if not all(isinstance(text, str) for text in (steps, *texts)):
            raise BadRow(f"columns {prompt!r}, {_STEPS!r}, {chosen!r} and {rejected!r} are not all text")
        if file.options.as_chat:
            return [row | {chosen: steps + texts[1], rejected: steps + texts[2], OPEN_END: True}]
        return [row | {prompt: texts[0] + "\n" * bool(steps) + steps, OPEN_END: True}]

    return continue_steps


def _arena(file: File) -> Rewrite:
    def sort(row: dict, index: int) -> list[dict]:
        better, worse, whole = parse_battle(row, file.options.prompt)
        # Whole dialogues hold their prompts themselves.
        others = {name: value for name, value in row.items() if not (whole and name == file.options.prompt)}
        return [others | {file.options.chosen: better, file.options.rejected: worse}]

    return sort


def _ranking_pairs(file: File) -> Rewrite:
    read = _ranking_reader(file)

    def choose(row: dict, index: int) -> list[dict]:
        return [
            new | {file.options.chosen: better, file.options.rejected: worse}
            for new, ranking in comparable(read(row))
            for better, worse in pairs_by_rule(ranking, file.options.pairs or "best_worst", index)
        ]

    return choose


def _ranking_reader(file: File) -> Callable[[dict], list[tuple[dict, Ranking]]]:
    """Finds the responses of a file and their scores.

    Returns:
        A function that reads a row: for each prompt that its responses were given, the row and their ranking. These are
        several if the user asked for the responses' own system prompts with `options.system`.
    """
    column = list_column(file.rows, file.options, file.columns)
    if column is None:
        raise InputError(
            f"{file.source}: no column of several responses (found: {', '.join(sorted(file.columns)) or 'none'}); "
            "expected completions, responses or answers; name yours with --data.completion"
        )
    key = find_reward(file.rows, file.options, column)
    if key is None:
        raise InputError(
            f"{file.source}: the responses in {column!r} have no scores; expected numbers beside each text, or a list "
            "of numbers in another column; name it with --data.reward"
        )
    keys, name = keys_of_responses(file.rows, column), file.options.system
    own = name if name in keys - file.columns else None
    ignored = ", ".join(sorted(keys & SYSTEM_KEYS - {own})) if name is not None else ""

    def read(row: dict) -> list[tuple[dict, Ranking]]:
        row, ranking = row | {IGNORED_SYSTEM: ignored}, parse_ranking(row, column, key, own)
        if own is None:
            return [(row, ranking)]
        return [(row | {own: system}, part) for system, part in by_system(ranking).items()]

    return read


def _places(file: File) -> Rewrite:
    read = _ranking_reader(file)

    def rank(row: dict, index: int) -> list[dict]:
        # Of responses with the same score, which have no order, the first one stays.
        return [
            new | {f"place {place}": one.text for place, one in enumerate(without_ties(ranking), start=1)}
            for new, ranking in comparable(read(row))
        ]

    return rank


def _places_of_pair(pairs: Callable[[File], Rewrite]) -> Callable[[File], Rewrite]:
    def make(file: File) -> Rewrite:
        rewrite, options = pairs(file), file.options

        def rank(row: dict, index: int) -> list[dict]:
            new = rewrite(row, index)
            return [pair | {"place 1": pair.get(options.chosen), "place 2": pair.get(options.rejected)} for pair in new]

        return rank

    return make


def _labels_of_pair(pairs: Callable[[File], Rewrite]) -> Callable[[File], Rewrite]:
    def make(file: File) -> Rewrite:
        rewrite, options = pairs(file), file.options

        def split(row: dict, index: int) -> list[dict]:
            labels = []
            for pair in rewrite(row, index):
                chosen, rejected = pair.get(options.chosen), pair.get(options.rejected)
                labels.append(pair | {options.completion: chosen, OTHER: rejected, LABEL: True})
                labels.append(pair | {options.completion: rejected, OTHER: chosen, LABEL: False})
            return labels

        return split

    return make


def _labels(file: File) -> Rewrite:
    column, response = file.options.label, _response(file)
    if column not in file.columns:
        raise InputError(
            f"{file.source}: no column {column!r} (found: {', '.join(sorted(file.columns)) or 'none'}); expected a "
            "label of each response; name yours with --data.label"
        )
    return lambda row, index: [response(row) | {LABEL: parse_label(row, column)}]


def _returns(file: File) -> Rewrite:
    column, response = find_reward(file.rows, file.options), _response(file)
    if column is None:
        raise InputError(
            f"{file.source}: no column of rewards (found: {', '.join(sorted(file.columns)) or 'none'}); name yours "
            "with --data.reward"
        )
    return lambda row, index: [response(row) | {REWARD: parse_reward(row, column)}]


def _response(file: File) -> Callable[[dict], dict]:
    """Puts single responses into the column `options.completion`; dialogues hold their prompts themselves."""
    column, completion, prompt = file.response, file.options.completion, file.options.prompt
    if column in (None, completion):
        return lambda row: row
    return lambda row: {name: value for name, value in row.items() if name != prompt} | {completion: row.get(column)}


def _returns_of_ranking(file: File) -> Rewrite:
    read, completion = _ranking_reader(file), file.options.completion
    return lambda row, index: [
        new | {completion: one.text, REWARD: one.score} for new, ranking in read(row) for one in ranking
    ]


_REWRITES: dict[tuple[str, str], Callable[[File], Rewrite]] = {
    ("preferences", "pairs"): _pairs,
    ("preferences", "arena"): _arena,
    ("preferences", "ranking"): _ranking_pairs,
    ("rankings", "ranking"): _places,
    ("rankings", "pairs"): _places_of_pair(_pairs),
    ("rankings", "arena"): _places_of_pair(_arena),
    ("labels", "single"): _labels,
    ("labels", "pairs"): _labels_of_pair(_pairs),
    ("labels", "arena"): _labels_of_pair(_arena),
    ("labels", "ranking"): _labels_of_pair(_ranking_pairs),
    ("returns", "single"): _returns,
    ("returns", "ranking"): _returns_of_ranking,
}
