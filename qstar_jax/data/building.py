"""Tokenizes the records of a file as they come into record batches, and takes notes of what becomes of its rows."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped, check_bad_rows, check_some_left, first_rows
from qstar_jax.data.identity import ExamplesDigest
from qstar_jax.data.records import Record
from qstar_jax.data.repeats import repeats_note
from qstar_jax.data.table import record_batches
from qstar_jax.data.tokenization import Example, chat_template, tokenize_rows, with_date

Track = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class Facts:
    """What is known of a dataset besides its examples.

    Attributes:
        dropped: Dropped rows, in file order.
        date: The date that the chat template prints, if any.
        notes: Sentences on other changes to the rows.
        steps: Rows whose responses are single steps.
        identity: What `examples_identity` returns for the examples; None if it has to be computed.
    """

    dropped: tuple[Dropped, ...]
    date: str | None
    notes: tuple[str, ...]
    steps: tuple[int, ...]
    identity: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Returns a value for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Facts":
        """Reads what `to_json` returned."""
        dropped = tuple(Dropped(**entry) for entry in value["dropped"])
        return cls(**value | {"dropped": dropped, "notes": tuple(value["notes"]), "steps": tuple(value["steps"])})


class _Survey:
    """Notes on records, taken while they pass; rows may have several records."""

    def __init__(self):
        self.total = self.rows = 0
        self.dropped: list[Dropped] = []
        self.repeats: dict[str, list[int]] = {"removed": [], "kept": []}
        self.steps: dict[int, None] = {}
        self.texts: dict[int, None] = {}
        self.has_chats = False
        self.systems: dict[int, str] = {}  # row -> columns of a system prompt that are not read

    def watch(self, records: Iterable[Record | Dropped]) -> Iterator[Record | Dropped]:
        """Yields the records, and takes notes."""
        for record in records:
            self.total, self.rows = self.total + 1, max(self.rows, record.row + 1)
            if isinstance(record, Dropped):
                self.dropped.append(record)
            else:
                self._note(record)
            yield record

    def _note(self, record: Record):
        if record.repeats != "no":
            self.repeats[record.repeats].append(record.row)
        if record.open_end:
            self.steps[record.row] = None
        if isinstance(record.prompt, str):
            self.texts[record.row] = None
        else:
            self.has_chats = True
        if record.ignored_system:
            self.systems.setdefault(record.row, record.ignored_system)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was done to the rows."""
        texts = list(self.texts) if self.has_chats else []
        notes = (repeats_note(**self.repeats), _step_note(list(self.steps)), _text_note(texts))
        return tuple(filter(None, (*notes, _system_note(self.systems))))


def notes_on(records: Iterable[Record | Dropped]) -> tuple[str, ...]:
    """Returns sentences on what a user should know of records before they are tokenized."""
    survey = _Survey()
    for _ in survey.watch(records):
        pass
    return survey.notes


def _step_note(rows: list[int]) -> str:
    """Returns a sentence on responses that are steps; empty if none are."""
    note = f"Responses are single steps, which end without EOS: {len(rows):,} ({first_rows(rows)})."
    return note if rows else ""


def _text_note(rows: list[int]) -> str:
    """Returns a sentence on rows in plain text beside chats; empty if there are none."""
    note = (
        f"Rows in plain text, to which no chat template is applied, beside others that are chats: {len(rows):,} "
        f"({first_rows(rows)}); --data.as_chat makes chats of all."
    )
    return note if rows else ""


def _system_note(systems: dict[int, str]) -> str:
    """Returns a sentence on system prompts that are not read; empty if there are none."""
    if not systems:
        return ""
    return (
        f"Rows whose responses have system prompts of their own ({next(iter(systems.values()))}), which are left out "
        f"because judges compared responses to the instruction alone: {len(systems):,} ({first_rows(list(systems))}); "
        "read them with --data.system."
    )


class Builder:
    """Tokenizes records.

    Args:
        records: Records and dropped rows in file order; they are iterated twice.
        source: The user's name for the data, for errors.
        tokenizer: A Hugging Face tokenizer.
        options: Maximum lengths, and how to render dialogues.
        vocabulary: Size of the model's vocabulary; larger token ids are refused.
        eos_ids: EOS ids of the model, besides that of the tokenizer.

    Raises:
        InputError: Too many rows are bad or none can be used, or an option has no effect.
    """

    def __init__(
        self,
        records: Iterable[Record | Dropped],
        source: str,
        tokenizer: Any,
        options: DataOptions,
        vocabulary: int | None = None,
        eos_ids: Collection[int] = (),
    ):
        self._records, self._source, self._tokenizer = records, source, tokenizer
        self._tokens = {"vocabulary": vocabulary, "eos_ids": eos_ids, "source": source}
        self._survey = _Survey()
        self._template = chat_template(self._survey.watch(records), tokenizer, options)
        # Dialogues are rendered with the date that is kept.
        self._options = with_date(options, self._template)
        if self._template is not None:
            self._template = replace(self._template, date=self._options.date)
        self._dropped: list[Dropped] = []
        self._digest = ExamplesDigest()
        check_some_left(self._survey.dropped, self._survey.total, source)
        check_bad_rows(self._survey.dropped, self._survey.rows, options.bad_rows, source)

    def batches(self, track: Track = lambda items, total: items) -> Iterator[pa.RecordBatch]:
        """Makes the examples; `track` shows how many records are done.

        Raises:
            InputError: As above, or the tokenizer is unsuitable, or the model lacks a token.
        """
        yield from record_batches(self._examples(track))
        check_some_left(self._dropped, self._survey.total, self._source)
        check_bad_rows(self._dropped, self._survey.total, self._options.bad_rows, self._source)

    def _examples(self, track: Track) -> Iterator[Example]:
        made = tokenize_rows(self._records, self._tokenizer, self._options, self._template, **self._tokens)
        for item in track(made, self._survey.total):
            if isinstance(item, Dropped):
                self._dropped.append(item)
            else:
                self._digest.add(item)
                yield item

    @property
    def facts(self) -> Facts:
        """What is known after the last batch."""
        survey, digest = self._survey, self._digest
        identity = digest.identity if digest.uniform else None
        return Facts(tuple(self._dropped), self._options.date, survey.notes, tuple(survey.steps), identity)
