"""The tiny networks in the forms that model pages offer: ComfyUI's single files, fp8, and GGUF with its own writer."""

import json
import re
from pathlib import Path

import numpy as np
import sentencepiece
from oracles import official, official_clip_model, randomize, torch
from safetensors.torch import save_file
from test_text import sentencepiece_model

from wan_mlx.weights.layouts import canonical_keys, recognise

# Without a config.json heads are 128 wide; rows of 32 can be quantised.
DIT = dict(dim=128, ffn_dim=96, num_heads=1, num_layers=2, freq_dim=32)
TEXT = dict(dim=32, dim_attn=32, dim_ffn=64, num_heads=4, num_layers=2, num_buckets=32)
VAE = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
CLIP = dict(
    vision_dim=80, vision_heads=1, vision_layers=2, embed_dim=8,
    vocab_size=30, max_text_len=10, text_dim=16, text_heads=2, text_layers=1,
)  # fmt: skip
TOKENIZER = sentencepiece_model()
State = dict[str, torch.Tensor]
# ComfyUI's prefixes of the networks in one file; CLIP's names begin with vision_model already.
SAVED = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.umt5xxl.transformer.",
    "vae": "vae.",
    "image_encoder": "",
}


def states(seed: int = 0) -> dict[str, State]:
    """Official names → random weights of a text-to-video model, and of CLIP."""
    vocab = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER).vocab_size()
    modules = {
        "transformer": official("modules.model").WanModel(
            model_type="t2v", text_dim=TEXT["dim"], **DIT, in_dim=16, out_dim=16
        ),
        "text_encoder": official("modules.t5").T5Encoder(vocab=vocab, shared_pos=False, dropout=0.0, **TEXT),
        "vae": official("modules.vae2_1").WanVAE_(**VAE),
    }
    for offset, module in enumerate(modules.values()):
        randomize(module, seed + offset)
    found = {name: module.state_dict() for name, module in modules.items()}
    found["text_encoder"]["norm.weight"] *= 30  # so that the text moves the picture
    found["image_encoder"] = official_clip_model(seed + 3, **CLIP).model.state_dict()
    return found


def write_official(folder: Path, states: dict[str, State]) -> Path:
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/spiece.model").write_bytes(TOKENIZER)
    torch.save(states["text_encoder"], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(states["vae"], folder / "Wan2.1_VAE.pth")
    save_file(states["transformer"], folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "model_type": "t2v", **DIT, "in_dim": 16, "out_dim": 16, "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_other_names(state: State, keys) -> State:
    """``state`` (official names) under the ``keys`` of another layout; what is stacked there is split."""
    names = canonical_keys(recognise(keys), keys)
    renamed = {}
    for name, tensor in state.items():
        if name in names:
            sources = [names[name]] if isinstance(names[name], str) else names[name]
            for source, part in zip(sources, tensor.chunk(len(sources)), strict=True):
                renamed[source] = part.clone()
    assert len(renamed) == sum(1 if isinstance(s, str) else len(s) for s in names.values())
    return renamed


def hf_text_encoder(state: State) -> State:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(state["token_embedding.weight"]), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return in_other_names(state, list(UMT5EncoderModel(config).state_dict()))


def hf_image_encoder(state: State) -> State:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=80, intermediate_size=320, num_hidden_layers=2, num_attention_heads=1,
                              patch_size=14, hidden_act="gelu")  # fmt: skip
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    visual |= {name: visual[name].squeeze(0) for name in ("cls_embedding", "pos_embedding")}
    visual["cls_embedding"] = visual["cls_embedding"].squeeze(0)
    keys = [f"vision_model.{key}" for key in CLIPVisionModel(config).state_dict() if "post_layernorm" not in key]
    return in_other_names(visual, [key.replace("vision_model.vision_model.", "vision_model.") for key in keys])


LLAMA_CPP = {
    "token_embedding": "token_embd", "norm": "enc.output_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_o", "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down", "pos_embedding.embedding": "attn_rel_b",
}  # fmt: skip


def gguf_text_encoder(state: State) -> State:
    renamed = {}
    for name, tensor in state.items():
        block, last = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name).groups()
        renamed[(f"enc.blk.{block}." if block else "") + f"{LLAMA_CPP[last]}.weight"] = tensor
    return renamed


def scaled_fp8(state: State, dialect: str, dtype=torch.float8_e4m3fn) -> tuple[State, State]:
    """As ComfyUI's scaled files are made: the blocks' matrices in fp8; and the true values of every tensor."""
    stored, true = {}, {}
    rows = dialect == "per row"
    for name, tensor in state.items():
        if tensor.ndim != 2 or not re.search(r"blocks\.|injector\.", name):
            stored[name] = true[name] = tensor
            continue
        scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()) / torch.finfo(dtype).max
        stored[name] = (tensor / scale).to(dtype)
        true[name] = stored[name].float() * scale
        layer = name.removesuffix(".weight")
        stored[f"{layer}.{'scale_weight' if dialect == 'marker' else 'weight_scale'}"] = scale
        if dialect == "comfy_quant":
            text = json.dumps({"format": "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"})
            stored[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    if dialect == "marker":
        stored["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    return stored, true


def comfyui_file(path: Path, state: State, prefix: str = "", tokenizer: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    if tokenizer:
        state["spiece_model"] = torch.frombuffer(bytearray(TOKENIZER), dtype=torch.uint8)
    save_file(state, path)
    return path


def checkpoint_save(path: Path, states: dict[str, State], tokenizer=True) -> Path:
    """A whole model as ComfyUI's node CheckpointSave writes it; the text encoder's ``state`` in Hugging Face's names.

    It adds a parameter of CLIP and, if ``tokenizer``, the sentencepiece model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {SAVED[kind] + name: value for kind, state in states.items() for name, value in state.items()}
    whole = {key: value.contiguous() for key, value in whole.items()}
    if "text_encoder" in states:
        whole["text_encoders.umt5xxl.logit_scale"] = torch.tensor(4.6055)
        if tokenizer:
            whole["text_encoders.spiece_model"] = torch.frombuffer(bytearray(TOKENIZER), dtype=torch.uint8)
    save_file(whole, path)
    return path


def gguf_file(
    path: Path, state: State, dtype: str, prefix: str = "", tokenizer: bytes | None = None, arch="wan"
) -> State:
    """Write with ``gguf``'s writer and quantisers as the converters do; return the values that were stored.

    Vectors, modulation and the 5-D patch embedding are F32, what no block divides is F16.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    true = {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        kind = dtype if values.ndim == 2 and not name.endswith("modulation") else "F32"
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        kind = "F16" if values.ndim and values.shape[-1] % block else kind
        number = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(values, number)
        true[name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, number)).reshape(values.shape))
        writer.add_tensor(prefix + name, data, raw_dtype=number)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return true


def add_tokenizer(writer, model: bytes) -> None:
    """As llama.cpp's converter does, filled up to the embedding's rows by what is no piece."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(spm.vocab_size())
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([spm.id_to_piece(i) for i in ids] + ["[PAD999]"])
    writer.add_token_scores([spm.get_score(i) for i in ids] + [-1000.0])
    writer.add_token_types([*kinds, 5])
    writer.add_add_space_prefix(True)
    writer.add_eos_token_id(spm.eos_id())
    writer.add_pad_token_id(spm.pad_id())
