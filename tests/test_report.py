import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_findings import COLUMN, GOOD
from test_plots import history

from training.baselines import BASELINES
from training.exhibits import Coloring, Exhibits
from training.report import render

ALONE = {"meta", "br", "input", "link", "img"}
"""HTML elements without an end."""


class Page(HTMLParser):
    """Elements with their attributes, and texts; fails where an end has no beginning."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


NAMES = [f"a column of a table that has a rather long name & a number <{n}>" for n in range(17)]
LEVEL = {"recall": 0.2, "ndcg": 0.1, "pm_auc": 0.6}
EVALUATION = {
    **GOOD,
    "rows": {"train": 9000, "validation": 500, "test": 1000, "measured": 1000, "searched": 2000, "fitted": 4000},
    "columns": {
        name: {**COLUMN, "r_precision": {k: COLUMN[k] for k in ("score", "pca", "majority", "inferred")}}
        for name in NAMES
    },
    "retrieval": {**GOOD["retrieval"], "columns": dict.fromkeys(NAMES[:12], GOOD["retrieval"]["mean"])},
    "cold_start": {
        "k": 20,
        "users": 1234,
        "warm_items": 800,
        "cold_items": 90,
        **dict.fromkeys(("model", *BASELINES, "chance"), LEVEL),
    },
    "parent": {"version": 6, "k": 10, "overlap": 0.71, "compatibility": 0.93, "cross_recall": 0.66},
    "predict": {"revenue": {"metric": "R2", "score": 0.4, "majority": 0.0, "rows": 700}},
    "training": {"best_epoch": 3, "epochs": 3, "parameters": 12345, "history": history(NAMES)},
    "seconds": {"loop": 12.5},
    "gate": {
        "champion": 6,
        "checks": [{"name": "effective rank", "new": 20.0, "champion": 19.0, "limit": 9.5, "at_most": False}],
    },
}
EXHIBITS = Exhibits(
    samples=[{"id": "tt1", "neighbors": [{"id": "tt2", "score": 0.9123}]}],
    described={"tt1": ("Alien", "genres: Horror"), "tt2": ("<b>Aliens</b>", "genres: Action")},
    among=2000,
    points=np.array([[0.0, 0.0], [1.0, 1.0]], np.float32),
    names=["Alien", "<b>Aliens</b>"],
    colorings=[
        Coloring(NAMES[0], ["Horror", "Action"], False, [0, 1]),
        Coloring("year", ["1979", "1986"], True, [0, None]),
    ],
)


@pytest.fixture(scope="module")
def page():
    return Page(render("movies@7", EVALUATION, EXHIBITS))


def test_the_page_needs_nothing_but_itself(page):
    assert not page.all("script") and not page.all("link") and not page.all("img")
    links = [a for _, attributes in page.elements for n, a in attributes.items() if n in {"href", "src", "xlink:href"}]
    assert links and all(link.startswith("#") for link in links)
    assert "url(http" not in " ".join(page.texts) and "@import" not in " ".join(page.texts)


def test_links_within_the_page_lead_somewhere(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= ids
    assert {label["for"] for label in page.all("label")} <= ids


def test_every_column_has_its_row_with_its_whole_name(page):
    for name in NAMES:
        assert page.texts.count(name) >= 1, name


def test_what_an_item_is_called_is_text_and_never_markup(page):
    assert "<b>Aliens</b>" in " ".join(page.texts)
    assert [text for text in page.texts if text == "Aliens"] == []


def test_the_map_has_a_point_with_a_name_for_each_item_and_a_button_for_each_column(page):
    points = page.all("circle")
    assert [(p["cx"], p["cy"], p["class"]) for p in points] == [("10", "10", "a0 b0"), ("990", "690", "a1")]
    buttons = [i for i in page.all("input") if i["type"] == "radio"]
    assert len(buttons) == 2 and sum("checked" in button for button in buttons) == 1


def test_the_words_say_what_was_sampled_and_what_the_gate_compared(page):
    said = re.sub(r"\s+", " ", " ".join(page.texts))
    for words in (
        "judged on 1,000 of 1,000",
        "searched among 2,000 items",
        "fitted on 4,000",
        "1,234 users",
        "R-precision",
        "agrees on 71% of the 10 nearest",
        "least allowed 9.5",
        "R2, 700 items",
        "2 held-out items",
    ):
        assert words in said, words


def test_a_figure_that_a_baseline_beats_is_marked_and_others_are_not():
    def marks(score):
        columns = {"genres": {**COLUMN, "score": score}}
        return render("movies@7", {**EVALUATION, "columns": columns}, None).count("&#9660;</b>")

    assert marks(0.5) == marks(0.8) + 1  # PCA is at 0.6


def test_a_bare_evaluation_without_likes_parent_history_or_labels_is_a_page_too():
    bare = {k: v for k, v in EVALUATION.items() if k not in {"training", "seconds", "gate", "predict"}}
    nothing = {"k": 10, "columns": {}, "mean": {}}
    unseen = {"columns": {}, "share": 0.0, "precision": None, "precision_of_others": None}
    missing = dict.fromkeys(("score", "inferred", "majority", "pca"))
    bare |= {"cold_start": None, "parent": None, "retrieval": nothing, "out_of_vocabulary": unseen}
    page = Page(render("t@1", {**bare, "columns": {"size": {**COLUMN, "metric": "R2", **missing}}}, None))
    assert "No column of labels, or too few items: nothing to measure." in page.texts
    assert not page.all("circle")
