"""RIFE against a PyTorch statement of the same network, on random weights in float32; and its published files."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from oracles import relative_error
from rife_files import TINY, author_shapes, mlx_community, random_weights, training_shapes
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

from wan_mlx.errors import WeightsError
from wan_mlx.models import rife
from wan_mlx.models.rife import RIFE, RIFEConfig, enlarge, padded, pixel_shuffle, shrink, warp
from wan_mlx.weights.component import parameter_shapes
from wan_mlx.weights.rife import load_rife

BOUND = 5e-5


def convolution(into, out, stride=1):
    return nn.Conv2d(into, out, 3, stride, 1)


class Leaky(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = functional.leaky_relu(layer(x), 0.2)
        return x


class Weighed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv, self.beta = convolution(dim, dim), nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return self.conv(x) * self.beta + x


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cnn0, self.cnn1, self.cnn2 = convolution(3, width, 2), convolution(width, width), convolution(width, width)
        self.cnn3 = nn.ConvTranspose2d(width, 4, 4, 2, 1)

    def forward(self, x):
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = functional.leaky_relu(layer(x), 0.2)
        return self.cnn3(x)


class Block(nn.Module):
    def __init__(self, into, width, depth):
        super().__init__()
        self.conv0 = nn.Sequential(Leaky(convolution(into, width // 2, 2)), Leaky(convolution(width // 2, width, 2)))
        self.convblock = Leaky(*(Weighed(width) for _ in range(depth)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, 52, 4, 2, 1), nn.PixelShuffle(2))

    def forward(self, x, flow, scale):
        x = resized(x, 1 / scale)
        if flow is not None:
            x = torch.cat([x, resized(flow, 1 / scale) / scale], 1)
        found = resized(self.lastconv(self.convblock(self.conv0(x))), scale)
        return found[:, :4] * scale, found[:, 4:5], found[:, 5:]


class Reference(nn.Module):
    """Frames (1, 3, H, W) whose sides are multiples of 128 → the one between."""

    def __init__(self, config):
        super().__init__()
        self.scales, self.encode = config.scales, Encoder(config.head)
        for place, width in enumerate(config.widths):
            self.add_module(f"block{place}", Block(28 if place else 15, width, config.depth))

    def forward(self, first, second, time):
        features = self.encode(first), self.encode(second)
        time = torch.full_like(first[:, :1], time)
        frames, seen, flow, told = (first, second), features, None, []
        for place, scale in enumerate(self.scales):
            change, mask, state = self.get_submodule(f"block{place}")(
                torch.cat([*frames, *seen, time, *told], 1), flow, scale
            )
            flow, told = change if flow is None else flow + change, [mask, state]
            frames = moved(first, flow[:, :2]), moved(second, flow[:, 2:])
            seen = moved(features[0], flow[:, :2]), moved(features[1], flow[:, 2:])
        share = torch.sigmoid(mask)
        return frames[0] * share + frames[1] * (1 - share), flow


def resized(x, factor):
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def moved(image, flow):
    height, width = image.shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    step = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    grid = torch.stack([x, y], -1)[None] + flow.permute(0, 2, 3, 1) / step
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def channels_last(array):
    return np.moveaxis(array.detach().numpy(), 1, -1)


@pytest.fixture(scope="module")
def weights():
    return random_weights(author_shapes())


@pytest.fixture(scope="module")
def ours(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("rife") / "flownet.safetensors"
    save_file(weights, path)
    return load_rife(path)


@pytest.fixture(scope="module")
def theirs(weights):
    network = Reference(TINY).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return network


@pytest.mark.parametrize("time", [0.5, 0.3])
@pytest.mark.parametrize("size", [(128, 256), (60, 100)])
def test_the_frame_between_equals_pytorchs(ours, theirs, size, time):
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.random((2, 3, 9, 9), np.float32))
    frames = functional.interpolate(coarse, size, mode="bicubic").clip(0, 1)
    height, width = size
    beyond = (0, padded(width) - width, 0, padded(height) - height)
    first, second = (functional.pad(frame[None], beyond) for frame in frames)
    with torch.no_grad():
        want, flow = theirs(first, second, time)
    assert flow.abs().max() > 3, "pixels move far enough to be compared"
    got = ours(*(mx.array(channels_last(frame[None])) for frame in frames), time)
    assert relative_error(got, channels_last(want)[:, :height, :width]) < BOUND


def test_settling_changes_nothing(ours):
    first, second = mx.random.uniform(shape=(2, 1, 40, 60, 3), key=mx.random.key(0))
    assert mx.array_equal(ours(first, second, 0.5), ours(first, second, 0.5, settle=mx.eval))


@pytest.mark.parametrize("reach", [0.4, 30])
def test_pixels_come_from_where_the_flow_points(reach):
    rng = np.random.default_rng(2)
    image, flow = rng.random((1, 5, 11, 9), np.float32), rng.normal(0, reach, (1, 2, 11, 9)).astype(np.float32)
    got = warp(mx.array(np.moveaxis(image, 1, -1)), mx.array(np.moveaxis(flow, 1, -1)))
    assert relative_error(got, channels_last(moved(torch.from_numpy(image), torch.from_numpy(flow)))) < BOUND


@pytest.mark.parametrize("scale", [1, 2, 4, 8, 16])
def test_sizes_change_as_pytorch_changes_them(scale):
    x = torch.from_numpy(np.random.default_rng(3).random((1, 5, 32, 48), np.float32))
    last = mx.array(channels_last(x))
    assert relative_error(shrink(last, scale), channels_last(resized(x, 1 / scale))) < 1e-6
    assert relative_error(enlarge(last, scale), channels_last(resized(x, scale))) < 1e-6


def test_doubling_is_a_transposed_convolution_and_pixels_are_shuffled():
    reference, layer = nn.ConvTranspose2d(6, 8, 4, 2, 1), rife.Doubling(6, 8)
    layer.weight = mx.array(reference.weight.detach().numpy().transpose(1, 2, 3, 0))
    layer.bias = mx.array(reference.bias.detach().numpy())
    x = torch.from_numpy(np.random.default_rng(4).random((2, 6, 5, 7), np.float32))
    got = layer(mx.array(channels_last(x)))
    assert relative_error(got, channels_last(reference(x))) < 1e-5
    assert relative_error(pixel_shuffle(got), channels_last(nn.PixelShuffle(2)(reference(x)))) < 1e-5


def test_the_published_file_has_these_names(tmp_path):
    """flownet.pkl of 4.25 and 4.26: 158 tensors that the network needs, and 40 that only training needed."""
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in Reference(RIFEConfig()).state_dict().items()}
    assert author_shapes(RIFEConfig()) == theirs
    assert (len(theirs), len(training_shapes())) == (158, 40)
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(RIFE()).values()) == 5_664_776


def test_every_published_layout_gives_the_same_network(ours, weights, tmp_path):
    both = weights | random_weights({name: (1, *shape[1:]) for name, shape in training_shapes().items()})
    torch.save({f"module.{name}": torch.from_numpy(array) for name, array in both.items()}, tmp_path / "flownet.pkl")
    save_file(mlx_community(weights), tmp_path / "model.safetensors")
    frames = mx.random.uniform(shape=(2, 1, 20, 30, 3), key=mx.random.key(1))
    want = ours(*frames)
    for name in ("flownet.pkl", "model.safetensors"):
        assert mx.array_equal(load_rife(tmp_path / name)(*frames), want), name




@pytest.mark.parametrize("change, said", [
    (lambda arrays: arrays.pop("block4.lastconv.0.bias"), r"lacks block4\.lastconv\.0\.bias"),
    (lambda arrays: arrays.update(other=np.ones(3, np.float32)), "holds unexpected other"),
    (lambda arrays: arrays.pop("block4.conv0.1.0.bias"), r"is no RIFE 4\.25 or 4\.26 .*: it has no block4\.conv0"),
    (lambda arrays: arrays["block1.convblock.0.conv.weight"].fill(0), "only zeros"),
    (lambda arrays: arrays["encode.cnn0.bias"].fill(np.nan), "NaN"),
])  # fmt: skip
def test_a_file_that_is_no_whole_rife_is_refused(weights, tmp_path, change, said):
    arrays = {name: array.copy() for name, array in weights.items()}
    change(arrays)
    save_file(arrays, tmp_path / "flownet.safetensors")
    with pytest.raises(WeightsError, match=said):
        load_rife(tmp_path / "flownet.safetensors")


def test_frames_of_another_shape_or_too_large_are_refused(ours):
    frame = mx.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"\(1, 8, 9, 3\), expected twice \(1, H, W, 3\)"):
        ours(frame, mx.zeros((1, 8, 9, 3)))
    vast = mx.broadcast_to(mx.zeros(1), (1, 9000, 9000, 3))
    with pytest.raises(ValueError, match="9000x9000, too large for RIFE; nearest: 8192x8192"):
        ours(vast, vast)
