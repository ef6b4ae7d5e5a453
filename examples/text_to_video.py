"""Text to video: a prompt becomes five seconds of video (nano: one second).

python examples/text_to_video.py
python examples/text_to_video.py --model Wan-AI/Wan2.1-T2V-1.3B --prompt "a cat boxing on a stage"
"""

import argparse

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="nano", help="nano (bundled), a folder, or a hub id")
parser.add_argument("--prompt", default="a red circle moves right on a blue background")
parser.add_argument("--output", default="text_to_video.mp4", help=".mp4 .gif .webp .png .npz")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
# What is left out takes the model's default: size, frames, steps, guidance, shift. One seed, one video, anywhere.
video = pipe(args.prompt, seed=42)
print(video.save(args.output), f"{len(video.frames)} frames of {video.frames.shape[2]}x{video.frames.shape[1]}")
