"""Tensors of the Open Inference Protocol: from JSON or from the bytes after it, and back.

Bytes (Triton's binary extension) follow the JSON in the order in which it names its tensors;
numbers are little-endian, strings have their length in four bytes before them. It knows no model
and no text.
"""

import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offramp_service.errors import InvalidInput
from offramp_service.schemas.v2 import Tensor

_NUMBERS = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_LENGTH = struct.Struct("<I")

MOST_DIMENSIONS = 4


class TensorReader:
    """The tensors of one request; `tail` are the bytes after its JSON."""

    def __init__(self, tensors: Sequence[Tensor], tail: bytes) -> None:
        self._raw = _cut_up(tensors, tail)
        self.named: Mapping[str, Tensor] = {one.name: one for one in tensors}
        if len(self.named) < len(tensors):
            raise InvalidInput("two inputs have the same name", param="inputs")

    def texts(self, name: str) -> list[str]:
        """A BYTES tensor as strings.

        Raises:
            InvalidInput: it is none, or not UTF-8.
        """
        tensor = self._checked(name, ("BYTES",))
        if (raw := self._raw.get(name)) is not None:
            values: list[object] = list(_unpack_strings(raw, _where(name)))
        else:
            values = _flat(tensor)
        self._check_count(tensor, len(values))
        for index, value in enumerate(values):
            if not isinstance(value, str):
                where = f"{_where(name)}[{index}]"
                raise InvalidInput(f"{where} is not a string", param=where)
        return [str(value) for value in values]

    def numbers(self, name: str, datatypes: Sequence[str]) -> NDArray[np.generic]:
        """A tensor of numbers in its own shape.

        Raises:
            InvalidInput: it has another datatype, or data that do not fit it.
        """
        tensor = self._checked(name, datatypes)
        kind = np.dtype(_NUMBERS[tensor.datatype])
        if (raw := self._raw.get(name)) is not None:
            if len(raw) % kind.itemsize:
                raise InvalidInput(
                    f"{_where(name)} has {len(raw)} bytes, not a multiple of {kind.itemsize}",
                    param=_where(name),
                )
            flat = np.frombuffer(raw, kind)
        else:
            flat = _array(_flat(tensor), kind, _where(name))
        self._check_count(tensor, len(flat))
        return flat.reshape(tensor.shape)

    def _checked(self, name: str, datatypes: Sequence[str]) -> Tensor:
        tensor = self.named[name]
        if tensor.datatype not in datatypes:
            raise InvalidInput(
                f"{_where(name)} has datatype {tensor.datatype[:20]!r}, allowed is "
                f"{' or '.join(datatypes)}",
                param=_where(name),
            )
        where = _where(name)
        if len(tensor.shape) > MOST_DIMENSIONS:
            raise InvalidInput(
                f"{where} has {len(tensor.shape)} dimensions, allowed are {MOST_DIMENSIONS}",
                param=where,
            )
        if any(size < 0 for size in tensor.shape):
            raise InvalidInput(f"{where} has a negative shape", param=where)
        # Rows of nothing could be any number of them.
        if 0 in tensor.shape and any(tensor.shape):
            raise InvalidInput(f"{where} has shape {_spoken(tensor)}: rows of nothing", param=where)
        return tensor

    def _check_count(self, tensor: Tensor, count: int) -> None:
        if math.prod(tensor.shape) != count:
            raise InvalidInput(
                f"{_where(tensor.name)} has shape {_spoken(tensor)} and {count} values",
                param=_where(tensor.name),
            )


