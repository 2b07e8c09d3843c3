"""Bytes that somebody else wrote as tensors, arrays and tables: what they claim is checked before it is believed.

    safetensors    the header: names, types, shapes, and that places and sizes are those of the bytes there are
    npz            each array's header against the length of its member, and how much longer than the file all are
    JSON, TOML     length, depth, how many values, and that no name comes twice

So a parser of a library only sees what it is sure to read in memory of about the size of the bytes themselves.
Nothing that is read here is ever run. All of it raises ValueError, which says what is wrong; who calls says where.
"""

import json
import struct
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

MEBIBYTE = 1 << 20
HEADER_BYTES = 16 * MEBIBYTE  # of safetensors; a tensor takes about 100
MOST_TENSORS = 1 << 16  # in one file or message
MOST_AXES = 16
TABLE_BYTES = 16 * MEBIBYTE  # of a JSON document
TOML_BYTES = MEBIBYTE  # of a TOML document, whose parser takes its time
MOST_POINTS = 2048  # in a TOML document
MOST_VALUES = 1 << 21  # in a JSON document
MOST_TABLES = 1 << 18  # lists and objects in a JSON document
MOST_DEPTH = 100  # lists and tables in one another
UNPACKED = 200  # how many times as long as an .npz file its arrays may be; real ones stay below 100
UNPACKED_BYTES = 256 * MEBIBYTE  # what is let through whatever the file's size

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types that are read, by what safetensors calls them."""
ARRAYS = {np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")}


@dataclass(frozen=True)
class Form:
    """What a tensor claims to be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the end of the header
    end: int


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """The tensors in bytes of safetensors: what is allocated is as long as the bytes themselves.

    Raises:
        ValueError: they are none, or claim what is not there.
    """
    forms, _ = header_of(content[: 8 + _header_length(content[:8], len(content))], len(content))
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return _whole(forms, load(content))
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what its metadata say.

    Raises:
        ValueError: it is none, or claims what is not there.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        forms, told = header_of(begin + file.read(_header_length(begin, size)), size)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _whole(forms, load_file(path)), told
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def header_of(header: bytes, size: int) -> tuple[dict[str, Form], dict[str, str]]:
    """The tensors that a safetensors header speaks of, and its metadata.

    Args:
        header: its length and itself.
        size: bytes of the whole, header included.

    Raises:
        ValueError: it is no header, or not that of so many bytes.
    """
    entries = table_in(header[8:])
    told = entries.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError("its metadata are no table of texts")
    if len(entries) > MOST_TENSORS:
        raise ValueError(f"it has {len(entries)} tensors, and {MOST_TENSORS} are read at most")
    forms = {name: _form(name, entry) for name, entry in entries.items()}
    there = 0
    for name, form in sorted(forms.items(), key=lambda item: (item[1].begin, item[1].end)):
        if form.begin != there:
            raise ValueError(f"{name!r} begins at byte {form.begin}, where {there} was expected")
        there = form.end
    if there != size - len(header):
        raise ValueError(f"its tensors have {there} bytes, and {size - len(header)} are there")
    return forms, told


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; no object is ever unpickled.

    Raises:
        ValueError: it is none, claims what is not there, or has arrays `UNPACKED` times as long as the file.
        OSError: it cannot be read.
    """
    most = max(UNPACKED_BYTES, UNPACKED * path.stat().st_size)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (claimed := sum(member.file_size for member in members)) > most:
                raise ValueError(f"its arrays would have {claimed} bytes, and {most} are read at most")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{name!r} is in it twice")
                with archive.open(member) as file:
                    arrays[name] = _array(cast(BinaryIO, file), name, member.file_size)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of zipfile and what unpacks: encrypted, cut short, of another packing, spoilt
        raise ValueError(f"it is no .npz file ({type(error).__name__}: {error})") from None
    return arrays


def table_in(text: bytes | str, finite: bool = True) -> dict[str, Any]:
    """The JSON object in the text, in which no name comes twice.

    Args:
        text: UTF-8.
        finite: whether NaN and infinity are refused.

    Raises:
        ValueError: it is none, too long, too deep, or has too many values.
    """
    _check_length(text, TABLE_BYTES)
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if (values := text.count(",")) > MOST_VALUES:
        raise ValueError(f"it has {values} values, and {MOST_VALUES} are read at most")
    if (tables := text.count("[") + text.count("{")) > MOST_TABLES:
        raise ValueError(f"it has {tables} lists and tables, and {MOST_TABLES} are read at most")
    numbers: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _number} if finite else {}
    try:
        found = json.loads(text, object_pairs_hook=_once, **numbers)
    except RecursionError:
        raise ValueError("its lists and tables are too deep in one another") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return _shallow(found)


def table_of(path: Path, finite: bool = True) -> dict[str, Any]:
    """`table_in`, of a file. Raises OSError too."""
    with path.open("rb") as file:
        return table_in(file.read(TABLE_BYTES + 1), finite)


def toml_of(path: Path) -> dict[str, Any]:
    """`toml_in`, of a file. Raises OSError too."""
    with path.open("rb") as file:
        return toml_in(file.read(TOML_BYTES + 1).decode("utf-8"))


def toml_in(text: str) -> dict[str, Any]:
    """The table of a TOML document.

    Raises:
        ValueError: it is none, too long, or too deep.
    """
    _check_length(text, TOML_BYTES)
    # The parser keeps every beginning of a dotted key.
    if (points := text.count(".")) > MOST_POINTS:
        raise ValueError(f"it has {points} points, and {MOST_POINTS} are read at most")
    try:
        return _shallow(tomllib.loads(text))
    except RecursionError:
        raise ValueError("its lists and tables are too deep in one another") from None


def plain(text: object, most: int = 300) -> str:
    """What somebody else has written, for a log: in one line, not too long, without what steers a terminal."""
    told = str(text)
    shown = "".join(c if c.isprintable() else " " for c in told[:most])
    return shown + "…" * (len(told) > most)


def _header_length(begin: bytes, size: int) -> int:
    if len(begin) < 8:
        raise ValueError("it is too short for safetensors")
    length: int = struct.unpack("<Q", begin)[0]
    if length > min(size - 8, HEADER_BYTES):
        raise ValueError(f"its header would have {length} bytes, of {size} in all ({HEADER_BYTES} at most)")
    return length


def _form(name: str, entry: Any) -> Form:
    """Raises ValueError unless the entry of a header is one."""
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r} is of the type {plain(entry['dtype'], 20)!r}; read are {', '.join(DTYPES)}")
    shape, places = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > MOST_AXES or not _counts(places) or len(places) != 2:
        raise ValueError(f"{name!r} has no shape or no place")
    # Axes of length 0 hide the others from the number of bytes, but not from the strides.
    if dtype.itemsize * prod(max(1, length) for length in shape) >= 1 << 62:
        raise ValueError(f"{name!r} has the shape {shape}, which is too large")
    if places[1] - places[0] != dtype.itemsize * prod(shape):
        raise ValueError(f"{name!r} has the shape {shape}, which is not of {places[1] - places[0]} bytes")
    return Form(dtype, tuple(shape), *places)


def _counts(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(one) is int and 0 <= one < 1 << 62 for one in value)


def _whole(forms: Mapping[str, Form], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the header's order, which are what the header says."""
    for name, form in forms.items():
        # Any other bit pattern is undefined behaviour in whatever looks at it.
        if form.dtype is torch.bool and tensors[name].numel() and int(tensors[name].view(torch.uint8).max()) > 1:
            raise ValueError(f"{name!r} is of truth values, and holds others than 0 and 1")
    return {name: tensors[name] for name in forms}


