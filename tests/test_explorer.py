"""The page at `/`. What it does in a browser is not tested here; that it may do it, and needs nothing else, is."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from serving import Running

pytestmark = pytest.mark.anyio

VOID = {"meta", "input"}


class Page(HTMLParser):
    """What the tests ask of a page: is every element closed, and what is linked, labelled and named."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.inputs: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "action") if name in found]
        if tag == "label":
            self.labelled.add(found["for"])
        if tag in {"input", "select"}:
            self.inputs.append(found["id"])
        assert not any(name.startswith("on") or name == "style" for name in found), "the policy forbids these"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_is_whole_and_every_input_has_its_label(toys: Running) -> None:
    answer = await toys.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(answer.text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.inputs) <= page.labelled
    assert '<html lang="en">' in answer.text
    script = re.findall("<script>(.*?)</script>", answer.text, flags=re.DOTALL)[0]
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= set(page.ids)  # it looks for nothing that is not there


async def test_the_page_comes_from_here_alone_and_its_policy_allows_just_that(toys: Running) -> None:
    answer = await toys.client.get("/")
    page = Page(answer.text)
    assert "//" not in re.sub(r"^\s*//.*$", "", answer.text, flags=re.MULTILINE)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'self'" in policy
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, flags=re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for link in page.links:
        assert (await toys.client.get("/" + link)).status_code == 200


async def test_the_calls_of_the_page_are_calls_of_the_service(toys: Running) -> None:
    text = (await toys.client.get("/")).text
    paths = (await toys.client.get("/openapi.json")).json()["paths"]
    called = {re.sub(r"\$\{.*", "", path) for path in re.findall(r"""["`](v1/[^"`?]*)""", text)}
    assert called == {"v1/items/", "v1/models/", "v1/models", "v1/similar"}
    assert all(any(path.startswith("/" + one) for path in paths) for one in called)
