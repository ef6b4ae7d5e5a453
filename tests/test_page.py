"""The page of `wan-mlx serve` in a real browser: a person types, waits, stops, goes on, and finds everything again.

The browser is the system's Chromium. Where there is none the tests are skipped, unless WAN_MLX_NEEDS_BROWSER is set, as
in .ci/run. With WAN_MLX_PICTURES=FOLDER the pictures of the docs are written there.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from hub_server import Hub
from test_speech import tone, write_wav

from wan_mlx.media.read import open_video
from wan_mlx.media.write import save_video

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if not os.environ.get("WAN_MLX_NEEDS_BROWSER"):
    pytest.importorskip("playwright", reason="needs Playwright")
    if BROWSER is None:
        pytest.skip("needs Chromium", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

PATIENCE = 240_000  # ms: two cores may have other work
SOURCES = Path(__file__).parent.parent / "examples/sources"
OFFICIAL = ("config.json", "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth",
            "google/umt5-xxl/spiece.model")  # fmt: skip
OF_SOME = ("wav2vec2-large-xlsr-53-english/config.json", "wav2vec2-large-xlsr-53-english/model.safetensors",
           "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "relighting_lora.ckpt")  # fmt: skip
PROMPT = "a red circle moves right on a black background"
# Chromium's own words about a preview that is not there yet.
NOT_YET = "Failed to load resource: the server responded with a status of 404"


@pytest.fixture(scope="module")
def hub():
    """One on loopback, with the files of some models by their names: 3 MB each."""
    files = dict.fromkeys(OFFICIAL, b"{}") | {"Wan2.1_VAE.pth": bytes(3_000_000)}
    repos = ("Wan2.1-T2V-1.3B", "Wan2.1-FLF2V-14B-720P", "Wan2.2-S2V-14B", "Wan2.2-Animate-14B")
    found = Hub({f"Wan-AI/{repo}": files | dict.fromkeys(OF_SOME, b"{}") for repo in repos})
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, hub):
    """The address of a server of its own, and the folder of its videos."""
    folder = tmp_path_factory.mktemp("library")
    of_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--port", str(port), "--library", str(folder), "--no-browser"]
    process = subprocess.Popen([sys.executable, "-m", "wan_mlx.generate", *words], cwd=folder, env=os.environ | of_hub)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{address}/health")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield address, folder
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """A new tab at the page, which must not have raised an error in the end."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, locale="en-GB", reduced_motion="no-preference"
    )
    yield from opened(context, server)
    context.close()


def opened(context, server):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda said: said.type == "error" and not said.text.startswith(NOT_YET) and wrong.append(said.text)
    )
    page.goto(server[0])
    expect(page.locator("#model option")).not_to_have_count(0)
    yield page
    assert wrong == []


def wait_until(happened) -> None:
    """The page's policy forbids Playwright to wait for it there."""
    ends = time.monotonic() + PATIENCE / 1000
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.1)


def ask(page: Page, steps: int, prompt: str = PROMPT) -> None:
    """Fill the form for a short video of nano, and make it."""
    page.fill("#prompt", prompt)
    page.click("#length label.chip:has-text('0.3 s')")
    if not page.locator("#more").get_attribute("open"):
        page.evaluate("document.getElementById('more').open = true")
    page.fill("#option-steps", str(steps))
    page.locator("#option-steps").blur()
    page.click("#make")


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("WAN_MLX_PICTURES"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=str(Path(folder) / name))


def videos_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mp4"))


