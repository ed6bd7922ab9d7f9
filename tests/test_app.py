"""The deployment on real Ray Serve. What the application answers is in test_api.py, which needs no Ray."""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import serving
from realservice import RealService, eventually

from itemvec.client import Client
from itemvec.registry import Registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

TOTAL = 'itemvec_requests_total{endpoint="/v1/embeddings",method="POST",status="200"}'


def embed(service: RealService, times: int) -> Counter[str]:
    """Which version answered how often, over 8 connections at once."""

    def some(count: int) -> list[str]:
        with httpx.Client(base_url=service.client.base_url, timeout=10.0) as client:
            answers = [client.post("/v1/embeddings", json={"input": [serving.TOY]}) for _ in range(count)]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.json()["model"] for answer in answers]

    with ThreadPoolExecutor(8) as pool:
        return Counter(model for models in pool.map(some, [times // 8] * 8) for model in models)


def listeners(pid: int) -> set[tuple[str, int]]:
    """Address, as the kernel writes it, and port of each TCP socket on which the process listens."""
    inodes = set()
    with suppress(FileNotFoundError):  # a process of Ray's that has ended since
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_an_answer_carries_the_request_id_once(real_service: RealService):
    answer = real_service.client.get("/readyz", headers={"X-Request-ID": "abc-123"})
    assert answer.headers.get_list("x-request-id") == ["abc-123"]


def test_only_ports_that_ask_for_the_token_are_open_beyond_loopback(real_service: RealService):
    replicas = real_service.replicas()
    for pid, title in real_service.processes().items():
        beyond = {port for address, port in listeners(pid) if address not in LOOPBACK}
        # Serve gives no choice of the address of this one; it is for calls between deployments.
        assert len(beyond) == (1 if pid in replicas else 0), title
        for port in beyond:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"", timeout=5)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def answered(service: RealService, path: str) -> bool:
    """What a replica that was killed had accepted is lost with its connection."""
    try:
        return service.client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def test_ray_lets_requests_go_first_where_none_passes_through_it(real_service: RealService):
    def niceness(of: str) -> set[int]:
        pids = [pid for pid, title in real_service.processes().items() if of in title]
        threads = (thread.name for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir())
        return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads}

    own = os.getpriority(os.PRIO_PROCESS, 0)
    eventually(lambda: niceness("ray::ServeController") == niceness("gcs_server") == {max(own, 15)}, 10)
    assert niceness("ray::DashboardAgent") == niceness("ray::RuntimeEnvAgent") == {max(own, 15)}
    assert niceness("ray::ServeReplica") == niceness("/haproxy") == niceness("raylet/raylet") == {own}


def test_metrics_are_the_exact_sum_over_replicas_and_survive_one(real_service: RealService):
    before = real_service.metric(TOTAL)
    assert embed(real_service, 400).total() == 400
    with ThreadPoolExecutor(4) as callers:  # one that has nothing to do is asked before the other, one that has is not
        told = {*callers.map(lambda _: real_service.metric(TOTAL), range(12))}
    assert told == {before + 400}

    victim, *_ = replicas = real_service.replicas()
    assert len(replicas) == 2
    eventually(lambda: len(real_service.asked()) == 2)  # Serve tells HAProxy of the last one a little later
    asked = real_service.asked()
    os.kill(victim, signal.SIGKILL)
    # Never a partial sum: until the dead one is known to be dead, 503 is a right answer.
    eventually(lambda: answered(real_service, "/metrics"))
    assert real_service.metric(TOTAL) == before + 400
    assert embed(real_service, 80).total() == 80  # by the other replica
    eventually(lambda: len(real_service.asked() - asked) == 1 and len(real_service.asked()) == 2, 60)
    assert embed(real_service, 80).total() == 80
    assert real_service.metric(TOTAL) == before + 560


def test_a_promotion_reaches_every_replica_and_fails_no_request(real_service: RealService):
    client = real_service.client
    items = [{"id": sku, **item} for sku, item in serving.ITEMS.items()]
    assert client.post("/v1/items", json={"items": items}).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(embed, real_service, 800)
        started = client.put("/v1/models/toys/aliases/champion", json={"version": 2})
        assert started.status_code == 202, started.text
        job = f"/v1/jobs/{started.json()['job']['id']}"
        eventually(lambda: client.get(job).json()["state"] != "running")
        assert client.get(job).json()["state"] == "succeeded", client.get(job).text
        assert set(meanwhile.result()) <= {"toys@1", "toys@2"}
    assert set(embed(real_service, 80)) == {"toys@2"}


def test_the_work_of_callers_that_have_left_is_dropped(real_service: RealService):
    gone = 'itemvec_rejected_requests_total{reason="client_gone"}'
    before = real_service.metric(gone)
    body = json.dumps({"input": [{**serving.TOY, "unknown": "x" * 500}] * 4096}).encode()  # of several buffers
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        callers = [stack.enter_context(socket.create_connection(("127.0.0.1", real_service.port))) for _ in range(12)]
        for caller in callers:
            caller.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert caller.recv(65_536).startswith(b"HTTP/1.1 200")
        for caller in callers:
            caller.sendall(head % len(body) + body)
    eventually(lambda: real_service.metric(gone) >= before + 6)


SWITCHES = (2, 1, 3, 2, 3, 1)
"""Promotions and rollbacks, one after the other."""


def test_over_many_switches_under_load_no_request_fails_and_no_answer_mixes_versions(
    real_service: RealService, toy_registry: Path
):
    client, ids = real_service.client, list(serving.ITEMS)
    items = [{"id": sku, **item} for sku, item in serving.ITEMS.items()]
    assert client.post("/v1/items", json={"items": items}).status_code == 200
    versions = {f"toys@{n}": Registry(toy_registry).load(f"toys@{n}") for n in (1, 2, 3)}
    vectors = {ref: version.encode(list(serving.ITEMS.values())).vectors for ref, version in versions.items()}
    stop, seen = threading.Event(), Counter[str]()

    def checked(http: httpx.Client, path: str, body: object) -> tuple[str, dict[str, Any]]:
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert said["fingerprint"] == versions[said["model"]].fingerprint
        return said["model"], said

    def ask(first: int) -> Counter[str]:
        """Embeddings and searches by turns, until it is over."""
        asked = Counter[str]()
        with httpx.Client(base_url=client.base_url, timeout=30.0) as http:
            for i in itertools.count(first):
                if stop.is_set():
                    return asked
                row = i % len(ids)
                model, said = checked(http, "/v1/embeddings", {"input": [serving.ITEMS[ids[row]]]})
                assert np.abs(np.array(said["data"][0]["embedding"]) - vectors[model][row]).max() <= 1e-5
                asked[model] += 1
                model, said = checked(http, "/v1/similar", {"id": ids[row], "k": 39})
                assert len(said["neighbors"]) == 39
                for neighbor in said["neighbors"]:
                    cosine = vectors[model][ids.index(neighbor["id"])] @ vectors[model][row]
                    assert abs(neighbor["score"] - cosine) <= 2e-3
                asked[model] += 1
        return asked

    took = []
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, 10 * i) for i in range(4)]
        try:
            for version in SWITCHES:
                with Client(str(client.base_url)) as promoting:
                    began = time.monotonic()
                    promoting.switch("toys", version)
                    took.append(time.monotonic() - began)
                assert set(embed(real_service, 16)) == {f"toys@{version}"}
        finally:
            stop.set()
        for one in asking:
            seen += one.result()
    assert set(seen) == set(versions)
    # 3 -> 2 and 2 -> 3 have nothing to encode: the version before stays whole. Asked for a second, on a busy machine.
    print(f"{seen.total()} answers, switches took {', '.join(f'{seconds:.2f}' for seconds in took)} s")
    assert max(took[3:5]) < 5.0


