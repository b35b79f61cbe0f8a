"""A run: the servers are asked who they are, processes share the load, their counts are put
together.

The processes begin at one moment, each with every n-th request that is due.
"""

import json
import signal
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

from offramp_loadtest.generator import ClosedLoop, Effort, OpenLoop, Planned, Targets
from offramp_loadtest.http_client import Address
from offramp_loadtest.planning import Maker, Server, check_trace, deck, replayed
from offramp_loadtest.progress import Moment, Show
from offramp_loadtest.question import Outcome
from offramp_loadtest.recorder import Recorder
from offramp_loadtest.scenario import Closed, Replay, Scenario

ASK_TIMEOUT_S = 10.0
LEAD_S = 0.3
"""From the last process being ready to the start."""


class TargetError(RuntimeError):
    """A target does not answer, or not us."""


@dataclass(frozen=True)
class Measured:
    """What a run has to tell."""

    scenario: Scenario
    server: Server
    started: datetime
    recorder: Recorder
    efforts: Sequence[Effort]  # process by process
    machine_busy: float | None  # share of all cores' time, by whomever

    @property
    def seconds(self) -> float:
        """Counted: without the warm-up, and no longer than the run really went on."""
        planned = self.scenario.arrivals.seconds
        last = self.recorder.last_due_s
        if planned is None or last < 0.9 * planned:  # of a trace, or ended early
            planned = max(last, self.scenario.warm_up_s + 1e-3)
        return planned - self.scenario.warm_up_s


# -- who is there --------------------------------------------------------------------------------


def ask_servers(scenario: Scenario, headers: Sequence[str]) -> Server:
    """Every target must answer; the first one's `/info` says what is served, where it has one.

    Raises:
        TargetError: a target does not answer, or refuses us.
    """
    trust = _trust(scenario)
    found = [_ask(one, headers, trust) for one in scenario.target.addresses()]
    info = found[0]
    model = scenario.target.model or info.get("served_model_name") or ""
    classes = info.get("model_type", {}).get("classifier", {}).get("id2label", {})
    labels = [classes[str(index)] for index in range(len(classes))]
    return Server(model, labels, info.get("num_layers"), info)


def _ask(address: Address, headers: Sequence[str], trust: ssl.SSLContext | None) -> dict[str, Any]:
    if address.tls:
        connection: HTTPConnection = HTTPSConnection(
            address.host, address.port, timeout=ASK_TIMEOUT_S, context=trust
        )
    else:
        connection = HTTPConnection(address.host, address.port, timeout=ASK_TIMEOUT_S)
    try:
        parts = (one.partition(":") for one in headers)
        named = {name: value.strip() for name, _, value in parts}
        connection.request("GET", f"{address.prefix}/info", headers=named)
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException) as error:
        raise TargetError(f"{address} does not answer: {error}") from None
    finally:
        connection.close()
    if response.status in (401, 403):
        raise TargetError(f"{address} refuses us with {response.status}; see --api-key-env")
    try:
        content = json.loads(body) if response.status == 200 else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _trust(scenario: Scenario) -> ssl.SSLContext | None:
    target = scenario.target
    if not any(one.tls for one in target.addresses()):
        return None
    return ssl.create_default_context(cafile=target.ca_file)


