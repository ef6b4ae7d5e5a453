"""What is given as a LoRA and is none is named from its header, with the option that takes it; where LoRAs may lie."""

import json
import shutil

import mlx.core as mx
import pytest
from crafted import header_only
from hub_server import serving
from test_info import described, nano_lora

from wan_mlx.cli.main import main
from wan_mlx.files.safetensors import SafetensorsFile
from wan_mlx.presets import BUNDLED, PRESETS
from wan_mlx.weights.configs import shapes_of

NANO, VACE = BUNDLED["nano"], PRESETS["vace-1.3B"].transformer


def module(folder):
    shapes = {name: shape for name, shape in shapes_of(VACE).items() if name.startswith("vace_")}
    shapes["vace_patch_embedding.weight"] = (VACE.dim, VACE.vace_in_dim, *VACE.patch_size)
    return header_only(folder / "module.safetensors", shapes)


def all_in_one(folder):
    keys = ("model.diffusion_model.blocks.0.self_attn.q.weight", "model.diffusion_model.patch_embedding.weight",
            "text_encoders.umt5xxl.transformer.shared.weight", "vae.decoder.middle.0.residual.0.gamma")  # fmt: skip
    return header_only(folder / "all.safetensors", dict.fromkeys(keys, (1,)))


def controlnet(folder):
    keys = ("controlnet_blocks.0.weight", "control_encoder.0.0.weight", "blocks.0.attn1.to_q.weight")
    return header_only(folder / "control.safetensors", dict.fromkeys(keys, (1,)))


WRONG = {
    "transformer": (lambda folder: NANO / "transformer.safetensors",
                    "no LoRA, but a whole transformer: give it as --model, or as --transformer beside one"),
    "text encoder": (lambda folder: NANO / "text_encoder.safetensors",
                     "no LoRA, but a text encoder: give it with --text-encoder, if it is not the model's own"),
    "VAE": (lambda folder: NANO / "vae.safetensors",
            "no LoRA, but a VAE: give it with --vae, if it is not the model's own"),
    "CLIP": (lambda folder: BUNDLED["nano-i2v"] / "image_encoder.safetensors",
             "no LoRA, but an image encoder: give it with --image-encoder, if it is not the model's own"),
    "VACE's module": (module, "no LoRA, but VACE's part of a transformer: give a text-to-video model, and this with "
                              "--vace-module"),
    "all in one": (all_in_one, "no LoRA, but a model in one file (transformer, text encoder, vae): give it as --model"),
    "ControlNet": (controlnet, "this is a ControlNet for Wan, which is not supported; of additions to a model only "
                               "LoRAs are supported"),
}  # fmt: skip


@pytest.fixture
def nothing_is_read(monkeypatch):
    """No tensor of a safetensors file."""
    monkeypatch.setattr(SafetensorsFile, "read", None)


def refused(capsys, *arguments, code=1):
    """The one line that a command ends with."""
    assert main([*map(str, arguments)]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ").strip()


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_named(kind, tmp_path, capsys, nothing_is_read):
    write, says = WRONG[kind]
    path = write(tmp_path)
    run = ["--model", "nano", "--prompt", "x", "--dry-run"]
    assert refused(capsys, *run, "--lora", path) == refused(capsys, *run, "--lora", f"{path}:0.5") == f"{path}: {says}"


def test_a_repository_s_name_lacks_the_file(capsys):
    says = refused(capsys, "--model", "nano", "--prompt", "x", "--lora", "owner/style:0.5", "--dry-run", code=2)
    assert says == "owner/style: no such file or folder; of a repository give one file: owner/style:NAME.safetensors"


def test_the_file_in_a_folder(tmp_path, capsys):
    folder = tmp_path / "trained"
    folder.mkdir()
    run = ["--model", "nano", "--prompt", "x", "--dry-run", "--lora", folder]
    assert refused(capsys, *run) == f"{folder}: a folder without a LoRA file; give the file itself"
    path, _ = nano_lora(folder)
    assert "LoRA of 4 tensors" in described(capsys, folder)
    shutil.copy(path, folder / "pytorch_lora_weights.safetensors")  # Diffusers' name comes first
    assert "pytorch_lora_weights.safetensors" in described(capsys, folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()
    shutil.copy(path, folder / "b.safetensors")
    assert refused(capsys, *run).endswith("a folder with 2 LoRA files (b.safetensors, red.safetensors); give the file "
                                          "itself")  # fmt: skip


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "style.pt"])
def test_a_pickled_file_in_a_folder(name, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path, _ = nano_lora(tmp_path)
    folder = tmp_path / "trained"
    folder.mkdir()
    state = {key: torch.tensor(array.tolist()) for key, array in mx.load(str(path)).items()}
    torch.save(state, folder / name)
    if name != "style.pt":
        torch.save({"state": torch.zeros(2)}, folder / "optimizer.bin")
    assert "LoRA of 4 tensors" in described(capsys, folder)


class TestInfo:
    def test_a_transformer_alone_is_enough(self, tmp_path, capsys):
        path, _ = nano_lora(tmp_path)
        whole = described(capsys, path, "--model", "nano")
        assert "% of the norm of what it changes" in whole
        folder = tmp_path / "transformer"
        folder.mkdir()
        for name in ("transformer.safetensors", "config.json"):
            shutil.copy(NANO / name, folder / name)
        assert described(capsys, path, "--model", folder) == whole
        assert described(capsys, path, "--model", folder / "transformer.safetensors") == whole

    def test_of_a_repository_only_the_transformer_is_fetched(self, tmp_path, capsys, monkeypatch):
        path, _ = nano_lora(tmp_path)
        whole = described(capsys, path, "--model", "nano")
        files = {file.name: file.read_bytes() for file in NANO.iterdir() if file.is_file()}
        with serving({"owner/model": files}, monkeypatch, tmp_path) as hub:
            assert described(capsys, path, "--model", "owner/model") == whole
            assert {*hub.got()} == {"transformer.safetensors", "config.json"}

    def test_a_lora_on_a_hub_is_fetched_and_no_model(self, tmp_path, capsys, monkeypatch):
        path, _ = nano_lora(tmp_path)
        config = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6})
        files = {"red.safetensors": path.read_bytes(), "vae.safetensors": (NANO / "vae.safetensors").read_bytes(),
                 "adapter_config.json": config.encode()}  # fmt: skip
        with serving({"owner/model": files}, monkeypatch, tmp_path) as hub:
            assert "LoRA of 4 tensors" in described(capsys, "owner/model:red.safetensors")
            said = described(capsys, "owner/model:vae.safetensors")
            assert said.startswith("not on this machine: owner/model:vae.safetensors: ")
            assert hub.ranges("vae.safetensors") == ["bytes=0-100000"]  # its header's
            assert main(["info", "owner/model:vae.safetensors", "--model", "nano"]) == 2
            said = capsys.readouterr().err
            assert said.startswith("error: --model goes with a LoRA, and owner/model:vae.safetensors is none")
