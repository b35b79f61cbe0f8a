"""`POST /v2/models/{model}/infer`: the Open Inference Protocol, as Triton and KServe speak it; and
`POST /v1/models/{model}:predict`, KServe's older one.

Texts or token ids come as tensors, in JSON or in bytes after it; each text may have a speed-up of
its own. Parameters that are not ours are ignored and named in the header x-ignored-fields.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import APIRouter, Request
from msgspec.structs import replace
from numpy.typing import NDArray
from starlette.responses import Response

from offramp_model.rows import Encoding
from offramp_model.tokenizer import Text
from offramp_service.errors import EmptyInput, InvalidInput
from offramp_service.jobs import Controls
from offramp_service.pipeline import Cut, Pipeline, Place
from offramp_service.routes.door import (
    Call,
    Handler,
    LeanRoute,
    Outcome,
    ReadBody,
    Served,
    Wording,
    classify,
    door,
)
from offramp_service.routes.scores import best, check_top_k, ranked
from offramp_service.routes.tensors import TensorReader, TensorWriter
from offramp_service.schemas import openapi
from offramp_service.schemas.reading import encode_json
from offramp_service.schemas.shared import Asked
from offramp_service.schemas.v2 import (
    ErrorResponse,
    InferRequest,
    InferResponse,
    InstancesRequest,
    PairOfTexts,
    Parameters,
    Prediction,
    PredictionsResponse,
    Wanted,
    controls_in,
    error_body,
    read_instances,
    read_request,
)
from offramp_service.settings import Settings

INFER_PATHS = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
PREDICT_PATH = "/v1/models/{model}:predict"
PATHS = (*INFER_PATHS, PREDICT_PATH)

WORDING = Wording(error_body)


def wording(_: Settings) -> Wording:
    """How the door speaks of errors."""
    return WORDING


HEADER_LENGTH = "inference-header-content-length"

SCORES = ("logits", "probabilities")
OUTPUTS = (*SCORES, "label", "exit_layer")
DETAILS = ("exit_signal", "threshold")
"""Outputs that are there for the asking."""

_TEXT_NAMES = ("text", "args")
_WITH_TEXT = ("text_pair", "speedup")
_WITH_IDS = ("attention_mask", "speedup")
_KNOWN = frozenset(
    (*Asked.__struct_fields__, "timeout", "binary_data_output", "binary_data_size", "truncate")
)


def router(models: Served) -> APIRouter:
    """The door's routes."""
    routes = APIRouter(route_class=LeanRoute, tags=["v2"])
    infer = openapi.of_question(InferRequest, ErrorResponse, InferResponse)
    predict = openapi.of_question(InstancesRequest, ErrorResponse, PredictionsResponse)
    for path, name, handle, document in (
        (INFER_PATHS[0], "infer", _infer(models), infer),
        (INFER_PATHS[1], "infer_version", _infer(models), infer),
        (PREDICT_PATH, "v1_predict", _predict(models), predict),
    ):
        inside = openapi.path_parameters(path, models.served)
        routes.add_api_route(
            path,
            door(models, path, handle, WORDING),
            methods=["POST"],
            name=name,
            summary="Classify texts (Open Inference Protocol, or KServe's V1)",
            response_model=None,
            openapi_extra=document | {"parameters": inside},
        )
    return routes


def _infer(models: Served) -> Handler:
    async def handle(request: Request, read_body: ReadBody, call: Call) -> Response:
        models.of(*_path(request))  # so that nobody's body is read in vain
        asked, ignored, tensors = _read(request, await read_body())
        pipeline = models.of(*_path(request))  # which may have been exchanged meanwhile
        return await _Infer(pipeline, call).answer(asked, ignored, tensors, request)

    return handle


def _predict(models: Served) -> Handler:
    async def handle(request: Request, read_body: ReadBody, call: Call) -> Response:
        asked, ignored = read_instances(await read_body())
        return await _Instances(models.of(*_path(request)), call).answer(asked, ignored, request)

    return handle


