"""Which files a facility trains on, and whether they can be read. Standard library only.

Used twice: on the login node before a job is submitted, and by the job itself.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data import stdlib_corpus
from flwr_hpc.data.record_faults import columns, record_fault
from flwr_hpc.data.stdlib_corpus import NotVisibleError
from flwr_hpc.errors import UserError

CHECKED_BYTES = 64 * 2**20  # what `check` reads of a facility's files, all together
_CHECKED_PER_FILE = 8 * 2**20

_SUFFIXES = {"text": (".txt",), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}

Split = Literal["files", "tail", "records"]


@dataclass(frozen=True)
class Sources:
    """The files of one facility."""

    facility: str
    train: tuple[Path, ...]  # Disjoint. `held_out` is empty unless `split` is ``files``
    held_out: tuple[Path, ...]
    # How the held-out set is kept apart. ``files``: by document. ``tail``: the documents are
    # too few and large for that, the last ``held_out_fraction`` of each is held out.
    # ``records``: by record (jsonl, parquet), which the reader does.
    split: Split

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, training files first."""
        return self.train + self.held_out


def resolve(data: DataConfig, facility: str, facilities: Sequence[str]) -> Sources:
    """Find a facility's files and tell training documents from held-out ones.

    The held-out documents are chosen by a hash of their names, so the choice is the same on
    every machine.

    Parameters
    ----------
    data : DataConfig
    facility : str
    facilities : sequence of str
        All facilities of the federation, for the default shares of ``stdlib``.

    Raises
    ------
    NotVisibleError
        If a path or package name matches nothing on this machine.
    """
    train = _find(data, facility, facilities, "paths")
    if data.held_out_paths.get(facility):
        held_out = _find(data, facility, facilities, "held_out_paths")
        train = tuple(path for path in train if path not in set(held_out))
        if not train:
            raise UserError(
                f"facility {facility}: data.held_out_paths names every training file; "
                "nothing is left to train on"
            )
        return Sources(facility, train, held_out, "files")
    if data.kind in ("jsonl", "parquet"):
        return Sources(facility, train, (), "records")
    held_out = _hold_out(train, data.held_out_fraction)
    if not held_out:
        return Sources(facility, train, (), "tail")
    kept = tuple(path for path in train if path not in set(held_out))
    return Sources(facility, kept, held_out, "files")