def _array(file: BinaryIO, name: str, size: int) -> np.ndarray:
    """The array of a member of so many bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is of the format {version}, and 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # whatever NumPy's reader of Python's own notation trips over
        raise ValueError(f"{name!r} has a header that cannot be read ({type(error).__name__})") from None
    if dtype not in ARRAYS:
        raise ValueError(f"{name!r} is of the type {plain(dtype, 60)}; numbers and truth values are read")
    if not _counts(shape) or len(shape) > MOST_AXES or prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{name!r} has the shape {shape}, which is not of {size - file.tell()} bytes")
    content = file.read()
    array = np.frombuffer(content, dtype, count=prod(shape)).reshape(shape, order="F" if fortran else "C")
    return np.array(array, order="C")


def _check_length(text: bytes | str, most: int) -> None:
    if len(text) > most:
        raise ValueError(f"it has {len(text)} bytes, and {most} are read at most")


def _shallow(table: dict[str, Any]) -> dict[str, Any]:
    """The table; ValueError if Python could not even show what is in it."""
    level: list[Any] = [table]
    for _ in range(MOST_DEPTH):
        inner = (own for outer in level for own in (outer.values() if isinstance(outer, dict) else outer))
        level = [own for own in inner if isinstance(own, dict | list)]
        if not level:
            return table
    raise ValueError("its lists and tables are too deep in one another")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{plain(name, 60)!r} is in it twice")
        found[name] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _number(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _no_number(plain(text, 20))
