"""Sizes of the networks, with the names of the official configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..geometry import Geometry

NUM_TRAIN_TIMESTEPS = 1000
TEXT_LEN = 512
AUDIO_INJECT_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # of the released S2V, of 40 layers


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer. ``model_type`` is t2v, i2v, flf2v, vace, ti2v, control, s2v or animate;
    ``image_dim`` is the width of CLIP's features, None for Wan2.2's I2V-A14B, which reads none; ``ref_dim`` the
    channels of the latents of Fun-Control's reference image, which no other model reads.

    S2V's: ``audio_inject_layers`` are followed by sound; ``audio_layers`` hidden states of ``audio_dim`` become
    ``audio_tokens`` and one more for each latent frame, and, with ``audio_adain``, the norm before them is the sound's
    too. Animate's: ``face_layers``, after which the face is looked at; ``motion_widths``, the channels of its motion
    encoder at each resolution; ``motion_dims``: the width of a picture's features, the number of directions, and their
    width; ``face_dims``: the width of the face encoder, and into how many tokens it makes a frame.
    """

    model_type: str = "t2v"
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = TEXT_LEN
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = 1280
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 96
    ref_dim: int | None = None
    audio_inject_layers: tuple[int, ...] = ()
    audio_layers: int = 25
    audio_dim: int = 1024
    audio_tokens: int = 4
    audio_adain: bool = True
    face_layers: tuple[int, ...] = ()
    motion_widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_dims: tuple[int, ...] = (512, 20, 512)
    face_dims: tuple[int, ...] = (1024, 4)

    @property
    def face_side(self) -> int:
        """Pixels along each side of the pictures of a face."""
        return 4 * 2 ** (len(self.motion_widths) - 1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def has_image_branch(self) -> bool:
        """Whether cross-attention also reads CLIP features (``k_img``, ``v_img``)."""
        return self.model_type in ("i2v", "flf2v", "animate") and self.image_dim is not None

    @property
    def hears(self) -> bool:
        """Whether it takes what an audio encoder makes of sound."""
        return self.model_type == "s2v"

    @property
    def kind(self) -> tuple[str, bool, int]:
        """What models of one kind share, whatever their width: they take the same inputs."""
        return self.model_type, self.has_image_branch, self.out_dim


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the umT5 encoder; the defaults are umT5-XXL's."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of CLIP's vision tower; the defaults are ViT-H/14's. ``num_layers`` includes the last, which never runs."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_ratio: int = 4
    num_heads: int = 16
    num_layers: int = 32
    eps: float = 1e-5


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes of wav2vec 2.0; the defaults are those of its large XLSR form."""

    dim: int = 1024
    ffn_dim: int = 4096
    num_heads: int = 16
    num_layers: int = 24
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    pos_kernel: int = 128
    pos_groups: int = 16
    eps: float = 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal 3D VAE; the defaults are Wan2.1's. ``mean`` and ``std`` normalise each latent channel."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    patch: ClassVar[int] = 1  # pixels of a side that the encoder takes as one, with more channels
    narrowing: ClassVar[int] = 2  # by what each upsampling divides the channels

    @property
    def decoder_dim(self) -> int:
        """The decoder's ``dim``."""
        return self.dim

    @property
    def geometry(self) -> Geometry:
        """The sizes of its latents, each a patch of its own."""
        spatial = self.patch * 2 ** len(self.temporal_downsample)
        return Geometry(2 ** sum(self.temporal_downsample), spatial, patch=(1, 1, 1))


@dataclass(frozen=True)
class VAE22Config(VAEConfig):
    """Sizes of the VAE of Wan2.2 TI2V-5B; the defaults are the released one's."""

    dim: int = 160
    z_dim: int = 48
    mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    )  # fmt: skip
    std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    )  # fmt: skip
    decoder_dim: int = 256  # the decoder is wider than the encoder

    patch: ClassVar[int] = 2
    narrowing: ClassVar[int] = 1


def geometry_of(transformer: TransformerConfig, vae: VAEConfig) -> Geometry:
    """The sizes of latents and tokens of a model with these two networks."""
    together = 4 if transformer.hears else 1
    return replace(vae.geometry, patch=transformer.patch_size, together=together)
