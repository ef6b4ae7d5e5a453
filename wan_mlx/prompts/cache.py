"""Prompt cache: encoded prompts on disk, so that none is encoded twice and umT5's 11 GB stay unread.

A hit is bit for bit the encoder's result: the key holds everything that the result depends on, and a check sum guards
the file. Only a hash of the prompt is written, never its text. Errors here never stop a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import WanError
from ..files.safetensors import load_arrays
from ..planning.machine import mlx_version
from ..storage import cache_folder, digest, fingerprint, whole_file

if TYPE_CHECKING:
    from ..weights.parts import Checkpoint

log = logging.getLogger(__name__)

FORMAT = 3  # of the files; files with another number are ignored
MOST_ENTRIES = 200
MOST_BYTES = 256 * 2**20
ENDING = ".safetensors"


class PromptCache:
    """Embeddings (L, text_dim) of texts, as one model's encoder computes them on this machine's backend.

    Args:
        files: of the encoder and the tokenizer.
        settings: everything else that the embeddings depend on; must be JSON.
    """

    def __init__(self, files: Sequence[Path], settings: Mapping[str, Any]):
        self.said = False
        backend = [mlx_version(), str(mx.default_device().type), sys.platform]
        self.identity: list[Any] | None = None
        try:
            self.folder = cache_folder() / "prompts"
            self.identity = [FORMAT, backend, dict(settings), [fingerprint(file) for file in files]]
        except (OSError, ValueError, KeyError) as error:  # opening the file reports the error
            self._complain(error)

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str, quantize: str | None) -> PromptCache:
        """The cache of a checkpoint's text encoder, loaded in this dtype and quantisation."""
        encoder = checkpoint.part("text_encoder")
        settings = {"dtype": str(dtype), "quantize": quantize, "config": encoder.config}
        return cls([encoder.file, checkpoint.part("tokenizer").file], settings)

    def get(self, text: str) -> mx.array | None:
        """The embedding of a text; None if it is missing or damaged."""
        if self.identity is None:
            return None
        path = self._path(text)
        try:
            if not path.is_file():
                return None
            arrays, metadata = load_arrays(path)
            embedding = arrays["embedding"]
            mx.eval(embedding)
            whole = metadata.get("sha256") == digest(arrays) and _is_finite(embedding)
        except (OSError, ValueError, KeyError, RuntimeError, WanError):
            whole = False
        with suppress(OSError):  # a folder that may only be read
            if whole:
                os.utime(path)  # the least recently used are dropped first
            else:
                path.unlink(missing_ok=True)
        return embedding if whole else None

    def put(self, text: str, embedding: mx.array) -> None:
        """Store the embedding of a text, if it is finite; beyond the limit, drop the least recently used."""
        if self.identity is None or not _is_finite(embedding):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            arrays = {"embedding": mx.contiguous(embedding)}
            mx.eval(arrays)
            with whole_file(self._path(text)) as path:
                mx.save_safetensors(str(path), arrays, {"sha256": digest(arrays)})
            self._trim()
        except (OSError, WanError) as error:
            self._complain(error)

    def _path(self, text: str) -> Path:
        key = json.dumps([self.identity, text], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{ENDING}"

    def _trim(self) -> None:
        entries = []
        for path in self.folder.glob(f"*{ENDING}"):
            try:
                stat = path.stat()
            except OSError:  # another process drops entries too
                continue
            entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = 0
        for place, (_, size, path) in enumerate(sorted(entries, reverse=True)):
            total += size
            if place >= MOST_ENTRIES or total > MOST_BYTES:
                path.unlink(missing_ok=True)

    def _complain(self, error: Exception) -> None:
        if not self.said:
            self.said = True
            log.warning("encoded prompts are not kept: %s", error)


def _is_finite(embedding: mx.array) -> bool:
    """Not so of a damaged encoder, which may be mended in place and keep its size and time."""
    return bool(mx.isfinite(embedding).all())
