"""Names of models, and downloads from a hub on loopback: only what is needed, resumed, checked, explained in a line."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, serving
from huggingface_hub import constants

from wan_mlx import storage as disk
from wan_mlx.errors import Stopped, WeightsError, install_command
from wan_mlx.hub import download, modelscope
from wan_mlx.hub.names import Location, parse_location
from wan_mlx.hub.resolve import Places, cached, is_cached, preset_of, resolve, survey
from wan_mlx.presets import COMFYUI_PARTS, PRESETS
from wan_mlx.weights.lora import normalise_loras

REPO = "Wan-AI/Wan2.1-T2V-1.3B"
BIG = "models_t5_umt5-xxl-enc-bf16.pth"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


def content(seed: int, size: int) -> bytes:
    return bytes((seed * 7 + i * 31) % 251 for i in range(size))


def index_of(*shards) -> bytes:
    return json.dumps({"weight_map": {f"tensor {i}": shard for i, shard in enumerate(shards)}}).encode()


# Names as published; what is not needed is marked.
OFFICIAL = {
    "config.json": True,
    "diffusion_pytorch_model.safetensors.index.json": True,
    SHARD: True,
    "diffusion_pytorch_model-00002-of-00002.safetensors": True,
    BIG: True,
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": True,
    "Wan2.1_VAE.pth": True,
    "google/umt5-xxl/spiece.model": True,
    "google/umt5-xxl/tokenizer.json": False,
    "xlm-roberta-large/sentencepiece.bpe.model": False,
    "assets/video_demo.mp4": False,
    "examples/i2v_input.JPG": False,
    "other-00001-of-00002.safetensors": False,
    "README.md": False,
}
DIFFUSERS = {
    "model_index.json": True,
    "transformer/config.json": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": True,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": True,
    "text_encoder/config.json": True,
    "text_encoder/model.safetensors": True,
    "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True,
    "tokenizer/spiece.model": True,
    "tokenizer/tokenizer.json": False,
    "scheduler/scheduler_config.json": False,
    "README.md": False,
}
MLX = {
    "config.json": True,
    "transformer.safetensors.index.json": True,
    "transformer-00001-of-00002.safetensors": True,
    "transformer-00002-of-00002.safetensors": True,
    "text_encoder.safetensors": True,
    "vae.safetensors": True,
    "tokenizer.model": True,
    "README.md": False,
}
GGUF = {"wan2.1-t2v-14b-Q4_K_M.gguf": True, "wan2.1-t2v-14b-Q8_0.gguf": False, "README.md": False}


def files_of(published):
    files = {path: content(i + 1, 1000 + 37 * i) for i, path in enumerate(published)}
    for path in files:
        if path.endswith(".index.json"):
            stem = path.removesuffix(".safetensors.index.json")
            files[path] = index_of(*(Path(f"{stem}-{i:05d}-of-00002.safetensors").name for i in (1, 2)))
    return files


SIZE = f"{sum(len(data) for path, data in files_of(OFFICIAL).items() if OFFICIAL[path]) / 1e3:.1f} KB"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub, and an empty cache."""
    repos = {
        REPO: files_of(OFFICIAL),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": files_of(DIFFUSERS),
        "someone/mlx": files_of(MLX),
        "city96/Wan2.1-T2V-14B-gguf": files_of(GGUF),
    }
    with serving(repos, monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def one_file(server):
    """A repository of which one file of 3 MB is fetched, in pieces of 64 KB."""
    server.repos["a/b"] = {"big.gguf": content(5, 251) * 12000}
    return "a/b:big.gguf"


def written(folder: Path) -> dict:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "name, repo, published",
    [
        (REPO, REPO, OFFICIAL),
        ("t2v-1.3B", REPO, OFFICIAL),
        (f"{REPO}@{COMMIT}", REPO, OFFICIAL),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", DIFFUSERS),
        ("someone/mlx", "someone/mlx", MLX),
    ],
)
def test_only_needed_files_are_downloaded(server, name, repo, published):
    folder = resolve(name)
    assert set(server.got()) == {path for path, needed in published.items() if needed}
    assert set(server.got().values()) == {1}
    assert written(folder) == {path: server.repos[repo][path] for path, needed in published.items() if needed}
    server.requests.clear()
    assert resolve(name) == folder and not server.got(), "a second time nothing is fetched"


