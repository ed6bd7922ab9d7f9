"""What Linux tells of processes, and the turns that they get; elsewhere nothing is found, and nothing happens."""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The system call's number: Python has no function for it."""

TURN: Final = 100_000
"""Nanoseconds, the least that Linux takes; its own are 0.7 to 3 million."""


def processes_writing_in(folder: Path) -> list[int]:
    """Processes, not this one, that have a file of the folder open to write to it.

    A process that changes its title may overwrite its environment, but no process writes its log to the folder of
    another; who reads along, as `tail` does, is none of them.
    """
    return [pid for pid in _others() if _writes_in(pid, f"{folder.resolve()}/")]


def step_back(pids: Iterable[int], words: Iterable[str], niceness: int) -> None:
    """Those of the processes whose command line has one of the words let others go first, with all their threads."""
    wanted = [word.encode() for word in words]
    for pid in pids:
        with suppress(OSError):  # it has ended, or is somebody else's
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if any(word in command for word in wanted):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def short_turns(thread: int = 0) -> None:
    """For a thread that does a little for each of many requests; `thread` is one of this user's, 0 the caller.

    Who waits for a core is asked in the order of deadlines, and such a thread's are soon, so that it need not wait for
    the whole turn of another, which is milliseconds. It gets no more of a core than before, and what it starts has
    turns as usual. Linux 6.12 or newer (EEVDF, Stoica and Abdel-Wahab 1995); elsewhere nothing happens.
    """
    number = SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    if number is None:
        return
    with suppress(OSError):  # it has ended
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        size, usual_policy, reset_on_fork, none = 48, 0, 1, 0
        wanted = struct.pack("IIQiIQQQ", size, usual_policy, reset_on_fork, niceness, none, TURN, none, none)
        ctypes.CDLL(None).syscall(number, thread, wanted, none)


def own_ray() -> list[int]:
    """If this process started a Ray: the two processes that it cannot be without."""
    found = ((pid, *_stat(pid)) for pid in _others())
    return [pid for pid, name, _, parent in found if parent == os.getpid() and name in {"raylet", "gcs_server"}]


def own_ray_died() -> bool:
    """Whether the Ray that this process started has lost one of them."""
    return any(map(has_ended, own_ray()))


def has_ended(child: int) -> bool:
    """A child that nobody has asked for stays as a zombie."""
    return _stat(child)[1] == "Z" or not Path(f"/proc/{child}").exists()


def _others() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if entry.name != str(os.getpid())]


def _writes_in(pid: int, start: str) -> bool:
    with suppress(OSError):  # it has ended, or is somebody else's
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it has been closed
                if str(file.readlink()).startswith(start) and _flags(pid, file.name) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def _flags(pid: int, file: str) -> int:
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{file}").read_text().splitlines())
    return int(told["flags"], 8)


def _stat(pid: int) -> tuple[str, str, int]:
    """Name, state and parent."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return "", "", 0
    state, parent, *_ = after.split()
    return before.partition("(")[2], state, int(parent)
