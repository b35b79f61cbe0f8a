"""`POST /classify` and `/v1/classify`: vLLM's request and response, with our controls on top.

Differences from vLLM, on purpose: unknown fields are ignored but named in the response header
`x-ignored-fields`; `messages` is refused; too long a text is an error unless truncation is asked
for (by `truncate_prompt_tokens` or the server's `--auto-truncate`).
"""

import math
import re
import time
from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from offramp_model.rows import Encoding
from offramp_model.tokenizer import Text
from offramp_service.controls import Asked
from offramp_service.errors import InvalidInput
from offramp_service.jobs import Controls, TimedAnswer
from offramp_service.pipeline import Cut, Pipeline, Place
from offramp_service.routes.door import (
    Call,
    LeanRoute,
    ReadBody,
    check_request_id,
    door,
    raised_header,
    response_headers,
)
from offramp_service.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    Details,
    Item,
    Timings,
    Usage,
    encode_json,
    error_body,
    openapi,
    read_request,
)

PATHS = ("/classify", "/v1/classify")

_SPEAKABLE = re.compile(r"[\w.-]{1,40}", re.ASCII)


def router(pipeline: Pipeline) -> APIRouter:
    """The door's routes."""
    routes = APIRouter(route_class=LeanRoute, tags=["classify"])
    for path in PATHS:
        routes.add_api_route(
            path,
            door(pipeline, path, _Classify(pipeline).handle, error_body),
            methods=["POST"],
            name=path.strip("/"),
            summary="Classify texts (vLLM's format)",
            response_model=None,
            openapi_extra=openapi(ClassifyRequest, ClassifyResponse),
        )
    return routes


class _Classify:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def handle(self, request: Request, read_body: ReadBody, call: Call) -> Response:
        asked, ignored = read_request(await read_body())
        if asked.request_id is not None:
            call.request_id = check_request_id(asked.request_id)
        self._check_model(asked.model)
        controls = self._controls(asked, request)
        if controls.deadline_s is not None:
            call.within(controls.deadline_s)
        place = Place("input", _is_list(asked))
        count = len(asked.input) if place.is_list else 1
        with self._pipeline.admit(count, place.field, call.request_id) as batch:
            started = time.perf_counter()
            encodings = await self._encode(asked, place)
            tokenization_s = time.perf_counter() - started
            asked.input = ""  # all that was needed of it is in the encodings
            answers = await self._pipeline.answer(batch, encodings, controls)
        tokens = sum(len(one) for one in encodings)
        headers = response_headers(
            self._pipeline,
            call,
            answers,
            is_list=place.is_list,
            threshold=controls.threshold,
            tokens=tokens,
            tokenization_s=tokenization_s,
        )
        headers |= raised_header(controls)
        if ignored:
            headers["x-ignored-fields"] = _names(ignored)
        content = ClassifyResponse(
            id=f"classify-{call.request_id}",
            created=int(time.time()),
            model=self._pipeline.model.name,
            data=self._items(asked, controls, answers, tokenization_s),
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
        return Response(encode_json(content), headers=headers, media_type="application/json")

    def _check_model(self, name: str | None) -> None:
        served = self._pipeline.model.name
        if name is not None and name != served:
            raise InvalidInput(
                f"model {name[:80]!r} is not served here, {served!r} is",
                param="model",
                status=404,
            )

    def _controls(self, asked: ClassifyRequest, request: Request) -> Controls:
        wanted = Asked(
            asked.speedup, asked.threshold, asked.min_layer, asked.max_layer, asked.deadline_ms
        )
        return self._pipeline.controls.resolve(wanted, request.headers)

    async def _encode(self, asked: ClassifyRequest, place: Place) -> list[Encoding]:
        """The request's texts as tokens, whichever of the four shapes they came in."""
        cut = self._cut(asked)
        given: Sequence[object] = [asked.input] if isinstance(asked.input, str) else asked.input
        if isinstance(asked.input, list) and not place.is_list:
            # Token ids of one text may be a million: their number is checked before they are.
            given = self._pipeline.fit(cast(list[int], asked.input), place.field, cut=cut)
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

    def _items(
        self,
        asked: ClassifyRequest,
        controls: Controls,
        answers: Sequence[TimedAnswer],
        tokenization_s: float,
    ) -> list[Item]:
        labels = self._pipeline.model.config.labels
        items = []
        for index, timed in enumerate(answers):
            answer = timed.answer
            scores = answer.logits if asked.use_activation is False else answer.probs
            item = Item(index, labels[answer.label], scores, len(labels))
            if asked.return_details:
                item.details = Details(
                    exit_layer=answer.exit_layer,
                    num_layers=self._pipeline.model.num_layers,
                    exit_signal=_finite(answer.signal),
                    threshold=_finite(controls.threshold),
                    timings_ms=_timings(timed, tokenization_s),
                )
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


def _timings(timed: TimedAnswer, tokenization_s: float) -> Timings:
    total = tokenization_s + timed.queue_s + timed.inference_s
    parts = (tokenization_s, timed.queue_s, timed.inference_s, total)
    return Timings(*(round(seconds * 1000, 3) for seconds in parts))


def _finite(number: float) -> float | None:
    """JSON has no infinity: null stands for "never early"."""
    return number if math.isfinite(number) else None


def _names(ignored: list[str]) -> str:
    """Fit for a header: a few names, and only harmless ones."""
    names = [name if _SPEAKABLE.fullmatch(name) else "?" for name in ignored[:10]]
    return ", ".join(names) + (", ..." if len(ignored) > 10 else "")
