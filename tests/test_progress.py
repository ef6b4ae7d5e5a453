"""How far a run is, as a person sees it: on a terminal, in a log, in a notebook; and the time left to the file."""

import io
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

import wan_mlx
from wan_mlx import progress_bars
from wan_mlx.cli import interrupt, terminal
from wan_mlx.errors import duration, size
from wan_mlx.events import Decoded, Eta, Fetching, Loading, Note, Progress, StageEnded, StageStarted, Stepped, counted
from wan_mlx.progress_bars import ProgressBars, Told
from wan_mlx.runs.time_left import DECODE_SHARE, READING, TimeLeft


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0.04, "0.0 s"), (8.14, "8.1 s"), (99.9, "99.9 s"), (99.97, "1 min 40 s"), (725, "12 min 5 s"),
        (3599.7, "1 h 0 min"), (12_000, "3 h 20 min"), (47.9 * 3600, "47 h 54 min"), (3 * 86_400, "3 days"),
        (141 * 86_400, "about 5 months"), (319_861_308, "about 10 years"), (1e12, "about 31,688 years"),
    ],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_sizes():
    assert [size(count) for count in (0, 412 * 2**20, 6_238_440_000)] == ["0 MiB", "412 MiB", "5.81 GiB"]


def stepped(index, total, seconds=2.0) -> Stepped:
    return Stepped(wan_mlx.Step(index, total, 0.0, 0.0, None, None, seconds=seconds))


class TestTimeLeft:
    @pytest.fixture
    def now(self):
        return [100.0]

    @pytest.fixture
    def plan(self):
        plan = wan_mlx.plan("t2v-1.3B", 832, 480, memory="100GB")
        work = {"encode text": (2e12, 1e9), "denoise": (100e12, 3e9), "decode": (30e12, 1e9)}
        rows = [replace(row, flop=work[row.stage][0], reads=work[row.stage][1]) for row in plan.rows]
        return replace(plan, rows=tuple(rows))

    def left(self, plan, now, **given) -> TimeLeft:
        return TimeLeft(plan, 10, clock=lambda: now[0], **given)

    def test_unknown_until_the_first_step(self, plan, now):
        left = self.left(plan, now)
        for name in ("conditioning", "load transformer", "denoise"):
            left(StageStarted(name))
            assert left.seconds() is None
        now[0] += 5
        left(stepped(0, 10, 5.0))
        assert left.seconds() == pytest.approx(9 * 5 + 30 / (DECODE_SHARE * 100 / 50))
        now[0] += 2
        left(stepped(1, 10, 2.0))  # the first compiled kernels
        assert left.seconds() == pytest.approx(8 * 2 + 30 / (DECODE_SHARE * 100 / 20))
        now[0] += 1.5
        assert left.seconds() == pytest.approx(8 * 2 - 1.5 + 30 / (DECODE_SHARE * 100 / 20))
        now[0] += 100  # a step that does not end
        assert left.seconds() == pytest.approx(7 * 2 + 30 / (DECODE_SHARE * 100 / 20))

    def test_decoding_is_measured_by_its_frames(self, plan, now):
        left = self.left(plan, now)
        left(stepped(9, 10, 2.0))
        left(StageStarted("decode"))
        now[0] += 6
        assert left.seconds() == pytest.approx(30 / (DECODE_SHARE * 100 / 20) - 6)
        left(Decoded(None, 20, 80))
        assert left.seconds() == pytest.approx(18)
        now[0] += 18
        left(Decoded(None, 80, 80))
        assert left.seconds() == 0

    def test_from_the_beginning_where_a_rate_is_known(self, plan, now):
        left = self.left(plan, now, rate=5e12)
        left(StageStarted("conditioning"))
        expected = max(2 / 5, 1e9 / READING) + 3e9 / READING + 20 + 30 / (DECODE_SHARE * 5)
        assert left.seconds() == pytest.approx(expected)

    def test_from_the_beginning_where_the_plan_has_times(self, plan, now):
        plan = replace(plan, rows=tuple(replace(row, seconds=10.0) for row in plan.rows))
        left = self.left(plan, now)
        left(StageStarted("conditioning"))
        assert left.seconds() == pytest.approx(10 + 3e9 / READING + 10 + 10)

    def test_of_a_run_that_goes_on(self, plan, now):
        left = self.left(plan, now, first=6, rate=5e12)
        assert left.seconds() == pytest.approx(3e9 / READING + 4 * 2 + 30 / (DECODE_SHARE * 5))
        left(stepped(5, 10, 0))  # told once more
        left(StageStarted("denoise"))
        left(stepped(6, 10, 4.0))
        assert left.seconds() == pytest.approx(3 * 4 + 30 / (DECODE_SHARE * 100 / 40))
        assert self.left(plan, now, first=10, rate=5e12).seconds() == pytest.approx(30 / (DECODE_SHARE * 5))

    def test_experts_are_loaded_one_by_one(self, plan, now):
        """The plan's bytes are of both: half of them before the first step, half at the switch, where that is ahead."""
        left, rest = self.left(plan, now, rate=5e12, switch=4), 10 * 2 + 30 / (DECODE_SHARE * 5)
        left(StageStarted("load high noise"))
        assert left.seconds() == pytest.approx(2 * 1.5e9 / READING + rest)
        now[0] += 7
        left(StageEnded("load high noise", 7.0, 0))
        left(StageStarted("denoise"))
        assert left.seconds() == pytest.approx(7 + rest)  # as long as the first one took
        left(stepped(3, 10, 4.0))
        decode = 30 / (DECODE_SHARE * 100 / 40)
        assert left.seconds() == pytest.approx(6 * 4 + 7 + decode)
        left(StageStarted("load low noise"))
        now[0] += 2
        assert left.seconds() == pytest.approx(5 + 6 * 4 + decode)
        left(StageEnded("load low noise", 7.0, 0))
        left(StageStarted("denoise"))
        assert left.seconds() == pytest.approx(6 * 4 + decode)
        behind = self.left(plan, now, first=6, rate=5e12, switch=4)
        assert behind.seconds() == pytest.approx(1.5e9 / READING + 4 * 2 + 30 / (DECODE_SHARE * 5))

    def test_sampling_that_ends_early(self, plan, now):
        left = self.left(plan, now)
        left(stepped(3, 10, 2.0))
        left(StageStarted("decode"))
        assert left.seconds() == pytest.approx(30 / (DECODE_SHARE * 100 / 20))

    def test_with_a_second_expert_its_loading_is_no_step_back(self, plan, now):
        left = self.left(plan, now)
        for name in ("load high", "denoise"):
            left(StageStarted(name))
        left(stepped(4, 10, 2.0))
        left(StageStarted("load low"))
        assert left.seconds() == pytest.approx(3e9 / READING + 5 * 2 + 30 / (DECODE_SHARE * 100 / 20))


