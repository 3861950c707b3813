"""Workers and the turns that they take: answers, errors, and patience."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from worker import Worker

PROGRAM = """
import sys
from contextlib import contextmanager
from worker import Turns, answering

@contextmanager
def trace(folder):
    print("begun", file=open(folder, "w"))
    yield
    print("ended", file=open(folder, "a"))

answers = sys.stdout
with answering(answers):
    print("chatter")
    turns = Turns(answers, lambda: 7, trace, pid=1)
    turns.facts["rate"] = 2.0
    for index in turns.begun():
        step = 0
        while turns.wants_more(10 * index + step, pairs=4, tokens=3):
            step += 1
            if step == 9:
                raise ValueError("nine")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n{PROGRAM}", encoding="utf-8")
    return str(path)


def test_turns(program, tmp_path):
    worker = Worker([program])
    assert worker.ready == {"ready": True, "pid": 1}
    answer = worker.ask("begin 0")
    assert answer.pop("seconds") >= 0
    assert answer == {"losses": [0], "peak_memory_bytes": 7, "pairs": 4, "tokens": 3, "rate": 2.0}
    assert worker.ask("step 2")["losses"] == [1, 2]
    assert worker.ask("begin 3")["losses"] == [30]
    file = tmp_path / "trace"
    answer = worker.ask(f"step 3 {file}")
    assert answer["losses"] == [31, 32, 33] and (answer["pairs"], answer["tokens"]) == (12, 9)
    assert file.read_text() == "begun\nended\n"
    assert worker.ask("stop") == {"stopped": True}


def test_errors_are_answered(program):
    worker = Worker([program])
    worker.ask("begin 0")
    with pytest.raises(RuntimeError, match=r"program\.py: ValueError: nine"):
        worker.ask("step 20")
    worker.kill()
    worker = Worker([program])
    with pytest.raises(RuntimeError, match="ended without an answer"):
        worker.ask("dance")


def test_patience(program, tmp_path):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(60)", encoding="utf-8")
    worker = Worker([str(sleeper)], wait=False)
    with pytest.raises(TimeoutError, match=r"sleeper\.py gave no answer within 0"):
        worker.wait_ready(0.3)
