"""What of the table reaches the store, when items also come and go by API."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import serving
from liveservice import LiveService
from serving import TOYS

from itemvec.client import Client
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from training.gate import Check
from training.ledger import digests, load_changed
from training.shadow import ShadowConfig, compare_answers

SCHEMA = FeatureSchema.from_yaml(serving.SCHEMA % "numeric")


@pytest.fixture
def client(tmp_path: Path, toy_registry: Path, empty_redis: str) -> Iterator[Client]:
    registry = serving.copied(toy_registry, tmp_path / "registry")
    with LiveService(registry, empty_redis).up() as service, Client(service.url) as client:
        yield client


def counts(client: Client, folder: Path, toys: list[dict[str, Any]], sync: bool = False) -> list[int]:
    """Created, updated, refused, deleted and unchanged."""
    told = load_changed(client, Registry(folder / "registry"), "toys", pa.Table.from_pylist(toys), [SCHEMA], sync)
    return [told[name] for name in ("created", "updated", "refused", "deleted", "unchanged")]


def test_only_new_and_changed_rows_are_loaded_and_the_api_has_the_last_word_on_the_others(
    client: Client, tmp_path: Path
) -> None:
    assert counts(client, tmp_path, TOYS) == [40, 0, 0, 0, 0]
    client.call("PUT", "/v1/items/toy%201", {"maker": "Nobel"})
    assert client.delete("toy 2", "toys") and not client.delete("toy 2", "toys")
    newer = [{**TOYS[0], "price": 99.0}, *TOYS[1:], {**TOYS[0], "sku": "toy 40"}]
    assert counts(client, tmp_path, newer) == [1, 1, 0, 0, 39]
    assert client.item("toy 0", "toys")["price"] == 99.0
    assert client.item("toy 1", "toys") == {"maker": "Nobel"}
    assert client.delete("toy 2", "toys") is False
    assert client.call("GET", "/v1/models/toys")["items"] == 40
    # Now the row of the deleted one changes, and so it comes back.
    newer[2] = {**TOYS[2], "price": 1.0}
    assert counts(client, tmp_path, newer) == [1, 0, 0, 0, 40]


def test_with_sync_items_whose_rows_are_gone_are_deleted_but_none_that_came_by_api(
    client: Client, tmp_path: Path
) -> None:
    counts(client, tmp_path, TOYS)
    client.call("PUT", "/v1/items/mine", {"maker": "Ada"})
    assert counts(client, tmp_path, TOYS[:38]) == [0, 0, 0, 0, 38]
    assert counts(client, tmp_path, TOYS[:37], sync=True) == [0, 0, 0, 3, 37]
    assert client.item("mine", "toys") == {"maker": "Ada"}
    assert client.call("GET", "/v1/models/toys")["items"] == 38


def test_what_is_refused_is_tried_again_and_a_store_that_lost_its_items_gets_them_all(
    client: Client, tmp_path: Path
) -> None:
    wrong = pa.Table.from_pylist(TOYS).drop_columns(["maker"]).append_column("maker", pa.array([[1]] * 40))
    told = load_changed(client, Registry(tmp_path / "registry"), "toys", wrong, [SCHEMA])
    assert (told["refused"], len(told["refusals"])) == (40, 20)
    assert counts(client, tmp_path, TOYS) == [40, 0, 0, 0, 0]
    assert counts(client, tmp_path, TOYS) == [0, 0, 0, 0, 40]
    for toy in TOYS:
        client.delete(toy["sku"], "toys")
    assert counts(client, tmp_path, TOYS) == [40, 0, 0, 0, 0]


def test_a_digest_is_of_the_values_and_not_of_the_order_of_columns() -> None:
    one = pa.table({"sku": ["a"], "maker": ["Ada"], "price": [1.0]})
    other = pa.table({"price": [1.0], "maker": ["Ada"], "sku": ["a"]})
    assert digests(one, "sku") == digests(other, "sku") != digests(one.drop_columns(["price"]), "sku")


def test_a_version_agrees_with_itself_and_its_time_is_told(client: Client, tmp_path: Path) -> None:
    counts(client, tmp_path, TOYS)
    client.backfill("toys", 2)
    ids = [*(toy["sku"] for toy in TOYS[:10]), "nobody"]
    figures, checks = compare_answers(client, "toys", 1, 2, ids, ShadowConfig())
    assert (figures["items"], checks) == (10, [])
    assert 0 < figures["overlap"] < 1
    assert 0 < figures["milliseconds"]["toys@2"]["p50"] <= figures["milliseconds"]["toys@2"]["p95"]
    _, checks = compare_answers(client, "toys", 1, 2, ids, ShadowConfig(overlap=1.0, latency=1000.0))
    assert [check.passed for check in checks] == [False, True]
    assert checks[0] == Check("shadow overlap@10", figures["overlap"], 1.0)
    assert compare_answers(client, "toys", 1, 2, ["nobody"], ShadowConfig(overlap=1.0)) == ({"items": 0}, [])
