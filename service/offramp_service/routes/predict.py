"""`POST /predict`, `/` and `/invocations`: TEI's request and response, with our controls.

TEI reads a list of two strings as one *pair*; we do as well, and say in the header x-input-read how
a request was read. Whoever wants texts in a list sends `[["a"], ["b"]]`, or goes to `/classify`.
Differences from TEI, on purpose: scores are what the model was trained for (TEI: always softmax),
and status codes are the same on every door unless `--tei-strict`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from offramp_model.rows import Encoding
from offramp_model.tokenizer import Side, Text
from offramp_service.errors import EmptyInput, InvalidInput
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
from offramp_service.routes.scores import best, check_top_k, scores
from offramp_service.schemas import openapi
from offramp_service.schemas.reading import encode_json
from offramp_service.schemas.shared import Activation, Scored
from offramp_service.schemas.tei import (
    Detailed,
    ErrorResponse,
    Inputs,
    PredictParameters,
    PredictRequest,
    error_body,
    read_request,
    strict_status,
)
from offramp_service.settings import Settings

PATHS = ("/predict", "/", "/invocations")


def wording(settings: Settings) -> Wording:
    """How the door speaks of errors."""
    return Wording(error_body, strict_status) if settings.tei_strict else Wording(error_body)


def router(models: Served) -> APIRouter:
    """The door's routes."""
    strict = models.settings.tei_strict
    document = openapi.of_question(
        PredictRequest,
        ErrorResponse,
        *(list[Scored], list[list[Scored]], Detailed, list[Detailed]),
        also={"424": "The model failed"} if strict else None,
    )
    routes = APIRouter(route_class=LeanRoute, tags=["predict"])
    for path in PATHS:
        routes.add_api_route(
            path,
            door(models, path, _handler(models), wording(models.settings)),
            methods=["POST"],
            name=path.strip("/") or "root",
            summary="Classify texts or pairs (TEI's format)",
            response_model=None,
            openapi_extra=document,
        )
    return routes


def _handler(models: Served) -> Handler:
    async def handle(request: Request, read_body: ReadBody, call: Call) -> Response:
        asked, ignored = read_request(await read_body())
        # TEI's clients cannot name a model; the default may have been exchanged meanwhile.
        return await _Predict(models.default, call).answer(asked, ignored, request)

    return handle


class _Predict:
    """One request."""

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        self._pipeline, self._call = pipeline, call
        call.metrics = pipeline.metrics

    async def answer(self, asked: PredictRequest, ignored: list[str], request: Request) -> Response:
        call = self._call
        parameters = asked.parameters or PredictParameters()
        check_top_k(parameters.top_k, "parameters.top_k")
        controls = self._pipeline.controls.resolve(parameters, request.headers)
        texts, is_list, read_as = _texts(asked.inputs)
        place = Place("inputs", is_list)
        encode = partial(self._encode, texts, place, self._cut(asked))
        asked.inputs = ""
        outcome = await classify(self._pipeline, call, place, [controls] * len(texts), encode)
        activation: Activation | None = "none" if asked.raw_scores else parameters.function_to_apply
        answers = self._answers(outcome, activation, parameters.top_k)
        content: list[Any] = list(answers)
        if asked.return_details or parameters.return_details:
            content = [Detailed(one, outcome.details(index)) for index, one in enumerate(answers)]
        body = encode_json(content if is_list else content[0])
        headers = outcome.headers(call, is_list=is_list, ignored=ignored)
        headers["x-input-read"] = read_as
        return Response(body, headers=headers, media_type="application/json")

    async def _encode(self, texts: list[Text], place: Place, cut: Cut | None) -> Sequence[Encoding]:
        encodings = await self._pipeline.encode(texts, place, cut=cut)
        texts.clear()  # they may be large, and the wait for answers long
        return encodings

    def _cut(self, asked: PredictRequest) -> Cut | None:
        truncate = asked.truncate
        if truncate is None:
            truncate = self._pipeline.settings.auto_truncate
        side: Side = "left" if asked.truncation_direction.lower() == "left" else "right"
        return Cut(side=side) if truncate else None

    def _answers(
        self, outcome: Outcome, activation: Activation | None, top_k: int | None
    ) -> list[list[Scored]]:
        labels = self._pipeline.model.config.labels
        return [best(labels, scores(timed.answer, activation), top_k) for timed in outcome.answers]


def _texts(inputs: Inputs) -> tuple[list[Text], bool, str]:
    """The texts or pairs, whether they are several (be it a list of one), and how they were read.

    Raises:
        InvalidInput: a list of another form.
    """
    if isinstance(inputs, str):
        return [inputs], False, "text"
    if not inputs:
        raise EmptyInput("inputs is empty", param="inputs")
    kinds = {type(one) for one in inputs}
    if kinds == {str}:
        text = _text_or_pair([one for one in inputs if isinstance(one, str)], "inputs")
        return [text], False, "text" if isinstance(text, str) else "pair"
    if kinds != {list}:
        raise InvalidInput(
            'inputs mixes texts and lists; allowed is a text, ["a text"], ["a", "pair"], or a list '
            "of such lists",
            param="inputs",
        )
    lists = [one for one in inputs if isinstance(one, list)]
    texts = [_text_or_pair(one, f"inputs[{index}]") for index, one in enumerate(lists)]
    pairs = sum(isinstance(text, tuple) for text in texts)
    read_as = "texts" if not pairs else "pairs" if pairs == len(texts) else "texts and pairs"
    return texts, True, f"{len(texts)} {read_as}"


def _text_or_pair(given: list[str], where: str) -> Text:
    match given:
        case [text]:
            return text
        case [text, second]:
            return text, second
        case []:
            raise EmptyInput(f"{where} is empty", param=where)
    raise InvalidInput(
        f'{where} has {len(given)} strings; allowed is one text or one pair. Texts are [["a"], '
        '["b"], …]',
        param=where,
    )
