"""Whatever happens while a stack is put on or taken off, the pipeline is whole afterwards."""

import sys
from linecache import getline

import pytest

from tests.support.applying import (
    bits,
    same_bits,
    shared_pipeline,
)
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter


class Boom(BaseException):
    pass


def interrupt_at(number):
    """Raise before the given line of ours that changes a model; gives the trace and how many lines were counted."""
    seen = [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("apply/patch.py", "apply/applied.py")):
            return None
        # A with statement's own line comes up again on the way out, where Python handles no signal.
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            seen[0] += 1
            if seen[0] == number:
                raise Boom
        return trace

    return trace, seen


def try_interrupted(pipe, adapter, mode, number):
    """Whether an interrupt at this line came through, and how many lines ran."""
    trace, seen = interrupt_at(number)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        apply_adapter(pipe, adapter, mode=mode)
    except Boom:
        return True, seen[0]
    finally:
        sys.settrace(before)
    return False, seen[0]


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("others", [False, True])
def test_an_interrupt_at_any_line_leaves_nothing_behind(mode, others):
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    if others:
        theirs = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(theirs, adapter_name="theirs")
    adapter = Adapter(dict(list(random_adapter(pipe).layers.items())[:3]))
    before, flags = bits(pipe), [p.requires_grad for p in pipe.text_encoder.parameters()]
    _, lines = try_interrupted(tiny_pipeline("sd1"), adapter, mode, 0)
    assert lines > 60
    for number in range(1, lines, 2):
        assert try_interrupted(pipe, adapter, mode, number) == (True, number)
        assert same_bits(pipe, before)
        assert [p.requires_grad for p in pipe.text_encoder.parameters()] == flags
        assert sorted(getattr(pipe.text_encoder, "peft_config", {})) == (["theirs"] if others else [])


def test_an_exception_inside_the_block_restores_and_passes_through():
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    with pytest.raises(ZeroDivisionError), apply_adapter(pipe, random_adapter(pipe), mode="fuse"):
        _ = 1 / 0
    assert same_bits(pipe, before)
