"""The runner of parts: what hangs, crashes or prints rubbish fails by name and takes nothing with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import run as runner

HERE = Path(__file__).parent


@pytest.fixture
def run(tmp_path):
    """`run(limit, NAME=CODE, ...)`: the report and whether all parts passed; a part is a line of Python."""

    def run_code(limit=20.0, **codes):
        parts = [runner.Part(name, ("-c", code), limit) for name, code in codes.items()]
        report = runner.run_parts(parts, tmp_path / "out", tiny=True)
        return json.loads((tmp_path / "out/report.json").read_text()), report

    return run_code


def say(**record):
    return f"import json; print(json.dumps({record}), flush=True)"


def test_records_of_all_parts_stand_in_the_report(run):
    report, result = run(one=say(name="a", seconds=1.5), two=f"{say(name='b')}; {say(name='c', ok=True)}")
    assert result.ok
    assert report["parts"]["one"]["records"] == [{"name": "a", "seconds": 1.5}]
    assert [record["name"] for record in report["parts"]["two"]["records"]] == ["b", "c"]
    assert {part["state"] for part in report["parts"].values()} == {"passed"}


def test_a_part_that_hangs_is_killed_with_its_children_and_keeps_its_records(run, tmp_path):
    child = tmp_path / "child"
    hang = f"""{say(name="a")}
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(process.pid))
time.sleep(60)"""
    start = time.monotonic()
    report, result = run(limit=2.0, hang=hang, after=say(name="b"))
    assert time.monotonic() - start < 15
    assert not result.ok
    assert report["parts"]["hang"]["state"] == "failed"
    assert report["parts"]["hang"]["error"] == "killed at its limit of 2 seconds"
    assert report["parts"]["hang"]["records"] == [{"name": "a"}]
    assert report["parts"]["after"]["state"] == "passed"
    status = Path(f"/proc/{child.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"  # killed, if not yet reaped


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ValueError('broken')", "exit code 1: ValueError: broken"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("pass", "printed no record"),
        ("print('{\"name\": '); print('[1]'); print('{}')", "printed no record"),
        (say(name="a", ok=False, error="differs"), "1 of 1 records: a"),
        (f"{say(name='a')}; raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_part_that_fails_says_how(run, code, error):
    report, result = run(bad=code, after=say(name="b"))
    assert not result.ok
    assert report["parts"]["bad"]["error"] == error
    assert report["parts"]["after"]["state"] == "passed"


def test_other_output_goes_to_the_log(run, tmp_path):
    garbage = "import sys; sys.stdout.buffer.write(b'garbage \\xff\\n'); print('to stderr', file=sys.stderr)"
    report, result = run(loud=f"{garbage}; {say(name='a')}")
    assert result.ok
    assert report["parts"]["loud"]["records"] == [{"name": "a"}]
    log = (tmp_path / "out/loud.log").read_text()
    assert "garbage" in log
    assert "to stderr" in log


def test_numbers_that_are_none_leave_a_report_that_every_reader_takes(run):
    report, _ = run(nan='print(\'{"name": "a", "difference": NaN}\')')
    assert report["parts"]["nan"]["records"] == [{"name": "a", "difference": "NaN"}]


def test_records_are_kept_as_they_come(tmp_path):
    seen = []
    parts = [runner.Part("a", ("-c", f"{say(name='first')}; {say(name='second')}"), 20.0)]
    report = runner.Report(parts, tmp_path)

    def add(record):
        report.add("a", record)
        seen.append(len(json.loads((tmp_path / "report.json").read_text())["parts"]["a"]["records"]))

    assert runner.run_part(parts[0], tmp_path / "a.log", add) == ""
    assert seen == [1, 2]


def test_markdown_names_failures_and_groups_numbers(run):
    code = "; ".join(
        [
            say(name="ours", seconds=0.12345, tokens=12345),
            say(name="trl", seconds=0.5),
            say(name="ratio", speed=2.0),
            say(name="loss", ok=False, error="differs by 0.3"),
        ]
    )
    text = run(part=code)[1].markdown()
    assert "**part** failed" in text
    assert "- loss: differs by 0.3" in text
    assert "|  | seconds | tokens |\n| --- | ---: | ---: |\n| ours | 0.123 | 12,345 |\n| trl | 0.5 |  |" in text
    assert "| ratio | 2 |" in text


def test_the_limits_leave_room_in_eight_minutes():
    assert sum(part.limit for part in runner.PARTS) < 480
    assert all(Path(part.words[0]).exists() for part in runner.PARTS)


@pytest.mark.slow
def test_the_command_runs_a_part_prints_it_and_refuses_others(tmp_path):
    def command(*words):
        environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
        return subprocess.run([HERE / "run.sh", *words], env=environment, capture_output=True, text=True)

    done = command("--tiny", "--parts", "machine")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/report.json").read_text())["parts"]["machine"]["records"][0]
    assert record["matmul_tflops_per_second"] > 0
    assert record["memory_gigabytes_per_second"] > 0
    assert "**machine** passed" in command("--table", str(tmp_path / "out/report.json")).stdout
    refused = command("--parts", "machine,speed")
    assert refused.returncode == 2
    assert "no part speed; there are machine" in refused.stderr
