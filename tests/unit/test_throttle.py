"""The limit for reading, counted with a clock that only the test moves."""

import random

import pytest

from nbdbackupd.nbdio.throttle import BURST_SECONDS, Throttle

MIB = 1 << 20
SLACK = 1024
"""Bytes that the clock's resolution makes up for."""


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def read(throttle: Throttle, clock: Clock, lengths: list[int]) -> None:
    """Take all of it, each as soon as that is allowed."""
    for length in lengths:
        while (delay := throttle.delay()) > 0:
            # a delay can be too short to change the clock
            clock.now += delay + 1e-9
        throttle.take(length)


@pytest.mark.parametrize("rate", [1, 64 << 10, 10 * MIB, 10**9])
def test_never_more_than_the_rate_and_hardly_less(rate: int) -> None:
    clock = Clock()
    throttle = Throttle(rate, clock)
    choice = random.Random(rate)
    lengths = [choice.choice((512, 64 << 10, MIB)) for _ in range(500)]
    read(throttle, clock, lengths)
    seconds = clock.now - 1000.0
    total = sum(lengths)
    assert total - lengths[-1] <= rate * (seconds + BURST_SECONDS) + SLACK
    # the last one is in debt when it is taken, all before it were paid
    assert total - lengths[-1] >= rate * seconds - SLACK


def test_a_pause_is_not_made_up_for() -> None:
    clock = Clock()
    throttle = Throttle(MIB, clock)
    read(throttle, clock, [MIB] * 4)
    clock.now += 3600
    begun = clock.now
    read(throttle, clock, [MIB] * 100)
    assert clock.now - begun >= 99 - BURST_SECONDS - 1e-6


def test_a_clock_that_goes_back_does_not_stop_it() -> None:
    clock = Clock()
    throttle = Throttle(MIB, clock)
    throttle.take(2 * MIB)
    clock.now -= 500
    assert throttle.delay() == pytest.approx(2)
    clock.now += 2
    assert throttle.delay() == 0
