"""ModelVersion: what a released model is, in memory and on disk. Immutable, self-describing, and never pickle.

    7/
      manifest.json        name, version, fingerprint, sha256 and size of every other file, lineage; written last
      schema.yaml          the columns
      transform/           the fitted FeatureTransform (JSON and Parquet)
      encoder.safetensors  the network that is served
      decoder.safetensors  the heads that read columns back
      evaluation.json      what training measured; report.html is the same for people
      golden.parquet       some items and the vectors that they gave when the version was made

A version is whole or it is refused: loading verifies every sha256 and encodes the golden items again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import itemvec
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.errors import SchemaError, VersionCorrupt
from itemvec.features import FeatureTransform, Status
from itemvec.forward import Forward
from itemvec.schema import FeatureSchema, ModelName

FORMAT = 1
MANIFEST = "manifest.json"
"""Written last: a folder without it is no version."""

GOLDEN_TOLERANCE = 1e-5
"""Largest difference of a number in a golden vector: processors differ in its 7th digit, models in its 1st."""


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size: int
    """Bytes."""


class Lineage(BaseModel):
    """Where a version came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    table_sha256: str
    table_rows: int
    train_rows: int
    config: dict[str, Any]
    """The training configuration, whole."""

    interactions: str | None = None
    interactions_sha256: str | None = None
    """The table of who liked what, where there was one."""

    parent: int | None = None
    """The version that was the champion when this one was trained."""


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    name: ModelName
    version: int
    fingerprint: str
    """16 hex digits of a sha256 over schema, transform, network and weights: equal fingerprints, comparable vectors."""

    dim: int
    encoder: EncoderConfig
    created: datetime
    itemvec_version: str
    lineage: Lineage
    files: dict[str, FileEntry]


class Encoding(NamedTuple):
    vectors: npt.NDArray[np.float32]
    """(n, dim), each of length 1."""

    statuses: Sequence[dict[str, Status]]
    """Per item, only the columns that were not plain."""