class TestWords:
    @pytest.fixture
    def now(self):
        return [0.0]

    @pytest.fixture
    def told(self, now):
        return Told(lambda: now[0])

    def test_steps(self, told, now):
        told.hear(StageStarted("denoise"))
        told.hear(Progress("denoising", 0, 12))
        assert (told.label, told.what, told.whole) == ("denoise", "step 1 of 12", "")
        told.hear(stepped(0, 12, 1.234))
        told.hear(Progress("denoising", 1, 12))
        told.hear(Eta(65.0, 2**29, 2**30))
        assert told.what == "step 2 of 12, 1.23 s a step"
        now[0] += 5
        assert told.whole == "60 s left · memory 512 MiB, peak 1.00 GiB"
        told.hear(StageEnded("denoise", 14.8, 2**30))
        told.hear(StageStarted("decode"))
        told.hear(Eta(60.0, 0, 0))
        assert told.whole == "60 s left"
        told.hear(Progress("decoding", 1, 5))
        assert told.ticked == ["✓ denoise 14.8 s"] and told.what == "decoding 1 of 5"
        told.hear(StageEnded("decode", 1.0, 2**30, left=True))
        assert len(told.ticked) == 1

    def test_downloads(self, told, now):
        told.hear(Fetching("fetching a/b", int(5e9), int(17.5e9), "B", "a/b", "x.safetensors"))
        assert (told.label, told.what) == ("fetching a/b", "5.00 of 17.50 GB")
        now[0] += 10
        told.hear(Fetching("fetching a/b", int(5.5e9), int(17.5e9), "B", "a/b", "x.safetensors"))
        assert told.what == "5.50 of 17.50 GB, 50 MB/s, 4 min 0 s left"  # of 12 GB; what was here costs no time


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    stream = Screen()
    for module in (progress_bars, terminal):  # pytest sets the real one anew for each test
        monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=stream, stdout=stream, modules=sys.modules))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield stream
    progress_bars.close_all()


