"""LoRAs of every kind as the tools' own code writes them: what PEFT, Diffusers and LyCORIS make of the weights.

A module's weights in the tool are what its layer makes of the identity, with the adapter in place. The tools are the
extra ``tools``; without them these tests are skipped.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_error
from mlx.utils import tree_flatten
from oracles import diffusers_transformer, randomize, torch
from safetensors.torch import save_file

from wan_mlx.errors import WeightsError
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.load import load_transformer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the tools' own

CONFIG = TransformerConfig("t2v", dim=128, ffn_dim=192, num_heads=1, num_layers=2, freq_dim=32, text_dim=64)
TARGETS = ["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
BOUND = 5e-6


@pytest.fixture(scope="module")
def state():
    model = diffusers_transformer(CONFIG)
    randomize(model, 3)
    return model.state_dict()


@pytest.fixture(scope="module")
def base(state, tmp_path_factory):
    """The transformer's file."""
    path = tmp_path_factory.mktemp("base") / "diffusion_pytorch_model.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def model(state):
    """A transformer of Diffusers' with the weights of `base`."""
    made = diffusers_transformer(CONFIG)
    made.load_state_dict(state)
    return made


def train(parameters):
    """Random values in place of an initialisation: factors of one size, magnitudes near their own."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name or "dora_scale" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "alpha" not in name:
                parameter.add_(0.1 * noise)


def weights_in(model):
    """Diffusers' name → what its linear layer makes of the identity, and biases, norms and convolutions."""
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            inputs, name = getattr(module, "in_features", None), name.replace(".modules_to_save.default", "")
            if inputs and not any(part in name for part in ("base_layer", "lora_", "original_module")):
                bias = module(torch.zeros(1, inputs))
                found[f"{name}.bias"], found[f"{name}.weight"] = bias[0], (module(torch.eye(inputs)) - bias).T
    return {name: tensor.numpy() for name, tensor in found.items()}


def weights_of(loaded):
    """Our name → the loaded transformer's array, its rows in the order of the file."""
    found = {}
    for name, array in tree_flatten(loaded.parameters()):
        order = loaded.source.row_order(name)
        found[name] = np.array(array if order is None else array[mx.argsort(order)])
    return found


def check(base, state, lora, wanted, strength=1.0, least=0.02):
    """Our merged weights are the tool's, the LoRA changes some, and unmerged it gives the same result."""
    ours = {theirs: name for name, theirs in canonical_keys(recognise(state), state).items()}
    merged = load_transformer(base, "float32", loras=[(lora, strength)])
    got, plain, changes = weights_of(merged), {k: v.numpy() for k, v in state.items()}, {}
    for name, tensor in wanted.items():
        want = tensor.reshape(got[ours[name]].shape)
        if (change := relative_error(plain[name].reshape(want.shape), want)) > BOUND:
            changes[name] = change
        assert relative_error(got[ours[name]], want) < BOUND, name
    assert max(changes.values()) > least
    for name in ours.keys() - wanted.keys() - {"patch_embedding.weight"}:
        assert np.array_equal(got[ours[name]].ravel(), plain[name].ravel()), name
    rng = np.random.default_rng(0)
    latents, context = (mx.array(rng.standard_normal(s, dtype=np.float32)) for s in ((1, 2, 4, 4, 16), (1, 512, 64)))
    beside = load_transformer(base, "float32", loras=[(lora, strength)], merge=False)
    assert relative_error(beside(latents, 500.0, context), merged(latents, 500.0, context)) < 2e-5
    return changes


