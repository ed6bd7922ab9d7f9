import os
import signal
import subprocess
import sys
import time

import pytest

from itemvec.signals import handlers_kept, stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_once_and_not_its_cleaning_up(number):
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may have said nohup
    before = signal.getsignal(number)
    cleaned = False

    def work():
        nonlocal cleaned
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            cleaned = True

    try:
        with pytest.raises(KeyboardInterrupt), stop_signals():
            work()
        assert cleaned
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGHUP, given)


def test_nohup_is_meant():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_a_library_installs_is_gone_after_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_that_is_ended_tidies_up():
    work = """
import signal, click
from itemvec import cli
@cli.cli.command()
def busy():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        click.echo("tidied up")
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", work, "busy"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "tidied up\n", "Aborted!")
