"""LoRA files under every published name: what they do to weights, merged or beside them, and how they are undone."""

import contextlib
import json
import logging

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_error
from mlx.utils import tree_flatten

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.layers import SIDE_KEYS
from wan_mlx.models.networks import new_transformer
from wan_mlx.models.transformer import Transformer
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.lora import describe_lora, normalise_loras, parse_lora
from wan_mlx.weights.set_loras import set_loras

SIZES = dict(dim=128, ffn_dim=192, num_heads=1, num_layers=2, freq_dim=32, text_dim=64, image_dim=64)
KINDS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", in_dim=36, **SIZES),
    "vace": TransformerConfig("vace", vace_layers=(0, 1), vace_in_dim=96, **SIZES),
}
RANK, ALPHA, STRENGTH = 4, 6.0, 0.7
# One of each: module → what Diffusers calls it.
MODULES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.v": "blocks.1.attn2.to_v",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
EXTRA = {
    "i2v": {
        "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    },
    "vace": {
        "vace_blocks.1.ffn.0": "vace_blocks.1.ffn.net.0.proj",
        "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
        "vace_blocks.1.after_proj": "vace_blocks.1.proj_out",
    },
}


def random(rng, *shape, scale=0.05):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """kind → (file, name → float32 array) of tiny transformers."""
    made = {}
    for kind, config in KINDS.items():
        model = new_transformer(config)
        rng = np.random.default_rng(len(kind))
        arrays = {name: random(rng, *array.shape) for name, array in tree_flatten(model.parameters())}
        path = tmp_path_factory.mktemp("base") / f"{kind}.safetensors"
        metadata = {"layout": "mlx", "component": "transformer"}
        mx.save_safetensors(str(path), {k: mx.array(v) for k, v in arrays.items()}, metadata)
        made[kind] = path, arrays
    return made


def factors(arrays, modules, rank=RANK):
    rng = np.random.default_rng(7)
    shapes = {module: arrays[f"{module}.weight"].shape for module in modules}
    return {m: (random(rng, rank, inputs), random(rng, outputs, rank)) for m, (outputs, inputs) in shapes.items()}


def save(path, tensors, metadata=None):
    path.parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(path), {k: mx.array(v) for k, v in tensors.items()}, metadata or {})
    return path


def keyed(pairs, stem, down, up, alpha):
    """A LoRA's tensors: ``stem`` names a module, ``alpha`` is written unless it is None."""
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{stem(module)}.{down}": a, f"{stem(module)}.{up}": b}
        if alpha is not None:
            tensors[f"{stem(module)}.alpha"] = np.float32(alpha)
    return tensors


def comfy(folder, pairs, theirs):
    stem = "diffusion_model.{}".format
    return save(folder / "l.safetensors", keyed(pairs, stem, "lora_down.weight", "lora_up.weight", ALPHA)), ALPHA / RANK


def comfy_without_alpha(folder, pairs, theirs):
    stem = "diffusion_model.{}".format
    return save(folder / "l.safetensors", keyed(pairs, stem, "lora_A.weight", "lora_B.weight", None)), 1.0


def diffusers(folder, pairs, theirs):
    config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.use_rslora": False}
    tensors = keyed(pairs, lambda m: f"transformer.{theirs[m]}", "lora_A.weight", "lora_B.weight", None)
    return save(
        folder / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)}
    ), ALPHA / RANK


def peft_rank_stabilised(folder, pairs, theirs):
    tensors = keyed(pairs, lambda m: f"base_model.model.{theirs[m]}", "lora_A.weight", "lora_B.weight", None)
    save(folder / "peft" / "adapter_model.safetensors", tensors)
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": True, "alpha_pattern": None}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "peft", ALPHA / np.sqrt(RANK)


def musubi(folder, pairs, theirs):
    tensors = keyed(pairs, lambda m: "lora_unet_" + m.replace(".", "_"), "lora_down.weight", "lora_up.weight", ALPHA)
    return save(folder / "l.safetensors", tensors), ALPHA / RANK


