"""How fast several machines are: the prediction against what was measured, and the ways they share a step."""

from dataclasses import replace

import pytest

from wan_mlx.distributed import PIECE, Link
from wan_mlx.errors import Unshareable
from wan_mlx.heartbeat import HANG
from wan_mlx.parallel import ALONE, BOTH, CFG, TOKENS
from wan_mlx.planning import several
from wan_mlx.planning.several import AUTO, LINKS, Work, choose_mode, describe, modes_for
from wan_mlx.presets import PRESETS

CONFIG, TOKENS_480 = PRESETS["t2v-1.3B"].transformer, 32_760


def test_a_slow_link_costs_what_it_cannot_hide():
    work, fast = Work(CONFIG, TOKENS_480, 14e12, 1), Link(1e15, 0.0)
    assert work.seconds(TOKENS, 4, fast) == pytest.approx(work.alone() * several.OVERHEAD / 4)
    moved = CONFIG.num_layers * 2 * several.VALUE * CONFIG.dim * TOKENS_480 * 3 / 4
    for rate in (1e6, 1e7):
        assert work.seconds(TOKENS, 4, Link(rate, 0.0)) > moved / rate
    assert work.seconds(CFG, 2, LINKS["10 GbE"]) == pytest.approx(work.alone(), rel=0.01)  # one pass is not halved
    assert replace(work, passes=2).gain(CFG, 2, LINKS["10 GbE"]) == pytest.approx(2, rel=0.01)


def test_the_way_is_the_fastest_that_there_is():
    def chosen(size, passes, link, asked=AUTO):
        return choose_mode(asked, CONFIG, TOKENS_480, passes, size, link, 14e12)

    fast, slow = LINKS["10 GbE"], Link(1e7, 0.1)
    assert [chosen(size, 2, fast) for size in (2, 3, 4, 5, 6)] == [CFG, TOKENS, BOTH, TOKENS, BOTH]
    assert [chosen(size, 1, fast) for size in (2, 3, 4)] == [TOKENS] * 3
    assert [chosen(size, 2, slow) for size in (2, 3, 4)] == [CFG, ALONE, CFG] and chosen(2, 1, slow) == ALONE
    assert chosen(4, 1, fast, BOTH) == TOKENS and chosen(3, 2, slow, TOKENS) == TOKENS
    for size, passes, asked in ((2, 1, CFG), (3, 2, CFG), (2, 2, BOTH), (3, 2, BOTH)):
        with pytest.raises(Unshareable, match=f"cannot be: .*nearest: {modes_for(size, passes)[0]}$"):
            chosen(size, passes, fast, asked)


def test_a_way_of_four_is_told_for_four():
    _, *said = describe(CONFIG, TOKENS_480, 2, 14e12, BOTH)
    assert len(said) == len(LINKS) and all(line.startswith("  4, ") and "by cfg+tokens" in line for line in said)
    assert describe(CONFIG, TOKENS_480, 2, 14e12, ALONE) == []


# By a ring slowed with `tc`, benchmarks/LOG.md: MB a second, seconds of one pass alone; of one pass by `tokens` in 1, 2
# and 4 groups of heads, of two by `cfg`.
MEASURED = [(657, 4.03, 2.03, 2.03, 2.03, 3.95), (5.34, 4.02, 2.54, 2.37, 2.37, 4.22),
            (1.334, 3.90, 4.22, 3.83, 3.66, 5.28), (0.702, 3.87, 6.36, 5.66, 5.85, 6.68)]  # fmt: skip


@pytest.mark.parametrize("found", MEASURED)
def test_predictions_are_what_a_ring_took(found, monkeypatch):
    speed, alone, *groups, cfg = found
    config = replace(CONFIG, dim=256, num_heads=4, num_layers=2, ffn_dim=512, text_dim=32, freq_dim=32)
    rate, link = Work(config, 2304, 1.0, 1).alone() / alone, Link(speed * 1e6, 1e-4)
    assert Work(config, 2304, rate, 2).seconds(CFG, 2, link) == pytest.approx(cfg, rel=0.08)
    for count, seconds in zip((1, 2, 4), groups, strict=True):
        monkeypatch.setattr(several, "HEAD_GROUPS", count)
        assert Work(config, 2304, rate, 1).seconds(TOKENS, 2, link) == pytest.approx(seconds, rel=0.08)


def test_a_slow_link_is_not_taken_for_one_that_hangs():
    """What is told at once goes round twice, and a bad wireless link moves a megabyte a second."""
    assert 2 * PIECE / 1e6 < HANG
