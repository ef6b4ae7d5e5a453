"""VACE's blocks around the transformer against PyTorch, float32, random weights; sizes from files; full key lists."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import WanVACETransformer3DModel
from mlx.utils import tree_flatten
from oracles import diffusers_transformer, in_halves, randomize, relative_error

from wan_mlx.errors import WeightsError
from wan_mlx.files.base import TensorInfo, WeightsFile
from wan_mlx.hub.names import DIFFUSERS_FILES
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.presets import PRESETS
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import ComponentWeights, check_keys, parameter_shapes
from wan_mlx.weights.configs import network_config
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.parameters import dtype_of

BOUND = 2e-5
TINY = TransformerConfig(
    "vace",
    dim=48,
    ffn_dim=80,
    num_heads=2,
    num_layers=5,
    freq_dim=32,
    text_dim=24,
    vace_layers=(0, 1, 3),
    vace_in_dim=6,
)
VACE_PRESETS = [name for name, preset in PRESETS.items() if preset.task == "vace"]


def diffusers_model(config: TransformerConfig, seed: int = 0) -> WanVACETransformer3DModel:
    model = diffusers_transformer(config)
    if model.device.type != "meta":
        randomize(model, seed)
    return model


def ours(config: TransformerConfig, reference: WanVACETransformer3DModel, dtype=mx.float32) -> VaceTransformer:
    """Our class with the reference's weights; patches flattened here so that the loader is not its own judge."""
    state = reference.state_dict()
    weights = {}
    for name, source in canonical_keys(recognise(state), state).items():
        array = state[source].float().numpy()
        if array.ndim == 5:
            array = array.transpose(0, 2, 3, 4, 1).reshape(array.shape[0], -1)
        array = in_halves(name, array, config.head_dim)
        weights[name] = mx.array(array).astype(dtype_of("transformer", name, dtype))
    model = VaceTransformer(config)
    model.load_weights(list(weights.items()), strict=True)
    return model


