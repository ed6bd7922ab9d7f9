"""Switching versions: no write is lost, nothing is served before it is whole, and what fails leaves the champion."""

import asyncio
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import redis
import serving
from serving import ITEMS, JSON, TOY, Running, assert_problem, eventually, post
from storing import kill

from itemvec.errors import StoreUnavailable
from itemvec.version import ModelVersion
from service import index, models, promote
from service.conditions import Exists
from service.problems import PromotionRunning
from service.promote import Job, Promotions
from service.redis_server import EmbeddedRedis
from service.store import Store

pytestmark = pytest.mark.anyio


async def vectors_in_store(service: Running, version: int, ids: list[str]) -> list[Any]:
    fingerprint = service.registry.manifest("toys", version).fingerprint
    return await service.store.get_vectors("toys", fingerprint, ids)


def of_version(service: Running, version: int, items: list[dict[str, Any]]) -> Any:
    return ModelVersion.load(service.registry.path("toys", version)).encode(items).vectors


async def test_a_promotion_encodes_every_item_and_then_switches(toys: Running) -> None:
    await toys.load()
    job = await toys.promote(2)
    assert (job["state"], job["stage"], job["model"], job["refused"]) == ("succeeded", "done", "toys@2", 0)
    assert job["progress"] == {"done": 40, "total": 40}
    assert job["fingerprint"] == toys.registry.manifest("toys", 2).fingerprint
    assert toys.registry.aliases("toys") == {"champion": 2, "previous": 1}
    stored = np.array(await vectors_in_store(toys, 2, list(ITEMS)))
    assert np.abs(stored - of_version(toys, 2, list(ITEMS.values()))).max() <= 1e-6
    body = (await post(toys, "/v1/similar", {"id": "toy 3", "k": 39})).json()
    assert body["model"] == "toys@2"
    assert len(body["neighbors"]) == 39


async def test_the_previous_version_stays_searchable_and_a_rollback_encodes_nothing(toys: Running) -> None:
    await toys.load()
    await toys.promote(2)
    pinned = (await post(toys, "/v1/similar", {"id": "toy 3", "model": "toys@1"})).json()
    assert (pinned["model"], len(pinned["neighbors"])) == ("toys@1", 10)
    assert (await toys.client.put("/v1/items/new", json=TOY)).status_code == 201  # reaches both
    job = await toys.promote("previous")
    assert (job["state"], job["progress"]) == ("succeeded", {"done": 0, "total": 0})
    assert toys.registry.aliases("toys") == {"champion": 1, "previous": 2}
    body = (await post(toys, "/v1/similar", {"item": TOY, "k": 2, "exclude": ["toy 3"]})).json()
    assert body["model"] == "toys@1"
    assert body["neighbors"][0]["id"] == "new"


async def test_of_three_versions_the_oldest_is_dropped(tmp_path: Path, toy_registry: Path, empty_redis: str) -> None:
    async with serving.running(serving.copied(toy_registry, tmp_path / "r"), empty_redis) as service:
        promotions = Promotions(service.models, service.store, grace=0.0)
        for version in (2, 3):
            job = await promotions.promote("toys", version)
            await eventually(lambda job=job: _ended(job))  # type: ignore[misc]
        first, second, third = (service.registry.manifest("toys", n).fingerprint for n in (1, 2, 3))

        async def dropped() -> bool:
            return set(await service.store.live("toys")) == {second, third}

        assert (await service.client.put("/v1/items/a", json=TOY)).status_code == 201  # it knows of all three
        await eventually(dropped)
        assert (await service.client.put("/v1/items/a", json=TOY)).status_code == 200
        assert await service.store.ready("toys") == {second, third}
        assert first not in await service.store.live("toys")
        await promotions.stop()


