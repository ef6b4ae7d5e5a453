"""Text to image: several stills of one prompt, one for each seed, with the model loaded once.

python examples/text_to_image.py
python examples/text_to_image.py --model Wan-AI/Wan2.1-T2V-14B --prompt "a lighthouse at dusk" --count 4
"""

import argparse
from pathlib import Path

import wan_mlx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="nano", help="nano (bundled), a folder, or a hub id of a T2V model")
parser.add_argument("--prompt", default="a yellow star spins on a black background")
parser.add_argument("--count", type=int, default=3)
parser.add_argument("--folder", type=Path, default=Path("stills"))
args = parser.parse_args()

args.folder.mkdir(parents=True, exist_ok=True)
pipe = wan_mlx.WanPipeline.from_pretrained(args.model)
for still in pipe.images(args.prompt, num_images=args.count, seed=42):
    # The seed makes the same picture again; with all the other settings it is in the PNG's text, too.
    print(still.save(args.folder / f"seed{still.settings['seed']}.png"))
