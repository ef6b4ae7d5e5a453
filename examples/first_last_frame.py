"""First and last frame to video: two pictures, and a prompt for the way from one to the other.

python examples/first_last_frame.py --first one.png --last two.png --prompt "the flower opens"
"""

import argparse
from pathlib import Path

import wan_mlx

SOURCES = Path(__file__).parent / "sources"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-FLF2V-14B-720P", help="a folder, or a hub id of an FLF2V model")
parser.add_argument("--first", default=SOURCES / "first.png")
parser.add_argument("--last", default=SOURCES / "last.png", help="is cut to the first one's size if it has another")
parser.add_argument("--prompt", default="a red circle moves right on a blue background")
parser.add_argument("--output", default="first_last_frame.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
video = pipe(args.prompt, image=args.first, last_image=args.last, seed=42)
print(video.save(args.output))