def check(
    data: DataConfig, facility: str, facilities: Sequence[str], must_exist: bool = True
) -> None:
    """Look for missing, empty, unreadable and malformed data, quickly.

    At most the first 8 MiB of a file and `CHECKED_BYTES` in all are read; a fault further on
    is found by the job, and told in the same words.

    Parameters
    ----------
    data : DataConfig
    facility : str
    facilities : sequence of str
    must_exist : bool
        False where the job may see more than this machine does: data that is not visible
        here passes unchecked.

    Raises
    ------
    NotVisibleError
        If a path matches nothing on this machine and `must_exist` is set.
    """
    try:
        sources = resolve(data, facility, facilities)
    except NotVisibleError:
        if must_exist:
            raise
        return
    per_file = max(2**16, min(_CHECKED_PER_FILE, CHECKED_BYTES // len(sources.files)))
    left = CHECKED_BYTES
    for path in sources.files:
        scan(data, facility, path, per_file if left > 0 else 0)
        left -= min(per_file, path.stat().st_size)


def scan(data: DataConfig, facility: str, path: Path, limit: int | None = None) -> None:
    """Read the first `limit` bytes of a file (None: all) and raise for the first fault."""
    where = f"facility {facility}: {path}"
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{where} is empty")
        with path.open("rb"):
            pass
        if data.kind == "parquet":
            _scan_parquet(data, where, path)
        elif data.kind != "stdlib":
            _scan_lines(data, where, path, limit)
    except OSError as exc:
        raise UserError(f"{where} cannot be read: {exc.strerror or exc}") from None


def _find(data: DataConfig, facility: str, facilities: Sequence[str], key: str) -> tuple[Path, ...]:
    paths: dict[str, list[str]] = getattr(data, key)
    if data.kind == "stdlib":
        chosen = stdlib_corpus.share(facility, facilities, paths)
        return tuple(sorted({file for files in chosen.values() for file in files}))
    if not paths.get(facility):
        raise UserError(
            f"data={data.kind} needs the files of facility '{facility}'. "
            f"Add to the command: 'data.{key}.{facility}=[/path/to/files/*]'"
        )
    found = {
        file
        for pattern in paths[facility]
        for file in _expand(pattern, data.kind, f"data.{key}.{facility}")
    }
    return tuple(sorted(found))


def _expand(pattern: str, kind: str, key: str) -> list[Path]:
    text = str(Path(pattern).expanduser())
    matches = [Path(text)] if Path(text).exists() else map(Path, glob.glob(text, recursive=True))
    found: list[Path] = []
    folders: list[Path] = []
    for path in matches:
        if path.is_dir():
            folders.append(path)
            found += [p for p in path.rglob("*") if p.suffix in _SUFFIXES[kind] and p.is_file()]
        else:
            found.append(path)
    if folders and not found:
        suffixes = " or ".join(f"*{suffix}" for suffix in _SUFFIXES[kind])
        raise UserError(
            f"{key}: the folder {folders[0]} holds no {suffixes} file. "
            f"Name other files by a pattern: '{key}=[{folders[0]}/**/*.EXT]'"
        )
    if not found:
        raise NotVisibleError(f"{key}: '{pattern}' matches no file on this machine")
    return [path.resolve() for path in found]


def _hold_out(files: Sequence[Path], fraction: float) -> tuple[Path, ...]:
    """Choose whole documents by the hash of their names until `fraction` of the bytes is held."""
    root = _common_folder(files)
    names = {path: path.relative_to(root).as_posix() for path in files}
    order = sorted(files, key=lambda path: hashlib.sha256(names[path].encode()).digest())
    left = fraction * sum(path.stat().st_size for path in files)
    chosen: list[Path] = []
    for path in order:
        size = path.stat().st_size
        if 0 < size <= left:
            chosen.append(path)
            left -= size
    return tuple(sorted(chosen))


def _common_folder(files: Sequence[Path]) -> Path:
    folder = files[0].parent
    while not all(path.is_relative_to(folder) for path in files):
        folder = folder.parent
    return folder


def _scan_lines(data: DataConfig, where: str, path: Path, limit: int | None) -> None:
    fault: Callable[[str], str | None] = (
        (lambda line: record_fault(data, line)) if data.kind == "jsonl" else (lambda line: None)
    )
    seen = 0
    blank = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            seen += len(raw)
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as exc:
                raise UserError(
                    f"{where}, line {number}: not UTF-8 (byte 0x{raw[exc.start]:02x} at column "
                    f"{exc.start + 1}). If it is Latin-1: iconv -f latin1 -t utf-8"
                ) from None
            if line.strip():
                blank = False
                if message := fault(line):
                    raise UserError(f"{where}, line {number}: {message}")
            if limit is not None and seen >= limit:
                return
    if blank:
        raise UserError(f"{where} holds nothing but white space")


def _scan_parquet(data: DataConfig, where: str, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, size - 4))
        if head != b"PAR1" or file.read(4) != b"PAR1":
            raise UserError(f"{where} is not a parquet file (or was cut short)")
    if find_spec("pyarrow") is None:
        return  # a bare login node: the job reads the schema
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
    except pa.ArrowException as exc:
        raise UserError(f"{where} is not a parquet file: {str(exc).splitlines()[0]}") from None
    keys = columns(data, schema.names)
    if isinstance(keys, str):
        raise UserError(f"{where}: {keys}")
    for key in keys:
        kind = schema.field(key).type
        if key == data.messages_key:
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise UserError(
                    f"{where}: column '{key}' must hold lists of messages, found {kind}"
                )
            continue
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{where}: column '{key}' must hold strings, found {kind}")
    if rows == 0:
        raise UserError(f"{where} is empty: no rows")
