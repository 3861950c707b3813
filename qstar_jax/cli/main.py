"""`qstar VERB`: parses options, runs the verb, and turns errors into one plain sentence and an exit code."""

import difflib
import errno
import importlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from qstar_jax import __version__, config
from qstar_jax.cli.help import HelpFormatter
from qstar_jax.config.compare import drop_unread_defaults
from qstar_jax.config.paths import addresses, check_written
from qstar_jax.config.trl import translate
from qstar_jax.console import shorten_middle, visible
from qstar_jax.errors import InputError
from qstar_jax.interruption import Stopped, StopSignals
from qstar_jax.untrusted import MAX_OPTIONS, check_size, read_text, read_yaml

# Verb -> (its options, what it does); its code is `run` in the module of the same name, imported when it is called.
VERBS: dict[str, tuple[type, str]] = {
    "demo": (config.DemoConfig, "show insights on small tasks with a known reward, offline, in minutes"),
    "data": (config.DataConfig, "say what a file of data holds, and what training would see of it"),
    "sft": (config.SftConfig, "fine-tune on responses"),
    "dpo": (config.DpoConfig, "train on preference pairs"),
    "rl": (config.RlConfig, "train on a reward, by reinforcement learning on the policy's own samples"),
    "control": (config.ControlConfig, "train policies over continuous actions on preferences between segments (CPL)"),
    "pipeline": (
        config.PipelineConfig,
        "train several models, one after the other, on preferences between final outputs",
    ),
    "plan": (config.PlanConfig, "compile a run's step for hardware that is not there, and say what it needs"),
    "score": (config.ScoreConfig, "score every token of every response by its reward"),
    "pairs": (config.PairsConfig, "make preference pairs of scored samples, or of their steps (Step-DPO)"),
    "generate": (config.GenerateConfig, "generate responses: greedy, sampled, searched for, or chosen by reward"),
    "view": (config.ViewConfig, "open a page where what you type is scored and searched for"),
    "chat": (config.ChatConfig, "talk to a model in the terminal, and see the rewards of its tokens"),
    "play": (config.PlayConfig, "play games of the package textarena, and keep the dialogues with their returns"),
    "sweep": (config.SweepConfig, "measure wider beams: win rate, length and reward"),
    "select": (config.SelectConfig, "select among responses: best of N and votes, beside chance and oracle"),
    "decline": (config.DeclineConfig, "show how implicit rewards moved in real runs"),
    "report": (config.ReportConfig, "put what score, sweep, decline and demo have measured on one page"),
    "export": (config.ExportConfig, "write a run's model, or its adapter, as a Hugging Face folder"),
    "env": (config.EnvConfig, "print versions and devices, for a bug report"),
}

# Verbs that go on where they were stopped.
RESUMABLE = ("sft", "dpo", "rl", "control", "generate", "score", "sweep", "select")
SHARED = ("sft", "dpo", "rl", "pipeline", "export", "plan")  # verbs that several processes run together, or plan to
POSITIONAL = {"data": "FILE ", "chat": "MODEL ", "view": "MODEL "}  # verbs whose first option is given without its name

_LONGEST_MESSAGE = 2000  # characters: errors quote what they found, which may be immense

_load_yaml = get_loader("yaml")

_PLAN_OF_RL = (
    "a run of rl has two programs, and qstar plan compiles one: plan its update as that of pairs (--verb dpo, with "
    "--train.batch_size times rl.samples_per_prompt / 2, and --response_length), and its sampler as --verb generate "
    "with --decode.method sample, --decode.return_sequences, --decode.max_new_tokens, --batch_size and the same mesh, "
    "beside which the reference and the optimizer's state of the update stay in memory"
)


class Parser(ArgumentParser):
    """A parser that names the nearest known option where one is unknown."""

    def error(self, message: str, ex: Exception | None = None):
        """Prints the message with a suggestion and exits with 2."""
        unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown:
            name = unknown.group(1) or unknown.group(2)
            verb = re.search(r"Subcommand '(\w+)'", message)
            known = _options_of(_verb_parser(verb.group(1))) if verb else _options_of(self)
            if "topologies" in known and name.partition(".")[0] in ("rl", "reward"):
                message = f"--{name}: {_PLAN_OF_RL}"
            else:
                message += f"; the nearest known option is --{difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}"
        elif re.search(r"Literal\['dpo', 'sft', 'generate'\]. Got value: rl\b", message):
            message = f"--verb rl: {_PLAN_OF_RL}"
        elif re.search(r"[Uu]nrecognized arguments: [^-]", message):
            message += "; put a value of several words, or a pattern such as 'data/*.jsonl', in quotes"
        super().error(_sentence(message), ex)

    def parse_path(self, path: str | os.PathLike, **kwargs: Any) -> Namespace:
        """Parses a file of options, or a pipe such as `--config <(command)`, with limits on size and time."""
        try:
            return self.parse_string(read_text(Path(path), MAX_OPTIONS, pipes=True), str(path), **kwargs)
        except InputError as error:
            self.error(f"--config {error}", error)


