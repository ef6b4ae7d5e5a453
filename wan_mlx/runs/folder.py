"""A run's folder: checkpoints beside its output, from which it goes on after Ctrl-C, kill -9 or a power cut.

Beside ``cat.mp4`` there is ``cat.mp4.wan`` until the video is complete:

    lock                      held by the process at work; the system frees it when that dies
    run.json                  request, model, the settings to embed, fingerprints of weights and sources; then whether
                              the latents stopped being finite, and SHA-256 of the video that is about to be moved
    conditioning.safetensors  texts, images and sources as encoded, and the noise: so no encoder is loaded again
    step-0012.safetensors     `Step.state` after step 12; the last two are kept
    frames.raw, frames.index  decoded frames uint8, and a line per latent frame: how many, and their CRC-32

All but the frames appear whole: written under another name, flushed to the disk, renamed; a step's state while the
next step computes. The frames grow, each flushed before its line in the index. The state of the VAE is not kept: it is
gigabytes for what takes a minute of an hour's run, so a decode that was cut starts again from the latents, and frames
that are here already are not written again.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import cuda, storage
from ..errors import BusyError, WanError
from ..files.safetensors import load_arrays
from ..types import Conditioning, RunState, Step

log = logging.getLogger(__name__)

ENDING = ".wan"
KEPT_STEPS = 2
LARGE_STATE = 300_000_000  # bytes; with a step cache it is gigabytes


class Behind:
    """Calls that a thread makes while the run goes on, one at a time."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._last: Future | None = None

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Make another call once the last is done; raises what went wrong in that."""
        self.settle()
        self._last = self._thread.submit(function, *arguments)

    def settle(self) -> None:
        """Wait until the last call is done; raises what went wrong in it, once."""
        if self._last is not None:
            wait([self._last])
            done, self._last = self._last, None
            done.result()


class RunFolder:
    """The folder of the run that makes ``output``, locked within a ``with`` block.

    Args:
        output: the video's path; the folder is its name with ".wan" after it, and need not exist.

    Raises:
        BusyError: on entering: another process holds it.
        ValueError: on entering: no folder can be made there.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ENDING)
        self._lock: int | None = None
        self._steps = Behind(_writer())

    def __enter__(self) -> RunFolder:
        while self._lock is None:
            try:
                self.path.mkdir(exist_ok=True)
            except OSError as error:
                raise ValueError(f"the run's folder {self.path} cannot be made: {error.strerror}") from error
            try:
                self._lock = _acquire(self.path / "lock")
            except BlockingIOError:
                who = _read_text(self.path / "lock").strip()
                raise BusyError(f"another process{f' ({who})' if who else ''} is making {self.output}") from None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._steps.settle()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    # Identity

    def begin(self, record: dict[str, Any]) -> None:
        """Start anew: drop what an earlier run left, and note what this one is (anything JSON can hold)."""
        self._clear()
        self._write(record)

    def amend(self, **changes: Any) -> None:
        """Note what has become of the run."""
        self._write((self.record() or {}) | changes)

    def _write(self, record: dict[str, Any]) -> None:
        with storage.whole_file(self.path / "run.json") as path:
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def record(self) -> dict[str, Any] | None:
        """The record that `begin` noted; None if no run has begun here.

        Raises:
            WanError: the file is damaged.
        """
        path = self.path / "run.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise WanError(f"{path} is damaged ({error}); start anew with --overwrite") from error
        return record

    # How far it has come

    def save_conditioning(self, conditioning: Conditioning, how: Mapping[str, Any] | None = None) -> None:
        """Keep what was encoded, and `RunState.how`."""
        arrays = conditioning.arrays()
        rest = {name: value for name, value in vars(conditioning).items() if name not in arrays and value is not None}
        metadata = {"values": json.dumps(rest), "how": json.dumps(how or {})}
        with storage.whole_file(self.path / "conditioning.safetensors") as path:
            mx.save_safetensors(str(path), arrays, metadata)

    def save_step(self, step: Step, notes: Mapping[str, Any] | None = None) -> None:
        """Keep the step's state, with ``notes`` that JSON can hold, and drop those before the last but one.

        Another thread writes it, while the next step computes, unless it is so large that it had better be gone; what
        goes wrong there is raised by whatever of this folder is used next.
        """
        self._steps.settle()
        large = sum(array.nbytes for array in step.state.values()) > LARGE_STATE
        # On CUDA what the CPU looks into moves away from the GPU, which goes on with it: so it looks into copies.
        copied = cuda.in_use() and not large
        state = {name: mx.contiguous(array + 0 if copied else array) for name, array in step.state.items()}
        mx.eval(state)  # another thread cannot
        metadata = {"notes": json.dumps(notes or {})}
        self._steps.call(self._keep_step, self._step_path(step.index + 1), state, metadata)
        if large:
            self._steps.settle()

    def state(self) -> RunState | None:
        """The state to resume from, as `WanPipeline.stages` takes it; None before anything is kept."""
        path = self.path / "conditioning.safetensors"
        if not path.is_file():
            return None
        arrays, metadata = _load(path)
        done, state, _ = self._last_step()
        values: dict[str, Any] = {**arrays, **json.loads(metadata["values"])}
        return RunState(Conditioning(**values), done, state, json.loads(metadata["how"]))

    def notes(self) -> dict[str, Any]:
        """The notes that `save_step` was given at the last step."""
        return self._last_step()[2]

    @property
    def has_begun(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def is_unfinished(self) -> bool:
        """Whether there is something to go on with: at least what was encoded."""
        return self.has_begun and (self.path / "conditioning.safetensors").is_file()

    @property
    def size(self) -> int:
        """Bytes in it."""
        self._steps.settle()
        return sum(path.stat().st_size for path in self.path.iterdir())

    @property
    def steps_done(self) -> int:
        """How many steps are kept, without reading them."""
        return max((_count_of(path) for path in self._steps_kept()), default=0)

    # Frames

    def open_frames(self, height: int, width: int) -> FrameStore:
        """The decoded frames, uint8 (n, height, width, 3), to read and to add to."""
        return FrameStore(self.path, height, width)

    # The end

    def mark_finished(self, video: Path) -> None:
        """Flush the finished video, and note what it is: it is about to be moved to its place."""
        storage.flush(video)
        self.amend(finished=storage.sha256(video))

    def is_finished(self) -> bool:
        """Whether the output is the video that this run made: it was cut only before its folder was gone."""
        known = (self.record() or {}).get("finished")
        return known is not None and self.output.is_file() and known == storage.sha256(self.output)

    def delete(self) -> None:
        """Remove the folder; the files that a resume needs go before the record, which says if the video is finished.
        """
        for _ in range(3):  # an ffmpeg whose process was killed may write a file yet before it sees that
            self._clear()
            (self.path / "lock").unlink(missing_ok=True)
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                kept = error
        log.warning("%s stays: %s", self.path, kept.strerror)  # the rest of its files are somebody else's

    def _clear(self) -> None:
        self._steps.settle()
        for pattern in ("*.safetensors", "frames.*", ".wan_mlx-*", "run.json"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def _last_step(self) -> tuple[int, dict[str, mx.array], dict[str, Any]]:
        """How many steps are done, the state after them, and the notes."""
        for path in reversed(self._steps_kept()):
            try:
                state, metadata = _load(path)
            except WanError as error:  # cannot be by our own doing, but the step before it is as good
                log.warning("%s", error)
                continue
            return _count_of(path), state, json.loads(metadata["notes"])
        return 0, {}, {}

    def _step_path(self, count: int) -> Path:
        return self.path / f"step-{count:04d}.safetensors"

    def _steps_kept(self) -> list[Path]:
        self._steps.settle()
        return self._step_files()

    def _step_files(self) -> list[Path]:
        return sorted(self.path.glob("step-*.safetensors"), key=_count_of)

    def _keep_step(self, path: Path, state: dict[str, mx.array], metadata: dict[str, str]) -> None:
        with storage.whole_file(path) as temporary:
            mx.save_safetensors(str(temporary), state, metadata)
        state.clear()
        for old in self._step_files()[:-KEPT_STEPS]:
            old.unlink()


class FrameStore:
    """Frames uint8 (n, height, width, 3) that outlive the process, in chunks as they were decoded.

    Attributes:
        count: how many there are.
    """

    def __init__(self, folder: Path, height: int, width: int):
        self.raw, self.index = folder / "frames.raw", folder / "frames.index"
        self.shape = (height, width, 3)
        self._chunks: list[int] = []
        self._drop_damage()

    @property
    def count(self) -> int:
        return sum(self._chunks)

    def add(self, frames: np.ndarray) -> None:
        """Append frames, uint8 (n, height, width, 3); they are on the disk when this returns."""
        data = np.ascontiguousarray(frames).data.cast("B")
        storage.append(self.raw, data)
        storage.append(self.index, f"{len(frames)} {zlib.crc32(data):08x}\n".encode())
        self._chunks.append(len(frames))

    def chunks(self, first: int = 0) -> Iterator[np.ndarray]:
        """The chunks from number ``first`` on, uint8 (n, height, width, 3)."""
        if first >= len(self._chunks):
            return
        with self.raw.open("rb") as file:
            file.seek(sum(self._chunks[:first]) * int(np.prod(self.shape)))
            for count in self._chunks[first:]:
                shape = (count, *self.shape)
                yield np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape)

    def clear(self) -> None:
        """Forget all frames."""
        self.index.unlink(missing_ok=True)
        self.raw.unlink(missing_ok=True)
        self._chunks = []

    def _drop_damage(self) -> None:
        """Keep the chunks up to the first whose line or pixels are not whole."""
        frame_bytes, good_bytes, good_text = int(np.prod(self.shape)), 0, ""
        if self.raw.is_file():
            with self.raw.open("rb") as file:
                for line in _read_text(self.index).splitlines(keepends=True):
                    count, _, check = line.partition(" ")
                    if not (line.endswith("\n") and count.isdigit()):
                        break
                    data = file.read(int(count) * frame_bytes)
                    if len(data) != int(count) * frame_bytes or f"{zlib.crc32(data):08x}" != check.strip():
                        break
                    self._chunks.append(int(count))
                    good_bytes, good_text = good_bytes + len(data), good_text + line
        if not self._chunks:
            self.clear()
        else:
            os.truncate(self.raw, good_bytes)
            os.truncate(self.index, len(good_text))


def _acquire(path: Path) -> int | None:
    """Lock the file and return its descriptor, or None if it was deleted meanwhile: try again.

    Raises:
        BlockingIOError: another process holds it.
    """
    import fcntl

    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): take care that no other run makes the same file", path, error)
        if not path.exists() or not os.path.samestat(os.fstat(lock), os.stat(path)):
            os.close(lock)
            return None
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()}\n".encode())
        return lock
    except BaseException:
        os.close(lock)
        raise


def _count_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        arrays, metadata = load_arrays(path)
        mx.eval(arrays)  # the file may go
    except RuntimeError as error:
        raise WanError(f"{path} is damaged ({error}); start anew with --overwrite") from error
    return arrays, metadata


@lru_cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "wan_mlx-steps")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
