"""Whatever happens while a stack is put on, changed or taken off, the pipeline is whole afterwards."""

import gc
import random
import signal
import sys
import time
from functools import partial
from linecache import getline
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.applying import bits, same_bits, shared_pipeline
from tests.support.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.collector import uncollected
from texforce_hub.apply.model import tuner_layers
from texforce_hub.apply.per_sample import per_sample_adapters


class Boom(BaseException):
    pass


ROOM = ("/texforce_hub/apply/",)


def interrupt_at(number, files):
    """Raise before the given line of ours that changes a model; gives the trace and how many lines were counted."""
    seen = [0]
    if number == 0:
        gc.collect()  # handles that earlier tests have left lying would add their lines

    def trace(frame, event, _):
        # Python handles no signal before the last lines of collector.py: test_collector.py sends it real ones.
        if not any(name in frame.f_code.co_filename for name in files) or frame.f_code is uncollected.__code__:
            return None
        # A with statement's own line comes up again on the way out, where Python handles no signal.
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            seen[0] += 1
            if seen[0] == number:
                raise Boom
        return trace

    return trace, seen


def interrupted(action, number, files=ROOM):
    """Run an action, interrupted before a line: whether the interrupt came through, what came out, lines that ran."""
    trace, seen = interrupt_at(number, files)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = action()
    except Boom:
        return True, None, seen[0]
    finally:
        sys.settrace(before)
    return False, result, seen[0]


def is_whole(pipe, before):
    """As it was: every bit, no layer of PEFT's, nothing in its list."""
    left = list(tuner_layers(pipe.text_encoder))
    return same_bits(pipe, before) and not left and not getattr(pipe.text_encoder, "peft_config", None)


def leave(handle, arm=lambda: None):
    with handle:
        arm()


ACTIONS = {
    "apply": lambda pipe, stack, mode: (lambda: apply_adapter(pipe, stack, mode=mode), None),
    "set_weights": lambda pipe, stack, mode: started(pipe, stack, mode, lambda handle: handle.set_weights([0.3, -1.0])),
    "remove": lambda pipe, stack, mode: started(pipe, stack, mode, lambda handle: handle.remove()),
    "exit": lambda pipe, stack, mode: started(pipe, stack, mode, leave),
}


def started(pipe, stack, mode, action):
    handle = apply_adapter(pipe, stack, mode=mode)
    return (lambda: action(handle)), handle


def small_stack(pipe):
    few = [Adapter(dict(list(random_adapter(pipe, seed=seed).layers.items())[:4])) for seed in (1, 2)]
    return [(few[0], 0.7), (few[1], 0.4)]


@pytest.fixture(scope="module")
def made_once():
    """PEFT's layers, which later stacks copy: without them the first stack takes more lines than the others."""
    pipe = tiny_pipeline("sd1")
    apply_adapter(pipe, small_stack(pipe)).remove()


