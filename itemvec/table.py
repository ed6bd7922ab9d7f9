"""Item tables: Parquet, CSV or JSON Lines, from a local path or any fsspec URL, into Arrow.

A table is a file, or a folder of files of one format.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
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


BATCH = 65_536
"""Rows of a table that is read piece by piece."""

STREAMED_BYTES = 1 << 30
"""CSV and JSON Lines beyond are read piece by piece; below, all of a file decides what its columns are."""

HASHED_BYTES = 1 << 30
"""Tables elsewhere that are larger are told apart by what their storage says of them: to read them twice would cost
more than to train on one that did not change."""


HASHED_AT_ONCE = 4
"""Files that are read at once for a digest: storage elsewhere makes one wait."""


def files_of(url: str) -> list[str]:
    """The files that make up a table, by name: itself, or those of a folder and the folders in it. Raises TableError
    where there is none, or where they are of several formats."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if url.startswith(("http:", "https:")) or not fs.isdir(path):
            return [url]
        found = fs.find(path)
    except Exception as error:  # each storage has its own
        raise TableError(f"cannot read {url}: {' '.join(str(error).split())}") from None
    kept = sorted(file for file in found if _suffix(file) in FORMATS and not PurePosixPath(file).name.startswith("_"))
    forms = {FORMATS[_suffix(file)] for file in kept}
    if not kept:
        raise TableError(f"no table at {url}: none of its files ends in {', '.join(FORMATS)}")
    if len(forms) > 1:
        raise TableError(f"{url} has files of several formats: {', '.join(sorted(forms))}; a table is of one")
    return [fs.unstrip_protocol(file) if "://" in url else str(file) for file in kept]


