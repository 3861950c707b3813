"""Answers on a terminal."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from qstar_jax.report.terminal import heatmap_text, print_heatmaps


def _printed(responses, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    print_heatmaps(responses, console)
    return console.file.getvalue()


def test_markup_and_control_characters_are_text(respond):
    response = respond(["[red]x[/red]", " :smile:", "\x1b[2J", "\n"], [-1.0, 0.0, 1.0, 0.0])
    assert heatmap_text(response, 1.0).plain == "[red]x[/red] :smile:␛[2J↵\n"


def test_strong_tokens_are_coloured_and_weak_ones_are_not(respond):
    text = heatmap_text(respond(["bad", "so", "good"], [-1.0, 0.01, 1.0]), 1.0)
    colours = {text.plain[span.start : span.end]: span.style.bgcolor for span in text.spans if span.style}
    assert set(colours) == {"bad", "good"}
    assert colours["bad"].triplet.red > colours["bad"].triplet.blue
    assert colours["good"].triplet.blue > colours["good"].triplet.red


def test_part_of_a_character_shows_its_colour(respond):
    assert heatmap_text(respond(["", "é", ""], [-1.0, 0.0, 0.0]), 1.0).plain == "·é"


def test_coloured_output_has_legend_totals_and_verdict(respond):
    pair = [respond(["yes"], [0.75], role="chosen"), respond(["no"], [-0.5], role="rejected", truncated=True)]
    printed = _printed(pair, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;" in printed
    for words in ("+0.750", "-0.500", "truncated", "-0.75 ", " +0.75", "prefers the chosen response (margin +1.250)"):
        assert words in printed
    assert "lowest" not in printed


def test_rewards_of_zero_have_no_scale(respond):
    for options in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        printed = _printed([respond(["a", "b"], [0.0, 0.0])], **options)
        assert "every reward is 0" in printed and "reward of a token" not in printed


def test_equal_responses_are_a_tie(respond):
    pair = [respond(["a"], [0.5], role="chosen"), respond(["b"], [0.5], role="rejected")]
    assert "prefers neither response" in _printed(pair)


def test_without_colour_the_extreme_tokens_are_named(respond):
    response = respond(["The", " pay", " is", " 250", "K", "\n"], [0.1, 0.0, 0.05, -0.4, -1.3, 0.2])
    for options in ({}, {"force_terminal": True, "color_system": "truecolor", "no_color": True}):
        lines = _printed([response], **options).splitlines()
        assert 'lowest: "K" -1.300 (token 4), " 250" -0.400 (token 3), " pay" +0.000 (token 1)' in lines
        assert any(line.startswith('highest: "↵" +0.200 (token 5), "The" +0.100') for line in lines)
    assert "\x1b" not in _printed([response])


def test_long_prompts_lose_their_middle(respond):
    printed = _printed([respond(["a"], [0.1], prompt="start " + "x" * 2000 + " end")])
    assert "start" in printed and "end" in printed and "characters…]" in printed
    assert "x" * 1000 not in printed


def test_turns_of_a_dialogue_are_a_table(dialogue, respond):
    for options in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        printed = _printed([dialogue], **options)
        rows = [" ".join(line.split()) for line in printed.splitlines()]
        assert "0 Red?<eos> 2 +0.750 +0.750" in rows
        assert "1 Red{{ 7*7 }}<b><eos> 3 -1.125 -0.375" in rows
    assert "value after" not in _printed([respond(["a", "b"], [0.5, 0.5])])


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_steps_are_lines_of_a_table(solution, colour):
    console = Console(file=io.StringIO(), width=100, color_system=colour, force_terminal=colour is not None)
    print_heatmaps([solution], console)
    text = Text.from_ansi(console.file.getvalue()).plain
    assert "\u202e" not in text
    lines = text.splitlines()
    for step in solution.steps:
        assert any(f"{step.reward:+.3f}" in line and f"{step.value:+.3f}" in line for line in lines)
    assert text.count("< first suspected error") == 1
    assert f"sum {solution.total_reward:+.3f} (the outcome reward)" in text
