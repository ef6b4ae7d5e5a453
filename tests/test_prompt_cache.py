"""Encoded prompts on disk: a hit is what would be computed, the encoder stays closed, and nothing here stops a run."""

import logging
import os
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx import model_choices, opened
from wan_mlx.cli.main import main
from wan_mlx.prompts import cache as prompt_cache
from wan_mlx.prompts.cache import ENDING, PromptCache
from wan_mlx.storage import cache_folder

TEXTS = ["a red circle", "a green square moves up on a black background"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, cache_folder):
    monkeypatch.setenv("WAN_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "encoder.safetensors"
    mx.save_safetensors(str(path), {"a": mx.arange(300_000)})  # larger than files whose every byte counts
    return path


def pipe(**options) -> wan_mlx.WanPipeline:
    return wan_mlx.WanPipeline.from_pretrained("nano", progress=False, **options)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.is_dir() else []


@pytest.fixture
def no_encoder(monkeypatch):
    """Opening the text encoder or the tokenizer is an error."""

    def refused(*args, **kwargs):
        raise AssertionError("the text encoder was opened")

    def forbid():
        monkeypatch.setattr(opened, "load_text_encoder", refused)
        monkeypatch.setattr(model_choices, "Tokenizer", refused)

    return forbid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_hit_is_bit_identical_to_encoding(folder, no_encoder, dtype):
    want = pipe(dtype=dtype, prompt_cache=False).encode_text(TEXTS)
    assert not entries(folder)
    first = pipe(dtype=dtype).encode_text(TEXTS)
    assert len(entries(folder)) == len(TEXTS)
    no_encoder()
    second = pipe(dtype=dtype).encode_text([*TEXTS, TEXTS[0]])
    for a, b, c in zip(want, first, second, strict=False):
        assert a.dtype == b.dtype == c.dtype and mx.array_equal(a, b) and mx.array_equal(a, c)
    assert mx.array_equal(second[2], second[0])


@pytest.mark.parametrize("option", [dict(dtype="bfloat16"), dict(quantize="q8")])
def test_another_dtype_or_quantisation_is_another_entry(folder, option):
    options = {"dtype": "float32"} | option
    pipe(dtype="float32").encode_text(TEXTS[:1])
    got = pipe(**options).encode_text(TEXTS[:1])[0]
    want = pipe(**options, prompt_cache=False).encode_text(TEXTS[:1])[0]
    assert len(entries(folder)) == 2 and got.dtype == want.dtype and mx.array_equal(got, want)


def test_only_the_text_that_is_new_is_encoded(monkeypatch):
    pipe().encode_text(TEXTS[:1])
    asked, tokenizer = [], model_choices.Tokenizer

    def recording(path):
        return lambda text, most: asked.append(text) or tokenizer(path)(text, most)

    monkeypatch.setattr(model_choices, "Tokenizer", recording)
    got = pipe().encode_text(TEXTS)
    assert asked == TEXTS[1:]
    assert all(mx.array_equal(a, b) for a, b in zip(got, pipe(prompt_cache=False).encode_text(TEXTS), strict=True))


def test_only_the_real_length_is_stored(folder):
    pipe().encode_text(TEXTS)
    shapes = sorted(mx.load(str(path))["embedding"].shape[0] for path in entries(folder))
    tokenizer = model_choices.Tokenizer(pipe().checkpoint.files["tokenizer"])
    assert shapes == sorted(len(tokenizer(text)) for text in TEXTS)


def test_off_reads_and_writes_nothing(folder, no_encoder):
    pipe(prompt_cache=False).encode_text(TEXTS)
    assert not folder.parent.exists()
    pipe().encode_text(TEXTS)
    no_encoder()
    with pytest.raises(AssertionError, match="was opened"):
        pipe(prompt_cache=False).encode_text(TEXTS)


@pytest.mark.parametrize("flags, count", [([], 1), (["--no-prompt-cache"], 0)])
def test_command_line(folder, tmp_path, flags, count):
    small = ["--size", "32x32", "--frames", "1", "--steps", "1", "--guidance", "1", "--quiet"]
    code = main(["--model", "nano", "--prompt", TEXTS[0], *small, "--output", str(tmp_path / "out.png"), *flags])
    assert code == 0 and len(entries(folder)) == count


class TestKey:
    """What an embedding depends on is in its key."""

    def stored(self, weights, settings=None, files=None, text="a cat"):
        cache = PromptCache(files or [weights], settings or {"dtype": "bfloat16"})
        return cache.get(text), cache

    @pytest.fixture(autouse=True)
    def put(self, weights):
        PromptCache([weights], {"dtype": "bfloat16"}).put("a cat", mx.ones((2, 3)))

    def test_same(self, weights):
        assert mx.array_equal(self.stored(weights)[0], mx.ones((2, 3)))

    @pytest.mark.parametrize("change", [dict(text="a dog"), dict(text="a  cat"), dict(settings={"dtype": "float32"})])
    def test_another_text_or_setting(self, weights, change):
        assert self.stored(weights, **change)[0] is None

    def test_another_file(self, weights):
        os.utime(weights, ns=(1, 1))
        assert self.stored(weights)[0] is None

    def test_another_content_of_the_same_size_and_time(self, weights):
        stat = weights.stat()
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert self.stored(weights)[0] is None

    def test_the_same_file_elsewhere(self, weights, tmp_path):
        moved = shutil.copy2(weights, tmp_path / "elsewhere")
        assert self.stored(weights, files=[Path(moved)])[0] is not None

    def test_shards_count(self, tmp_path, weights):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "encoder.safetensors"}}')
        PromptCache([index], {}).put("a cat", mx.ones((2, 3)))
        assert PromptCache([index], {}).get("a cat") is not None
        os.utime(weights, ns=(1, 1))
        assert PromptCache([index], {}).get("a cat") is None

    def test_another_version_of_mlx_or_device(self, weights, monkeypatch):
        monkeypatch.setattr(prompt_cache.mx, "__version__", "9.9")
        assert self.stored(weights)[0] is None


