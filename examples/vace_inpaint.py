"""VACE, inpainting: what is white in a mask is made anew, the rest of the video stays.

    python examples/vace_inpaint.py --video my.mp4 --mask mask.mp4 --prompt "a blue bus drives past"

The mask is a picture for the whole video, or a video of as many frames.
"""

import argparse
from pathlib import Path

import wan_mlx

SOURCES = Path(__file__).parent / "sources"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-VACE-1.3B", help="a folder, or a hub id of a VACE model")
parser.add_argument("--video", default=SOURCES / "clip.mp4")
parser.add_argument("--mask", default=SOURCES / "mask.png")
parser.add_argument("--prompt", default="a yellow star moves right on a blue background")
parser.add_argument("--output", default="vace_inpaint.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
video = pipe(args.prompt, src_video=args.video, src_mask=args.mask, seed=42)
print(video.save(args.output))
