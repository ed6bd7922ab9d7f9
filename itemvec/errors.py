"""Every error that itemvec raises on purpose.

    ItemvecError
    |-- ConfigError              a setting or an environment that cannot work
    |-- SchemaError              a schema, or the file it came from, is wrong
    |-- TableError               a table cannot be read, or has nothing to learn from
    |   `-- SchemaMismatch       a table lacks or contradicts what the schema names
    |-- InvalidItem              items with values of the wrong type; names each one by a JSON pointer
    |-- RegistryError            the registry cannot do what was asked
    |   |-- ModelNotFound        no model of that name
    |   |-- VersionNotFound      the model has no such version or alias
    |   `-- RunNotFound          no retraining of that id
    |-- VersionCorrupt           a model version that does not match its own manifest or golden rows
    |-- ItemNotFound             the store holds no such item
    `-- StoreUnavailable         Redis is down, slow, or cannot do what is needed

A message names the thing, its value, and the way out. None of them knows of HTTP: `service/problems.py` maps them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class ItemvecError(Exception):
    """The root of the tree; the command line prints it as one line."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself an exception is made anew of its message, which is not what most of these are made of; and one that
        # cannot come back from another process breaks that process's pool.
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[ItemvecError], args: tuple[Any, ...], state: dict[str, Any]) -> ItemvecError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(state)
    return error


class ConfigError(ItemvecError):
    pass


class SchemaError(ItemvecError):
    pass


class TableError(ItemvecError):
    pass


class SchemaMismatch(TableError):
    """A table does not fit its schema; `problems` has one sentence per column."""

    def __init__(self, table: str, problems: Sequence[str]) -> None:
        super().__init__(f"{table} does not fit the schema: " + "; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class FieldError:
    pointer: str
    """JSON pointer (RFC 6901) to the value, relative to what was handed in: `/1/runtime_minutes`."""

    detail: str


class InvalidItem(ItemvecError):
    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = list(errors)
        first, more = self.errors[0], len(self.errors) - 1
        super().__init__(f"{first.pointer}: {first.detail}" + (f" (and {more} more)" if more else ""))


class RegistryError(ItemvecError):
    pass


class ModelNotFound(RegistryError):
    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no model {name!r}; there is {', '.join(known) if known else 'none yet: itemvec train'}")


class VersionNotFound(RegistryError):
    def __init__(self, name: str, wanted: str | int, known: Sequence[int]) -> None:
        there = ", ".join(map(str, known)) if known else "none"
        super().__init__(f"model {name!r} has no version {wanted!r}; there is {there}")


class RunNotFound(RegistryError):
    def __init__(self, run_id: str) -> None:
        super().__init__(f"no run {run_id!r}; `itemvec runs list` has those that there are")


class RunUnreadable(RegistryError):
    def __init__(self, record: str, why: str) -> None:
        super().__init__(f"the run record {record} cannot be read: {why.strip()}; removing it loses only what it told")


class VersionCorrupt(ItemvecError):
    def __init__(self, ref: str, why: str) -> None:
        super().__init__(f"{ref} is not what was published: {why}; it was not loaded")
        self.why = why


class ItemNotFound(ItemvecError):
    def __init__(self, item_id: str, model: str) -> None:
        super().__init__(f"no item {item_id!r} in {model}")


class StoreUnavailable(ItemvecError):
    """`retry_after` is in seconds."""

    def __init__(self, why: str, retry_after: float = 1.0) -> None:
        super().__init__(f"the item store cannot answer: {why}")
        self.retry_after = retry_after