class _Infer:
    """One request."""

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        self._pipeline, self._call = pipeline, call
        call.metrics = pipeline.metrics

    async def answer(
        self, asked: InferRequest, ignored: list[str], tensors: TensorReader, request: Request
    ) -> Response:
        call = self._call
        source = _source(tensors)
        parameters = (asked.parameters or {}) | (tensors.named[source].parameters or {})
        ignored += [f"parameters.{name}" for name in parameters if name not in _KNOWN]
        general = _general(parameters)
        wanted = _wanted(asked.outputs, parameters, general)
        place, count, encode = self._texts(tensors, source, _cut(self._pipeline, parameters))
        self._pipeline.check_count(count, place.field)  # before there is work for each
        controls = self._controls(general, tensors, count, request.headers)
        asked.inputs = []
        del tensors  # what is needed of them is in `encode`
        outcome = await classify(self._pipeline, call, place, controls, encode)
        return self._response(
            asked, wanted, outcome, outcome.headers(call, is_list=True, ignored=ignored)
        )

    def _texts(
        self, tensors: TensorReader, source: str, cut: Cut | None
    ) -> tuple[Place, int, Callable[[], Awaitable[Sequence[Encoding]]]]:
        """The texts: how errors call them, how many, and what makes tokens of them."""
        place = Place(source if source.isidentifier() else "text", is_list=True)
        if source != "input_ids":
            texts = _pairs(tensors, source)
            return place, len(texts), partial(self._tokenise, texts, place, cut)
        ids, mask = _token_ids(tensors)
        return place, len(ids), partial(self._take_ids, ids, mask, place, cut)

    async def _tokenise(
        self, texts: list[Text], place: Place, cut: Cut | None
    ) -> Sequence[Encoding]:
        encodings = await self._pipeline.encode(texts, place, cut=cut)
        texts.clear()  # they may be large, and the wait for answers long
        return encodings

    async def _take_ids(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.generic] | None,
        place: Place,
        cut: Cut | None,
    ) -> Sequence[Encoding]:
        rows = (
            ids if mask is None else (row[real != 0] for row, real in zip(ids, mask, strict=True))
        )
        limit = self._pipeline.model.max_input_length + 1  # one more shows that it is too long
        texts = [row[:limit].tolist() for row in rows]
        return self._pipeline.check_ids(texts, place, cut=cut)

    def _controls(
        self, general: Asked, tensors: TensorReader, count: int, headers: Mapping[str, str]
    ) -> list[Controls]:
        """One for each text: those of the request, with the text's own speed-up if it has one."""
        resolve = self._pipeline.controls.resolve
        if "speedup" not in tensors.named:
            return [resolve(general, headers)] * count
        speedups = tensors.numbers("speedup", ("FP32", "FP64")).ravel()
        if len(speedups) != count:
            raise InvalidInput(
                f"speedup has {len(speedups)} values for {count} texts", param="speedup"
            )
        found: dict[str, Controls] = {}
        for one in map(str, speedups):  # the shortest decimal: 2.1 in FP32 is not quite 2.1
            if one not in found:
                own = replace(general, speedup=float(one), max_accuracy_drop=None)
                found[one] = resolve(own, headers)
        return [found[str(one)] for one in speedups]

    def _response(
        self,
        asked: InferRequest,
        wanted: Sequence["_Output"],
        outcome: Outcome,
        headers: dict[str, str],
    ) -> Response:
        model, writer = self._pipeline.model, TensorWriter()
        for output in wanted:
            _write(writer, output, outcome, model.config.labels)
        content = InferResponse(
            model_name=model.name,
            model_version=model.version,
            parameters={"speedup_achieved": round(outcome.speedup_achieved, 4)},
            outputs=writer.tensors,
        )
        if asked.id is not None:
            content.id = asked.id
        body = encode_json(content)
        if not writer.tail:
            return Response(body, headers=headers, media_type="application/json")
        headers[HEADER_LENGTH] = str(len(body))
        return Response(
            b"".join([body, *writer.tail]), headers=headers, media_type="application/octet-stream"
        )


@dataclass(frozen=True, slots=True)
class _Output:
    """An output that is asked for; `classes` best labels instead of all scores."""

    name: str
    binary: bool
    classes: int | None = None


def _cut(pipeline: Pipeline, parameters: Parameters) -> Cut | None:
    truncate = parameters.get("truncate", pipeline.settings.auto_truncate)
    if not isinstance(truncate, bool):
        raise InvalidInput(
            f"parameters.truncate is {truncate!s:.40}, allowed is true or false",
            param="parameters.truncate",
        )
    return Cut() if truncate else None


