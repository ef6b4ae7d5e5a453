"""Names of models: bundled, a folder here, or a repository on the hub, of which only what is needed is fetched."""

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from wan_mlx.types import WeightsError
from wan_mlx.weights.hub import resolve

PUBLISHED = {
    "config.json": True,
    "diffusion_pytorch_model-00001-of-00006.safetensors": True,
    "diffusion_pytorch_model.safetensors.index.json": True,
    "models_t5_umt5-xxl-enc-bf16.pth": True,
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": True,
    "Wan2.1_VAE.pth": True,
    "google/umt5-xxl/spiece.model": True,
    "transformer/config.json": True,
    "tokenizer/spiece.model": True,
    "assets/video_demo.mp4": False,
    "README.md": False,
    "xlm-roberta-large/sentencepiece.bpe.model": False,
}


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Calls of the hub's downloader, which is not reached."""
    calls = []

    def snapshot_download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_folders_and_the_bundled_model_are_not_fetched(fetched, tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    assert (resolve("nano") / "config.json").is_file()
    assert resolve("./missing/folder") == Path("missing/folder") and resolve("missing") == Path("missing")
    assert not fetched


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B", "t2v-1.3B"])
def test_repositories_are_fetched_in_part(fetched, name):
    resolve(name)
    ((repo, patterns),) = fetched
    assert repo == "Wan-AI/Wan2.1-T2V-1.3B"
    assert {file: any(fnmatch(file, pattern) for pattern in patterns) for file in PUBLISHED} == PUBLISHED


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot_download(repo, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match="Wan-AI/Wan2.1-T2V-1.3B .*no route to host"):
        resolve("Wan-AI/Wan2.1-T2V-1.3B")
