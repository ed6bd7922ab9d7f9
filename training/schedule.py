"""`itemvec schedule`: retraining by a cron expression, where there is neither cron nor systemd nor Kubernetes for it.

Each run is a process of its own, so that what it took it gives back, and a crash is not the schedule's. A time at which
the run before is still at it is left out.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from itemvec.errors import ConfigError

LONGEST_WAIT = 60.0
"""Seconds between two looks at the clock, which may be set meanwhile."""


def next_time(expression: str, zone: str | None = None, after: datetime | None = None) -> datetime:
    """The first time of a cron expression of five fields, in the time zone of that name or in that of the machine.
    Raises ConfigError.

    >>> next_time("17 3 * * *", "Europe/Berlin", datetime(2026, 3, 28, 12, tzinfo=ZoneInfo("UTC"))).isoformat()
    '2026-03-29T03:17:00+02:00'
    """
    try:
        where = None if zone is None else ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"no time zone {zone!r}; name one like Europe/Berlin or UTC") from None
    try:
        return next(CronSim(expression, (after or datetime.now(UTC)).astimezone(where)))
    except (CronSimError, StopIteration) as error:
        raise ConfigError(f"{expression!r} is no cron expression of five fields, like '17 3 * * *': {error}") from None


def follow(
    expression: str,
    command: Sequence[str],
    told: Callable[[str], None],
    zone: str | None = None,
    times: int | None = None,
) -> None:
    """Runs `command` at every time of the expression, `times` times or until SIGINT or SIGTERM, which the run that is
    under way gets too. `told` hears what happens."""
    stop, running = threading.Event(), list[subprocess.Popen[bytes]]()

    def stopped(number: int, _: object) -> None:
        stop.set()
        for process in running:
            process.send_signal(number)

    before = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = 0
        while not stop.is_set() and (times is None or done < times):
            due = next_time(expression, zone)
            told(f"next at {due:%Y-%m-%d %H:%M %Z}")
            if not _wait_until(due, stop):
                return
            with subprocess.Popen(command) as process:  # noqa: S603 - our own command
                running[:] = [process]
                if stop.is_set():  # the signal came while it was started
                    process.terminate()
                status = process.wait()
            running.clear()
            told(f"the run of {due:%Y-%m-%d %H:%M} ended with exit status {status}")
            done += 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_of(words: Sequence[str]) -> list[str]:
    """`itemvec retrain` with `words`, by the Python that runs this."""
    return [sys.executable, "-m", "itemvec", "retrain", *words]


def _wait_until(due: datetime, stop: threading.Event) -> bool:
    """Whether it is time, and not the end."""
    while (left := (due - datetime.now(due.tzinfo)) / timedelta(seconds=1)) > 0:
        if stop.wait(min(left, LONGEST_WAIT)):
            return False
    return not stop.is_set()