def _path(request: Request) -> tuple[str | None, str | None]:
    return request.path_params.get("model"), request.path_params.get("version")


def _read(request: Request, body: bytes) -> tuple[InferRequest, list[str], TensorReader]:
    """The request, names in it that nobody knows, and its tensors.

    Raises:
        InvalidInput: see `Reader` and `TensorReader`.
    """
    length, tail = request.headers.get(HEADER_LENGTH), b""
    if length is not None:
        if not length.isdecimal() or len(length) > 10 or not 0 < int(length) <= len(body):
            raise InvalidInput(
                f"{HEADER_LENGTH} is {length[:40]!r}, allowed is 1 to the {len(body)} bytes of the "
                "body",
                param=HEADER_LENGTH,
                status=400,
            )
        body, tail = body[: int(length)], body[int(length) :]
    asked, ignored = read_request(body)
    return asked, ignored, TensorReader(asked.inputs, tail)


def _source(tensors: TensorReader) -> str:
    """The input that holds the texts: `text` or `args`, token ids, or the first of strings.

    Raises:
        InvalidInput: there is none, or an input that nobody knows.
    """
    named = tensors.named
    texts = [name for name in _TEXT_NAMES if name in named]
    others = (
        name for name, one in named.items() if one.datatype == "BYTES" and name != "text_pair"
    )
    if texts:
        source, allowed = texts[0], _WITH_TEXT
    elif "input_ids" in named:
        source, allowed = "input_ids", _WITH_IDS
    else:
        source, allowed = next(others, "text"), _WITH_TEXT
    if source not in named:
        raise InvalidInput("inputs has neither text (BYTES) nor input_ids (INT64)", param="inputs")
    for name in named:
        if name != source and name not in allowed:
            raise InvalidInput(
                f"input {name[:40]!r} is not known beside {source[:40]}; allowed: "
                f"{', '.join(allowed)}",
                param="inputs",
            )
    return source


def _pairs(tensors: TensorReader, source: str) -> list[Text]:
    texts = tensors.texts(source)
    if not texts:
        raise EmptyInput(f"{source} is empty", param=source)
    if "text_pair" not in tensors.named:
        return list(texts)
    others = tensors.texts("text_pair")
    if len(others) != len(texts):
        raise InvalidInput(
            f"text_pair has {len(others)} texts, {source} has {len(texts)}", param="text_pair"
        )
    return list(zip(texts, others, strict=True))


def _token_ids(
    tensors: TensorReader,
) -> tuple[NDArray[np.int64], NDArray[np.generic] | None]:
    """Ids [texts, tokens], and what is not padding."""
    ids = np.atleast_2d(tensors.numbers("input_ids", ("INT64", "INT32")))
    if ids.ndim != 2:
        raise InvalidInput(
            f"input_ids has {ids.ndim} dimensions, allowed is [texts, tokens]", param="input_ids"
        )
    if "attention_mask" not in tensors.named:
        return ids, None
    mask = np.atleast_2d(tensors.numbers("attention_mask", ("INT64", "INT32", "BOOL")))
    if mask.shape != ids.shape:
        raise InvalidInput(
            "attention_mask has another shape than input_ids", param="attention_mask"
        )
    return ids, mask


