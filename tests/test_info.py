"""``wan-mlx info``: LoRAs, videos of ours and models, described from the files themselves."""

import json

import mlx.core as mx
import numpy as np
import pytest
from test_lora import random, save
from test_lora_kinds import loha, lokr, lora

from wan_mlx.cli.main import main
from wan_mlx.media.write import save_video
from wan_mlx.presets import BUNDLED, PRESETS
from wan_mlx.weights.component import open_component
from wan_mlx.weights.lora_changes import Hadamard, Kronecker, Product
from wan_mlx.weights.lora_info import inspect_lora, is_lora

METADATA = {
    "ss_network_dim": "3", "ss_network_alpha": "6", "ss_base_model_version": "wan2.1", "ss_steps": "900",
    "ss_network_module": "networks.lora_wan", "modelspec.title": "a\nred\x1b[31m circle", "trigger_word": "r3d",
    "ss_tag_frequency": json.dumps({"1_red": {"r3d, circle": 4, "blue ": 9}, "2": {"blue": 1}}),
}  # fmt: skip


def described(capsys, *arguments):
    assert main(["info", *map(str, arguments), "--quiet"]) == 0
    return capsys.readouterr().out


def rows(found):
    return {name.strip(): text for name, text in found.rows}


def nano_lora(folder, kind=lora, metadata=None):
    """A file for nano, of two matrices in each of two blocks, and what it adds by block."""
    rng, tensors, added = np.random.default_rng(4), {}, {}
    for block in (0, 5):
        for module, shape in (("self_attn.q", (256, 256)), ("ffn.0", (640, 256))):
            of_module, values = kind(rng, f"diffusion_model.blocks.{block}.{module}", shape)
            tensors |= of_module
            added[f"blocks.{block}", module] = values
    return save(folder / "red.safetensors", tensors, metadata), added


def test_a_lora_is_described(tmp_path, capsys):
    path, added = nano_lora(tmp_path, metadata=METADATA)
    said = described(capsys, path)
    wanted = "LoRA of 4 tensors|rank           3\n|alpha          6\n|scale          2 (alpha / rank)|12 (F32 12)"
    wanted += "|2 blocks, 0 to 5|ffn.0, self_attn.q|fits           nano, nano-i2v\n"
    wanted += "|networks.lora_wan|wan2.1|3, 6|900|r3d"
    for text in [*wanted.split("|"), "blue (10), r3d, circle (4)"]:
        assert text in said, text
    assert "a red [31m circle" in said and "\x1b" not in said and "distilled" not in said
    norm = np.sqrt(sum((values**2).sum() for (block, _), values in added.items() if block == "blocks.5"))
    assert f"blocks.5     {norm:.4g}" in said


@pytest.mark.parametrize("kind", [lora, loha, lokr])
def test_the_change_is_its_norm_or_a_ratio_to_the_model_s(tmp_path, capsys, kind):
    path, added = nano_lora(tmp_path, kind)
    base = open_component(BUNDLED["nano"] / "transformer.safetensors", "transformer")
    found = rows(inspect_lora(path))
    wanted = rows(inspect_lora(path, (base, PRESETS["nano"].transformer)))
    for block in ("blocks.0", "blocks.5"):
        of_block = {module: values for (of, module), values in added.items() if of == block}
        mine = [(values, base.read(f"{block}.{module}.weight")) for module, values in of_block.items()]
        norm = np.sqrt(sum((values**2).sum() for values, _ in mine))
        weights = np.sqrt(sum((np.array(array.astype(mx.float32)) ** 2).sum() for _, array in mine))
        assert found[block] == f"{norm:.4g}"
        assert abs(float(wanted[block].rstrip("%")) / (100 * norm / weights) - 1) < 2e-5
    assert described(capsys, path, "--model", "nano").splitlines() == [
        f"{name:<15}{text}" for name, text in inspect_lora(path, (base, PRESETS["nano"].transformer)).rows
    ]


def test_norms_of_factors_are_those_of_their_matrix():
    rng = np.random.default_rng(1)
    a, b, c, d = (mx.array(random(rng, *shape, scale=1)) for shape in ((40, 3), (3, 50), (40, 2), (2, 50)))
    for term in (Product(a, b), Hadamard(Product(a, b), Product(c, d)), Kronecker(c, d)):
        assert abs(term.norm().item() / np.linalg.norm(np.array(term.matrix())) - 1) < 1e-5
    both = Hadamard(Product(a, b), Product(c, d))
    assert np.abs(np.array(both.product().matrix() - both.matrix())).max() < 1e-4


def test_a_lora_of_no_released_model_says_why(tmp_path, capsys):
    path, _ = nano_lora(tmp_path, lambda rng, stem, shape: lora(rng, stem, (7, 9)))
    assert main(["info", str(path)]) == 1
    assert "fits           no released model: " in capsys.readouterr().out
    assert main(["info", str(path), "--model", "nano", "--quiet"]) == 1
    assert "do not fit blocks.0" in capsys.readouterr().err


def test_a_distilled_lora_is_recognised_by_its_name(tmp_path, capsys):
    path, _ = nano_lora(tmp_path)
    path = path.rename(tmp_path / "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors")
    assert "looks distilled: --recipe lightx2v-4step" in described(capsys, path)


def test_dora_and_whole_weights_need_the_model(tmp_path):
    path, _ = nano_lora(tmp_path)
    tensors = dict(mx.load(str(path)).items()) | {
        "diffusion_model.blocks.0.ffn.0.dora_scale": mx.ones((640, 1)),
        "diffusion_model.blocks.5.norm3.diff": mx.ones((256,)),
    }
    mx.save_safetensors(str(tmp_path / "d.safetensors"), tensors)
    found = rows(inspect_lora(tmp_path / "d.safetensors"))
    assert "without 1 tensor, whose change only --model tells" in found["change"]
    assert found["kind"] == "LoRA of 3 tensors, DoRA, LoRA of 1 tensor, difference of 1 tensor"


def test_a_lora_in_a_model_s_place_is_told_apart(tmp_path, capsys):
    for kind in (lora, loha, lokr):
        path, _ = nano_lora(tmp_path, kind)
        for arguments in (["inspect", str(path)], ["--model", "nano", "--transformer", str(path), "--prompt", "x"]):
            assert main(arguments) == 1
            assert f"{path}: a LoRA or another adapter, and no network: give it as --lora" in capsys.readouterr().err


def test_other_files(tmp_path, capsys):
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    save_video(tmp_path / "v.png", frames, fps=16, settings={"prompt": "猫\nx", "seed": 7, "steps": None})
    said = described(capsys, tmp_path / "v.png")
    assert "seed               7\n" in said and r"猫\nx" in said and "steps" not in said and "null" not in said
    said = described(capsys, "nano")
    assert "text to video, nano" in said and "missing" in said
    assert not is_lora(BUNDLED["nano"]) and not is_lora(tmp_path / "nowhere")
    assert main(["info", "nano", "--model", "nano"]) == 2
    assert "--model goes with a LoRA" in capsys.readouterr().err
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert main(["info", str(tmp_path / "x.png")]) == 2
    assert main(["info", str(tmp_path / "nowhere.safetensors")]) == 2
    capsys.readouterr()
    assert main(["info", "nowhere.mp4"]) == 2
    assert capsys.readouterr().err == "error: file nowhere.mp4 does not exist, expected a file\n"