# -- a process's share ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What a process has to do."""

    scenario: Scenario
    server: Server
    headers: tuple[str, ...]
    place: int

    def connections(self) -> int:
        return max(1, self.scenario.target.max_connections // self.scenario.processes)


class Worker:
    """One process's part of a run: prepared, then run from a moment on."""

    def __init__(self, share: Share) -> None:
        """Raises:
        ScenarioError: see `Maker`.
        """
        self._share, scenario = share, share.scenario
        self._random = Random(f"{scenario.seed}/{share.place}")
        self._maker = Maker(scenario, share.server, self._random, share.headers)
        self._questions = None if isinstance(scenario.arrivals, Replay) else deck(self._maker)

    def run(self, start: float, show: Show) -> tuple[Recorder, Effort]:
        scenario = self._share.scenario
        recorder = Recorder(start=start, warm_up_s=scenario.warm_up_s)
        moment = Moment()
        shown = time.perf_counter()

        def note(outcome: Outcome) -> None:
            recorder.note(outcome)
            moment.note(outcome)

        def each_second() -> None:
            nonlocal moment, shown
            now = time.perf_counter()
            moment.seconds, shown = now - shown, now
            show(now - start, moment)
            moment = Moment()

        if isinstance(scenario.arrivals, Closed):
            effort = self._closed(scenario.arrivals, note, start, each_second)
        else:
            effort = OpenLoop(
                self._targets,
                self._planned(),
                note,
                start=start,
                patience_s=scenario.target.patience_s,
                each_second=each_second,
            ).run()
        return recorder, effort

    def _closed(self, arrivals: Closed, note: Any, start: float, each_second: Any) -> Effort:
        assert self._questions is not None
        place, processes = self._share.place, self._share.scenario.processes
        in_flight = len(range(place, arrivals.in_flight, processes))
        loop = ClosedLoop(
            self._targets,
            self._questions,
            note,
            in_flight=in_flight,
            start=start,
            seconds=arrivals.seconds,
            patience_s=self._share.scenario.target.patience_s,
            each_second=each_second,
        )
        return loop.run()

    def _planned(self) -> Iterator[Planned]:
        scenario, place = self._share.scenario, self._share.place
        arrivals = scenario.arrivals
        if isinstance(arrivals, Replay):
            among = {"place": place, "processes": scenario.processes}
            return replayed(arrivals, self._maker, scenario, self._random, **among)
        assert not isinstance(arrivals, Closed)
        assert self._questions is not None
        due = islice(arrivals.due(Random(scenario.seed)), place, None, scenario.processes)
        return zip(due, self._questions, strict=False)

    def _targets(self) -> Targets:
        target = self._share.scenario.target
        return Targets(
            target.addresses(),
            self._share.connections(),
            least_outstanding=target.balance == "least-outstanding",
            trust=_trust(self._share.scenario),
        )


# -- the whole -----------------------------------------------------------------------------------


def run(scenario: Scenario, environment: Mapping[str, str], show: Show) -> Measured:
    """Everything that a scenario says.

    Raises:
        ScenarioError: something in it cannot be had.
        TargetError: a target does not answer.
    """
    key = scenario.target.api_key(environment)
    headers = tuple(scenario.target.headers)
    if key is not None:
        headers = (*headers, f"authorization: Bearer {key}")
    if isinstance(scenario.arrivals, Replay):
        check_trace(scenario.arrivals)
    server = ask_servers(scenario, headers)
    shares = [Share(scenario, server, headers, place) for place in range(scenario.processes)]
    results, started, busy = (_run_alone if len(shares) == 1 else _run_together)(shares, show)
    recorder = Recorder()
    for one, _ in results:
        recorder.add(one)
    efforts = [effort for _, effort in results]
    return Measured(scenario, server, started, recorder, efforts, busy)


Results = list[tuple[Recorder, Effort]]
"""Process by process."""
Course = tuple[Results, datetime, float | None]
"""With when it began, and how busy the machine was."""


def _run_alone(shares: Sequence[Share], show: Show) -> Course:
    worker = Worker(shares[0])
    started, busy = datetime.now(UTC), _Busy()
    results = [worker.run(time.perf_counter() + LEAD_S, show)]
    return results, started, busy.share()


def _run_together(shares: Sequence[Share], show: Show) -> Course:
    """Each in a process of its own, that says when it is ready, and what it sees and has seen."""
    context = get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    for share in shares:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(share, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def stop(*_: object) -> None:
        for process in processes:
            process.terminate()  # which ends the sending, see the loops

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        for pipe in pipes:
            _receive(pipe)  # ready
        started, busy = datetime.now(UTC), _Busy()
        start = time.perf_counter() + LEAD_S
        for pipe in pipes:
            pipe.send(start)
        return _gather(pipes, show), started, busy.share()
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.join(10)
        for pipe in pipes:
            pipe.close()


def _gather(pipes: Sequence[Connection], show: Show) -> Results:
    results: dict[Connection, tuple[Recorder, Effort]] = {}
    moments: dict[Connection, Moment] = {}
    while len(results) < len(pipes):
        for pipe in wait([one for one in pipes if one not in results]):
            assert isinstance(pipe, Connection)
            message = _receive(pipe)
            if message[0] == "done":
                recorded, effort = message[1:]
                results[pipe] = Recorder.from_json(recorded), Effort(**effort)
                continue
            at, moment = message[1:]
            mine = moments.setdefault(pipe, Moment())
            mine.add(moment)
            mine.seconds += moment.seconds
            if len(moments) + len(results) >= len(pipes):
                show(at, _together(moments.values()))
                moments.clear()
    return [results[pipe] for pipe in pipes]


def _together(moments: Iterable[Moment]) -> Moment:
    """Of several processes at the same time."""
    together = Moment()
    for one in moments:
        together.add(one)
        together.seconds = max(together.seconds, one.seconds)
    return together


def _receive(pipe: Connection) -> Any:
    try:
        message = pipe.recv()
    except EOFError:
        raise RuntimeError("a process of the generator ended without a word") from None
    if isinstance(message, Exception):
        raise message
    return message


def _work(share: Share, pipe: Connection) -> None:
    """The life of a process."""
    try:
        worker = Worker(share)
        pipe.send("ready")
        start = pipe.recv()
        recorder, effort = worker.run(start, partial(_tell, pipe))
        pipe.send(("done", recorder.to_json(), asdict(effort)))
    except Exception as error:  # told to whoever started us
        pipe.send(error)


def _tell(pipe: Connection, at: float, moment: Moment) -> None:
    pipe.send(("moment", at, moment))


class _Busy:
    """How much of all cores' time is used, from now on. None where the machine does not say."""

    def __init__(self) -> None:
        self._before = _cpu_times()

    def share(self) -> float | None:
        now = _cpu_times()
        if self._before is None or now is None or now[1] <= self._before[1]:
            return None
        return (now[0] - self._before[0]) / (now[1] - self._before[1])


def _cpu_times() -> tuple[int, int] | None:
    """(busy, all), in ticks."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, first.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait
