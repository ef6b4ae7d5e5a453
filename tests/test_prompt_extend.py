"""Prompt extension through a real mlx-lm folder: a tiny Qwen2 with random weights, and its tokenizer, made here."""

import argparse
import inspect
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import wan_mlx
from wan_mlx.cli.flags import build_parser
from wan_mlx.cli.jobs import extension_of
from wan_mlx.cli.main import main
from wan_mlx.errors import UsageError, WanError, install_command
from wan_mlx.media.write import read_settings
from wan_mlx.presets import PRESETS
from wan_mlx.prompts import extend as prompt_extend
from wan_mlx.prompts.extend import Extension, PromptExtender, Sampler, complaint_of, extend_prompt, language_of, tidy
from wan_mlx.prompts.instructions import INSTRUCTIONS, PICTURE_ALONE, kind_of
from wan_mlx.request_builder import build_request

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = dict(
    model_type="qwen2", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
ANSWER = "a red circle turns slowly on a blue wall"


def write_model(folder, ending: float = 2.15, template: str | None = TEMPLATE, seed: int = 0):
    """``ending``: how ready the model is to end its answer; it says random words of the letters a to h."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=260, special_tokens=specials, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([ANSWER], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | ({"chat_template": template} if template else {})))
    vocab = tokenizer.get_vocab()
    config = CONFIG | {"vocab_size": len(vocab), "eos_token_id": vocab["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config))

    rng, dim, wide = np.random.default_rng(seed), CONFIG["hidden_size"], CONFIG["intermediate_size"]
    arrays = {"model.embed_tokens.weight": rng.normal(size=(len(vocab), dim)), "model.norm.weight": np.ones(dim)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", dim), ("k", dim // 2), ("v", dim // 2)):
            arrays[f"{layer}self_attn.{name}_proj.weight"] = rng.normal(size=(rows, dim)) / 6
            arrays[f"{layer}self_attn.{name}_proj.bias"] = rng.normal(size=rows) / 6
        arrays[f"{layer}self_attn.o_proj.weight"] = rng.normal(size=(dim, dim)) / 6
        arrays[f"{layer}mlp.gate_proj.weight"] = rng.normal(size=(wide, dim)) / 6
        arrays[f"{layer}mlp.up_proj.weight"] = rng.normal(size=(wide, dim)) / 6
        arrays[f"{layer}mlp.down_proj.weight"] = rng.normal(size=(dim, wide)) / 8
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{layer}{name}.weight"] = np.ones(dim)
    # The first channel stays large through all layers: what a token's row says to it is how often it comes.
    arrays["model.embed_tokens.weight"][:, 0] = 12
    head = rng.normal(size=(len(vocab), dim)) / 8
    head[:, 0] = -8
    for token in "abcdefgh":
        head[vocab[token], 0] = 2
    head[vocab["Ġ"], 0] = 2
    head[vocab["<|im_end|>"], 0] = ending
    arrays["lm_head.weight"] = head
    mx.save_safetensors(str(folder / "model.safetensors"), {n: mx.array(a, mx.float32) for n, a in arrays.items()})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "talks")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "endless", ending=-20)


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "silent", ending=20)


def test_the_seed_decides(folder):
    first, again, other = (extend_prompt("a red circle", folder, seed=seed) for seed in (5, 5, 6))
    assert first == again and first.prompt != other.prompt
    assert first.original == "a red circle" and first.model == str(folder) and first.complaint is None
    assert len(first.prompt) > 1 and set(first.prompt) <= set("abcdefgh ")


def test_no_global_state_is_touched_and_memory_returns(folder):
    extend_prompt("a", folder)  # mlx-lm keeps a few small arrays from its first use on
    mx.random.seed(11)
    before = np.array(mx.random.state[0]).tolist(), mx.get_active_memory()
    with PromptExtender(folder) as extender:
        extender("a red circle")
        loaded = mx.get_active_memory() - before[1]
        assert loaded >= (folder / "model.safetensors").stat().st_size * 0.9
    assert mx.get_active_memory() <= before[1] + 0.01 * loaded
    assert np.array(mx.random.state[0]).tolist() == before[0]


def test_instructions_suit_the_task(folder, monkeypatch):
    """Instructions and prompt reach the model through its own template, in the prompt's language or the one asked."""
    import mlx_lm

    told, generate = [], mlx_lm.stream_generate

    def listening(model, tokenizer, ids, **options):
        told.append(tokenizer.decode(ids))
        return generate(model, tokenizer, ids, **options)

    monkeypatch.setattr(mlx_lm, "stream_generate", listening)
    for prompt, task, language, kind, wanted in [
        ("a cat boxing", "t2v", None, "text", "en"), ("猫在打拳", "vace", None, "text", "zh"),
        ("a cat boxing", "i2v", "zh", "image", "zh"), ("猫", "flf2v", "en", "transition", "en"),
        ("a cat boxing", "t2v-A14B", None, "cinematic text", "en"), ("猫", "ti2v", None, "cinematic text", "zh"),
        ("a cat boxing", "t2v-14B", None, "text", "en"),
    ]:  # fmt: skip
        extend_prompt(prompt, folder, language, task=task)
        assert told[-1] == (
            f"<|im_start|>system\n{INSTRUCTIONS[kind][wanted]}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_instructions_are_there_for_each_kind_and_language():
    given = (("a", False), ("a", True), ("", True))
    cases = [(preset, *case) for preset in PRESETS.values() for case in given if case[0] or preset.cinematic]
    assert {kind_of(*case) for case in cases} == set(INSTRUCTIONS)
    assert PICTURE_ALONE.keys() == INSTRUCTIONS["image alone"].keys()
    for texts in INSTRUCTIONS.values():
        assert language_of(texts["zh"]) == "zh" and language_of(texts["en"]) == "en"
        assert len(texts["zh"]) > 200 and len(texts["en"]) > 600


@pytest.mark.parametrize(
    "model, prompt, with_image, kind",
    [
        ("t2v-A14B", "a", False, "cinematic text"),
        ("i2v-A14B", "a", True, "cinematic image"),
        ("i2v-A14B", " ", True, "image alone"),
        ("ti2v-5B", "a", False, "cinematic text"),
        ("ti2v-5B", "a", True, "cinematic image"),
        ("ti2v-5B", "", True, "image alone"),
    ],
)
def test_wan2_2_has_instructions_of_its_own(model, prompt, with_image, kind):
    preset = PRESETS[model]
    assert kind_of(preset, prompt, with_image) == kind


@pytest.mark.parametrize("kind, language, words", [
    ("cinematic text", "en", ["time", "light", "tone", "lens", "framing", "angle"]),
    ("cinematic text", "zh", ["时间", "光线", "色调", "镜头", "构图", "角度"]),
])  # fmt: skip
def test_cinematic_terms(kind, language, words):
    assert all(word in INSTRUCTIONS[kind][language] for word in words)


@pytest.mark.parametrize("model, with_image", [("t2v-A14B", False), ("ti2v-5B", False), ("i2v-14B-480P", True)])
def test_an_empty_prompt_needs_a_picture_and_wan2_2(model, with_image):
    picture = np.zeros((16, 16, 3), np.uint8) if with_image else None
    with pytest.raises(ValueError, match="the prompt is empty"):
        extend_prompt("", "nowhere", task=model, image=picture)
    preset = PRESETS[model]
    with pytest.raises(ValueError, match="the prompt is empty"):
        build_request(preset, preset.transformer, preset.geometry, "", preset.experts, image=picture)


@pytest.mark.parametrize("model", ["i2v-A14B", "ti2v-5B"])
def test_a_request_with_a_picture_alone(model):
    preset, picture = PRESETS[model], np.zeros((32, 32, 3), np.uint8)
    request = build_request(preset, preset.transformer, preset.geometry, "", preset.experts, image=picture)
    assert request.prompt == ""
    with pytest.raises(ValueError, match="have a prompt written out of the picture by extending it"):
        prompt_extend.extend_requests(preset, [request], False, False)


def test_an_endless_answer_leaves_the_prompt(endless, monkeypatch, caplog):
    monkeypatch.setattr(prompt_extend, "MAX_TOKENS", 20)
    extended = extend_prompt("a red circle", endless)
    assert extended.prompt == "a red circle" and extended.complaint == "did not come to an end within 20 tokens"
    assert f"the prompt stays as it is: {endless}'s answer did not come to an end" in caplog.text


def test_an_empty_answer_leaves_the_prompt(silent, caplog):
    extended = extend_prompt("a red circle", silent)
    assert extended.prompt == "a red circle" and extended.complaint == "is empty"
    assert "answer is empty" in caplog.text


@pytest.mark.parametrize(
    "words", ["I'm sorry, but I can't help with that.", "I cannot assist with this request.", "Sorry, no.",
              "As an AI language model, I", "抱歉，我无法完成", "我不能描述这样的内容", "对不起，"]
)  # fmt: skip
def test_a_refusal_leaves_the_prompt(folder, words):
    with PromptExtender(folder) as extender:
        extender._generate = lambda *_: (words, True)
        extended = extender("a red circle")
    assert extended.prompt == "a red circle" and extended.complaint.startswith("is a refusal (")
    assert complaint_of("A sorry-looking cat cannot reach the shelf", True) is None


def test_tidy():
    assert tidy('<think>\nhow?\n</think>\n"A cat\n boxes."') == "A cat boxes."
    assert tidy("“一只猫”") == "一只猫"
    assert tidy('"Stop" says the sign "now"') == '"Stop" says the sign "now"'


def test_sampler():
    logprobs = mx.log(mx.array([[0.1, 0.5, 0.3, 0.1]]))
    drawn = [int(sampler(logprobs)[0]) for sampler in [Sampler(3, temperature=1.0, top_p=0.75)] for _ in range(200)]
    assert set(drawn) == {1, 2} and 90 <= drawn.count(1) <= 160  # of the likeliest, 5 to 3
    assert {int(sampler(logprobs)[0]) for sampler in [Sampler(0, top_p=0.01)] for _ in range(20)} == {1}


def test_a_base_model_without_chat_template_is_refused(folder, tmp_path):
    with pytest.raises(WanError, match="has no chat template"):
        extend_prompt("a", write_model(tmp_path / "base", template=None))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(WanError, match="odd cannot be loaded: ") as error:
        extend_prompt("a", tmp_path / "odd")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="language is 'fr', expected one of zh, en"):
        extend_prompt("a", folder, "fr")
    with pytest.raises(ValueError, match="unknown task 'x'"):
        extend_prompt("a", folder, task="x")


def test_pipeline(folder, pico):
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
    options = dict(width=16, height=16, num_frames=1, steps=1, seed=5)
    video = pipe("a red circle", extend_prompt=folder, **options)
    words = extend_prompt("a red circle", folder, seed=5).prompt
    assert video.settings["prompt"] == words and video.settings["original_prompt"] == "a red circle"
    assert video.settings["extended_by"] == folder.name
    assert np.array_equal(video.latents, pipe(words, **options).latents)
    assert pipe("a red circle", **options).settings["original_prompt"] is None


def without(flags, name):
    index = flags.index(name)
    return [*flags[:index], *flags[index + 2 :]]


def test_command_line(folder, flags, tmp_path, capsys):
    extend = ["--extend-prompt", "--extend-model", str(folder)]
    output = tmp_path / "a.png"
    assert main([*flags, *extend, "--dry-run"]) == 0
    assert f"extend    the prompt by {folder}" in capsys.readouterr().err
    flags = [flag for flag in flags if flag != "--quiet"] + ["--frames", "1", "--steps", "1"]
    assert main([*flags, *extend, "--output", str(output)]) == 0
    words = extend_prompt("a red circle", folder, seed=3).prompt
    said = capsys.readouterr().err
    assert f"prompt    {words}\n          written out by {folder.name} from: a red circle\n" in said
    settings = read_settings(output)
    assert (settings["prompt"], settings["original_prompt"]) == (words, "a red circle")
    again = tmp_path / "again.png"  # the same words, without the language model
    assert main(["--config", str(output), "--model", flags[1], "--output", str(again), "--quiet"]) == 0
    assert read_settings(again)["prompt"] == words and read_settings(again)["original_prompt"] is None


def test_a_run_goes_on_with_its_words(folder, flags, tmp_path, monkeypatch):
    """However the language model would answer now."""
    output = tmp_path / "a.mp4"
    flags = [*flags, "--extend-prompt", "--extend-model", str(folder), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(wan_mlx.WanPipeline, "decode", lambda *_: (_ for _ in ()).throw(OSError("cut")))
        assert main(flags) == 1
    monkeypatch.setattr(PromptExtender, "__enter__", None)
    assert main(["--resume", str(output)]) == 0
    settings = read_settings(output)
    assert settings["original_prompt"] == "a red circle" and settings["extended_by"] == folder.name


def test_mlx_lm_is_imported_here_alone():
    package = Path(wan_mlx.__file__).parent
    imports = re.compile(r"(import|from) mlx_(lm|vlm)")
    users = {path.name for path in package.rglob("*.py") if imports.search(path.read_text("utf-8"))}
    assert users == {"extend.py"}
    names = "import sys, wan_mlx.generate, wan_mlx.prompts.extend; sys.exit('mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", names]).returncode == 0


