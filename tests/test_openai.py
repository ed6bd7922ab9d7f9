"""OpenAI's own Python client against `/v1/embeddings` and `/v1/models`, as people would use it."""

from collections.abc import AsyncIterator

import httpx2
import numpy as np
import openai
import pytest
from serving import DIM, ITEMS, TOY, Running

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(toys: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    http = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app=toys.app))
    async with openai.AsyncOpenAI(
        base_url="http://toys.test/v1", api_key="any", http_client=http, max_retries=0
    ) as client:
        yield client


async def test_its_default_form_and_floats_are_the_vectors_of_the_model(
    client: openai.AsyncOpenAI, toys: Running
) -> None:
    items = list(ITEMS.values())[:3]
    wanted = toys.models.champion().encode(items).vectors
    for settings in ({}, {"encoding_format": "base64"}, {"encoding_format": "float"}):
        answer = await client.embeddings.create(input=items, model="toys", **settings)
        assert answer.model == "toys@1"
        assert [data.index for data in answer.data] == [0, 1, 2]
        if settings.get("encoding_format") != "base64":  # asked for by name, the client leaves it packed
            assert np.array([data.embedding for data in answer.data]) == pytest.approx(wanted, abs=1e-6)


async def test_fewer_dimensions_are_the_first_numbers_at_length_1(client: openai.AsyncOpenAI, toys: Running) -> None:
    whole = toys.models.champion().encode([TOY]).vectors[0]
    for size in (1, 4, DIM):
        answer = await client.embeddings.create(input=[TOY], model="toys", dimensions=size)
        got = answer.data[0].embedding
        assert got == pytest.approx(whole[:size] / np.linalg.norm(whole[:size]), abs=1e-6)
    with pytest.raises(openai.UnprocessableEntityError, match="toys@1 has 8"):
        await client.embeddings.create(input=[TOY], model="toys", dimensions=DIM + 1)


async def test_what_is_odd_about_an_item_reaches_the_caller(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(input=[{"maker": "Nobel"}], model="toys@champion")
    assert answer.data[0].columns["maker"] == "oov"


async def test_text_is_refused_with_what_to_send_instead(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="expected a list of items"):
        await client.embeddings.create(input="a wooden car", model="toys")
    with pytest.raises(openai.UnprocessableEntityError, match="expected an item, as an object"):
        await client.embeddings.create(input=["a wooden car"], model="toys")
    with pytest.raises(openai.NotFoundError, match="no model 'text-embedding-3-small'"):
        await client.embeddings.create(input=[TOY], model="text-embedding-3-small")


async def test_models_are_listed_and_read(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["toys"]
    assert (await client.models.retrieve("toys")).owned_by == "itemvec"
