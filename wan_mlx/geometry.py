"""How pixels and frames become latents, and latents tokens: every question of sizes that depends on the model.

A causal VAE makes one latent frame of a video's first frame and one of every ``temporal`` frames after it; the
transformer makes one token of each patch of latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_SIDE = 16_384  # pixels
LANDSCAPE = {"480p": (832, 480), "720p": (1280, 720)}  # as the official code calls these sizes
LIKE = 0.03  # by which proportions may differ that go by one name: 832x480 is 16:9
MOST_FRAMES = 100_001


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model's latents and tokens.

    Attributes:
        temporal: frames per latent frame, except the first, which stands for one.
        spatial: pixels per latent along height and width.
        patch: (t, h, w), latents per token along each axis.
        together: so many tokens along each side go together: in S2V, where older frames have fewer of them.
    """

    temporal: int
    spatial: int
    patch: tuple[int, int, int]
    together: int = 1

    @property
    def side(self) -> int:
        """The number of pixels of which widths and heights are multiples: a token's side, or that of several."""
        return self.spatial * math.lcm(*self.patch[1:]) * self.together

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video; of a length that is not allowed, those of the longest allowed one below it."""
        return (num_frames - 1) // self.temporal + 1

    def num_frames(self, latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        return (latent_frames - 1) * self.temporal + 1

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int]:
        """``(t, h, w)`` of a video's latents."""
        return self.latent_frames(num_frames), height // self.spatial, width // self.spatial

    def seq_len(self, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of latents (t, h, w)."""
        return math.prod(n // p for n, p in zip(latent_shape, self.patch, strict=True))

    def nearest_side(self, pixels: float) -> int:
        """The allowed width or height nearest to ``pixels``."""
        return max(1, round(min(pixels, LARGEST_SIDE) / self.side)) * self.side

    def nearest_frames(self, num_frames: int) -> int:
        """The allowed number of frames nearest to ``num_frames``."""
        return self.num_frames(max(1, round((min(num_frames, MOST_FRAMES) - 1) / self.temporal) + 1))

    def named_size(self, name: str, size: tuple[int, int]) -> tuple[int, int]:
        """The width and height that a name stands for, of a model whose own ``size`` this is.

        Args:
            name: one of `LANDSCAPE`, or a ratio such as "16:9", which has at most as many pixels as ``size``, and is
                ``size`` itself, upright or not, if its proportions are those.
        """
        if name in LANDSCAPE:
            width, height = LANDSCAPE[name]
            return self.nearest_side(width), self.nearest_side(height)
        across, down = map(int, name.split(":"))
        if across < down:
            width, height = self.named_size(f"{down}:{across}", size)
            return height, width
        most = max(math.prod(size), self.side**2)

        def off(pair: tuple[int, int]) -> float:
            """How far it is from the proportions, which count twice, and from ``most``."""
            return 2 * abs(math.log(pair[0] / pair[1] * down / across)) + math.log(most / math.prod(pair))

        own = max(size), min(size)
        if abs(own[0] / own[1] * down / across - 1) <= LIKE:
            return own
        widths = range(self.side, min(most // self.side, LARGEST_SIDE) + 1, self.side)
        pairs = ((width, min(self.nearest_side(width * down / across), most // width // self.side * self.side))
                 for width in widths)  # fmt: skip
        return min(pairs, key=off)

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError, with the nearest valid choice, unless videos can have this size."""
        for name, pixels in (("width", width), ("height", height)):
            if not self.side <= pixels <= LARGEST_SIDE or pixels % self.side:
                most = f" up to {LARGEST_SIDE}" * (pixels > LARGEST_SIDE)
                raise ValueError(f"{name} is {pixels}, expected a positive multiple of {self.side}{most}; "
                                 f"nearest: {self.nearest_side(pixels)}")  # fmt: skip

    def check_frames(self, num_frames: int) -> None:
        """Raise ValueError, with the nearest valid choice, unless videos can have this many frames."""
        if not 1 <= num_frames <= MOST_FRAMES or self.num_frames(self.latent_frames(num_frames)) != num_frames:
            most = f" up to {MOST_FRAMES}" * (num_frames > MOST_FRAMES)
            raise ValueError(
                f"frames is {num_frames}, expected {self.temporal}n+1 (1, {self.num_frames(2)}, ..., "
                f"{self.num_frames(21)}, ...){most}; nearest: {self.nearest_frames(num_frames)}"
            )


WAN_2_1 = Geometry(temporal=4, spatial=8, patch=(1, 2, 2))
