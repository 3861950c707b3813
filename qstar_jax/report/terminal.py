"""Responses on a terminal, each token on the colour of its reward; without colour, the extreme tokens are listed."""

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qstar_jax.console import one_line, shorten_middle, visible
from qstar_jax.evaluation.scored import ScoredResponse, by_row, pair_margin
from qstar_jax.report.colours import TERMINAL, reward_colour, reward_scale, strength, text_colour

_PROMPT_CHARACTERS = 600
_NO_ACTION = Style(dim=True)  # what the environment says
_NAMED_TOKENS = 3
_TURN_CHARACTERS = 60
_PLAIN_BELOW = 0.15  # share of the scale that stays uncoloured: rewards close to zero should not draw the eye


def heatmap_text(response: ScoredResponse, scale: float, step: int | None = None) -> Text:
    """Colours the actions of a response, where `scale` is the reward of the full colour (nats).

    The text is never read as markup, and control characters show as signs. With a `step`, only its tokens are shown.
    """
    text = Text(overflow="fold")
    for place, (piece, reward, is_action) in enumerate(
        zip(response.pieces, response.reward, response.action_mask, strict=True)
    ):
        if step is not None and response.step[place] != step:
            continue
        style = _style(reward, scale) if is_action else _NO_ACTION
        part = "·" if style else ""  # a token that holds a part of a character has no text, but may have a colour
        text.append(visible(piece).replace("\n", "↵\n") or part, style)
    return text


def print_heatmaps(responses: Sequence[ScoredResponse], console: Console | None = None) -> None:
    """Prints prompts, responses, totals and which response the model prefers, on one colour scale.

    Without colours (NO_COLOR, output to a file) the responses are plain and the extreme tokens are named below them.
    """
    console = console or Console()
    coloured = console.color_system is not None and not console.no_color
    scale = reward_scale(reward for response in responses for reward in response.action_rewards)
    for row in by_row(responses):
        prompt = visible(shorten_middle(row[0].prompt, _PROMPT_CHARACTERS))
        console.print(Text(f"row {row[0].row}", style="bold"))
        console.print(Text(prompt, style="dim"), soft_wrap=not coloured)
        for response in row:
            console.print()
            console.print(_heading(response))
            if response.step:
                console.print(_steps(response, scale if coloured else None))
                console.print(_totals(response))
            else:
                console.print(heatmap_text(response, scale) if coloured else _plain(response), soft_wrap=not coloured)
            if len(response.turns) > 1:
                console.print(_turns(response))
        if (margin := pair_margin(row)) is not None:
            console.print(Text(f"\n{_verdict(margin)}", style="bold"))
        console.print()
    if not any(reward for response in responses for reward in response.action_rewards):
        console.print(Text("every reward is 0: policy and reference are the same here"))
    elif coloured:
        console.print(_legend(scale))


def _steps(response: ScoredResponse, scale: float | None) -> Table:
    """A step a line, its tokens on the colours of their rewards if there is a scale."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("step", "text", "reward", "value after"):
        table.add_column(name, justify="left" if name == "text" else "right", overflow="fold")
    for step in response.steps:
        text = Text(one_line(step.text.strip())) if scale is None else heatmap_text(response, scale, step.step)
        text.rstrip()
        if step.step == response.first_error:
            text.append("  < first suspected error", style="bold")
        table.add_row(str(step.step), text, f"{step.reward:+.3f}", f"{step.value:+.3f}")
    return table


def _totals(response: ScoredResponse) -> Text:
    totals = response.step_totals
    numbers = ", ".join(f"{name} {getattr(totals, name):+.3f}" for name in ("min", "mean", "last"))
    return Text(f"steps: sum {totals.sum:+.3f} (the outcome reward), {numbers}", style="dim")


def _turns(response: ScoredResponse) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("turn", "text", "tokens", "reward", "value after"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for turn in response.turns:
        text = Text(one_line(shorten_middle(turn.text.strip(), _TURN_CHARACTERS)))
        table.add_row(str(turn.turn), text, str(turn.actions), f"{turn.reward:+.3f}", f"{turn.value:+.3f}")
    return table


def _style(reward: float, scale: float) -> Style:
    if abs(strength(reward, scale)) < _PLAIN_BELOW:
        return Style.null()
    background = reward_colour(reward, scale, TERMINAL)
    return Style(color=text_colour(background), bgcolor=background)


def _heading(response: ScoredResponse) -> Text:
    total = f"  total reward {response.total_reward:+.3f} over {sum(response.action_mask)} tokens"
    if response.truncated:
        total += ", truncated: it has no EOS, so the total is not that of a finished response"
    return Text(response.role, style="bold").append(total, "not bold")


def _plain(response: ScoredResponse) -> Text:
    text = Text(visible("".join(response.pieces)))
    actions = [index for index, is_action in enumerate(response.action_mask) if is_action]
    order = sorted(actions, key=lambda index: response.reward[index])
    for name, extreme in (("lowest", order[:_NAMED_TOKENS]), ("highest", order[::-1][:_NAMED_TOKENS])):
        tokens = [
            f'"{one_line(response.pieces[index])}" {response.reward[index]:+.3f} (token {index})' for index in extreme
        ]
        text.append(f"\n{name}: {', '.join(tokens)}")
    return text


def _verdict(margin: float) -> str:
    if margin == 0:
        return "The model prefers neither response."
    return f"The model prefers the {'chosen' if margin > 0 else 'rejected'} response (margin {margin:+.3f})."


def _legend(scale: float) -> Text:
    legend = Text(f"reward of a token, nats  {-scale:+.2f} ")
    for step in range(-8, 9):
        legend.append("  ", _style(scale * step / 8, scale))
    return legend.append(f" {scale:+.2f}")
