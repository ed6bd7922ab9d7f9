import ctypes
import os
import platform
import struct
import subprocess
import threading
from pathlib import Path

from service.processes import TURN, processes_writing_in, short_turns

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def turn(thread: int = 0) -> int:
    """Nanoseconds."""
    told = ctypes.create_string_buffer(48)
    ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], thread, told, len(told), 0)
    return int(struct.unpack("IIQiIQQQ", told.raw)[5])


def test_a_thread_gets_short_turns_and_what_it_starts_has_them_as_usual():
    found = []

    def work():
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        short_turns()
        assert os.getpriority(os.PRIO_PROCESS, 0) == niceness
        found.append(turn())
        child = threading.Thread(target=lambda: found.append(turn()))
        child.start()
        child.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    knows = tuple(map(int, platform.release().split("-")[0].split(".")[:2])) >= (6, 12)
    assert found == [TURN if knows else 0, turn()]


def test_short_turns_of_a_process_that_has_ended_are_no_error():
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    short_turns(child)


def test_processes_are_known_by_what_they_write_and_who_reads_along_is_none_of_them(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "ours too"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "log").touch()

    def with_open(file: Path, mode: str) -> "subprocess.Popen[bytes]":
        with file.open(mode) as log:
            return subprocess.Popen(["/bin/sleep", "60"], stderr=log)

    started = [with_open(ours / "log", "a"), with_open(ours / "log", "r"), with_open(theirs / "log", "a")]
    try:
        assert processes_writing_in(ours) == [started[0].pid]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert processes_writing_in(ours) == []
