"""Item tables: Parquet, CSV or JSON Lines, from a local path or any fsspec URL, into Arrow."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from itemvec.errors import TableError

JSON_BLOCK = 64 << 20
"""Bytes that are parsed at once; a longer line is refused."""

FORMATS = {
    ".parquet": "Parquet",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
}


def read_table(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table at `url`; of `columns`, if given, those that it has. Raises TableError."""
    form = _format(url)
    try:
        with _open(url) as file:
            if form == "Parquet":
                parquet = pa.parquet.ParquetFile(file)
                present = parquet.schema_arrow.names
                return parquet.read([c for c in columns if c in present] if columns is not None else None)
            if form == "CSV":
                table = _read_csv(file, "\t" if PurePosixPath(url).suffix.lower() == ".tsv" else ",")
            else:
                table = pa.json.read_json(file, pa.json.ReadOptions(block_size=JSON_BLOCK))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise TableError(f"{url} is not {form} that can be read: {' '.join(str(error).split())}") from None
    return table.select([c for c in columns if c in table.column_names]) if columns is not None else table


def _read_csv(file: IO[bytes], delimiter: str) -> pa.Table:
    """Types are inferred, except that numbers written with leading zeros (`007`) are text, being codes or ids. Only
    an empty field is missing: `NA` may be Namibia."""

    def read(**types: Any) -> pa.Table:
        file.seek(0)
        return pa.csv.read_csv(
            file,
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(strings_can_be_null=True, null_values=[""], **types),
        )

    table = read()
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise pa.ArrowInvalid(f"columns named twice: {', '.join(twice)}")
    whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    if whole:
        text = read(include_columns=whole, column_types=dict.fromkeys(whole, pa.string()))
        codes = [name for name in whole if pc.any(pc.match_substring_regex(text[name], r"^[+-]?0\d")).as_py()]
        if codes:
            return read(column_types=dict.fromkeys(codes, pa.string()))
    return table


def rows(
    table: pa.Table, id_column: str, columns: Sequence[str], batch_size: int = 1024
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Ids and items of `table` in batches, with the values that an HTTP caller would send for them as JSON.

    Missing values are left out, times are ISO 8601, decimals are floats. Raises TableError for an id that is none.
    """
    kept = [c for c in columns if c in table.column_names]
    kind, blank = table.schema.field(id_column).type, table.column(id_column).null_count
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)) or blank:
        why = f"{blank} rows have none" if blank else f"the column is {kind}"
        raise TableError(f"the id column {id_column!r} must be text or whole numbers on every row: {why}")
    for batch in table.select([id_column, *kept]).to_batches(max_chunksize=batch_size):
        ids = [str(i) for i in batch.column(id_column).to_pylist()]
        values = [_as_json(batch.column(c)) for c in kept]
        if not kept:
            yield ids, [{} for _ in ids]
            continue
        yield (
            ids,
            [{c: v for c, v in zip(kept, row, strict=True) if v is not None} for row in zip(*values, strict=True)],
        )


def _as_json(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python's own times end at microseconds
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        return [None if v is None else v.isoformat() for v in values]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        if pa.types.is_floating(column.type.value_type) or pa.types.is_decimal(column.type.value_type):
            return [None if v is None else [None if x is None or x != x else float(x) for x in v] for v in values]
        return values
    if pa.types.is_decimal(column.type):
        return [None if v is None else float(v) for v in values]
    if pa.types.is_floating(column.type):
        return [None if v is None or v != v else v for v in values]
    return values


def table_digest(url: str) -> str:
    """sha256 of the file's bytes: equal digests, equal tables."""
    with _open(url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _format(url: str) -> str:
    suffix = PurePosixPath(url).suffix.lower()
    if suffix not in FORMATS:
        raise TableError(f"cannot tell the format of {url!r} by its ending {suffix!r}; known are {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _open(url: str) -> IO[bytes]:
    try:
        opened: IO[bytes] = fsspec.open(url, "rb").open()
    except FileNotFoundError:
        raise TableError(f"no table at {url}") from None
    except (OSError, ValueError, ImportError) as error:
        raise TableError(f"cannot read {url}: {error}") from None
    return opened