def on_screen(said: str) -> list[str]:
    """The lines that a terminal shows after what was written."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", said):
        if token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            count = int(re.sub(r"\D", "", token) or 1)
            if token.endswith("A"):
                row -= count
            elif token.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines if line.strip()]


EVENTS = [StageStarted("conditioning"), Progress("encoding text", 0, 5), StageEnded("conditioning", 2.14, 2**28),
          StageStarted("denoise"), Progress("denoising", 0, 3), Eta(60.0, 2**28, 2**29)]  # fmt: skip


class TestOnATerminal:
    def test_a_live_display_that_goes(self, screen):
        bars = ProgressBars()
        for event in EVENTS:
            bars(event)
        time.sleep(0.4)  # drawn by itself
        shown = on_screen(screen.getvalue())
        assert shown[0].startswith("denoise  ") and shown[0].endswith("step 1 of 3")
        assert shown[1] == "✓ conditioning 2.1 s"
        assert re.fullmatch(r"\d\d s left · memory 256 MiB, peak 512 MiB", shown[2]) and len(shown) == 3
        assert max(map(len, shown)) <= 80
        bars(StageEnded("denoise", 3.0, 2**28, left=True))
        assert on_screen(screen.getvalue()) == []
        assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()[-60:]

    def test_lines_are_printed_above_it(self, screen):
        say = terminal.Terminal()
        for event in EVENTS:
            say(event)
        say(Note("model     nano"))
        shown = on_screen(screen.getvalue())
        assert shown[0].startswith("✓ conditioning") and "256 MiB" in shown[0]
        assert shown[1] == "model     nano" and shown[2].startswith("denoise") and " left to the file · " in shown[3]
        say.fail("no", 1)
        assert on_screen(screen.getvalue())[-1] == "error: no" and len(on_screen(screen.getvalue())) == 3

    def test_ctrl_c_is_told_in_it(self, screen, monkeypatch):
        monkeypatch.setattr(interrupt.os, "write", lambda *_: pytest.fail("written over it"))
        bars = ProgressBars()
        for event in EVENTS:
            bars(event)
        interrupt.say_stopping()
        time.sleep(0.4)
        assert "stopping as soon as this step is done; Ctrl-C again stops at once" in on_screen(screen.getvalue())

    @pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_plain_where_asked(self, screen, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        bars = ProgressBars()
        for event in EVENTS:
            bars(event)
        assert screen.getvalue() == ""


def test_in_a_log_a_line_now_and_then(monkeypatch, capsys):
    bars = ProgressBars()
    for event in EVENTS:
        bars(event)
    assert capsys.readouterr() == ("", "")  # moments pass without one
    monkeypatch.setattr(progress_bars, "LINE_EVERY", 0.0)
    bars(Progress("denoising", 1, 3))
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"denoise: step 2 of 3, \d\d s left · memory 256 MiB, peak 512 MiB\n", err)


def test_in_a_notebook_one_bar_whose_ticks_stay(monkeypatch):
    shown = []

    def publish(data, transient, update):
        shown.append((transient["display_id"], update, data["text/html"]))

    shell = SimpleNamespace(kernel=1, display_pub=SimpleNamespace(publish=publish))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    bars = ProgressBars()
    for event in (*EVENTS, StageEnded("denoise", 3.0, 1), StageStarted("decode"), Progress("decoding", 0, 2),
                  StageEnded("decode", 1.0, 1)):  # fmt: skip
        bars(event)
    names, updates, html = zip(*shown, strict=True)
    assert len(set(names)) == 1 and updates[0] is False and all(updates[1:]) and "<progress" in html[0]
    assert html[-1] == "<small>✓ conditioning 2.1 s  ✓ denoise 3.0 s  ✓ decode 1.0 s</small>"
    for event in EVENTS:
        bars(event)
    assert shown[-1][0] != names[0] and "decode" not in shown[-1][2]


def test_events_of_loading_and_of_the_time_left(pico):
    heard = []
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=heard.append, prompt_cache=False)
    run = pipe.run(pipe.request("a red circle", width=16, height=16, num_frames=5, steps=2, seed=3))
    yielded = list(run.listen(heard.append))
    said = [event.as_json() for event in heard]
    loads = [(event["part"], event["state"]) for event in said if event["event"] == "load"]
    assert loads == [(part, state) for part in ("text encoder", "transformer", "vae") for state in ("begun", "done")]
    etas = [event for event in said if event["event"] == "eta"]
    assert etas[0]["seconds"] is None and etas[-1]["seconds"] == 0 and etas[-1]["peak_bytes"] > 0
    assert sum(isinstance(event, StageStarted) for event in heard) == 4  # it is not told twice what it listens to twice
    assert not any(isinstance(event, Eta | Loading | Progress) for event in yielded)


def test_progress_of_an_iteration(capsys):
    heard = []
    assert list(counted(heard.append, "reading")(range(3))) == [0, 1, 2]
    assert [(event.done, event.total) for event in heard] == [(0, 3), (1, 3), (2, 3), (3, 3)]