class TestBounds:
    def put(self, weights, count, rows=4):
        cache = PromptCache([weights], {})
        for index in range(count):
            cache.put(f"text {index}", mx.full((rows, 8), float(index)))
            os.utime(cache._path(f"text {index}"), ns=(index, index))
        return cache

    def test_the_least_recently_used_go_first(self, weights, folder, monkeypatch):
        monkeypatch.setattr(prompt_cache, "MOST_ENTRIES", 3)
        cache = self.put(weights, 3)
        assert cache.get("text 0") is not None  # used: now the newest
        cache.put("text 3", mx.ones((4, 8)))
        assert len(entries(folder)) == 3
        assert [cache.get(f"text {index}") is not None for index in range(4)] == [True, False, True, True]

    def test_bytes_are_bounded(self, weights, folder, monkeypatch):
        monkeypatch.setattr(prompt_cache, "MOST_BYTES", 50_000)
        self.put(weights, 10, rows=400)
        sizes = [path.stat().st_size for path in entries(folder)]
        assert len(sizes) == 3 and sum(sizes) <= 50_000


class TestNothingStopsARun:
    def complaints(self, caplog):
        return [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
    def test_a_damaged_entry_is_a_miss_and_goes(self, folder, weights, damage):
        cache = PromptCache([weights], {})
        cache.put("a cat", mx.ones((20, 30)))
        (path,) = entries(folder)
        data = bytearray(path.read_bytes())
        if damage == "other":
            mx.save_safetensors(str(path), {"something": mx.ones(3)})
        else:
            data[-5] ^= 4
            path.write_bytes({"cut": data[:-100], "flip": data, "empty": b""}[damage])
        assert cache.get("a cat") is None and not entries(folder)

    def test_a_folder_that_cannot_be_written(self, folder, caplog):
        folder.parent.mkdir()
        folder.write_text("not a folder")
        want = pipe(prompt_cache=False).encode_text(TEXTS)
        got = pipe().encode_text(TEXTS)
        assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))
        assert len(self.complaints(caplog)) == 1 and "not kept" in caplog.text

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_a_damaged_encoder_gives_is_not_kept(self, folder, weights, value, monkeypatch):
        cache, embedding = PromptCache([weights], {}), mx.array([[1.0, value]])
        cache.put("a cat", embedding)
        assert not entries(folder)
        with monkeypatch.context() as patch:  # as an earlier version did
            patch.setattr(prompt_cache, "_is_finite", lambda embedding: True)
            cache.put("a cat", embedding)
        assert len(entries(folder)) == 1 and cache.get("a cat") is None and not entries(folder)

    def test_a_folder_that_may_only_be_read(self, weights, monkeypatch):
        cache = PromptCache([weights], {})
        for text in ("a cat", "a dog"):
            cache.put(text, mx.ones((2, 3)))
        cache._path("a dog").write_bytes(b"damaged")

        def refused(*args, **options):
            raise PermissionError("not yours")

        monkeypatch.setattr(prompt_cache.os, "utime", refused)
        monkeypatch.setattr(Path, "unlink", refused)
        assert mx.array_equal(cache.get("a cat"), mx.ones((2, 3))) and cache.get("a dog") is None

    def test_files_that_are_not_there(self, tmp_path, caplog):
        cache = PromptCache([tmp_path / "missing"], {})
        cache.put("a cat", mx.ones((2, 3)))
        assert cache.get("a cat") is None and len(self.complaints(caplog)) == 1

    def test_no_temporary_file_is_left(self, folder, weights, monkeypatch, caplog):
        def full(*args):
            raise OSError("no space left on device")

        monkeypatch.setattr(prompt_cache.os, "replace", full)
        cache = PromptCache([weights], {})
        cache.put("a cat", mx.ones((2, 3)))
        cache.put("a dog", mx.ones((2, 3)))
        assert not entries(folder) and len(self.complaints(caplog)) == 1


def test_prompts_are_not_written(folder):
    pipe().encode_text(TEXTS)
    for path in entries(folder):
        assert b"circle" not in path.read_bytes() and "circle" not in path.name and path.name.endswith(ENDING)


def test_where_it_lies(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("WAN_MLX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "wan_mlx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library/Caches/wan_mlx"
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path.home() / ".cache/wan_mlx"


def test_a_whole_run_from_kept_prompts_is_the_same(monkeypatch):
    small = dict(width=32, height=32, num_frames=1, steps=1, seed=3)
    first = pipe()(TEXTS[0], **small)
    monkeypatch.setattr(opened, "load_text_encoder", None)
    assert np.array_equal(pipe()(TEXTS[0], **small).frames, first.frames)