def test_command_line_says_why_the_prompt_stays(silent, flags, tmp_path, capsys):
    output = tmp_path / "a.png"
    flags = [*flags, "--frames", "1", "--steps", "1", "--extend-prompt", "--extend-model", str(silent)]
    assert main([*flags, "--output", str(output)]) == 0
    said, size = capsys.readouterr().err.splitlines()
    assert said == f"the prompt stays as it is: {silent}'s answer is empty" and "learned to draw at" in size
    assert read_settings(output)["prompt"] == "a red circle" and read_settings(output)["extended_by"] is None


def test_a_batch_loads_one_model(folder, flags, tmp_path, monkeypatch):
    loads, enter = [], PromptExtender.__enter__
    monkeypatch.setattr(PromptExtender, "__enter__", lambda self: loads.append(1) or enter(self))
    lines = tmp_path / "lines.jsonl"
    rest = {"frames": 1, "steps": 1, "extend_prompt": True, "extend_model": str(folder)}
    entries = [{"prompt": p, "seed": i, "output": str(tmp_path / f"{i}.png"), **rest} for i, p in enumerate("ab")]
    lines.write_text("\n".join(map(json.dumps, entries)))
    command = [*without(flags, "--prompt"), "--prompts", str(lines)]
    assert main(command) == 0 and len(loads) == 1
    for i, prompt in enumerate("ab"):
        settings = read_settings(tmp_path / f"{i}.png")
        assert settings["original_prompt"] == prompt
        assert settings["prompt"] == extend_prompt(prompt, folder, seed=i).prompt
    loads.clear()
    assert main(command) == 0 and not loads  # both are made already


