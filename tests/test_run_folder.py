"""What a run leaves behind is whole or not there, belongs to one process, and goes on only as the same run."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from paused_process import PausedProcess, run

from wan_mlx import cuda, storage
from wan_mlx.cli.main import main
from wan_mlx.errors import BusyError, WanError
from wan_mlx.media.write import ENDINGS, read_settings, save_video
from wan_mlx.pipeline import WanPipeline
from wan_mlx.runs import folder as run_folder
from wan_mlx.runs.folder import RunFolder
from wan_mlx.runs.record import request_of
from wan_mlx.storage import SAMPLE_BYTES, SAMPLES, fingerprint
from wan_mlx.types import Conditioning, Step


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """The bytes of an uninterrupted run's file, by ending; all are made of the first."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert main([*flags, "--output", str(path)]) == 0
    with np.load(path) as arrays:
        frames, latents = arrays["frames"], arrays["latents"]

    def of(ending: str) -> bytes:
        other = path.with_suffix(ending)
        if not other.exists():
            save_video(other, frames, 16, read_settings(path), latents)
        return other.read_bytes()

    return of


def step(index: int, total: int = 5) -> Step:
    state = {"latents": mx.full((1, 2, 2), index), "solver.x": mx.array([0.1 * index])}
    return Step(index, total, 1000.0, 1.0, state["latents"], state["latents"], state=state)


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "a.mp4") as folder:
        folder.begin({"steps": 5, "settings": {"prompt": "猫"}})
        yield folder


