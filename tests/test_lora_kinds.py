# ruff: noqa: F401, F811
"""LoHa, LoKr, DoRA and whole weights, by writers that follow the tools' layouts: merged, beside, packed, streamed."""

import json
from functools import reduce

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_error
from test_lora import ALPHA, GOOD, MODULES, A, B, base, inputs, parameters, random, refused, save

from wan_mlx.errors import WeightsError
from wan_mlx.models.layers import SIDE_KEYS
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.lora import open_loras
from wan_mlx.weights.lora_changes import merged
from wan_mlx.weights.set_loras import set_loras

RANK = 3
BOUND = 5e-6


def musubi(module):
    return "lora_unet_" + module.replace(".", "_")


def loha(rng, stem, shape):
    """musubi's and LyCORIS' keys; returns the tensors and what they add to the weights."""
    (outputs, inputs), keys = shape, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a, b, c, d = (random(rng, *s, scale=0.5) for s in 2 * [(outputs, RANK), (RANK, inputs)])
    tensors = {f"{stem}.{key}": array for key, array in zip(keys, (a, b, c, d), strict=True)}
    return {**tensors, f"{stem}.alpha": np.float32(ALPHA)}, ALPHA / RANK * (a @ b) * (c @ d)


def lokr(rng, stem, shape, left=8, factored=True):
    """A small left matrix, as musubi has it; with a whole right one the alpha means nothing."""
    outputs, inputs = shape[0] // left, shape[1] // left
    w1 = random(rng, left, left, scale=0.5)
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.alpha": np.float32(ALPHA)}
    if not factored:
        w2 = random(rng, outputs, inputs, scale=0.5)
        return {**tensors, f"{stem}.lokr_w2": w2}, np.kron(w1, w2)
    a, b = random(rng, outputs, RANK, scale=0.5), random(rng, RANK, inputs, scale=0.5)
    return {**tensors, f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b}, ALPHA / RANK * np.kron(w1, a @ b)


def lora(rng, stem, shape):
    a, b = random(rng, RANK, shape[1], scale=0.5), random(rng, shape[0], RANK, scale=0.5)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": np.float32(ALPHA)}
    return tensors, ALPHA / RANK * (b @ a)


KINDS = {"LoRA": lora, "LoHa": loha, "LoKr": lokr, "LoKr of two": lambda *args: lokr(*args, factored=False)}


def change(rng, weight, name, axis=None):
    """One module's tensors of a kind, with LyCORIS' DoRA over rows (1) or columns (0), and the changed weights by
    strength."""
    tensors, added = KINDS[name](rng, "M", weight.shape)
    if axis is None:
        return tensors, lambda weight, strength: weight + strength * added
    norms = np.linalg.norm(weight, axis=axis, keepdims=True) * (1 + random(rng, 1, scale=0.3))
    tensors["M.dora_scale"] = norms

    def changed(weight, strength):
        total = weight + added
        aim = total * norms / np.linalg.norm(total, axis=axis, keepdims=True)
        return weight + strength * (aim - weight)

    return tensors, changed


def write(path, arrays, kind, axis=None, seed=3):
    """A file with changes of `MODULES`, and module → changed weights by earlier weights and strength."""
    rng, tensors, wanted = np.random.default_rng(seed), {}, {}
    for module in MODULES:
        of_module, wanted[module] = change(rng, arrays[f"{module}.weight"], kind, axis)
        tensors |= {key.replace("M", musubi(module), 1): array for key, array in of_module.items()}
    return save(path, tensors), wanted


