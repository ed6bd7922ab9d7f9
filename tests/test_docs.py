"""Every setting, endpoint and metric is documented where its user looks. Prose can rot; names need not."""

import re
from pathlib import Path

import pytest

from itemvec.schema import Feature, Multi, Nominal, Numeric, Ordinal, Text, Timestamp

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {"nominal": Nominal, "multi": Multi, "ordinal": Ordinal, "numeric": Numeric, "timestamp": Timestamp, "text": Text}


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