@pytest.mark.parametrize(
    "name",
    [
        "city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M.gguf",
        "city96/Wan2.1-T2V-14B-gguf@main:wan2.1-t2v-14b-Q4_K_M.gguf",
        "https://huggingface.co/city96/Wan2.1-T2V-14B-gguf/resolve/main/wan2.1-t2v-14b-Q4_K_M.gguf?download=true",
        "https://huggingface.co/city96/Wan2.1-T2V-14B-gguf/blob/main/wan2.1-t2v-14b-Q4_K_M.gguf",
    ],
)
def test_one_file_of_a_repository(server, name):
    path = resolve(name)
    assert path.name == "wan2.1-t2v-14b-Q4_K_M.gguf"
    assert path.read_bytes() == server.repos["city96/Wan2.1-T2V-14B-gguf"][path.name]
    assert set(server.got()) == {path.name} and preset_of(name).name == "t2v-14B"


def test_parts_given_apart_are_not_fetched_twice(server, tmp_path):
    """A model of one repository, its text encoder from another, its VAE from this machine, a LoRA from a third."""
    vae = tmp_path / "vae.safetensors"
    vae.write_bytes(b"here")
    server.repos["a/loras"] = {"style.safetensors": b"low rank", "other.safetensors": b"no"}
    loras = [(Path("a/loras:style.safetensors"), 0.8), (vae, 0.5)]
    places = Places(REPO, {"text_encoder": "someone/mlx", "vae": vae}, loras)
    told = places.downloads()
    assert [str(download.location) for download in told] == [REPO, "someone/mlx", "a/loras:style.safetensors"]
    assert not server.got()
    here = places.fetch()
    assert here.parts["vae"] == vae and here.loras[1] == (vae, 0.5)
    assert here.loras[0][0].read_bytes() == b"low rank" and here.loras[0][1] == 0.8
    fetched = {path for path, needed in OFFICIAL.items() if needed} - {BIG, "Wan2.1_VAE.pth"}
    assert set(server.got()) == fetched | {"text_encoder.safetensors", "style.safetensors"}
    assert written(here.model).keys() == fetched
    assert written(here.parts["text_encoder"]).keys() == {"config.json", "text_encoder.safetensors"}
    assert sum(download.missing for download in places.downloads()) == 0


def test_loras_of_a_hub(server, monkeypatch):
    server.repos["a/loras"] = {"style.safetensors": b"low rank"}
    address = normalise_loras("https://huggingface.co/a/loras/resolve/main/style.safetensors:0.7")
    ((path, strength),) = Places("nano", loras=address).fetch().loras
    assert path.read_bytes() == b"low rank" and strength == 0.7
    server.repos["a/peft"] = {"x/adapter_model.safetensors": b"low rank", "x/adapter_config.json": b"{}"}
    ((path, _),) = Places("nano", loras=normalise_loras("a/peft:x/adapter_model.safetensors")).fetch().loras
    assert path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file()
    missing = [(Path("a/missing.safetensors"), 1.0)]
    assert Places("nano", loras=missing).fetch().loras == missing


def test_download_size_subtracts_cached_files(server):
    needed = {path: len(server.repos[REPO][path]) for path, wanted in OFFICIAL.items() if wanted}
    before = survey(REPO)
    assert (before.total, before.cached, before.missing) == (sum(needed.values()), 0, sum(needed.values()))
    assert survey("t2v-1.3B").total == before.total and not server.got()
    assert f"{REPO}: 8 files, {SIZE}; {SIZE} to fetch" in str(before)
    resolve(f"{REPO}:{BIG}")
    after = survey(REPO)
    assert (after.total, after.cached) == (before.total, needed[BIG])
    resolve(REPO)
    assert survey(REPO).missing == 0 and "nothing to fetch" in str(survey(REPO))