class TensorWriter:
    """The tensors of one answer, in JSON or in the bytes after it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.tail: list[bytes] = []

    def texts(self, name: str, shape: list[int], values: Sequence[str], *, binary: bool) -> None:
        packed = [value.encode() for value in values] if binary else []
        raw = b"".join(_LENGTH.pack(len(one)) + one for one in packed)
        self._add(name, "BYTES", shape, list(values), raw, binary=binary)

    def numbers(
        self,
        name: str,
        datatype: str,
        shape: list[int],
        values: Sequence[float | None],
        *,
        binary: bool,
    ) -> None:
        """`values` flat, row by row; where one is None, JSON has null and bytes have NaN."""
        raw = np.array(values, _NUMBERS[datatype]).tobytes() if binary else b""
        self._add(name, datatype, shape, list(values), raw, binary=binary)

    def _add(
        self,
        name: str,
        datatype: str,
        shape: list[int],
        values: list[object],
        raw: bytes,
        *,
        binary: bool,
    ) -> None:
        tensor = Tensor(name=name, datatype=datatype, shape=shape)
        if binary:
            tensor.parameters = {"binary_data_size": len(raw)}
            self.tail.append(raw)
        else:
            tensor.data = values
        self.tensors.append(tensor)


def _cut_up(tensors: Sequence[Tensor], tail: bytes) -> dict[str, memoryview]:
    """Each tensor's share of the bytes; they must be used up."""
    found: dict[str, memoryview] = {}
    rest = memoryview(tail)
    for tensor in tensors:
        parameters = tensor.parameters or {}
        size = parameters.get("binary_data_size")
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise InvalidInput(
                f"{_where(tensor.name)} has binary_data_size {size!s:.40}, allowed is 0 to the "
                f"{len(rest)} bytes that follow",
                param=_where(tensor.name),
            )
        found[tensor.name], rest = rest[:size], rest[size:]
    if len(rest):
        raise InvalidInput(f"{len(rest)} bytes after the JSON belong to no input", status=400)
    return found


def _unpack_strings(raw: memoryview, where: str) -> Sequence[str]:
    found, place = [], 0
    while place < len(raw):
        start = place + _LENGTH.size
        stop = start + (_LENGTH.unpack_from(raw, place)[0] if start <= len(raw) else 0)
        if start > len(raw) or stop > len(raw):
            raise InvalidInput(f"{where} ends within a string", param=where)
        try:
            found.append(str(raw[start:stop], "utf-8"))
        except UnicodeDecodeError:
            raise InvalidInput(f"{where}[{len(found)}] is not UTF-8", param=where) from None
        place = stop
    return found


def _flat(tensor: Tensor) -> list[object]:
    """The JSON data: flat, or nested exactly as the shape is."""
    where = _where(tensor.name)
    if not isinstance(tensor.data, list):
        raise InvalidInput(f"{where} has no data", param=where)
    values: list[object] = tensor.data
    if not any(isinstance(one, list) for one in values):
        return values
    for size in tensor.shape[1:]:
        parts = [part for part in values if isinstance(part, list)]
        if len(parts) < len(values) or any(len(part) != size for part in parts):
            raise InvalidInput(
                f"{where} is neither flat nor nested as its shape {_spoken(tensor)}", param=where
            )
        values = [one for part in parts for one in part]
    return values


_ALLOWED: dict[str, tuple[tuple[type, ...], str]] = {
    "b": ((bool,), "true or false"),
    "i": ((int,), "an integer"),
    "u": ((int,), "an integer"),
    "f": ((int, float), "a number"),
}


def _array(values: list[object], kind: np.dtype[np.generic], where: str) -> NDArray[np.generic]:
    types, allowed = _ALLOWED[kind.kind]
    for index, value in enumerate(values):
        if type(value) not in types:
            place = f"{where}[{index}]"
            raise InvalidInput(f"{place} is {value!s:.40}, allowed is {allowed}", param=place)
    try:
        with np.errstate(over="ignore"):  # infinite in FP32; what may be asked for is checked
            return np.array(values, kind)
    except OverflowError:
        raise InvalidInput(
            f"{where} has a value that its datatype cannot hold", param=where
        ) from None


def _spoken(tensor: Tensor) -> str:
    return "×".join(str(size)[:20] for size in tensor.shape)


def _where(name: str) -> str:
    return name if name.isidentifier() else repr(name[:40])
