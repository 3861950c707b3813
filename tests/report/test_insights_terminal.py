"""The three insights on a terminal of 80 columns without colour."""

import io

from rich.console import Console

from qstar_jax.report.insights_terminal import print_credit, print_decline, print_findings, print_sweep
from qstar_jax.report.numbers import MINUS


def printed(show, record, **options) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    show(record, console)
    text = console.file.getvalue()
    assert "\u202e" not in text and all(len(line) <= 80 for line in text.splitlines() if "\x1b" not in line)
    return text


def test_findings_say_whether_in_words(findings):
    text = printed(print_findings, findings)
    for words in ("find the wrong tokens: reproduced", "for reward: not reproduced", "after SFT: cannot be told"):
        assert words in text
    assert '<script>alert("x")</script>⟨U+202E⟩' in text and "\x1b" not in text


def test_markup_is_text(findings):
    text = printed(print_findings, [findings[0] | {"measured": "[red]0.8[/red] [0.7, 0.9]"}], force_terminal=True)
    assert "[red]0.8[/red] [0.7, 0.9]" in text


def test_bars_of_detectors_run_from_chance(credit):
    lines = printed(print_credit, credit).splitlines()
    bars = {line.split("  ")[0].strip(): line.count("█") for line in lines[2:8]}
    assert bars["true advantage"] > bars["implicit reward"] > bars["reference log-probability"] > bars["uniform split"]
    assert any("0.162 [0.141, 0.183]" in line for line in lines)
    assert any(line.startswith(" wrong number") for line in lines)


def test_numbers_of_the_sweep_stay_in_one_piece(sweep):
    text = printed(print_sweep, sweep)
    for row in ("sampled 0.34 [0.30, 0.38] 64.0 -61.3 0.20", "20 beams - 5 beams beta 0.05 -0.21 [-0.26, -0.16]"):
        assert row in " ".join(text.split()).replace(MINUS, "-")


def test_decline_ends_with_the_verdict(decline):
    text = printed(print_decline, decline)
    assert text.count("rewards of chosen answers fell") == 3
    assert f"{MINUS}0.85 ± 0.08" in text and text.count("step") == 3


def test_narrow_terminals_fold_and_lose_nothing(sweep):
    console = Console(file=io.StringIO(), width=60)
    print_sweep(sweep, console)
    text = console.file.getvalue()
    digits = [sum(letter.isdigit() for letter in part) for part in (text, printed(print_sweep, sweep))]
    assert digits[0] == digits[1] and "…" not in text
