"""The bodies of `/predict`: TEI's, plus our controls in `parameters`, as Hugging Face's clients
have theirs."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from offramp_service.errors import EmptyInput, InvalidInput, ServiceError
from offramp_service.schemas.reading import Reader, encode_json
from offramp_service.schemas.shared import Activation, Asked, Details, Scored

# TEI's shapes: a text, ["a text"], ["a", "pair"], or a list of those lists.
Inputs = str | list[str | list[str]]

Direction = Literal["left", "right", "Left", "Right"]
ErrorType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class PredictParameters(Asked, forbid_unknown_fields=True, kw_only=True):
    """Early exit, and what Hugging Face's text classification task knows."""

    function_to_apply: Annotated[
        Activation | None, Meta(description="what makes scores of logits; default: the model's own")
    ] = None


class PredictRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A request. `["a", "b"]` is one pair, as in TEI; texts are `[["a"], ["b"]]`."""

    inputs: Annotated[
        Inputs,
        Meta(
            description='a text, ["a text"], ["a", "pair"], or a list of such lists; how it was '
            "read is in the response header x-input-read",
            extra_json_schema={"minLength": 1, "minItems": 1},
        ),
    ]
    truncate: Annotated[
        bool | None, Meta(description="shorten long texts; default: the server's --auto-truncate")
    ] = None
    truncation_direction: Annotated[
        Direction, Meta(description="the side from which tokens are dropped")
    ] = "right"
    raw_scores: Annotated[bool, Meta(description="logits instead of probabilities")] = False
    parameters: PredictParameters | None = None
    return_details: Annotated[bool, Meta(description="say of each text how it left")] = False


class _TolerantParameters(PredictParameters, forbid_unknown_fields=False, kw_only=True):
    pass


class _Tolerant(PredictRequest, forbid_unknown_fields=False, kw_only=True):
    parameters: _TolerantParameters | None = None


class Detailed(Struct):
    """An answer with `return_details`: another shape, so that the plain one is never half
    changed."""

    scores: list[Scored]
    details: Details


class ErrorResponse(Struct):
    error: str
    error_type: ErrorType


read_request = Reader(
    PredictRequest,
    _Tolerant,
    required="inputs",
    choices={
        "truncation_direction": "left or right",
        "function_to_apply": "softmax, sigmoid or none",
    },
)


def error_body(error: ServiceError) -> bytes:
    """TEI's error format."""
    return encode_json(ErrorResponse(error.message, _error_type(error)))


def _error_type(error: ServiceError) -> ErrorType:
    if isinstance(error, EmptyInput):
        return "Empty"
    if isinstance(error, InvalidInput):
        return "Tokenizer" if error.reason == "tokenization" else "Validation"
    return _BY_STATUS.get(error.status, "Backend")


_BY_STATUS: dict[int, ErrorType] = {
    401: "Validation",
    429: "Overloaded",
    503: "Unhealthy",
    504: "Overloaded",  # no time left is a kind of load
}


def strict_status(error: ServiceError) -> int:
    """TEI's own status codes: 424 where the model failed, 422 for too many texts; bodies over the
    limit stay 413."""
    if error.status == 500:
        return 424
    return 422 if error.status == 413 and error.param is not None else error.status