def test_models_on_this_machine_touch_no_network(server, tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    assert (resolve("nano") / "config.json").is_file() and is_cached("nano")
    assert resolve("./missing/folder") == Path("missing/folder") and resolve("missing") == Path("missing")
    assert survey("nano") == resolve("nano") and preset_of(str(tmp_path)) is None
    assert not server.requests


def test_a_cut_download_goes_on_where_it_was_cut(server, one_file, caplog):
    whole = server.repos["a/b"]["big.gguf"]
    server.cuts["big.gguf"] = [1_500_000, 700_000]
    assert resolve(one_file).read_bytes() == whole
    first, second, third = server.ranges("big.gguf")
    assert first is None and 0 < start_of(second) <= 1_500_000 < start_of(third) <= 2_200_000
    assert "cut off at" in caplog.text


def start_of(header):
    return int(header.removeprefix("bytes=").removesuffix("-"))


def test_an_interrupted_download_goes_on_in_the_next_run(server, one_file, monkeypatch):
    whole = server.repos["a/b"]["big.gguf"]
    server.cuts["big.gguf"] = [2_000_000, 0, 0, 0]
    with pytest.raises(WeightsError, match="cut off at .* what has arrived is kept"):
        resolve(one_file)
    kept = survey(one_file).cached
    assert 1_000_000 < kept <= 2_000_000
    server.cuts.clear()
    server.requests.clear()
    assert resolve(one_file).read_bytes() == whole
    assert server.ranges("big.gguf") == [f"bytes={kept}-"]


def test_ctrl_c_keeps_partial_downloads(server, one_file, monkeypatch):
    def interrupt(jobs, return_when):
        while not survey(one_file).cached:
            pass
        raise Stopped()

    with monkeypatch.context() as patch:
        patch.setattr(download, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            resolve(one_file)
    assert "what has arrived is kept" in stopped.value.go_on
    kept = survey(one_file).cached
    server.requests.clear()
    assert resolve(one_file).read_bytes() == server.repos["a/b"]["big.gguf"]
    assert kept and server.ranges("big.gguf") in ([f"bytes={kept}-"], [])


def test_a_server_without_ranges_sends_all_again(server, one_file):
    server.cuts["big.gguf"], server.ignore_range = [1_500_000], True
    assert resolve(one_file).read_bytes() == server.repos["a/b"]["big.gguf"]
    assert len(server.ranges("big.gguf")) == 2


def test_a_passing_failure_of_the_server_is_waited_out(server, one_file):
    server.failures = [503]
    assert resolve(one_file).is_file()


def test_damaged_bytes_are_not_kept(server, one_file):
    server.damage["big.gguf"] = bytes(len(server.repos["a/b"]["big.gguf"]))
    with pytest.raises(WeightsError, match="a/b: big.gguf arrived damaged: its hash is .* fetch it again"):
        resolve(one_file)
    assert survey(one_file).cached == 0 and not is_cached(one_file)
    server.damage = {"config.json": b"x" * len(server.repos[REPO]["config.json"])}  # git's hash, not SHA-256
    with pytest.raises(WeightsError, match="config.json arrived damaged"):
        resolve(REPO)
    server.damage.clear()
    assert resolve(one_file).is_file()


def test_a_wrong_size_is_an_error(server, one_file):
    size = len(server.repos["a/b"]["big.gguf"])
    server.sizes["big.gguf"] = size - 1
    with pytest.raises(WeightsError, match=f"big.gguf has {size - 1:,} bytes, expected {size:,}"):
        resolve(one_file)
    server.sizes.clear()
    server.damage["big.gguf"] = content(5, 251) * 12001
    with pytest.raises(WeightsError, match=f"sends more than the {size:,} bytes"):
        resolve(one_file)
    server.damage["big.gguf"] = content(5, 251) * 11000
    with pytest.raises(WeightsError, match="cut off at 2,761,000 bytes .the server ended early."):
        resolve(one_file)
    assert not is_cached(one_file)


@pytest.mark.parametrize("etag", ["../../outside", "", "..", "/etc/x"])
def test_no_file_is_written_outside_the_cache(server, one_file, etag, tmp_path):
    server.etags["big.gguf"] = etag
    with pytest.raises(WeightsError, match="answers with the ETag .* so it is no hub"):
        resolve(one_file)
    assert not any(file.is_file() and file.stat().st_size > 10_000 for file in tmp_path.rglob("*"))


def test_a_mirror_may_have_etags_of_its_own(server, one_file):
    server.etags["big.gguf"] = "mirror-7"
    assert resolve(one_file).read_bytes() == server.repos["a/b"]["big.gguf"]


@pytest.mark.parametrize("file", ["big.gguf", "small.json"])
def test_the_listed_hash_counts_whatever_the_etag_says(server, one_file, file):
    """SHA-256 of a large file, git's hash of a small one."""
    server.repos["a/b"]["small.json"] = b"{}" * 500
    server.etags[file] = "mirror-7"
    server.damage[file] = bytes(len(server.repos["a/b"][file]))
    with pytest.raises(WeightsError, match=f"a/b: {file} arrived damaged: its hash is .* fetch it again"):
        resolve(f"a/b:{file}")
    assert not is_cached(f"a/b:{file}")


def test_a_full_disk_is_reported_before_downloading(server, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5000))
    with pytest.raises(WeightsError, match=r"needs \d+.\d KB more in .*cache, which has 5.0 KB free; .*HF_HOME"):
        resolve(REPO)
    assert not server.got()


def test_a_full_disk_is_one_line(server, one_file, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda path, mode: Full(path, mode), raising=False)
        with pytest.raises(WeightsError, match="a/b: big.gguf: cannot be written .No space left on device.; what has"):
            resolve(one_file)
    assert resolve(one_file).is_file()


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda s: s.private.update({REPO: "hf_secret"}), "was not found on .*401.*check the name.*HF_TOKEN"),
        (lambda s: s.forbidden.add(REPO), "forbidden .*403.*token"),
        (lambda s: s.gated.add(REPO), "gated: accept its licence on http.*HF_TOKEN"),
        (lambda s: s.lost.add(BIG), "lacks .* a file that its listing names"),
        (lambda s: s.repos[REPO].pop(BIG), "no whole Wan model .official layout.: it lacks models_t5.*text_encoder"),
        (lambda s: s.repos.pop(REPO), "was not found on .*401."),
        (lambda s: s.close(), "out of reach"),
    ],
)
def test_download_errors_are_one_line(server, fault, message):
    fault(server)
    with pytest.raises(WeightsError, match=message) as error:
        resolve(REPO)
    assert "\n" not in str(error.value) and REPO in str(error.value)