@pytest.mark.parametrize("axis", [None, 1, 0], ids=["plain", "dora of rows", "dora of columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_arithmetic_s(base, tmp_path, kind, axis):
    path, arrays = base["t2v"]
    file, wanted = write(tmp_path / "l.safetensors", arrays, kind, axis)
    for strength in (1.0, 0.6):
        got = parameters(load_transformer(path, "float32", loras=[(file, strength)]))
        for name, array in arrays.items():
            module = name.removesuffix(".weight")
            want = wanted[module](array.astype(np.float64), strength) if module in wanted else array
            assert relative_error(got[name], want) < BOUND, name
            assert module not in wanted or relative_error(array, want) > 0.05, name


SEQUENCES = {
    "loha": [("LoHa", None)],
    "lokr": [("LoKr", None)],
    "two lokr": [("LoKr", None), ("LoKr of two", None)],
    "dora": [("LoRA", 1)],
    "dora of columns": [("LoRA", 0)],
    "dora of lokr": [("LoKr", 1)],
    "lora, dora": [("LoRA", None), ("LoRA", 1)],
    "dora, lora": [("LoRA", 1), ("LoRA", None)],
    "dora, dora": [("LoRA", 1), ("LoHa", 0)],
    "lokr, dora, loha": [("LoKr", None), ("LoRA", 1), ("LoHa", None)],
}


def sequence(path, arrays, name):
    files = [write(path / f"{n}.safetensors", arrays, *case, seed=n) for n, case in enumerate(SEQUENCES[name])]
    return [(file, 0.9 - 0.2 * n) for n, (file, _) in enumerate(files)], [wanted for _, wanted in files]


@pytest.mark.parametrize("name", SEQUENCES)
def test_several_compose_in_their_order_merged_and_beside(base, tmp_path, name):
    path, arrays = base["t2v"]
    loras, wanted = sequence(tmp_path, arrays, name)
    merged = load_transformer(path, "float32", loras=loras)
    got, module = parameters(merged), "blocks.1.ffn.2"
    steps = zip(wanted, loras, strict=True)
    want = reduce(lambda weight, step: step[0][module](weight, step[1][1]), steps, arrays[f"{module}.weight"])
    assert relative_error(got[f"{module}.weight"], want) < BOUND
    if len(loras) > 1 and "dora" in name:
        other_way = parameters(load_transformer(path, "float32", loras=loras[::-1]))[f"{module}.weight"]
        assert relative_error(other_way, want) > 1e-3  # the order is seen
    streamed = load_transformer(path, "float32", loras=loras, stream=True)
    assert relative_error(streamed(*inputs()), merged(*inputs())) < 2e-5
    beside = load_transformer(path, "float32")
    plain = beside(*inputs())
    set_loras(beside, loras)
    assert mx.array_equal(streamed(*inputs()), beside(*inputs()))  # in its second pass, too
    if len(loras) == 1:  # plans count what is beside
        held = [layer[key] for layer in beside.modules() for key in SIDE_KEYS if key in layer and key != "lora_order"]
        values = sum(array.size for found in held for array in (found if isinstance(found, list) else [found]))
        changes = [change for found in open_loras(loras, beside.config).values() for change in found]
        assert values == sum(change.values_beside() for change in changes)
    assert relative_error(plain, merged(*inputs())) > 0.01
    set_loras(beside)
    assert mx.array_equal(beside(*inputs()), plain)


@pytest.mark.parametrize("name", ["lokr", "loha", "dora", "dora of columns", "lokr, dora, loha"])
@pytest.mark.parametrize("quantize", ["q4", "mxfp8"])
def test_beside_packed_weights_it_is_the_change_of_the_unpacked_ones(base, tmp_path, name, quantize):
    loras, _ = sequence(tmp_path, base["t2v"][1], name)
    model = load_transformer(base["t2v"][0], "float32", quantize=quantize, loras=loras)
    found = open_loras(loras, model.config)
    for place in ("blocks.0.ffn.0", "blocks.1.self_attn.o", "blocks.0.self_attn.q"):  # q has rows in another order
        layer = reduce(lambda part, key: part[int(key) if key.isdigit() else key], place.split("."), model)
        order = model.source.row_order(f"{place}.weight")
        order = mx.arange(layer.bias.size) if order is None else order
        unpacked, x = layer.unpacked(mx.float32), mx.array(random(np.random.default_rng(1), 2, 5, 128, scale=1))
        changed = merged(found[f"{place}.weight"], unpacked[mx.argsort(order)])
        want = x @ changed[order].T + layer.bias
        assert relative_error(layer(x), want) < 1e-5
        assert relative_error(x @ unpacked.T + layer.bias, want) > 0.05
    resident, streamed = (
        load_transformer(base["t2v"][0], "float32", quantize=quantize, loras=loras, stream=stream, merge=False)
        for stream in (False, True)
    )
    assert mx.array_equal(streamed(*inputs()), resident(*inputs()))


def test_dora_before_its_first_step_of_training_changes_nothing(base, tmp_path):
    path, arrays = base["t2v"]
    norms = np.linalg.norm(arrays["blocks.0.self_attn.q.weight"], axis=1)
    new = {**GOOD, "blocks.0.self_attn.q.lora_B.weight": 0 * B, "blocks.0.self_attn.q.lora_magnitude_vector": norms}
    got = parameters(load_transformer(path, "float32", loras=save(tmp_path / "new.safetensors", new)))
    assert all(relative_error(got[name], array) < 1e-6 for name, array in arrays.items())


def whole(rng, folder, tensors, config):
    """A PEFT folder with a LoRA of one matrix and whole parameters beside it."""
    config = {"r": 4, "lora_alpha": 4, **config}
    save(folder / "adapter_model.safetensors", {f"base_model.model.{key}": value for key, value in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["style.safetensors", "adapter_model.bin"])
def test_peft_s_configuration_is_read_beside_a_file_of_any_name(base, tmp_path, name):
    path, arrays = base["t2v"]
    folder = whole(None, tmp_path / "w", GOOD, {"lora_alpha": 32})
    want = parameters(load_transformer(path, "float32", loras=folder))
    (folder / "adapter_model.safetensors").unlink()
    keyed = {f"base_model.model.{key}": value for key, value in GOOD.items()}
    if name.endswith(".bin"):
        torch = pytest.importorskip("torch")
        torch.save({key: torch.from_numpy(value) for key, value in keyed.items()}, folder / name)
    else:
        save(folder / name, keyed)
    for given in (folder, folder / name):
        got = parameters(load_transformer(path, "float32", loras=given))
        assert all(np.array_equal(got[key], want[key]) for key in arrays)
    config = {"r": 4, "lora_alpha": 32, "init_lora_weights": "pissa"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="PiSSA"):
        load_transformer(path, "float32", loras=folder / name)


def test_whole_weights_replace_the_model_s(base, tmp_path):
    path, arrays = base["t2v"]
    rng = np.random.default_rng(2)
    new = {name: random(rng, *arrays[name].shape, scale=1) for name in ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias")}
    patch = random(rng, 128, 16, 1, 2, 2)
    folder = whole(
        rng, tmp_path / "w", {**GOOD, **new, "patch_embedding.weight": patch}, {"modules_to_save": ["ffn.0"]}
    )
    new["patch_embedding.weight"] = np.moveaxis(patch, 1, -1).reshape(128, -1)
    for strength in (1.0, 0.25):
        model = load_transformer(path, "float32", loras=[(folder, strength)])
        got = parameters(model)
        for name, array in new.items():
            assert relative_error(got[name], (1 - strength) * arrays[name] + strength * array) < 1e-6
        beside = load_transformer(path, "float32", loras=[(folder, strength)], merge=False)
        assert relative_error(beside(*inputs()), model(*inputs())) < 2e-5
    refused(base, tmp_path, {**GOOD, **new}, "3 keys match nothing")  # without a configuration that says so


def test_a_pattern_may_name_what_wraps_the_model(base, tmp_path):
    path, arrays = base["t2v"]
    wrapped = {f"transformer.{key}": value for key, value in GOOD.items()}
    one, two = (
        parameters(load_transformer(path, "float32", loras=whole(None, tmp_path / name, wrapped, config)))
        for name, config in (("1", {"alpha_pattern": {r"^transformer\.blocks.*": 16}}), ("2", {"lora_alpha": 16}))
    )
    assert all(np.array_equal(one[key], two[key]) for key in arrays)


def test_patterns_are_matched_as_peft_does(base, tmp_path):
    """Regular expressions at the end of a module's name after a dot, the first that fits."""
    from wan_mlx.weights.lora_config import AdapterConfig

    config = AdapterConfig({r"blocks\.\d+\.ffn\.0": 8.0, r".*ffn\.\d": 2.0, "fn.0": 9.0, "^head": 3.0, "": 5.0})
    modules = ("blocks.12.ffn.0", "blocks.12.ffn.2", "vace_blocks.0.ffn.0", "head", "head.head", "blocks.1.o")
    assert [config.scale({module}, 1) for module in modules] == [8.0, 2.0, 2.0, 3.0, 5.0, 5.0]
    broken = {"lora_adapter_metadata": json.dumps({"lora_alpha": 1, "alpha_pattern": {"(": 2}})}
    refused(base, tmp_path, GOOD, "configuration cannot be read", metadata=broken)


def test_an_alpha_may_be_an_integer(base, tmp_path):
    path, arrays = base["t2v"]
    for dtype in (np.int64, np.int32):
        tensors = {**GOOD, "blocks.0.self_attn.q.alpha": np.array(2, dtype)}
        got = parameters(load_transformer(path, "float32", loras=save(tmp_path / "i.safetensors", tensors)))
        want = arrays["blocks.0.self_attn.q.weight"] + 0.5 * (B @ A)
        assert relative_error(got["blocks.0.self_attn.q.weight"], want) < BOUND


def test_an_alpha_beside_a_difference_means_nothing(base, tmp_path):
    path, arrays = base["t2v"]
    tensors = {f"{Q}.diff": B @ A, f"{Q}.alpha": np.float32(2)}
    got = parameters(load_transformer(path, "float32", loras=save(tmp_path / "d.safetensors", tensors)))
    assert relative_error(got[f"{Q}.weight"], arrays[f"{Q}.weight"] + B @ A) < BOUND


Q = "blocks.0.self_attn.q"
CONVOLVED = {"patch_embedding.lora_down.weight": np.ones((2, 16, 1, 2, 2)),
             "patch_embedding.lora_up.weight": np.ones((128, 2, 1, 1, 1))}  # fmt: skip


@pytest.mark.parametrize(
    "tensors, says",
    [
        ({f"{Q}.lokr_w1": np.ones((8, 8)), f"{Q}.lokr_w2": np.ones((8, 16))}, r"\(8, 8\) and .*\(8, 16\) do not fit"),
        ({f"{Q}.lokr_w1": np.ones((8, 8)), f"{Q}.lokr_w2_a": np.ones((16, 2))}, "has only .*w1, .*w2_a"),
        ({f"{Q}.hada_w1_a": B, f"{Q}.hada_w1_b": A, f"{Q}.hada_w2_a": B, f"{Q}.hada_w2_b": A[:2]}, "do not fit"),
        ({f"{Q}.hada_w1_a": B, f"{Q}.hada_w1_b": 0 * A, f"{Q}.hada_w2_a": B, f"{Q}.hada_w2_b": A}, "only zeros"),
        ({f"{Q}.lora_magnitude_vector": np.ones(128)}, "has only .*lora_magnitude_vector"),
        ({**GOOD, f"{Q}.dora_scale": np.ones((64, 1))}, r"dora_scale \(64, 1\) are not the norms of"),
        ({**GOOD, f"{Q}.lora_magnitude_vector": np.ones(192)}, "are not the norms of"),
        ({**CONVOLVED, "patch_embedding.dora_scale": np.ones((1, 16, 1, 1, 1))},
         r"DoRA over the channels that a convolution reads, by its key patch_embedding.dora_scale .*not supported"),
        ({f"{Q}.lora_A.weight": np.where(A > 0, np.nan, A), f"{Q}.lora_B.weight": B}, "lora_A.weight holds NaN or inf"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": np.inf * B}, "lora_B.weight holds NaN or infinite values, as"),
        ({f"{Q}.diff": np.full((128, 128), np.nan)}, "diff holds NaN or infinite values"),
        ({f"{Q}.set_weight": np.ones((128, 128))}, "set_weight.*--transformer"),
        ({**GOOD, f"{Q}.reshape_weight": np.ones(2)}, "reshape_weight"),
        ({f"{Q}.weight": np.ones((128, 128))}, "whole weights: give a transformer as --model or --transformer"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A}, "made for FLUX, or .*not supported"),
        ({**GOOD, f"{Q}.lora_mid.weight": A}, "LoCon with a middle convolution.*not supported"),
        ({f"{Q}.a1.weight": A, f"{Q}.a2.weight": B}, "GLoRA.*Merge it into a transformer"),
    ],
)
def test_what_is_no_whole_change_of_a_known_kind_is_refused(base, tmp_path, tensors, says):
    refused(base, tmp_path, {key: np.asarray(value, np.float32) for key, value in tensors.items()}, says)


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA, whose factors belong to base weights .* Save it again"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"transformer.init_lora_weights": "corda"}, "CorDA"),
        ({"peft_type": "OFT"}, "OFT: not supported"),
        ({"use_qalora": True}, "QA-LoRA"),
    ],
)
def test_configurations_of_other_kinds_are_refused_by_name(base, tmp_path, entries, says):
    refused(base, tmp_path, GOOD, says, metadata={"lora_adapter_metadata": json.dumps({"lora_alpha": 4, **entries})})
