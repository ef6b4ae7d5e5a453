"""LoRA training against PyTorch: loss, gradients, twenty steps of AdamW; with PEFT's layers where it is installed."""

import importlib.util
import re

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from oracles import diffusers_transformer, in_halves, randomize, relative_error

from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.transformer import Transformer
from wan_mlx.training import attention_backward, block_backward
from wan_mlx.training.backward import Sample, loss_and_gradients
from wan_mlx.training.factors import layer_shapes
from wan_mlx.training.lora_file import write_lora
from wan_mlx.training.optimizer import make_optimizer
from wan_mlx.training.recipe import Recipe
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.parameters import dtype_of

SIZES = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=2, freq_dim=32, text_dim=24)
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", **SIZES, in_dim=36, image_dim=32),
}
GRID, RANK, ALPHA = (2, 4, 6), 4, 2.0
RECIPE = Recipe(rank=RANK, alpha=ALPHA, learning_rate=1e-3, weight_decay=0.01)


class Lora(torch.nn.Module):
    """A linear layer with factors beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.zeros(RANK, base.in_features))
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x):
        return self.base(x) + ALPHA / RANK * (x @ self.down.T @ self.up.T)


def with_plain_layers(model, modules: dict[str, str]) -> dict[str, torch.nn.Parameter]:
    factors = {}
    for ours, theirs in modules.items():
        parent, _, child = theirs.rpartition(".")
        layer = Lora(model.get_submodule(theirs))
        setattr(model.get_submodule(parent), child, layer)
        factors |= {f"{ours}.down": layer.down, f"{ours}.up": layer.up}
    return factors


def with_peft(model, modules: dict[str, str]) -> dict[str, torch.nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(modules.values())), model)
    factors = {}
    for ours, theirs in modules.items():
        layer = model.get_submodule(theirs)
        factors |= {f"{ours}.down": layer.lora_A["default"].weight, f"{ours}.up": layer.lora_B["default"].weight}
    return factors


WAYS = {
    "plain": with_plain_layers,
    "peft": pytest.param(
        with_peft, marks=pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs PEFT")
    ),
}


class Both:
    """A transformer here and in PyTorch with the same weights and factors, and the clips of one step."""

    def __init__(self, kind: str, put):
        self.config = config = CONFIGS[kind]
        self.reference = diffusers_transformer(config).requires_grad_(False)
        randomize(self.reference, seed=5)
        state = self.reference.state_dict()
        sources = canonical_keys(recognise(state), state)
        self.model = Transformer(config)
        weights = {name: mx.array(self.ours(name, state[source])) for name, source in sources.items()}
        self.model.load_weights(list(weights.items()), strict=True)
        modules = {name: sources[f"{name}.weight"].removesuffix(".weight") for name in layer_shapes(config)}
        self.theirs = put(self.reference, modules)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.theirs.values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.factors = {name: mx.array(self.ours(name, parameter)) for name, parameter in self.theirs.items()}
        self.steps = [(800.0, self.random(1)), (300.0, self.random(2))]

    def ours(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        """An array in this package's layout; rows of `up` are in the order of the layer's."""
        array = tensor.detach().numpy()
        if array.ndim == 5:
            array = array.transpose(0, 2, 3, 4, 1).reshape(array.shape[0], -1)
        return (
            array if name.endswith(".down") else in_halves(name.replace(".up", ".weight"), array, self.config.head_dim)
        )

    def random(self, seed: int) -> dict[str, torch.Tensor]:
        generator, c = torch.Generator().manual_seed(seed), self.config
        shapes = {
            "hidden_states": (1, c.in_dim, *GRID),
            "encoder_hidden_states": (1, c.text_len, c.text_dim),
            "target": (1, c.out_dim, *GRID),
        }
        if c.has_image_branch:
            shapes["encoder_hidden_states_image"] = (1, 257, c.image_dim)
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def samples(self) -> list[Sample]:
        found = []
        for timestep, given in self.steps:
            last = {name: mx.array(x.movedim(1, -1).numpy() if x.ndim == 5 else x.numpy()) for name, x in given.items()}
            latents, conditions = last["hidden_states"], {}
            if self.config.has_image_branch:
                conditions = {"condition": latents[..., 16:], "image_features": last["encoder_hidden_states_image"]}
            found.append(Sample(latents[..., :16], timestep, last["encoder_hidden_states"], last["target"], conditions))
        return found

    def their_loss(self) -> torch.Tensor:
        losses = []
        for timestep, given in self.steps:
            inputs = {name: x for name, x in given.items() if name != "target"}
            out = self.reference(timestep=torch.tensor([timestep]), return_dict=False, **inputs)[0]
            losses.append(torch.nn.functional.mse_loss(out, given["target"]))
        return torch.stack(losses).mean()


@pytest.mark.parametrize("put", [*WAYS.values()], ids=[*WAYS])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_are_those_of_pytorch(kind, put, monkeypatch):
    monkeypatch.setattr(block_backward, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(attention_backward, "SCORES_AT_ONCE", 64)
    both = Both(kind, put)
    their_loss = both.their_loss()
    their_loss.backward()
    losses, gradients = loss_and_gradients(Execution(both.model), both.factors, both.samples(), RECIPE.scale)
    assert np.mean(losses) == pytest.approx(their_loss.item(), rel=1e-5)
    assert gradients.keys() == both.theirs.keys()
    for name, parameter in both.theirs.items():
        assert relative_error(gradients[name], both.ours(name, parameter.grad)) <= 1e-4, name


def test_in_bfloat16_gradients_are_as_near_to_float32_as_pytorch_s():
    """Theirs: what `from_pretrained` makes of a base in bfloat16, float32 factors, autocast."""
    both = Both("t2v", with_plain_layers)
    both.their_loss().backward()
    want = {name: both.ours(name, parameter.grad) for name, parameter in both.theirs.items()}

    for name, parameter in both.reference.named_parameters():
        if not re.search(r"down|up|norm\d|norm_out|scale_shift|time_embedder", name):
            parameter.data = parameter.data.bfloat16()
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        both.their_loss().backward()
    theirs = {name: both.ours(name, parameter.grad.float()) for name, parameter in both.theirs.items()}

    narrow = {
        name: array.astype(dtype_of("transformer", name, mx.bfloat16))
        for name, array in tree_flatten(both.model.parameters())
    }
    both.model.load_weights([*narrow.items()])
    _, found = loss_and_gradients(Execution(both.model), both.factors, both.samples(), RECIPE.scale)
    ours = {name: np.array(array) for name, array in found.items()}

    def distance(got: dict[str, np.ndarray]) -> float:
        squares = [[float(((got[name] - want[name]) ** 2).sum()), float((want[name] ** 2).sum())] for name in want]
        return float(np.sqrt(np.divide(*np.sum(squares, axis=0))))

    assert 1e-4 < distance(ours) <= 1.1 * distance(theirs), (distance(ours), distance(theirs))


def test_twenty_steps_are_those_of_pytorch(tmp_path):
    both = Both("t2v", with_plain_layers)
    theirs = torch.optim.AdamW(both.theirs.values(), lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    ours, factors, model, samples = make_optimizer(RECIPE), both.factors, Execution(both.model), both.samples()
    ours.init(factors)
    begin = {name: np.array(array) for name, array in factors.items()}
    for _ in range(20):
        theirs.zero_grad()
        both.their_loss().backward()
        torch.nn.utils.clip_grad_norm_(both.theirs.values(), 1.0)
        theirs.step()
        _, gradients = loss_and_gradients(model, factors, samples, RECIPE.scale)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        factors = ours.apply_gradients(gradients, factors)
        mx.eval(factors, ours.state)
    for name, parameter in both.theirs.items():
        want = both.ours(name, parameter)
        assert relative_error(factors[name], want) <= 1e-3, name
        assert np.abs(want - begin[name]).max() > 5e-3, f"{name} was not trained"

    # The file has the published order of rows, and the scale in B.
    write_lora(tmp_path / "lora.safetensors", factors, RECIPE.scale, both.config, {})
    written = mx.load(str(tmp_path / "lora.safetensors"))
    name = "blocks.0.self_attn.q"
    up = both.theirs[f"{name}.up"].detach().numpy() * RECIPE.scale
    assert relative_error(written[f"diffusion_model.{name}.lora_B.weight"], up) <= 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_reads_every_factor_of_the_file(kind, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
    from safetensors.torch import load_file

    both = Both(kind, with_plain_layers)
    write_lora(tmp_path / "lora.safetensors", both.factors, RECIPE.scale, both.config, {})
    state = _convert_non_diffusers_wan_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    assert len(state) == len(both.factors)
    for name, layer in both.reference.named_modules():
        if isinstance(layer, Lora):
            down, up = (state.pop(f"transformer.{name}.lora_{part}.weight") for part in "AB")
            torch.testing.assert_close(up @ down, RECIPE.scale * layer.up @ layer.down, rtol=1e-5, atol=1e-6)
    assert not state