def test_a_refused_token_is_reported(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(WeightsError, match="refuses your token .401.; give a token that may read it"):
        resolve(REPO)


def test_a_download_is_told(server, capsys):
    """Of each file, and how many of all bytes are here; in words where that takes a while."""
    resolve("someone/mlx")
    heard = []
    resolve(REPO, listener=heard.append)
    assert capsys.readouterr() == ("", "")
    said = [event.as_json() for event in heard]
    assert all(list(event) == ["event", "repo", "file", "bytes", "total"] for event in said)
    assert {event["event"] for event in said} == {"download"} and {event["repo"] for event in said} == {REPO}
    assert said[0]["bytes"] == 0 and said[-1]["bytes"] == said[-1]["total"] > 0
    assert len({event["file"] for event in said}) > 3
    assert all(event.name == f"fetching {REPO}" and event.unit == "B" for event in heard)


def test_a_token_is_sent(server, monkeypatch):
    server.private[REPO] = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve(REPO).is_dir()
    elsewhere = [headers for _, path, headers in server.requests if path.startswith("/cdn/")]
    assert elsewhere and not any("authorization" in headers for headers in elsewhere)


@pytest.mark.parametrize(
    "name, message",
    [
        ("city96/Wan2.1-T2V-14B-gguf", "give one of its files, as city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M"),
        ("city96/Wan2.1-T2V-14B-gguf:wan.gguf", "holds no file wan.gguf; .*wan2.1-t2v-14b-Q8_0.gguf"),
        (f"{REPO}@v9", "has no revision v9"),
    ],
)
def test_missing_names_on_a_hub_list_the_present_ones(server, name, message):
    with pytest.raises(WeightsError, match=message):
        resolve(name)


def test_offline_takes_the_cache_or_says_so(server, monkeypatch):
    folder = resolve(REPO)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert resolve(REPO) == folder and cached("t2v-1.3B") == folder and is_cached(REPO)
    with pytest.raises(WeightsError, match="someone/mlx .*not whole in the cache .*HF_HUB_OFFLINE is set"):
        resolve("someone/mlx")
    assert not server.requests


def test_out_of_reach_takes_a_whole_cache_only(server, caplog):
    server.lost.add(BIG)
    with pytest.raises(WeightsError):
        resolve(REPO)
    server.lost.clear()
    assert not is_cached(REPO)
    folder = resolve(REPO)
    server.close()
    huggingface_hub.close_session()
    assert resolve(REPO) == folder and "out of reach" in caplog.text
    (folder / SHARD).unlink()
    assert not is_cached(REPO)


def test_environment_and_command_line(server, tmp_path):
    """HF_ENDPOINT and HF_HOME as a shell sets them; --dry-run tells the size and fetches nothing."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    command = [sys.executable, "-m", "wan_mlx.generate", "--model", REPO, "--prompt", "a cat", "--dry-run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert f"download  {REPO}: 8 files, {SIZE}; {SIZE} to fetch" in run.stderr and not server.got()
    (listing,) = [headers for _, path, headers in server.requests if path.startswith("/api/models/")]
    assert listing["authorization"] == "Bearer hf_x" and "wan_mlx" in listing["user-agent"]
    assert not list((tmp_path / "home").rglob("*.pth"))


@pytest.mark.parametrize(
    "name, location",
    [
        ("owner/name", Location("owner/name")),
        ("owner/name@v1.0:a/b.gguf", Location("owner/name", "a/b.gguf", "v1.0")),
        ("https://huggingface.co/owner/name", Location("owner/name")),
        ("https://huggingface.co/owner/name/tree/main", Location("owner/name", None, "main")),
        ("./owner/name", None),
        ("/owner/name", None),
        ("owner/name:../b.gguf", None),
        ("owner/name:/etc/passwd", None),
        ("owner/name/more", None),
        ("../name", None),
        ("name", None),
    ],
)
def test_names(name, location):
    assert parse_location(name) == location


@pytest.mark.parametrize("url", ["https://example.com/owner/name", "https://huggingface.co/a/b/tree/main/folder"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="owner/name|a/b:path"):
        resolve(url)


def test_presets_know_their_repositories():
    for preset in PRESETS.values():
        if not preset.repo:
            continue
        for name in filter(None, (preset.repo, preset.diffusers, preset.comfyui, preset.name)):
            assert preset_of(preset.comfyui_file if name == preset.comfyui else name) is preset
    assert all(parse_location(part).file for part in COMFYUI_PARTS.values())
    assert preset_of("someone/else") is None


@pytest.fixture
def fake_modelscope(monkeypatch, tmp_path):
    """The package's two functions that are used, as modelscope 1.40 has them."""
    files, calls = files_of(OFFICIAL), []

    class HubApi:
        def get_model_files(self, model_id, revision=None, root=None, recursive=True):
            assert recursive
            return [{"Path": path, "Size": len(data)} for path, data in files.items()] + [
                {"Path": "google", "Size": 0, "Type": "tree"}
            ]

    def snapshot_download(model_id, revision=None, allow_patterns=None):
        calls.append((model_id, set(allow_patterns)))
        for path in allow_patterns:
            (tmp_path / "ms" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "ms" / path).write_bytes(files[path])
        return str(tmp_path / "ms")

    package = types.ModuleType("modelscope")
    package.snapshot_download, package.calls, package.files = snapshot_download, calls, files
    api = types.ModuleType("modelscope.hub.api")
    api.HubApi = HubApi
    for name, module in (("modelscope", package), ("modelscope.hub", types.ModuleType("hub")), (api.__name__, api)):
        monkeypatch.setitem(sys.modules, name, module)
    return package


def test_modelscope(fake_modelscope, tmp_path, monkeypatch):
    needed = {path for path, wanted in OFFICIAL.items() if wanted}
    assert survey(REPO, "modelscope").total == sum(len(fake_modelscope.files[path]) for path in needed)
    assert resolve(REPO, "modelscope") == tmp_path / "ms" and fake_modelscope.calls == [(REPO, needed)]
    assert resolve(f"{REPO}:{BIG}", "modelscope") == tmp_path / "ms" / BIG
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5000))
    with pytest.raises(WeightsError, match="5.0 KB free; .*MODELSCOPE_CACHE"):
        resolve(REPO, "modelscope")
    monkeypatch.undo()


def test_modelscope_wrong_size(fake_modelscope, monkeypatch):
    listed = survey(REPO, "modelscope")
    fake_modelscope.files[BIG] += b"x"
    with pytest.raises(WeightsError, match=f"{BIG} has .* bytes, expected"):
        modelscope.fetch(REPO, None, listed.files)


def test_modelscope_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(WeightsError, match=re.escape(f"its package: {install_command('modelscope')}")):
        resolve(REPO, "modelscope")


def test_unknown_source():
    with pytest.raises(ValueError, match="source is 'ftp', expected huggingface or modelscope"):
        resolve(REPO, "ftp")
