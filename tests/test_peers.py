"""The encoder that peers in the benchmarks have: another way to the same vectors, or comparing says nothing."""

import films
import numpy as np
import torch

from benchmarks.peers.films import Plain
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion


def test_the_plain_encoder_gives_the_vectors_that_itemvec_gives():
    features = [feature for feature in films.SCHEMA.features if feature.kind != "ordinal"]
    transform = FeatureTransform.fit(films.table(), FeatureSchema(name="films", id="id", features=features))
    torch.manual_seed(0)
    config = EncoderConfig(dim=8, hidden=(16,))
    networks = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    lineage = Lineage(table="films", table_sha256="", table_rows=0, train_rows=0, config={})
    version = ModelVersion.make("films", 1, transform, *networks, {}, lineage)
    items = films.table(seed=1).drop_columns(["id", "rating"]).to_pylist()
    items += [{**items[0], "provider": "unheard of", "genres": ["Noir", "Noir", "War", "Drama"], "cast": []}]
    assert np.allclose(Plain(version)(items), version.encode(items).vectors, atol=1e-5)
