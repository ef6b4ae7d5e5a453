"""VACE, references: pictures of who or what should appear in the video.

    python examples/vace_references.py girl.png snake.png --prompt "the girl plays with the snake"

Each picture is fitted onto white; one thing alone on a plain background works best.
"""

import argparse
from pathlib import Path

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-VACE-1.3B", help="a folder, or a hub id of a VACE model")
parser.add_argument("images", nargs="*", default=[Path(__file__).parent / "sources/first.png"])
parser.add_argument("--prompt", default="a red circle moves right on a blue background")
parser.add_argument("--output", default="vace_references.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
video = pipe(args.prompt, src_ref_images=args.images, seed=42)
print(video.save(args.output))
