"""A tiny checkpoint in the official layout, written as Wan-AI publishes it: torch.save, safetensors, sentencepiece."""

import io
import json
from pathlib import Path

import sentencepiece
from oracles import diffusers_transformer, official, official_clip_model, official_s2v, randomize, torch
from safetensors.torch import save_file

from wan_mlx.models.configs import TransformerConfig
from wan_mlx.weights.layouts import canonical_keys, recognise

DIT = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=2, freq_dim=32)
TEXT = dict(dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2, num_buckets=32)
WIDE_TEXT = TEXT | dict(dim=32, dim_ffn=64)  # whose matrices can be quantised in groups of 32
VAE22 = dict(dim=4, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True])
VAE = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
CLIP = dict(
    vision_dim=80, vision_heads=1, vision_layers=3, embed_dim=8,
    vocab_size=30, max_text_len=10, text_dim=16, text_heads=2, text_layers=1,
)  # fmt: skip
# config.json of each kind, beside DIT.
KINDS = {
    "t2v": dict(in_dim=16),
    "i2v": dict(in_dim=36),
    "flf2v": dict(in_dim=36),
    "ti2v": dict(in_dim=48, out_dim=48),
    "vace": dict(in_dim=16, num_layers=3, vace_layers=[0, 2], vace_in_dim=96),
    "s2v": dict(in_dim=16, audio_inject_layers=[0, 1], audio_dim=32),
}
# Of speech to video's transformer beside that, as released; and of a wav2vec 2.0.
SPEECH = dict(cond_dim=16, zero_timestep=True, enable_adain=True, enable_motioner=False, enable_framepack=True,
              framepack_drop_mode="padd")  # fmt: skip
WAV2VEC = dict(hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=16, vocab_size=9,
               conv_dim=[16] * 7, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True,
               num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)  # fmt: skip
SENTENCES = [
    "a cat boxing on a stage", "two dogs run over the beach", "a red circle moves right on a blue background",
    "一只猫在台上打拳", "红色的圆在蓝色背景上向右移动", "the quick brown fox jumps over the lazy dog 0123456789",
]  # fmt: skip


def sentencepiece_model(vocab_size: int = 120) -> bytes:
    """A small unigram model with T5's special ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, vocab_size=vocab_size, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def networks(seed: int = 0, kind: str = "t2v", sizes: dict = TEXT) -> dict[str, torch.nn.Module]:
    """The official classes at tiny sizes, with random weights; Diffusers' transformer for "i2v", "flf2v", "vace".

    ``sizes``: of the text encoder.
    """
    spm = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    text = official("modules.t5").T5Encoder(vocab=spm.vocab_size(), shared_pos=False, dropout=0.0, **sizes)
    new = kind == "ti2v"
    small = {**VAE, "dim": 4} if kind == "s2v" else VAE  # whose clips are decoded with the nineteen latents before
    vae = official("modules.vae2_2").WanVAE_(**VAE22) if new else official("modules.vae2_1").WanVAE_(**small)
    if kind in ("t2v", "ti2v"):
        channels = dict.fromkeys(("in_dim", "out_dim"), vae.z_dim)
        dit = official("modules.model").WanModel(model_type=kind, text_dim=sizes["dim"], **DIT, **channels)
    elif kind == "s2v":
        dit = official_s2v().WanModel_S2V(text_dim=TEXT["dim"], **DIT, **SPEECH, **KINDS[kind])
    else:
        dit = diffusers_transformer(config(kind))
    for offset, module in enumerate((text, vae, dit)):
        randomize(module.eval().requires_grad_(False), seed + offset)
    # A text is a few rows among 500 of zeros: at this strength it moves the picture, so that guidance can be tested.
    text.norm.weight.mul_(30)
    modules = {"text_encoder": text, "vae": vae, "transformer": dit}
    if kind in ("i2v", "flf2v"):
        modules["image_encoder"] = official_clip_model(seed + 3, **CLIP)
    if kind == "s2v":
        modules["audio_encoder"] = wav2vec()
        randomize(modules["audio_encoder"], seed + 4)
    return modules


def wav2vec() -> torch.nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC)).eval().requires_grad_(False)


def config(kind: str) -> TransformerConfig:
    """Sizes of the tiny transformer of this kind."""
    return TransformerConfig(kind, text_dim=TEXT["dim"], image_dim=CLIP["vision_dim"], **DIT | KINDS[kind])


def write_official_folder(folder: Path, modules: dict[str, torch.nn.Module], kind: str = "t2v") -> Path:
    """Write ``modules`` with the names and formats of a Wan-AI repository."""
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/spiece.model").write_bytes(sentencepiece_model())
    torch.save(modules["text_encoder"].state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(modules["vae"].state_dict(), folder / f"Wan2.{2 if kind == 'ti2v' else 1}_VAE.pth")
    if "image_encoder" in modules:
        both_towers = modules["image_encoder"].model.state_dict()
        torch.save(both_towers, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    if "audio_encoder" in modules:
        modules["audio_encoder"].save_pretrained(folder / "wav2vec2-large-xlsr-53-english")
    state = modules["transformer"].state_dict()
    names = canonical_keys(recognise(state), state)
    if kind == "s2v":  # whose injectors have other names in files
        names = {key: key for key in state}
    save_file({name: state[key] for name, key in names.items()}, folder / "diffusion_pytorch_model.safetensors")
    name = {"vace": "VaceWanModel", "s2v": "WanModel_S2V"}.get(kind, "WanModel")
    described = {"_class_name": name, "model_type": kind, **DIT,
              "out_dim": 16, "eps": 1e-6, "text_len": 512, **KINDS[kind]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return folder
