import pytest

from itemvec.errors import SchemaError
from itemvec.schema import FeatureSchema, Multi, Ordinal

FILMS = """
name: films
id: tt
features:
  genres: {kind: multi, separator: "|"}
  age: {kind: ordinal, order: [G, PG, R]}
  year: {kind: numeric, scale: log}
  shown: {kind: timestamp}
  plot: {kind: text, buckets: 64}
  studio: {kind: nominal, min_count: 5}
  views: {kind: series, points: 4}
  poster: {kind: vector, size: 3}
"""


def test_a_schema_reads_what_it_wrote():
    schema = FeatureSchema.from_yaml(FILMS)
    assert FeatureSchema.from_yaml(schema.to_yaml()) == schema
    assert [f.kind for f in schema.features] == [
        "multi",
        "ordinal",
        "numeric",
        "timestamp",
        "text",
        "nominal",
        "series",
        "vector",
    ]


def test_settings_are_written_out_so_that_a_later_default_cannot_change_a_model():
    assert "min_count: 2" in FeatureSchema.from_yaml("name: a\nid: i\nfeatures: {x: {kind: nominal}}").to_yaml()


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("{x: {kind: numbers}}", "features.x: kind 'numbers' is none of nominal, ordinal, multi"),
        ("{x: {}}", "features.x: has no kind"),
        ("{x: {kind: numeric, scael: log}}", "features.x.scael: no such setting; did you mean scale?"),
        (
            "{x: {kind: numeric, buckets: 8}}",
            "features.x.buckets: no such setting; there is weight, filterable, kind, ",
        ),
        ("{weigth: {kind: nominal, text: 1}}", "features.weigth.text: no such setting; there is weight, "),
        ("{x: {kind: ordinal, order: [a, a]}}", "names a label twice"),
        ("{x: {kind: multi, dtype: integer, separator: ','}}", "a separator splits strings"),
        ("{x: {kind: text, words: 0, characters: null}}", "leave nothing to read"),
        ("{x: {kind: text, characters: [4, 2]}}", "shortest <= longest"),
        ("{i: {kind: nominal}}", "the id column 'i' cannot be a feature"),
        ("{id: {kind: nominal}}", "a feature cannot be named 'id', as over HTTP that is 'i'"),
        ("{}", "at least 1"),
        ("{x: {kind: nominal, labels: [a, ' a']}}", "the labels name a label twice"),
        ("{x: {kind: nominal, labels: [a, 1]}}", "the labels are of dtype string, and 1 is not"),
        ("{x: {kind: multi, dtype: integer, labels: [1, true]}}", "the labels are of dtype integer, and True is not"),
        ("{x: {kind: nominal, labels: [a, ' ']}}", "the labels name an empty label"),
        ("{x: {kind: nominal, labels: []}}", "at least 1"),
        ("{x: {kind: nominal, max_labels: 0}}", "give hash_buckets for them to share"),
        ("{x: {kind: numeric, clip: 0.5}}", "less than 0.5"),
        ("{x: {kind: numeric, bins: 300}}", "less than or equal to 256"),
        ("{x: {kind: series, points: 0}}", "greater than or equal to 1"),
        ("{x: {kind: vector}}", "features.x.size: Field required"),
        ("{x: {kind: text}, x: {kind: numeric}}", "'x' stands twice"),
    ],
)
def test_a_mistake_is_named_by_its_place_in_one_line(features, said):
    with pytest.raises(SchemaError) as caught:
        FeatureSchema.from_yaml(f"name: a\nid: i\nfeatures: {features}", source="s.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value) and "s.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["Films", "a/b", "a@b", "", "a b", "..", "x" * 65])
def test_a_model_name_is_safe_in_paths_keys_and_urls(name):
    with pytest.raises(SchemaError, match=r"name: .* is not up to 64 of a-z, 0-9"):
        FeatureSchema.from_yaml(f"name: {name!r}\nid: i\nfeatures: {{x: {{kind: text}}}}")


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(SchemaError, match="itemvec schema infer"):
        FeatureSchema.load(tmp_path / "none.yaml")


def test_text_that_is_not_yaml_is_refused(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("name: [")
    with pytest.raises(SchemaError, match="is not YAML"):
        FeatureSchema.load(path)
    path.write_text("- a")
    with pytest.raises(SchemaError, match="must be a mapping"):
        FeatureSchema.load(path)


def test_json_schema_names_each_feature_and_lets_it_be_null():
    films = FeatureSchema.from_yaml(FILMS).json_schema()
    assert films["properties"]["year"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
    assert {"type": "string"} in films["properties"]["genres"]["anyOf"][0]["anyOf"]
    views, poster = (films["properties"][name]["anyOf"][0] for name in ("views", "poster"))
    assert views == {"type": "array", "items": {"type": ["number", "null"]}}
    assert poster == {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}


def test_a_text_with_a_sentence_encoder_needs_no_n_grams():
    schema = "name: a\nid: i\nfeatures: {x: {kind: text, words: 0, characters: null, sentence_encoder: m}}"
    assert FeatureSchema.from_yaml(schema).feature("x").sentence_encoder == "m"


def test_an_unknown_feature_is_answered_with_those_there_are():
    with pytest.raises(SchemaError, match="it has genres, age"):
        FeatureSchema.from_yaml(FILMS).feature("genre")
    assert isinstance(FeatureSchema.from_yaml(FILMS).feature("age"), Ordinal)
    assert Multi(name="x").separator is None


def test_a_feature_beside_the_features_is_told_as_such():
    with pytest.raises(SchemaError, match=r"text: no such setting; there is name, id, features"):
        FeatureSchema.from_yaml("name: a\nid: i\ntext: {kind: text}\nfeatures: {x: {kind: nominal}}")
