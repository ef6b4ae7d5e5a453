"""Gradients of the plain transformers with respect to all parameters and inputs, against PyTorch's autograd."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from oracles import diffusers_transformer, in_halves, randomize

from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.weights.layouts import canonical_keys, recognise

BOUND = 1e-4
SIZES = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=2, freq_dim=32, text_dim=24)
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", **SIZES, in_dim=36, image_dim=32),
    "flf2v": TransformerConfig("flf2v", **SIZES, in_dim=36, image_dim=32),
    "vace": TransformerConfig("vace", **SIZES, vace_layers=(0, 1), vace_in_dim=6),
}
GRID, TIMESTEP = (2, 4, 6), 700.0


def channels_last(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.detach().movedim(1, -1).numpy())


def inputs(config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Diffusers' arguments by name, those to be differentiated."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    given = {"hidden_states": random(1, config.in_dim, *GRID)}
    given["encoder_hidden_states"] = random(1, config.text_len, config.text_dim)
    if config.has_image_branch:
        given["encoder_hidden_states_image"] = random(2 if config.model_type == "flf2v" else 1, 257, config.image_dim)
    if config.vace_layers:
        given["control_hidden_states"] = random(1, config.vace_in_dim, *GRID)
    return given


def as_ours(name: str, tensor: torch.Tensor, config: TransformerConfig) -> np.ndarray:
    """A parameter, or its gradient, in this package's layout."""
    array = tensor.detach().numpy()
    if array.ndim == 5:
        array = array.transpose(0, 2, 3, 4, 1).reshape(array.shape[0], -1)
    return in_halves(name, array, config.head_dim)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_pytorch(kind):
    config = CONFIGS[kind]
    reference = diffusers_transformer(config)
    randomize(reference, seed=5)
    given = inputs(config)
    weight = torch.randn((1, config.out_dim, *GRID), generator=torch.Generator().manual_seed(9))
    more = {"control_hidden_states_scale": torch.full((len(config.vace_layers),), 0.7)} if config.vace_layers else {}
    out = reference(timestep=torch.tensor([TIMESTEP]), return_dict=False, **given, **more)[0]
    (out * weight).sum().backward()

    state = reference.state_dict()
    sources = canonical_keys(recognise(state), state)
    parameters = dict(reference.named_parameters())
    model = (VaceTransformer if config.vace_layers else Transformer)(config)
    weights = {name: mx.array(as_ours(name, state[source], config)) for name, source in sources.items()}
    model.load_weights(list(weights.items()), strict=True)

    def loss(trained: dict, latents: mx.array, context: mx.array, *rest: mx.array) -> mx.array:
        model.update(trained)
        condition = []
        if config.has_image_branch:
            latents, condition = latents[..., :16], [latents[..., 16:]]
        velocity = model(latents, TIMESTEP, context, *condition, *rest, *([0.7] if config.vace_layers else []))
        return (velocity * channels_last(weight)).sum()

    mine = [channels_last(x) if x.ndim == 5 else mx.array(x.detach().numpy()) for x in given.values()]
    value, (of_weights, *of_inputs) = mx.value_and_grad(loss, argnums=tuple(range(1 + len(mine))))(
        model.trainable_parameters(), *mine
    )
    assert value.item() == pytest.approx((out * weight).sum().item(), rel=1e-4)
    found = dict(tree_flatten(of_weights))
    assert found.keys() == sources.keys()
    for name, source in sources.items():
        check(name, np.array(found[name]), as_ours(name, parameters[source].grad, config))
    for (name, tensor), mine in zip(given.items(), of_inputs, strict=True):
        wanted = tensor.grad.movedim(1, -1) if tensor.ndim == 5 else tensor.grad
        check(name, np.array(mine), wanted.numpy())


def check(name: str, got: np.ndarray, want: np.ndarray) -> None:
    scale = np.abs(want).max()
    assert scale > 0, f"{name} has no gradient"
    error = np.abs(got - want).max() / scale
    # The softmax does not see what is added to all keys alike, so a key bias has no gradient but rounding.
    floor = 1e-4 if name.endswith((".k.bias", ".k_img.bias")) else 0.0
    assert error <= BOUND or np.abs(got - want).max() <= floor, f"{name}: relative error {error:.2e}"
