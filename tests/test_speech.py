"""Sound of any kind is read as a model hears it, and goes into an .mp4 that it ends, or that ends it."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from wan_mlx.media.speech import read_sound, resampled, sound_notes, sound_seconds
from wan_mlx.media.write import VideoWriter

TONE = 0.5


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return TONE * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def write_wav(path, sound: np.ndarray, rate: int, width: int = 2):
    """Sound (n,) or (n, channels) in [-1, 1], in 8 or 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.rint(sound * 127 + 128).astype(np.uint8) if width == 1 else np.rint(sound * 32767).astype("<i2")
        file.writeframes(whole.tobytes())
    return path


def write_encoded(path, sound: np.ndarray, rate: int, *codecs: str):
    """The same sound (n,) in [-1, 1], once for each codec."""
    with av.open(str(path), "w") as file:
        for stream in [file.add_stream(codec, rate=rate, layout="mono") for codec in codecs]:
            frame = av.AudioFrame.from_ndarray(np.rint(sound * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts = rate, 0
            codec = stream.codec_context
            fit = av.AudioResampler(codec.format.name, "mono", rate, codec.frame_size or None)
            for part in [*fit.resample(frame), *fit.resample(None)]:
                file.mux(stream.encode(part))
            file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("width, off", [(1, 1e-2), (2, 5e-5)])
@pytest.mark.parametrize("channels", [1, 2])
def test_bits_and_channels(tmp_path, width, off, channels):
    """The mean of two channels; eight bits are unsigned."""
    sound = tone(0.3, 16000)
    both = np.stack([sound * 1.5, sound * 0.5], axis=1)
    got = read_sound(write_wav(tmp_path / "a.wav", sound if channels == 1 else both, 16000, width))
    assert got.dtype == np.float32 and len(got) == 4800
    assert np.abs(got - sound).max() < off


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_rates(tmp_path, rate):
    got = read_sound(write_wav(tmp_path / "a.wav", tone(0.5, rate), rate))
    assert len(got) == 8000 and sound_seconds(tmp_path / "a.wav") == Fraction(round(0.5 * rate), rate)
    inside = slice(400, -400)
    assert np.abs(got - tone(0.5, 16000))[inside].max() < 1e-3
    if rate > 20000:  # what 16,000 a second cannot hold does not come back as another tone
        assert np.abs(resampled(tone(0.5, rate, 9500).astype(np.float32), rate, 16000)[inside]).max() < 1e-3


@pytest.mark.parametrize("codec, ending, off", [
    ("flac", "flac", 5e-5), ("libmp3lame", "mp3", 0.05), ("libopus", "ogg", 0.05),
])  # fmt: skip
def test_formats(tmp_path, codec, ending, off):
    rate = 48000 if codec == "libopus" else 16000
    got = read_sound(write_encoded(tmp_path / f"a.{ending}", tone(0.5, rate), rate, codec))
    assert np.abs(got[1000:7000] - tone(0.5, 16000)[1000:7000]).max() < off


def test_a_sound_of_an_unknown_codec_is_passed_over(tmp_path):
    file = write_encoded(tmp_path / "a.mka", tone(0.5, 16000), 16000, "flac", "pcm_u8")
    file.write_bytes(file.read_bytes().replace(b"A_FLAC", b"A_NONE"))
    assert len(read_sound(file)) == 8000
    assert sound_notes(file) == ["a.mka has 8 bits a sample, whose noise the model hears, too"]


def test_silence(tmp_path):
    assert not read_sound(write_wav(tmp_path / "a.wav", np.zeros(16000), 16000)).any()


@pytest.mark.parametrize("kind, words", [
    ("empty", "is empty: there is no sound in it"), ("picture", "cannot be read as a sound"),
    ("video", "has no sound in it"), ("nothing", "does not exist, expected a file"),
    ("long", "is longer than 600 seconds"),
])  # fmt: skip
def test_what_is_no_sound(tmp_path, kind, words):
    path = tmp_path / "a.wav"
    if kind == "empty":
        write_wav(path, np.zeros(0), 16000)
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "video":
        path = tmp_path / "a.mp4"
        with VideoWriter(path, 16, (16, 16), {}) as writer:
            writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    elif kind == "long":
        write_wav(path, np.zeros(100 * 601), 100, 1)
    with pytest.raises(ValueError, match=words) as caught:
        read_sound(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seconds, rate, frames, samples", [
    (1.0, 16000, 16, 16000),  # shorter than the video of 29 frames, which it ends
    (1.03, 44100, 16, 44100),  # what is less than a frame is left out
    (0.01, 16000, 1, 160),  # at least one frame
    (3.0, 48000, 29, 87000),  # longer
])  # fmt: skip
def test_sound_and_video_end_together(tmp_path, seconds, rate, frames, samples):
    sound = write_wav(tmp_path / "a.wav", tone(seconds, rate), rate)
    with VideoWriter(tmp_path / "a.mp4", 16, (32, 32), {}, speech=sound) as writer:
        for _ in range(29):
            writer.write(np.zeros((1, 32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert (audio.codec_context.name, audio.rate) == ("aac", rate)
        assert abs(audio.duration * audio.time_base * rate - samples) < 100
        assert video.frames == frames and video.duration * video.time_base == Fraction(frames, 16)
        heard = np.concatenate([part.to_ndarray()[0] for part in file.decode(audio=0)])
    assert len(read_sound(tmp_path / "a.mp4")) >= frames / 16 * 16000 - 100  # what is written can be read
    if seconds > 0.5:
        assert np.abs(heard[2000 : rate // 2] - tone(seconds, rate)[2000 : rate // 2]).max() < 0.05