class ModelVersion:
    """A model that encodes items. `load` one from disk; training makes one with `make` and writes it with `save`."""

    def __init__(
        self,
        manifest: Manifest,
        transform: FeatureTransform,
        encoder: ItemEncoder,
        decoder: Decoder,
        evaluation: dict[str, Any],
    ) -> None:
        self.manifest = manifest
        self.transform = transform
        self.encoder = encoder.eval()
        self._forward = Forward(encoder) if encoder.mean.device.type == "cpu" else encoder.encode
        self.decoder = decoder.eval()
        self.evaluation = evaluation
        self.schema = transform.schema
        self.name, self.version = manifest.name, manifest.version
        self.ref = f"{self.name}@{self.version}"
        self.fingerprint, self.dim = manifest.fingerprint, manifest.dim

    def encode(self, items: Sequence[Mapping[str, Any]], pointer: str = "") -> Encoding:
        """The one way from raw items to vectors: HTTP, the command line, backfill and training all call it.

        Raises InvalidItem for values of the wrong type, with `pointer` before each path; never for an unknown value.
        """
        encoded = self.transform.transform(items, pointer)
        return Encoding(self._forward(encoded.batch), encoded.statuses)

    def encode_arrow(self, table: pa.Table, pointer: str = "") -> Encoding:
        """The same for items that come as a table; its columns stay columns on the way."""
        encoded = self.transform.transform_arrow(table, pointer)
        return Encoding(self._forward(encoded.batch), encoded.statuses)

    @classmethod
    def make(
        cls, name: str, version: int, transform: FeatureTransform, encoder: ItemEncoder, decoder: Decoder,
        evaluation: dict[str, Any], lineage: Lineage,
    ) -> "ModelVersion":  # fmt: skip
        """A version in memory, not yet on disk."""
        manifest = Manifest(
            name=name,
            version=version,
            fingerprint=fingerprint(transform, encoder),
            dim=encoder.config.dim,
            encoder=encoder.config,
            created=datetime.now(UTC),
            itemvec_version=itemvec.__version__,
            lineage=lineage,
            files={},
        )
        return cls(manifest, transform, encoder, decoder, evaluation)

    def save(self, folder: Path, golden: Sequence[tuple[str, Mapping[str, Any]]]) -> "ModelVersion":
        """Writes all files into `folder`, the manifest last; it also covers what lies there already (a report).

        `golden` are (id, item) pairs. Returns the version as it will be loaded.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.schema.save(folder / "schema.yaml")
        self.transform.save(folder / "transform")
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            # Not by save_file, which makes files that only their owner can read: others serve what one user trained.
            (folder / f"{name}.safetensors").write_bytes(to_bytes(state))
        (folder / "evaluation.json").write_text(
            json.dumps(self.evaluation, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        _write_golden(folder / "golden.parquet", golden, self.encode([item for _, item in golden]).vectors)
        files = {str(p.relative_to(folder).as_posix()): _entry(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = self.manifest.model_copy(update={"files": files})
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        return ModelVersion(manifest, self.transform, self.encoder, self.decoder, self.evaluation)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", ref: str | None = None) -> "ModelVersion":
        """Raises VersionCorrupt unless every file is as published and the golden items give their vectors again.

        `ref`: what the registry calls it, "movies@7", and its manifest has to as well.
        """
        manifest = read_manifest(folder, ref)
        ref = f"{manifest.name}@{manifest.version}"
        try:
            _verify_files(folder, manifest, ref)
            transform = FeatureTransform.load(folder / "transform", FeatureSchema.load(folder / "schema.yaml"))
            encoder, decoder = (
                ItemEncoder(manifest.encoder, transform.layout),
                Decoder(manifest.encoder, transform.layout),
            )
            encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
            decoder.load_state_dict(load_file(folder / "decoder.safetensors"))
            evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            golden = pa.parquet.read_table(folder / "golden.parquet")
        except (OSError, ValueError, RuntimeError, SchemaError, VersionCorrupt, safetensors.SafetensorError) as error:
            why = error.why if isinstance(error, VersionCorrupt) else " ".join(str(error).split())
            raise VersionCorrupt(ref, why.replace(f"{folder}/", "")) from None  # callers of a service read it too
        model = cls(manifest, transform, encoder.to(device), decoder.to(device), evaluation)
        # Another release may have more settings, and so another fingerprint of the same vectors: there the sha256s and
        # the golden items have to do.
        same_release = manifest.itemvec_version == itemvec.__version__
        if same_release and (now := fingerprint(transform, encoder)) != manifest.fingerprint:
            raise VersionCorrupt(ref, f"its fingerprint is {now}, the manifest says {manifest.fingerprint}")
        model._replay(golden)
        return model

    def _replay(self, golden: pa.Table) -> None:
        items = [json.loads(text) for text in golden.column("item").to_pylist()]
        if not items:
            return
        wanted = np.array(golden.column("embedding").to_pylist(), np.float32)
        worst = float(np.abs(self.encode(items).vectors - wanted).max())
        if not worst <= GOLDEN_TOLERANCE:
            raise VersionCorrupt(
                self.ref,
                f"its golden items now give other vectors (difference {worst:.2g}, allowed {GOLDEN_TOLERANCE:g})",
            )


def fingerprint(transform: FeatureTransform, encoder: ItemEncoder) -> str:
    """16 hex digits; the same for the same columns, fitted numbers, network and weights, whatever the file formats."""
    aside = {"weight", "filterable"}  # do not change a vector
    inputs = [feature.model_dump(mode="json", exclude=aside) for feature in transform.schema.features]
    sha = hashlib.sha256(json.dumps([inputs, encoder.config.model_dump(mode="json")], sort_keys=True).encode())
    sha.update(transform.digest().encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def read_manifest(folder: Path, ref: str | None = None) -> Manifest:
    """`ref` as in `ModelVersion.load`."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise VersionCorrupt(ref or str(folder), f"it has no {MANIFEST} ({error.strerror})") from None
    return parse_manifest(content, ref, str(folder))


def parse_manifest(content: bytes, ref: str | None, place: str = "") -> Manifest:
    """`ref` as in `ModelVersion.load`; where it is None, an error names the `place`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise VersionCorrupt(ref or place, f"its {MANIFEST} cannot be read: {where} {first['msg']}") from None
    says = f"{manifest.name}@{manifest.version}"
    if ref not in (None, says):  # what is asked of the copy would be done with the version that it was copied from
        raise VersionCorrupt(ref, f"its {MANIFEST} says {says}, so its folder is a copy of that: publish it again")
    return manifest


def _verify_files(folder: Path, manifest: Manifest, ref: str) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise VersionCorrupt(ref, f"{name} is missing")
        if (now := _entry(path)) != entry:
            raise VersionCorrupt(
                ref, f"{name} has sha256 {now.sha256[:12]}..., the manifest says {entry.sha256[:12]}..."
            )


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _write_golden(
    path: Path, golden: Sequence[tuple[str, Mapping[str, Any]]], vectors: npt.NDArray[np.float32]
) -> None:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])
    ids, items = [i for i, _ in golden], [json.dumps(item, ensure_ascii=False) for _, item in golden]
    pa.parquet.write_table(pa.table({"id": ids, "item": items, "embedding": embedding}), path)
