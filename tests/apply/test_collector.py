"""Python's collector waits while a stack is put on, and is always on again afterwards."""

import gc
import os
import random
import signal
import threading

import pytest

from tests.support.applying import shared_pipeline
from tests.support.pipelines_tiny import random_adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.collector import uncollected


class Boom(BaseException):
    pass


def raise_boom(*_):
    raise Boom


@pytest.fixture
def alarm():
    """A signal that raises wherever Python handles it."""
    before = signal.signal(signal.SIGALRM, raise_boom)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupt_often(send, times):
    """Call ``uncollected`` over and over until a signal comes, so often; how often the collector was off then."""
    off = 0
    for _ in range(times):
        try:
            send()
            while True:
                uncollected(gc.isenabled)
        except Boom:
            off += not gc.isenabled()
            gc.enable()
    return off


@pytest.mark.usefixtures("alarm")
def test_no_signal_leaves_the_collector_off():
    draw = random.Random(0)
    assert interrupt_often(lambda: signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 1e-3)), 500) == 0


@pytest.mark.usefixtures("alarm")
def test_no_signal_of_another_thread_leaves_the_collector_off():
    asked, over = threading.Event(), threading.Event()

    def send():
        while not over.is_set():
            if asked.wait(0.1):
                asked.clear()
                os.kill(os.getpid(), signal.SIGALRM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert interrupt_often(asked.set, 40) == 0
    finally:
        over.set()
        sender.join()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_waits_and_then_is_as_it_was(was_on):
    try:
        gc.enable() if was_on else gc.disable()
        assert uncollected(gc.isenabled) is False
        assert gc.isenabled() is was_on
        with pytest.raises(ZeroDivisionError):
            uncollected(lambda: 1 / 0)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


def test_a_collector_that_another_thread_keeps_waiting_is_left_to_that_thread(monkeypatch):
    class Collector:
        off = 0

        def isenabled(self):
            return False  # the other thread is done right after

        def disable(self):
            self.off += 1

        def enable(self):
            self.off -= 1

    collector = Collector()
    monkeypatch.setattr("texforce_hub.apply.collector.gc", collector)
    assert uncollected(lambda: 1) == 1
    assert collector.off == 0


def test_the_collector_does_not_run_while_a_stack_is_put_on():
    pipe = shared_pipeline("sd1")
    adapter = random_adapter(pipe)
    apply_adapter(pipe, adapter).remove()
    runs = []

    def note(phase, facts):
        runs.append((phase, facts["generation"]))

    before = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(note)
    try:
        apply_adapter(pipe, adapter).remove()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    assert len(runs) < 40, len(runs)