def test_from_a_prompt_to_a_video_that_plays(page, server):
    expect(page.locator("#price")).to_contain_text("of memory", timeout=PATIENCE)  # the plan, before anything is made
    ask(page, steps=3)
    expect(page.locator("#now progress")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#now img")).to_be_visible(timeout=PATIENCE)  # what it is becoming
    first = page.locator("#now img").get_attribute("src")
    page.reload()  # nothing is lost
    expect(page.locator("#now")).to_contain_text(PROMPT, timeout=PATIENCE)
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#gallery button")).to_have_count(1, timeout=PATIENCE)
    assert "step=" in first
    page.click("#gallery button")
    expect(page.locator("#look-title")).to_have_text(PROMPT)
    expect(page.locator("#look dl")).to_contain_text("128 × 128")
    wait_until(lambda: page.evaluate("document.querySelector('#look video').currentTime > 0"))
    (path,) = videos_in(server[1])
    shown = np.array(page.evaluate(FRAME), np.float32).reshape(128, 128, 4)[..., :3]
    frames = [frame.astype(np.float32) for frame in open_video(path).read(range(open_video(path).num_frames))]
    assert min(np.abs(shown - frame).mean() for frame in frames) < 8
    picture(page, "page-video.png")


# The frame that a paused video shows, as the page sees its pixels.
FRAME = """async () => {
  const video = document.querySelector('#look video');
  video.pause();
  await new Promise((done) => { video.onseeked = done; video.currentTime = 0; });
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const pen = canvas.getContext('2d');
  pen.drawImage(video, 0, 0);
  return [...pen.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


def test_a_picture_chooses_the_model_and_a_stopped_run_goes_on_in_another_tab(page, server):
    before = len(videos_in(server[1]))
    page.set_input_files("#file", SOURCES / "first.png")
    expect(page.locator("#model")).to_have_value("nano-i2v")
    expect(page.locator(".source select")).to_have_value("image")
    ask(page, steps=4, prompt="it moves right")
    expect(page.locator("#now")).to_contain_text("step 1 of 4", timeout=PATIENCE)
    expect(page.locator("#now img")).to_be_visible(timeout=PATIENCE)
    picture(page, "page.png")
    page.click("#now button:has-text('Stop')")
    expect(page.locator("#halted")).to_contain_text("stopped at step", timeout=PATIENCE)
    for other in opened(page.context, server):
        other.click("#halted button:has-text('Go on')")
        expect(other.locator("#now, #queue").get_by_text("it moves right").first).to_be_visible(timeout=PATIENCE)
        expect(page.locator("#halted-box")).to_be_hidden(timeout=PATIENCE)  # the first tab hears of it
        expect(other.locator("#gallery button")).to_have_count(before + 1, timeout=PATIENCE)
    assert len(videos_in(server[1])) == before + 1


def test_a_video_of_ours_gives_its_settings_back(page, server):
    page.set_input_files("#file", videos_in(server[1])[0])
    expect(page.locator("#found")).to_contain_text("made by wan_mlx")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#option-steps")).to_have_value("3")


def test_a_model_is_fetched_with_pauses(page, hub):
    """What it has is said before; a pause keeps what has arrived."""
    page.select_option("#model", "t2v-1.3B")
    expect(page.locator("#download button")).to_contain_text("3.0 MB", timeout=PATIENCE)
    expect(page.locator("#price")).to_contain_text("t2v-1.3B is downloaded first, 3.0 MB", timeout=PATIENCE)
    hub.pace = 0.3
    page.click("#download button")
    wait_until(lambda: page.locator("#download progress").evaluate("(bar) => bar.value > 200000"))
    page.click("#download button:has-text('Pause')")
    expect(page.locator("#download button")).to_have_text("Go on with the download")
    hub.pace = 0.0
    page.reload()
    page.click("#download button:has-text('Go on')")
    expect(page.locator("#model option:checked")).to_contain_text("here", timeout=PATIENCE)
    expect(page.locator("#download")).to_be_empty()
    assert [kept for kept in hub.ranges("Wan2.1_VAE.pth") if kept]


def test_waiting_ones_are_put_in_order_by_drag_and_by_buttons(page, server):
    with httpx.Client(base_url=server[0], timeout=PATIENCE / 1000) as client:
        fields = {"size": "128x128", "num_frames": 33, "steps": 50, "seed": 1}
        ids = [client.post("/v1/videos", json={**fields, "prompt": f"a {colour} star"}).json()["id"]
               for colour in ("red", "blue", "green", "pink")]  # fmt: skip
        names = page.locator("#queue li > div:first-child")
        expect(names).to_have_text(["a blue star", "a green star", "a pink star"], timeout=PATIENCE)
        expect(page.locator("#now img")).to_be_visible(timeout=PATIENCE)  # which has moved what is below it
        page.locator("#queue li").nth(2).drag_to(page.locator("#queue li").nth(0))
        expect(names).to_have_text(["a pink star", "a blue star", "a green star"])
        page.locator("#queue li").nth(0).drag_to(page.locator("#queue li").nth(1))
        expect(names).to_have_text(["a blue star", "a pink star", "a green star"])
        page.locator("#queue li").nth(2).get_by_text("Earlier").press("Enter")
        expect(names).to_have_text(["a blue star", "a green star", "a pink star"])
        assert page.title().endswith("% · wan_mlx")
        for id in ids:
            client.delete(f"/v1/videos/{id}")
        expect(page.locator("#queue-box")).to_be_hidden(timeout=PATIENCE)


def test_two_pictures_are_both_ends_and_never_left_out_silently(page):
    """The models here take one picture; those that take two are named."""
    page.set_input_files("#file", [SOURCES / "first.png", SOURCES / "first.png"])
    expect(page.locator("#found")).to_contain_text("get one of: flf2v-14B-720P", timeout=PATIENCE)
    expect(page.locator(".source").nth(0).locator("select")).to_have_value("image")
    expect(page.locator(".source").nth(1)).to_contain_text("nano-i2v has no use for it")
    page.select_option("#model", "flf2v-14B-720P")
    expect(page.locator(".source").nth(1).locator("select")).to_have_value("last_image")
    expect(page.locator("#found")).to_be_hidden()


def asked_last(server) -> dict:
    """The newest video that was asked for, and is now taken out of the queue."""
    with httpx.Client(base_url=server[0], timeout=PATIENCE / 1000) as client:
        (video,) = client.get("/v1/videos?limit=1").json()["data"]
        client.delete(f"/v1/videos/{video['id']}")
    return video["settings"]


def uploaded(server, id: str) -> dict:
    return httpx.get(f"{server[0]}/v1/uploads/{id}").json()


def test_a_picture_and_a_voice(page, server, tmp_path):
    """The job has both, whichever comes first."""
    write_wav(tmp_path / "talk.wav", tone(0.5, 16000), 16000)
    page.set_input_files("#file", [tmp_path / "talk.wav", SOURCES / "first.png"])
    expect(page.locator("#found")).to_contain_text("get one of: s2v-14B", timeout=PATIENCE)
    page.select_option("#model", "s2v-14B")
    roles = page.locator(".source select")
    expect(roles).to_have_count(2)
    assert [roles.nth(place).input_value() for place in (0, 1)] == ["audio", "image"]
    expect(page.locator("#length")).to_be_hidden()  # the sound says how long it is
    page.fill("#prompt", "a circle that speaks")
    page.click("#make")
    expect(page.locator("#now, #queue").get_by_text("a circle that speaks").first).to_be_visible(timeout=PATIENCE)
    made = asked_last(server)
    assert (made["model"], uploaded(server, made["audio"])["kind"]) == ("s2v-14B", "audio")
    assert uploaded(server, made["image"])["filename"] == "first.png"


def test_a_prepared_folder(page, server, tmp_path):
    """Dropped as a whole, or its files chosen; no prompt is needed."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    shutil.copy(SOURCES / "clip.mp4", folder / "src_pose.mp4")
    save_video(folder / "src_face.mp4", np.zeros((17, 512, 512, 3), np.uint8), 30, {})
    shutil.copy(SOURCES / "first.png", folder / "src_ref.png")
    for how in ("chosen", "dropped"):
        if how == "chosen":
            page.set_input_files("#file", sorted(folder.iterdir()))
        else:
            drop(page, folder)
        expect(page.locator(".source")).to_have_count(1, timeout=PATIENCE)
        page.select_option("#model", "animate-14B")
        expect(page.locator(".source select")).to_have_value("src_root_path")
        page.fill("#prompt", "")
        page.click("#make")
        expect(page.locator("#now, #queue").get_by_text("视频中的人在做动作").first).to_be_visible(timeout=PATIENCE)
        made = asked_last(server)
        assert uploaded(server, made["src_root_path"])["files"] == ["src_face.mp4", "src_pose.mp4", "src_ref.png"]
        page.click(".source button")


def drop(page: Page, folder: Path) -> None:
    """Drop a folder on the page, as from the Finder."""
    devtools = page.context.new_cdp_session(page)
    box = page.locator("#choose").bounding_box()
    place = {"x": box["x"] + 5, "y": box["y"] + 5}
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


def test_phone_width_chinese_and_no_barrier(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#language")
    expect(page.locator("#make")).to_have_text("生成视频")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "page-phone.png")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.locator("#prompt").focus()
    page.keyboard.type("a cat boxing")
    page.keyboard.press("Control+Enter")  # which nano does not know: it is made all the same, or refused in one line
    expect(page.locator("#now, #queue, #wrong").get_by_text("cat").first).to_be_visible(timeout=PATIENCE)
    page.locator("button:has-text('Stop'), button:has-text('Discard')").first.click()