def _general(parameters: Parameters) -> Asked:
    """The controls of the whole request; Triton's `timeout` is a deadline in microseconds."""
    asked = controls_in(parameters)
    timeout = parameters.get("timeout")
    if asked.deadline_ms is None and timeout:
        if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
            raise InvalidInput(
                f"parameters.timeout is {timeout!s:.40}, allowed are microseconds",
                param="parameters.timeout",
            )
        asked.deadline_ms = -(-timeout // 1000)  # rounded up, whatever its size
    check_top_k(asked.top_k, "parameters.top_k")
    return asked


def _wanted(
    outputs: Sequence[Wanted] | None, parameters: Parameters, general: Asked
) -> list[_Output]:
    binary = parameters.get("binary_data_output") is True
    if not outputs:
        names = OUTPUTS + (DETAILS if general.return_details else ())
        outputs = [Wanted(name=name) for name in names]
    found: dict[str, _Output] = {}
    for one in outputs:
        if one.name in found:
            raise InvalidInput(f"output {one.name!r} is asked for twice", param="outputs")
        if one.name not in OUTPUTS + DETAILS:
            raise InvalidInput(
                f"output {one.name[:40]!r} is not known; allowed: {', '.join(OUTPUTS + DETAILS)}",
                param="outputs",
            )
        own = one.parameters or {}
        is_score = one.name in SCORES
        classes = own.get("classification") or (general.top_k if is_score else None)
        if classes is not None:
            _check_classes(classes, one.name, is_score=is_score)
        found[one.name] = _Output(
            one.name,
            own.get("binary_data", binary) is True,
            classes if isinstance(classes, int) else None,
        )
    return list(found.values())


def _check_classes(classes: object, name: str, *, is_score: bool) -> None:
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise InvalidInput(
            f"classification of {name} is {classes!s:.40}, allowed is 1 or more", param="outputs"
        )
    if not is_score:
        raise InvalidInput(
            f"classification of {name} is not possible; it is of {' and '.join(SCORES)}",
            param="outputs",
        )


def _write(writer: TensorWriter, output: _Output, outcome: Outcome, labels: Sequence[str]) -> None:
    """One output tensor, a row for each text."""
    name, binary, count = output.name, output.binary, len(outcome.answers)
    answers = [timed.answer for timed in outcome.answers]
    match name:
        case "label":
            writer.texts(name, [count], [labels[one.label] for one in answers], binary=binary)
        case "exit_layer":
            layers = [one.exit_layer for one in answers]
            writer.numbers(name, "INT32", [count], layers, binary=binary)
        case "exit_signal" | "threshold":
            details = [outcome.details(index) for index in range(count)]
            values = [getattr(one, name) for one in details]
            writer.numbers(name, "FP32", [count], values, binary=binary)
        case _:
            rows = [one.logits if name == "logits" else one.probs for one in answers]
            if output.classes is None:
                flat = [value for row in rows for value in row]
                writer.numbers(name, "FP32", [count, len(labels)], flat, binary=binary)
            else:
                classes = min(output.classes, len(labels))
                named = [text for row in rows for text in _classified(row, labels, classes)]
                writer.texts(name, [count, classes], named, binary=binary)


def _classified(row: Sequence[float], labels: Sequence[str], classes: int) -> list[str]:
    """Triton's `value:index:label` of the best."""
    return [f"{row[index]:f}:{index}:{labels[index]}" for index in ranked(row)[:classes]]


class _Instances:
    """One request of KServe's V1."""

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        self._pipeline, self._call = pipeline, call
        call.metrics = pipeline.metrics

    async def answer(
        self, asked: InstancesRequest, ignored: list[str], request: Request
    ) -> Response:
        call = self._call
        parameters = asked.parameters or {}
        ignored += [f"parameters.{name}" for name in parameters if name not in _KNOWN]
        general = _general(parameters)
        controls = self._pipeline.controls.resolve(general, request.headers)
        place, count = Place("instances", is_list=True), len(asked.instances)
        encode = partial(self._encode, asked, place, _cut(self._pipeline, parameters))
        outcome = await classify(self._pipeline, call, place, [controls] * count, encode)
        content = PredictionsResponse(
            [self._prediction(outcome, index, general) for index in range(count)]
        )
        headers = outcome.headers(call, is_list=True, ignored=ignored)
        return Response(encode_json(content), headers=headers, media_type="application/json")

    async def _encode(
        self, asked: InstancesRequest, place: Place, cut: Cut | None
    ) -> Sequence[Encoding]:
        texts = [_instance(one) for one in asked.instances]
        asked.instances = []
        return await self._pipeline.encode(texts, place, cut=cut)

    def _prediction(self, outcome: Outcome, index: int, general: Asked) -> Prediction:
        labels, answer = self._pipeline.model.config.labels, outcome.answers[index].answer
        found = Prediction(
            label=labels[answer.label],
            score=answer.probs[answer.label],
            probabilities=answer.probs,
        )
        if general.top_k is not None:
            found.top = best(labels, answer.probs, general.top_k)
        if general.return_details:
            found.details = outcome.details(index)
        return found


def _instance(given: str | PairOfTexts) -> Text:
    if isinstance(given, str):
        return given
    return given.text if given.text_pair is None else (given.text, given.text_pair)
