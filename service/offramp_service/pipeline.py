"""What every door shares: admission → texts → tokens → answers.

A door reads its own request format, calls `admit`, `encode` and `answer`, and words its own
response. Whoever gives up on a request cancels it, wherever it is. The pipeline knows nothing about
HTTP, and nothing about tensors either; nor where its queue is, in this process or in another one
(`fronts/`).
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from offramp_model.rows import Encoding
from offramp_model.tokenizer import InputTooLong, Side, Text, TextTokenizer
from offramp_service.batcher import Batcher
from offramp_service.controls import ControlDesk
from offramp_service.errors import EmptyInput, InvalidInput, Overloaded, Reason
from offramp_service.jobs import Controls, Job, TimedAnswer
from offramp_service.metrics import Metrics
from offramp_service.quality import SpeedupCorrection
from offramp_service.served_model import DescribedModel, ServedModel
from offramp_service.settings import Settings, SloMode
from offramp_service.slo_watch import SloWatch

# Up to here tokenising costs less than handing it to another thread and back (measured: about
# 0.1 ms for 1,000 characters, 0.1 ms for the hop).
INLINE_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Cut:
    """Shorten texts to so many tokens (None: what the model takes), dropping them at `side`."""

    max_tokens: int | None = None
    side: Side = "right"


@dataclass(frozen=True, slots=True)
class Place:
    """How a door calls its texts, so that an error can name the one at fault."""

    field: str
    is_list: bool

    def of(self, index: int) -> str:
        return f"{self.field}[{index}]" if self.is_list else self.field


class Admission(Protocol):
    """Room that a request has been given."""

    admitted_at: float  # time.perf_counter


class Queue(Protocol):
    """Takes texts in and answers them; see `Batcher`."""

    def admit(self, texts: int, request_id: str) -> AbstractContextManager[Any]: ...

    async def submit(self, batch: Any, jobs: Sequence[Job]) -> list[TimedAnswer]: ...


class Counts(Protocol):
    """Is told what doors and pipelines see; see `Metrics`."""

    def request_done(self, route: str, code: int, seconds: float) -> None: ...

    def request_failed(self, reason: Reason) -> None: ...

    def tokenized(self, seconds: float) -> None: ...

    def speedup_given(self, requested: float, texts: int, layers_run: int) -> None: ...


class Floor(Protocol):
    """Says to which speed-up requests are raised, and hears how they ended; see `SloWatch`."""

    def floor(self) -> float: ...

    def ended(self, admitted_at: float, *, answered: bool) -> None: ...


class Pipeline:
    """The service behind the doors."""

    def __init__(
        self,
        settings: Settings,
        model: DescribedModel,
        batcher: Queue,
        metrics: Counts,
        slo: Floor,
        correction: SpeedupCorrection | None = None,
    ) -> None:
        self.settings, self.model, self.metrics = settings, model, metrics
        self.batcher, self.slo = batcher, slo
        self.controls = ControlDesk(model, settings.request_timeout_ms, slo.floor, correction)
        self._tokenizer: TextTokenizer = model.tokenizer
        self._specials = {
            pair: len(self._tokenizer.encode([("", "")] if pair else [""], truncate=False)[0])
            for pair in (False, True)
        }
        self._workers = ThreadPoolExecutor(settings.tokenization_workers, "tokenize")
        self._free_workers = asyncio.Semaphore(settings.tokenization_workers)
        self._queued_characters = 0  # of the texts for the workers, waiting or at work

    def close(self) -> None:
        """Stop the tokenisation threads."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def specials(self, *, pair: bool) -> int:
        """Special tokens that tokenising puts around a text or a pair."""
        return self._specials[pair]

    def check_count(self, count: int, param: str) -> None:
        """May one request carry so many texts?

        Raises:
            InvalidInput: it may not, or there are none.
        """
        most = self.settings.max_client_batch_size
        if count == 0:
            raise EmptyInput(f"{param} is empty", param=param)
        if count > most:
            raise InvalidInput(
                f"{param} has {count} texts, at most {most} are allowed", param=param, status=413
            )

    @contextmanager
    def admit(self, count: int, param: str, request_id: str) -> Iterator[Any]:
        """Room for the texts of one request, until the block is left; an `Admission` of the queue's
        own kind.

        Raises:
            InvalidInput: a request may not carry so many texts, or none.
            ServiceError: see `Batcher.admit`.
        """
        self.check_count(count, param)
        with self.batcher.admit(count, request_id) as batch:
            answered = False
            try:
                yield batch
                answered = True
            finally:
                self.slo.ended(batch.admitted_at, answered=answered)

    async def encode(
        self,
        texts: Sequence[Text],
        place: Place,
        *,
        cut: Cut | None = None,
        add_special_tokens: bool = True,
    ) -> list[Encoding]:
        """Tokenise; `cut` None refuses what is too long.

        Raises:
            InvalidInput: a text is empty or too long; names it.
            Overloaded: too much text waits for tokenisation.
        """
        started = time.perf_counter()
        for index, text in enumerate(texts):
            if not (text if isinstance(text, str) else text[0] and text[1]):
                raise EmptyInput(f"{place.of(index)} is empty", param=place.of(index))
        encode = partial(
            self._tokenize, texts, place, cut=cut, add_special_tokens=add_special_tokens
        )
        # A limit of its own goes through a lock in the tokenizer: never on the event loop.
        characters = _characters(texts)
        if cut in (None, Cut()) and characters <= INLINE_CHARACTERS:
            encodings = encode()
        else:
            encodings = await self._in_worker(characters, encode)
        self.metrics.tokenized(time.perf_counter() - started)
        return encodings

    def check_ids(
        self, texts: Sequence[list[int]], place: Place, *, cut: Cut | None = None
    ) -> list[Encoding]:
        """Token ids that the client made, taken as they are.

        Raises:
            InvalidInput: there are none, too many, or one that the model has no embedding for.
        """
        encodings, largest = [], self.model.vocab_size - 1
        for index, ids in enumerate(texts):
            where = place.of(index)
            if not ids:
                raise EmptyInput(f"{where} is empty", param=where)
            ids = self.fit(ids, where, cut=cut)
            if not 0 <= min(ids) <= max(ids) <= largest:
                wrong = next(one for one in ids if not 0 <= one <= largest)
                raise InvalidInput(
                    f"{where} has token id {wrong!s:.40}, allowed is 0 to {largest}", param=where
                )
            encodings.append(Encoding(ids, [0] * len(ids)))
        return encodings

    def fit(self, ids: list[int], where: str, *, cut: Cut | None) -> list[int]:
        """Token ids cut to what is allowed; looks at their number only.

        Raises:
            InvalidInput: there are too many and they may not be cut.
        """
        limit = self.model.max_input_length
        if cut is not None:
            limit = min(limit, cut.max_tokens or limit)
            return ids[-limit:] if cut.side == "left" else ids[:limit]
        if len(ids) > limit:
            raise _too_long(where, len(ids), limit)
        return ids

    async def answer(
        self, batch: Admission, encodings: Sequence[Encoding], controls: Sequence[Controls]
    ) -> list[TimedAnswer]:
        """Queue, wait, and count what the request got; each text has controls of its own.

        Raises:
            ServiceError: see `Batcher.submit`.
        """
        pairs = zip(encodings, controls, strict=True)
        jobs = [Job(one.ids, one.type_ids, asked) for one, asked in pairs]
        answers = await self.batcher.submit(batch, jobs)
        layers: dict[float, list[int]] = {}
        for asked, timed in zip(controls, answers, strict=True):
            if asked.speedup is not None:
                layers.setdefault(asked.speedup, []).append(timed.answer.exit_layer)
        for speedup, run in layers.items():
            self.metrics.speedup_given(speedup, len(run), sum(run))
        return answers

    async def _in_worker(
        self, characters: int, encode: Callable[[], list[Encoding]]
    ) -> list[Encoding]:
        """Tokenise in a worker thread. Who waits for one waits here, where it can be cancelled;
        a thread at work cannot, and is not free before it is done."""
        most = self.settings.max_queued_characters
        # However large, one request may always wait alone.
        if self._queued_characters and self._queued_characters + characters > most:
            raise Overloaded(f"queue is full ({most} characters)")
        self._queued_characters += characters
        try:
            await self._free_workers.acquire()
            work = asyncio.get_running_loop().run_in_executor(self._workers, encode)
            work.add_done_callback(lambda _: self._free_workers.release())
            return await asyncio.shield(work)
        finally:
            self._queued_characters -= characters

    def _tokenize(
        self, texts: Sequence[Text], place: Place, *, cut: Cut | None, add_special_tokens: bool
    ) -> list[Encoding]:
        cut_to = cut or Cut()
        try:
            encodings = self._tokenizer.encode(
                texts,
                truncate=cut is not None,
                max_length=cut_to.max_tokens,
                side=cut_to.side,
                add_special_tokens=add_special_tokens,
            )
        except InputTooLong as error:
            raise _too_long(place.of(error.index), error.length, error.max_length) from None
        for index, encoding in enumerate(encodings):
            if not encoding.ids:
                where = place.of(index)
                raise InvalidInput(f"{where} has no tokens", param=where, reason="tokenization")
        return encodings


