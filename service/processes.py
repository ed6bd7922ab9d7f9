"""What Linux tells of other processes; elsewhere nothing is found."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def processes_with(variable: str, value: str) -> list[int]:
    """Processes, not this one, that were started with the environment variable at this value."""
    wanted = f"{variable}={value}".encode()
    return [pid for pid in _others() if wanted in _environment(pid)]


def step_back(pids: Iterable[int], words: Iterable[str], niceness: int) -> None:
    """Those of the processes whose command line has one of the words let others go first, with all their threads."""
    wanted = [word.encode() for word in words]
    for pid in pids:
        with suppress(OSError):  # it has ended, or is somebody else's
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if any(word in command for word in wanted):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def own_ray_died() -> bool:
    """Whether the Ray that this process started has lost one of the two processes that it cannot be without."""
    return any(
        parent == os.getpid() and name in {"raylet", "gcs_server"} and state == "Z"
        for name, state, parent in map(_stat, _others())
    )


def _others() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if entry.name != str(os.getpid())]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return []


def _stat(pid: int) -> tuple[str, str, int]:
    """Name, state and parent."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return "", "", 0
    state, parent, *_ = after.split()
    return before.partition("(")[2], state, int(parent)
