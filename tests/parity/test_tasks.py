"""The conditioning of every task against the official arithmetic, restated here in PyTorch and channels first.

Both sides ask the same stand-ins for VAE and CLIP, linear in every pixel, and once the official VAE at a tiny size.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from oracles import relative_error
from PIL import Image
from test_vae import pair, scale
from torch.nn.functional import interpolate

from wan_mlx.media.read import cover
from wan_mlx.models.configs import VAEConfig
from wan_mlx.tasks import TASKS, i2v, vace
from wan_mlx.types import Request

BOUND = 2e-5
VAE_BOUND = 5e-5
# Antialiased resizing in 8 bits: one level here and there.
RESIZED_BOUND = 0.03
SEED = 3


class StandIns:
    """Encoders whose every output says which pixels went in: random projections of 8x8 squares of four frames."""

    latent_channels, reads_images = 16, True

    def __init__(self):
        rng = np.random.default_rng(0)
        self.square = rng.normal(size=(4 * 8 * 8 * 3, 16)).astype(np.float32) / 28
        self.texts, self.images, self.video_calls = [], None, 0

    def encode_text(self, texts):
        self.texts += texts
        return [mx.full((1, 512, 4), len(text)) for text in texts]

    def encode_images(self, images):
        self.images = np.array(images)
        return mx.full((len(self.images), 257, 8), 0.5)

    def encode_videos(self, videos):
        self.video_calls += 1
        return [mx.array(np.concatenate([self.latents(np.array(c)) for c in video], axis=1)) for video in videos]

    def latents(self, chunk):
        _, n, height, width, _ = chunk.shape
        assert chunk.dtype == np.float32 and n in (1, 4)
        squares = chunk.reshape(n, height // 8, 8, width // 8, 8, 3).transpose(1, 3, 0, 2, 4, 5)
        squares = squares.reshape(height // 8, width // 8, -1)
        return (squares @ self.square[-squares.shape[-1] :])[None, None]

    def official(self, video: torch.Tensor) -> torch.Tensor:
        """(3, T, H, W) → (16, t, h, w)."""
        video = video.movedim(0, -1).numpy()[None]
        starts = [0, *range(1, video.shape[1], 4)]
        chunks = [video[:, a:b] for a, b in zip(starts, [*starts[1:], video.shape[1]], strict=True)]
        return torch.tensor(np.concatenate([self.latents(c) for c in chunks], axis=1))[0].movedim(-1, 0)


class TinyVAE(StandIns):
    """The VAE is the real one: ours, and the official class with the same weights."""

    def __init__(self):
        super().__init__()
        config = VAEConfig(dim=8)
        self.theirs, self.ours = pair(config)
        self.scale = scale(config)

    def encode_videos(self, videos):
        return [self.ours.encode_chunks(video) for video in videos]

    def official(self, video):
        return self.theirs.encode(video[None], self.scale)[0]


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def noise_video(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def request(task: str, size: tuple[int, int], num_frames: int, **sources) -> Request:
    """``size`` is (width, height)."""
    return Request("prompt", "not this", *size, num_frames, 1, 5.0, 5.0, "unipc", SEED, task=task, **sources)


def first(array: mx.array) -> np.ndarray:
    """(1, t, h, w, C) → (C, t, h, w), as the official code has it."""
    assert array.shape[0] == 1 and array.dtype == mx.float32
    return np.moveaxis(np.array(array[0]), -1, 0)


def official_image(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) → (3, H, W) in [-1, 1]."""
    return (torch.tensor(image).movedim(-1, 0).float() / 255 - 0.5) / 0.5


def official_y(encoders, images: list[np.ndarray], size: tuple[int, int], num_frames: int) -> torch.Tensor:
    """Mask and latents, (20, t, h, w), of a video with one image at its start and perhaps one at its end."""
    width, height = size
    video = torch.zeros(3, num_frames, height, width)
    mask = torch.zeros(1, num_frames, height // 8, width // 8)
    for at, image in zip((0, -1), images, strict=False):
        video[:, at] = interpolate(official_image(image)[None], size=(height, width), mode="bicubic")[0]
        mask[:, at] = 1
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, -1, 4, *mask.shape[2:]).transpose(1, 2)[0]
    return torch.cat([mask, encoders.official(video)])


