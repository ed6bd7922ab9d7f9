import ctypes
import os
import platform
import struct
import threading

from service.processes import TURN, short_turns

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