@pytest.mark.parametrize("how", ["damaged", "removed"])
async def test_an_alias_of_a_version_that_is_damaged_or_gone_keeps_nothing_and_what_is_too_old_is_dropped(
    tmp_path: Path, toy_registry: Path, empty_redis: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving.running(serving.copied(toy_registry, tmp_path / "r"), empty_redis) as service:
        promotions = Promotions(service.models, service.store, grace=0.0)
        filled = await promotions.backfill("toys", 2)
        await eventually(lambda: _ended(filled))
        serving.publish(service.registry, 4, alias="challenger")
        manifest = service.registry.path("toys", 4) / "manifest.json"
        manifest.write_text("{}") if how == "damaged" else manifest.unlink()
        job = await promotions.promote("toys", 3)
        await eventually(lambda: _ended(job))
        first, third = (service.registry.manifest("toys", n).fingerprint for n in (1, 3))

        async def dropped() -> bool:
            return await service.store.indexes.fingerprints("toys") == {first, third}

        await eventually(dropped)
        assert "the alias challenger of model toys keeps nothing" in caplog.text
        await promotions.stop()


@pytest.mark.parametrize("how", ["damaged", "removed"])
async def test_writes_go_on_without_a_live_version_that_is_damaged_or_gone(
    tmp_path: Path, toy_registry: Path, empty_redis: str, how: str
) -> None:
    registry = serving.copied(toy_registry, tmp_path / "r")
    weights = registry / "toys" / "versions" / "2" / "encoder.safetensors"
    whole = weights.read_bytes()
    async with serving.running(registry, empty_redis) as service:
        await service.load()
        started = await service.client.post("/v1/models/toys/backfill", json={"version": 2})
        assert (await service.finished(started.json()["job"]["id"]))["state"] == "succeeded"
        first, second = (service.registry.manifest("toys", n).fingerprint for n in (1, 2))
        assert await service.store.ready("toys") == {first, second}
    moved = weights.parent.rename(tmp_path / "2")
    if how == "damaged":
        moved.rename(weights.parent)
        weights.write_bytes(b"")
    async with serving.running(registry, empty_redis) as service:
        assert (await service.client.put("/v1/items/new", json=TOY)).status_code == 201
        assert await service.store.ready("toys") == {first}
        assert (await service.client.delete("/v1/items/toy%205")).status_code == 204  # its second vector stays behind
    if how == "removed":
        moved.rename(weights.parent)
    weights.write_bytes(whole)
    async with serving.running(registry, empty_redis) as service:
        assert (await service.promote(2))["state"] == "succeeded"
        found = (await post(service, "/v1/similar", {"item": TOY, "k": 50})).json()["neighbors"]
        assert {one["id"] for one in found} == ITEMS.keys() - {"toy 5"} | {"new"}


async def _ended(job: Job) -> bool:
    return job.state != "running"


async def test_items_put_replaced_and_removed_during_a_backfill_are_right_afterwards(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await toys.load()
    scan, touched = toys.store.scan, list[str]()

    async def scan_with_writes(name: str, batch: int = 500) -> Any:
        async for items in scan(name, 10):
            if not touched:  # between reading a batch and writing its vectors
                first, second = items[0].id, items[1].id
                await toys.client.put(f"/v1/items/{first}", json={**TOY, "price": 11.5})
                await toys.client.delete(f"/v1/items/{second}")
                await toys.client.put("/v1/items/new", json={**TOY, "price": 12.5})
                touched.extend([first, second])
            yield items

    monkeypatch.setattr(toys.store, "scan", scan_with_writes)
    job = await toys.promote(2)
    assert job["state"] == "succeeded", job
    replaced, removed = touched
    wanted = of_version(toys, 2, [{**TOY, "price": 11.5}, {**TOY, "price": 12.5}])
    got = await vectors_in_store(toys, 2, [replaced, "new", removed])
    assert np.abs(np.array(got[:2]) - wanted).max() <= 1e-6
    assert got[2] is None
    assert len((await post(toys, "/v1/similar", {"item": TOY, "k": 100})).json()["neighbors"]) == 40


async def test_searches_and_writes_go_on_through_a_switch(toys: Running) -> None:
    await toys.load()
    seen: set[str] = set()
    stop = False

    async def search() -> None:
        while not stop:
            answer = await post(toys, "/v1/similar", {"id": "toy 3", "k": 39})
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["neighbors"]) >= 39
            seen.add(answer.json()["model"])

    async def write() -> None:
        n = 0
        while not stop:
            answer = await toys.client.put(f"/v1/items/w{n}", json=TOY)
            assert answer.status_code == 201, answer.text
            n += 1

    working = [asyncio.create_task(search()), asyncio.create_task(write())]
    job = await toys.promote(2)
    await asyncio.sleep(0.05)
    stop = True
    await asyncio.gather(*working)
    assert job["state"] == "succeeded"
    assert seen == {"toys@1", "toys@2"}
    count = await toys.store.count("toys")
    for version in (1, 2):
        fingerprint = toys.registry.manifest("toys", version).fingerprint
        assert (await toys.store.indexes.status("toys", fingerprint)).docs == count


async def test_a_switch_is_not_undone_by_who_read_the_registry_before_it(
    tmp_path: Path, toy_registry: Path, empty_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "YOUNG_SECONDS", 0.0)
    registry = serving.copied(toy_registry, tmp_path / "registry")
    async with serving.running(registry, empty_redis, registry_poll_seconds=3600.0) as service:
        await service.load()
        await service.promote(2)
        ready, switches = service.store.ready, [1]

        async def meanwhile(name: str) -> set[str]:
            if switches:
                await service.promote(switches.pop())
            return await ready(name)

        monkeypatch.setattr(service.store, "ready", meanwhile)
        await service.models._follow("toys")
        assert service.models.champion("toys").version == 1


async def test_the_description_of_a_model_is_of_one_version_through_a_switch(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = serving.publish(toys.registry, 4, price="nominal")
    count, switches = toys.store.count, [version]

    async def switched(name: str) -> int:
        if switches:
            await toys.promote(switches.pop())
        return await count(name)

    before = (await toys.client.get("/v1/models/toys/versions/1")).json()["item_schema"]
    monkeypatch.setattr(toys.store, "count", switched)
    body = (await toys.client.get("/v1/models/toys")).json()
    assert (body["model"], body["item_schema"]) == ("toys@1", before)


async def test_writes_at_the_same_time_need_not_ask_what_is_live(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each answer to a write says so; asked for by itself it has the short deadline of a search, of which a store that
    # is busy with writes of many items makes too much.
    await toys.load()
    asked = 0
    live = toys.store.live

    async def counted(name: str) -> dict[str, str]:
        nonlocal asked
        asked += 1
        return await live(name)

    monkeypatch.setattr(toys.store, "live", counted)
    some = [{"items": [{"id": f"{n} {i}", **TOY} for i in range(100)]} for n in range(4)]
    answers = await asyncio.gather(*(post(toys, "/v1/items", body) for body in some))
    assert [answer.json()["created"] for answer in answers] == [100] * 4
    assert asked == 0


async def test_one_promotion_of_a_model_at_a_time(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await toys.load()
    go_on, scan = asyncio.Event(), toys.store.scan

    async def slow_scan(name: str, batch: int = 500) -> Any:
        async for items in scan(name, batch):
            await go_on.wait()
            yield items

    monkeypatch.setattr(toys.store, "scan", slow_scan)
    first = await toys.client.put("/v1/models/toys/aliases/champion", json={"version": 2})
    job = first.json()["job"]
    assert first.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] == "running"
    second = await toys.client.put("/v1/models/toys/aliases/champion", json={"version": 3})
    assert job["id"] in assert_problem(second, 409)["detail"]
    again = await toys.client.put("/v1/models/toys/aliases/champion", json={"version": 2})
    assert (again.status_code, again.json()["job"]["id"]) == (202, job["id"])
    # Another replica knows of it too.
    elsewhere = Promotions(toys.models, toys.store)
    assert (await elsewhere.job(job["id"])).state == "running"
    go_on.set()
    assert (await toys.finished(job["id"]))["state"] == "succeeded"
    assert (await elsewhere.job(job["id"])).state == "succeeded"


async def test_a_corrupt_version_is_refused_and_the_champion_stays(toys: Running) -> None:
    await toys.load()
    with (toys.registry.path("toys", 2) / "encoder.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    job = await toys.promote(2)
    assert job["state"] == "failed"
    assert "toys@2" in job["problem"]["detail"]
    assert "encoder.safetensors" in job["problem"]["detail"]
    assert toys.registry.aliases("toys") == {"champion": 1}
    assert (await post(toys, "/v1/similar", {"id": "toy 3"})).json()["model"] == "toys@1"


async def test_a_backfill_that_fails_leaves_nothing_behind(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await toys.load()

    async def broken(*_: object) -> int:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(toys.store, "add_vectors", broken)
    job = await toys.promote(2)
    assert (job["state"], job["problem"]["status"]) == ("failed", 500)
    assert "luck" not in job["problem"]["detail"]
    assert list((await toys.store.live("toys")).values()) == ["toys@1"]
    monkeypatch.undo()
    assert (await toys.promote(2))["state"] == "succeeded"


async def half_filled(service: Running, version: int) -> str:
    """What a job leaves that is killed at its work."""
    made = ModelVersion.load(service.registry.path("toys", version))
    await service.store.indexes.ensure("toys", made.fingerprint, made.dim)
    await service.store.mark_live("toys", made.fingerprint, made.ref)
    return made.fingerprint


async def test_what_a_killed_job_began_is_taken_back_by_the_next_one_that_fails(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await toys.load()
    await half_filled(toys, 2)

    async def broken(*_: object) -> int:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(toys.store, "add_vectors", broken)
    assert (await toys.promote(2))["state"] == "failed"
    assert not await _is_live(toys, "toys@2")


async def test_what_a_killed_job_began_is_taken_back_unless_a_job_runs(
    toys: Running, raw_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await toys.load()
    served, left = toys.registry.manifest("toys", 1).fingerprint, await half_filled(toys, 2)
    await eventually(lambda: _claimed(toys, "a job"))
    raw_redis.srem("iv:ready:{toys}", served)  # as of a store that was emptied: it is filled again
    monkeypatch.setattr(promote, "WATCH_SECONDS", 0.01)
    claim, looked = toys.store.leases.claim, 0

    async def counted(*args: Any) -> str:
        nonlocal looked
        looked += 1
        return await claim(*args)

    async def looked_again() -> bool:
        return looked > 3

    async def taken_back() -> bool:
        return await toys.store.indexes.fingerprints("toys") == {served}

    monkeypatch.setattr(toys.store.leases, "claim", counted)
    promotions = Promotions(toys.models, toys.store)
    promotions.start()
    await eventually(looked_again)
    assert (await toys.store.live("toys")).keys() == {served, left}
    await toys.store.leases.release("toys", "a job")
    await eventually(taken_back)
    assert (await toys.store.live("toys")).keys() == {served}
    await promotions.stop()


async def test_items_that_the_new_version_refuses_are_told_and_the_rest_is_served(toys: Running) -> None:
    await toys.load()
    assert serving.publish(toys.registry, 4, price="nominal") == 4
    await toys.client.put("/v1/items/free", json={"maker": "Ada"})
    job = await toys.promote(4)
    assert (job["state"], job["refused"], len(job["refusals"])) == ("succeeded", 40, 20)
    assert job["refusals"][0]["pointer"] == "/price"
    body = (await post(toys, "/v1/similar", {"item": {"maker": "Ada"}, "k": 5})).json()
    assert (body["model"], [n["id"] for n in body["neighbors"]]) == ("toys@4", ["free"])
    # What is put now suits the new version alone, and is taken all the same.
    assert (await toys.client.put("/v1/items/priced", json={"price": "12"})).status_code == 201
    assert (await toys.client.put("/v1/items/priced", json={"price": 12})).status_code == 422


async def test_an_item_that_the_previous_version_refuses_is_no_longer_found_with_it(toys: Running) -> None:
    serving.publish(toys.registry, 4, price="nominal")
    for item_id in ("kept", "changed"):
        await toys.client.put(f"/v1/items/{item_id}", json={"maker": "Ada"})
    assert (await toys.promote(4))["state"] == "succeeded"
    search = {"item": {"maker": "Ada"}, "k": 5, "model": "toys@1"}
    before = (await post(toys, "/v1/similar", search)).json()
    assert {n["id"] for n in before["neighbors"]} == {"kept", "changed"}
    assert (await toys.client.put("/v1/items/changed", json={"maker": "Ada", "price": "12"})).status_code == 200
    after = (await post(toys, "/v1/similar", search)).json()
    assert [n["id"] for n in after["neighbors"]] == ["kept"]


async def test_a_version_that_differs_in_what_is_filterable_alone_fills_its_columns_before_it_is_served(
    toys: Running,
) -> None:
    await toys.load()
    version = serving.publish(toys.registry, 1, named="name: {kind: text, filterable: true}")
    first, second = (toys.registry.manifest("toys", number).fingerprint for number in (1, version))
    assert first == second
    job = await toys.promote(version)
    assert (job["state"], job["progress"]["done"]) == ("succeeded", 40)
    schema, anywhere = toys.models.champion("toys").schema, np.ones(serving.DIM)
    await toys.client.put("/v1/items/named", json={**TOY, "price": 1})
    await toys.client.put("/v1/items/nameless", json={"maker": "Ada"})
    found = await toys.store.search("toys", first, anywhere, 99, where=Exists("name"), schema=schema)
    assert {neighbor.id for neighbor in found} == {"named", *ITEMS}


async def test_a_champion_of_the_registry_is_not_served_before_its_columns_can_be_filtered_by(toys: Running) -> None:
    await toys.load()
    version = serving.publish(toys.registry, 1, named="name: {kind: text, filterable: true}")
    toys.registry.promote("toys", version)
    query = {"item": TOY, "k": 99, "filter": {"exists": "name"}}

    async def served() -> bool:
        answer = await post(toys, "/v1/similar", query)
        if answer.status_code == 422:  # a version without the column still serves
            return False
        assert len(answer.json()["neighbors"]) == 40
        return True

    await eventually(served)


async def test_a_named_version_whose_index_is_made_again_is_not_searched_before_it_is_whole(
    tmp_path: Path, toy_registry: Path, empty_redis: str
) -> None:
    async with serving.running(toy_registry, empty_redis, registry_poll_seconds=3600.0) as toys:
        await toys.load()
        backfilled = await toys.client.post("/v1/models/toys/backfill", json={"version": 2})
        await toys.finished(backfilled.json()["job"]["id"])
        query = {"id": "toy 3", "k": 39, "model": "toys@2"}
        assert len((await post(toys, "/v1/similar", query)).json()["neighbors"]) == 39
        fingerprint = toys.registry.manifest("toys", 2).fingerprint
        await toys.store.unmark_live("toys", fingerprint)
        await toys.store.indexes.drop("toys", fingerprint)
        await toys.store.indexes.ensure("toys", fingerprint, serving.DIM)
        await toys.store.mark_live("toys", fingerprint, "toys@2")
        assert_problem(await post(toys, "/v1/similar", query), 409)


async def test_an_index_that_outgrew_its_form_gets_another_in_a_job(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await toys.load()
    fingerprint = toys.registry.manifest("toys", 1).fingerprint
    monkeypatch.setattr(index, "FLAT_UP_TO", 40)
    monkeypatch.setattr(index, "FLAT_DOWN_TO", 20)
    monkeypatch.setattr(promote, "WATCH_SECONDS", 0.05)
    promotions = Promotions(toys.models, toys.store)
    started: list[Job] = []
    start = promotions._start

    async def noted(*args: Any) -> Job:
        started.append(await start(*args))
        return started[-1]

    monkeypatch.setattr(promotions, "_start", noted)
    promotions.start()

    async def outgrown() -> bool:
        return (await toys.store.indexes.status("toys", fingerprint)).mode == "hnsw"

    await eventually(outgrown)
    job = await toys.finished(started[0].id)
    assert (job["kind"], job["cause"], job["state"], job["model"]) == ("reindex", "size", "succeeded", "toys@1")
    assert job["fingerprint"] == toys.registry.manifest("toys", 1).fingerprint
    assert len((await post(toys, "/v1/similar", {"id": "toy 3", "k": 39})).json()["neighbors"]) == 39
    await asyncio.sleep(0.2)
    assert len(started) == 1
    await promotions.stop()


async def test_what_a_failed_job_takes_back_is_taken_back_before_the_service_ends(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotions, taking_back, taken_back = Promotions(toys.models, toys.store), asyncio.Event(), []
    unmark = toys.store.unmark_live

    async def failing(*_: Any) -> None:
        raise StoreUnavailable("the disk is full")

    async def slowly(*args: str) -> None:
        taking_back.set()
        await asyncio.sleep(0.05)
        await unmark(*args)
        taken_back.append(args)

    monkeypatch.setattr(promotions, "_backfill", failing)
    monkeypatch.setattr(toys.store, "unmark_live", slowly)
    while not taking_back.is_set():
        with contextlib.suppress(PromotionRunning):  # the job that made the champion searchable may not be over
            await promotions.backfill("toys", 2)
            await taking_back.wait()
        await asyncio.sleep(0.01)
    await promotions.stop()
    assert taken_back == [("toys", toys.registry.manifest("toys", 2).fingerprint)]


async def test_items_that_the_new_version_refuses_may_come_during_the_backfill(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promote, "SHORT_SECONDS", 0.05)
    serving.publish(toys.registry, 4, price="nominal")
    for item_id in ("free", "soon priced", "soon gone"):
        await toys.client.put(f"/v1/items/{item_id}", json={"maker": "Ada"})
    scan, scans = toys.store.scan, 0

    async def scan_with_writes(name: str, batch: int = 500) -> Any:
        nonlocal scans
        scans += 1
        async for items in scan(name, batch):
            if scans == 1:  # between reading them and writing their vectors
                await toys.client.put("/v1/items/soon priced", json=TOY)
            yield items
        if scans == 1:
            await toys.client.put("/v1/items/new", json=TOY)
            await toys.client.delete("/v1/items/soon gone")

    monkeypatch.setattr(toys.store, "scan", scan_with_writes)
    job = await toys.promote(4)
    assert (job["state"], job["refused"], scans) == ("succeeded", 2, 2), job
    body = (await post(toys, "/v1/similar", {"item": {"maker": "Ada"}, "k": 5})).json()
    assert (body["model"], [n["id"] for n in body["neighbors"]]) == ("toys@4", ["free"])


async def test_an_index_that_stays_short_fails_the_promotion(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(promote, "SCAN_TRIES", 2)
    await toys.load()

    async def lost(*_: object) -> int:
        return 0

    monkeypatch.setattr(toys.store, "add_vectors", lost)
    job = await toys.promote(2)
    assert job["state"] == "failed"
    assert "toys@2 has 0 of 40 vectors" in job["problem"]["detail"]
    assert toys.registry.aliases("toys") == {"champion": 1}


@pytest.mark.parametrize("noticed", [True, False], ids=["while it encodes", "before the switch"])
async def test_a_job_that_lost_its_lease_stops_and_leaves_the_index_alone(
    toys: Running, monkeypatch: pytest.MonkeyPatch, noticed: bool
) -> None:
    await toys.load()
    monkeypatch.setattr(promote, "LEASE_SECONDS", 0.3 if noticed else 3600.0)
    go_on, scan = asyncio.Event(), toys.store.scan

    async def stalled_scan(name: str, batch: int = 500) -> Any:
        async for items in scan(name, batch):
            await go_on.wait()
            yield items

    monkeypatch.setattr(toys.store, "scan", stalled_scan)
    answer = await toys.client.put("/v1/models/toys/aliases/champion", json={"version": 2})
    job_id = answer.json()["job"]["id"]
    await eventually(lambda: _is_live(toys, "toys@2"))
    await toys.store.leases.release("toys", job_id)  # as if it had run out
    assert await toys.store.leases.claim("toys", "another job", 60.0) == "another job"
    if not noticed:
        go_on.set()
    job = await toys.finished(job_id)
    assert (job["state"], job["problem"]["status"]) == ("failed", 409)
    assert "another may have begun" in job["problem"]["detail"]
    assert toys.registry.aliases("toys") == {"champion": 1}
    assert await _is_live(toys, "toys@2")  # the other job may be filling it
    assert (await toys.store.indexes.status("toys", toys.registry.manifest("toys", 2).fingerprint)).dim == serving.DIM
    assert await toys.store.leases.claim("toys", "a third", 60.0) == "another job"


async def _is_live(service: Running, ref: str) -> bool:
    return ref in (await service.store.live("toys")).values()


async def test_a_champion_named_by_other_means_is_made_ready_and_followed(toys: Running) -> None:
    await toys.load()
    toys.registry.promote("toys", 3)

    async def served() -> bool:
        answer = (await post(toys, "/v1/similar", {"id": "toy 3", "k": 39})).json()
        assert len(answer["neighbors"]) == 39
        return bool(answer["model"] == "toys@3")

    await eventually(served)


async def test_an_emptied_redis_is_made_ready_again(toys: Running, empty_redis: str) -> None:
    await toys.load()
    with redis.Redis.from_url(empty_redis) as client:
        client.flushall()

    async def taken() -> bool:
        return (await toys.client.put("/v1/items/x", json=TOY)).is_success

    async def found() -> bool:
        answer = await post(toys, "/v1/similar", {"item": TOY})
        return answer.status_code == 200 and [n["id"] for n in answer.json()["neighbors"]] == ["x"]

    await eventually(taken)
    await eventually(found)


async def test_a_restart_serves_what_the_store_is_complete_for(
    tmp_path: Path, toy_registry: Path, empty_redis: str
) -> None:
    folder = serving.copied(toy_registry, tmp_path / "r")
    async with serving.running(folder, empty_redis) as service:
        await service.load()
        service.registry.promote("toys", 2)  # nobody has encoded the items yet
        async with serving.running(folder, empty_redis, registry_poll_seconds=3600.0) as restarted:
            assert restarted.models.champion().ref in {"toys@1", "toys@2"}
            body = (await post(restarted, "/v1/similar", {"id": "toy 3", "k": 39})).json()
            assert len(body["neighbors"]) == 39


@pytest.mark.parametrize(
    "body", [{}, {"version": "2"}, {"version": ["previous"]}, {"version": True}, {"version": 0}, {"version": 10**20}]
)
async def test_a_wrong_promotion_is_refused(toys: Running, body: dict[str, Any]) -> None:
    path, content = "/v1/models/toys/aliases/champion", json.dumps(body).encode()
    assert_problem(await toys.client.put(path, content=content, headers=JSON), 422, "/version")


async def test_unknown_models_versions_and_jobs_are_404(toys: Running) -> None:
    for path, version in (("toys", 9), ("nobody", 1), ("..", 1)):
        answer = await toys.client.put(f"/v1/models/{path}/aliases/champion", json={"version": version})
        assert_problem(answer, 404)
    assert_problem(await toys.client.get("/v1/jobs/none"), 404)


async def test_a_job_whose_replica_is_gone_has_failed(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "PAUSE_SECONDS", 0.01)
    job = Job("lost", "toys", 2, "request", started=1.0, heard=1.0)
    await toys.store.leases.save_job("lost", orjson.dumps(asdict(job)), 60.0)
    shown = (await toys.client.get("/v1/jobs/lost")).json()
    assert shown["state"] == "failed"
    assert shown["problem"]["type"] == "urn:itemvec:problem:job-lost"
    assert "gone" in shown["problem"]["detail"]


async def test_a_job_that_holds_its_lease_is_not_gone_though_redis_is_too_full_to_take_its_record(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promote, "PAUSE_SECONDS", 0.01)
    job = Job("full", "toys", 2, "request", started=1.0, heard=1.0)
    await toys.store.leases.save_job("full", orjson.dumps(asdict(job)), 60.0)
    await eventually(lambda: _claimed(toys, "full"))
    assert (await toys.client.get("/v1/jobs/full")).json()["state"] == "running"
    await toys.store.leases.release("toys", "full")
    assert (await toys.client.get("/v1/jobs/full")).json()["state"] == "failed"


async def _claimed(service: Running, holder: str) -> bool:
    return await service.store.leases.claim("toys", holder, 60.0) == holder


async def test_a_job_whose_end_is_told_only_now_is_not_gone(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    leases, job = toys.store.leases, Job("late", "toys", 2, "request", started=1.0, heard=1.0)
    holder = leases.holder
    await leases.save_job("late", orjson.dumps(asdict(job)), 60.0)

    async def told_then(name: str) -> str | None:
        now = await holder(name)
        await leases.save_job("late", orjson.dumps(asdict(job) | {"state": "succeeded"}), 60.0)
        return now

    monkeypatch.setattr(promote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(leases, "holder", told_then)
    assert (await toys.client.get("/v1/jobs/late")).json()["state"] == "succeeded"


async def test_who_reads_that_a_job_has_ended_may_start_the_next_one(toys: Running) -> None:
    ended = Job("ended", "toys", 3, "request", state="failed", started=1.0, heard=1.0)
    await toys.store.leases.save_job("ended", orjson.dumps(asdict(ended)), 60.0)
    await eventually(lambda: _claimed(toys, "ended"))
    starting = asyncio.create_task(toys.promote(2))
    await asyncio.sleep(0.1)
    await toys.store.leases.release("toys", "ended")
    assert (await starting)["state"] == "succeeded"


async def test_a_job_that_ends_while_redis_does_not_answer_is_told_as_it_ended_when_redis_is_back(
    toys: Running, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await toys.load()
    monkeypatch.setattr(promote, "PAUSE_SECONDS", 0.01)
    elsewhere, leases, hung = Promotions(toys.models, other), toys.store.leases, False
    commit, switched = toys.models.commit_version, False

    def hanging(call: Any) -> Any:
        async def called(*args: Any) -> Any:
            if hung:
                raise StoreUnavailable("Redis did not answer in 0.12 s")
            return await call(*args)

        return called

    async def commit_and_hang(name: str, version: int) -> None:
        nonlocal hung, switched
        await commit(name, version)
        if version == 2 and not switched:  # what is served is committed again at each poll
            hung = switched = True

    for call in ("renew", "release", "save_job"):
        monkeypatch.setattr(leases, call, hanging(getattr(leases, call)))
    monkeypatch.setattr(toys.models, "commit_version", commit_and_hang)
    job = await toys.promote(2)
    assert job["state"] == "succeeded", "this replica knows"
    assert (await elsewhere.job(job["id"])).state == "running"
    hung = False

    async def told() -> bool:
        return (await elsewhere.job(job["id"])).state == "succeeded"

    await eventually(told)
    await eventually(lambda: _claimed(toys, "the next one"))


async def test_a_replica_stops_though_redis_does_not_answer(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "PAUSE_SECONDS", 0.01)
    tried = asyncio.Event()

    async def hung(*_: Any) -> None:
        tried.set()
        raise StoreUnavailable("Redis did not answer in 0.12 s")

    promotions = Promotions(toys.models, toys.store)
    job = await promotions.backfill("toys", 1)  # which has an index: nothing to do
    monkeypatch.setattr(toys.store.leases, "release", hung)
    await tried.wait()
    await promotions.stop()
    assert job.state == "succeeded"


async def test_a_backfill_outlasts_a_redis_that_is_away_for_seconds(tmp_path: Path, toy_registry: Path) -> None:
    registry = serving.copied(toy_registry, tmp_path / "r")
    (data := tmp_path / "data").mkdir()
    with EmbeddedRedis(data) as server:
        async with serving.running(registry, server.url) as service:
            await service.load()
            scan, away = service.store.scan, list[asyncio.Task[None]]()

            async def back() -> None:
                await asyncio.sleep(2.5)
                await asyncio.to_thread(server.start)

            async def scan_and_die(name: str, batch: int = 500) -> Any:
                async for items in scan(name, 10):
                    if not away:
                        await asyncio.to_thread(kill, server)
                        away.append(asyncio.create_task(back()))
                    yield items

            service.store.scan = scan_and_die  # type: ignore[method-assign]
            answer = await service.client.put("/v1/models/toys/aliases/champion", json={"version": 2})
            await eventually(lambda: _succeeded(service, answer.json()["job"]["id"]))
            assert away[0].done()
            found = (await post(service, "/v1/similar", {"id": "toy 3", "k": 39})).json()
            assert (found["model"], len(found["neighbors"])) == ("toys@2", 39)


async def _succeeded(service: Running, job_id: str) -> bool:
    job = (await service.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["state"] != "failed", job
    return bool(job["state"] == "succeeded")


async def test_an_items_life_over_a_switch_ends_right_whenever_it_was_put_or_deleted(
    toys: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put and deleted before, during and after a promotion and then a rollback: both versions know the same items."""
    await toys.load()
    scan, moments = toys.store.scan, ["before", "during", "after"]

    async def live(moment: str) -> None:
        assert (await toys.client.put(f"/v1/items/put {moment}", json={**TOY, "price": 11.5})).status_code == 201
        assert (await toys.client.put(f"/v1/items/again {moment}", json=TOY)).status_code == 200
        assert (await toys.client.delete(f"/v1/items/gone {moment}")).status_code == 204
        assert (await toys.client.delete(f"/v1/items/back {moment}")).status_code == 204
        assert (await toys.client.put(f"/v1/items/back {moment}", json=TOY)).status_code == 201

    async def scan_with_life(name: str, batch: int = 500) -> Any:
        began = False
        async for items in scan(name, 10):
            if not began:  # the items of this batch are read, their vectors not yet written
                began = True
                await live("during")
            yield items

    for moment in moments:
        for what in ("again", "gone", "back"):
            await toys.client.put(f"/v1/items/{what} {moment}", json={**TOY, "price": 44.0})
    await live("before")
    monkeypatch.setattr(toys.store, "scan", scan_with_life)
    assert (await toys.promote(2))["state"] == "succeeded"
    await live("after")

    kept = {f"{what} {moment}": TOY for what in ("again", "back") for moment in moments}
    kept |= {f"put {moment}": {**TOY, "price": 11.5} for moment in moments}
    for version in (2, 1):
        if version == 1:
            assert (await toys.promote(1))["progress"] == {"done": 0, "total": 0}, "a rollback encodes nothing"
        stored = np.array(await vectors_in_store(toys, version, list(kept)))
        assert np.abs(stored - of_version(toys, version, list(kept.values()))).max() <= 1e-6
        assert await vectors_in_store(toys, version, [f"gone {moment}" for moment in moments]) == [None] * 3
        found = (await post(toys, "/v1/similar", {"item": TOY, "k": 100})).json()
        assert found["model"] == f"toys@{version}"
        assert {n["id"] for n in found["neighbors"]} == {*ITEMS, *kept}
