"""Turns on one device: one at a time, or as many as share it, and whoever used it least is next."""

import threading
import time
from collections import Counter

import pytest

from offramp_service.turns import Device, Turn


def run(device: Device, costs_s: dict[str, float], *, seconds: float) -> dict[str, float]:
    """Seconds of use that threads get which always want the device, for so long each time."""
    used: dict[str, float] = dict.fromkeys(costs_s, 0.0)
    inside = Counter[str]()
    end = time.perf_counter() + seconds

    def claim(name: str) -> None:
        turn = device.turn()
        while time.perf_counter() < end:
            with turn:
                inside["all"] += 1
                assert inside["all"] == 1
                began = time.perf_counter()
                time.sleep(costs_s[name])
                used[name] += time.perf_counter() - began
                inside["all"] -= 1

    threads = [threading.Thread(target=claim, args=(name,)) for name in costs_s]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    return used


def test_long_turns_do_not_get_more_of_the_device() -> None:
    used = run(Device(), {"long": 0.02, "short": 0.002}, seconds=1.0)
    assert used["short"] > 0.3 * sum(used.values())
    assert used["long"] > 0.3 * sum(used.values())


def test_who_was_idle_has_no_claim_to_the_past() -> None:
    now = [0.0]
    device = Device(clock=lambda: now[0])
    busy, late = device.turn(), device.turn()
    for _ in range(10):
        with busy:
            now[0] += 1.0
    with late:
        now[0] += 0.5
    assert late.used_s == pytest.approx(9.5)  # where the other stood when its last turn began


def test_threads_that_share_the_device_have_it_together_and_nobody_beside_one_who_does_not() -> (
    None
):
    device = Device()
    whole, halves = device.turn(), [device.turn(sharing=2) for _ in range(3)]
    inside: set[str] = set()
    seen: list[set[str]] = []
    both = threading.Barrier(2)

    def take(turn: Turn, name: str, meeting: threading.Barrier | None) -> None:
        with turn:
            inside.add(name)
            if meeting is not None:
                meeting.wait(20)  # they cannot get here one after the other
            seen.append(set(inside))
            time.sleep(0.01)
            inside.discard(name)

    jobs = [(halves[0], "a", both), (halves[1], "b", both), (whole, "whole", None)]
    jobs.append((halves[2], "c", None))
    threads = [threading.Thread(target=take, args=job) for job in jobs]
    for one in threads:
        one.start()
        time.sleep(0.005)
    for one in threads:
        one.join(20)
        assert not one.is_alive()
    assert {"a", "b"} in seen
    assert {"whole"} in seen
    assert all(len(names) == 1 or "whole" not in names for names in seen)
    assert all(len(names) <= 2 for names in seen)


def test_an_error_gives_the_device_back() -> None:
    device = Device()
    with pytest.raises(ValueError, match="broken"), device.turn():
        raise ValueError("broken")
    with device.turn():
        pass
