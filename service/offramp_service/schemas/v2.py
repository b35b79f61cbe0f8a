"""The bodies of the Open Inference Protocol, version 2, with Triton's extensions, and those of
KServe's version 1.

Tensors come as JSON or as bytes after it (`tensors.py`); here they are JSON only.
"""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from offramp_service.errors import InvalidInput, ServiceError
from offramp_service.schemas.reading import Reader, encode_json
from offramp_service.schemas.shared import Asked, Details, Scored

Value = str | int | float | bool | None
"""Of a parameter. None is standardised; ours are the controls of early exit."""

Parameters = dict[str, Value]


class Tensor(Struct, kw_only=True, omit_defaults=True):
    """A tensor, in a question or in an answer; `data` is nested or flat, row by row."""

    name: str
    datatype: Annotated[str, Meta(description="BYTES, INT64, FP32, …")]
    shape: list[int]
    parameters: Parameters | UnsetType | None = UNSET
    data: list[Any] | UnsetType = UNSET


class Wanted(Struct, kw_only=True):
    """An output that is asked for."""

    name: str
    parameters: Parameters | None = None


class InferRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`text` (BYTES), with `text_pair` if it is two; or `input_ids` (INT64) with
    `attention_mask`; and `speedup` (FP32), one for each text."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: Annotated[
        list[Wanted] | None, Meta(description="default: logits, probabilities, label, exit_layer")
    ] = None


class _Tolerant(InferRequest, forbid_unknown_fields=False, kw_only=True):
    pass


class InferResponse(Struct, kw_only=True, omit_defaults=True):
    model_name: str
    model_version: str
    id: str | UnsetType = UNSET
    parameters: Parameters
    outputs: list[Tensor]


class ErrorResponse(Struct):
    error: str


class PairOfTexts(Struct):
    """Two texts, in the form that says so."""

    text: str
    text_pair: str | None = None


class InstancesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """KServe's version 1, and Vertex: texts."""

    instances: list[str | PairOfTexts]
    parameters: Parameters | None = None


class _TolerantInstances(InstancesRequest, forbid_unknown_fields=False, kw_only=True):
    pass


class Prediction(Struct, kw_only=True):
    """`probabilities` are in label-id order; `top` is there if `top_k` was."""

    label: str
    score: float
    probabilities: list[float]
    top: list[Scored] | UnsetType = UNSET
    details: Details | UnsetType = UNSET


class PredictionsResponse(Struct):
    predictions: list[Prediction]


read_request = Reader(InferRequest, _Tolerant, required="inputs")
read_instances = Reader(InstancesRequest, _TolerantInstances, required="instances")

_CONTROLS = frozenset(Asked.__struct_fields__)


def error_body(error: ServiceError) -> bytes:
    """The error format of V2, and of V1."""
    return encode_json(ErrorResponse(error.message))


def controls_in(parameters: Parameters) -> Asked:
    """The controls among a request's parameters. Clients that cannot send a number send a string.

    Raises:
        InvalidInput: one is of another type; names it.
    """
    given = {name: value for name, value in parameters.items() if name in _CONTROLS}
    try:
        return msgspec.convert(given, Asked, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).partition("`$.")[2].rstrip("`")
        shown = str(given.get(name))[:60]
        raise InvalidInput(
            f"parameters.{name} is {shown!r}, allowed is {_allowed(str(error))}",
            param=f"parameters.{name}",
        ) from None


def _allowed(message: str) -> str:
    return (
        "true or false" if "bool" in message else "an integer" if "int" in message else "a number"
    )
