"""The cases of ``same_bytes.py``: command lines of `wan_mlx.generate`, small enough for seconds each."""

from __future__ import annotations

from dataclasses import dataclass

# The command line with the step caches' constants of T2V-1.3B for nano too, wherever the package keeps them.
LEND_CONSTANTS = """
import sys
import wan_mlx
from wan_mlx.generate import main

wan_mlx.WanPipeline
for module in [module for name, module in sys.modules.items() if name.startswith("wan_mlx.")]:
    for table in ("TEACACHE", "MAGCACHE"):
        if hasattr(module, table):
            getattr(module, table)["nano"] = getattr(module, table)["t2v-1.3B"]
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Case:
    """Command lines, one after the other in one folder; INPUTS in them stands for the folder of the inputs.

    ``killed_at``: the first is killed when it has told of so many steps. The second is to go on with it, and the files
    of all are to be the same. ``program``: Python's arguments before them.
    """

    name: str
    commands: tuple[str, ...]
    killed_at: int = 0
    program: tuple[str, ...] = ("-m", "wan_mlx.generate")


NANO = "--model nano --seed 1 --prompt 'a red circle moves right on a blue background'"
SMALL = f"{NANO} --size 32x48 --frames 5 --steps 3"
NANO_I2V = (
    "--model nano-i2v --seed 1 --prompt 'a red circle moves right' --image INPUTS/circle.png --size 32x32 --frames 5"
)
# Of the random models, which take a tenth of nano's time.
TINY = "--seed 42 --prompt 'a cat boxing on a stage' --size 48x32 --frames 5 --steps 4 --shift 4"
T2V, I2V, FLF2V, VACE, DEEP = (f"--model INPUTS/{name} {TINY}" for name in ("t2v", "i2v", "flf2v", "vace", "deep"))
T2V_FREE = T2V.replace(" --steps 4 --shift 4", "")
IMAGES = "--image INPUTS/first.png --last-image INPUTS/last.png"
VIDEO = "--src_video INPUTS/squares.mkv --frames 9"
MASKED = f"{VIDEO} --src_mask INPUTS/mask.mkv --src_ref_images INPUTS/a.png"
STREAMED = f"{DEEP} --memory 100MB"
F32 = "--dtype float32"
# Name → command, or several. Where none is given, the output is out.npz.
COMMANDS: dict[str, str | tuple[str, ...]] = {
    # nano: its own size and settings, and others.
    "nano": f"{NANO} --frames 5 --steps 2",
    "nano four steps": f"{NANO} --size 32x32 --frames 5",
    "nano small": SMALL,
    "nano small float32": f"{SMALL} {F32}",
    "nano longer": f"{NANO} --size 32x32 --frames 13 --steps 2 --seed 7 --shift 5 --negative-prompt 'a green square'",
    "nano mp4": f"{SMALL} --output out.mp4",
    "nano stills": f"{NANO} --size 48x32 --frames 1 --steps 2 --num-images 2",
    "nano-i2v": f"{NANO_I2V} --steps 3",
    "nano-i2v float32": f"{NANO_I2V} --steps 2 {F32}",
    # Text to video.
    "t2v": f"{T2V} --frames 9",
    "t2v float32": f"{T2V} --frames 9 {F32}",
    "t2v wide": f"{T2V} --size 96x32",
    "t2v defaults": f"{T2V_FREE} --steps 3",
    "t2v official flags": "--task t2v-1.3B --size 48*32 --ckpt_dir INPUTS/t2v --frame_num 9 --sample_steps 3 "
    "--sample_shift 8 --sample_guide_scale 6 --sample_solver unipc --base_seed 42 --prompt 'a cat boxing on a stage' "
    "--save_file out.npz --offload_model True --t5_cpu",
    "t2v still png": f"{T2V} --frames 1 --output out.png",
    "t2v still task": f"{T2V.replace('--frames 5', '')} --task t2i-14B",
    "t2v prompts": f"{T2V.partition('--prompt')[0]} --size 32x32 --frames 5 --steps 2 --prompts INPUTS/prompts.jsonl "
    "--report report.jsonl",
    "t2v prompt cache": (T2V, f"{T2V} --seed 2 --output again.npz"),
    "t2v without prompt cache": f"{T2V} --no-prompt-cache",
    "t2v config": (f"{T2V} --slg 1", "--config out.npz --model INPUTS/t2v --steps 3 --output again.npz"),
    # Solvers and recipes.
    **{f"solver {name}": f"{T2V} --solver {name}" for name in ("dpm++", "euler", "dmd")},
    "solver unipc 7 float32": f"{T2V} --steps 7 {F32}",
    "solver dpm++ 7 float32": f"{T2V} --solver dpm++ --steps 7 {F32}",
    "recipe lightx2v-4step": f"{T2V_FREE} --task t2v-14B --recipe lightx2v-4step",
    "recipe fastwan-3step": f"{T2V_FREE} --recipe fastwan-3step",
    "recipe causvid": f"{T2V_FREE} --task t2v-14B --recipe causvid --steps 4",
    "recipe rcm float32": f"{T2V_FREE} --recipe rcm --steps 3 {F32}",
    # Guidance.
    "guidance off": f"{T2V} --guidance 1",
    "guidance range": f"{T2V} --guidance 7 --guidance-range 0.2-0.6",
    "guidance zero": f"{T2V} --cfg-zero",
    "guidance zero 1, skip layers float32": f"{T2V} --cfg-zero 1 --slg 1:0.2-0.9 {F32}",
    "guidance skip layers": f"{T2V} --slg 0",
    # Video to video.
    "video": f"{T2V} --video INPUTS/circle.mkv --strength 0.6 --frames 9",
    "video float32": f"{T2V} --video INPUTS/circle.mkv --strength 0.3 --solver euler {F32}",
    "video nano": f"{SMALL} --video INPUTS/circle.mkv",
    # Quantised.
    **{f"quantize {mode} nano": f"{SMALL} --steps 2 --quantize {mode}" for mode in ("q8", "q4", "auto")},
    **{f"quantize {mode}": f"{T2V} --quantize {mode}" for mode in ("q6", "mxfp8")},
    "quantize q8 float32": f"{T2V} --quantize q8 {F32}",
    "quantize q4-g32 float32": f"{T2V} --quantize q4-g32 {F32}",
    # LoRAs.
    "lora nano": f"{SMALL} --lora INPUTS/lora_nano.safetensors",
    "lora nano beside q8": f"{SMALL} --steps 2 --lora INPUTS/lora_nano.safetensors:0.7 --quantize q8",
    "lora": f"{T2V} --lora INPUTS/lora.safetensors",
    "lora two, float32": f"{T2V} --lora INPUTS/lora.safetensors:0.7 --lora INPUTS/lora_peft.safetensors:-0.5 {F32}",
    "lora two, beside q4": f"{T2V} --lora INPUTS/lora.safetensors --lora INPUTS/lora_peft.safetensors --quantize q4",
    "lora beside auto, float32": f"{T2V} --lora INPUTS/lora.safetensors:0.5 --quantize auto {F32}",
    # Little memory.
    "vae tiling nano": f"{NANO} --size 96x32 --frames 5 --steps 1 --vae-tiling 64x64",
    "vae tiling video": f"{T2V} --size 80x64 --vae-tiling 64 --video INPUTS/circle.mkv",
    "streaming": f"{STREAMED} --steps 1",
    "streaming lora float32": f"{STREAMED} --steps 1 --guidance 1 --lora INPUTS/lora_deep.safetensors {F32}",
    "streaming lora beside q8": f"{STREAMED} --steps 1 --guidance 1 --lora INPUTS/lora_deep.safetensors --quantize q8",
    # Step caches.
    "cache easycache": f"{T2V} --steps 12 --cache easycache:1",
    "cache easycache vace float32": f"{VACE} {VIDEO} --frames 5 --steps 10 --cache easycache:1:2 {F32}",
    # Watching it come.
    "preview nano": f"{SMALL} --preview now.webp",
    "preview every 3": f"{T2V} --preview now.webp --preview-every 3",
    "preview by taehv": f"{T2V} --preview now.webp --taehv INPUTS/taehv.safetensors",
    "draft": f"{T2V} --frames 9 --taehv INPUTS/taehv.safetensors --draft",
    # Formats.
    "gguf Q8_0": f"{T2V} --transformer INPUTS/gguf/Q8_0.gguf",
    "gguf Q5_1 float32": f"{T2V} --transformer INPUTS/gguf/Q5_1.gguf {F32}",
    "gguf unpacked": f"{T2V} --transformer INPUTS/gguf/Q4_0.gguf --quantize none",
    "gguf text encoder": f"{T2V} --text-encoder INPUTS/gguf/text.gguf",
    "fp8": f"{T2V} --transformer INPUTS/fp8.safetensors",
    "fp8 float32": f"{T2V} --transformer INPUTS/fp8.safetensors {F32}",
    # The other tasks.
    "i2v": f"{I2V} --image INPUTS/first.png",
    "i2v float32": f"{I2V} --image INPUTS/last.png --frames 9 {F32}",
    "flf2v": f"{FLF2V} {IMAGES}",
    "flf2v float32": f"{FLF2V} {IMAGES} --frames 9 {F32}",
    "flf2v q8": f"{FLF2V} {IMAGES} --quantize q8",
    "vace video": f"{VACE} {VIDEO} --context-scale 0.6",
    "vace video, mask, reference": f"{VACE} {MASKED}",
    "vace video, mask, reference float32": f"{VACE} {MASKED} {F32}",
    "vace references": f"{VACE} --src_ref_images INPUTS/a.png,INPUTS/b.png",
    "vace q8, skip layers": f"{VACE} {VIDEO} --quantize q8 --slg 1",
}  # fmt: skip
# With the constants of another model: those of nano, which takes seconds, are not published.
STEP_CACHED = f"{NANO} --size 32x32 --frames 5 --steps 10"
WITH_CONSTANTS = {
    "cache teacache": f"{STEP_CACHED} --guidance 1 --cache teacache:0.2",
    "cache teacache ret float32": f"{STEP_CACHED} --guidance 1 --cache teacache:0.2:ret {F32}",
    "cache magcache": f"{STEP_CACHED} --cache magcache:0.2:3",
}
# The first is killed in its middle, the second goes on, and the third is not cut.
CUT = {
    "resume": f"{T2V} --steps 8",
    "resume dpm++ mp4": f"{T2V} --steps 8 --solver dpm++ {F32} --output NAME.mp4",
    "resume easycache": f"{T2V} --steps 12 --cache easycache:1:1",
    "resume vace": f"{VACE} {MASKED} --steps 8 --frames 5",
}


def all_cases() -> list[Case]:
    found = [Case(name, (one,) if isinstance(one, str) else one) for name, one in COMMANDS.items()]
    for name, command in CUT.items():
        command = command if "NAME" in command else f"{command} --output NAME.npz"
        cut, whole = (command.replace("NAME", part) for part in ("cut", "whole"))
        found.append(Case(name, (cut, f"--resume {cut.split()[-1]}", whole), killed_at=4))
    found += [Case(name, (one,), program=("-c", LEND_CONSTANTS)) for name, one in WITH_CONSTANTS.items()]
    return found