PEFT_CASES = {
    "lora": ("LoraConfig", dict(r=4, lora_alpha=6)),
    "rslora": ("LoraConfig", dict(r=4, lora_alpha=6, use_rslora=True)),
    "patterns": (
        "LoraConfig",
        dict(r=4, lora_alpha=6, rank_pattern={r".*ffn\.net\.2": 8},
             alpha_pattern={r"blocks\.\d+\.attn2\.to_q": 24, "to_q": 3, r".*\.ffn\.net\..*": 2}),
    ),
    "biases": ("LoraConfig", dict(r=4, lora_alpha=6, bias="lora_only")),
    "lora_bias": ("LoraConfig", dict(r=4, lora_alpha=6, lora_bias=True)),
    "dora": ("LoraConfig", dict(r=4, lora_alpha=6, use_dora=True)),
    "dora and rslora": ("LoraConfig", dict(r=4, lora_alpha=6, use_dora=True, use_rslora=True)),
    "modules_to_save": ("LoraConfig", dict(r=4, lora_alpha=6, modules_to_save=["proj_out", "text_embedder"])),
    "lokr": ("LoKrConfig", dict(r=4, alpha=6)),
    "lokr, both": ("LoKrConfig", dict(r=2, alpha=6, decompose_both=True, decompose_factor=8)),
    "lokr, full": ("LoKrConfig", dict(r=32, alpha=6, rank_pattern={"to_q": 64}, alpha_pattern={"ffn.*": 20})),
    "loha": ("LoHaConfig", dict(r=3, alpha=6, alpha_pattern={"ffn.*": 20})),
}  # fmt: skip


def peft_adapter(model, case):
    peft = pytest.importorskip("peft")
    kind, options = PEFT_CASES[case]
    adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=TARGETS, **options))
    train((name, value) for name, value in adapted.named_parameters() if value.requires_grad)
    return adapted


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_folders(base, state, model, tmp_path, case):
    adapted = peft_adapter(model, case)
    adapted.save_pretrained(tmp_path)
    check(base, state, tmp_path, weights_in(adapted.base_model.model))


@pytest.mark.parametrize("case", ["lora", "patterns", "dora", "modules_to_save"])
@pytest.mark.parametrize("packed", [False, True])
def test_diffusers_files(base, state, model, tmp_path, case, packed):
    """By ``save_lora_adapter``, and with a pipeline's prefix, whose metadata has it too; also at another strength."""
    peft = pytest.importorskip("peft")
    kind, options = PEFT_CASES[case]
    model.add_adapter(getattr(peft, kind)(target_modules=TARGETS, **options))
    train((name, value) for name, value in model.named_parameters() if "default" in name)
    if packed:
        from diffusers.loaders import WanLoraLoaderMixin
        from diffusers.training_utils import _collate_lora_metadata

        layers = peft.get_peft_model_state_dict(model)
        WanLoraLoaderMixin.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, **_collate_lora_metadata({"transformer": model})
        )
    else:
        model.save_lora_adapter(tmp_path)
    check(base, state, tmp_path, weights_in(model))
    if case != "modules_to_save":  # which Diffusers keeps whole at any strength
        model.set_adapters("default", 0.6)
        check(base, state, tmp_path / "pytorch_lora_weights.safetensors", weights_in(model), strength=0.6, least=0.005)


def test_dora_of_the_patch_embedding(base, state, model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["patch_embedding"])
    )
    train((name, value) for name, value in adapted.named_parameters() if value.requires_grad)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().state_dict()["patch_embedding.weight"].numpy()
    got = weights_of(load_transformer(base, "float32", loras=tmp_path))["patch_embedding.weight"]
    want = np.moveaxis(merged, 1, -1).reshape(got.shape)
    assert relative_error(got, want) < BOUND
    plain = weights_of(load_transformer(base, "float32"))["patch_embedding.weight"]
    assert relative_error(plain, want) > 0.02


LYCORIS_CASES = {
    "locon": dict(algo="lora"),
    "rs_lora": dict(algo="lora", rs_lora=True),
    "scalar": dict(algo="lora", use_scalar=True),
    "full": dict(algo="full"),
    "dora": dict(algo="lora", weight_decompose=True),
    "dora of columns": dict(algo="lora", weight_decompose=True, wd_on_out=False),
    "lokr": dict(algo="lokr"),
    "lokr, both": dict(algo="lokr", decompose_both=True, factor=8, lora_dim=2),
    "lokr, full": dict(algo="lokr", full_matrix=True, factor=4),
    "lokr and rs_lora": dict(algo="lokr", rs_lora=True),
    "lokr and dora": dict(algo="lokr", weight_decompose=True, wd_on_out=False),
    "loha": dict(algo="loha"),
    "loha and dora": dict(algo="loha", weight_decompose=True),
}


