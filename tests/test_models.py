"""Which version a replica serves, which it holds, and what it does when one cannot be loaded."""

import asyncio
import threading
from pathlib import Path

import pytest
import serving
from serving import TOY, Running, assert_problem, eventually, post

from itemvec.errors import ModelNotFound, RegistryError, StoreUnavailable, VersionCorrupt
from itemvec.registry import Registry
from itemvec.version import ModelVersion
from service.config import ServiceConfig
from service.models import LoadedModels
from service.problems import InvalidRequest
from service.store import Store

pytestmark = pytest.mark.anyio


def spoil(registry: Registry, version: int) -> None:
    with (registry.path("toys", version) / "encoder.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")


async def test_a_version_that_many_ask_for_is_loaded_once(toys: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], toys.registry.__class__.load

    def counted(self: Registry, ref: str, device: str = "cpu") -> ModelVersion:
        loads.append(ref)
        return load(self, ref, device)

    monkeypatch.setattr(Registry, "load", counted)
    versions = await asyncio.gather(*(toys.models.get("toys@2") for _ in range(20)))
    assert loads == ["toys@2"]
    assert all(version is versions[0] for version in versions)


async def test_only_the_versions_asked_for_last_are_held(tmp_path: Path, toy_registry: Path, empty_redis: str) -> None:
    async with serving.running(toy_registry, empty_redis, versions_kept=1) as service:
        two = await service.models.get("toys@2")
        assert await service.models.get("toys@2") is two
        await service.models.get("toys@3")
        assert await service.models.get("toys@2") is not two
        assert service.models.champion().ref == "toys@1"  # never among those that go


async def test_a_commit_moves_the_pointer_and_keeps_what_was_served(toys: Running) -> None:
    one = toys.models.champion()
    fingerprint = await toys.models.prepare_version("toys", 2)
    assert toys.models.champion() is one
    toys.registry.promote("toys", 2)
    await toys.models.commit_version("toys", 2)
    assert toys.models.champion().fingerprint == fingerprint
    assert await toys.models.get("toys@1") is one


async def test_a_corrupt_champion_is_not_served_the_previous_is(
    tmp_path: Path, toy_registry: Path, empty_redis: str
) -> None:
    folder = serving.copied(toy_registry, tmp_path / "r")
    registry = Registry(folder)
    registry.promote("toys", 2)
    spoil(registry, 2)
    async with serving.running(folder, empty_redis, searchable=False) as service:
        assert service.models.ready
        assert service.models.champion().ref == "toys@1"
        with pytest.raises(VersionCorrupt):
            await service.models.get("toys@2")


async def test_a_pinned_version_that_is_damaged_is_a_503_without_a_path_and_the_log_has_the_reason(
    toys: Running, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(toys.registry, 2)
    answer = await post(toys, "/v1/embeddings", {"input": [TOY], "model": "toys@2"})
    said = assert_problem(answer, 503)
    assert said["type"] == "urn:itemvec:problem:version-corrupt"
    assert said["detail"].startswith("toys@2 is not what was published")
    assert toys.registry.url not in answer.text
    assert "encoder.safetensors" in caplog.text


async def test_a_service_without_any_model_does_not_start(tmp_path: Path, toy_registry: Path, redis_url: str) -> None:
    folder = serving.copied(toy_registry, tmp_path / "r")
    spoil(Registry(folder), 1)
    garbage = serving.copied(toy_registry, tmp_path / "g")
    (garbage / "toys" / "aliases.json").write_text("[]")
    for root, error in ((tmp_path / "empty", RegistryError), (garbage, RegistryError), (folder, VersionCorrupt)):
        config = ServiceConfig.read(registry=str(root), redis_url=redis_url)
        async with Store(redis_url, timeout=serving.PATIENCE) as store:
            models = LoadedModels(Registry(root), store, config)
            with pytest.raises(error):
                await models.start()
            assert not models.ready
            await models.stop()


async def test_a_model_that_is_published_later_is_served_too(
    tmp_path: Path, toy_registry: Path, empty_redis: str
) -> None:
    async with serving.running(serving.copied(toy_registry, tmp_path / "r"), empty_redis, model="toys") as service:
        serving.publish(service.registry, 9, alias="champion", name="games")

        async def served() -> bool:
            return "games" in service.models.serving

        await eventually(served)
        assert (await service.models.get("games")).ref == "games@1"
        answer = await service.client.post("/v1/embeddings", json={"input": [TOY], "model": "games"})
        assert answer.json()["model"] == "games@1"
        assert service.models.champion().ref == "toys@1"


async def test_a_young_replica_does_not_wait_for_its_poll(tmp_path: Path, toy_registry: Path, empty_redis: str) -> None:
    folder = serving.copied(toy_registry, tmp_path / "r")
    async with serving.running(folder, empty_redis, model="toys", registry_poll_seconds=60.0) as service:
        serving.publish(service.registry, 9, alias="champion", name="games")

        async def served() -> bool:
            return "games" in service.models.serving

        await eventually(served)


async def test_a_registry_that_does_not_answer_once_is_followed_again(
    tmp_path: Path, toy_registry: Path, empty_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, failures = Registry.names, iter([OSError("a disk"), RegistryError("an object store")])

    def failing(self: Registry) -> list[str]:
        for error in failures:
            raise error
        return names(self)

    async with serving.running(serving.copied(toy_registry, tmp_path / "r"), empty_redis, model="toys") as service:
        monkeypatch.setattr(Registry, "names", failing)
        serving.publish(service.registry, 9, alias="champion", name="games")

        async def served() -> bool:
            return "games" in service.models.serving

        await eventually(served)
        assert not list(failures)


async def test_among_several_models_a_request_must_name_one(
    tmp_path: Path, toy_registry: Path, empty_redis: str
) -> None:
    folder = serving.copied(toy_registry, tmp_path / "r")
    serving.publish(Registry(folder), 9, alias="champion", name="games")
    async with serving.running(folder, empty_redis, searchable=False) as service:
        with pytest.raises(InvalidRequest, match="games, toys"):
            service.models.champion()
        assert service.models.champion("games").ref == "games@1"
        with pytest.raises(ModelNotFound):
            service.models.champion("none")


async def test_until_its_first_index_is_there_the_store_is_filling(toy_registry: Path, empty_redis: str) -> None:
    store = Store(empty_redis, timeout=serving.PATIENCE)
    config = ServiceConfig.read(registry=str(toy_registry), redis_url=empty_redis)
    models = LoadedModels(Registry(toy_registry), store, config)
    await models.start()
    assert models.ready
    assert not await models.is_searchable(models.champion())
    with pytest.raises(StoreUnavailable, match="still being filled"):
        await models.check_searchable(models.champion())
    await models.stop()
    await store.close()


@pytest.mark.parametrize("threads", [1, 2])
async def test_as_many_requests_of_many_items_are_encoded_at_once_as_there_are_threads(
    toy_registry: Path, empty_redis: str, threads: int
) -> None:
    at_work, most, let_go = 0, 0, threading.Event()

    def work() -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        let_go.wait(20)
        at_work -= 1

    async with serving.running(toy_registry, empty_redis, encode_threads=threads) as service:
        requests = [asyncio.create_task(service.models.compute(1000, work)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert at_work == threads
        let_go.set()
        await asyncio.gather(*requests)
        assert most == threads
