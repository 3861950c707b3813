"""`qstar chat`."""

from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from qstar_jax.api import Model, load
from qstar_jax.config import ChatConfig
from qstar_jax.console import say, visible
from qstar_jax.data.columns import Messages
from qstar_jax.errors import InputError
from qstar_jax.report.colours import reward_scale
from qstar_jax.report.terminal import heatmap_text

_COMMANDS = "/reset forgets the conversation, /undo the last turn, /quit ends (or Ctrl-D)"


def run(config: ChatConfig):
    """Replies to what is typed, until the end of the input."""
    if not config.rewards and (config.reference, config.beta) != (None, None):
        raise InputError("--reference and --beta have no effect without --rewards")
    console = Console()
    say(console, f"loading {config.model}")
    model = load(config.model, reference=config.reference, beta=config.beta, compute=config.compute, mesh=config.mesh)
    begin: Messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    messages = list(begin)
    say(console, _COMMANDS)
    while (text := _read(console)) not in (None, "/quit"):
        if text == "/reset":
            messages = list(begin)
        elif text == "/undo":
            messages = messages[: max(len(messages) - 2, len(begin))]
        elif text.startswith("/"):
            say(console, f"{text} is no command: {_COMMANDS}")
        elif text:
            messages = reply(model, [*messages, {"role": "user", "content": text}], config, console)


def _read(console: Console) -> str | None:
    """A line of input without the white space around it; None at its end."""
    try:
        return console.input(Text("> ", style="bold")).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def reply(model: Model, messages: Messages, config: ChatConfig, console: Console) -> Messages:
    """Shows the model's reply to messages.

    Returns:
        The messages with the reply; those before the last one if the model cannot reply.
    """
    try:
        [[best, *_]] = model.generate([messages], **asdict(config.decode))
        response = [{"role": "assistant", "content": best.text}]
        if best.finish == "none" or not best.text.strip():
            say(console, "(no reply was found)" if best.finish == "none" else "(the reply is empty)")
            return messages[:-1]
        scored = None
        if config.rewards:
            [scored] = model.score(messages, response, alternatives=0)
    except InputError as error:  # the conversation goes on without what cannot be read
        say(console, str(error))
        return messages[:-1]
    text = Text(visible(best.text)) if scored is None else heatmap_text(scored, reward_scale(scored.action_rewards))
    console.print(text + ("" if best.finished else " …"))
    if scored is not None:
        say(console, f"reward {scored.total_reward:+.3f}")
    console.print()
    return messages + response
