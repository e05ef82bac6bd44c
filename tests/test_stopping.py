"""One signal asks, the next one ends."""

import os
import signal

import pytest

from oel_ray import stopping
from oel_ray.stopping import draining

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_after_a_signal_the_block_finishes_and_then_the_run_is_interrupted(number: signal.Signals) -> None:
    before, ended = [signal.getsignal(each) for each in SIGNALS], False
    with pytest.raises(KeyboardInterrupt), draining() as drain:
        assert not drain.asked
        os.kill(os.getpid(), number)
        assert drain.asked and not drain.over
        ended = True
    assert ended
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_the_second_signal_interrupts_at_once(numbers: list[signal.Signals]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), draining():
        os.kill(os.getpid(), numbers[0])
        os.kill(os.getpid(), numbers[1])
        pytest.fail("it goes on")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_drain_is_over_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "DRAIN_S", 0.0)
    with pytest.raises(KeyboardInterrupt), draining() as drain:
        assert not drain.over
        os.kill(os.getpid(), signal.SIGINT)
        while not drain.over:
            pass


def test_a_block_without_a_signal_ends_without_an_interrupt() -> None:
    with draining() as drain:
        pass
    assert not drain.asked
