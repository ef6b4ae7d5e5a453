"""A run's folder: checkpoints beside its output, from which it goes on after Ctrl-C, kill -9 or a power cut.

Beside ``cat.mp4`` there is ``cat.mp4.wan`` until the video is complete:

    lock                      held by the process at work; the system frees it when that dies
    run.json                  the run's drawn id, request, model, settings to embed, fingerprints of weights and
                              sources; then whether the latents stopped being finite, and SHA-256 of the finished video
    conditioning.safetensors  texts, images and sources as encoded, and the noise: so no encoder is loaded again
    step-0012.safetensors     `Step.state` after step 12; the last two are kept
    frames.raw, frames.index  decoded frames uint8, and a line per latent frame: how many, their CRC-32, the run's id

All but the frames appear whole: written under another name, flushed to the disk, renamed; in another thread, while the
run goes on. The frames grow, each flushed before its line in the index. The state of the VAE is not kept: it is
gigabytes for a minute of an hour's run, so a decode that was cut starts again from the latents, and frames
that are here already are not written again.

Nothing is taken on trust. run.json holds its own digest; conditioning and steps hold the run's id, their own name, the
digest of run.json and one over their arrays. So a file that is damaged, edited, renamed or of another run is refused;
of a step, the one before is taken, and it is made again. Links are refused, and a folder that no run has made; only
files that a run of this id writes are deleted. Nobody else may read them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import cuda, storage
from ..errors import BusyError, WanError, is_out_of_memory, some
from ..files.safetensors import load_arrays
from ..storage import parse_json
from ..types import Conditioning, RunState, Step

log = logging.getLogger(__name__)

ENDING = ".wan"
KEPT_STEPS = 2
LARGE_STATE = 300_000_000  # bytes; with a step cache it is gigabytes
MOST_STEPS = 10_000
PRIVATE = 0o600


class Behind:
    """Calls that a thread makes while the run goes on, one at a time."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._last: Future | None = None

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Make another call once the last is done; raises its exception."""
        self.settle()
        self._last = self._thread.submit(function, *arguments)

    def settle(self) -> None:
        """Wait until the last call is done; raises its exception, once."""
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
        ValueError: on entering: no folder can be made there, or the folder there is not ours.
        WanError: on entering: its record is damaged.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ENDING)
        self._lock: int | None = None
        self._record: dict[str, Any] | None = None
        self._is_checked = False  # whether the last step that is kept is known to be whole
        self._saving = Behind(_writer())

    def __enter__(self) -> RunFolder:
        while self._lock is None:
            try:
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._check_ours()
                self._lock = _acquire(self.path / "lock")
            except BlockingIOError:
                who = _read_text(self.path / "lock").strip()
                raise BusyError(f"another process{f' ({who})' if who else ''} is making {self.output}") from None
            except OSError as error:
                raise ValueError(f"the run's folder {self.path} cannot be made: {error.strerror}") from error
        self._record = None  # which whoever held it may have changed
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._saving.settle()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _check_ours(self) -> None:
        """Refuse links, and a folder that no run has made, before anything in it is read, changed or deleted."""
        another = "remove it, or choose another --output"
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link, expected the folder of a run; {another}")
        try:
            with os.scandir(self.path) as found:
                entries = list(found)
        except FileNotFoundError:  # the run that was there has just ended
            return
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{entry.path} is a link or a folder, expected a file of a run; {another}")
        names = {entry.name for entry in entries}
        others = sorted(name for name in names if name != "lock" and not name.startswith("."))
        if others and "run.json" not in names:  # which is the first to come and the last to go
            raise ValueError(f"{self.path} holds {some(others)}, but no run.json: no run has made it; {another}")
        self.record()

    # Identity

    def begin(self, record: Mapping[str, Any]) -> None:
        """Start anew: drop the files of an earlier run, and write this one's record.

        Args:
            record: anything JSON can hold; its ``steps`` says how many there will be.
        """
        self._clear()
        self._note({**record, "run": secrets.token_hex(16), "before": []})

    def amend(self, **changes: Any) -> None:
        """Add to the record; files kept before stay valid."""
        record = self._begun()
        self._note({**record, **changes, "before": [*record["before"], record["digest"]]})

    def record(self) -> dict[str, Any] | None:
        """The record that `begin` noted; None if no run has begun here.

        Raises:
            WanError: the file is damaged, or of an earlier version of wan_mlx.
        """
        if self._record is None:
            self._record = self._read()
        return self._record

    def _begun(self) -> dict[str, Any]:
        record = self.record()
        if record is None:
            raise WanError(f"{self.path} holds no run.json; start anew")
        return record

    def _note(self, record: dict[str, Any]) -> None:
        with storage.whole_file(self.path / "run.json", PRIVATE) as path:
            path.write_text(json.dumps({**record, "digest": _digest(record)}, indent=1), encoding="utf-8")
        self._record = None

    def _read(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
            if "settings" in record and "run" not in record:
                raise WanError(
                    f"the run of {self.output} was begun by an earlier version of wan_mlx, whose records are "
                    f"different; go on with that version, or remove {self.path} to start anew"
                )
            steps, before = record.get("steps"), record.get("before")
            is_right = isinstance(before, list) and isinstance(steps, int) and 0 <= steps <= MOST_STEPS
            if not is_right or record.get("digest") != _digest(record):
                raise ValueError("it is not as it was written")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise WanError(f"{path} is damaged ({error}); remove {self.path} to start anew") from error
        return record

    # How far it has come

    def save_conditioning(self, conditioning: Conditioning, how: Mapping[str, Any] | None = None) -> None:
        """Keep the conditioning, and `RunState.how`; as `save_step`."""
        arrays = conditioning.arrays()
        values = {name: value for name, value in vars(conditioning).items() if name not in arrays and value is not None}
        self._save("conditioning", arrays, {"values": values, "how": how or {}})

    def save_step(self, step: Step, notes: Mapping[str, Any] | None = None) -> None:
        """Keep the step's state, with ``notes`` that JSON can hold, and drop those before the last but one.

        Another thread writes it, while the next step computes, unless it is so large that it had better be gone; what
        goes wrong there is raised by whatever of this folder is used next.
        """
        self._save(_step_name(step.index + 1), step.state, notes or {})

    def _save(self, name: str, arrays: Mapping[str, mx.array], about: Mapping[str, Any]) -> None:
        self._saving.settle()
        large = sum(array.nbytes for array in arrays.values()) > LARGE_STATE
        # On CUDA an array that the CPU reads moves away from the GPU, which still uses it: so the CPU reads copies.
        copied = cuda.in_use() and not large
        arrays = {key: mx.contiguous(array + 0 if copied else array) for key, array in arrays.items()}
        mx.eval(arrays)  # another thread cannot
        mx.synchronize()  # only now a failed command buffer is sure to show
        record = self._begun()
        metadata = {"run": record["run"], "record": record["digest"], "name": name, "about": json.dumps(about)}
        self._saving.call(self._write, name, arrays, metadata)
        if large:
            self._saving.settle()

    def _write(self, name: str, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        metadata["sha256"] = storage.digest(arrays, metadata)
        with storage.whole_file(self._file(name), PRIVATE) as temporary:
            mx.save_safetensors(str(temporary), arrays, metadata)
        arrays.clear()
        for count in self._kept()[:-KEPT_STEPS]:
            self._file(_step_name(count)).unlink()

    def _load(self, name: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """The arguments of `_save`.

        Raises:
            WanError: the file is not as it was written, or not of this run.
        """
        path, record = self._file(name), self._begun()
        try:
            arrays, metadata = load_arrays(path)
            mx.eval(arrays)  # the file may go
            if metadata.get("run") != record["run"]:
                fault = "is of another run"
            elif metadata.pop("sha256", None) != storage.digest(arrays, metadata):
                fault = "is damaged"
            elif metadata["name"] != name:
                fault = f"is a copy of {metadata['name']}.safetensors"
            elif metadata["record"] not in (record["digest"], *record["before"]):
                fault = "is of a run.json that has been changed since"
            else:
                return arrays, parse_json(metadata["about"])
        except (WanError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            fault = "is damaged"
        raise WanError(f"{path} {fault}")

    def state(self) -> RunState | None:
        """The state to resume from, as `WanPipeline.stages` takes it; None before anything is kept.

        Raises:
            WanError: the conditioning is damaged, or of another run.
        """
        if not self.is_unfinished:
            return None
        try:
            arrays, about = self._load("conditioning")
        except WanError as error:
            raise WanError(f"{error}; start anew with --overwrite") from error
        values: dict[str, Any] = {**arrays, **about["values"]}
        done, state, notes = self._last_step()
        return RunState(Conditioning(**values), done, state, about["how"], notes)

    def _last_step(self) -> tuple[int, dict[str, mx.array], dict[str, Any]]:
        """How many steps are done, the state after them, and the notes; a step that cannot be used is dropped."""
        self._saving.settle()
        for count in reversed(self._kept()):
            try:
                state, notes = self._load(_step_name(count))
            except FileNotFoundError:
                continue
            except WanError as error:
                log.warning("%s; that step is made again", error)
                self._file(_step_name(count)).unlink()
                continue
            self._is_checked = True
            return count, state, notes
        return 0, {}, {}

    @property
    def has_begun(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def is_unfinished(self) -> bool:
        """Whether there is something to go on with: at least the conditioning."""
        self._saving.settle()
        return self.has_begun and self._file("conditioning").exists()

    @property
    def is_sampled(self) -> bool:
        """Whether all steps and the conditioning are kept."""
        return self.is_unfinished and self.steps_done == self._begun()["steps"]

    @property
    def size(self) -> int:
        """Bytes in it."""
        self._saving.settle()
        return sum(path.stat().st_size for path in self.path.iterdir())

    @property
    def steps_done(self) -> int:
        """How many steps are kept; the last is looked into the first time."""
        self._saving.settle()
        if not self._is_checked:
            return self._last_step()[0]
        return max(self._kept(), default=0)

    @property
    def steps_kept(self) -> int:
        """As `steps_done`, but without a look into the last."""
        return max(self._kept(), default=0)

    # Frames

    def open_frames(self, height: int, width: int) -> FrameStore:
        """The decoded frames, uint8 (n, height, width, 3), to read and to add to."""
        return FrameStore(self.path, self._begun()["run"], height, width)

    # The end

    def mark_finished(self, video: Path) -> None:
        """Flush the finished video, and note its identity: it is about to be moved to its place."""
        storage.flush(video)
        self.amend(finished=storage.sha256(video))

    def is_finished(self) -> bool:
        """Whether the output is the video that this run made: it was cut only before its folder was gone."""
        known = (self.record() or {}).get("finished")
        return known is not None and self.output.is_file() and known == storage.sha256(self.output)

    def delete(self) -> None:
        """Remove the folder, last of all the record, which says whether the video is finished."""
        self._clear()
        (self.path / "lock").unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s stays: %s", self.path, error.strerror)  # the rest of its files are somebody else's

    def _clear(self) -> None:
        """Delete the files of the run that is recorded, and no others."""
        self._saving.settle()
        ours = [self._file(name) for name in ("conditioning", *map(_step_name, self._counts()))]
        ours += [self.path / "frames.raw", self.path / "frames.index", *self.path.glob(f"{storage.DRAWN}*")]
        for path in [*ours, self.path / "run.json"]:
            path.unlink(missing_ok=True)
        self._record, self._is_checked = None, False

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _counts(self) -> range:
        """The numbers that steps of this run have."""
        return range(1, (self.record() or {"steps": 0})["steps"] + 1)

    def _kept(self) -> list[int]:
        """The numbers of the steps that are kept, whole or not."""
        return [count for count in self._counts() if self._file(_step_name(count)).exists()]


class FrameStore:
    """Frames uint8 (n, height, width, 3) of a run that outlive the process, in chunks as they were decoded.

    Attributes:
        count: how many there are.
    """

    def __init__(self, folder: Path, run: str, height: int, width: int):
        self.raw, self.index = folder / "frames.raw", folder / "frames.index"
        self.run, self.shape, self._frame_bytes = run, (height, width, 3), height * width * 3
        self._chunks: list[int] = []
        self._drop_damage()

    @property
    def count(self) -> int:
        return sum(self._chunks)

    def add(self, frames: np.ndarray) -> None:
        """Append frames, uint8 (n, height, width, 3); they are on the disk when this returns."""
        if frames.dtype != np.uint8 or frames.shape[1:] != self.shape:
            raise WanError(f"frames are {frames.dtype} {frames.shape}, but the run makes uint8 {self.shape}")
        data = np.ascontiguousarray(frames).data.cast("B")
        storage.append(self.raw, data)
        storage.append(self.index, f"{len(frames)} {zlib.crc32(data):08x} {self.run}\n".encode())
        self._chunks.append(len(frames))

    def chunks(self, first: int = 0) -> Iterator[np.ndarray]:
        """The chunks from number ``first`` on, uint8 (n, height, width, 3)."""
        if first >= len(self._chunks):
            return
        with self.raw.open("rb") as file:
            file.seek(sum(self._chunks[:first]) * self._frame_bytes)
            for count in self._chunks[first:]:
                yield np.frombuffer(file.read(count * self._frame_bytes), np.uint8).reshape(count, *self.shape)

    def _drop_damage(self) -> None:
        """Keep the chunks up to the first whose line or pixels are not whole, or of another run."""
        good_bytes, good_text = 0, ""
        # A file that has another name, too, is somebody's, and not added to.
        if all(path.is_file() and path.stat().st_nlink == 1 for path in (self.raw, self.index)):
            with self.raw.open("rb") as file:
                for line in _read_text(self.index).splitlines(keepends=True):
                    said = re.fullmatch(rf"(\d{{1,9}}) ([0-9a-f]{{8}}) {self.run}\n", line, re.ASCII)
                    size = int(said[1]) * self._frame_bytes if said else 0
                    if not said or good_bytes + size > self.raw.stat().st_size:
                        break
                    if f"{zlib.crc32(file.read(size)):08x}" != said[2]:
                        break
                    self._chunks.append(int(said[1]))
                    good_bytes, good_text = good_bytes + size, good_text + line
        for path, size in ((self.raw, good_bytes), (self.index, len(good_text))):
            if self._chunks:
                os.truncate(path, size)
            else:
                path.unlink(missing_ok=True)


def _acquire(path: Path) -> int | None:
    """Lock the file and return its descriptor, or None if it was deleted meanwhile: try again.

    Raises:
        BlockingIOError: another process holds it.
        ValueError: it holds something else than a process's number.
    """
    import fcntl

    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, PRIVATE)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): take care that no other run makes the same file", path, error)
        if os.fstat(lock).st_nlink > 1:  # it has another name, too, so is somebody's
            path.unlink()
        if not path.exists() or not os.path.samestat(os.fstat(lock), os.stat(path)):
            os.close(lock)
            return None
        if not re.fullmatch(rb"(process \d*\n?)?\0*", os.pread(lock, 100, 0)):  # zeros after a power cut
            raise ValueError(f"{path} is no run's; remove it, or choose another --output")
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()}\n".encode())
        return lock
    except BaseException:
        os.close(lock)
        raise


def _step_name(count: int) -> str:
    return f"step-{count:04d}"


def _digest(record: Mapping[str, Any]) -> str:
    """Of all but the digest that it holds."""
    return storage.digest({}, {name: value for name, value in record.items() if name != "digest"})


@lru_cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "wan_mlx-steps")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