@pytest.mark.usefixtures("made_once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("name", ACTIONS)
def test_a_pipeline_left_by_ctrl_c_is_as_it_was(name, mode, dtype):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    stack, before = small_stack(pipe), bits(pipe)
    action, handle = ACTIONS[name](pipe, stack, mode)
    _, _, lines = interrupted(action, 0)
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    draw = random.Random(f"{name}{mode}{dtype}")
    for number in sorted(draw.sample(range(1, lines + 1), 4)):
        action, handle = ACTIONS[name](pipe, stack, mode)
        raised, _, _ = interrupted(action, number)
        assert raised
        if name in ("apply", "exit"):
            handle = None
            del action
            assert is_whole(pipe, before), number
        if handle is not None:
            handle.remove()
        assert is_whole(pipe, before), number


def test_a_block_of_stacks_for_each_sample_is_over_whatever_line_ctrl_c_comes_before():
    """From the claim of the model to the end of the undoing, line by line, in the block's own files."""
    pipe = tiny_pipeline("sd1")
    unet = [random_adapter(pipe, parts=["unet"], seed=seed) for seed in (1, 2)]
    stacks = [Adapter(dict(list(adapter.layers.items())[:1])) for adapter in unet]
    files = ("/apply/per_sample.py", "/apply/undoing.py")

    def enter_and_leave():
        with per_sample_adapters(pipe, stacks):
            pass

    _, _, lines = interrupted(enter_and_leave, 0, files)
    assert lines > 100
    for number in range(1, lines + 1):
        raised, _, _ = interrupted(enter_and_leave, number, files)
        assert raised
        assert not any(module._forward_hooks for module in pipe.unet.modules()), number
    enter_and_leave()  # and the model is free


@pytest.mark.campaign
def test_five_hundred_timed_interrupts_leave_every_pipeline_whole():
    armed = [False]

    def ring(*_):
        if armed[0]:
            armed[0] = False
            raise Boom

    old, draw, came = signal.signal(signal.SIGALRM, ring), random.Random(0), dict.fromkeys(ACTIONS, 0)
    left = []
    try:
        for number in range(500):
            name = list(ACTIONS)[number % 4]
            mode, dtype = ("attach", "fuse")[number // 4 % 2], (torch.float32, torch.bfloat16)[number // 8 % 2]
            came[name] += interrupt_in_time(name, mode, dtype, draw, armed, left)
    finally:
        signal.signal(signal.SIGALRM, old)
    sys.stdout.write(f"interrupts that came through: {came}; pipelines left changed: {left}\n")
    assert left == []
    assert min(came.values()) > 60


PIPES = {}


def interrupt_in_time(name, mode, dtype, draw, armed, left):
    key = (mode, dtype)
    if key not in PIPES:
        pipe = tiny_pipeline("sd1").to(dtype=dtype)
        PIPES[key] = pipe, small_stack(pipe), bits(pipe)
    pipe, stack, before = PIPES[key]
    action, handle = ACTIONS[name](pipe, stack, mode)
    started_at = time.perf_counter()
    result = action()
    duration = time.perf_counter() - started_at
    (result or handle).remove()
    action, handle = ACTIONS[name](pipe, stack, mode)
    raised, result = False, None

    def arm():
        armed[0] = True
        signal.setitimer(signal.ITIMER_REAL, max(1e-5, draw.random() * duration))

    try:
        if name == "exit":
            leave(handle, arm)
        else:
            arm()
            result = action()
        armed[0] = False
    except Boom:
        raised = True
    armed[0] = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    if name == "exit":
        handle = action = None
    if result or handle:
        (result or handle).remove()
    if not is_whole(pipe, before):
        left.append((name, mode, dtype))
        del PIPES[key]
    return raised


def some_lines(lines, step, first):
    """Every few lines, and each of the last forty, in which the handle is handed over."""
    return sorted({*range(first, lines + 1, step), *range(lines - 39, lines + 1)})


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("others", [False, True])
def test_an_interrupt_at_any_line_leaves_nothing_behind(mode, others):
    from peft import LoraConfig

    encoder = tiny_clip()  # alone: the bits of a whole pipeline take most of the time
    pipe: Any = SimpleNamespace(text_encoder=encoder)
    if others:
        theirs = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        encoder.add_adapter(theirs, adapter_name="theirs")
    adapter = Adapter(dict(list(random_adapter(shared_pipeline("sd1")).layers.items())[:2]))
    before, flags = bits(pipe), [p.requires_grad for p in encoder.parameters()]
    action = partial(apply_adapter, pipe, adapter, mode=mode)
    _, handle, _ = interrupted(action, 0)
    handle.remove()
    _, handle, lines = interrupted(action, 0)  # again: the first time does what is kept for later
    handle.remove()
    numbers = some_lines(lines, 5, 1 + 2 * others)
    assert len(numbers) > 60
    for number in numbers:
        assert interrupted(action, number) == (True, None, number)
        assert same_bits(pipe, before), number
        assert [p.requires_grad for p in encoder.parameters()] == flags, number
        assert sorted(getattr(encoder, "peft_config", {})) == (["theirs"] if others else []), number


def test_an_exception_inside_the_block_restores_and_passes_through():
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    with pytest.raises(ZeroDivisionError), apply_adapter(pipe, random_adapter(pipe), mode="fuse"):
        _ = 1 / 0
    assert same_bits(pipe, before)