def parsed(*words) -> argparse.Namespace:
    return build_parser().parse_args(["--prompt", "a", *words])


def test_official_flags():
    assert extension_of(parsed()) is None
    assert extension_of(parsed("--use_prompt_extend")) == Extension(None, "zh")
    assert extension_of(parsed("--extend-prompt")) == Extension(None, None)
    official = parsed("--use_prompt_extend", "--prompt_extend_method", "local_qwen", "--prompt_extend_model",
                      "Qwen2.5_14B", "--prompt_extend_target_lang", "en")  # fmt: skip
    assert extension_of(official) == Extension("Qwen2.5_14B", "en")
    assert prompt_extend.choose_model("Qwen2.5_14B", False) == "mlx-community/Qwen2.5-14B-Instruct-4bit"
    assert prompt_extend.choose_model(None, False) == "mlx-community/Qwen2.5-7B-Instruct-4bit"
    dashscope = parsed("--use_prompt_extend", "--prompt_extend_method", "dashscope")
    assert extension_of(dashscope) == Extension(None, "zh")
    with pytest.raises(UsageError, match="expected --extend-prompt, too"):
        extension_of(parsed("--extend-model", "x"))


@pytest.fixture
def vision(folder, tmp_path, monkeypatch):
    """A folder that says it sees, and in place of mlx-vlm a module that notes what it is given."""
    seen = types.SimpleNamespace(config={"model_type": "sees"}, reason="stop")

    def load(path):
        seen.path = path
        return types.SimpleNamespace(config=seen.config), "processor"

    def apply_chat_template(processor, config, messages, num_images):
        assert processor == "processor" and config is seen.config
        seen.messages, seen.num_images = messages, num_images
        return "templated"

    def generate(model, processor, prompt, image=None, max_tokens=None, sampler=None):
        assert prompt == "templated" and isinstance(sampler, Sampler) and max_tokens == prompt_extend.MAX_TOKENS
        seen.pictures = [np.asarray(Image.open(path)) for path in image or ()]
        return types.SimpleNamespace(text="a red circle moves", finish_reason=seen.reason)

    fake = types.ModuleType("mlx_vlm")
    fake.__spec__ = ModuleSpec("mlx_vlm", None)
    fake.load, fake.apply_chat_template, fake.generate = load, apply_chat_template, generate
    monkeypatch.setitem(sys.modules, "mlx_vlm", fake)
    seen.folder = tmp_path / "sees"
    seen.folder.mkdir()
    (seen.folder / "config.json").write_text(json.dumps({"model_type": "sees", "vision_config": {}}))
    return seen


