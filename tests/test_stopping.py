"""One signal asks, the next one ends."""

import os
import signal

import pytest

from oel_ray import stopping
from oel_ray.stopping import draining

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_what_has_begun_comes_to_its_end_and_then_the_run_does(number: signal.Signals) -> None:
    before, ended = [signal.getsignal(each) for each in SIGNALS], False
    with pytest.raises(KeyboardInterrupt), draining() as drain:
        assert not drain.asked
        os.kill(os.getpid(), number)
        assert drain.asked and not drain.over
        ended = True
    assert ended
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_the_second_signal_ends_at_once(numbers: list[signal.Signals]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), draining():
        os.kill(os.getpid(), numbers[0])
        os.kill(os.getpid(), numbers[1])
        pytest.fail("it goes on")
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "DRAIN_S", 0.0)
    with pytest.raises(KeyboardInterrupt), draining() as drain:
        assert not drain.over
        os.kill(os.getpid(), signal.SIGINT)
        while not drain.over:
            pass


def test_without_a_signal_nothing_happens() -> None:
    with draining() as drain:
        pass
    assert not drain.asked
