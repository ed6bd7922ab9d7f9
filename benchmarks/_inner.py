"""Tables without the rows that are judged: what settings may be compared on."""

import pyarrow as pa

from training.folds import TEST, fold_of


def without_judged(table: pa.Table, id_column: str, share: float) -> pa.Table:
    """The rows whose id is not in the held-out `share`, under other ids: the same hash now holds out others of them."""
    ids = [str(i) for i in table.column(id_column).to_pylist()]
    others = pa.array(fold_of(ids, share, 0.0) != TEST)
    place = table.column_names.index(id_column)
    return table.set_column(place, id_column, pa.array([f"inner {i}" for i in ids])).filter(others)
