"""Stage 4, nano-i2v: the first frame is given, the caption tells how it goes on."""

from __future__ import annotations

import models
import torch
from measure import beside
from train_dit import train
from training import Clock, Stock, channels_last, from_mlx, load_vae, nothing_said, save, start_from


def train_i2v(args, device, workers, begun: float, seconds: float) -> dict:
    """Text encoder, VAE and tokenizer are nano's, and stay as they are, as does the image encoder.

    ``args.start_i2v`` is a folder of nano-i2v, as this stage or ``weights_convert.py`` writes one; without it
    transformer and image encoder begin from nano's blocks.
    """
    out = beside(args.out)
    out.mkdir(exist_ok=True)
    _, encoder, nano = start_from(args.out if (args.out / "transformer").is_dir() else args.start, out)
    model, image_encoder = models.new_i2v_transformer(nano), models.new_image_encoder()
    if args.start_i2v and (args.start_i2v / "transformer").is_dir():
        model = models.WanTransformer3DModel.from_pretrained(args.start_i2v / "transformer", torch_dtype=torch.float32)
        image_encoder = models.CLIPVisionModel.from_pretrained(args.start_i2v / "image_encoder", dtype=torch.float32)
    elif args.start_i2v:
        from_mlx(model, args.start_i2v / "transformer.safetensors")
        from_mlx(image_encoder, args.start_i2v / "image_encoder.safetensors")
    encoder, image_encoder = (part.to(device).requires_grad_(False) for part in (encoder, image_encoder.eval()))
    save(image_encoder, out / "image_encoder")
    tokenizer = models.load_tokenizer(out / "tokenizer" / "spiece.model")
    vae = load_vae(out, device)
    fast = channels_last(vae) if device.type == "cuda" else vae
    stock = Stock(fast, encoder, workers, tokenizer, args, image_encoder)
    clock = Clock(begun + seconds, args.steps)
    return train(model.to(device).eval(), stock, nothing_said(encoder), args, clock, out / "transformer")
