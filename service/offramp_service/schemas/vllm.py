"""The bodies of `/classify`: vLLM's, field by field, plus our controls at top level."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from offramp_service.errors import ServiceError
from offramp_service.schemas.reading import Reader, encode_json
from offramp_service.schemas.shared import Asked, Details, Scored

# One text, several texts, the token ids of one text, or of several. A JSON type per element is
# all that msgspec can tell apart; that a list is of one kind is checked by the route.
Input = str | list[str | int | list[int]]


class ClassifyRequest(Asked, forbid_unknown_fields=True, kw_only=True):
    """A request. Unknown fields are ignored and named in the response header x-ignored-fields."""

    input: Annotated[
        Input,
        Meta(
            description="a text, texts, token ids of a text, or token ids of texts",
            extra_json_schema={"minLength": 1, "minItems": 1},
        ),
    ]
    text_pair: Annotated[
        str | list[str] | None, Meta(description="second text of each pair, aligned with input")
    ] = None
    model: str | None = None
    return_signals: Annotated[
        bool,
        Meta(description="details of each text, with the signal at every exit that it passed"),
    ] = False
    # vLLM's extras
    use_activation: Annotated[
        bool | None, Meta(description="false: logits instead of probabilities")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="cut texts to so many tokens; -1 = the model's limit")
    ] = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    request_id: str | None = None
    # Accepted for vLLM's clients, without effect here
    user: str | None = None
    padding: Any = None
    cache_salt: str | None = None


class _Tolerant(ClassifyRequest, forbid_unknown_fields=False, kw_only=True):
    pass


class Item(Struct):
    """The answer to one text. `probs` are in label-id order; `top` is there if `top_k` was."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    top: list[Scored] | UnsetType = UNSET
    details: Details | UnsetType = UNSET


class Usage(Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyResponse(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Item]
    usage: Usage


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(Struct):
    error: ErrorDetail


read_request = Reader(
    ClassifyRequest,
    _Tolerant,
    required="input",
    choices={"truncation_side": "left or right"},
    refused={"messages": "chat messages are not supported; send the text as input"},
)


def error_body(error: ServiceError) -> bytes:
    """The error format of vLLM, for this door and for paths that belong to no door."""
    detail = ErrorDetail(error.message, error.kind, error.param, error.status)
    return encode_json(ErrorResponse(detail))
