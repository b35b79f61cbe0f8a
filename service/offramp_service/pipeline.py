"""What every door shares: texts → tokens → admission → answers.

A door reads its own request format, calls `encode` and `answer`, and words its own response. The
pipeline knows nothing about HTTP, and nothing about tensors either.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from offramp_model.rows import Encoding
from offramp_model.tokenizer import InputTooLong, Side, Text, TextTokenizer
from offramp_service.batcher import Batcher
from offramp_service.controls import ControlDesk
from offramp_service.errors import InvalidInput
from offramp_service.jobs import Controls, Job, TimedAnswer
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Metrics
from offramp_service.served_model import ServedModel
from offramp_service.settings import Settings

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


class Pipeline:
    """The service behind the doors."""

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        batcher: Batcher,
        metrics: Metrics,
        lifecycle: Lifecycle,
    ) -> None:
        self.settings, self.model, self.metrics = settings, model, metrics
        self.batcher, self.lifecycle = batcher, lifecycle
        self.controls = ControlDesk(model)
        self._tokenizer: TextTokenizer = model.tokenizer
        self._vocab_size = model.tokenizer.vocab_size
        self._specials = {
            pair: len(self._tokenizer.encode([("", "")] if pair else [""], truncate=False)[0])
            for pair in (False, True)
        }
        self._workers = ThreadPoolExecutor(settings.tokenization_workers, "tokenize")

    def close(self) -> None:
        """Stop the tokenisation threads."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def specials(self, *, pair: bool) -> int:
        """Special tokens that tokenising puts around a text or a pair."""
        return self._specials[pair]

    def check_count(self, count: int, param: str) -> None:
        """One request may carry so many texts, and at least one."""
        most = self.settings.max_client_batch_size
        if count == 0:
            raise InvalidInput(f"{param} is empty", param=param, status=400)
        if count > most:
            raise InvalidInput(
                f"{param} has {count} texts, at most {most} are allowed", param=param, status=413
            )

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
        """
        started = time.perf_counter()
        for index, text in enumerate(texts):
            if not (text if isinstance(text, str) else text[0] and text[1]):
                raise InvalidInput(f"{place.of(index)} is empty", param=place.of(index), status=400)
        encode = partial(
            self._tokenize, texts, place, cut=cut, add_special_tokens=add_special_tokens
        )
        # A limit of its own goes through a lock in the tokenizer: never on the event loop.
        if cut in (None, Cut()) and _characters(texts) <= INLINE_CHARACTERS:
            encodings = encode()
        else:
            encodings = await asyncio.get_running_loop().run_in_executor(self._workers, encode)
        self.metrics.tokenized(time.perf_counter() - started)
        return encodings

    def check_ids(
        self, texts: Sequence[list[int]], place: Place, *, cut: Cut | None = None
    ) -> list[Encoding]:
        """Token ids that the client made, taken as they are.

        Raises:
            InvalidInput: there are none, too many, or one that the vocabulary does not have.
        """
        encodings = []
        for index, ids in enumerate(texts):
            where = place.of(index)
            if not ids:
                raise InvalidInput(f"{where} is empty", param=where, status=400)
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                wrong = next(one for one in ids if not 0 <= one < self._vocab_size)
                raise InvalidInput(
                    f"{where} has token id {wrong}, allowed is 0 to {self._vocab_size - 1}",
                    param=where,
                )
            limit = self.model.max_input_length
            if cut is not None:
                limit = min(limit, cut.max_tokens or limit)
                ids = ids[-limit:] if cut.side == "left" else ids[:limit]
            if len(ids) > limit:
                raise _too_long(where, len(ids), limit)
            encodings.append(Encoding(ids, [0] * len(ids)))
        return encodings

    async def answer(
        self,
        encodings: Sequence[Encoding],
        controls: Controls,
        *,
        gone: Callable[[], Coroutine[object, object, object]] | None = None,
    ) -> list[TimedAnswer]:
        """Admit, wait, and count what the request got.

        Raises:
            ServiceError: see `Batcher.submit`.
        """
        if controls.speedup is not None:
            self.metrics.speedup_requested(controls.speedup)
        jobs = [Job(one.ids, one.type_ids, controls) for one in encodings]
        timeout_s = self.settings.request_timeout_ms / 1000
        answers = await self.batcher.submit(jobs, timeout_s=timeout_s, gone=gone)
        self.metrics.speedup_achieved(self.speedup_of(answers))
        return answers

    def speedup_of(self, answers: Sequence[TimedAnswer]) -> float:
        """Speed-up in layers that these texts got, a ratio of sums."""
        layers_run = sum(one.answer.exit_layer for one in answers)
        return self.model.num_layers * len(answers) / layers_run

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


def _characters(texts: Sequence[Text]) -> int:
    return sum(len(text) if isinstance(text, str) else len("".join(text)) for text in texts)


def _too_long(where: str, length: int, limit: int) -> InvalidInput:
    return InvalidInput(
        f"{where} has {length} tokens, at most {limit} are allowed unless truncation is asked for",
        param=where,
        reason="tokenization",
    )