def kohya_of_diffusers(folder, pairs, theirs):
    stem = lambda m: "lora_unet_" + theirs[m].replace(".", "_")  # noqa: E731
    return save(folder / "l.safetensors", keyed(pairs, stem, "lora_down.weight", "lora_up.weight", ALPHA)), ALPHA / RANK


def diffsynth(folder, pairs, theirs):
    stem = lambda m: f"pipe.{'vace' if m.startswith('vace') else 'dit'}.{m}"  # noqa: E731
    tensors = keyed(pairs, stem, "lora_A.default.weight", "lora_B.default.weight", None)
    return save(folder / "l.safetensors", tensors), 1.0


def bare(folder, pairs, theirs):
    tensors = keyed(pairs, str, "lora_A.default.weight", "lora_B.default.weight", ALPHA)
    return save(folder / "l.safetensors", tensors), ALPHA / RANK


STYLES = [comfy, comfy_without_alpha, diffusers, peft_rank_stabilised, musubi, kohya_of_diffusers, diffsynth, bare]


def parameters(model):
    """Name → float32 array, its rows in the order of the file."""
    found = {}
    for name, array in tree_flatten(model.parameters()):
        order = model.source.row_order(name)
        found[name] = np.array(array.astype(mx.float32) if order is None else array[mx.argsort(order)])
    return found


def close(got, want):
    """Equal but for the order in which a product is summed."""
    return np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", STYLES)
def test_merged_weights_are_base_plus_strength_times_scale_times_product(base, tmp_path, kind, write):
    path, arrays = base[kind]
    theirs = MODULES | EXTRA.get(kind, {})
    pairs = factors(arrays, theirs)
    lora, scale = write(tmp_path, pairs, theirs)
    merged = parameters(load_transformer(path, "float32", loras=[(lora, STRENGTH)]))
    assert merged.keys() == arrays.keys()
    for name, array in arrays.items():
        pair = pairs.get(name.removesuffix(".weight"))
        if pair is None:
            assert np.array_equal(merged[name], array), name
        else:
            a, b = (x.astype(np.float64) for x in pair)
            want = array + STRENGTH * scale * (b @ a)
            assert close(merged[name], want) and not close(merged[name], array), name


def test_a_patch_embedding_s_convolution(base, tmp_path):
    path, arrays = base["vace"]
    rng = np.random.default_rng(1)
    tensors, want = {}, {}
    for name, channels in (("patch_embedding", 16), ("vace_patch_embedding", 96)):
        down, up = random(rng, RANK, channels, 1, 2, 2), random(rng, 128, RANK, 1, 1, 1)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(ALPHA)}
        product = np.einsum("or,rcthw->othwc", up[:, :, 0, 0, 0], down).reshape(128, -1)
        want[name] = arrays[f"{name}.weight"] + ALPHA / RANK * product
        flat = {k: v.reshape(v.shape[0], -1) if v.ndim else v for k, v in tensors.items()}
    for file in (save(tmp_path / "conv.safetensors", tensors), save(tmp_path / "flat.safetensors", flat)):
        merged = parameters(load_transformer(path, "float32", loras=file))
        assert all(close(merged[f"{name}.weight"], array) for name, array in want.items())


