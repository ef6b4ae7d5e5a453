"""First and last frame to video. Follows the official ``wan/first_last_frame2video.py``."""

from __future__ import annotations

from ..media.read import cover, read_image
from ..types import Conditioning, Encoders, Request
from . import i2v


def fit(request: Request) -> Request:
    """The request with the proportions of its first image and about the requested area.

    Raises:
        ValueError: an image is missing or cannot be read, or the video is too short for both.
    """
    for name, image in (("first", request.image), ("last", request.last_image)):
        if image is None:
            raise ValueError(f"first and last frame to video needs both images, the {name} one was not given")
    if request.num_frames < (least := request.geometry.num_frames(latent_frames=2)):
        raise ValueError(f"frames is {request.num_frames}, expected room for a first and a last one; nearest: {least}")
    read_image(request.last_image)
    return i2v.fit(request)


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, noise, CLIP features of both images, and the latents of a video with only these two frames.

    Raises:
        ValueError: an image cannot be read.
    """
    first, last = read_image(request.image), read_image(request.last_image)
    # The official code intends to resize the last image to the first's size and crop it, but only crops or pads, with
    # width and height swapped. Here it is resized and cropped; images of one size come out the same.
    last = cover(last, *first.shape[:2])
    return i2v.condition_on_frames(request, encoders, {0: first, request.num_frames - 1: last})
