"""Frames that blocks share are unpacked once, and few are held while the next one comes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdbackupd.errors import IntegrityError
from nbdbackupd.ops.sets.frames import FrameCache

SIZE = 1000


def test_old_ones_go_before_the_next_comes() -> None:
    """Finding: two frames of 64 MiB were held while the third one was unpacked."""
    cache = FrameCache(2 * SIZE)
    for number in range(6):
        held: list[int] = []

        def load(number: int = number, held: list[int] = held) -> bytes:
            held.append(len(cache._frames))
            return bytes([number]) * SIZE

        assert cache.get(number, SIZE, load) == bytes([number]) * SIZE
        assert cache.get(number, SIZE, pytest.fail) == bytes([number]) * SIZE
        assert held == [min(number, 1)]
    large = cache.get("large", 5 * SIZE, lambda: bytes(5 * SIZE))
    assert list(cache._frames.values()) == [large]


def test_threads() -> None:
    """Each frame is loaded once, others beside it as far as there is room."""
    cache = FrameCache(2 * SIZE)
    loads: list[int] = []
    most, now, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def get(number: int) -> bytes:
        def load() -> bytes:
            nonlocal most, now
            with lock:
                loads.append(number)
                now += 1
                most = max(most, now)
            if number < 2:
                both.wait(20)
            with lock:
                now -= 1
            return bytes([number]) * SIZE

        return cache.get(number, SIZE, load)

    with ThreadPoolExecutor(16) as pool:
        wanted = [0, 1] * 8
        assert list(pool.map(get, wanted)) == [bytes([each]) * SIZE for each in wanted]
        assert sorted(loads) == [0, 1]
        wanted = [2, 3, 4, 5] * 50
        assert list(pool.map(get, wanted)) == [bytes([each]) * SIZE for each in wanted]
    assert most == 2


def test_what_fails_is_tried_again() -> None:
    cache = FrameCache(SIZE)

    def damaged() -> bytes:
        raise IntegrityError("damaged")

    for _ in range(2):
        with pytest.raises(IntegrityError):
            cache.get(1, SIZE, damaged)
    assert cache.get(1, SIZE, lambda: bytes(SIZE)) == bytes(SIZE)