@dataclass(frozen=True, slots=True)
class Policy:
    """How speed and accuracy are traded for who does not say."""

    default_speedup: float
    slo_p95_ms: float | None
    slo_controller: SloMode


class RoomPipeline(Pipeline):
    """A pipeline whose engine is in this process."""

    model: ServedModel
    batcher: Batcher
    metrics: Metrics
    slo: SloWatch

    @property
    def policy(self) -> Policy:
        """What an operator may change while it serves."""
        slo = self.slo
        return Policy(self.controls.default_speedup, slo.target_p95_ms, slo.mode)

    def follow(self, policy: Policy) -> None:
        """Serve by another one from now on; whoever is inside keeps what was resolved.

        Raises:
            InvalidInput: this checkpoint cannot; nothing has changed.
        """
        self.controls.check_speedup(policy.default_speedup, "default_speedup")
        if policy.slo_p95_ms is not None and self.model.table is None:
            raise InvalidInput(
                "slo_p95_ms goes by a calibration, and this checkpoint has none",
                param="slo_p95_ms",
            )
        self.controls.default_speedup = self.slo.default_speedup = policy.default_speedup
        self.metrics.default_speedup_set(policy.default_speedup)
        self.slo.aim(policy.slo_p95_ms, policy.slo_controller)


def _characters(texts: Sequence[Text]) -> int:
    return sum(len(one) if isinstance(one, str) else len(one[0]) + len(one[1]) for one in texts)


def _too_long(where: str, length: int, limit: int) -> InvalidInput:
    return InvalidInput(
        f"{where} has {length} tokens, at most {limit} are allowed unless truncation is asked for",
        param=where,
        reason="tokenization",
    )
