"""Columns read back from an embedding: what each head's scores mean, worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from serving import DIM, ITEMS, TOY, Running, assert_problem, post

from itemvec.features import FIRST, MISSING, OOV
from service.decode import decode

pytestmark = pytest.mark.anyio


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def read(toys: Running) -> Any:
    """Sets the decoder to answer with given scores whatever the embedding is, and decodes."""
    version = toys.models.champion()
    decoder, transform = version.decoder, version.transform
    slots = {slot.name: slot for slot in (*transform.layout.bags, *transform.layout.dense)}
    with torch.no_grad():
        decoder.row_weight.zero_()
        decoder.row_bias.fill_(-9.0)
        decoder.dense_head.weight.zero_()
        decoder.dense_head.bias.zero_()

    def answer(column: str, scores: dict[Any, float], top: int = 5) -> dict[str, Any]:
        slot = slots[column]
        with torch.no_grad():
            for place, score in scores.items():
                if hasattr(slot, "base"):
                    decoder.row_bias[slot.base + place] = score
                else:
                    decoder.dense_head.bias[slot.flag if place == MISSING else slot.start + place] = score
        return decode(version, np.full((1, DIM), DIM**-0.5, np.float32), top)[0][column]

    return answer


async def test_a_label_is_a_choice_among_the_rows_of_its_column(read: Any, toys: Running) -> None:
    labels = toys.models.champion().transform.column("maker").vocabulary.labels
    got = read(
        "maker", {OOV: -99, MISSING: 0, FIRST: math.log(2), FIRST + 1: math.log(5), FIRST + 2: -99, FIRST + 3: -99}, 2
    )
    assert got["value"] == labels[1]
    assert got["missing"] == pytest.approx(1 / 8)  # 1 : 2 : 5, and 2 : 5 where it is not missing
    assert [one["value"] for one in got["candidates"]] == [labels[1], labels[0]]
    assert [one["probability"] for one in got["candidates"]] == pytest.approx([5 / 7, 2 / 7])


async def test_each_label_of_a_set_is_there_or_not(read: Any, toys: Running) -> None:
    labels = toys.models.champion().transform.column("tags").vocabulary.labels
    got = read("tags", {MISSING: -2.0, FIRST: 1.0, FIRST + 1: -1.0, FIRST + 2: 3.0}, top=3)
    assert got["value"] == [labels[2], labels[0]]
    assert got["missing"] == pytest.approx(sigmoid(-2))
    assert [one["probability"] for one in got["candidates"]] == pytest.approx([sigmoid(3), sigmoid(1), sigmoid(-1)])


async def test_an_order_is_read_step_by_step(read: Any) -> None:
    # Above "3+": .8, above "6+": .3. So "3+" .2, "6+" .8 - .3 = .5, "12+" .3. The first step is no question.
    logit = {p: math.log(p / (1 - p)) for p in (0.8, 0.3)}
    got = read("age", {MISSING: 0.0, FIRST: 7.0, FIRST + 1: logit[0.8], FIRST + 2: logit[0.3]})
    assert got["value"] == "6+"
    assert got["missing"] == pytest.approx(0.5)
    chances = {one["value"]: one["probability"] for one in got["candidates"]}
    assert chances == pytest.approx({"3+": 0.2, "6+": 0.5, "12+": 0.3})


async def test_steps_that_contradict_each_other_give_no_negative_chance(read: Any) -> None:
    got = read("age", {FIRST + 1: -1.0, FIRST + 2: 2.0})  # above "6+" cannot be likelier than above "3+"
    chances = {one["value"]: one["probability"] for one in got["candidates"]}
    assert chances == pytest.approx({"3+": 1 - sigmoid(-1), "6+": 0.0, "12+": sigmoid(-1)})


async def test_a_number_comes_back_in_its_own_unit(read: Any) -> None:
    prices = np.array([item["price"] for item in ITEMS.values()])
    got = read("price", {0: 0.5, MISSING: -1.0})
    assert got["value"] == pytest.approx(prices.mean() + 0.5 * prices.std(), rel=1e-5)
    assert got["missing"] == pytest.approx(sigmoid(-1))
    assert "candidates" not in got


async def test_columns_come_in_the_order_of_the_schema_without_text(toys: Running) -> None:
    embedding = (await post(toys, "/v1/embeddings", {"input": [TOY]})).json()["data"][0]["embedding"]
    body = (await post(toys, "/v1/decode", {"embedding": embedding})).json()
    assert (body["model"], body["fingerprint"]) == ("toys@1", toys.models.champion().fingerprint)
    assert list(body["data"][0]["columns"]) == ["maker", "tags", "price", "age", "added"]
    assert body["data"][0]["columns"]["added"]["value"].startswith("20")


async def test_many_embeddings_are_decoded_as_each_alone(toys: Running) -> None:
    items = list(ITEMS.values())[:3]
    data = (await post(toys, "/v1/embeddings", {"input": items, "encoding_format": "base64"})).json()["data"]
    packed = [one["embedding"] for one in data]
    together = (await post(toys, "/v1/decode", {"embeddings": packed, "top": 1})).json()["data"]
    assert [one["index"] for one in together] == [0, 1, 2]
    for one, embedding in zip(together, packed, strict=True):
        alone = (await post(toys, "/v1/decode", {"embedding": embedding, "top": 1})).json()["data"][0]
        for name, column in alone["columns"].items():
            assert one["columns"][name]["value"] == column["value"] or name in {"price", "added"}
            assert one["columns"][name]["missing"] == pytest.approx(column["missing"], abs=1e-6)


UNIT = [1.0] + [0.0] * (DIM - 1)
WRONG: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "nothing": ({}, 422, ""),
    "both": ({"embedding": UNIT, "embeddings": [UNIT]}, 422, ""),
    "embeddings not a list": ({"embeddings": "x"}, 422, "/embeddings"),
    "no embeddings": ({"embeddings": []}, 422, "/embeddings"),
    "too many": ({"embeddings": [UNIT] * 101}, 422, "/embeddings"),
    "of the wrong size": ({"embeddings": [UNIT, [1.0]]}, 422, "/embeddings/1"),
    "without direction": ({"embedding": [0.0] * DIM}, 422, "/embedding"),
    "of text": ({"embeddings": [UNIT, ["1"] * DIM]}, 422, "/embeddings/1/0"),
    "null": ({"embedding": None}, 422, "/embedding"),
    "top = 0": ({"embedding": UNIT, "top": 0}, 422, "/top"),
    "a misspelt field": ({"embeding": UNIT}, 422, "/embeding"),
    "of another version": ({"embedding": UNIT, "fingerprint": "0123456789abcdef"}, 422, "/fingerprint"),
    "a fingerprint that is none": ({"embedding": UNIT, "fingerprint": 7}, 422, "/fingerprint"),
    "an unknown model": ({"embedding": UNIT, "model": "nobody"}, 404, None),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_cannot_be_decoded_is_told_with_its_place(toys: Running, case: str) -> None:
    body, status, pointer = WRONG[case]
    assert_problem(await post(toys, "/v1/decode", body), status, pointer)
