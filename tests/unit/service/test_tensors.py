"""Tensors of the Open Inference Protocol: JSON, bytes, and what is wrong with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_service.errors import InvalidInput
from offramp_service.routes.tensors import TensorReader, TensorWriter
from offramp_service.schemas.v2 import Tensor

TEXTS = st.lists(st.text(max_size=20), max_size=8)
FP32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def reread(writer: TensorWriter) -> TensorReader:
    return TensorReader(writer.tensors, b"".join(writer.tail))


@given(TEXTS, st.booleans(), st.lists(FP32, max_size=6), st.booleans())
def test_what_is_written_is_read(
    texts: list[str], texts_binary: bool, numbers: list[float], numbers_binary: bool
) -> None:
    writer = TensorWriter()
    writer.texts("text", [len(texts)], texts, binary=texts_binary)
    writer.numbers("speedup", "FP32", [len(numbers)], numbers, binary=numbers_binary)
    reader = reread(writer)
    assert reader.texts("text") == texts
    assert reader.numbers("speedup", ("FP32",)).tolist() == numbers


@pytest.mark.parametrize("kind", ["INT64", "INT32", "FP32", "FP64", "BOOL", "UINT8"])
def test_bytes_are_little_endian_and_have_their_shape(kind: str) -> None:
    dtype = {"FP32": "<f4", "FP64": "<f8", "BOOL": "?", "UINT8": "u1"}.get(kind, f"<i{kind[3:]}")
    if kind.startswith("INT"):
        dtype = f"<i{int(kind[3:]) // 8}"
    given_ = np.array([[1, 0, 1], [0, 1, 1]], dtype)
    tensor = Tensor(
        name="x", datatype=kind, shape=[2, 3], parameters={"binary_data_size": given_.nbytes}
    )
    found = TensorReader([tensor], given_.tobytes()).numbers("x", (kind,))
    assert found.dtype == given_.dtype
    np.testing.assert_array_equal(found, given_)


@pytest.mark.parametrize("data", [[[1, 2], [3, 4]], [1, 2, 3, 4]])
def test_json_may_be_nested_or_flat(data: list[object]) -> None:
    tensor = Tensor(name="ids", datatype="INT64", shape=[2, 2], data=data)
    found = TensorReader([tensor], b"").numbers("ids", ("INT64",))
    assert found.tolist() == [[1, 2], [3, 4]]


def strings(raw: bytes, shape: list[int], size: int | None = None) -> TensorReader:
    size = len(raw) if size is None else size
    tensor = Tensor(
        name="text", datatype="BYTES", shape=shape, parameters={"binary_data_size": size}
    )
    return TensorReader([tensor], raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x01\x00", "ends within a string"),
        (b"\x02\x00\x00\x00a", "ends within a string"),
        (b"\xff\xff\xff\xffa", "ends within a string"),
        (b"\x01\x00\x00\x00\xff", "is not UTF-8"),
        (b"", "has shape 1 and 0 values"),
    ],
)
def test_broken_strings(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        strings(raw, [1]).texts("text")


@pytest.mark.parametrize("size", [-1, 6, True, "5", 1.0])
def test_sizes_that_cannot_be(size: object) -> None:
    with pytest.raises(InvalidInput, match="binary_data_size"):
        strings(b"\x01\x00\x00\x00a", [1], size)  # type: ignore[arg-type]


def test_bytes_that_belong_to_nobody() -> None:
    with pytest.raises(InvalidInput, match="1 bytes after the JSON"):
        strings(b"\x01\x00\x00\x00ab", [1], 5)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(name="x", datatype="FP32", shape=[1], data=["a"]), "allowed is a number"),
        (Tensor(name="x", datatype="FP32", shape=[1], data=[True]), "allowed is a number"),
        (Tensor(name="x", datatype="INT64", shape=[1], data=[1.5]), "allowed is an integer"),
        (Tensor(name="x", datatype="INT64", shape=[1], data=[2**70]), "cannot hold"),
        (Tensor(name="x", datatype="INT64", shape=[2], data=[1]), "has shape 2 and 1 values"),
        (Tensor(name="x", datatype="INT64", shape=[-1], data=[1]), "negative shape"),
        (Tensor(name="x", datatype="INT64", shape=[1]), "has no data"),
        (Tensor(name="x", datatype="STRING", shape=[1], data=[1]), "datatype 'STRING'"),
        (Tensor(name="x", datatype="INT64", shape=[10**9, 0], data=[]), "rows of nothing"),
        (Tensor(name="x", datatype="INT64", shape=[0, 2**63], data=[]), "rows of nothing"),
        (Tensor(name="x", datatype="INT64", shape=[1] * 65, data=[1]), "65 dimensions"),
        (Tensor(name="x", datatype="INT64", shape=[2, 2], data=[[1, 2, 3], [4]]), "nor nested"),
        (Tensor(name="x", datatype="INT64", shape=[2, 1], data=[1, [2]]), "nor nested"),
        (Tensor(name="x", datatype="INT64", shape=[2], data=[[1], [2]]), "is \\[1\\], allowed"),
    ],
)
def test_numbers_that_cannot_be(tensor: Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TensorReader([tensor], b"").numbers("x", ("FP32", "INT64"))


def test_truth_values() -> None:
    tensor = Tensor(name="x", datatype="BOOL", shape=[2], data=[True, False])
    assert TensorReader([tensor], b"").numbers("x", ("BOOL",)).tolist() == [True, False]
    tensor.data = [True, 0.5]
    with pytest.raises(InvalidInput, match="allowed is true or false"):
        TensorReader([tensor], b"").numbers("x", ("BOOL",))


def test_deep_and_wide_data_cost_little() -> None:
    """Once flattened again and again, once for each of the shape's dimensions."""
    deep: list[object] = [1]
    for _ in range(200):
        deep = [deep]
    tensor = Tensor(name="x", datatype="INT64", shape=[1, 1, 1, 1], data=[*([1] * 50_000), deep])
    with pytest.raises(InvalidInput, match="neither flat nor nested"):
        TensorReader([tensor], b"").numbers("x", ("INT64",))


def test_a_name_stands_for_one_tensor() -> None:
    twice = [Tensor(name="x", datatype="FP32", shape=[0], data=[])] * 2
    with pytest.raises(InvalidInput, match="the same name"):
        TensorReader(twice, b"")
