"""Speech to video: a picture says or sings what is heard. The video is as long as the sound, which it has.

    python examples/speech_to_video.py girl.png talk.wav --prompt "a girl speaks to the camera"
    python examples/speech_to_video.py girl.png talk.wav --clips 1 --recipe lightx2v-4step  # five seconds
"""

import argparse

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", help="who speaks")
parser.add_argument("audio", help="a recording of any format, or a video with sound")
parser.add_argument("--model", default="Wan-AI/Wan2.2-S2V-14B", help="a folder, or a hub id of an S2V model")
parser.add_argument("--prompt", default="a person speaks")
parser.add_argument("--size", default="832x480", help="as an area; the video has the picture's proportions")
parser.add_argument("--clips", type=int, help="make only so many clips of five seconds")
parser.add_argument("--recipe", help="fast sampling, with its LoRA")
parser.add_argument("--lora", action="append", default=[])
parser.add_argument("--output", default="speech_to_video.mp4")
args = parser.parse_args()

pipe = wan_mlx.WanPipeline.from_pretrained(args.model, loras=args.lora)
video = pipe(args.prompt, image=args.image, audio=args.audio, size=args.size, num_clip=args.clips, recipe=args.recipe,
             seed=42)  # fmt: skip
print(video.save(args.output), f"{len(video.frames) / video.fps:.1f} s of frames")
