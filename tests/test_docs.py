"""Every setting, endpoint and metric is documented where its user looks. Prose can rot; names need not."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from itemvec.schema import Feature, Multi, Nominal, Numeric, Ordinal, Series, Text, Timestamp, Vector
from service.api import Api
from service.config import ServiceConfig
from service.metrics import Metrics
from service.releases import Releases
from training.config import TrainConfig
from training.retrain import RetrainConfig

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {
    "nominal": Nominal,
    "multi": Multi,
    "ordinal": Ordinal,
    "numeric": Numeric,
    "timestamp": Timestamp,
    "text": Text,
    "series": Series,
    "vector": Vector,
}


def table_of(file: str, heading: str) -> dict[str, str]:
    """First cell -> second cell of the table rows below a heading that starts so."""
    text = (DOCS / file).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {re.escape(heading)}.*$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#", section, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `([^`]+)` \|[ ]*([^|]*?)[ ]*\|", section, flags=re.MULTILINE))


@pytest.mark.parametrize(("heading", "kind"), KINDS.items())
def test_every_setting_of_a_kind_is_in_its_section_with_its_default(heading, kind):
    documented = table_of("schema.md", f"{heading}:")
    if kind is Multi:
        documented |= table_of("schema.md", "nominal:")
    own = {name: field for name, field in kind.model_fields.items() if name not in {*Feature.model_fields, "kind"}}
    assert set(documented) == set(own)
    for name, field in own.items():
        default = "none" if field.default is None else "" if field.is_required() else _shown(field.default)
        assert documented[name] == default, name


def _shown(value):
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def test_settings_of_every_kind_are_documented():
    assert set(table_of("schema.md", "Settings of every kind")) == {"kind", *Feature.model_fields} - {"name"}


def test_every_setting_of_the_service_is_documented_with_its_default():
    documented = table_of("service.md", "Settings")
    assert set(documented) == set(ServiceConfig.model_fields)
    for name, field in ServiceConfig.model_fields.items():
        if field.default_factory is None:
            assert documented[name] == ("none" if field.default is None else str(field.default)), name


def test_every_metric_is_documented_with_its_labels():
    counted = {}
    for family in Metrics()._registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        collector = Metrics()._registry._names_to_collectors[name]
        counted[name] = ", ".join(collector._labelnames)
    assert table_of("service.md", "Metrics") == counted


def test_every_call_is_in_the_readme():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    api = Api.__new__(Api)  # its table of operations needs none of its parts
    api._with_keys, api._releases = False, Releases.__new__(Releases)
    for operation in api.operations():
        if operation.path != "/docs/{file}":
            path = operation.path.replace("{version}", "{n}")
            assert path in readme, operation.name


def settings(model, prefix=""):
    """Name -> default, with dots for groups."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, _shown(field.default)


@pytest.mark.parametrize(("file", "model"), [("training.md", TrainConfig), ("retraining.md", RetrainConfig)])
def test_every_setting_of_training_is_documented_with_its_default(file, model):
    assert table_of(file, "Settings") == dict(settings(model))
