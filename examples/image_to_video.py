"""Image to video: a picture is the first frame, the prompt says what happens. By itself with nano-i2v, in the package.

python examples/image_to_video.py
python examples/image_to_video.py --model Wan-AI/Wan2.1-I2V-14B-480P --image my.jpg --prompt "she turns and smiles"
"""

import argparse
from pathlib import Path

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="nano-i2v", help="nano-i2v, a folder, or a hub id of an I2V model")
parser.add_argument("--image", default=Path(__file__).parent / "first_frame.png")
parser.add_argument("--prompt", default="the yellow star moves up")
parser.add_argument("--output", default="image_to_video.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
# The video has the picture's proportions; width and height, if given, say how large its area is.
video = pipe(args.prompt, image=args.image, seed=42)
print(video.save(args.output), f"{video.frames.shape[2]}x{video.frames.shape[1]}")
