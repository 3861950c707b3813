"""Options that only some variants of a block read: declared on their fields, checked here, explained in the help.

A block selects a variant (`decode:` a method, `judge:` a kind, `optimizer:` and `loss:` a name), and each variant reads
some of the block's options. An option that was not given is None, and the variant's own default counts.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from qstar_jax.errors import InputError

Block = TypeVar("Block")


@dataclass(frozen=True)
class Declaration:
    """What a field declares about its option.

    Attributes:
        defaults: Variant -> what counts if the option is not given, for each variant that reads it; first the one to
            choose for its sake.
        bounds: Interval of the allowed numbers, such as "[0, 0.5)"; None: any.
        choices: The allowed words; empty: any.
        unset: Value that means "not given".
    """

    defaults: Mapping[str, Any]
    bounds: str | None = None
    choices: tuple[str, ...] = ()
    unset: Any = None


def option(
    read_by: Iterable[str] | Mapping[str, Any] = (),
    default: Any = None,
    *,
    bounds: str | None = None,
    unset: Any = None,
    path: bool = False,
) -> Any:
    """Declares an option that some variants read.

    Args:
        read_by: Variants that read it, or variant -> its default.
        default: Their default, where it is the same.
        bounds: Interval of the allowed numbers.
        unset: Value that means "not given".
        path: Whether it may name a file or a folder.
    """
    defaults = dict(read_by) if isinstance(read_by, Mapping) else dict.fromkeys(read_by, default)
    return field(default=unset, metadata={"option": Declaration(defaults, bounds, (), unset), "path": path})


def selector(default: str) -> Any:
    """Declares the option that selects the variant."""
    return field(default=default, metadata={"selects": True})


def path(default: Any = MISSING) -> Any:
    """Declares an option of all variants that may name a file or a folder."""
    return field(default=default, metadata={"path": True})


@cache
def declarations(block: type) -> dict[str, Declaration]:
    """What the fields of a block declare: option -> its declaration, with the choices that its type names."""
    hints = get_type_hints(block)
    return {
        option.name: replace(option.metadata["option"], choices=_choices(hints[option.name]))
        for option in fields(block)
        if "option" in option.metadata
    }


@cache
def variants_of(block: type) -> tuple[str, tuple[str, ...]]:
    """The option of a block that selects its variant, and the variants."""
    name = next(option.name for option in fields(block) if "selects" in option.metadata)
    return name, _choices(get_type_hints(block)[name])


def check_variant(options: Any, block: str):
    """Refuses options that the variant does not read, and values out of range.

    Args:
        options: The block.
        block: Its name, as in `--decode.method`.

    Raises:
        InputError: If one is; it names the option, its value, the variant, who reads it, and the flag to set.
    """
    declared = declarations(type(options))
    name, variants = variants_of(type(options))
    variant = getattr(options, name)
    check_value(name, variant, Declaration({}, choices=variants), block)
    given = {option: getattr(options, option) for option in declared}
    given = {option: value for option, value in given.items() if value != declared[option].unset}
    check_given(given, (variant,), declared, f"{block}.{name}")


def check_given(given: Mapping[str, Any], variants: Sequence[str], declared: Mapping[str, Declaration], flag: str):
    """Refuses options that none of several variants reads, and values out of range.

    Args:
        given: Option -> value, of those that were given.
        variants: Variants that are combined, such as the losses of a mixture.
        declared: Declarations of all options of the block.
        flag: Dotted name of the option that selects the variants, such as "loss.name".

    Raises:
        InputError: If one is.
    """
    block, _, name = flag.partition(".")
    for option, value in given.items():
        if option not in declared:
            read = [o for o, declaration in declared.items() if declaration.defaults.keys() & set(variants)]
            raise InputError(
                f"{block}: {option!r} is unknown{nearest(option, declared)}; {' + '.join(variants)} reads "
                f"{', '.join(read) or 'no options'}"
            )
        readers = list(declared[option].defaults)
        if not set(readers) & set(variants):
            raise InputError(
                f"{block}: {option} {value!r} has no effect with {name} {' + '.join(variants)}; "
                f"{_list(readers)} {'reads' if len(readers) == 1 else 'read'} it: set --{flag} {readers[0]}, or "
                "leave it out"
            )
        check_value(option, value, declared[option], block)


def check_value(option: str, value: Any, declaration: Declaration, block: str):
    """Refuses a value that is out of range or not among the choices.

    Args:
        option: Name of the option.
        value: Its value; None is allowed.
        declaration: Its declaration.
        block: Name of its block.

    Raises:
        InputError: If it is.
    """
    if value is None:
        return
    if declaration.bounds and not inside(value, declaration.bounds):
        raise InputError(f"{block}: {option} is {value!r}; expected a number in {declaration.bounds}")
    if declaration.choices and value not in declaration.choices:
        raise InputError(f"{block}: {option} {value!r} is unknown; choose from {', '.join(declaration.choices)}")


def fill_in(options: Block) -> Block:
    """Fills in the defaults of a block's variant where options were not given."""
    return replace(options, **filled_in(vars(options), type(options)))


def filled_in(values: Mapping[str, Any], block: type) -> dict[str, Any]:
    """What `fill_in` changes in the values of a block; options that the variant does not read are None."""
    variant = variant_of(values, block)
    return {
        name: declaration.defaults.get(variant)
        for name, declaration in declarations(block).items()
        if variant not in declaration.defaults or values.get(name, declaration.unset) == declaration.unset
    }


def variant_of(values: Mapping[str, Any], block: type) -> str:
    """The variant that the values of a block select."""
    name, _ = variants_of(block)
    return str(values.get(name, block.__dataclass_fields__[name].default))


def inside(value: Any, interval: str) -> bool:
    """Whether something is a number in an interval such as "[0, 0.5)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion for a word that is unknown, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _list(words: Sequence[str]) -> str:
    """Lists words as in "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _choices(hint: Any) -> tuple[str, ...]:
    """Words that a type allows, if it allows nothing else; None is no word."""
    parts = [part for part in (get_args(hint) or (hint,)) if part is not type(None)]
    if get_origin(hint) is Literal:
        return get_args(hint)
    return get_args(parts[0]) if len(parts) == 1 and get_origin(parts[0]) is Literal else ()