def test_a_model_that_sees_is_shown_the_picture(vision):
    picture = np.full((1000, 500, 3), (200, 30, 30), np.uint8)
    extended = extend_prompt("it moves", vision.folder, task="flf2v", image=picture, last_image=picture[:100])
    assert extended.prompt == "a red circle moves" and vision.path == str(vision.folder)
    assert [shown.shape for shown in vision.pictures] == [(768, 384, 3), (100, 500, 3)] and vision.num_images == 2
    assert (vision.pictures[0][5, 5] == (200, 30, 30)).all()
    assert vision.messages[0] == {"role": "system", "content": INSTRUCTIONS["transition"]["en"]}
    vision.reason = "length"
    assert extend_prompt("it moves", vision.folder, task="i2v", image=picture).prompt == "it moves"
    assert prompt_extend.choose_model(None, True) == "mlx-community/Qwen2.5-VL-7B-Instruct-4bit"


@pytest.mark.parametrize(
    "file, text",
    [("config.json", {"vision_config": {}, "model_file": "mine.py"}),
     ("preprocessor_config.json", {"image": [{"auto_map": {"AutoProcessor": "evil/x--mine.Processor"}}]})],
)  # fmt: skip
def test_a_model_that_sees_runs_no_python_of_its_own(vision, file, text):
    """mlx-vlm has no question before it."""
    (vision.folder / file).write_text(json.dumps(text).replace("auto_map", "auto_m\\u0061p"))
    with pytest.raises(WanError, match=r"names a program of its own \((model_file|auto_map)\), which is not run"):
        extend_prompt("a", vision.folder, task="i2v", image=np.zeros((16, 16, 3), np.uint8))
    assert not hasattr(vision, "path")


