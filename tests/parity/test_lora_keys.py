"""Every matrix of every kind of model is found by the names that Diffusers' own modules give its LoRA."""

import json
import math
import re

import official_checkpoints as checkpoints
import pytest
import test_layouts
from diffusers.loaders import lora_conversion_utils
from oracles import diffusers_transformer

from wan_mlx.errors import WeightsError
from wan_mlx.presets import PRESETS
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.lora import open_loras, resolve, spellings
from wan_mlx.weights.lora_changes import kind_of


def matrices(kind):
    """Diffusers' module → our parameter, for all that have a matrix or a convolution."""
    state = diffusers_transformer(checkpoints.config(kind)).state_dict()
    ours = {key: name for name, key in canonical_keys(recognise(state), state).items()}
    return {
        key.removesuffix(".weight"): ours[key]
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.ndim > 1
    }, set(ours.values())


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_every_matrix_has_each_of_its_names(kind):
    modules, parameters = matrices(kind)
    names = spellings(parameters)
    for module, name in modules.items():
        official = name.removesuffix(".weight")
        for stem in (
            f"transformer.{module}", f"base_model.model.{module}", module,
            f"diffusion_model.{official}", f"pipe.dit.{official}", official,
            f"lora_unet_{module.replace('.', '_')}", f"lora_unet_{official.replace('.', '_')}",
            f"lora_unet__{official.replace('.', '_')}", f"lycoris_{official.replace('.', '_')}",
        ):  # fmt: skip
            assert resolve(f"{stem}.lora_A.weight", names) == (name, "down"), stem
            assert resolve(f"{stem}.lora_up.weight", names) == (name, "up"), stem
            assert resolve(f"{stem}.alpha", names) == (name, "alpha"), stem
            bias = f"{official}.bias"
            assert resolve(f"{stem}.diff_b", names) == ((bias, "diff") if bias in parameters else None), stem


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_diffusers_converter_means_the_same_modules(kind):
    """Diffusers turns ComfyUI's and musubi's keys into its own: both must lead to the parameter the original names."""
    import torch

    modules, parameters = matrices(kind)
    names = spellings(parameters)
    blocks = {name.removesuffix(".weight") for name in modules.values() if name.startswith("blocks.")}
    down, up = torch.zeros(4, 8), torch.zeros(8, 4)
    comfy, musubi = {}, {}
    for name in blocks:
        comfy |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
        joined = f"lora_unet_{name.replace('.', '_')}"
        musubi |= {f"{joined}.lora_down.weight": down, f"{joined}.lora_up.weight": up}
        musubi[f"{joined}.alpha"] = torch.ones(())
    for convert, keys in (
        (lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers, comfy),
        (lora_conversion_utils._convert_musubi_wan_lora_to_diffusers, musubi),
    ):
        ours = {resolve(key, names) for key in keys if not key.endswith("alpha")}
        assert ours == {resolve(key, names) for key in convert(dict(keys))} and None not in ours
        assert {name for name, _ in ours} == {f"{name}.weight" for name in blocks}


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_every_parameter_can_be_a_difference(kind):
    """As lightx2v's extractor names what it does not split in two factors."""
    parameters = matrices(kind)[1]
    names = spellings(parameters)
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    for name in parameters:
        stem, _, end = name.rpartition(".")
        key = f"{stem}.{endings[end]}" if end in endings else f"{name}.diff"
        assert resolve(f"diffusion_model.{key}", names) == (name, "diff"), key


def sparse(path, shapes, metadata):
    """A safetensors file of a full size that takes no room: the header, and a hole in place of the values."""
    header, end = {"__metadata__": metadata}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return path


# Kind → the ending of each tensor's name and its shape, for a matrix of (outputs, inputs).
TENSORS = {
    "LoHa": lambda o, i: {"hada_w1_a": (o, 4), "hada_w1_b": (4, i), "hada_w2_a": (o, 4), "hada_w2_b": (4, i)},
    "LoKr": lambda o, i: {"lokr_w1": (16, 16), "lokr_w2_a": (o // 16, 8), "lokr_w2_b": (8, i // 16)},
    "LoKr of two": lambda o, i: {"lokr_w1": (16, 16), "lokr_w2": (o // 16, i // 16)},
    "DoRA": lambda o, i: {"lora_down.weight": (8, i), "lora_up.weight": (o, 8), "dora_scale": (o, 1)},
    "DoRA of PEFT": lambda o, i: {"lora_A.weight": (8, i), "lora_B.weight": (o, 8), "lora_magnitude_vector": (o,)},
}
NAMES = {
    "musubi": lambda ours, theirs: "lora_unet_" + ours.replace(".", "_"),
    "LyCORIS": lambda ours, theirs: "lycoris_" + theirs.replace(".", "_"),
    "ComfyUI": lambda ours, theirs: f"diffusion_model.{ours}",
    "PEFT": lambda ours, theirs: f"base_model.model.{theirs}",
    "Diffusers": lambda ours, theirs: f"transformer.{theirs}",
}


@pytest.mark.parametrize("model", ["t2v-14B", "i2v-14B-480P"])
@pytest.mark.parametrize("tool", NAMES)
def test_full_size_files_open_strictly(model, tool, tmp_path):
    """Every matrix of the blocks has its change, each block's of another kind; one key more is an error."""
    config = PRESETS[model].transformer
    theirs = test_layouts.diffusers_shapes(config)
    ours = canonical_keys(recognise(theirs), theirs)
    matrix = re.compile(r"blocks\.(\d+)\.(?:\w+_attn\.[qkvo]\w*|ffn\.\d)\.weight")
    kinds = {name: [*TENSORS][int(match[1]) % 5] for name in ours if (match := matrix.fullmatch(name))}
    tensors = {}
    for name, kind in kinds.items():
        stem = NAMES[tool](name.removesuffix(".weight"), ours[name].removesuffix(".weight"))
        tensors |= {f"{stem}.{ending}": shape for ending, shape in TENSORS[kind](*theirs[ours[name]]).items()}
    said = json.dumps({"transformer.lora_alpha": 16, "transformer.r": 32, "transformer.use_dora": True})
    metadata = {"lora_adapter_metadata": said} if tool == "Diffusers" else {}
    found = open_loras([(sparse(tmp_path / "l.safetensors", tensors, metadata), 1.0)], config)
    assert found.keys() == kinds.keys() and len(kinds) == 40 * (12 if config.has_image_branch else 10)
    assert sum(len(change.keys) for (change,) in found.values()) == len(tensors)
    for name, (change,) in found.items():
        kind = kinds[name]
        assert kind_of(change.keys) == ("LoRA" if "DoRA" in kind else kind[:4])
        assert ("DoRA" in kind) == bool({"magnitude", "dora_scale"} & change.keys.keys())
        assert change.scale == (16 / {"LoHa": 4, "LoKr of two": 32}.get(kind, 8) if tool == "Diffusers" else 1.0)
    stray = next(iter(tensors)).replace("0", "77", 1)
    with pytest.raises(WeightsError, match="1 keys match nothing"):
        open_loras([(sparse(tmp_path / "l.safetensors", {**tensors, stray: (4, 4)}, metadata), 1.0)], config)