def test_a_kill_and_a_crash_of_ray_end_every_process_and_lose_no_item(real_service: RealService):
    """The last test of the service that the others asked, since it kills it."""
    service, folder = real_service, real_service.log.parent
    assert service.client.put("/v1/items/kept", json=serving.TOY).is_success
    redis, *_ = (pid for pid, title in service.processes().items() if "redis-server" in title)
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    # The agents of a Ray node try for two minutes to tell someone that it died, if the next start does not end them.
    eventually(lambda: {title.split()[0] for title in service.processes().values()} <= AGENTS, 60)
    eventually(lambda: not Path(f"/proc/{redis}").exists(), 60)

    broken = folder / "registry" / "broken"
    (broken / "versions").mkdir(parents=True)
    (broken / "aliases.json").write_text('{"champion": 7}')
    with RealService(folder, folder / "registry") as again:
        assert not service.processes()
        # What a replica has to say is in the log of the service; Serve, made fast, would drop it.
        eventually(lambda: "model broken is not served" in again.log.read_text(), 20)
        assert again.client.get("/v1/items/kept").json()["item"] == serving.TOY
        answer = again.client.post("/v1/similar", json={"item": serving.TOY, "k": 2})
        assert "kept" in [neighbor["id"] for neighbor in answer.json()["neighbors"]]  # the other is its twin, toy 3
        # And when Ray crashes, the service ends and says so, so that whoever watches over it starts it again.
        raylet, *_ = (pid for pid, title in again.processes().items() if "raylet/raylet" in title)
        os.kill(raylet, signal.SIGKILL)
        assert again.process.wait(60) == 1
        assert "Ray has crashed" in again.log.read_text()
        eventually(lambda: not again.processes(), 60)


AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


def test_a_service_without_a_model_says_so_in_one_line(tmp_path: Path):
    with pytest.raises(AssertionError) as failed:
        RealService(tmp_path, tmp_path / "registry")
    [told] = str(failed.value).splitlines()
    assert told.startswith(f"itemvec: the registry {tmp_path / 'registry'} has no champion to serve: run itemvec train")
