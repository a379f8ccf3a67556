"""What threads make ahead and do behind: in turn, bounded, and their errors arrive."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from desam_nnunet.system.ahead import Behind, made_ahead


def test_items_come_in_turn_and_no_more_are_made_than_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    coming = made_ahead(items(), 2)
    assert next(coming) == 0
    assert len(made) <= 3
    assert list(coming) == list(range(1, 9))


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    coming = made_ahead(items(), 4)
    assert next(coming) == 1
    with pytest.raises(ValueError, match="the second"):
        next(coming)


def test_a_task_may_wait_for_earlier_ones_and_all_is_done_in_the_end() -> None:
    done: list[str] = []
    with Behind(2, 2) as behind:
        earlier = [behind.submit(done.append, str(number)) for number in range(5)]
        behind.submit(lambda: ([task.result() for task in earlier], done.append("last")))
    assert sorted(done[:-1]) == list("01234")
    assert done[-1] == "last"


def test_a_tasks_error_is_raised_and_what_was_given_is_done() -> None:
    done = threading.Event()

    def fails() -> None:
        raise OSError("full")

    def give() -> None:
        with Behind(1, 9) as behind:
            behind.submit(fails)
            behind.submit(done.set)

    with pytest.raises(OSError, match="full"):
        give()
    assert done.is_set()


def test_what_was_given_is_done_where_the_block_fails() -> None:
    done = threading.Event()

    def mine() -> None:
        with Behind(1, 9) as behind:
            behind.submit(done.set)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        mine()
    assert done.is_set()


def test_no_more_tasks_wait_than_asked_for() -> None:
    """The third is given once the first is done, and not before."""
    go, order = threading.Event(), list[str]()

    def first() -> None:
        go.wait()
        order.append("first done")

    with Behind(1, 2) as behind:
        behind.submit(first)
        behind.submit(order.append, "second")
        threading.Timer(0.05, go.set).start()
        behind.submit(order.append, "third")
        assert order[0] == "first done"