def _options_of(parser: ArgumentParser) -> list[str]:
    return [option.removeprefix("--") for action in parser._actions for option in action.option_strings]


def _verb_parser(verb: str) -> Parser:
    options = VERBS[verb][0]
    parser = Parser(
        allow_abbrev=False,
        usage=f"qstar {verb} {POSITIONAL.get(verb, '')}[--config FILE.yaml] [--OPTION VALUE ...]",
        description=options.__doc__.split("\n\n")[0],
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    if verb == "dpo":
        parser.add_argument("--from_trl", metavar="FILE", help="YAML file of `trl dpo`, whose options are translated")
    parser.add_class_arguments(options, as_positional=verb in POSITIONAL)
    for action in parser._actions:
        if _is_flag(options, action.dest):
            action.nargs, action.const = "?", True  # --resume alone means --resume true
    return parser


def build_parser(words: Sequence[str]) -> Parser:
    """Builds the parser of a command; other verbs than that of its words are named only, as options take time."""
    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    set_loader("yaml", _load_value, (yaml.YAMLError,))
    parser = Parser(
        allow_abbrev=False,
        formatter_class=HelpFormatter,  # that of all verbs
        prog="qstar",
        description="Train, read and search a language model as a Q-function.",
    )
    parser.add_argument("--version", action="version", version=f"qstar_jax {__version__}")
    verbs = parser.add_subcommands(dest="verb", required=True)
    for verb, (_, summary) in VERBS.items():
        verbs.add_subcommand(verb, _verb_parser(verb) if verb in words[:1] else Parser(), help=summary)
    return parser


def _load_value(text: str) -> Any:
    """Reads a file or the value of a flag.

    It is read as JSON if it is that, else as YAML, which does not know the surrogate pairs by which JSON writes emojis.
    """
    try:
        value = json.loads(text) if text.lstrip().startswith(("[", "{", '"')) else _load_plain(text)
    except json.JSONDecodeError:
        value = _load_plain(text)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    try:
        check_size(value)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
    return drop_unread_defaults(value) if isinstance(value, dict) else value


def _load_plain(text: str) -> Any:
    try:
        return _load_yaml(text)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def _check_groups(options: type, words: Sequence[str]):
    """Checks files given for whole groups of options, as in `--loss loss.yaml`, before they are read.

    Raises:
        InputError: If one is a folder, a pipe or a device, too long, or not UTF-8.
    """
    for flag, value in pairwise(part for word in words for part in word.split("=", 1)):
        is_group = flag.startswith("--") and is_dataclass(_type_of(options, flag.removeprefix("--")))
        if is_group and os.path.exists(value := os.path.expanduser(value)):
            try:
                read_text(Path(value), MAX_OPTIONS)
            except InputError as error:
                raise InputError(f"{flag} {error}") from error


def _is_flag(options: type, name: str) -> bool:
    options = _type_of(options, name)
    return options in (bool, bool | None) or bool in get_args(options)


def _type_of(options: Any, name: str) -> Any:
    for part in name.split("."):
        options = getattr(options, "__dataclass_fields__", {}).get(part)
        options = options and options.type
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Words after `qstar`; those of the process by default.

    Returns:
        Exit code: 0, 2 for wrong usage or input, 1 for a failure, 75 if a scheduler stopped it, 130 if Ctrl-C did.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks replace them by other objects
            stream.reconfigure(errors="backslashreplace")  # a model's text must not crash a terminal
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser(words)
    try:
        if words[:1] and words[0] in VERBS:
            _check_groups(VERBS[words[0]][0], words)
        parsed = parser.parse_args(_translated(words))
    except InputError as error:
        print(f"qstar: {_sentence(error)}", file=sys.stderr)
        return 2
    _show_log()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # batches of texts on all cores
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it warns that torch is missing
    try:
        options = _options(parser, parsed)
        check_written(options)
        _check_alone(parsed.verb, options)
        with StopSignals() if parsed.verb in RESUMABLE else nullcontext(), _at_hand(options) as options:
            importlib.import_module(f"qstar_jax.cli.{parsed.verb}").run(options)
    except InputError as error:
        print(f"qstar {parsed.verb}: {_sentence(error)}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"qstar {parsed.verb}: {stop}; go on with\n{_going_on(parsed.verb, words)}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"qstar {parsed.verb}: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, FloatingPointError, ImportError, MemoryError, OSError) as error:
        if os.environ.get("QSTAR_TRACEBACK"):
            raise
        print(f"qstar {parsed.verb}: {_sentence(error)}\n(QSTAR_TRACEBACK=1 shows where)", file=sys.stderr)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and parsed.verb in RESUMABLE:
            command = _going_on(parsed.verb, words)
            print(f"what is complete is kept; make room, and go on with\n{command}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception | str) -> str:
    """Returns the message of an error as it may be shown: short, and what it quotes acts on no terminal."""
    return shorten_middle(visible(str(error)), _LONGEST_MESSAGE)


def _going_on(verb: str, words: Sequence[str]) -> str:
    """The command that continues one which was stopped."""
    resumes = "resume" in VERBS[verb][0].__dataclass_fields__
    given = any(word.partition("=")[0] == "--resume" for word in words)
    return visible(shlex.join(["qstar", *words, *(["--resume"] if resumes and not given else [])]))


def _translated(words: Sequence[str]) -> list[str]:
    """Replaces `--from_trl FILE` by a configuration of ours, and says what was not taken over.

    Raises:
        InputError: The file cannot be read, or is no configuration of `trl dpo`.
    """
    flag = "--from_trl"
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if words[:1] != ["dpo"] or flag not in words[:-1]:
        return words
    at = words.index(flag)
    try:
        given = read_yaml(Path(words[at + 1]).expanduser(), pipes=True)
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{flag} {words[at + 1]}: expected options by name, as `trl dpo --config` reads them")
    options, notes = translate(given)
    # What the command line says of the length of the run replaces what the file says.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if any(word.partition("=")[0] == f"--train.{one}" for word in words):
            options["train"].pop(other, None)
    for note in notes:
        print(f"{flag}: {_sentence(note)}", file=sys.stderr)
    return [*words[:at], "--config", yaml.safe_dump(options), *words[at + 2 :]]


def _show_log():
    """Shows what the package logs, without dates and levels, from the first process only."""

    def is_first_process(_: logging.LogRecord) -> bool:
        import jax  # takes a second, which not all verbs need

        return jax.process_index() == 0

    log, handler = logging.getLogger("qstar_jax"), logging.StreamHandler()
    handler.addFilter(is_first_process)
    handler.setFormatter(_Visible())
    log.handlers = [handler]  # not one more for each call
    log.propagate = False  # Orbax's import adds a handler that would show it again
    log.setLevel(logging.INFO)
    if not os.environ.get("QSTAR_TRACEBACK"):
        import absl.logging  # takes time

        # Orbax logs the trace of every thread that fails, hundreds of lines for a full disk, and raises the error too.
        absl.logging.set_verbosity(absl.logging.FATAL)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _check_alone(verb: str, options: Any):
    """Refuses several processes where each would do all the work, in one folder.

    Raises:
        InputError: If the options ask for them, and the verb knows nothing of others.
    """
    if verb not in SHARED and getattr(getattr(options, "mesh", None), "multi_process", False):
        raise InputError(
            f"--mesh.multi_process true: {verb} runs in one process, on the devices of one machine; leave it out, and "
            "start one process, or give each its own part of the data and its own --out"
        )


def _at_hand(options: Any) -> AbstractContextManager[Any]:
    """The options with paths of this machine in place of addresses."""
    if not any(addresses(options)):
        return nullcontext(options)
    from qstar_jax.store.cloud import at_hand  # takes time

    return at_hand(options)


def _options(parser: Parser, parsed: Namespace) -> Any:
    values = parser.instantiate(parsed)[parsed.verb]
    fields = VERBS[parsed.verb][0].__dataclass_fields__
    return VERBS[parsed.verb][0](**{name: values[name] for name in fields})


if __name__ == "__main__":
    sys.exit(main())
