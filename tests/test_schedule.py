"""`itemvec schedule`. Minutes are too long for a test, so the clock of the expression has seconds here: six fields."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from itemvec.cli import cli
from itemvec.errors import ConfigError
from training.schedule import command_of, follow

EVERY_SECOND = "* * * * * *"


def test_a_command_runs_at_every_time_one_after_the_other(tmp_path: Path) -> None:
    told: list[str] = []
    script = f"open({str(tmp_path / 'said')!r}, 'a').write('ran '); raise SystemExit(3)"
    follow(EVERY_SECOND, [sys.executable, "-c", script], told.append, "UTC", times=2)
    assert (tmp_path / "said").read_text() == "ran ran "
    assert [line.split()[0] for line in told] == ["next", "the", "next", "the"]
    assert told[1].endswith("ended with exit status 3") and told[0].endswith("UTC")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_ends_it_and_the_run_that_is_under_way(tmp_path: Path) -> None:
    waits = f"import time, pathlib; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    words = f"from training.schedule import follow; import sys; follow({EVERY_SECOND!r}, sys.argv[1:], print)"
    with subprocess.Popen([sys.executable, "-c", words, sys.executable, "-c", waits]) as process:
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["17 3 * *"], "no cron expression"),
        (["61 3 * * *"], "no cron expression"),
        (["17 3 * * *", "--timezone", "Mars/Olympus"], "no time zone 'Mars/Olympus'"),
    ],
)
def test_what_is_no_time_is_said_at_once(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["schedule", *words, "--", "--config", "retrain.yaml"])
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)


def test_the_options_behind_two_dashes_are_those_of_retrain() -> None:
    assert command_of(["--config", "r.yaml"])[1:] == ["-m", "itemvec", "retrain", "--config", "r.yaml"]
