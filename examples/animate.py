"""Animate: the person of a picture moves as another one does in a video, from a folder that the official tool prepared.

    python examples/animate.py prepared
    python examples/animate.py prepared --replace  # the person takes the other's place, lit as the scene is

docs/tasks.md says how the folder is prepared; its videos set the size and the length.
"""

import argparse

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="with src_pose.mp4, src_face.mp4, src_ref.png")
parser.add_argument("--model", default="Wan-AI/Wan2.2-Animate-14B", help="a folder, or a hub id of an Animate model")
parser.add_argument("--replace", action="store_true", help="the folder has src_bg.mp4 and src_mask.mp4, too")
parser.add_argument("--frames", type=int, help="of a clip, each of which goes on from the one before; 77 by default")
parser.add_argument("--output", default="animate.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model, use_relighting_lora=args.replace)
video = pipe("", src_root_path=args.folder, replace_flag=args.replace, num_frames=args.frames, seed=42)
print(video.save(args.output), f"{len(video.frames)} frames of {video.frames.shape[2]}x{video.frames.shape[1]}")
