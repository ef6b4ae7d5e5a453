"""The central rule of memory: at most two pieces of work in flight, each waited for when the next is submitted."""

import mlx.core as mx
import pytest

from wan_mlx.models.pieces import FEED_FORWARD_TOKENS, FEW_TOKENS, Pacer

MB = 1 << 20


@pytest.fixture
def in_flight(monkeypatch):
    """Numbers of the pieces that were submitted and not waited for; a piece is an array filled with its number."""
    pieces, evaluate = [], mx.eval

    def submit(*arrays):
        evaluate(*arrays)
        pieces.extend(array[0].item() for array in arrays)

    def wait(*arrays):
        for array in arrays:
            if array[0].item() in pieces:
                pieces.remove(array[0].item())

    monkeypatch.setattr(mx, "async_eval", submit)
    monkeypatch.setattr(mx, "eval", wait)
    return pieces


def piece(number: int) -> mx.array:
    return mx.full((4,), number)


def test_a_piece_is_waited_for_when_the_next_one_is_submitted(in_flight):
    pace = Pacer()
    for number in range(5):
        pace(piece(number))
        assert in_flight == [number]
    pace.finish()
    assert in_flight == []


def test_the_next_piece_is_submitted_before_the_last_one_is_waited_for(monkeypatch):
    """Or the GPU would have nothing to do while Python prepares the next."""
    calls, pace = [], Pacer()
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: calls.append(("submit", *(a[0].item() for a in arrays))))
    monkeypatch.setattr(mx, "eval", lambda *arrays: calls.append(("wait", *(a[0].item() for a in arrays))))
    pace(piece(0))
    pace(piece(1), piece(2))
    pace(piece(3))
    assert [call for call in calls if len(call) > 1] == [
        ("submit", 0), ("submit", 1, 2), ("wait", 0), ("submit", 3), ("wait", 1, 2)
    ]  # fmt: skip


def test_where_two_may_wait_that_before_them_is_waited_for(in_flight):
    pace = Pacer(waiting=2)
    for number in range(5):
        pace(piece(number))
        assert in_flight == [number - 1, number][number == 0 :]
    pace.submit(piece(5))
    assert in_flight == [3, 4, 5]
    pace(piece(6))
    assert in_flight == [4, 5, 6]
    pace.finish()
    assert in_flight == []


def test_small_pieces_are_waited_for_with_the_next_large_one(in_flight):
    pace = Pacer()
    pace(piece(0))
    pace.submit(piece(1))
    pace.submit(piece(2))
    assert in_flight == [0, 1, 2]
    pace(piece(3))
    assert in_flight == [3]


@pytest.mark.parametrize("tokens_at_once, waited", [(FEED_FORWARD_TOKENS, True), (FEED_FORWARD_TOKENS + 1, False)])
def test_short_pieces_are_waited_for_unless_memory_is_plenty(in_flight, tokens_at_once, waited):
    pace = Pacer(tokens_at_once)
    pace(piece(0))
    pace.small(piece(1))
    assert in_flight == ([1] if waited else [0, 1])


@pytest.mark.parametrize("tokens_at_once, waited", [(FEW_TOKENS, True), (FEW_TOKENS + 1, False)])
def test_nothing_runs_beside_wide_arrays_where_memory_is_short(in_flight, tokens_at_once, waited):
    pace = Pacer(tokens_at_once)
    pace(piece(0))
    pace.settle()
    assert in_flight == ([] if waited else [0])


def test_two_pieces_are_alive_at_most():
    """Their memory, in truth: pieces of a megabyte that nobody else holds."""
    limit = mx.set_cache_limit(0)
    try:
        pace, before = Pacer(), mx.get_active_memory()
        for number in range(6):
            pace(mx.full((MB // 4,), float(number)))
            assert mx.get_active_memory() - before <= 2 * MB + 4096
        pace.finish()
        assert mx.get_active_memory() - before <= 4096
    finally:
        mx.set_cache_limit(limit)