def differences(arrays, dim=128):
    """lightx2v's: whole differences of weights, biases, norms, modulation and patch embedding."""
    rng = np.random.default_rng(2)
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": random(rng, dim),
        "diffusion_model.blocks.0.norm3.diff_b": random(rng, dim),
        "diffusion_model.blocks.1.self_attn.norm_k.diff": random(rng, dim),
        "diffusion_model.blocks.1.self_attn.q.diff_b": random(rng, dim),
        "diffusion_model.blocks.1.diff_m": random(rng, 1, 6, dim),
        "diffusion_model.head.modulation.diff": random(rng, 1, 2, dim),
        "diffusion_model.blocks.0.ffn.2.diff": random(rng, dim, 192),
        "diffusion_model.patch_embedding.diff": random(rng, dim, 16, 1, 2, 2),
    }
    names = ["blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.self_attn.norm_k.weight"]
    names += ["blocks.1.self_attn.q.bias", "blocks.1.modulation", "head.modulation", "blocks.0.ffn.2.weight"]
    want = dict(zip([*names, "patch_embedding.weight"], tensors.values(), strict=True))
    want["patch_embedding.weight"] = np.moveaxis(want["patch_embedding.weight"], 1, -1).reshape(dim, -1)
    return tensors, {name: arrays[name] + np.float32(STRENGTH) * diff for name, diff in want.items()}


def test_differences_are_added(base, tmp_path):
    path, arrays = base["t2v"]
    tensors, want = differences(arrays)
    merged = parameters(
        load_transformer(path, "float32", loras=[(save(tmp_path / "d.safetensors", tensors), STRENGTH)])
    )
    for name, array in arrays.items():
        assert np.array_equal(merged[name], want.get(name, array)), name


def test_a_bias_of_the_up_factor_has_its_scale(base, tmp_path):
    path, arrays = base["t2v"]
    tensors = keyed(factors(arrays, ["blocks.0.ffn.2"]), str, "lora_A.weight", "lora_B.weight", ALPHA)
    tensors["blocks.0.ffn.2.lora_B.bias"] = bias = np.linspace(-1, 1, 128, dtype=np.float32)
    merged = parameters(load_transformer(path, "float32", loras=save(tmp_path / "b.safetensors", tensors)))
    assert close(merged["blocks.0.ffn.2.bias"], arrays["blocks.0.ffn.2.bias"] + ALPHA / RANK * bias)


