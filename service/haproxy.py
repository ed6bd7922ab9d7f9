"""Runs HAProxy for Ray Serve on one machine: it listens where the service does, and ends with it.

Ray Serve writes HAProxy's configuration itself and leaves parts of it to no setting: two more ports open to
every network, an admin socket that any user may write to, a bare 500 where no replica answers. `install`
makes a program that Ray starts in its place: this very file, which corrects the configuration and becomes
HAProxy. It also sends the requests to the replicas' own sockets, past the ingress that Serve keeps in each replica,
which takes more of a request's time than encoding an item does; Serve's port of a replica is left with the health
checks, by which replicas come and go as before.

It runs by its path in an isolated interpreter, so it imports the standard library alone, as does `processes.py`.
"""

import ctypes
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from runpy import run_path
from typing import Final

UNAVAILABLE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: application/problem+json\r\n"
    b"Cache-Control: no-store\r\n"
    b"Retry-After: 1\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
NO_REPLICA: Final = (
    b'{"type":"urn:itemvec:problem:no-replica","title":"No replica","status":503,'
    b'"detail":"no replica of the service can answer now: try again"}'
)

DROPPED: Final = {"frontend prometheus", "listen stats"}
"""Sections that open a port on every interface and that nothing of ours reads."""

NOBODY: Final = "backend default_backend"
"""For paths of no application. Ours has every path, so they come here when it is not there, as while it ends."""

NOT_THERE: Final = "http-response deny deny_status 503 if { status 404 } { res.hdr(content-type) -m beg text/plain }"
"""The same of Serve's own proxy, which is asked when no replica is left. Ours say in JSON what they did not find."""

KEEP: Final = "pool-purge-delay 1h"
"""Connections to a replica that a moment of many requests has opened. By default they are closed within seconds, and
the next such moment waits for new ones."""

SPINS: Final = ["option", "splice-request"]
"""With `abortonclose` HAProxy 2.8 turns round and round at 100 % of a core when a caller leaves whose body was larger
than a buffer and not the first of its connection, and the replica is not told: not before it has answered."""

PREFERRED: Final = "use-server {0} if {{ date,div(10),mod({2}) eq {1} }} {{ srv_conn({0}) lt 1 }}"
"""For ten seconds at a time one replica is asked before the others, as long as it has nothing to do: of few requests
each then finds warm what it needs, in the processor's caches and in the replica's. Beyond, and where that replica is
down, it is as without: the one with the fewest requests. By turns, so that one that is up and ill gets no more than
its share."""

SERVER: Final = re.compile(r"(\s+server \S+-(\w+)) (\S+):(\d+) check\b(?!.* backup)")
"""A replica, whose name ends with its id; Serve's own proxy, the last resort, is the backup."""


def socket_of(sockets: Path, replica: str) -> Path:
    """Where the replica with this id listens for HAProxy."""
    return sockets / replica


def corrected(config: str, unavailable: str, sockets: Path) -> str:
    """Ray's configuration without what no single machine should have; the file `unavailable` has an answer, and the
    folder `sockets` the sockets of the replicas that listen on one.

    >>> print(corrected('''global
    ...     log 127.0.0.1:514 local0 info
    ...     stats socket /tmp/x/admin.sock mode 666 level admin
    ... defaults
    ...     errorfile 503 /tmp/x/500.http
    ... listen stats
    ...   bind *:8404
    ... frontend http_frontend
    ...     bind 127.0.0.1:8000
    ... backend default_backend
    ...     http-request return status 404 content-type text/plain string "no such path"
    ... backend http-itemvec
    ...     http-reuse always''', "/tmp/x/503.http", Path("/tmp/x/none")))
    global
        stats socket /tmp/x/admin.sock mode 600 level admin
    defaults
        errorfile 503 /tmp/x/503.http
    frontend http_frontend
        bind 127.0.0.1:8000
    backend default_backend
        http-request deny deny_status 503
    backend http-itemvec
        http-response deny deny_status 503 if { status 404 } { res.hdr(content-type) -m beg text/plain }
        http-reuse always
    """
    kept, section, lines = list[str](), "", config.splitlines()
    listed = [replica[2] for line in lines if (replica := SERVER.match(line))]
    own = [name for name in listed if socket_of(sockets, name).exists()]
    for line in lines:
        if line and not line[0].isspace():
            section = " ".join(line.split())
            if section.startswith("backend http-"):
                kept += [line, f"    {NOT_THERE}"]
                continue
        words = line.split()
        if section in DROPPED or words[:2] == SPINS:
            continue
        # Each request would otherwise be a datagram to whoever listens on the syslog port.
        if words[:1] == ["log"] or words[:2] == ["option", "httplog"]:
            continue
        replica = SERVER.match(line)
        if section == NOBODY and words[:2] == ["http-request", "return"]:
            kept.append(f"{line[: line.index('http')]}http-request deny deny_status 503")
        elif words[:1] == ["errorfile"]:
            kept.append(re.sub(r"\S+$", unavailable, line))
        elif replica and replica[2] in own:
            check = f"check addr {replica[3]} port {replica[4]}"
            kept.append(f"{replica[1]} unix@{socket_of(sockets, replica[2])} {check}{line[replica.end() :]} {KEEP}")
            kept.append(f"    {PREFERRED.format(replica[1].split()[1], own.index(replica[2]), len(own))}")
        else:
            kept.append(re.sub(r"^(\s+stats socket .*) mode 666 ", r"\1 mode 600 ", line))
    return "\n".join(kept)


def install(program: Path, haproxy: str, sockets: Path) -> None:
    """Writes the executable `program`, for Ray to start instead of the binary `haproxy`."""
    command = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).resolve()), haproxy, str(sockets)])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)


def die_with_parent() -> None:
    """Linux only: elsewhere HAProxy outlives a parent that was killed outright."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def main(haproxy: str, sockets: str, *arguments: str) -> None:
    config = Path(arguments[arguments.index("-f") + 1])
    unavailable = config.with_name("503.http")
    unavailable.write_bytes(UNAVAILABLE % (len(NO_REPLICA), NO_REPLICA))
    config.write_text(corrected(config.read_text(), str(unavailable), Path(sockets)) + "\n")
    die_with_parent()
    run_path(str(Path(__file__).with_name("processes.py")))["short_turns"]()
    os.execv(haproxy, [haproxy, *arguments])  # noqa: S606 the arguments are Ray's own


if __name__ == "__main__":
    main(*sys.argv[1:])