def lycoris_network(model, case, multiplier=1.0):
    lycoris = pytest.importorskip("lycoris")
    names = [f".*{target}" for target in TARGETS]
    lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "use_fnmatch": False})
    options = dict(lora_dim=4, alpha=6) | LYCORIS_CASES[case]
    network = lycoris.LycorisNetwork(model, multiplier, network_module=options.pop("algo"), **options)
    assert len(network.loras) == 2 * 6  # attention's two and two of the FFN in each block
    network.apply_to()
    train((name, value) for name, value in network.named_parameters())
    return network


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_lycoris_files(base, state, model, tmp_path, case):
    network = lycoris_network(model, case).eval()
    network.save_weights(tmp_path / "l.safetensors", None, {})
    of_columns = {v.shape[0] == 1 for k, v in network.state_dict().items() if k.endswith("dora_scale")}
    assert of_columns == ({case in ("dora of columns", "lokr and dora")} if "dora" in case else set())
    check(base, state, tmp_path / "l.safetensors", weights_in(model))


@pytest.mark.parametrize("case", ["locon", "lokr", "loha", "full"])
def test_lycoris_files_at_another_strength(base, state, model, tmp_path, case):
    network = lycoris_network(model, case, 0.6).eval()
    network.save_weights(tmp_path / "l.safetensors", None, {})
    check(base, state, tmp_path / "l.safetensors", weights_in(model), 0.6)


REFUSED = {
    "pissa": ("LoraConfig", dict(init_lora_weights="pissa"), "PiSSA.*path_initial_model_for_weight_conversion"),
    "olora": ("LoraConfig", dict(init_lora_weights="olora"), "OLoRA"),
    "oft": ("OFTConfig", dict(oft_block_size=4), "OFT"),
    "boft": ("BOFTConfig", dict(), "BOFT"),
    "ia3": ("IA3Config", dict(feedforward_modules=[]), "IA3|IA³"),
    "vera": ("VeraConfig", dict(), "VERA|VeRA"),
    "adalora": ("AdaLoraConfig", dict(total_step=10), "AdaLoRA|ADALORA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_of_peft_are_refused_by_name(base, model, tmp_path, case):
    """By the configuration, and, where the keys are others too, without it."""
    peft = pytest.importorskip("peft")
    kind, options, says = REFUSED[case]
    adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["to_q"], **options))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=f"{says}.*"):
        load_transformer(base, "float32", loras=tmp_path)
    if kind != "LoraConfig":
        renamed = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(WeightsError, match=f"{says}.*by its key"):
            load_transformer(base, "float32", loras=renamed)


def test_a_converted_pissa_is_a_lora_of_the_published_weights(base, state, model, tmp_path):
    """What the refusal of PiSSA says to do."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
    )
    before, after = tmp_path / "before", tmp_path / "after"
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(before)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    train((name, value) for name, value in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(after, path_initial_model_for_weight_conversion=str(before))
    assert json.loads((after / "adapter_config.json").read_text())["init_lora_weights"] is True
    check(base, state, after, weights_in(adapted.base_model.model))


@pytest.mark.parametrize(
    "algo, says", [("glora", "GLoRA"), ("diag-oft", "OFT"), ("boft", "OFT"), ("ia3", "IA³"), ("tlora", "T-LoRA")]
)
def test_other_kinds_of_lycoris_are_refused_by_name(base, model, tmp_path, algo, says):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*to_q"], "use_fnmatch": False})
    network = lycoris.LycorisNetwork(model, 1.0, lora_dim=4, alpha=6, network_module=algo, constraint=0)
    network.apply_to()
    network.save_weights(tmp_path / "l.safetensors", None, {})
    with pytest.raises(WeightsError, match=f"{says}, by its key"):
        load_transformer(base, "float32", loras=tmp_path / "l.safetensors")
