"""VACE, control: a video of depth, poses, outlines or scribbles says where things are, the prompt says what they are.

    python examples/vace_control.py --guide depth.mp4 --prompt "a lion walks through the snow"

Such videos are made from others with tools such as Depth Anything, DWPose or an edge detector.
"""

import argparse
from pathlib import Path

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-VACE-1.3B", help="a folder, or a hub id of a VACE model")
parser.add_argument("--guide", default=Path(__file__).parent / "sources/guide.mp4")
parser.add_argument("--scale", type=float, default=1.0, help="how strictly the guide is followed")
parser.add_argument("--prompt", default="a red ball rolls to the right")
parser.add_argument("--output", default="vace_control.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
video = pipe(args.prompt, src_video=args.guide, context_scale=args.scale, seed=42)
print(video.save(args.output))
