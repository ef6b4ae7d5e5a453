"""A plan is of the run that the same options would make: of its own request, on every face."""

import mlx.core as mx
import numpy as np
import pytest
from crafted import header_only
from PIL import Image
from test_speech import tone, write_wav

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.media.write import save_video
from wan_mlx.planning import choose, speed
from wan_mlx.planning import flops as work
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.planning.sizes import not_here, sizes_of
from wan_mlx.presets import PRESETS
from wan_mlx.request_builder import build_request
from wan_mlx.weights.configs import shapes_of

GIB = 2**30


def rows(plan) -> dict:
    return {row.stage: row for row in plan.rows}


def denoise(model: str, **options):
    return rows(wan_mlx.plan(model, **{"memory": "200GB", **options}))["denoise"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A wide picture, and a video of 9 frames at 16 a second."""
    folder = tmp_path_factory.mktemp("sources")
    Image.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(folder / "wide.png")
    save_video(folder / "clip.mp4", np.full((9, 64, 64, 3), 90, np.uint8), 16, {})
    return {"image": str(folder / "wide.png"), "video": str(folder / "clip.mp4")}


def lora_for(preset, path, rank: int, blocks: int) -> str:
    """The header of a LoRA for the feed-forward layers of the first blocks, without its values."""
    shapes, tensors = shapes_of(preset.transformer), {}
    for name in (f"blocks.{block}.ffn.{layer}" for block in range(blocks) for layer in (0, 2)):
        rows, columns = shapes[f"{name}.weight"]
        for factor, shape in (("down", (rank, columns)), ("up", (rows, rank))):
            tensors[f"diffusion_model.{name}.lora_{factor}.weight"] = shape
    return str(header_only(path, tensors))


RANK = 64


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A LoRA for three of T2V-14B's blocks."""
    return lora_for(PRESETS["t2v-14B"], tmp_path_factory.mktemp("loras") / "style.safetensors", RANK, blocks=3)


class TestTheRunsOwn:
    """`wan_mlx.plan` of a model that is here is its pipeline's plan of its request."""

    @pytest.mark.parametrize("model, options", [
        ("nano", dict(size="128x96", num_frames=5, steps=20, cache="easycache:0.1")),
        ("nano", dict(size=(128, 96), recipe="lightx2v-4step")),
        ("nano", dict(video="video", strength=0.5, steps=10, memory="1GB")),
        ("nano", dict(guidance_range=(0.0, 0.5), steps=10, cfg_zero=True)),
        ("nano-i2v", dict(image="image", quantize="q8", dtype="float32")),
        ("nano-i2v", dict(image="image", fit="crop", guidance_scale=1.0)),
    ])  # fmt: skip
    def test_of_a_call(self, sources, model, options):
        options = {name: sources.get(str(value), value) for name, value in options.items()}
        opening = {name: options.pop(name) for name in ("memory", "quantize", "dtype") if name in options}
        opening |= {"memory": opening.get("memory", "4GB")}
        pipe = wan_mlx.WanPipeline.from_pretrained(model, progress=False, **opening)
        request = pipe.request("a red circle", seed=1, **options)
        assert wan_mlx.plan(model, **opening, **options) == pipe.plan(request)

    def test_of_several_that_keep_networks_loaded(self):
        pipe = wan_mlx.WanPipeline.from_pretrained("nano", progress=False, memory="2GB")
        with pipe.keep_loaded():
            kept = pipe.plan(pipe.request("a red circle"))
        assert wan_mlx.plan("nano", memory="2GB", kept=True) == kept != wan_mlx.plan("nano", memory="2GB")

    def test_of_the_command(self, sources, capsys, monkeypatch):
        monkeypatch.setattr(speed, "measure_rates", lambda *args: speed.Rates(1e12, 1e12, 1e12, 1e12))
        said = []
        for flags in (["nano-i2v", "--image", sources["image"]], ["nano-i2v"],
                      ["i2v-14B-480P", "--task", "i2v-14B"], ["t2v-14B", "--task", "t2i-14B"],
                      ["t2v-1.3B", "--recipe", "causvid-1.3B", "--num-videos", "3"]):  # fmt: skip
            assert main(["plan", *flags, "--memory", "64GB"]) == 0
            said.append(capsys.readouterr().out)
        assert "nano-i2v 176x80, 17 frames" in said[0] and "nano-i2v 128x128, 17 frames" in said[1]
        assert "i2v-14B-720P 1280x720, 81 frames" in said[2] and "t2v-14B 1280x720, 1 frames" in said[3]
        kept = wan_mlx.plan("t2v-1.3B", memory="64GB", recipe="causvid-1.3B", kept=True)
        assert f"{kept.peak / GIB:.2f} GiB" in said[4]
        assert main(["plan", "t2v-A14B", "--image", sources["image"]]) == 2
        assert "image was given to a t2v model" in capsys.readouterr().err


class TestForwards:
    def test_guidance_and_its_range(self):
        each = denoise("t2v-1.3B", steps=10, guidance_scale=1.0).flop / 10
        shared = sum(work.shared_parts(PRESETS["t2v-1.3B"].transformer, 32760).values())
        assert 0.024 * each < shared < each / 30  # 1.2 % of two passes

        def made(**options) -> float:
            return denoise("t2v-1.3B", steps=10, **options).flop

        assert made() == pytest.approx(20 * each - 10 * shared)
        assert made(guidance_range=(0.0, 0.5)) == pytest.approx(15 * each - 5 * shared)
        assert made(cfg_zero=2) == pytest.approx(16 * each - 8 * shared)
        assert made(skip_layers=(9,), skip_range=(0.2, 0.5)) == pytest.approx(20 * each - 7 * shared)
        assert denoise("t2v-1.3B", recipe="causvid-1.3B").flop == pytest.approx(8 * each)
        one = rows(wan_mlx.plan("t2v-1.3B", memory="200GB", guidance_scale=1))["encode text"].flop
        assert rows(wan_mlx.plan("t2v-1.3B", memory="200GB"))["encode text"].flop == 2 * one

    def test_of_a_step_cache_as_far_as_they_are_known(self):
        plain, mag = denoise("t2v-1.3B"), denoise("t2v-1.3B", cache="magcache")
        assert mag.flop < 0.8 * plain.flop and mag.peak > plain.peak  # the residuals that it keeps
        easy = denoise("t2v-1.3B", cache="easycache")
        assert easy.flop == plain.flop and plain.peak < easy.peak < mag.peak
        each = 4 * 21 * 60 * 104 * 16
        outputs, hidden = (denoise("t2v-1.3B", cache=f"spectrum:2:0.75:{place}") for place in ("outputs", "hidden"))
        assert outputs.flop == pytest.approx(0.28 * plain.flop) and outputs.peak - plain.peak == 28 * each
        assert hidden.peak - plain.peak == 28 * 2 * 32760 * 1536  # in bfloat16
        with pytest.raises(ValueError, match="teacache has no published constants for ti2v-5B"):
            wan_mlx.plan("ti2v-5B", cache="teacache")

    def test_of_each_expert(self):
        """26 of 40 steps are the high-noise one's, whose forwards are two where the other's are one."""
        preset = PRESETS["t2v-A14B"]
        nets = sizes_of(not_here(preset).divided(preset.boundary), "bfloat16", released=preset)
        given = dict(guidance_scale=(1.0, 4.0), width=832, height=480)
        request = build_request(preset, preset.transformer, preset.geometry, "a", 2, **given)
        assert choose.forwards_of(request, nets.experts, preset.name) == ([52, 14], 26)
        plan = wan_mlx.plan("t2v-A14B", memory="12GB", **given)
        assert plan.stream
        weights = nets.weights
        assert rows(plan)["denoise"].reads == 2 * weights.stored_outside + (52 + 14) * weights.stored_blocks
        resident = denoise("t2v-A14B", boundary=0.1, steps=4, shift=12.0)  # all four are the high-noise one's
        assert resident.reads == weights.stored_outside + weights.stored_blocks


class TestWhatIsEncoded:
    def test_of_each_task(self, sources):
        image, video = sources["image"], sources["video"]
        whole = rows(wan_mlx.plan("i2v-A14B", memory="200GB", size="832x480"))["encode video"].flop
        given = dict(memory="200GB", size="832x480", num_frames=81)
        flop = rows(wan_mlx.plan("t2v-14B", **given, video=video, strength=0.5))["encode video"].flop
        assert 0 < flop < whole / 5  # its 9 frames
        for options in ({}, dict(video=video, strength=1.0)):  # nothing of it would remain, so that it is not read
            assert "encode video" not in rows(wan_mlx.plan("t2v-14B", **given, **options))
        both = rows(wan_mlx.plan("vace-14B", **given))
        alone = rows(wan_mlx.plan("vace-14B", **given, src_ref_images=[image, image]))
        still = rows(wan_mlx.plan("vace-14B", **{**given, "num_frames": 1}))["encode video"].flop / 2
        assert both["encode video"].flop == 2 * whole
        assert alone["encode video"].flop == pytest.approx(whole + 2 * still)
        assert alone["denoise"].flop > both["denoise"].flop and alone["decode"].flop == both["decode"].flop

    def test_of_ti2v(self, sources):
        """The image alone; without one, nothing."""
        plain, with_image = (wan_mlx.plan("ti2v-5B", memory="200GB", **given) for given in
                             ({}, dict(image=sources["image"])))  # fmt: skip
        assert "encode video" not in rows(plain) and with_image.title == "ti2v-5B 1312x672, 121 frames"
        row, decode = rows(with_image)["encode video"], rows(with_image)["decode"]
        assert 0 < row.flop < decode.flop / 50 and row.peak < decode.peak

    def test_sources_that_lack_one(self, sources):
        with pytest.raises(ValueError, match="first and last frame to video needs both images"):
            wan_mlx.plan("flf2v-14B-720P", image=sources["image"])
        with pytest.raises(ValueError, match="image was given to a t2v model.*: use --model i2v-A14B"):
            wan_mlx.plan("t2v-A14B", image=sources["image"])
        with pytest.raises(ValueError, match="image_encoder was given to a i2v model, which reads no images with it"):
            wan_mlx.plan("i2v-A14B", image=sources["image"], image_encoder="nano-i2v")  # Wan2.2's reads no CLIP
        with pytest.raises(ValueError, match="a mask says what to make anew"):
            wan_mlx.plan("t2v-14B", src_mask=sources["image"])
        with pytest.raises(TypeError, match="a request has no option 'lora_scale'"):
            wan_mlx.plan("t2v-14B", lora_scale=1)
        with pytest.raises(ValueError, match="t2v-1.3B holds a t2v model .* the task i2v-14B-480P needs a i2v model"):
            wan_mlx.plan("t2v-1.3B", preset="i2v-14B-480P")


class TestLoras:
    def test_beside_packed_or_streamed_weights(self, style):
        block = 2 * 2 * RANK * (5120 + 13824)  # two layers, in bfloat16
        given = dict(width=832, height=480)
        for options, more in (({}, 0), (dict(quantize="q8"), 3 * block), (dict(memory="8GB"), 2 * block)):
            plain, with_lora = (denoise("t2v-14B", **given, **options, **lora) for lora in ({}, dict(loras=style)))
            assert with_lora.peak - plain.peak == more, options
        # Of two experts the larger one decides, and each has its own.
        given |= dict(quantize="q8")
        plain = denoise("t2v-A14B", **given).peak
        for loras, more in ((dict(loras={"low": style}), 3), (dict(loras=style, loras_high=[style]), 6),
                            (dict(loras_high=style, loras_low=style), 3)):  # fmt: skip
            assert denoise("t2v-A14B", **given, **loras).peak - plain == more * block

    def test_one_that_does_not_fit(self, style):
        with pytest.raises(WeightsError, match="do not fit blocks.0.ffn.0.weight"):
            wan_mlx.plan("t2v-1.3B", loras=style)
        with pytest.raises(ValueError, match="loras_high or loras_low was given, which is for one of two"):
            wan_mlx.plan("t2v-14B", loras={"high": style})

    def test_one_that_is_not_here_is_left_out_and_told(self, style):
        plan = wan_mlx.plan("t2v-14B", memory="200GB", loras=["a/b:c.safetensors:0.5", style])
        assert plan.without == ("a/b:c.safetensors",) and "\na/b:c.safetensors is not on this machine" in str(plan)


# What an H200 took (benchmarks/LOG.md), streamed within 8 GiB in bfloat16: a run of two clips of 832x448 that speak for
# nine seconds, with guidance, and of two clips of 832x480 by Animate, without it; GiB of each stage.
TOOK = {
    "s2v-14B": {"encode text": 0.74, "encode audio": 1.32, "encode video": 3.32, "denoise": 6.02, "decode": 5.22},
    "animate-14B": {"encode text": 0.72, "encode images": 2.35, "encode video": 3.53, "encode face": 1.85,
                    "denoise": 5.95, "decode": 5.33},
}  # fmt: skip
ASKED = {"s2v-14B": dict(size="832x480", num_clip=2), "animate-14B": dict(size="832x480")}


@pytest.fixture
def on_cuda(monkeypatch):
    """As planned where it was measured."""
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    monkeypatch.setattr(peaks, "has_fused_kernel", lambda dtype, head_dim: dtype == mx.bfloat16)
    monkeypatch.setattr(choose, "TOKENS_AT_ONCE", 32768)
    monkeypatch.setattr(choose, "LADDER", [(True, 32768), *choose.LADDER])


class TestClips:
    @pytest.mark.parametrize("name", TOOK)
    def test_peaks_are_within_a_tenth_of_those_measured(self, name, on_cuda):
        found = {stage: row.peak / GIB for stage, row in rows(wan_mlx.plan(name, memory="8GiB", **ASKED[name])).items()}
        assert found.keys() == TOOK[name].keys()
        assert found == pytest.approx(TOOK[name], rel=0.1)

    @pytest.mark.parametrize("states, took", [(49, 1.288), (449, 1.320), (2999, 2.016), (8999, 2.912), (29999, 6.943)])
    def test_sound_of_a_second_and_of_ten_minutes(self, states, took, on_cuda):
        nets = sizes_of(not_here(PRESETS["s2v-14B"]), "bfloat16", released=PRESETS["s2v-14B"])
        assert peaks.encode_audio(nets, states) / GIB == pytest.approx(took, rel=0.1)

    @pytest.mark.parametrize("shape, took", [((1, 40, 60), 1.425), ((1, 56, 104), 2.772), ((1, 88, 160), 5.936)])
    def test_a_picture_alone(self, shape, took, on_cuda):
        assert peaks.vae(PRESETS["s2v-14B"].vae, shape, None, False) / GIB == pytest.approx(took, rel=0.1)

    def test_a_clip_more_takes_longer_and_a_longer_sound_more(self):
        one, two = (rows(wan_mlx.plan("s2v-14B", memory="200GB", num_clip=clips)) for clips in (1, 2))
        assert two["denoise"].flop == pytest.approx(2 * one["denoise"].flop, rel=1e-3)
        assert two["decode"].flop > 2 * one["decode"].flop  # what is before a clip is decoded, too
        assert two["encode audio"].peak > one["encode audio"].peak

    @pytest.mark.parametrize("stage", ["encode video", "denoise", "decode"])
    @pytest.mark.parametrize("length, kept", [(76, 0), (72, 73)])
    def test_short_clips_keep_the_frames_before_them(self, stage, length, kept):
        """The next clip goes on from 73 frames, more than one has; what is heard takes some megabytes."""
        given = dict(memory="200GB", infer_frames=length, start_from_ref=True, size="832x448", fit="crop")
        one, two = (rows(wan_mlx.plan("s2v-14B", num_clip=clips, **given))[stage].peak for clips in (1, 2))
        assert two - one == pytest.approx(kept * 832 * 448 * 3 * 4, abs=10e6)

    def test_all_of_a_sound_is_heard_however_much_is_made(self, tmp_path, on_cuda):
        """One clip of a minute's sound."""
        write_wav(tmp_path / "talk.wav", tone(60, 16000), 16000)
        Image.fromarray(np.full((480, 832, 3), 90, np.uint8)).save(tmp_path / "a.png")
        given = dict(image=str(tmp_path / "a.png"), audio=str(tmp_path / "talk.wav"))
        clip, minute = (rows(wan_mlx.plan("s2v-14B", num_clip=1, memory="200GB", **sources))["encode audio"]
                        for sources in ({}, given))  # fmt: skip
        assert minute.peak > clip.peak + 0.5 * GIB and minute.flop > 10 * clip.flop
