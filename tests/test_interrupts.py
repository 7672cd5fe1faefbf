"""interrupts: Ctrl-C waits for the end of a block."""

from __future__ import annotations

import signal

import pytest

from sideroad.interrupts import uninterrupted


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    order = []

    def block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            order.append("through")
        order.append("never")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert order == ["through"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blocks_nest_and_the_outermost_delivers() -> None:
    order = []

    def block() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            order.append("inner through")
        order.append("never")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert order == ["inner through"]
