"""A text column as the vectors of a sentence encoder that the user installs: `sentence_encoder` of kind text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.dense import DenseColumn, Floats
from itemvec.errors import SchemaError
from itemvec.lists import CommonScale, spaced
from itemvec.notes import Notes
from itemvec.schema import Text
from itemvec.values import canonical


@lru_cache(maxsize=4)
def sentence_encoder(name: str) -> Any:
    """The encoder, loaded once a process. Raises SchemaError with the way out."""
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 (optional, and it loads for seconds)
    except ImportError as error:
        raise SchemaError(
            f"sentence_encoder {name!r} wants a package that cannot be imported ({error}): "
            "pip install sentence-transformers"
        ) from None
    try:
        return SentenceTransformer(name)
    except Exception as error:  # whatever it is: there is no encoder
        why = " ".join(str(error).split())[:300]
        raise SchemaError(
            f"sentence_encoder {name!r} cannot be loaded: {why}. Give the folder of a saved model, or the name of one "
            "where it can be downloaded"
        ) from None


class SentenceColumn(DenseColumn):
    """A text as its sentence vector, of length 1 and then on the scale that its column has in common.

    It is not read back as text: the decoder gives the vector's numbers, and no words follow from them.
    """

    def __init__(self, feature: Text, mean: Sequence[float], std: float) -> None:
        """Raises SchemaError where the encoder cannot be loaded: then, and not at the first request."""
        self.feature: Text = feature
        self.scale = CommonScale(mean, std)
        self.width = len(self.scale.mean) + 1
        size = _encoded(feature, ["a"]).shape[1]
        if size != len(self.scale.mean):
            raise SchemaError(
                f"sentence_encoder {feature.sentence_encoder!r} gives vectors of {size} numbers; "
                f"this model was trained with one that gave {len(self.scale.mean)}"
            )

    @classmethod
    def fit(cls, feature: Text, column: pa.ChunkedArray) -> "SentenceColumn":
        written = column.filter(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0))
        texts = [text for value in spaced(written).to_pylist() if (text := _read(value, feature)) is not None]
        return cls(feature, **CommonScale.fit(_encoded(feature, texts)).state())

    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        name = self.feature.name
        out = np.zeros((len(values), self.width), np.float32)
        out[:, -1] = 1.0
        texts: dict[int, str] = {}
        for i, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                notes.wrong(i, name, "text", value)
            elif value is None or (text := _read(value, self.feature)) is None:
                notes.mark(name, "missing", i)
            else:
                texts[i] = text
        if texts:
            rows = list(texts)
            out[rows, :-1] = self.scale.scaled(_encoded(self.feature, list(texts.values())))
            out[rows, -1] = 0.0
        return out

    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return self.scale.state()


def _read(text: str, feature: Text) -> str | None:
    """None for white space. Halves of characters (lone surrogates), which no tokenizer takes, become question marks."""
    whole = text[: feature.max_characters].encode("utf-8", "replace").decode("utf-8")
    canonized: str | None = canonical(whole)
    return canonized


def _encoded(feature: Text, texts: list[str]) -> Floats:
    """(len(texts), size), each of length 1."""
    encoder = sentence_encoder(feature.sentence_encoder or "")
    vectors = encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    return np.nan_to_num(np.asarray(vectors, np.float64))  # of a text without a single known word some give NaN
