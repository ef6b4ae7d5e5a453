"""Video to video: a text-to-video model starts from a clip instead of from noise alone, and keeps some of it.

    python examples/video_to_video.py
    python examples/video_to_video.py --model Wan-AI/Wan2.1-T2V-1.3B --video my.mp4 --prompt "as a pencil drawing"

With nano the red circle of examples/sources/clip.mp4 turns green; it moves right, too.
"""

import argparse
from pathlib import Path

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="nano", help="nano (bundled), a folder, or a hub id of a T2V model")
parser.add_argument("--video", default=Path(__file__).parent / "sources/clip.mp4")
parser.add_argument("--mask", help="what to make anew, in white; the rest of the clip stays")
parser.add_argument("--prompt", default="a green circle moves right on a blue background")
parser.add_argument("--strength", type=float, default=0.7, help="near 0 keeps the clip, 1 replaces it")
parser.add_argument("--output", default="video_to_video.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
# The clip is read at 16 frames per second, from its start, and cut to the size; its frames may also be an array.
video = pipe(args.prompt, video=args.video, src_mask=args.mask, strength=args.strength, seed=42)
print(video.save(args.output))
