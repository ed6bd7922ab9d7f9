import sys

import numpy as np
import pytest
from fitting import dense, fitted, status

from itemvec import sentences
from itemvec.errors import InvalidItem, SchemaError, SchemaMismatch
from itemvec.features import FeatureTransform

# Texts become unit vectors: how often each of four letters occurs. What ends in "broken" is no model.
LIBRARY = """
import numpy as np

class SentenceTransformer:
    def __init__(self, name):
        if name.endswith("broken"):
            raise OSError(f"no file named model.safetensors in {name}")
        self.letters = "abcd"[: 3 if name.endswith("smaller") else 4]

    def encode(self, sentences, normalize_embeddings=False, show_progress_bar=None):
        vectors = np.array([[s.count(letter) for letter in self.letters] for s in sentences], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize_embeddings else vectors
"""
TEXTS = ["aaa", "bbb", "", None]
SETTINGS = "kind: text, sentence_encoder: /models/letters"


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "sentence_transformers.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    sentences.sentence_encoder.cache_clear()
    yield
    sentences.sentence_encoder.cache_clear()
    sys.modules.pop("sentence_transformers", None)


@pytest.mark.usefixtures("library")
def test_a_text_is_the_vector_of_the_sentence_encoder_on_a_common_scale():
    plot = fitted(SETTINGS, TEXTS)
    assert [(slot.kind, slot.width, slot.targets) for slot in plot.layout.dense] == [("text", 5, 4)]
    assert plot.layout.bags == ()
    # (1, 0, 0, 0) and (0, 1, 0, 0): means 0.5, 0.5, 0, 0; variances 1/4, 1/4, 0, 0, on average 1/8.
    assert dense(plot, "aaa") == pytest.approx([0.5 * 8**0.5, -0.5 * 8**0.5, 0, 0, 0])
    assert dense(plot, " a") == dense(plot, "aaa")


@pytest.mark.usefixtures("library")
def test_a_text_without_words_or_of_words_that_the_encoder_does_not_know_is_finite():
    plot = fitted(SETTINGS, TEXTS)
    assert dense(plot, " ") == dense(plot, None) == [0, 0, 0, 0, 1] and status(plot, "") == "missing"
    with np.errstate(invalid="ignore"):
        assert np.isfinite(dense(plot, "xyz")).all()
    assert np.isfinite(dense(plot, "a\ud800")).all()
    with pytest.raises(InvalidItem):
        dense(plot, 7)


@pytest.mark.usefixtures("library")
def test_a_saved_sentence_column_gives_the_same_numbers(tmp_path):
    plot = fitted(SETTINGS, TEXTS)
    plot.save(tmp_path / "transform")
    loaded = FeatureTransform.load(tmp_path / "transform", plot.schema)
    assert loaded.digest() == plot.digest() and dense(loaded, "abc") == dense(plot, "abc")
    assert loaded.column("x").decode(np.zeros(4)) is None


@pytest.mark.usefixtures("library")
def test_an_encoder_that_gives_other_vectors_now_is_refused_when_the_model_is_loaded(tmp_path):
    plot = fitted(SETTINGS, TEXTS)
    plot.save(tmp_path / "transform")
    [text] = plot.schema.features
    changed = text.model_copy(update={"sentence_encoder": "/models/smaller"})
    with pytest.raises(SchemaError, match="vectors of 3 numbers; this model was trained with one that gave 4"):
        FeatureTransform.load(tmp_path / "transform", plot.schema.model_copy(update={"features": (changed,)}))


@pytest.mark.usefixtures("library")
def test_an_encoder_that_cannot_be_loaded_says_why():
    with pytest.raises(SchemaError, match=r"'/models/broken' cannot be loaded: no file named model\.safetensors"):
        fitted("kind: text, sentence_encoder: /models/broken", TEXTS)


def test_without_the_package_the_table_does_not_fit_and_a_saved_model_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SchemaMismatch, match="pip install sentence-transformers"):
        fitted(SETTINGS, TEXTS)
    sentences.sentence_encoder.cache_clear()
    with pytest.raises(SchemaError, match="pip install sentence-transformers"):
        sentences.sentence_encoder("/models/letters")
