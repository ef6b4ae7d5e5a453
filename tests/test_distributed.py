"""Several machines = one: the same bits, whatever is shared, also resumed on another number; and what ends a run."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import machines
import mlx.core as mx
import numpy as np
import pytest
import tiny_mlx_model
from two_experts import as_pair, lora

from wan_mlx import heartbeat
from wan_mlx.errors import WanError
from wan_mlx.heartbeat import Heartbeat
from wan_mlx.models.vae_relay import balanced
from wan_mlx.runs.together import shared_state
from wan_mlx.types import Conditioning, RunState

CACHES = ("none", "teacache", "magcache", "easycache", "spectrum", "spectrum hidden")
CASES = Path(__file__).parent / "machine_cases.py"


def case(folder, size: int, *words: str) -> list[dict]:
    """What each rank finds."""
    ran = machines.ended(machines.start(folder, size, [sys.executable, str(CASES), *words]))
    for rank, (code, _, error) in enumerate(ran):
        assert code == 0, f"rank {rank} of {size} ended with {code}: {error}"
    return [json.loads(out) for _, out, _ in ran]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one machine finds; each case once."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def run(*words: str) -> dict:
        if words not in found:
            (found[words],) = case(folder, 1, *words)
        return found[words]

    return run


slow = pytest.mark.slow  # rings of busy processes on two cores


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
def test_forwards_divided_among_machines_are_the_same_bits(tmp_path, alone, size):
    for found in case(tmp_path, size, "forwards"):
        assert found == alone("forwards")


FEW = ("none,teacache,easycache", "part")  # of the caches, and of guidance: in part of the steps


@pytest.mark.parametrize(
    ("size", "modes", "which"),
    [(2, "cfg", FEW), (2, "tokens", FEW), (4, "cfg+tokens", ("teacache", "part")),
     *(pytest.param(*case, (), marks=slow)
       for case in [(2, "cfg"), (2, "tokens"), (3, "tokens"), (4, "cfg+tokens"), (3, "off")])],
)  # fmt: skip
def test_samplings_of_machines_are_the_same_bits(tmp_path, alone, size, modes, which):
    first, *others = case(tmp_path, size, "walks", modes, *which)
    assert first == alone("walks", "off", *which)
    for found in others:
        assert {name: latents for name, (latents, *_) in found.items()} == {n: one[0] for n, one in first.items()}


@pytest.mark.parametrize(
    ("before", "after", "caches"),
    [((2, "tokens"), (1, "off"), "teacache,spectrum hidden"),
     *(pytest.param(*case, ",".join(CACHES), marks=slow)
       for case in [((2, "tokens"), (3, "tokens")), ((4, "cfg+tokens"), (1, "off")), ((1, "off"), (2, "cfg")),
                    ((2, "cfg"), (4, "cfg+tokens"))])],
)  # fmt: skip
def test_a_run_goes_on_with_another_number_of_machines(tmp_path, alone, before, after, caches):
    case(tmp_path, before[0], "cut", before[1], str(tmp_path), caches)
    found = alone("walks", "off", caches, "both")
    whole = {name.partition(",")[0]: one[0] for name, one in found.items()}
    for found in case(tmp_path, after[0], "resumed", after[1], str(tmp_path), caches):
        assert found == whole


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=slow)])
def test_decodes_of_machines_are_the_same_frames(tmp_path, alone, size):
    """In a relay, in columns, and tiles dealt out; they come out at rank 0."""
    first, *_ = case(tmp_path, size, "tiles")
    assert first == alone("tiles")


@pytest.mark.parametrize("count, ends", [(1, [5]), (2, [3, 5]), (3, [2, 4, 5]), (9, [1, 3, 4, 5])])
def test_legs_of_a_relay_are_of_nearly_equal_work(count, ends):
    assert [end for _, end in balanced([2, 3, 1, 2, 4], count)] == ends


def test_words_and_arrays_are_told_bit_for_bit(tmp_path):
    for found in case(tmp_path, 3, "group_itself"):
        assert found["same"] and found["most"] == 2 and found["link"]
        assert found["values"] == [{"rank": rank, "text": "ä" * rank} for rank in range(3)]


# What ends a run


def test_a_group_that_was_refused_ends_nothing_later(tmp_path):
    """The others are waited for no longer."""
    words = ["import time", "from wan_mlx import distributed", "distributed.START = 0.2",
             "distributed.backend_given = lambda: 'none such'", "try: distributed.open_group()",
             "except distributed.WanError as error: print(error)", "time.sleep(0.5)"]  # fmt: skip
    ((code, out, error),) = machines.ended(machines.start(tmp_path, 1, [sys.executable, "-c", "\n".join(words)]))
    assert code == 0 and not error and out.startswith("the machines do not find each other (none such"), error


class Told:
    """Rank 0's group, then that of another, which is told the same."""

    def gather_values(self, values):
        self.values = self.values if values is None else json.loads(json.dumps(values))
        return [dict(self.values)]

    def broadcast(self, arrays):
        self.arrays = self.arrays if arrays is None else arrays
        return self.arrays