def inputs(config: TransformerConfig, grid: tuple[int, int, int], batch: int, seed: int = 1) -> list[torch.Tensor]:
    """Latents, context and VACE context, channels first."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 16, *grid), (batch, config.text_len, config.text_dim), (batch, config.vace_in_dim, *grid)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run_ours(model, timestep, latents, context, control, **options) -> np.ndarray:
    """Channels first in and out."""
    latents, control = (mx.array(x.movedim(1, -1).numpy()) for x in (latents, control))
    got = model(latents, timestep, mx.array(context.numpy()), control, **options)
    return np.array(got).transpose(0, 4, 1, 2, 3)


def run_theirs(model, timestep, latents, context, control, scale: float | None = None) -> np.ndarray:
    scales = None if scale is None else torch.full((len(model.config.vace_layers),), scale)
    dtype = model.patch_embedding.weight.dtype
    latents, context, control = (x.to(dtype) for x in (latents, context, control))
    with torch.no_grad():
        out = model(
            latents,
            torch.tensor(timestep),
            context,
            control_hidden_states=control,
            control_hidden_states_scale=scales,
            return_dict=False,
        )
    return out[0].float().numpy()


@pytest.fixture(scope="module")
def reference() -> WanVACETransformer3DModel:
    return diffusers_model(TINY)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10), (5, 2, 14)])
def test_velocity(reference, grid, batch):
    given = inputs(TINY, grid, batch)
    timestep = [250.0, 999.0][:batch]
    assert (
        relative_error(run_ours(ours(TINY, reference), timestep, *given), run_theirs(reference, timestep, *given))
        < BOUND
    )


@pytest.mark.parametrize("scale", [0.0, 0.35, 1.0, -1.5])
def test_scale(reference, scale):
    given = inputs(TINY, (2, 6, 4), 1)
    got = run_ours(ours(TINY, reference), [731.0], *given, vace_scale=scale)
    assert relative_error(got, run_theirs(reference, [731.0], *given, scale)) < BOUND


@pytest.mark.parametrize("layers", [(0,), (0, 4), (0, 2, 4), (0, 1, 2, 3, 4)])
def test_which_layers_get_hints(layers):
    config = TransformerConfig(**{**vars(TINY), "vace_layers": layers})
    reference = diffusers_model(config, seed=2)
    given = inputs(config, (2, 4, 6), 1)
    assert (
        relative_error(run_ours(ours(config, reference), [500.0], *given), run_theirs(reference, [500.0], *given))
        < BOUND
    )


def test_scale_0_is_the_transformer_alone(reference):
    latents, context, control = inputs(TINY, (2, 6, 4), 1)
    model = ours(TINY, reference)
    plain = Transformer(TransformerConfig(**{**vars(TINY), "model_type": "t2v", "vace_layers": ()}))
    plain.load_weights([(k, v) for k, v in tree_flatten(model.parameters()) if not k.startswith("vace_")], strict=True)
    want = plain(mx.array(latents.movedim(1, -1).numpy()), 500.0, mx.array(context.numpy()))
    got = run_ours(model, [500.0], latents, context, control, vace_scale=0.0)
    assert np.array_equal(got, np.array(want).transpose(0, 4, 1, 2, 3))
    assert relative_error(got, run_ours(model, [500.0], latents, context, control)) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_no_further_from_float32_than_diffusers(tmp_path, dtype):
    config = TransformerConfig(**{**vars(TINY), "dim": 96, "ffn_dim": 160})
    reference = diffusers_model(config, seed=3)
    given = inputs(config, (3, 8, 8), 1)
    exact = run_theirs(reference, [500.0], *given)
    reference.save_pretrained(tmp_path)  # reloaded as users do it, so that Diffusers keeps its own float32 parts
    half = WanVACETransformer3DModel.from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype)).eval()
    want = np.sqrt(np.mean((run_theirs(half, [500.0], *given) - exact) ** 2))
    got = np.sqrt(np.mean((run_ours(ours(config, reference, getattr(mx, dtype)), [500.0], *given) - exact) ** 2))
    print(f"{dtype} rms error: ours {got:.3e}, diffusers {want:.3e}")
    assert got <= want


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"vace_context has shape \(1, 1, 4, 4, 5\), expected \(1, 1, 4, 4, 6\)"):
        VaceTransformer(TINY)(mx.zeros((1, 1, 4, 4, 16)), 1.0, mx.zeros((1, 512, 24)), mx.zeros((1, 1, 4, 4, 5)))


@pytest.fixture
def diffusers_folder(reference, tmp_path) -> Path:
    """Of this model only the transformer is real."""
    for names in (names for part, names in DIFFUSERS_FILES.items() if part != "low_noise"):
        (tmp_path / names[-1]).parent.mkdir(exist_ok=True)
        (tmp_path / names[-1]).touch()
    reference.save_pretrained(tmp_path / "transformer")
    return tmp_path


def test_diffusers_folder_loads_as_vace(reference, diffusers_folder):
    model = load_transformer(diffusers_folder, "float32")
    assert isinstance(model, VaceTransformer) and model.config == TINY
    given = inputs(TINY, (2, 4, 6), 1)
    assert relative_error(run_ours(model, [500.0], *given), run_theirs(reference, [500.0], *given)) < BOUND


def test_patch_embedding_stays_float32(diffusers_folder):
    model = load_transformer(diffusers_folder, "bfloat16")
    assert model.vace_patch_embedding.weight.dtype == model.vace_blocks[2].modulation.dtype == mx.float32
    assert model.vace_blocks[0].before_proj.weight.dtype == model.vace_blocks[2].after_proj.bias.dtype == mx.bfloat16


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 3, 4], [0, 3, 1], [1, 2, 3], [0, 1, 5], [0, 1, 1], [0, 1, -3]])
def test_layers_that_do_not_fit_the_blocks_are_refused(diffusers_folder, layers):
    path = diffusers_folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vace_layers": layers}))
    says = "= .*, expected a list of counts" if -3 in layers else "is .*, but 3 VACE blocks beside 5 layers need 3 incr"
    with pytest.raises(WeightsError, match=f"vace_layers {says}"):
        load_transformer(open_checkpoint(diffusers_folder), "float32")


def test_other_width_of_the_vace_context_is_refused(diffusers_folder):
    path = diffusers_folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vace_in_channels": 96}))
    with pytest.raises(WeightsError, match="config.json says vace_in_dim = 96, but the weights have 6"):
        load_transformer(open_checkpoint(diffusers_folder), "float32")


class HeaderOnly(WeightsFile):
    """What a weight file's header tells; there is no data behind it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.path = Path("published.safetensors")
        self.metadata = {}
        self.tensors = {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}


def full_size(name: str, official: bool) -> ComponentWeights:
    """A published model's keys and shapes, as Diffusers names them or renamed to the official names."""
    with torch.device("meta"):
        state = diffusers_model(PRESETS[name].transformer).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if official:
        shapes = {ours: shapes[theirs] for ours, theirs in canonical_keys(recognise(shapes), shapes).items()}
    return ComponentWeights(HeaderOnly(shapes))


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("name", VACE_PRESETS)
def test_full_size_keys(name, official):
    weights, expected = full_size(name, official), PRESETS[name].transformer
    assert len(weights.shapes) == {"vace-1.3B": 1264}.get(name, 1331)
    published = {"model_type": "vace", "vace_layers": list(expected.vace_layers), "vace_in_dim": 96}
    assert network_config(weights, published) == network_config(weights, {}) == expected
    shapes = parameter_shapes(VaceTransformer(expected))
    check_keys(weights, shapes)
    with pytest.raises(WeightsError, match="unexpected vace_blocks.7.after_proj.bias"):
        check_keys(weights, {k: s for k, s in shapes.items() if k != "vace_blocks.7.after_proj.bias"})
