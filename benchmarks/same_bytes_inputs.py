"""The inputs of ``same_bytes.py``: weights of random values under the published names, pictures and videos.

PyTorch and the formats' own packages write them, not the code that is compared.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]

DIM, FFN, TEXT, TEXT_FFN, VAE, CLIP = 128, 256, 64, 128, 8, 80
# Kind → channels of what its transformer reads, number of blocks, numbers of those that VACE gives hints to.
KINDS = {"t2v": (16, 2, ()), "i2v": (36, 2, ()), "flf2v": (36, 2, ()), "vace": (16, 3, (0, 2))}
DEEP_SIZES, DEEP_LAYERS = (DIM, 8192), 48  # more than 100 MB even in 8 bits, most of which few tokens pass


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def block(name: str, dim: int, ffn: int, image: bool = False, vace: bool = False) -> Shapes:
    """A transformer's block, or one of VACE's."""
    shapes = {f"{name}.modulation": (1, 6, dim), **layer(f"{name}.norm3", dim)}
    for attention in (f"{name}.self_attn", f"{name}.cross_attn"):
        for part in "qkvo":
            shapes |= layer(f"{attention}.{part}", dim, dim)
        shapes |= {f"{attention}.norm_{part}.weight": (dim,) for part in "qk"}
    if image:
        shapes |= layer(f"{name}.cross_attn.k_img", dim, dim) | layer(f"{name}.cross_attn.v_img", dim, dim)
        shapes[f"{name}.cross_attn.norm_k_img.weight"] = (dim,)
    if vace:
        shapes |= layer(f"{name}.before_proj", dim, dim) if name.endswith(".0") else {}
        shapes |= layer(f"{name}.after_proj", dim, dim)
    return shapes | layer(f"{name}.ffn.0", ffn, dim) | layer(f"{name}.ffn.2", dim, ffn)


def transformer(kind: str, dim: int = DIM, ffn: int = FFN, layers: int = 0) -> Shapes:
    channels, few, hinted = KINDS[kind]
    image = kind in ("i2v", "flf2v")
    shapes = {
        **layer("patch_embedding", dim, channels, 1, 2, 2),
        **layer("text_embedding.0", dim, TEXT), **layer("text_embedding.2", dim, dim),
        **layer("time_embedding.0", dim, 32), **layer("time_embedding.2", dim, dim),
        **layer("time_projection.1", 6 * dim, dim),
    }  # fmt: skip
    for number in range(layers or few):
        shapes |= block(f"blocks.{number}", dim, ffn, image)
    if image:
        shapes |= layer("img_emb.proj.0", CLIP) | layer("img_emb.proj.1", CLIP, CLIP)
        shapes |= layer("img_emb.proj.3", dim, CLIP) | layer("img_emb.proj.4", dim)
        shapes |= {"img_emb.emb_pos": (1, 2 * 257, CLIP)} if kind == "flf2v" else {}
    if hinted:
        shapes |= layer("vace_patch_embedding", dim, 96, 1, 2, 2)
        for number in range(len(hinted)):
            shapes |= block(f"vace_blocks.{number}", dim, ffn, vace=True)
    return shapes | {"head.modulation": (1, 2, dim)} | layer("head.head", 4 * 16, dim)


def text_encoder(vocabulary: int, layers: int = 2, heads: int = 4) -> Shapes:
    shapes = {"token_embedding.weight": (vocabulary, TEXT), "norm.weight": (TEXT,)}
    for name in (f"blocks.{number}" for number in range(layers)):
        shapes |= {f"{name}.norm1.weight": (TEXT,), f"{name}.norm2.weight": (TEXT,)}
        shapes |= {f"{name}.attn.{part}.weight": (TEXT, TEXT) for part in "qkvo"}
        shapes |= {f"{name}.ffn.{part}.weight": (TEXT_FFN, TEXT) for part in ("gate.0", "fc1")}
        shapes |= {f"{name}.ffn.fc2.weight": (TEXT, TEXT_FFN), f"{name}.pos_embedding.embedding.weight": (32, heads)}
    return shapes


def vae() -> Shapes:
    """The causal VAE with `VAE` channels instead of 96."""
    shapes = layer("conv1", 32, 32, 1, 1, 1) | layer("conv2", 16, 16, 1, 1, 1)

    def residual(name: str, inputs: int, outputs: int) -> Shapes:
        found = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
        found |= layer(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
        found |= layer(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
        return found | (layer(f"{name}.shortcut", outputs, inputs, 1, 1, 1) if inputs != outputs else {})

    def middle(name: str, dim: int) -> Shapes:
        attention = {f"{name}.1.norm.gamma": (dim, 1, 1)} | layer(f"{name}.1.to_qkv", 3 * dim, dim, 1, 1)
        attention |= layer(f"{name}.1.proj", dim, dim, 1, 1)
        return residual(f"{name}.0", dim, dim) | attention | residual(f"{name}.2", dim, dim)

    widths, in_time = [VAE * n for n in (1, 1, 2, 4, 4)], (False, True, True)
    shapes |= layer("encoder.conv1", widths[0], 3, 3, 3, 3)
    number = 0
    for stage, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for one in (inputs, outputs):
            shapes |= residual(f"encoder.downsamples.{number}", one, outputs)
            number += 1
        if stage < 3:
            shapes |= layer(f"encoder.downsamples.{number}.resample.1", outputs, outputs, 3, 3)
            if in_time[stage]:
                shapes |= layer(f"encoder.downsamples.{number}.time_conv", outputs, outputs, 3, 1, 1)
            number += 1
    shapes |= middle("encoder.middle", widths[-1]) | {"encoder.head.0.gamma": (widths[-1], 1, 1, 1)}
    shapes |= layer("encoder.head.2", 32, widths[-1], 3, 3, 3)

    widths = [VAE * n for n in (4, 4, 4, 2, 1)]
    shapes |= layer("decoder.conv1", widths[0], 16, 3, 3, 3) | middle("decoder.middle", widths[0])
    number = 0
    for stage, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for one in (inputs // 2 if stage else inputs, outputs, outputs):
            shapes |= residual(f"decoder.upsamples.{number}", one, outputs)
            number += 1
        if stage < 3:
            shapes |= layer(f"decoder.upsamples.{number}.resample.1", outputs // 2, outputs, 3, 3)
            if in_time[2 - stage]:
                shapes |= layer(f"decoder.upsamples.{number}.time_conv", 2 * outputs, outputs, 3, 1, 1)
            number += 1
    shapes |= {"decoder.head.0.gamma": (widths[-1], 1, 1, 1)} | layer("decoder.head.2", 3, widths[-1], 3, 3, 3)
    return shapes


def image_encoder(layers: int = 3) -> Shapes:
    """CLIP's vision tower."""
    shapes = {"cls_embedding": (1, 1, CLIP), "pos_embedding": (1, 257, CLIP), "head": (CLIP, 8)}
    shapes |= layer("patch_embedding", CLIP, 3, 14, 14, bias=False) | layer("pre_norm", CLIP) | layer("post_norm", CLIP)
    for name in (f"transformer.{number}" for number in range(layers)):
        shapes |= layer(f"{name}.norm1", CLIP) | layer(f"{name}.norm2", CLIP)
        shapes |= layer(f"{name}.attn.to_qkv", 3 * CLIP, CLIP) | layer(f"{name}.attn.proj", CLIP, CLIP)
        shapes |= layer(f"{name}.mlp.0", 4 * CLIP, CLIP) | layer(f"{name}.mlp.2", CLIP, 4 * CLIP)
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def taehv(width: int = 4, widths: tuple[int, ...] = (8, 6, 4, 4)) -> Shapes:
    """TAEHV, narrow."""

    def memory(name: str, dim: int) -> Shapes:
        shapes = layer(f"{name}.conv.0", dim, 2 * dim, 3, 3)
        return shapes | layer(f"{name}.conv.2", dim, dim, 3, 3) | layer(f"{name}.conv.4", dim, dim, 3, 3)

    shapes = layer("encoder.0", width, 3, 3, 3) | layer("encoder.17", 16, width, 3, 3)
    for number, pooled in ((2, 2), (7, 2), (12, 1)):
        shapes |= layer(f"encoder.{number}.conv", width, pooled * width, 1, 1, bias=False)
        shapes |= layer(f"encoder.{number + 1}", width, width, 3, 3, bias=False)
        for one in range(number + 2, number + 5):
            shapes |= memory(f"encoder.{one}", width)
    shapes |= layer("decoder.1", widths[0], 16, 3, 3) | layer("decoder.22", 3, widths[-1], 3, 3)
    for number, grown, dim, next_dim in zip((3, 9, 15), (1, 2, 2), widths, widths[1:], strict=False):
        for one in range(number, number + 3):
            shapes |= memory(f"decoder.{one}", dim)
        shapes |= layer(f"decoder.{number + 4}.conv", grown * dim, dim, 1, 1, bias=False)
        shapes |= layer(f"decoder.{number + 5}", next_dim, dim, 3, 3, bias=False)
    return shapes


