"""The line on the terminal."""

import io

from offramp_loadtest.http_client import Reply
from offramp_loadtest.progress import Moment, Terminal
from offramp_loadtest.question import Outcome, Question


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def moment(seconds: float = 1.0) -> Moment:
    found = Moment(seconds)
    answered = Reply(200, b"HTTP/1.1 200 OK\r\nx-exit-layer: 2\r\n", b"")
    for status, took in ((200, 0.01), (200, 0.03), (429, 0.001)):
        reply = answered if status == 200 else Reply(status, b"", b"")
        found.note(Outcome(Question((b"",)), 0, 0.0, 0.0, took, reply))
    return found


def test_a_line_says_what_went_on() -> None:
    line = Terminal(60, io.StringIO()).line(5.0, moment())
    assert line == "5/60 s | 3/s | p50 10.0 p99 30.1 ms | errors 1 | 429: 1 | exits 2: 100%"


def test_a_watched_terminal_gets_a_line_a_second_over_the_last_one() -> None:
    screen = Screen()
    terminal = Terminal(None, screen)
    terminal.show(1.0, moment())
    terminal.show(2.0, moment())
    terminal.close()
    assert screen.getvalue().count("\r") == 2
    assert screen.getvalue().count("\n") == 1


def test_a_log_gets_a_line_every_ten_seconds() -> None:
    log = io.StringIO()
    terminal = Terminal(None, log)
    for at in range(1, 26):
        terminal.show(float(at), moment())
    terminal.close()
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("9 s | 3/s")
    assert "429: 9" in lines[0]