def test_a_pattern_of_alphas(base, tmp_path):
    path, arrays = base["t2v"]
    pairs = factors(arrays, ["blocks.0.ffn.2", "blocks.1.ffn.2"])
    tensors = keyed(
        pairs, lambda m: f"transformer.{MODULES.get(m, 'blocks.0.ffn.net.2')}", "lora_A.weight", "lora_B.weight", None
    )
    entries = {"transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {"blocks.1.ffn.net.2": 1.0}}
    lora = save(tmp_path / "p.safetensors", tensors, {"lora_adapter_metadata": json.dumps(entries)})
    merged = parameters(load_transformer(path, "float32", loras=lora))
    for module, alpha in (("blocks.0.ffn.2", ALPHA), ("blocks.1.ffn.2", 1.0)):
        a, b = pairs[module]
        assert close(merged[f"{module}.weight"], arrays[f"{module}.weight"] + alpha / RANK * (b @ a))


@pytest.fixture
def two(base, tmp_path):
    """Two LoRA files for t2v, of different ranks, one with differences."""
    arrays = base["t2v"][1]
    first, _ = comfy(tmp_path / "1", factors(arrays, MODULES), MODULES)
    tensors, _ = differences(arrays)
    more = keyed(
        factors(arrays, ["blocks.0.self_attn.q", "blocks.0.ffn.0"], rank=3), str, "lora_A.weight", "lora_B.weight", None
    )
    return first, save(tmp_path / "2" / "l.safetensors", {**tensors, **more})


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return mx.array(random(rng, 1, 2, 4, 4, 16, scale=1)), 500.0, mx.array(random(rng, 1, 512, 64, scale=1))


def test_unmerged_loras_equal_merged_ones(base, two):
    path, _ = base["t2v"]
    loras = [(two[0], 0.9), (two[1], -0.4)]
    plain = load_transformer(path, "float32")
    want = load_transformer(path, "float32", loras=loras)(*inputs())
    assert relative_error(plain(*inputs()), want) > 0.01
    for model in (load_transformer(path, "float32", loras=loras, merge=False), plain):
        if model is plain:
            set_loras(model, loras)
        assert relative_error(model(*inputs()), want) < 2e-5


@pytest.mark.parametrize("quantize", [None, "q4"])
def test_streamed_blocks_take_loras_as_resident_ones_do(base, two, quantize):
    streamed = load_transformer(base["t2v"][0], "float32", quantize=quantize, stream=True, loras=two[1])
    resident = load_transformer(base["t2v"][0], "float32", quantize=quantize)
    before = resident(*inputs())
    for loras in ([two[1]], [(two[0], 0.5), two[1]], []):
        set_loras(resident, loras)
        if loras != [two[1]]:
            set_loras(streamed, loras)
        assert mx.array_equal(streamed(*inputs()), resident(*inputs()))
    assert mx.array_equal(streamed(*inputs()), before)


@pytest.mark.parametrize("quantize", [None, "q4", "mxfp8"])
def test_set_change_and_remove_restores_every_byte(base, two, quantize):
    model = load_transformer(base["t2v"][0], "bfloat16", quantize=quantize)
    before, result = dict(tree_flatten(model.parameters())), model(*inputs())
    outcomes = []
    for loras in ([(two[0], 1.0)], [(two[1], 1.0), (two[0], 0.5)], [two[1]]):
        set_loras(model, loras)
        outcomes.append(model(*inputs()))
        assert not mx.array_equal(outcomes[-1], result)
    assert not mx.array_equal(outcomes[0], outcomes[1]) and not mx.array_equal(outcomes[1], outcomes[2])
    set_loras(model, [(two[0], 1.0)])
    assert mx.array_equal(model(*inputs()), outcomes[0])  # nothing is left of those between
    set_loras(model)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys() and mx.array_equal(model(*inputs()), result)
    assert all(after[name].dtype == a.dtype and mx.array_equal(after[name], a) for name, a in before.items())


def test_quantised_weights_keep_a_lora_beside_and_take_the_rest_merged(base, two):
    path, arrays = base["t2v"]
    packed = load_transformer(path, "float32", quantize="q8")
    model = load_transformer(path, "float32", quantize="q8", loras=two[0])
    assert mx.array_equal(model.blocks[0].ffn[0].weight, packed.blocks[0].ffn[0].weight)
    assert "lora_a" in model.blocks[0].ffn[0] and "lora_a" not in model.head.head
    assert not np.array_equal(np.array(model.head.head.weight), arrays["head.head.weight"])
    assert relative_error(model(*inputs()), load_transformer(path, "float32", loras=two[0])(*inputs())) < 0.02
    assert relative_error(model(*inputs()), packed(*inputs())) > 0.02


def test_merged_loras_cannot_be_taken_out(base, two):
    model = load_transformer(base["t2v"][0], loras=two[0])
    with pytest.raises(ValueError, match="merged into these weights"):
        set_loras(model)


def test_rows_in_another_order(base, two):
    """As `Parameters` may keep a layer's rows: what LoRAs add to them is in that order too."""
    from wan_mlx.weights.component import open_component
    from wan_mlx.weights.load import transformer_parameters
    from wan_mlx.weights.stream import load_module

    order = mx.array(np.random.default_rng(0).permutation(128))
    wanted = {f"blocks.{i}.self_attn.{n}" for i in (0, 1) for n in ("q.weight", "q.bias", "norm_k.weight")}
    results = []
    for merge, reorder in ((True, False), (True, True), (False, True)):
        weights = open_component(base["t2v"][0], "transformer")
        parameters = transformer_parameters(weights, KINDS["t2v"], mx.float32, None, two if merge else ())
        parameters.row_order = lambda name, reorder=reorder: order if reorder and name in wanted else None
        model = load_module(Transformer(KINDS["t2v"]), parameters, lambda names: names)
        if not merge:
            set_loras(model, two)
        results.append((model.blocks[0].self_attn.q(mx.ones((1, 3, 128))), model.blocks[1].self_attn.q.bias))
    for got in results[1:]:
        assert all(relative_error(a, b[..., order]) < 1e-5 for a, b in zip(got, results[0], strict=True))


def refused(base, tmp_path, tensors, says, kind="t2v", metadata=None):
    lora = save(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match=says) as caught:
        load_transformer(base[kind][0], "float32", loras=lora)
    assert str(lora) in str(caught.value) and "\n" not in str(caught.value)


A, B = np.ones((RANK, 128), np.float32), np.ones((128, RANK), np.float32)
GOOD = {"blocks.0.self_attn.q.lora_A.weight": A, "blocks.0.self_attn.q.lora_B.weight": B}


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"blocks.7.self_attn.q.lora_A.weight": A},
            r"1 keys match nothing .*: blocks.7.self_attn.q.lora_A.weight; was",
        ),
        ({"blocks.0.cross_attn.k_img.lora_A.weight": A}, r"k_img.*; it was made for a model .* by CLIP"),
        ({"vace_blocks.0.after_proj.lora_A.weight": A}, r"; it was made for a VACE model"),
        ({"blocks.0.self_attn.q.dora_scale": A}, r"dora_scale \(4, 128\) are not the norms of"),
        ({"blocks.0.self_attn.q.lokr_w1": A}, r"blocks.0.self_attn.q.weight has only .*lokr_w1"),
        ({"lora_unet_blocks_0_nothing.lora_down.weight": A}, r"match nothing .*lora_unet_blocks_0_nothing"),
        ({"blocks.0.self_attn.q.lora_A.weight": A[:, :64]}, r"\(4, 64\) and .* do not fit blocks.0.self_attn.q.weight"),
        ({"blocks.0.self_attn.q.lora_A.weight": A[:3]}, r"\(3, 128\) and .*\(128, 4\) do not fit"),
        ({"blocks.0.self_attn.q.lora_B.weight": B.T}, r"do not fit"),
        ({"blocks.0.ffn.0.lora_A.weight": A}, r"blocks.0.ffn.0.weight has only blocks.0.ffn.0.lora_A.weight"),
        ({"blocks.0.ffn.0.alpha": np.float32(1)}, r"has only blocks.0.ffn.0.alpha"),
        ({"blocks.0.self_attn.q.alpha": np.float32(np.nan)}, r"alpha is nan, expected a finite number"),
        ({"blocks.0.self_attn.q.alpha": np.ones(2, np.float32)}, r"not one number"),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": A},
            r"two keys for the down of blocks.0.self_attn.q",
        ),
        ({"blocks.0.norm3.diff": np.ones(64, np.float32)}, r"blocks.0.norm3.diff \(64,\) does not fit .*\(128,\)"),
        ({"blocks.0.norm3.lora_A.weight": A, "blocks.0.norm3.lora_B.weight": B}, r"do not fit blocks.0.norm3.weight"),
        ({"blocks.0.self_attn.q.lora_A.weight": 0 * A}, r"blocks.0.self_attn.q.lora_A.weight holds only zeros"),
    ],
)
def test_a_file_that_does_not_suit_the_model_is_refused(base, tmp_path, change, says):
    refused(base, tmp_path, {**GOOD, **change}, says)


