"""What all insights share: a typed record in a JSON file, and a finding that compares it with the paper."""

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from qstar_jax.errors import InputError
from qstar_jax.store.files import write_json
from qstar_jax.untrusted import check_types, read_json


@dataclass(frozen=True)
class Finding:
    """What measurements say about one of the paper's claims.

    Attributes:
        insight: Name of the insight: credit, search, decline, control, dialogue, reasoning, diffusion or
            pipeline.
        title: Its heading.
        claim: What we claim.
        paper: What the paper states.
        measured: The numbers, with 95 % intervals.
        reproduced: Whether the paper's direction was reproduced; None where the numbers cannot tell.
        command: The command that measures it.
    """

    insight: str
    title: str
    claim: str
    paper: str
    measured: str
    reproduced: bool | None
    command: str


class Record:
    """Base of the frozen dataclasses that measurements are kept in; their fields are the keys of the file.

    Attributes:
        NAME: Name of the file without .json, and of the option of `qstar report` for its folder.
        COMMAND: The command that writes it.
    """

    NAME: ClassVar[str]
    COMMAND: ClassVar[str]

    def finding(self) -> Finding:
        """Compares the measurements with the paper's claim."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as nested dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, source: str) -> "Record":
        """Builds the record from parsed JSON; keys that are no field are skipped.

        Args:
            value: See `to_json`.
            source: Where it comes from, for the error.

        Raises:
            InputError: If a field is missing, or has another type.
        """
        try:
            return _build(cls, value)
        except ValueError as error:
            raise InputError(f"{source}: {error}; run `{cls.COMMAND}` again") from error

    def write(self, folder: Path):
        """Writes NAME.json into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.NAME}.json", self.to_json())

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Reads NAME.json from a folder.

        Raises:
            InputError: If the file is missing or holds something else.
        """
        path = folder / f"{cls.NAME}.json"
        if not path.exists():
            raise InputError(f"{path}: no such file; --{cls.NAME} expects a folder that `{cls.COMMAND}` wrote")
        try:
            value = read_json(path)
        except InputError as error:
            raise InputError(f"{error}; run `{cls.COMMAND}` again") from error
        return cls.from_json(value, str(path))


def _build(kind: Any, value: Any, name: str = "it") -> Any:
    """Turns parsed JSON into a value of a type: a dataclass, a container of them, X | None, or a plain value.

    Numbers that are not finite are measurements too: of a reward that ran away, or of a mean over nothing.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
        missing = [name for name in required if not isinstance(value, dict) or name not in value]
        if missing:
            shown = f"one with {', '.join(value)}" if isinstance(value, dict) else repr(value)[:40]
            raise ValueError(f"expected an object with {', '.join(missing)}, found {shown}")
        return kind(**{f.name: _build(hints[f.name], value[f.name], f.name) for f in fields(kind) if f.name in value})
    if origin is UnionType:
        return None if value is None else _build(arguments[0], value, name)
    if origin is dict:
        check_types({name: value}, {name: dict})
        return {key: _build(arguments[1], entry, f"{name}, {key!r}") for key, entry in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, tuple):  # `to_json` leaves tuples as they are
            check_types({name: value}, {name: list})
        return origin(_build(arguments[0], entry, f"an entry of {name}") for entry in value)
    if kind in (int, float, str, bool):
        check_types({name: value}, {name: kind})
    return value
