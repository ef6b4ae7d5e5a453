"""VACE, extension and outpainting: what is not there yet is grey in the source and white in the mask.

    python examples/vace_extend.py --video my.mp4 --frames 81 --margin 0.25

The video is made longer (its frames come first) and, with --margin, wider on both sides.
"""

import argparse
from pathlib import Path

import numpy as np

import wan_mlx
from wan_mlx.media.read import at_rate, open_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-VACE-1.3B", help="a folder, or a hub id of a VACE model")
parser.add_argument("--video", default=Path(__file__).parent / "sources/clip.mp4")
parser.add_argument("--frames", type=int, default=81, help="4n+1, of the result")
parser.add_argument("--margin", type=float, default=0.25, help="of its width, added left and right")
parser.add_argument("--prompt", default="a red circle moves right on a blue background")
parser.add_argument("--output", default="vace_extend.mp4")
args = parser.parse_args()

clip = open_video(args.video)
numbers = at_rate(clip, 16, args.frames)  # Wan2.1 makes 16 frames per second
count, side = len(numbers), round(clip.width * args.margin)
source = np.full((args.frames, clip.height, clip.width + 2 * side, 3), 128, np.uint8)
mask = np.full(source.shape[:3], 255, np.uint8)
source[:count, :, side : side + clip.width] = list(clip.read(numbers))
mask[:count, :, side : side + clip.width] = 0

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
video = pipe(args.prompt, src_video=source, src_mask=mask, num_frames=args.frames, seed=42)
print(video.save(args.output))