def test_a_model_that_writes_runs_no_python_of_its_own(folder, tmp_path, monkeypatch):
    import mlx_lm

    own = shutil.copytree(folder, tmp_path / "own")
    (own / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_file": "mine.py"}))
    with pytest.raises(WanError, match="own cannot be loaded: "):
        extend_prompt("a", own)
    assert not (tmp_path / "ran").exists()
    asked, load = {}, mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", lambda path, **options: asked.update(options) or load(path, **options))
    extend_prompt("a", folder)  # whatever it does unasked
    assert asked == {"trust_remote_code": False, "tokenizer_config": {"trust_remote_code": False}}


def test_mlx_lm_is_new_enough_to_ask_before_it_runs_python():
    """What pyproject.toml demands, is here, and has the argument."""
    import mlx_lm

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (demanded,) = re.findall(r'^  "(mlx-lm[^"]*)",', text, re.MULTILINE)
    wanted = Requirement(demanded).specifier
    assert not wanted.contains("0.31.3") and wanted.contains("0.32.0")  # the last that did not ask, the first that did
    assert wanted.contains(mlx_lm.__version__)
    assert inspect.signature(mlx_lm.load).parameters["trust_remote_code"].default is False


def test_no_python_is_downloaded(monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or name)
    prompt_extend._folder_of("someone/model")
    assert "*.json" in asked["allow_patterns"] and not any("py" in pattern for pattern in asked["allow_patterns"])


def test_a_text_model_is_not_shown_the_picture(vision, folder):
    picture = np.zeros((16, 16, 3), np.uint8)
    assert extend_prompt("a", folder, task="i2v", image=picture).complaint is None
    assert not hasattr(vision, "pictures")


@pytest.mark.parametrize("language, wanted", [(None, "en"), ("zh", "zh")])
def test_a_prompt_is_written_out_of_the_picture_alone(vision, language, wanted):
    picture = np.zeros((16, 16, 3), np.uint8)
    extended = extend_prompt("", vision.folder, language, task="i2v-A14B", image=picture)
    assert (extended.prompt, extended.original, extended.complaint) == ("a red circle moves", "", None)
    assert [message["content"] for message in vision.messages] == [
        INSTRUCTIONS["image alone"][wanted], PICTURE_ALONE[wanted]]  # fmt: skip
    assert len(vision.pictures) == 1


def test_a_picture_alone_needs_a_model_that_sees(vision, folder, monkeypatch):
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(WanError, match="the prompt is empty, and .* does not see pictures; .*such as mlx-community"):
        extend_prompt("", folder, task="ti2v", image=picture)
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setattr(prompt_extend, "_folder_of", None)  # nothing is downloaded before
    with pytest.raises(ImportError, match=f"needs mlx-vlm: {re.escape(install_command('mlx-vlm'))}; or give a prompt"):
        extend_prompt("", task="ti2v", image=picture)


@pytest.fixture
def cinematic(monkeypatch, tmp_path):
    """Flags of a model that takes a picture alone, and makes a still of it in seconds."""
    monkeypatch.setitem(PRESETS, "nano-i2v", replace(PRESETS["nano-i2v"], cinematic=True))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    return ["--model", "nano-i2v", "--prompt", "", "--image", str(tmp_path / "red.png"), "--size", "16x16", "--frames",
            "1", "--steps", "1", "--seed", "3", "--output", str(tmp_path / "a.png")]  # fmt: skip


def test_command_line_with_a_picture_alone(vision, cinematic, capsys):
    assert main(cinematic) == 2
    assert "the prompt is empty; say what the video should show, or have" in capsys.readouterr().err
    assert main([*cinematic, "--extend-prompt", "--extend-model", str(vision.folder)]) == 0
    assert "written out by sees from the picture alone\n" in capsys.readouterr().err
    settings = read_settings(cinematic[-1])
    assert (settings["prompt"], settings["original_prompt"]) == ("a red circle moves", "")
    assert vision.messages[0]["content"] == INSTRUCTIONS["image alone"]["en"]


def test_a_picture_alone_of_which_nothing_was_written(vision, cinematic, capsys):
    vision.reason = "length"
    assert main([*cinematic, "--extend-prompt", "--extend-model", str(vision.folder)]) == 1
    said = capsys.readouterr().err
    assert "no prompt was written: " in said and "the prompt is empty, and none was written out of the picture" in said
    assert not Path(cinematic[-1]).exists()


def test_a_batch_goes_on_without_the_line_for_which_nothing_was_written(vision, cinematic, tmp_path):
    vision.reason = "length"
    rest = {"image": str(tmp_path / "red.png"), "extend_prompt": True, "extend_model": str(vision.folder)}
    entries = [{"prompt": prompt, "output": str(tmp_path / f"{i}.png"), **rest} for i, prompt in enumerate(("", "b"))]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(map(json.dumps, entries)))
    command = without(without(without(cinematic, "--prompt"), "--output"), "--image")
    assert main([*command, "--prompts", str(lines)]) == 1
    first, second = map(json.loads, (tmp_path / "lines.report.jsonl").read_text().splitlines())
    assert first["status"] == "failed" and first["error"].startswith("the prompt is empty, and none was written")
    assert second["status"] in ("done", "suspect") and read_settings(second["output"])["prompt"] == "b"


def test_missing_mlx_vlm_names_the_extra(vision, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    with pytest.raises(ImportError, match=f"needs mlx-vlm to see the picture: {re.escape(install_command('mlx-vlm'))}"):
        extend_prompt("a", vision.folder, task="i2v", image=np.zeros((16, 16, 3), np.uint8))
    assert prompt_extend.choose_model(None, True) == prompt_extend.DEFAULT_MODEL
    assert "will not see the picture" in caplog.text