def read_table(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table at `url`; of `columns`, if given, those that it has. Raises TableError."""
    parts = [_read_file(file, columns) for file in files_of(url)]
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise TableError(f"{url}: its files have different columns: {' '.join(str(error).split())}") from None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a table that can be read by itself."""

    file: str

    group: int | None = None
    """A row group of a Parquet file; None for all of the file."""

    size: int = 0
    """About how many of the file's bytes it is."""


def pieces_of(file: str) -> list[Piece]:
    """The row groups of a Parquet file; a file of another format is one piece, since a value may hold line breaks. So
    is one that is no Parquet, which whoever reads it will say. Raises TableError for a file that is not there."""
    size = size_of(file)
    if _format(file) != "Parquet":
        return [Piece(file, None, size)]
    try:
        with _open(file) as opened:
            about = pa.parquet.read_metadata(opened)
    except (pa.ArrowException, OSError):
        return [Piece(file, None, size)]
    rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    return [Piece(file, group, size * count // max(sum(rows), 1)) for group, count in enumerate(rows)]


def batches(url: str, columns: Sequence[str], types: dict[str, pa.DataType] | None = None) -> Iterator[pa.RecordBatch]:
    """The same as `read_table`, batch by batch and all of one type, however large the table is; what it holds as codes
    becomes values. `types` are what columns of large CSV and JSON Lines files are read as; else their first megabytes
    decide. Raises TableError."""
    return batches_of([Piece(file) for file in files_of(url)], columns, types or {})


def batches_of(
    pieces: Sequence[Piece], columns: Sequence[str], types: dict[str, pa.DataType], schema: pa.Schema | None = None
) -> Iterator[pa.RecordBatch]:
    """The same of some pieces of a table: as `schema` says, or as the first batch where there is none."""
    for file, some in groupby(pieces, key=lambda piece: piece.file):
        groups = [piece.group for piece in some if piece.group is not None]
        try:
            for read in _file_batches(file, columns, types, groups or None):
                batch = _plain(read)
                schema = schema or batch.schema
                yield batch.select(schema.names).cast(schema) if batch.schema != schema else batch
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise TableError(
                f"{file} is not a {FORMATS[_suffix(file)]} table that can be read like the rows before: "
                f"{' '.join(str(error).split())}"
            ) from None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Values instead of codes: each batch of a table has codes of its own."""
    columns = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def _file_batches(
    url: str, columns: Sequence[str], types: dict[str, pa.DataType], groups: Sequence[int] | None
) -> Iterator[pa.RecordBatch]:
    form = _format(url)
    with _open(url) as file:
        if form == "Parquet":
            parquet = pa.parquet.ParquetFile(file)
            present = parquet.schema_arrow.names
            yield from parquet.iter_batches(BATCH, groups, columns=[c for c in columns if c in present])
            return
        if size_of(url) <= STREAMED_BYTES:
            yield from _read_file(url, columns).to_batches(max_chunksize=BATCH)
            return
        reader = _csv_stream(file, url, types) if form == "CSV" else _json_stream(file, types)
        for batch in reader:
            yield batch.select([c for c in columns if c in batch.schema.names])


def _csv_stream(file: IO[bytes], url: str, types: dict[str, pa.DataType]) -> Any:
    return pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=JSON_BLOCK),
        parse_options=_csv_parsing(url),
        convert_options=pa.csv.ConvertOptions(strings_can_be_null=True, null_values=[""], column_types=types),
    )


def _json_stream(file: IO[bytes], types: dict[str, pa.DataType]) -> Any:
    return pa.json.open_json(
        file,
        pa.json.ReadOptions(block_size=JSON_BLOCK),
        pa.json.ParseOptions(explicit_schema=pa.schema(types)),
    )


def _read_file(url: str, columns: Sequence[str] | None) -> pa.Table:
    form = _format(url)
    try:
        with _open(url) as file:
            if form == "Parquet":
                parquet = pa.parquet.ParquetFile(file)
                present = parquet.schema_arrow.names
                return parquet.read([c for c in columns if c in present] if columns is not None else None)
            if form == "CSV":
                table = _read_csv(file, _csv_parsing(url))
            else:
                table = pa.json.read_json(file, pa.json.ReadOptions(block_size=JSON_BLOCK))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TableError(f"{url} is not {form} that can be read: {' '.join(str(error).split())}") from None
    return table.select([c for c in columns if c in table.column_names]) if columns is not None else table


def _csv_parsing(url: str) -> Any:
    return pa.csv.ParseOptions(delimiter="\t" if _suffix(url) == ".tsv" else ",", newlines_in_values=True)


def _read_csv(file: IO[bytes], parsing: Any) -> pa.Table:
    """Types are inferred, except that numbers written with leading zeros (`007`) are text, being codes or ids. Only
    an empty field is missing: `NA` may be Namibia."""

    def read(**types: Any) -> pa.Table:
        file.seek(0)
        return pa.csv.read_csv(
            file,
            parse_options=parsing,
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


def require_ids(table: pa.Table, id_column: str) -> None:
    """Raises TableError for an id that is none."""
    kind, blank = table.schema.field(id_column).type, table.column(id_column).null_count
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)) or blank:
        why = f"{blank} rows have none" if blank else f"the column is {kind}"
        raise TableError(f"the id column {id_column!r} must be text or whole numbers on every row: {why}")


def rows(
    table: pa.Table, id_column: str, columns: Sequence[str], batch_size: int = 1024
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Ids and items of `table` in batches, with the values that an HTTP caller would send for them as JSON.

    Missing values are left out, times are ISO 8601, decimals are floats. Raises TableError for an id that is none.
    """
    kept = [c for c in columns if c in table.column_names]
    require_ids(table, id_column)
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
    """sha256 of the file's bytes: equal digests, equal tables. Of several files, over those of each; of tables of more
    than `HASHED_BYTES` that are not on this machine's disk, over name, size and ETag or time of each file."""
    files = files_of(url)
    if "://" in url and sum(map(size_of, files)) > HASHED_BYTES:
        told = [_told(file) for file in files]
        if all(marks for *_, marks in told):
            return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        each = list(pool.map(_sha256, files))
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _sha256(file: str) -> str:
    with _open(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]


def _told(url: str) -> tuple[str, int, list[str]]:
    """Name, size, and what else the storage says of a file that changes when the file does; maybe nothing."""
    fs, path = fsspec.core.url_to_fs(url)
    info = fs.info(path)
    marks = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated") if key in info]
    return path, int(info.get("size") or 0), marks


def size_of(url: str) -> int:
    """Bytes; 0 where the storage does not say."""
    fs, path = fsspec.core.url_to_fs(url)
    try:
        return int(fs.size(path) or 0)
    except FileNotFoundError:
        raise TableError(f"no table at {url}") from None


def _suffix(url: str) -> str:
    return PurePosixPath(url).suffix.lower()


def _format(url: str) -> str:
    suffix = _suffix(url)
    if suffix not in FORMATS:
        raise TableError(f"cannot tell the format of {url!r} by its ending {suffix!r}; known are {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _open(url: str) -> IO[bytes]:
    try:
        opened: IO[bytes] = fsspec.open(url, "rb").open()
    except FileNotFoundError:
        raise TableError(f"no table at {url}") from None
    except Exception as error:  # each storage has its own: no credentials, no access, no answer
        raise TableError(f"cannot read {url}: {' '.join(str(error).split())}") from None
    return opened
