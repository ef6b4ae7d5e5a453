"""Stage 4, nano-i2v: the first frame is given, the caption tells how it goes on."""

from __future__ import annotations

import models
from train_dit import train
from training import Clock, channels_last, encode_clips, from_mlx, load_vae, nothing_said, save, start_from


def train_i2v(args, device, workers, begun: float, seconds: float) -> dict:
    """Text encoder, VAE and tokenizer are nano's, and stay as they are, as does the image encoder.

    ``args.start_i2v`` is an MLX folder of nano-i2v; without it transformer and image encoder begin from nano's blocks.
    """
    out = args.out.with_name(args.out.name + "-i2v")
    out.mkdir(exist_ok=True)
    _, encoder, nano = start_from(args.out, out)
    model, image_encoder = models.new_i2v_transformer(nano), models.new_image_encoder()
    if args.start_i2v:
        from_mlx(model, args.start_i2v / "transformer.safetensors")
        from_mlx(image_encoder, args.start_i2v / "image_encoder.safetensors")
    encoder, image_encoder = (part.to(device).requires_grad_(False) for part in (encoder, image_encoder.eval()))
    save(image_encoder, out / "image_encoder")
    tokenizer = models.load_tokenizer(out / "tokenizer" / "spiece.model")
    vae = load_vae(out, device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    sets = encode_clips(fast, encoder, workers, tokenizer, args, args.encoding * seconds, image_encoder)
    clock = Clock(begun + seconds, args.steps)
    return {"log": train(model.to(device).eval(), sets, nothing_said(encoder), args, clock, out / "transformer")}