def random_state(shapes: Shapes, seed: int) -> State:
    """Values that keep activations near one: N(0, 1/fan_in) matrices, scales near 1, small biases."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if x.squeeze().ndim < 2:
            state[name] = 0.1 * x + (0 if name.endswith("bias") else 1)
        else:
            state[name] = x * x[0].numel() ** -0.5
    return state


def write_model(folder: Path, kind: str, seed: int, tokenizer: Path, state: State | None = None, **config) -> State:
    """A folder as Wan-AI publishes it; returns the transformer's weights, random ones unless they are given."""
    import sentencepiece

    (folder / "google/umt5-xxl").mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "google/umt5-xxl/spiece.model")
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    text = random_state(text_encoder(vocabulary), seed + 1)
    text["norm.weight"] *= 30  # so that the text moves the picture
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_state(vae(), seed + 2), folder / "Wan2.1_VAE.pth")
    if kind in ("i2v", "flf2v"):
        clip = random_state(image_encoder(), seed + 3)
        torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    state = random_state(transformer(kind), seed) if state is None else state
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    channels, layers, hinted = KINDS[kind]
    about = {
        "_class_name": "VaceWanModel" if kind == "vace" else "WanModel", "model_type": kind, "dim": DIM,
        "ffn_dim": FFN, "num_heads": 1, "num_layers": layers, "freq_dim": 32, "in_dim": channels, "out_dim": 16,
        "eps": 1e-6, "text_len": 512,
    }  # fmt: skip
    about |= {"vace_layers": hinted, "vace_in_dim": 96} if hinted else {}
    (folder / "config.json").write_text(json.dumps(about | config))
    return state