def test_a_lora_before_its_first_step_of_training_changes_nothing(base, tmp_path):
    lora = save(tmp_path / "new.safetensors", {**GOOD, "blocks.0.self_attn.q.lora_B.weight": 0 * B})
    new, plain = (parameters(load_transformer(base["t2v"][0], "float32", loras=loras)) for loras in (lora, None))
    assert all(np.array_equal(new[name], array) for name, array in plain.items())


def test_factors_in_other_dtypes(base, tmp_path):
    path, arrays = base["t2v"]
    rng = np.random.default_rng(4)
    a, b = (random(rng, *shape) for shape in ((RANK, 128), (128, RANK)))
    for dtype in (mx.float16, mx.bfloat16):
        stored = {f"blocks.0.self_attn.v.lora_{k}.weight": mx.array(x).astype(dtype) for k, x in (("A", a), ("B", b))}
        mx.save_safetensors(str(tmp_path / "x.safetensors"), stored)
        merged = parameters(load_transformer(path, "float32", loras=tmp_path / "x.safetensors"))
        down, up = (np.array(array.astype(mx.float32)) for array in stored.values())
        assert close(merged["blocks.0.self_attn.v.weight"], arrays["blocks.0.self_attn.v.weight"] + up @ down)
    fp8 = {name: ("F8_E4M3", np.array(mx.to_fp8(array.astype(mx.float32)))) for name, array in stored.items()}
    merged = parameters(load_transformer(path, "float32", loras=write_tensors(tmp_path / "8.safetensors", fp8)))
    down, up = (np.array(mx.from_fp8(mx.array(x), mx.float32)) for _, x in fp8.values())
    assert close(merged["blocks.0.self_attn.v.weight"], arrays["blocks.0.self_attn.v.weight"] + up @ down)
    refused(base, tmp_path, {k: x.astype(np.int32) for k, x in GOOD.items()}, "is I32; expected floats")