def official_noise(num_latents: int, size: tuple[int, int]) -> torch.Tensor:
    shape = (16, num_latents, size[1] // 8, size[0] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def check_texts_and_noise(got, encoders, num_latents: int, size: tuple[int, int]) -> None:
    assert encoders.texts == ["prompt", "not this"]
    assert got.context[0, 0, 0] == len("prompt") and got.negative_context[0, 0, 0] == len("not this")
    np.testing.assert_allclose(first(got.noise), official_noise(num_latents, size), atol=1e-6)


SHAPES = [(5, (48, 32), (50, 75)), (9, (16, 80), (201, 41)), (17, (64, 32), (19, 37)), (81, (32, 16), (16, 32))]


@pytest.mark.parametrize("num_frames, size, image_size", SHAPES)
def test_i2v(num_frames, size, image_size):
    encoders, image = StandIns(), noise_image(*image_size)
    got = TASKS["i2v"].condition(request("i2v", size, num_frames, image=image), encoders)
    want = official_y(encoders, [image], size, num_frames)
    assert np.array_equal(first(got.condition)[:4], want[:4])
    assert relative_error(first(got.condition), want) <= BOUND
    np.testing.assert_allclose(encoders.images[0], official_image(image).movedim(0, -1), atol=1e-6)
    assert got.image_features.shape == (1, 257, 8)
    assert got.vace_context is None and got.trim_latents == 0
    check_texts_and_noise(got, encoders, (num_frames + 3) // 4, size)


@pytest.mark.parametrize("num_frames, size, image_size", SHAPES)
def test_flf2v(num_frames, size, image_size):
    encoders, images = StandIns(), [noise_image(*image_size), noise_image(*image_size, seed=1)]
    got = TASKS["flf2v"].condition(request("flf2v", size, num_frames, image=images[0], last_image=images[1]), encoders)
    want = official_y(encoders, images, size, num_frames)
    assert np.array_equal(first(got.condition)[:4], want[:4])
    assert relative_error(first(got.condition), want) <= BOUND
    for seen, image in zip(encoders.images, images, strict=True):
        np.testing.assert_allclose(seen, official_image(image).movedim(0, -1), atol=1e-6)
    assert got.image_features.shape == (2, 257, 8)
    check_texts_and_noise(got, encoders, (num_frames + 3) // 4, size)


def official_cover(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 (T, H, W, 3) → uint8 (T, 3, height, width): the smallest size that covers, then the middle of it."""
    frames = torch.tensor(frames).movedim(-1, 1)
    ratio = max(width / frames.shape[3], height / frames.shape[2])
    size = [round(ratio * n) for n in frames.shape[2:]]
    if size != list(frames.shape[2:]):
        frames = interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width]


@pytest.mark.parametrize("last_size", [(60, 90), (31, 20), (80, 40)])
def test_flf2v_last_image_takes_the_size_of_the_first(last_size):
    encoders, images = StandIns(), [noise_image(40, 60), noise_image(*last_size, seed=1)]
    got = i2v.condition(request("flf2v", (48, 32), 9, image=images[0], last_image=images[1]), encoders)
    last = official_cover(images[1][None], 40, 60)[0].movedim(0, -1).numpy()
    want = official_y(encoders, [images[0], last], (48, 32), 9)
    assert np.array_equal(first(got.condition)[:4], want[:4])
    assert relative_error(first(got.condition), want) <= RESIZED_BOUND
    assert encoders.images.shape == (2, 40, 60, 3)


@pytest.mark.parametrize("size", [(480, 832), (1080, 1920), (250, 250), (97, 640)])
@pytest.mark.parametrize("target", [(64, 96), (160, 48)])
def test_cover(size, target):
    """Within one level of PyTorch, and nearly everywhere equal."""
    frame = noise_image(*size)
    difference = np.abs(
        cover(frame, *target) - official_cover(frame[None], *target)[0].movedim(0, -1).numpy().astype(int)
    )
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def official_pick(times: np.ndarray, count: int) -> list[int]:
    """The first frame during which, ends included, each of ``count`` moments up to the middle of the last falls."""
    moments = np.linspace(0.0, float(times[-1].mean()), count)[:, None]
    return ((moments >= times[:, 0]) & (moments <= times[:, 1])).argmax(axis=1).tolist()


def official_context(encoders, size, num_frames, video=None, mask=None, references=()) -> torch.Tensor:
    """(96, n + t, h, w); ``video`` uint8 (T, H, W, 3) at 16 frames per second, ``mask`` alike."""
    width, height = size
    if video is None:
        frames = torch.zeros(3, num_frames, height, width)
        grey = torch.ones(1, num_frames, height, width)
    else:
        starts = np.arange(len(video)) / 16
        chosen = official_pick(np.stack([starts, starts + 1 / 16], axis=1).astype(np.float32), num_frames)
        frames = official_cover(video[chosen], height, width).transpose(0, 1) / 127.5 - 1
        grey = torch.ones(1, num_frames, height, width)
        if mask is not None:
            grey = official_cover(mask[chosen], height, width).transpose(0, 1)[:1] / 127.5 - 1
            grey = ((grey + 1) / 2).clamp(0, 1)
    binary = (grey > 0.5).float()
    latents = torch.cat([encoders.official(frames * (1 - binary)), encoders.official(frames * binary)])
    # 8x8 pixels to channels; the mask's grey levels count here.
    squares = grey[0].view(num_frames, height // 8, 8, width // 8, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)
    to = ((num_frames + 3) // 4, height // 8, width // 8)
    squares = interpolate(squares[None], size=to, mode="nearest-exact")[0]
    for reference in reversed(references):
        latent = encoders.official(official_letterbox(reference, height, width)[:, None])
        latents = torch.cat([torch.cat([latent, torch.zeros_like(latent)]), latents], dim=1)
        squares = torch.cat([torch.zeros_like(squares[:, :1]), squares], dim=1)
    return torch.cat([latents, squares])


def official_letterbox(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    image = official_image(image)
    if image.shape[1:] == (height, width):
        return image
    ratio = min(height / image.shape[1], width / image.shape[2])
    inner = int(image.shape[1] * ratio), int(image.shape[2] * ratio)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = torch.ones(3, height, width)
    resized = interpolate(image[None], size=inner, mode="bilinear", align_corners=False)[0]
    canvas[:, top : top + inner[0], left : left + inner[1]] = resized
    return canvas


def vace_sources(names: str, num_frames: int, size: tuple[int, int]) -> dict:
    """``names``: v for a video, m for a mask, each r for a reference image of another shape."""
    width, height = size
    sources = {}
    if "v" in names:
        sources["video"] = noise_video(num_frames, height, width)
    if "m" in names:
        sources["mask"] = noise_video(num_frames, height, width, seed=1)
    shapes = [(height, width), (50, 31), (23, 99)]
    sources["references"] = [noise_image(*shapes[i], seed=i) for i in range(names.count("r"))]
    return sources


def condition_vace(encoders, size, num_frames, video=None, mask=None, references=(), **options):
    given = request(
        "vace", size, num_frames, src_video=video, src_mask=mask, src_ref_images=tuple(references), **options
    )
    return TASKS["vace"].condition(given, encoders)


@pytest.mark.parametrize("names", ["v", "m", "r", "vm", "vr", "vmr", "rr", "vmrrr"])
@pytest.mark.parametrize(
    "num_frames, size", [(5, (48, 32)), (9, (16, 80)), (17, (64, 32)), (81, (32, 16)), (1, (32, 32))]
)
def test_vace(names, num_frames, size):
    encoders, sources = StandIns(), vace_sources(names, num_frames, size)
    got = condition_vace(encoders, size, num_frames, **sources, context_scale=0.7)
    want = official_context(encoders, size, num_frames, **({**sources, "mask": None} if names == "m" else sources))
    context, references = first(got.vace_context), names.count("r")
    assert context.shape == want.shape == (96, (num_frames + 3) // 4 + references, size[1] // 8, size[0] // 8)
    for part in (slice(0, 16), slice(16, 32), slice(32, 96)):
        if want[part].any():
            assert relative_error(context[part], want[part]) <= BOUND
        else:
            assert not context[part].any()
    assert got.trim_latents == references and got.context_scale == 0.7
    assert got.condition is None and got.image_features is None
    assert encoders.video_calls == 1  # the VAE is read once
    check_texts_and_noise(got, encoders, (num_frames + 3) // 4 + references, size)


@pytest.mark.parametrize("shape", [(23, 41, 90), (40, 120, 64), (30, 33, 33)])
def test_vace_source_of_another_size_and_length(shape):
    encoders, size = StandIns(), (64, 32)
    video, mask = noise_video(*shape), noise_video(shape[0], 64, 64, seed=1) // 200 * 255
    got = condition_vace(encoders, size, 17, video, mask)
    want = official_context(encoders, size, 17, video, mask)
    for part in (slice(0, 16), slice(16, 32)):
        # The resized mask has greys on either side of the middle, where a level decides: nearly all pixels, not all.
        assert np.median(np.abs(first(got.vace_context)[part] - want[part].numpy())) <= 1e-3
    assert np.abs(first(got.vace_context)[32:] - want[32:].numpy()).max() <= 1.01 / 255
    got, want = condition_vace(encoders, size, 17, video), official_context(encoders, size, 17, video)
    assert relative_error(first(got.vace_context), want) <= RESIZED_BOUND


def test_vace_still_mask_covers_the_video():
    encoders, video = StandIns(), noise_video(9, 32, 48)
    mask = np.zeros((32, 48), np.uint8)
    mask[8:20, 16:] = 255
    got = condition_vace(encoders, (48, 32), 9, video, Image.fromarray(mask))
    want = condition_vace(encoders, (48, 32), 9, video, np.repeat(mask[None], 9, axis=0))
    assert mx.array_equal(got.vace_context, want.vace_context)


def test_vace_mask_alone_is_reported(caplog):
    condition_vace(StandIns(), (48, 32), 5, mask=noise_video(5, 32, 48))
    assert "mask is not used" in caplog.text


@pytest.mark.parametrize("count", [1, 5, 17, 81, 117])
@pytest.mark.parametrize("rate", [12, 16, 23.976, 24, 30, 60])
def test_frames_picked_from_a_source(count, rate):
    for length in (count, count + 3, 119, 240):
        starts = np.arange(length) / rate
        times = np.stack([starts, np.append(starts[1:], length / rate)], axis=1).astype(np.float32)
        got = vace.spread(times, count)
        assert got == official_pick(times, count)
        assert got[0] == 0 and (count == 1 or got[-1] == length - 1)


def test_at_a_boundary_the_earlier_frame_is_picked():
    starts = np.arange(20) / 16
    times = np.stack([starts, starts + 1 / 16], axis=1).astype(np.float32)
    got = vace.spread(times, 13)  # the ninth moment is 13/16 of a second, exactly
    assert got == official_pick(times, 13) and got[8] == 12


@pytest.mark.parametrize("num_frames", [5, 17])
@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_with_the_official_vae(task, num_frames):
    encoders, size = TinyVAE(), (48, 32)
    if task == "vace":
        sources = vace_sources("vmrr", num_frames, size)
        got = condition_vace(encoders, size, num_frames, **sources).vace_context
        want = official_context(encoders, size, num_frames, **sources)
    else:
        images = [noise_image(50, 61), noise_image(50, 61, seed=1)][: 1 + (task == "flf2v")]
        sources = dict(zip(("image", "last_image"), images, strict=False))
        got = TASKS[task].condition(request(task, size, num_frames, **sources), encoders).condition
        want = official_y(encoders, images, size, num_frames)
    assert relative_error(first(got), want) <= VAE_BOUND


@pytest.mark.parametrize(
    "image_size, area, want",
    [
        ((1280, 720), 832 * 480, (832, 464)),
        ((720, 1280), 480 * 832, (464, 832)),
        ((1000, 1000), 832 * 480, (624, 624)),
        ((1920, 1080), 1280 * 720, (1280, 720)),
        ((640, 480), 1280 * 720, (1104, 816)),
        ((333, 999), 832 * 480, (352, 1088)),
    ],
)
def test_output_size_follows_the_image(image_size, area, want):
    assert i2v.output_size(image_size, area) == want
    aspect = image_size[1] / image_size[0]
    official = [round(np.sqrt(area / r) // 8 // 2 * 2) * 8 for r in (aspect, 1 / aspect)]
    assert i2v.output_size(image_size, area) == tuple(official)


@pytest.mark.parametrize(
    "source, area, num_frames, want",
    [
        ((81, 480, 832), 832 * 480, 81, (832, 480, 81)),
        ((81, 1080, 1920), 832 * 480, 81, (832, 480, 81)),
        ((500, 832, 480), 832 * 480, 81, (480, 832, 81)),
        ((80, 480, 832), 832 * 480, 81, (832, 480, 77)),  # a shorter source, a shorter video
        ((300, 240, 320), 832 * 480, 81, (320, 240, 297)),  # a smaller one may be longer, within as many tokens
        ((1, 480, 832), 832 * 480, 81, (832, 480, 1)),
        ((90, 720, 1280), 1280 * 720, 33, (1280, 720, 33)),
    ],
)
def test_output_shape_follows_the_source_video(source, area, num_frames, want):
    """What the official ``VaceVideoProcessor`` gives, with its 75,600 or 32,760 tokens where there are 81 frames."""
    assert vace.output_shape(source, area, num_frames) == want


@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_one_text_without_guidance(task):
    encoders, image = StandIns(), noise_image(32, 48)
    sources = {"src_ref_images": (image,)} if task == "vace" else {"image": image, "last_image": image}
    given = Request("prompt", "no", 48, 32, 5, 1, 1.0, 5.0, "unipc", SEED, task=task, **sources)
    assert TASKS[task].condition(given, encoders).negative_context is None and encoders.texts == ["prompt"]


@pytest.mark.parametrize(
    "task, num_frames, sources, message",
    [
        ("i2v", 5, {}, "needs an image: give it with --image FILE"),
        ("i2v", 5, {"image": "nowhere.png"}, "image nowhere.png does not exist"),
        ("flf2v", 5, {"image": noise_image(8, 8)}, "both images: give the other with --last-image FILE"),
        ("flf2v", 5, {"last_image": noise_image(8, 8)}, "both images: give the other with --image FILE"),
        ("flf2v", 1, {"image": noise_image(8, 8), "last_image": noise_image(8, 8)}, "frames is 1, .* nearest: 5"),
        ("vace", 5, {}, "needs a source video, a mask or reference images"),
        ("vace", 9, {"src_video": noise_video(6, 16, 16)}, "has 6 frames, expected at least 9; .* frames: 5"),
        ("vace", 5, {"src_video": noise_video(9, 16, 16), "src_mask": noise_video(8, 16, 16)},
         "mask the array has 8 frames, expected 9 as its video, or one"),
        ("vace", 5, {"src_ref_images": ("nowhere.png",)}, "image nowhere.png does not exist"),
    ],
)  # fmt: skip
def test_refused_in_one_line(task, num_frames, sources, message):
    encoders = StandIns()
    with pytest.raises(ValueError, match=message) as error:
        asked = request(task, (16, 16), num_frames, **sources)
        fitted = TASKS[task].fit(asked)
        TASKS[task].condition(replace(fitted, num_frames=num_frames), encoders)
    assert "\n" not in str(error.value) and not encoders.texts  # before any weights are read


def test_too_narrow_to_make_a_video_of():
    with pytest.raises(ValueError, match="10000x2 is too narrow"):
        i2v.output_size((10000, 2), 832 * 480)
    for shape in ((9, 15, 300), (9, 16, 160000), (9, 160000, 16)):
        with pytest.raises(ValueError, match="too small or too narrow"):
            vace.output_shape(shape, 832 * 480, 81)
