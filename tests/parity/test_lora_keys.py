"""Every matrix of every kind of model is found by the names that Diffusers' own modules give its LoRA."""

import official_checkpoints as checkpoints
import pytest
from diffusers.loaders import lora_conversion_utils
from oracles import diffusers_transformer

from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.lora import resolve, spellings


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