def write_tensors(path, tensors):
    """A safetensors file of any dtypes: name → (dtype, numpy array of its bytes)."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        end = len(data) + array.nbytes
        header[name], data = (
            {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]},
            data + array.tobytes(),
        )
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def test_a_damaged_configuration_is_refused(base, tmp_path):
    refused(base, tmp_path, GOOD, "configuration cannot be read", metadata={"lora_adapter_metadata": "{"})
    refused(base, tmp_path, GOOD, "configuration cannot be read", metadata={"lora_adapter_metadata": "[1]"})
    not_finite = {"lora_adapter_metadata": '{"lora_alpha": NaN}'}
    refused(base, tmp_path, GOOD, "lora_alpha has nan, which is not finite", metadata=not_finite)
    dora = json.dumps({"transformer.use_dora": True})
    refused(base, tmp_path, GOOD, "DoRA .* without magnitudes", metadata={"lora_adapter_metadata": dora})


def test_a_refused_lora_changes_nothing(base, two, tmp_path):
    model = load_transformer(base["t2v"][0], "float32")
    set_loras(model, two[0])
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(WeightsError):
        set_loras(model, [two[1], save(tmp_path / "bad.safetensors", {**GOOD, "nothing.alpha": np.float32(1)})])
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_text_encoder_keys_are_reported_as_unused(base, tmp_path, caplog):
    te = {"lora_te_encoder_block_0_q.lora_down.weight": A, "text_encoder.encoder.block.0.lora_A.weight": A}
    te["text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight"] = A  # ComfyUI's
    lora = save(tmp_path / "te.safetensors", {**GOOD, **te})
    with caplog.at_level(logging.WARNING):
        load_transformer(base["t2v"][0], loras=lora)
    assert "3 keys for a text encoder are not used" in caplog.text
    refused(base, tmp_path, te, "no LoRA keys for the transformer")


def test_paths_and_strengths(tmp_path):
    assert parse_lora("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_lora("dir:x/a.safetensors") == ("dir:x/a.safetensors", 1.0)
    assert parse_lora("dir:x/a.safetensors:-1e-1") == ("dir:x/a.safetensors", -0.1)
    odd = tmp_path / "style:2"
    odd.write_bytes(b"")
    assert parse_lora(str(odd)) == (str(odd), 1.0) and parse_lora(f"{odd}:2") == (str(odd), 2.0)
    with pytest.raises(ValueError, match="is nan; expected a finite"):
        normalise_loras("a.safetensors:nan")
    assert normalise_loras("a:0.5") == normalise_loras([("a", 0.5)])
    for wrong in ([("a", "strong")], [3], [("a", 1, 2)], [("a", float("inf"))]):
        with pytest.raises(ValueError):
            normalise_loras(wrong)


def sampled(pipe):
    """The latents of one step of a tiny picture; nothing is decoded."""
    request = pipe.request("a red circle", width=32, height=32, num_frames=1, steps=1, guidance_scale=1, seed=1)
    with contextlib.closing(pipe.stages(request)) as events:
        step = next(event for event in events if isinstance(event, wan_mlx.Step))
        return np.array(step.latents)


@pytest.fixture(scope="module")
def nano_loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    rng = np.random.default_rng(3)
    files = []
    for n, module in enumerate(("self_attn.v", "ffn.2")):
        inputs = 640 if module == "ffn.2" else 256
        pairs = {
            f"blocks.{i}.{module}": (random(rng, 2, inputs, scale=0.2), random(rng, 256, 2, scale=0.2))
            for i in range(6)
        }
        files.append(save(folder / f"{n}.safetensors", keyed(pairs, str, "lora_A.weight", "lora_B.weight", None)))
    return files


def test_a_pipeline_swaps_loras_without_loading_again(nano_loras, monkeypatch):
    from wan_mlx import opened

    loads = []

    def load(*args, **options):
        loads.append(args)
        return load_transformer(*args, **options)

    monkeypatch.setattr(opened, "load_transformer", load)
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", progress=False)
    with pipe.keep_loaded():
        plain = sampled(pipe)
        pipe.set_loras([(nano_loras[0], 0.8)])
        first, settings = sampled(pipe), pipe.settings(pipe.request("a red circle"))
        pipe.set_loras(f"{nano_loras[1]}")
        second = sampled(pipe)
        pipe.set_loras()
        assert np.array_equal(sampled(pipe), plain)
    assert len(loads) == 1
    assert not np.array_equal(plain, first) and not np.array_equal(first, second)
    assert settings["loras"] == [describe_lora(nano_loras[0], 0.8)]
    assert "loras" not in pipe.settings(pipe.request("a red circle"))
    merged = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", progress=False, loras=[(nano_loras[0], 0.8)])
    with merged.keep_loaded():
        assert np.abs(sampled(merged) - first).max() < 1e-4
        merged.set_loras([])
        assert np.array_equal(sampled(merged), plain)


def test_a_pipeline_refuses_a_lora_before_it_loads(nano_loras, base, tmp_path):
    with pytest.raises(WeightsError, match="match nothing"):
        wan_mlx.WanPipeline.from_pretrained("nano", loras=[save(tmp_path / "x.safetensors", {"nothing.alpha": A})])
    with pytest.raises(WeightsError, match="no such file"):
        wan_mlx.WanPipeline.from_pretrained("nano", loras=[tmp_path / "nowhere.safetensors"])
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", loras=nano_loras[0])
    with pytest.raises(WeightsError, match="no such file"):
        pipe.set_loras(tmp_path / "nowhere.safetensors")
    assert pipe.loras == [(nano_loras[0], 1.0)]


def test_the_command_line_takes_loras(nano_loras, tmp_path, capsys):
    from wan_mlx.cli.main import main

    arguments = ["--model", "nano", "--prompt", "a red circle", "--size", "32x32", "--frames", "1", "--steps", "1"]
    chosen = ["--lora", f"{nano_loras[0]}:0.8", "--lora", str(nano_loras[1])]
    assert main([*arguments, *chosen, "--dtype", "float32", "--output", str(tmp_path / "a.npz")]) == 0
    assert f"{nano_loras[0]} at 0.8" in capsys.readouterr().err
    assert main([*arguments, "--lora", str(tmp_path / "none"), "--output", str(tmp_path / "b.npz")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_side_keys_are_never_stored_names():
    assert not set(SIDE_KEYS) & {
        name.rsplit(".")[-1] for name, _ in tree_flatten(Transformer(KINDS["t2v"]).parameters())
    }