class TestFolder:
    def test_state_comes_back_bit_for_bit(self, folder):
        conditioning = Conditioning(
            mx.random.normal((1, 2, 2, 2, 3)), mx.random.normal((1, 4, 8)).astype(mx.bfloat16), context_scale=1 / 3
        )
        assert folder.state() is None
        folder.save_conditioning(conditioning)
        assert folder.state().steps == 0
        for index in range(3):
            folder.save_step(step(index))
        state = folder.state()
        assert state.steps == folder.steps_done == 3 and state.conditioning.context_scale == 1 / 3
        assert state.conditioning.negative_context is None and state.conditioning.trim_latents == 0
        for name, array in conditioning.arrays().items():
            got = getattr(state.conditioning, name)
            assert got.dtype == array.dtype and mx.array_equal(got, array)
        assert all(mx.array_equal(state.state[name], array) for name, array in step(2).state.items())
        assert folder.record()["settings"] == {"prompt": "猫"} and len(folder.record()["run"]) == 32

    def test_two_steps_are_kept_and_the_earlier_one_serves(self, folder):
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        for index in range(4):
            folder.save_step(step(index))
        assert folder.steps_done == 4  # and so on the disk
        paths = sorted(folder.path.glob("step-*"))
        assert [path.name for path in paths] == ["step-0003.safetensors", "step-0004.safetensors"]
        os.truncate(paths[1], paths[1].stat().st_size - 3)
        assert folder.state().steps == 3

    def test_a_step_is_flushed_while_the_next_computes(self, folder, monkeypatch):
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        assert folder.is_unfinished
        goes_on, flush = threading.Event(), storage.flush

        def slowly(path):
            assert goes_on.wait(60)
            flush(path)

        monkeypatch.setattr(storage, "flush", slowly)
        folder.save_step(step(0))  # returns, though flushing has not begun
        assert not list(folder.path.glob("step-*"))
        threading.Timer(0.05, goes_on.set).start()
        assert folder.steps_done == 1 and folder.state().steps == 1
        goes_on.clear()
        folder.save_step(step(1))
        threading.Timer(0.05, goes_on.set).start()
        folder.__exit__(None, None, None)
        assert (folder.path / "step-0002.safetensors").is_file()

    @pytest.mark.parametrize("how", ["as it is", "large", "cuda"])
    def test_strided_arrays_are_written_whole(self, folder, monkeypatch, how):
        """Strided, or parts of others: a thread that writes cannot make anything else of them."""
        monkeypatch.setattr(run_folder, "LARGE_STATE", 0 if how == "large" else 10**9)
        monkeypatch.setattr(cuda, "in_use", lambda: how == "cuda")
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        odd, whole = step(0), mx.arange(24).reshape(2, 3, 4).astype(mx.bfloat16)
        odd.state.update({"a": whole.T, "b": whole[:, 1:, ::2]})
        mx.eval(odd.state)
        folder.save_step(odd)
        if how == "large":
            assert folder._kept()  # without waiting
        assert len(odd.state) == 4  # the loop's own stay
        got = folder.state().state
        assert all(mx.array_equal(got[name], array) for name, array in odd.state.items()) and len(got) == 4

    def test_a_failed_write_of_a_step_is_raised_once(self, folder, monkeypatch):
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        folder.save_step(step(0))
        assert folder.steps_done == 1

        def full(path):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(storage, "flush", full)
            folder.save_step(step(1))
            with pytest.raises(WanError, match="step-0002.safetensors cannot be written.*No space left"):
                folder.save_step(step(2))
        assert folder.state().steps == 1 and not list(folder.path.glob(".wan_mlx-*"))

    def test_a_new_run_clears_the_old_run_folder(self, folder):
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        folder.save_step(step(0))
        folder.open_frames(2, 2).add(np.zeros((1, 2, 2, 3), np.uint8))
        (folder.path / ".wan_mlx-0123.mp4").write_bytes(b"half a video")
        folder.begin({"steps": 5})
        assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "run.json"]
        folder.delete()
        assert not folder.path.exists()

    def test_frames_that_are_not_whole_are_dropped(self, folder):
        chunks = [np.full((n, 4, 6, 3), n * 7, np.uint8) for n in (1, 4, 4)]
        store = folder.open_frames(4, 6)
        for chunk in chunks:
            store.add(chunk)
        raw, index = store.raw.read_bytes(), store.index.read_bytes()

        def read_again(raw_bytes: bytes, index_bytes: bytes) -> int:
            store.raw.write_bytes(raw_bytes)
            store.index.write_bytes(index_bytes)
            again = folder.open_frames(4, 6)
            for got, want in zip(again.chunks(), chunks, strict=False):
                assert np.array_equal(got, want)
            assert again.raw.stat().st_size == again.count * 72 if again.count else not again.raw.exists()
            return again.count

        assert read_again(raw, index) == 9
        assert read_again(raw + b"more", index) == 9
        assert read_again(raw[:-1], index) == 5
        assert read_again(raw, index[:-1]) == 5  # the line had not all come to the disk
        assert read_again(raw[:-1] + b"\0", index) == 5  # nor had the pixels
        assert read_again(b"\0" + raw[1:], index) == 0
        assert read_again(b"", index) == 0
        assert read_again(raw, b"nonsense\n") == 0

    def test_a_full_disk_is_reported_by_the_next_step(self, folder):
        """It stops in the middle of a file, which is as good as not begun."""
        folder.save_conditioning(Conditioning(mx.zeros(1), mx.zeros(1)))
        folder.save_step(step(0))
        store = folder.open_frames(100, 100)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            large = step(1)
            large.state["latents"] = mx.zeros((100, 100))
            folder.save_step(large)
            with pytest.raises(WanError, match="step-0002.safetensors cannot be written.*GB free"):
                folder.save_step(step(2))
            with pytest.raises(WanError, match="frames.raw cannot be written"):
                store.add(np.zeros((1, 100, 100, 3), np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert folder.state().steps == 1 and not list(folder.path.glob(".wan_mlx-*"))
        assert folder.open_frames(100, 100).count == 0

    def test_one_process_at_a_time(self, folder):
        with pytest.raises(BusyError, match=f"process {os.getpid()}.* is making .*a.mp4"), RunFolder(folder.output):
            pass

    def test_the_lock_goes_with_its_folder(self, tmp_path):
        """A run that deletes its folder does not leave another one locking a file that is gone."""
        first = RunFolder(tmp_path / "a.mp4")
        with first:
            first.delete()
            with RunFolder(tmp_path / "a.mp4") as second:
                second.begin({"steps": 5})
                with pytest.raises(BusyError), RunFolder(tmp_path / "a.mp4"):
                    pass

    def test_a_lock_on_a_deleted_file_is_none(self, tmp_path, monkeypatch):
        """The run before ends, and its folder with it, just between our opening of the lock and our locking it."""
        import fcntl

        flock, path = fcntl.flock, tmp_path / "a.mp4.wan/lock"

        def late(*args):
            monkeypatch.setattr(fcntl, "flock", flock)
            path.unlink()
            flock(*args)

        monkeypatch.setattr(fcntl, "flock", late)
        with RunFolder(tmp_path / "a.mp4"):
            assert path.exists()
            with pytest.raises(BusyError), RunFolder(tmp_path / "a.mp4"):
                pass

    def test_somebody_elses_file_stays(self, folder):
        (folder.path / "notes.txt").write_text("mine")
        folder.delete()
        assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


class TestFingerprint:
    def test_tells_files_apart(self, tmp_path):
        data = np.random.default_rng(0).bytes(2 * SAMPLES * SAMPLE_BYTES)
        path = tmp_path / "a"
        path.write_bytes(data)
        known = fingerprint(path)
        assert known["size"] == len(data) and fingerprint(path) == known
        for position in (0, len(data) - 1):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            assert fingerprint(path) != known
        middle, length = len(data) // 2, 3 * SAMPLE_BYTES  # over at least one sample
        path.write_bytes(data[:middle] + bytes(length) + data[middle + length :])
        assert fingerprint(path) != known
        path.write_bytes(data[:-1])
        assert fingerprint(path) != known

    def test_a_change_between_samples_is_noticed(self, tmp_path):
        """One of the runs that such a change must not let go on."""
        path, index = tmp_path / "a", tmp_path / "model.safetensors.index.json"
        path.write_bytes(bytes(40 * SAMPLE_BYTES))
        index.write_text(json.dumps({"weight_map": {"x": "a"}}))
        known = fingerprint(path), fingerprint(index)
        time.sleep(0.01)
        with path.open("r+b") as file:
            file.seek(SAMPLE_BYTES + 100)
            file.write(b"1")
        now = fingerprint(path), fingerprint(index)
        assert now[0]["sha256"] == known[0]["sha256"] and all(a != b for a, b in zip(now, known, strict=True))

    def test_an_index_stands_for_its_shards(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_bytes(name.encode())
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": "a", "y": "b", "z": "a"}}))
        known = fingerprint(index)
        assert known["size"] == 2
        (tmp_path / "b").write_bytes(b"c")
        assert fingerprint(index) != known


def cut(monkeypatch, after: int) -> None:
    """Let the machine fail while frame chunk number ``after`` is put away."""
    from wan_mlx.runs.folder import FrameStore

    add, count = FrameStore.add, iter(range(1_000_000))

    def failing(self, frames):
        if next(count) == after:
            raise RuntimeError("the machine failed")
        add(self, frames)

    monkeypatch.setattr(FrameStore, "add", failing)


class TestResume:
    def test_a_step_cache_goes_on_too(self, tmp_path, monkeypatch, flags):
        """What it looks back on is kept, and so is the number of forwards that it left out."""
        command = [*flags, "--steps", "16", "--frames", "5", "--cache", "easycache:0.3"]
        assert main([*command, "--output", str(tmp_path / "whole.npz")]) == 0
        settings = read_settings(tmp_path / "whole.npz")
        assert settings["forwards"][0] < settings["forwards"][1]
        save, output = RunFolder.save_step, tmp_path / "a.npz"

        def failing(self, step, notes):
            if step.index == 13:
                raise RuntimeError("the machine failed")
            save(self, step, notes)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_step", failing)
            assert main([*command, "--output", str(output)]) == 1
        assert main(["--resume", str(output)]) == 0
        assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_every_format_has_the_same_bytes(self, tmp_path, monkeypatch, capsys, flags, whole, ending):
        output = tmp_path / f"a{ending}"
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            assert main([*flags, "--output", str(output)]) == 1
        assert f"3 steps are kept; go on with: wan-mlx resume {output}" in capsys.readouterr().err
        assert not output.exists()
        assert main(["--resume", str(output), "--quiet"]) == 0
        assert output.read_bytes() == whole(ending)
        assert os.listdir(tmp_path) == [output.name]

    def test_options_allowed_on_an_unfinished_run(self, tmp_path, pico, monkeypatch, capsys, flags, whole):
        output = tmp_path / "a.npz"
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            assert main([*flags, "--output", str(output)]) == 1

        def error_of(*arguments, code):
            capsys.readouterr()
            assert main([*arguments]) == code
            return capsys.readouterr().err.strip().splitlines()[-1]

        # The same command again, which would throw it away.
        error = error_of(*flags, "--output", str(output), code=2)
        assert error == (f"error: there is an unfinished run of {output}: go on with `wan-mlx resume {output}`, or "
                         "start anew with --overwrite")  # fmt: skip
        # Other settings.
        error = error_of("--resume", str(output), "--steps", "4", "--prompt", "a cat", "--size", "16x16", code=2)
        assert "--prompt is a red circle, a cat was given" in error
        assert "--steps is 3, 4 was given" in error and "--size" not in error
        # Weights that changed meanwhile, and are still needed.
        record = json.loads((tmp_path / "a.npz.wan/run.json").read_text())
        for name, code in (("transformer", 0), ("vae", 1)):
            changed = record["weights"][name] | {"size": 1}
            with RunFolder(output) as folder:
                folder.amend(weights=record["weights"] | {name: changed})
            error = error_of("--resume", str(output), "--dry-run", code=code)
            assert ("not the file that the run was begun with" in error) == (code == 1)
        # Another version of MLX is said aloud.
        with RunFolder(output) as folder:
            folder.amend(weights=record["weights"], machine=record["machine"] | {"mlx": "0.1"})
        capsys.readouterr()
        # The same settings, said in other words, and the folder's own name.
        assert main(["--resume", f"{output}.wan", "--model", str(pico), "--frame_num", "9", "--base_seed", "3",
                     "--quiet"]) == 0  # fmt: skip
        assert "begun with mlx 0.1" in capsys.readouterr().err
        with np.load(output) as got:
            assert got["frames"].shape == (9, 16, 16, 3)
        assert output.read_bytes() == whole(".npz")
        assert error_of("--resume", str(output), code=0).endswith("is finished already")

    def test_a_record_is_of_request_and_model(self, tmp_path, monkeypatch, capsys, flags):
        """And not of flags, as those of the version before, which are refused."""
        output, path = tmp_path / "a.npz", tmp_path / "a.npz.wan/run.json"
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            assert main([*flags, "--output", str(output)]) == 1
        record = json.loads(path.read_text())
        assert record["request"]["num_frames"] == 9 and record["model"]["dtype"] == "float32"
        assert "flags" not in record and not {"quiet", "json", "resume", "model"} & set(record["asked"])
        record["flags"] = {**record.pop("asked"), **record.pop("model")}
        del record["run"], record["digest"]
        path.write_text(json.dumps(record))
        capsys.readouterr()
        assert main(["--resume", str(output)]) == 1
        error = capsys.readouterr().err
        assert "was begun by an earlier version of wan_mlx" in error and len(error.splitlines()) == 1
        assert path.is_file()

    def test_overwrite_starts_anew(self, tmp_path, monkeypatch, flags, whole):
        output = tmp_path / "a.npz"
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            assert main([*flags, "--seed", "4", "--output", str(output)]) == 1
        assert main([*flags, "--output", str(output), "--overwrite"]) == 0
        assert output.read_bytes() == whole(".npz") and os.listdir(tmp_path) == ["a.npz"]

    def test_resume_keeps_the_plan_of_the_run(self, tmp_path, monkeypatch, caplog, flags, pico):
        """Memory that is free now, but was not, changes nothing; where it has become too little, that is told."""
        from wan_mlx.planning import choose as memory

        output = tmp_path / "a.npz"
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            patch.setattr(memory, "LADDER", [(True, 7)])
            assert main([*flags, "--output", str(output)]) == 1
        with RunFolder(output) as folder:
            state = folder.state()
        assert state.how["tokens_at_once"] == 7 and state.how["stream"] is True
        pipe = WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
        plan = pipe.plan(request_of(json.loads((tmp_path / "a.npz.wan/run.json").read_text())))
        assert plan.tokens_at_once != 7 and not plan.stream
        followed = plan.as_begun(state.how)
        assert followed.how | {"peak": 0} == state.how | {"peak": 0} and not caplog.text
        assert plan.as_begun({**state.how, "peak": 10**15}) is plan and "less memory" in caplog.text
        assert main(["--resume", str(output)]) == 0

    def test_a_series_of_stills_goes_on(self, tmp_path, monkeypatch, capsys, flags):
        command = [*flags, "--frames", "1", "--num-images", "3", "--output", str(tmp_path / "a.png")]
        paths = [tmp_path / f"a_seed{seed}.png" for seed in (3, 4, 5)]
        with monkeypatch.context() as patch:
            cut(patch, after=1)
            assert main(command) == 1
        assert [path.exists() for path in paths] == [True, False, False]
        before = paths[0].stat().st_mtime_ns
        assert main(["--resume", str(paths[1])]) == 0 and main(command) == 0
        assert all(path.exists() for path in paths) and paths[0].stat().st_mtime_ns == before
        assert capsys.readouterr().out.split()[-3:] == [str(path) for path in paths]
        assert main([*command, "--steps", "4"]) == 2 and "exists" in capsys.readouterr().err

    def test_nothing_to_resume(self, tmp_path, capsys):
        assert main(["--resume", str(tmp_path / "a.mp4")]) == 2
        assert "there is no unfinished run" in capsys.readouterr().err

    def test_cut_between_the_file_and_its_folders_end(self, tmp_path, monkeypatch, flags, whole):
        output = tmp_path / "a.npz"
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "delete", lambda self: None)
            assert main([*flags, "--output", str(output)]) == 0
        assert json.loads((tmp_path / "a.npz.wan/run.json").read_text())["finished"]
        assert main(["--resume", str(output)]) == 0
        assert output.read_bytes() == whole(".npz") and os.listdir(tmp_path) == ["a.npz"]

    def test_kill_9_everywhere(self, tmp_path, flags, whole):
        """In a step, while a state is being written, while decoding, and while encoding: one run, killed four times."""
        output = str(tmp_path / "a.mp4")
        places = [("step", 1), ("saving", 0), ("frame", 1), ("encoding", 1)]
        arguments = [*flags, "--output", output]
        for where, number in places:
            paused = PausedProcess(where, number, *arguments)
            if where == "frame":  # a second process on the same output
                code, error = run("--resume", output)
                assert code == 1 and f"another process (process {paused.process.pid}) is making {output}" in error
            paused.process.kill()
            assert paused.finish()[0] == -signal.SIGKILL
            arguments = ["--resume", output, "--quiet"]
        assert main(arguments) == 0
        assert Path(output).read_bytes() == whole(".mp4")
        assert os.listdir(tmp_path) == ["a.mp4"]


def generate(*arguments: str, kill_after: float | None = None) -> int:
    """The exit code of a process of its own, which is killed if it has not ended after so many seconds."""
    command = [sys.executable, "-m", "wan_mlx.generate", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=kill_after)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    """50 kills over runs of the bundled model: every run completes, to the same bytes."""
    flags = ["--model", "nano", "--prompt", "a green square moves up on a black background", "--seed", "1", "--quiet"]
    whole = tmp_path / "whole.mp4"
    started = time.monotonic()
    assert generate(*flags, "--output", str(whole)) == 0
    seconds = time.monotonic() - started
    chance, kills, runs = random.Random(50), 0, 0
    while kills < 50:
        output = tmp_path / f"{runs}.mp4"
        while not output.exists() or output.with_name(f"{output.name}.wan").exists():
            begun = output.with_name(f"{output.name}.wan").joinpath("run.json").exists() or output.exists()
            command = ["--resume", str(output), "--quiet"] if begun else [*flags, "--output", str(output)]
            kills += generate(*command, kill_after=chance.uniform(0.3, seconds / 2) if kills < 50 else None) != 0
        assert output.read_bytes() == whole.read_bytes()
        runs += 1
    assert sorted(os.listdir(tmp_path)) == sorted(["whole.mp4", *(f"{i}.mp4" for i in range(runs))])
    print(f"{kills} kills over {runs} runs, each {seconds:.0f} s uninterrupted")