def test_what_a_clip_shares_with_the_one_before_is_told_once():
    names = ("noise", "context", "audio", "motion")
    first = Conditioning(**{name: mx.array([float(place)]) for place, name in enumerate(names)})
    other, told = replace(first, audio=first.audio + 0), Told()
    second = RunState(replace(first, noise=first.noise + 4, motion=None, last_frames=first.noise, clip=1), 3)
    assert shared_state(told, second, first) is second
    assert [*told.arrays] == ["conditioning.noise"]
    found = shared_state(told, None, other)
    assert found.steps == 3 and found.conditioning.clip == 1 and found.conditioning.audio is other.audio
    assert found.conditioning.noise == 4 and found.conditioning.motion is found.conditioning.last_frames is None


@pytest.fixture
def line():
    """Both ends of the line between two machines, and what ended each process."""
    names, ends = ["mac1", "mac2"], socket.socketpair()
    found = [Heartbeat(rank, names, {1 - rank: end}) for rank, end in enumerate(ends)]
    for one in found:
        one.at_end, one.ended_by = (reasons := SimpleQueue()).put, reasons
    yield found
    for one, end in zip(found, ends, strict=True):
        one.close()
        end.close()


def meeting(one: Heartbeat) -> str:
    """What becomes of a meeting: "" if all come."""
    became = ["nobody comes"]

    def meet():
        try:
            became[0] = one.meet("there") or ""
        except WanError as error:
            became[0] = str(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(5)
    return became[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_who_has_left_is_not_waited_for(line, rank):
    line[1 - rank].close()
    for _ in range(2):
        assert meeting(line[rank]) == f"mac{2 - rank} (rank {1 - rank}) has ended"
    assert line[rank].ended_by.empty()


@pytest.mark.parametrize("rank", [0, 1])
def test_data_of_who_has_left_do_not_come(line, rank, monkeypatch):
    """Not all links end with a peer."""
    monkeypatch.setattr(heartbeat, "HANG", 0.5)
    with heartbeat.WAITS.of("data"):
        line[1 - rank].close()
        assert line[rank].ended_by.get(timeout=5).startswith(f"mac{2 - rank} (rank {1 - rank}) has ended, whose data")


def test_who_has_failed_is_not_ended_by_the_others_end(line):
    first, other = line
    first.fail("the disk is full")
    assert other.ended_by.get(timeout=5) == "mac1 (rank 0): the disk is full"
    other.close()
    assert meeting(first) == "mac2 (rank 1) has ended" and first.ended_by.empty()


def endless(folder, size: int, *words: str):
    processes = machines.start(folder, size, [sys.executable, str(CASES), "endless", *words])
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    return processes


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_all(tmp_path, lost):
    processes = endless(tmp_path, 3, "20")
    processes[lost].kill()
    started = time.monotonic()
    for rank, (code, _, error) in enumerate(machines.ended(processes, 30)):
        assert rank == lost or (code == 1 and f"(rank {lost})" in error and "was lost" in error), error
        assert rank == lost or error.count("\nerror: ") == 1, error
    assert time.monotonic() - started < 20


def test_a_stopped_rank_ends_all(tmp_path):
    processes = endless(tmp_path, 3, "4")
    processes[2].send_signal(signal.SIGSTOP)
    ended = machines.ended(processes[:2], 30)
    for code, _, error in ended:
        assert code == 1 and "(rank 2) has given no sign of life" in error, error
    processes[2].send_signal(signal.SIGCONT)
    ((code, _, error),) = machines.ended(processes[2:], 30)  # no orphan
    assert code == 1 and error.count("\nerror: ") == 1, error


def test_a_rank_that_fails_is_heard_by_all(tmp_path):
    first, _, last = machines.ended(endless(tmp_path, 3, "20", "disk"), 30)
    for code, _, error in (first, last):
        assert code == 1 and "(rank 1): the disk is full" in error


def test_a_gpu_that_hangs_is_noticed(tmp_path):
    """Its process lives, and beats; the others wait for its data."""
    started = time.monotonic()
    for code, _, error in machines.ended(endless(tmp_path, 3, "20", "gpu"), 30):
        assert code == 1 and "(rank 1) has not finished its work for" in error and error.count("\nerror: ") == 1, error
    assert time.monotonic() - started < 20


def test_a_link_that_hangs_is_noticed(tmp_path):
    for code, _, error in machines.ended(endless(tmp_path, 2, "20", "data"), 30):
        assert code == 1 and "all machines have waited for each other's data" in error, error


# The command


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return tiny_mlx_model.write(tmp_path_factory.mktemp("pico") / "pico")


QUICK = ["--prompt", "a red circle", "--size", "32x32", "--frames", "5", "--steps", "3", "--seed", "3", "--dtype",
         "float32", "--model", "pico"]  # fmt: skip


def command(folder: Path, *words: str, before: str = "") -> list[str]:
    """``wan-mlx`` in a folder."""
    script = f"import os, sys; os.chdir({str(folder)!r}); {before}\nfrom wan_mlx.cli.main import main\n"
    return [sys.executable, "-c", f"{script}sys.exit(main({list(words)!r}))"]


def folders(tmp_path: Path, pico: Path, count: int) -> list[Path]:
    """A folder for each machine, with the model."""
    found = [tmp_path / f"mac{rank}" for rank in range(count)]
    for folder in found:
        shutil.copytree(pico, folder / "pico")
    return found


def test_a_video_of_two_machines_is_that_of_one(tmp_path, pico):
    one, two, other = folders(tmp_path, pico, 3)
    os.remove(other / "pico" / "text_encoder.safetensors")  # rank 0 encodes
    shutil.copy(pico / "text_encoder.safetensors", other / "pico")
    ((code, _, error),) = machines.ended(machines.start(tmp_path, 1, command(one, *QUICK, "--output", "v.npz")))
    assert code == 0, error
    words = (*QUICK, "--output", "v.npz")
    ran = machines.ended(machines.start(tmp_path, 2, command(two, *words), {1: command(other, *words)}))
    for code, _, error in ran:
        assert code == 0, error
    assert "machines  2, by ring: cfg" in ran[0][2] and not ran[1][1].strip() and not ran[1][2].strip()
    assert sorted(path.name for path in other.iterdir()) == ["pico"]
    assert told(two, "v.npz")["state"] == "done"
    with np.load(one / "v.npz") as a, np.load(two / "v.npz") as b:
        assert np.array_equal(a["frames"], b["frames"]) and np.array_equal(a["latents"], b["latents"])


def test_a_run_that_lost_a_machine_goes_on_alone(tmp_path, pico):
    """Whose rank was killed between two steps: what is told, here and in the file, and the same frames at the end."""
    one, two, other = folders(tmp_path, pico, 3)
    words = [*QUICK, "--output", "v.npz"]
    held = """import time; from wan_mlx.runs.folder import RunFolder; save = RunFolder.save_step
def held(self, step, notes):
    save(self, step, notes)
    print(step.index, flush=True)
    time.sleep(step.index)
RunFolder.save_step = held"""
    first, lost = machines.start(tmp_path, 2, command(two, *words, before=held), {1: command(other, *words)})
    assert [first.stdout.readline() for _ in range(2)] == ["0\n", "1\n"], first.stderr.read()
    lost.kill()
    (code, _, error), _ = machines.ended([first, lost], 30)
    said = "was lost: its process or its machine has ended; 2 steps are kept; go on with: wan-mlx resume v.npz"
    assert code == 1 and f"{said}\n" in error and error.count("\nerror: ") == 1, error
    assert told(two, "v.npz")["code"] == 1 and told(two, "v.npz")["message"].endswith(said)
    for alone in (command(one, *words), command(two, "resume", "v.npz")):
        ((code, _, error),) = machines.ended(machines.start(tmp_path, 1, alone))
        assert code == 0, error
    with np.load(one / "v.npz") as a, np.load(two / "v.npz") as b:
        assert np.array_equal(a["frames"], b["frames"]) and np.array_equal(a["latents"], b["latents"])


@pytest.mark.parametrize("mode", ["cfg", "tokens"])
def test_experts_with_loras_are_those_of_one_machine(tmp_path, pico, mode):
    """Both experts of Wan2.2, and a LoRA for each of another strength."""
    one, two, other = folders(tmp_path, pico, 3)
    for folder in (one, two, other):
        as_pair(folder / "pico")
        lora(folder / "lora.safetensors")
    words = (*QUICK, "--steps", "5", "--shift", "3", "--lora-high", "lora.safetensors", "--lora-low",
             "lora.safetensors:-0.5", "--output", "v.npz")  # fmt: skip
    ((code, _, error),) = machines.ended(machines.start(tmp_path, 1, command(one, *words)))
    assert code == 0, error
    shared = (*words, "--parallel", mode)
    processes = machines.start(tmp_path, 2, command(two, *shared), {1: command(other, *shared)})
    for code, _, error in machines.ended(processes):
        assert code == 0, error
    with np.load(one / "v.npz") as a, np.load(two / "v.npz") as b:
        assert np.array_equal(a["frames"], b["frames"]) and np.array_equal(a["latents"], b["latents"])


@pytest.mark.parametrize(
    ("how", "first", "other"), [("finish", 1, 1), ("stop", "interrupted", "another machine had to stop")]
)
def test_all_end_after_the_step_at_which_one_was_asked(tmp_path, pico, how, first, other):
    assert case(tmp_path, 2, "early", str(pico), how, "step") == [[first, 1], [other, 1]]


@pytest.mark.parametrize("when", [["stage_started"], ["frames"], ["frames", "relayed"]], ids=" ".join)
def test_a_machine_that_stops_alone_says_why(tmp_path, pico, when):
    """While it encodes or decodes: the others have no step at which they could agree."""
    words = [sys.executable, str(CASES), "early", str(pico), "stop", *when]
    (code, out, error), (other_code, _, other) = machines.ended(machines.start(tmp_path, 2, words), 40)
    assert code == 0 and json.loads(out) == ["interrupted", 1], error
    if "relayed" in when and other_code == 0:  # its share was done
        assert not other
    else:
        assert other_code == 1 and "(rank 0): interrupted\n" in other and other.count("\nerror: ") == 1, other


def test_a_machine_that_reads_for_long_is_waited_for(tmp_path, pico):
    """By NCCL it is the other's GPU that would wait for its data, as if it hung."""
    first, other = case(tmp_path, 2, "unequal_disks", str(pico))
    assert first == other


def test_a_plan_is_of_the_link_as_measured(tmp_path, pico):
    two, other = folders(tmp_path, pico, 2)
    words = ("plan", *QUICK[2:])
    processes = machines.start(tmp_path, 2, command(two, *words), {1: command(other, *words)})
    (code, out, error), (other_code, *_) = machines.ended(processes)
    assert code == 0 and other_code == 0, error
    assert "  2, ring, as measured" in out and "Thunderbolt" not in out, out


def told(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.status.json").read_text())


@pytest.mark.parametrize("words", [["--parallel", "cfg+tokens"], ["--guidance", "1", "--parallel", "cfg"]])
def test_a_way_that_is_none_is_refused_by_the_first_alone(tmp_path, pico, words):
    two, other = folders(tmp_path, pico, 2)
    words = [*QUICK, *words, "--output", "v.npz"]
    processes = machines.start(tmp_path, 2, command(two, *words), {1: command(other, *words)})
    (code, _, error), (other_code, out, other_error) = machines.ended(processes)
    assert code == 2 and error.count("--parallel cfg") == 1, error
    assert other_code == 0 and not out.strip() and not other_error.strip(), other_error
    assert told(two, "v.npz")["code"] == 2 and "cannot be" in told(two, "v.npz")["message"]


def test_a_wrong_flag_is_told_in_the_file(tmp_path):
    """By the first at once; the others, with whom the launcher would end it, wait."""
    (tmp_path / "v.npz.status.json").write_text('{"state": "done"}')  # of a run before
    words = command(tmp_path, "--prompt", "x", "--stepz", "3", "--output", "v.npz")
    first, other = machines.start(tmp_path, 2, words)
    assert first.wait(30) == 2 and other.poll() is None
    for code, _, error in machines.ended([first, other]):
        assert code == 2 and error == "error: unknown argument --stepz 3; nearest: --steps\n"
    assert told(tmp_path, "v.npz")["message"] == "unknown argument --stepz 3; nearest: --steps"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--prompt", "-"], "--prompt - waits for the end of standard input, which mlx.launch does not pass on"),
     (["--output", "none/v.npz"], "output folder none does not exist, expected an existing folder")],
)  # fmt: skip
def test_what_cannot_be_is_told_by_the_first(tmp_path, pico, words, said):
    (one,) = folders(tmp_path, pico, 1)
    (code, _, error), _ = machines.ended(machines.start(tmp_path, 2, command(one, *QUICK, *words)))
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_the_first_alone_tells_its_end_too(tmp_path, pico):
    """With --parallel off, and where the others do not come."""
    (one,) = folders(tmp_path, pico, 1)
    first, other = machines.start(tmp_path, 2, command(one, *QUICK, "--parallel", "off", "--output", "v.npz"))
    assert [code for code, *_ in machines.ended([first, other])] == [0, 0]
    assert told(one, "v.npz")["state"] == "done"
    late = command(one, *QUICK, "--output", "w.npz", before="from wan_mlx import distributed; distributed.START = 1")
    first, other = machines.start(tmp_path, 2, late, {1: [sys.executable, "-c", ""]})
    (code, _, error), _ = machines.ended([first, other])
    assert code == 1 and error.count("\n") == 2 and "\nerror: not all machines came within" in error, error
    assert told(one, "w.npz")["code"] == 1 and "not all machines came" in told(one, "w.npz")["message"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_others_is_interrupted(tmp_path, pico, signum):
    (one,) = folders(tmp_path, pico, 1)
    words = command(one, *QUICK, "--output", "v.npz")
    first, other = machines.start(tmp_path, 2, words, {1: [sys.executable, "-c", ""]})
    while not (one / "v.npz.status.json").exists():
        time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signum)
    (code, _, error), _ = machines.ended([first, other], 10)
    assert code == 128 + signum and error == "interrupted\n", error
    assert told(one, "v.npz") == {"state": "failed", "code": 128 + signum, "message": "interrupted"}


@pytest.mark.parametrize("what", ["weights", "version"])
def test_machines_that_differ_are_told(tmp_path, pico, what):
    two, other = folders(tmp_path, pico, 2)
    before = "import wan_mlx; wan_mlx.__version__ = '0.0.9'" if what == "version" else ""
    if what == "weights":
        file = other / "pico" / "transformer.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    words = (*QUICK, "--output", "v.npz")
    own = {1: command(other, *words, before=before)}
    first, second = machines.ended(machines.start(tmp_path, 2, command(two, *words), own))
    assert first[0] == 1 and f"{what} differs" in first[2], first[2]
    assert "(rank 1)" in first[2] and second[0] in (0, 1)
    assert told(two, "v.npz")["state"] == "failed"
