"""Pasted blocks of doctor become rows of docs/times.md."""

import importlib.util
from pathlib import Path

import pytest

from wan_mlx.cli import doctor

ROOT = Path(__file__).parent.parent
RUN = "run: t2v-1.3B, 832x480, 81, 50, q8 --cache magcache, 1834, 5.9 GiB"


@pytest.fixture(scope="module")
def times():
    spec = importlib.util.spec_from_file_location("make_times", ROOT / "docs/make_times.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pasted(*runs: str, chip: str = "Apple M2 Max") -> str:
    about = {"chip": chip, "memory": "34.4 GB", "mlx": "0.32.4, macosx_14_0_arm64, Metal"}
    return "As asked:\r\n```\n" + doctor.block(about, [], {"matmul bf16": 9.0}, []).replace(doctor.RUN, "\n".join(runs))


def test_a_block_becomes_rows(times):
    (row,) = times.rows_of(pasted(RUN, doctor.RUN))
    assert row == ["Apple M2 Max", "34.4 GB", "t2v-1.3B", "832x480", "81", "50", "q8 --cache magcache", "1834", "5.9",
                   "0.32.4"]  # fmt: skip
    assert times.rows_of(pasted(doctor.RUN)) == times.rows_of("nothing") == []
    assert len(times.rows_of(pasted(RUN) + pasted(RUN, RUN, chip="Apple M1"))) == 3


@pytest.mark.parametrize("wrong", ["run: t2v-1.3B, 81", RUN.replace("1834", "half an hour"), RUN.replace("q8", "|")])
def test_a_line_that_is_no_run_is_refused(times, wrong):
    with pytest.raises(ValueError, match="half an hour|expected 'run: MODEL"):
        times.rows_of(pasted(wrong))


def test_rows_go_into_the_table_once(times):
    text = (ROOT / "docs/times.md").read_text(encoding="utf-8")
    once = times.page(text, times.rows_of(pasted(RUN)))
    assert once.count("| Apple M2 Max | 34.4 GB | t2v-1.3B | 832x480 | 81 | 50 | q8 --cache magcache | 1834 |") == 1
    assert times.page(once, times.rows_of(pasted(RUN))) == once and times.page(text, []) == text
    newer = times.page(once, times.rows_of(pasted(RUN.replace("1834", "1700"))))
    assert "| 1834 |" not in newer and newer.count("\n") == once.count("\n") == text.count("\n") + 1


def test_the_page_says_that_no_mac_is_in_it():
    text = (ROOT / "docs/times.md").read_text(encoding="utf-8")
    assert ("No Mac is in it" in text) == ("| Apple M" not in text)


def test_forms_and_page_name_the_same_line():
    for path in (".github/ISSUE_TEMPLATE/times.yml", "docs/times.md"):
        assert "run: t2v-1.3B, 832x480, 81, 50, -, 1834, 5.9 GiB" in (ROOT / path).read_text(encoding="utf-8")
