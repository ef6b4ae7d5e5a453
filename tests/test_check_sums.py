"""Check sums of a model's files: `inspect` compares all of them, a run each file once and after each change."""

import json
import os
import shutil
import threading
import zipfile

import pytest
import tiny_mlx_model
from crafted import write_pth

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.storage import sha256
from wan_mlx.weights import check_sums
from wan_mlx.weights.check_sums import check_once, faults_of
from wan_mlx.weights.inspect import inspect_source

FILES = ("transformer.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.model")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """An MLX folder with the SHA-256 of its files, as `convert` writes it."""
    folder = tiny_mlx_model.write(tmp_path_factory.mktemp("sums") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["files"] = {name: sha256(folder / name) for name in FILES}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose SHA-256 is computed."""
    names = []
    monkeypatch.setattr(check_sums, "sha256", lambda file, advance: names.append(file.name) or sha256(file, advance))
    return names


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def make(folder, **options):
    pipe = wan_mlx.WanPipeline.from_pretrained(folder, progress=False, **options)
    return pipe("a cat", width=32, height=32, num_frames=1, steps=1)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(folder, name):
    flip_last_bit(folder / name)
    with pytest.raises(WeightsError, match=f"{name} is not as it was converted: its SHA-256 begins with") as error:
        make(folder)
    assert "\n" not in str(error.value)
    found = inspect_source(folder)
    assert not found.is_sound and any(name in line and "SHA-256" in line for line in found.lines())


def test_a_run_compares_each_file_once_and_after_each_change(folder, read, cache_folder):
    make(folder)
    assert sorted(read) == sorted(FILES)
    make(folder)
    assert len(read) == len(FILES)
    os.utime(folder / FILES[0], (1, 1))
    make(folder)
    assert read[len(FILES) :] == [FILES[0]]
    assert inspect_source(folder).is_sound
    assert len(read) == 2 * len(FILES) + 1


def test_a_file_found_damaged_is_found_damaged_again(folder, cache_folder):
    flip_last_bit(folder / FILES[2])
    for _ in range(2):
        with pytest.raises(WeightsError, match="SHA-256"):
            make(folder)


@pytest.mark.parametrize("known", [None, b"[]", b"{", b"[" * 100_000])
def test_where_nothing_can_be_kept_every_run_compares(folder, read, tmp_path, known):
    """The cache folder cannot be made, or what is kept is damaged."""
    cache = tmp_path / "cache"
    if known is None:
        cache.write_text("no folder")
    for _ in range(2):
        if known is not None:
            cache.mkdir(exist_ok=True)
            (cache / check_sums.REMEMBERED).write_bytes(known)
        check_once([folder / "vae.safetensors"], cache)
    assert read == ["vae.safetensors"] * 2


def test_without_a_home_folder(folder, read, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("WAN_MLX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)
    for runs in (1, 2):
        make(folder, prompt_cache=False)
        assert len(read) == runs * len(FILES)


def test_a_sum_that_is_none_is_shown_in_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    config["files"][FILES[0]] = "no\nsum"
    (folder / "config.json").write_text(json.dumps(config))
    (fault,) = faults_of([folder / FILES[0]])
    assert r"'no\nsum'" in fault and "\n" not in fault


def test_shards_are_compared_one_by_one(folder):
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": FILES[0], "b": FILES[1]}}))
    flip_last_bit(folder / FILES[1])
    (fault,) = faults_of([index])
    assert FILES[1] in fault


def test_folders_without_sums_are_not_read(read):
    from wan_mlx.presets import BUNDLED

    assert faults_of([BUNDLED["nano"] / name for name in FILES]) == [] and read == []


@pytest.fixture
def slow(monkeypatch):
    """An event: until it is set, reading a file takes longer than the user's patience."""
    heard = threading.Event()
    monkeypatch.setattr(check_sums, "PATIENCE", 0.01)
    monkeypatch.setattr(check_sums, "sha256", lambda file, advance: heard.wait(60) and sha256(file, advance))
    return heard


def test_progress_is_told_of_what_takes_long(folder, slow):
    heard = []
    assert faults_of([folder / FILES[0]], lambda event: slow.set() or heard.append(event)) == []
    size = (folder / FILES[0]).stat().st_size
    assert (heard[0].name, heard[0].done, heard[0].total, heard[0].unit) == ("checking files", 0, size, "B")


def test_an_interrupted_check_ends_at_once(folder, slow):
    def interrupt(event):
        slow.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faults_of([folder / name for name in FILES], interrupt)


def test_the_crc_of_a_pth(tmp_path):
    path = write_pth(tmp_path / "x.pth", entries={"data/1": bytes(range(100))})
    assert faults_of([path]) == []
    data = path.read_bytes()
    path.write_bytes(data.replace(bytes(range(100)), bytes(99) + b"\1"))
    (fault,) = faults_of([path])
    assert "x.pth is damaged (Bad CRC-32 for file 'archive/data/1')" in fault
    assert check_once([path], None) is None  # a run does not read all of it for that


def test_compressed_entries_of_a_pth_are_not_unpacked(tmp_path, monkeypatch):
    path = write_pth(tmp_path / "x.pth", entries={"data/1": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("zipfile.ZipFile.open", None)
    assert faults_of([path]) == []
