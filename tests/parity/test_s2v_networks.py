"""Speech to video's networks against the official modules, float32, random weights: transformer, sound, FramePack."""

import mlx.core as mx
import numpy as np
import pytest
from oracles import official_s2v, randomize, relative_error, torch
from safetensors.torch import save_file
from test_full_size_keys import on_meta

from wan_mlx.models import audio_encoder
from wan_mlx.models.audio_encoder import AudioEncoder
from wan_mlx.models.configs import AudioEncoderConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.networks import new_network, new_transformer
from wan_mlx.weights.component import check_keys, parameter_shapes
from wan_mlx.weights.configs import network_config
from wan_mlx.weights.load import load_audio_encoder, load_transformer

pytestmark = pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning")
BOUND = 2e-5
SIZES = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=3, freq_dim=32)
SPEECH = dict(cond_dim=16, audio_dim=20, audio_inject_layers=[0, 2], zero_timestep=True, enable_motioner=False,
              enable_framepack=True, framepack_drop_mode="padd")  # fmt: skip
WAV2VEC = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, vocab_size=9,
               conv_dim=[16] * 7, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True,
               num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def channels_last(x: torch.Tensor) -> mx.array:
    return mx.array(x.movedim(1, -1).numpy())


@pytest.mark.parametrize("adain", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_transformer(tmp_path, adain, first):
    """A clip with motion and poses, and a first one without: plain, run by pieces, and streamed."""
    reference = official_s2v().WanModel_S2V(text_dim=24, **SIZES, **SPEECH, enable_adain=adain)
    randomize(reference.eval().requires_grad_(False), 1)
    save_file(reference.state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"num_heads": 2, "audio_inject_layers": [0, 2]}')
    generator = torch.Generator().manual_seed(2)
    latents, pose = (torch.randn(1, 16, 3, 8, 16, generator=generator) for _ in "ab")
    motion, still = (torch.randn(1, 16, frames, 8, 16, generator=generator) for frames in (19, 1))
    text, audio = torch.randn(7, 24, generator=generator), torch.randn(1, 25, 20, 12, generator=generator)
    pose *= not first
    want = reference(
        [latents[0]], torch.tensor([721.0]), [text], 0, still, motion, pose, audio, motion_frames=[73, 19],
        drop_motion_frames=first,
    )[0]  # fmt: skip
    context = mx.array(np.pad(text.numpy(), ((0, 505), (0, 0))))[None]
    given = dict(reference=channels_last(still), audio=mx.array(audio.swapaxes(2, 3).numpy()))
    if not first:
        given |= dict(motion=channels_last(motion), pose=channels_last(pose))
    plain = load_transformer(tmp_path / "x.safetensors", "float32")
    got = plain(channels_last(latents), 721.0, context, **given)
    assert relative_error(got[0].transpose(3, 0, 1, 2), want) < BOUND
    pieces = Execution(plain, tokens_at_once=7)(channels_last(latents), 721.0, context, **given)
    streamed = load_transformer(tmp_path / "x.safetensors", "float32", stream=True)
    assert mx.array_equal(got, pieces)
    assert mx.array_equal(got, streamed(channels_last(latents), 721.0, context, **given))


def wav2vec(**changes):
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC, **changes)).eval()


def official_states(model, sound: np.ndarray) -> torch.Tensor:
    """All hidden states (layers + 1, frames, dim), the last one normed, as transformers gave it before 5.0."""
    centred = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)  # its processor's
    result = model.wav2vec2(torch.from_numpy(centred)[None], output_hidden_states=True)
    return torch.cat([*result.hidden_states[:-1], result.last_hidden_state])


def test_audio_encoder(tmp_path, monkeypatch):
    """Sound longer than what is computed at once; attention in pieces has the same bits."""
    model = wav2vec()
    randomize(model, 3)
    state = model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    sound = np.random.default_rng(4).normal(0.1, 0.3, 16000 * 11 + 77).astype(np.float32)
    encoder = load_audio_encoder(tmp_path / "model.safetensors")
    got = encoder(mx.array(sound))
    want = official_states(model, sound)
    assert got.shape == (4, 549, 32)
    for index in range(4):
        assert relative_error(got[index], want[index]) < BOUND, index
    monkeypatch.setattr(audio_encoder, "SCORES_AT_ONCE", 2 * 549 * 100)  # a hundred rows
    assert mx.array_equal(encoder(mx.array(sound)), got)


def test_too_little_sound():
    with pytest.raises(ValueError, match="the sound has 399 samples, expected at least 400: 0.025 s"):
        AudioEncoder(AudioEncoderConfig(dim=32, ffn_dim=8, num_heads=2, num_layers=1))(mx.zeros((399,)))


def test_full_size_keys():
    """Of the released sizes: neither a key too many nor one too few, and every shape."""
    sizes = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256)
    layers = [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]
    speech = SPEECH | dict(audio_dim=1024, audio_inject_layers=layers, enable_adain=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official_s2v().WanModel_S2V, "init_weights", lambda self: None)
        weights = on_meta(official_s2v().WanModel_S2V, **sizes, **speech)
    config = network_config(weights, {})
    assert config.audio_inject_layers == tuple(layers) and config.model_type == "s2v"
    assert len(weights.shapes) == 1260
    check_keys(weights, parameter_shapes(new_transformer(config)))


def test_full_size_keys_of_wav2vec():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    released = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                    do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, vocab_size=33)  # fmt: skip
    weights = on_meta(Wav2Vec2ForCTC, Wav2Vec2Config(**released))
    assert network_config(weights, {}) == AudioEncoderConfig()
    check_keys(weights, parameter_shapes(new_network(AudioEncoderConfig())))
