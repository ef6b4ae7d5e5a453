"""The bundled trained weights in PyTorch and here: the same prompt, noise and steps, the same video."""

import mlx.core as mx
import numpy as np
from oracles import official, torch, unmasked_attention

import wan_mlx
from wan_mlx.noise import normal
from wan_mlx.tokenizer import Tokenizer
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.hub import resolve

PROMPT, STEPS, SHIFT, GUIDANCE, SEED = "a red circle moves right on a blue background", 4, 3.0, 3.0, 5


def state_of(path, patch=(1, 2, 2)) -> dict[str, torch.Tensor]:
    """An MLX file's tensors, float32, in PyTorch's layout."""
    state = {}
    for name, array in mx.load(str(path)).items():
        tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
        if name == "patch_embedding.weight":
            tensor = tensor.view(tensor.shape[0], *patch, -1)
        state[name] = tensor.movedim(-1, 1) if tensor.ndim >= 4 else tensor
    return state


def load(module: torch.nn.Module, path) -> torch.nn.Module:
    wanted = module.state_dict()
    state = {name: tensor.reshape(wanted[name].shape) for name, tensor in state_of(path).items()}
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def test_same_video_within_two_levels(monkeypatch):
    checkpoint = open_checkpoint(resolve("nano"))
    c, t, v = (checkpoint.configs[name] for name in ("transformer", "text_encoder", "vae"))
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    text = official("modules.t5").T5Encoder(
        vocab=t["vocab_size"], shared_pos=False, dropout=0.0,
        **{k: t[k] for k in ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")},
    )  # fmt: skip
    dit = official("modules.model").WanModel(
        model_type="t2v",
        **{k: c[k] for k in ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "in_dim", "out_dim")},
    )
    vae = official("modules.vae2_1").WanVAE_(
        dim=v["dim"], z_dim=v["z_dim"], dim_mult=v["dim_mult"], num_res_blocks=v["num_res_blocks"],
        temperal_downsample=v["temporal_downsample"],
    )  # fmt: skip
    for module, name in ((text, "text_encoder"), (dit, "transformer"), (vae, "vae")):
        load(module, checkpoint.files[name])

    tokenizer = Tokenizer(checkpoint.files["tokenizer"])
    contexts = [text(torch.tensor([tokenizer(p)]))[0] for p in (PROMPT, "")]
    latents = torch.from_numpy(normal((16, 2, 16, 16), SEED))
    scheduler = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    scheduler.set_timesteps(STEPS, device="cpu", shift=SHIFT)
    for step in scheduler.timesteps:
        cond, uncond = (dit([latents], torch.stack([step]), [context], 128)[0] for context in contexts)
        latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), step, latents, return_dict=False)[0]
    decoded = vae.decode(latents[None], [torch.tensor(v["mean"]), 1 / torch.tensor(v["std"])])[0].clamp(-1, 1)
    want = ((decoded + 1) / 2 * 255).type(torch.uint8).movedim(0, -1).numpy()

    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", progress=False)
    got = pipe(PROMPT, num_frames=5, steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, seed=SEED).frames
    assert want.std() > 5
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 2
