"""`POST /classify` and `/v1/classify`: vLLM's request and response, with our controls on top.

Differences from vLLM, on purpose: unknown fields are ignored but named in the response header
`x-ignored-fields`; `messages` is refused; too long a text is an error unless truncation is asked
for (by `truncate_prompt_tokens` or the server's `--auto-truncate`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from offramp_model.rows import Encoding
from offramp_model.tokenizer import Text
from offramp_service.errors import InvalidInput
from offramp_service.pipeline import Cut, Pipeline, Place
from offramp_service.routes.door import (
    Call,
    Handler,
    LeanRoute,
    Outcome,
    ReadBody,
    Served,
    Wording,
    check_request_id,
    classify,
    door,
)
from offramp_service.routes.scores import best, check_top_k, scores
from offramp_service.schemas import openapi
from offramp_service.schemas.reading import encode_json
from offramp_service.schemas.shared import Activation
from offramp_service.schemas.vllm import (
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    Item,
    Usage,
    error_body,
    read_request,
)
from offramp_service.settings import Settings

PATHS = ("/classify", "/v1/classify")
WORDING = Wording(error_body)


def wording(_: Settings) -> Wording:
    """How the door speaks of errors."""
    return WORDING


def router(models: Served) -> APIRouter:
    """The door's routes."""
    routes = APIRouter(route_class=LeanRoute, tags=["classify"])
    for path in PATHS:
        routes.add_api_route(
            path,
            door(models, path, _handler(models), WORDING),
            methods=["POST"],
            name=path.strip("/"),
            summary="Classify texts (vLLM's format)",
            response_model=None,
            openapi_extra=openapi.of_question(ClassifyRequest, ErrorResponse, ClassifyResponse),
        )
    return routes


def _handler(models: Served) -> Handler:
    async def handle(request: Request, read_body: ReadBody, call: Call) -> Response:
        asked, ignored = read_request(await read_body())
        if asked.request_id is not None:
            call.request_id = check_request_id(asked.request_id)
        return await _Classify(models.of(asked.model), call).answer(asked, ignored, request)

    return handle


class _Classify:
    """One request."""

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        self._pipeline, self._call = pipeline, call
        call.metrics = pipeline.metrics

    async def answer(
        self, asked: ClassifyRequest, ignored: list[str], request: Request
    ) -> Response:
        call = self._call
        check_top_k(asked.top_k)
        controls = self._pipeline.controls.resolve(asked, request.headers)
        if asked.return_signals:
            controls = replace(controls, all_signals=True)
        place = Place("input", _is_list(asked))
        count = len(asked.input) if place.is_list else 1
        encode = partial(self._encode, asked, place)
        outcome = await classify(self._pipeline, call, place, [controls] * count, encode)
        content = ClassifyResponse(
            id=f"classify-{call.request_id}",
            created=int(time.time()),
            model=self._pipeline.model.name,
            data=self._items(asked, outcome),
            usage=Usage(prompt_tokens=outcome.tokens, total_tokens=outcome.tokens),
        )
        headers = outcome.headers(call, is_list=place.is_list, ignored=ignored)
        return Response(encode_json(content), headers=headers, media_type="application/json")

    async def _encode(self, asked: ClassifyRequest, place: Place) -> list[Encoding]:
        """The request's texts as tokens, whichever of the four shapes they came in. All that is
        needed of them is in there; they may be large, so the request lets go of them."""
        cut = self._cut(asked)
        given: Sequence[object] = [asked.input] if isinstance(asked.input, str) else asked.input
        if isinstance(asked.input, list) and not place.is_list:
            # Token ids of one text may be a million: their number is checked before they are.
            given = self._pipeline.fit(cast(list[int], asked.input), place.field, cut=cut)
        asked.input = ""
        kind = _kind(given)
        if kind is str:
            texts = _pair(cast(list[str], given), asked.text_pair, place)
            return await self._pipeline.encode(
                texts, place, cut=cut, add_special_tokens=asked.add_special_tokens
            )
        if asked.text_pair is not None:
            raise InvalidInput(
                "text_pair goes with texts; token ids already hold both", param="text_pair"
            )
        ids = cast(list[list[int]], [given] if kind is int else given)
        return self._pipeline.check_ids(ids, place, cut=cut)

    def _cut(self, asked: ClassifyRequest) -> Cut | None:
        """vLLM's truncation: -1 cuts to the model's limit, null leaves it to the server."""
        limit = asked.truncate_prompt_tokens
        longest = self._pipeline.model.max_input_length
        side = asked.truncation_side or "right"
        if limit is None:
            return Cut(side=side) if self._pipeline.settings.auto_truncate else None
        if limit == -1:
            return Cut(side=side)
        shortest = 1 + self._specials(asked)  # something of the text has to remain
        if not shortest <= limit <= longest:
            raise InvalidInput(
                f"truncate_prompt_tokens is {limit!s:.40}, allowed is {shortest} to {longest}, "
                "or -1",
                param="truncate_prompt_tokens",
            )
        return Cut(limit, side)

    def _specials(self, asked: ClassifyRequest) -> int:
        """Tokens that are not the client's: none with token ids, which come with theirs."""
        is_text = isinstance(asked.input, str) or (asked.input and isinstance(asked.input[0], str))
        if not is_text or not asked.add_special_tokens:
            return 0
        return self._pipeline.specials(pair=asked.text_pair is not None)

    def _items(self, asked: ClassifyRequest, outcome: Outcome) -> list[Item]:
        labels = self._pipeline.model.config.labels
        activation: Activation | None = "none" if asked.use_activation is False else None
        items = []
        for index, timed in enumerate(outcome.answers):
            values = scores(timed.answer, activation)
            item = Item(index, labels[timed.answer.label], values, len(labels))
            if asked.top_k is not None:
                item.top = best(labels, values, asked.top_k)
            if asked.return_details or asked.return_signals:
                item.details = outcome.details(index)
            items.append(item)
        return items


def _is_list(asked: ClassifyRequest) -> bool:
    """Several texts (be it a list of one), as opposed to one text or its token ids."""
    given = asked.input
    return isinstance(given, list) and not (given and isinstance(given[0], int))


def _kind(given: Sequence[object]) -> type:
    """str: texts, int: token ids of one text, list: token ids of several."""
    kind = type(given[0])
    for index, item in enumerate(given):
        if type(item) is not kind:
            raise InvalidInput(
                f"input mixes kinds: input[0] and input[{index}] differ; allowed are texts only, "
                "token ids only, or lists of token ids only",
                param=f"input[{index}]",
            )
    return kind


def _pair(texts: list[str], second: str | list[str] | None, place: Place) -> Sequence[Text]:
    if second is None:
        return texts
    others = [second] if isinstance(second, str) else second
    if isinstance(second, str) is place.is_list or len(others) != len(texts):
        raise InvalidInput(
            "text_pair does not match input: allowed is a text for a text, or a list with as many "
            f"texts as input ({len(texts)})",
            param="text_pair",
        )
    return list(zip(texts, others, strict=True))