def write_gguf(path: Path, state: State, kind: str, tokenizer: Path | None = None) -> None:
    """As the converters do: matrices of ``kind``, the rest in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in state.items():
        is_matrix = tensor.ndim == 2 and tensor.shape[-1] % 32 == 0
        number = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
    if tokenizer is not None:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        ids = range(model.vocab_size())
        kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
        writer.add_tokenizer_model("t5")
        writer.add_token_list([model.id_to_piece(i) for i in ids])
        writer.add_token_scores([model.get_score(i) for i in ids])
        writer.add_token_types(kinds)
        writer.add_eos_token_id(model.eos_id())
        writer.add_pad_token_id(model.pad_id())
        writer.add_add_space_prefix(True)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


LLAMA_CPP = {
    "token_embedding": "token_embd", "norm": "enc.output_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_o", "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down", "pos_embedding.embedding": "attn_rel_b",
}  # fmt: skip


def named_by_llama_cpp(state: State) -> State:
    """A text encoder under the names it has in GGUF files."""
    renamed = {}
    for name, tensor in state.items():
        number, last = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name).groups()
        renamed[(f"enc.blk.{number}." if number else "") + f"{LLAMA_CPP[last]}.weight"] = tensor
    return renamed


def in_fp8(state: State) -> State:
    """As ComfyUI's scaled files: the blocks' matrices in fp8, each with its scale."""
    stored = {}
    for name, tensor in state.items():
        stored[f"model.diffusion_model.{name}"] = tensor
        if tensor.ndim == 2 and "blocks." in name:
            scale = tensor.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            stored[f"model.diffusion_model.{name}"] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"model.diffusion_model.{name.removesuffix('.weight')}.weight_scale"] = scale
    return stored


def lora(down: str, up: str, name: str, alpha: float | None, dim: int, ffn: int, layers: int, seed: int) -> State:
    """Rank 4, of four layers in each block; ``name`` makes a module's key of its number, "q", "v", "0" or "2"."""
    generator, state = torch.Generator().manual_seed(seed), {}
    ours = {"self_attn.q": (dim, dim), "cross_attn.v": (dim, dim), "ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}
    theirs = dict(zip(ours, ("attn1.to_q", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2"), strict=True))
    for number in range(layers):
        for module, (outputs, inputs) in ours.items():
            key = name.format(number, theirs[module] if name.startswith("transformer.") else module)
            state[f"{key}.{down}"] = 0.05 * torch.randn((4, inputs), generator=generator)
            state[f"{key}.{up}"] = 0.05 * torch.randn((outputs, 4), generator=generator)
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def write_loras(folder: Path) -> None:
    """For nano, the tiny and the deep model; the tiny one's also has whole differences, as lightx2v's files do."""
    comfy, peft = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
    sizes = {"_nano": (256, 640, 6), "": (DIM, FFN, 2), "_deep": (*DEEP_SIZES, DEEP_LAYERS)}
    for seed, (name, size) in enumerate(sizes.items()):
        state = lora(*comfy, "diffusion_model.blocks.{}.{}", 6.0, *size, seed)
        if not name:
            generator = torch.Generator().manual_seed(3)
            for key in ("norm3.diff", "norm3.diff_b", "self_attn.q.diff_b"):
                state[f"diffusion_model.blocks.1.{key}"] = 0.05 * torch.randn(DIM, generator=generator)
        save_file(state, folder / f"lora{name}.safetensors")
    save_file(lora(*peft, "transformer.blocks.{}.{}", None, *sizes[""], 4), folder / "lora_peft.safetensors")


def write_video(path: Path, frames: np.ndarray) -> None:
    """Lossless, uint8 (T, H, W, 3) at 16 frames a second; the same bytes every time."""
    height, width = frames.shape[1:3]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
        f"{width}x{height}", "-r", "16", "-i", "-", "-c:v", "ffv1", "-pix_fmt", "bgr0", "-fflags", "+bitexact",
        "-flags", "+bitexact", str(path),
    ]  # fmt: skip
    subprocess.run(command, input=frames.tobytes(), check=True)


def write_pictures(folder: Path) -> None:
    """Squares of random colours, a mask that moves over them, a circle that moves, and pictures of odd sizes."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (14, 8, 12, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    mask = np.zeros_like(squares)
    y, x = np.mgrid[:96, :96]
    circle = np.zeros((9, 96, 96, 3), np.uint8) + np.array([20, 30, 200], np.uint8)
    for number in range(14):
        mask[number, 12:48, 4 * number : 4 * number + 40] = 255
    for number, frame in enumerate(circle):
        frame[(x - 30 - 4 * number) ** 2 + (y - 48) ** 2 < 300] = [230, 40, 30]
    for name, frames in (("squares", squares), ("mask", mask), ("circle", circle)):
        write_video(folder / f"{name}.mkv", frames)
    Image.fromarray(circle[0]).save(folder / "circle.png")
    for name, size in (("first", (75, 50)), ("last", (75, 50)), ("a", (41, 29)), ("b", (23, 77))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")


def write_inputs(folder: Path, checkout: Path) -> None:
    """All that the cases read. Of the checkout, only nano's tokenizer is taken."""
    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.model"
    shutil.copyfile(checkout / "wan_mlx/assets/nano/tokenizer.model", tokenizer)
    states = {kind: write_model(folder / kind, kind, 10 * i, tokenizer) for i, kind in enumerate(KINDS)}
    dim, ffn = DEEP_SIZES
    deep = {name: x.bfloat16() for name, x in random_state(transformer("t2v", dim, ffn, DEEP_LAYERS), 50).items()}
    sizes = {"dim": dim, "ffn_dim": ffn, "num_heads": dim // 128, "num_layers": DEEP_LAYERS}
    write_model(folder / "deep", "t2v", 60, tokenizer, deep, **sizes)
    (folder / "gguf").mkdir()
    for kind in ("Q8_0", "Q5_1", "Q4_0", "F16"):
        write_gguf(folder / f"gguf/{kind}.gguf", states["t2v"], kind)
    text = torch.load(folder / "t2v/models_t5_umt5-xxl-enc-bf16.pth")
    write_gguf(folder / "gguf/text.gguf", named_by_llama_cpp(text), "Q8_0", tokenizer)
    save_file(in_fp8(states["t2v"]), folder / "fp8.safetensors")
    save_file(random_state(taehv(), 70), folder / "taehv.safetensors")
    write_loras(folder)
    write_pictures(folder)
    lines = [{"prompt": "a yellow star spins", "seed": seed, "output": f"{seed}{ending}"}
             for seed, ending in enumerate((".npz", ".mp4", ".webp", ".gif", ".png"))]  # fmt: skip
    lines.append({"prompt": "a red circle", "seed": 9, "guidance": 5, "size": "48x32", "output": "9.npz"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
