from dataclasses import replace

from qstar_jax.report.numbers import MINUS, NONE
from qstar_jax.report.scores import turns_table


def test_mean_rewards_of_turns_by_hand(dialogue):
    louder = replace(dialogue, reward=tuple(3 * reward for reward in dialogue.reward), row=1)
    first = replace(dialogue, role="rejected", turn=(0, 0, -1, 0, 0, 0))
    table = turns_table([dialogue, louder, first])
    assert table.columns == ("turn", "answer", "rejected")
    # 0.75 and 2.25, then -1.125 and -3.375; the only turn of the rejected response earns -0.375.
    assert table.rows[0][:1] + table.rows[0][2:] == ("0", f"{MINUS}0.375 (1)")
    assert table.rows[0][1].startswith("1.500 [") and table.rows[0][1].endswith(" (2)")
    assert table.rows[1][1].startswith(f"{MINUS}2.250 [") and table.rows[1][2] == NONE
    assert turns_table([first]).rows == () == turns_table([]).rows
