"""The API of the server in one process, with workers that are none: what is asked, answered, and refused."""

import base64
import errno
import io
import json
import os
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_children import Children, begin, make
from fastapi.testclient import TestClient
from PIL import Image
from test_speech import tone, write_wav

from wan_mlx import options
from wan_mlx.media.write import save_video
from wan_mlx.presets import PRESETS
from wan_mlx.runs.queue import FOLDER
from wan_mlx.server.app import make_app
from wan_mlx.server.child import Child
from wan_mlx.server.guard import names_of
from wan_mlx.server.library import Library
from wan_mlx.server.schema import OF_TASK, SOURCES_OF, served
from wan_mlx.server.studio import Studio
from wan_mlx.tasks import TASKS

ADDRESS = "http://localhost:8190"
ASKED = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 7}


class Workers(Children):
    """Workers that are none, and a clerk that is one."""

    def __call__(self, module, arguments, hear, gone):
        if module.endswith("clerk"):
            return Child(module, arguments, hear, gone)
        return super().__call__(module, arguments, hear, gone)


@pytest.fixture(scope="module")
def workers():
    return Workers(make)


@pytest.fixture(scope="module")
def studio(tmp_path_factory, workers):
    return Studio(tmp_path_factory.mktemp("library"), make_child=workers)


@pytest.fixture(scope="module")
def client(studio):
    with TestClient(make_app(studio), base_url=ADDRESS) as found:
        yield found


@pytest.fixture(autouse=True)
def as_usual(workers):
    workers.answers["worker"] = make


def until(client, id: str, *states: str) -> dict:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        video = client.get(f"/v1/videos/{id}").json()
        if video["state"] in states:
            return video
        time.sleep(0.02)
    raise AssertionError(video)


def ask(client, **fields) -> dict:
    answer = client.post("/v1/videos", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, kind)
    return data.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return data.getvalue()


def events(client, id: str) -> list[dict]:
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


class TestVideos:
    def test_from_the_request_to_the_file(self, client, studio):
        asked = ask(client, guidance_scale=2)
        assert (asked["object"], asked["model"], asked["size"]) == ("video", "nano", "64x64")
        video = until(client, asked["id"], "done")
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        assert video["completed_at"] >= video["created_at"] and video["peak_memory_mb"] == 5
        assert video["settings"] == {"prompt": ASKED["prompt"], "size": "64x64", "num_frames": 5, "seed": 7,
                                     "guidance_scale": 2, "steps": 2, "model": "nano"}  # fmt: skip
        at = f"/v1/videos/{video['id']}/content"
        content = client.get(at)
        assert content.content == b"video of " + video["id"].encode() and content.headers["content-type"] == "video/mp4"
        part = client.get(at, headers={"Range": "bytes=0-4"})
        assert part.status_code == 206 and part.content == b"video"
        assert "attachment" in client.get(f"{at}?download=1").headers["content-disposition"]

    def test_its_events(self, client):
        asked = ask(client)
        told = events(client, asked["id"])
        assert [event["event"] for event in told][-1] == "result"
        assert {"start", "step", "stage", "state"} <= {event["event"] for event in told}
        assert not [event for event in told if "/" in str(event.get("output"))]  # no path of this machine
        assert events(client, asked["id"]) == told  # who comes late hears them, too

    def test_lists(self, client):
        ids = [ask(client)["id"] for _ in range(3)]
        page = client.get("/v1/videos?limit=2").json()
        assert [video["id"] for video in page["data"]] == [ids[2], ids[1]] and page["has_more"]
        assert client.get(f"/v1/videos?limit=1&after={ids[1]}").json()["first_id"] == ids[0]
        until(client, ids[2], "done")
        assert client.get("/v1/videos?state=failed").json()["data"] == []

    def test_states_that_openai_does_not_know(self, client, workers):
        """Paused is queued to API clients, stopped is failed with code "stopped"."""

        def waits(order, worker):
            if "make" in order:
                begin(order, worker, 1)
            elif "stop" in order:
                worker.say({"event": "stopping", "soon": True})
                worker.say({"event": "ended", "state": "stopped", "error": "interrupted"})

        workers.answers["worker"] = waits
        runs, second, third = (ask(client)["id"] for _ in range(3))
        until(client, runs, "running")
        until_step = time.monotonic() + 10
        while client.get(f"/v1/videos/{runs}").json()["step"] != 1 and time.monotonic() < until_step:
            time.sleep(0.02)
        assert client.get(f"/v1/videos/{runs}").json()["progress"] == 47
        assert client.post(f"/v1/videos/{second}/pause").json()["status"] == "queued"
        moved = client.post(f"/v1/videos/{third}/move", json={"before": second}).json()
        assert (moved["position"], client.get(f"/v1/videos/{second}").json()["position"]) == (1, 2)
        assert [video["id"] for video in client.get("/v1/queue").json()["data"]] == [runs, third, second]
        assert client.get(f"/v1/videos/{runs}/content").json()["error"]["code"] == "not_ready"
        client.post(f"/v1/videos/{third}/cancel")
        client.post(f"/v1/videos/{runs}/cancel")
        stopped = until(client, runs, "stopped")
        assert (stopped["status"], stopped["error"]["code"]) == ("failed", "stopped")
        for id in (runs, second, third):
            assert client.delete(f"/v1/videos/{id}").json()["deleted"]
            assert client.get(f"/v1/videos/{id}").status_code == 404

    def test_frames_between_make_it_no_longer(self, client):
        """fps above the model's is RIFE's; the model's own is as if it were left out."""
        assert ask(client, fps=16)["settings"].get("fps") is None
        smooth = ask(client, fps=32)
        assert (smooth["settings"]["fps"], smooth["fps"], smooth["seconds"]) == (32, 32, "0.3125")

    def test_again_with_another_seed(self, client):
        first = ask(client)
        again = client.post(f"/v1/videos/{first['id']}/again", json={"steps": 3}).json()
        assert again["settings"] == {**first["settings"], "seed": again["seed"], "steps": 3} and again["seed"] != 7

    def test_deleted_files_go_to_the_trash(self, client, studio, monkeypatch):
        trashed = []
        monkeypatch.setattr(Library, "trash", lambda self, path: (trashed.append(path.name), path.unlink()))
        video = until(client, ask(client)["id"], "done")
        client.delete(f"/v1/videos/{video['id']}")
        assert trashed == [video["file"]] and not (studio.library.folder / video["file"]).exists()

    def test_pictures(self, client):
        answer = client.post("/v1/images/generations", json={"prompt": "a red circle", "n": 2, "size": "64x64"})
        found = [base64.b64decode(row["b64_json"]) for row in answer.json()["data"]]
        assert len(found) == 2 and all(data.startswith(b"video of video_") for data in found)


class TestSources:
    def test_a_picture_of_a_form(self, client):
        """With a picture nano is nano-i2v; text of a form is taken as the option's type."""
        files = {"input_reference": ("../../first.png", picture())}
        video = client.post("/v1/videos", data={**ASKED, "seed": "7"}, files=files).json()
        assert video["model"] == "nano-i2v" and video["settings"]["seed"] == 7
        upload = client.get(f"/v1/uploads/{video['settings']['image']}").json()
        assert (upload["filename"], upload["kind"], upload["width"]) == ("first.png", "image", 64)

    def test_of_other_kinds(self, client, studio):
        data = "data:image/png;base64," + base64.b64encode(picture()).decode()
        assert ask(client, image=data)["settings"]["image"].startswith("upload_")
        (studio.library.folder / "cat.png").write_bytes(picture())
        assert ask(client, image="library:cat.png")["settings"]["image"] == "library:cat.png"
        frame = ask(client, image="library:cat.png#last")["settings"]["image"]
        assert client.get(f"/v1/uploads/{frame}/preview").headers["content-type"] == "image/webp"

    def test_what_is_dropped_is_looked_into(self, client, pico_video):
        """A video made here gives its settings, which can be asked for again."""
        found = client.post("/v1/uploads", files={"file": ("old.mp4", pico_video)})
        assert found.status_code == 201
        upload = found.json()
        assert (upload["kind"], upload["num_frames"], upload["settings"]["seed"]) == ("video", 5, 3)
        assert client.post("/v1/videos", json=upload["settings"]).json()["seed"] == 3

    def test_a_folder_of_files(self, client, studio, pico_video):
        """Several files are one, and so is a zip; each file of it is looked at, and its names are kept."""
        files = {"src_pose.mp4": pico_video, "src_ref.png": picture()}
        sent = client.post("/v1/uploads", files=[("file", each) for each in files.items()]).json()
        packed = client.post("/v1/uploads", files={"file": ("a.zip", zip_of({"a/": b"", "__MACOSX/._x": b"x"} | {
            f"a/{name}": data for name, data in files.items()}))}).json()  # fmt: skip
        for upload in (sent, packed):
            assert (upload["kind"], upload["files"]) == ("folder", ["src_pose.mp4", "src_ref.png"])
            folder = studio.uploads.path(upload["id"])
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
            assert client.get(f"/v1/uploads/{upload['id']}/preview").headers["content-type"] == "image/webp"
            assert client.delete(f"/v1/uploads/{upload['id']}").json()["deleted"] and not folder.exists()

    def test_a_picture_speaks(self, client, studio, tmp_path):
        """Its sound is a source as pictures are: a file of the form, or an upload; a size is an area."""
        data = write_wav(tmp_path / "talk.wav", tone(0.5, 16000), 16000).read_bytes()
        asked = {"model": "s2v-14B", "prompt": "she speaks", "size": "832x480", "num_clip": "1"}
        files = {"image": ("a.png", picture()), "audio": ("talk.wav", data)}
        answer = client.post("/v1/videos", data=asked, files=files)
        assert answer.status_code == 200, answer.text
        settings = answer.json()["settings"]
        upload = client.get(f"/v1/uploads/{settings['audio']}").json()
        assert (upload["kind"], upload["seconds"], upload["filename"]) == ("audio", 0.5, "talk.wav")
        job = studio.library.queue.get(answer.json()["id"])
        assert job.options["num_clip"] == 1
        assert (studio.library.folder / job.options["audio"]).read_bytes() == data
        url = "data:audio/wav;base64," + base64.b64encode(data).decode()
        again = client.post("/v1/videos", json={**asked, "audio": url, "image": settings["image"]}).json()
        assert again["settings"]["audio"].startswith("upload_")
        for wrong, said in (
            (dict(fit="crop"), "expected a positive multiple of 64"), (dict(model="ti2v-5B"), "it is for s2v-14B"),
            (dict(audio="upload_none"), "expected a file, upload_ID"),
        ):  # fmt: skip
            refused = client.post("/v1/videos", json={**asked, "image": settings["image"], "audio": url, **wrong})
            assert refused.status_code == 400 and said in refused.json()["error"]["message"], refused.text

    def test_a_prepared_folder_and_no_prompt(self, client, studio, pico_video, tmp_path):
        """Its files are of the form, in a zip, or an upload; they are looked at as a run does."""
        face = save_video(tmp_path / "face.mp4", np.zeros((5, 512, 512, 3), np.uint8), 30, {}).read_bytes()
        files = {"src_pose.mp4": pico_video, "src_face.mp4": face, "src_ref.png": picture()}
        sent = client.post("/v1/uploads", files=[("file", each) for each in files.items()]).json()["id"]
        packed = {"src_root_path": ("a.zip", zip_of(files))}
        each = [("src_root_path", one) for one in files.items()]
        for body in (dict(data={"model": "animate-14B"}, files=each), dict(data={"model": "animate-14B"}, files=packed),
                     dict(json={"model": "animate-14B", "prompt": "", "src_root_path": sent})):  # fmt: skip
            answer = client.post("/v1/videos", **body)
            assert answer.status_code == 200, answer.text
            job = studio.library.queue.get(answer.json()["id"])
            folder = studio.library.folder / job.options["src_root_path"]
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
            assert job.options["prompt"] == PRESETS["animate-14B"].prompt
        wrong = {"src_root_path": ("a.zip", zip_of(files | {"src_face.mp4": pico_video}))}
        refused = client.post("/v1/videos", data={"model": "animate-14B"}, files=wrong)
        said = "src_face.mp4 is of 64x64 pixels, expected 512x512"
        assert refused.status_code == 400 and said in refused.json()["error"]["message"]

    def test_folders_that_are_refused(self, client, studio):
        before = sorted(studio.library.folder.rglob("*"))
        many = {f"{number}.png": picture() for number in range(17)}
        for entries, said in (
            ({"a.png": b"none"}, "a.png"), ({}, "holds 0 files"), (many, "holds 17 files"),
            ({"a/x.png": picture(), "b/x.png": picture()}, "different names"), ({"a\\b.png": picture()}, "plain name"),
            ({".hidden": picture()}, "plain name"), ({"in.zip": zip_of({"a.png": picture()})}, "in.zip"),
        ):  # fmt: skip
            answer = client.post("/v1/uploads", files={"file": ("some.zip", zip_of(entries))})
            message = answer.json()["error"]["message"]
            assert answer.status_code == 400 and said in message and "upload" not in message, (said, message)
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w") as packed:
            packed.writestr("0.png", picture())
            packed.filelist[0].file_size = 2 << 30  # as it says itself
        answer = client.post("/v1/uploads", files={"file": ("bomb.zip", bomb.getvalue())})
        assert answer.status_code == 400 and "bytes unpacked" in answer.json()["error"]["message"]
        damaged = bytearray(zip_of({"a.png": picture()}))
        damaged[40] ^= 255
        answer = client.post("/v1/uploads", files={"file": ("a.zip", bytes(damaged))})
        assert answer.status_code == 400 and "cannot be unpacked" in answer.json()["error"]["message"]
        twice = [("file", ("a.png", picture()))] * 2
        assert client.post("/v1/uploads", files=twice).status_code == 400
        assert sorted(studio.library.folder.rglob("*")) == before

    def test_a_refused_request_leaves_nothing(self, client, studio):
        before = {path.name for path in studio.library.uploads.iterdir()}
        wrong = client.post("/v1/videos", data={**ASKED, "size": "65x64"}, files={"image": ("a.png", picture())})
        assert wrong.status_code == 400 and {path.name for path in studio.library.uploads.iterdir()} == before


@pytest.fixture(scope="module")
def pico_video(tmp_path_factory):
    """A video as wan_mlx writes it."""
    made = {"model": "nano", "checkpoint": "nano", "prompt": "old", "width": 64, "height": 64, "num_frames": 5,
            "steps": 2, "seed": 3, "fps": 16, "task": "t2v"}  # fmt: skip
    path = tmp_path_factory.mktemp("old") / "old.mp4"
    return save_video(path, np.zeros((5, 64, 64, 3), np.uint8), 16, made).read_bytes()


class TestGallery:
    def test_settings_are_read_from_the_files(self, client, studio, pico_video):
        (studio.library.folder / "kept.mp4").write_bytes(pico_video)
        row = client.get("/v1/library/kept.mp4").json()
        assert (row["num_frames"], row["settings"]["prompt"], row["video_id"]) == (5, "old", None)
        assert client.get("/v1/library/kept.mp4/content").content == pico_video
        assert client.get("/v1/library/kept.mp4/preview").headers["content-type"] == "image/webp"
        assert "kept.mp4" in [row["name"] for row in client.get("/v1/library").json()["data"]]

    def test_nothing_beside_the_folders_files(self, client, studio, tmp_path):
        (tmp_path / "secret.mp4").write_bytes(b"secret")
        (studio.library.folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
        (studio.library.folder / "notes.txt").write_text("private")
        for name in ("link.mp4", "notes.txt", ".wan_mlx-queue", "..", "%2e%2e%2fsecret.mp4", "none.mp4",
                     f"{FOLDER}%2fqueue.db", "..%5csecret.mp4", "a%00.mp4"):  # fmt: skip
            for rest in ("", "/content", "/preview"):
                assert client.get(f"/v1/library/{name}{rest}").status_code in (404, 405), name


class TestModels:
    def test_capabilities_have_every_option(self, client):
        found = client.get("/v1/videos/capabilities").json()
        assert {row["name"] for row in found["options"]} == {option.name for option in served()}
        assert all(row["help"][0] and row["help"][1] for row in found["options"] if row["flag"])
        assert [row["name"] for row in found["options"] if row["help"][0].startswith("off: ")] == ["prompt_cache"]
        left_out = {option.name for option in options.OPTIONS if option.of != options.COMMAND} - \
            {option.name for option in served()}  # fmt: skip
        assert left_out == {"progress", "caffeinate"}

    def test_sources_are_those_of_the_tasks(self):
        given = {name: set(task.takes) - OF_TASK.keys() for name, task in TASKS.items()}
        assert given == {name: set(sources) for name, sources in SOURCES_OF.items()}

    def test_models(self, client):
        models = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
        assert models["nano"]["recipes"] == []
        assert "fastwan-5B" in [recipe["name"] for recipe in models["ti2v-5B"]["recipes"]]
        assert models["nano"]["here"] and models["nano"]["fits"]
        assert models["nano"]["qualities"] == {"draft": {}, "good": {}, "best": {"steps": 12}}
        assert models["t2v-14B"]["size"] == "1280x720" and models["t2v-14B"]["peak_bytes"] > 1e9

    def test_plans(self, client):
        asked = [{"model": "t2v-1.3B", "memory": "8GB", "quality": "draft"}, {"size": "100x100"}, 5,
                 {"model": "t2v-14B", "memory": "2GB"}]  # fmt: skip
        fits, wrong, worse, large = client.post("/v1/plan", json={"requests": asked}).json()["data"]
        assert fits["fits"] and fits["steps"] == 20 and fits["peak_bytes"] < 8e9 and not fits["here"]
        assert wrong["error"]["param"] == "size" and "nearest: 96" in wrong["error"]["message"]
        assert worse["error"] and not large["fits"]
        whole = {"model": "t2v-1.3B", "memory": "8GB", "size": "832x480", "steps": 40}
        drafted = client.post("/v1/plan", json={**whole, "draft": True}).json()
        assert (drafted["size"], drafted["steps"]) == ("416x240", 10) and drafted["peak_bytes"] < fits["peak_bytes"]
        assert client.post("/v1/plan", json={"draft": True}).json()["size"] == "64x64"  # of nano, by its own VAE
        assert {"options": {"size": "832x464"}, "text": "--size 832x464"} in large["advice"] or large["advice"]

    def test_a_hub_that_hangs_holds_nobody_up(self, tmp_path, monkeypatch):
        studio = Studio(tmp_path, make_child=Workers(make))
        with socket.create_server(("127.0.0.1", 0)) as hub, ThreadPoolExecutor() as pool:
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
            with TestClient(make_app(studio), base_url=ADDRESS) as client:
                size = pool.submit(client.post, "/v1/models/size", json={"model": "t2v-1.3B"})
                asked, _ = hub.accept()
                asks = {"model": "t2v-1.3B", "memory": "24GB"}  # no network is timed, as nano's would be
                assert client.post("/v1/plan", json=asks).json()["fits"] and not size.done()
                studio.desk.end()
                assert size.result().status_code == 500
                asked.close()

    def test_the_schema_names_every_field(self, client):
        api = client.get("/openapi.json").json()
        body = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"prompt", "steps", "num_inference_steps", "seconds", "input_reference"} <= body["properties"].keys()
        assert client.get("/docs").status_code == 200 and "cdn" not in client.get("/docs").text


class TestNoPathLeavesIt:
    def test_of_a_lora_that_is_none(self, tmp_path, monkeypatch):
        """The folder's name has blanks, by which a path is not known for one."""
        folder = tmp_path / "My models"
        (folder / "loras").mkdir(parents=True)
        (folder / "loras" / "style.safetensors").write_bytes(b"none")
        monkeypatch.setenv("WAN_MLX_MODELS", str(folder))
        with TestClient(make_app(Studio(tmp_path / "library", make_child=Workers(make))), base_url=ADDRESS) as client:
            for path in ("/v1/plan", "/v1/videos"):
                said = client.post(path, json={**ASKED, "loras": ["style"]}).json()["error"]["message"]
                assert "style.safetensors" in said and "My models" not in said and str(tmp_path) not in said

    def test_of_a_disk_that_is_full_or_away(self, client, studio, monkeypatch):
        for number, said in ((errno.ENOSPC, (507, "disk_full")), (errno.EIO, (500, "failed"))):

            async def fails(part, name, number=number):
                raise OSError(number, os.strerror(number), str(part))

            monkeypatch.setattr(studio.uploads, "_taken", fails)
            answer = client.post("/v1/uploads", files={"file": ("a.png", picture())})
            assert (answer.status_code, answer.json()["error"]["code"]) == said
            assert str(studio.library.folder) not in answer.text
        assert not [path for path in studio.library.uploads.iterdir() if path.suffix == ".part"]
        monkeypatch.setattr(studio.library, "folder", studio.library.folder / "away")
        assert studio.library.changed_at == 0


class TestGuard:
    def test_rebinding(self, client):
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "", "localhost@evil"):
            answer = client.get("/v1/videos", headers={"Host": host})
            assert answer.status_code == 421 and answer.json()["error"]["code"] == "bad_host", host

    def test_other_sites(self, client):
        for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                        {"Origin": "http://localhost:1234"}):  # fmt: skip
            answer = client.post("/v1/videos", json=ASKED, headers=headers)
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "bad_origin", headers
            assert "access-control-allow-origin" not in answer.headers
        assert client.get("/v1/videos", headers={"Origin": "http://localhost:8190"}).status_code == 200

    def test_the_page_runs_its_own_script_alone(self, client):
        policy = client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy

    def test_beyond_loopback_a_token(self, studio):
        app = make_app(studio, names_of("0.0.0.0"), "a-token-of-sixteen")
        found = TestClient(app, base_url="http://192.168.1.5:8190")  # without the lifespan, which is the other's
        assert found.get("/health").json() == {"status": "ok"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a-token-of-sixteen"},
                        {"Cookie": "wan_mlx_token=wrong"}):  # fmt: skip
            assert found.get("/v1/videos", headers=headers).status_code == 401
        assert found.get("/?token=wrong").status_code == 401
        assert found.get("/v1/videos", headers={"Authorization": "Bearer a-token-of-sixteen"}).status_code == 200
        assert found.get("/v1/videos", headers={"Host": "evil.example"}).status_code == 421
        answer = found.get("/?token=a-token-of-sixteen", follow_redirects=False)
        assert answer.status_code == 303 and "HttpOnly" in answer.headers["set-cookie"]
        assert found.get("/v1/videos").status_code == 200  # by the cookie

    def test_huge_bodies(self, client):
        answer = client.post("/v1/videos", content=b"x", headers={"content-length": str(1 << 40),
                                                                  "content-type": "application/json"})  # fmt: skip
        assert answer.status_code == 413
        many = (b"x" * (1 << 20) for _ in range(65))  # without a length
        answer = client.post("/v1/videos", content=many, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


WRONG_VALUES = (None, True, -1, 0, 1e99, "x", "", [], {}, ["a", 1], "../../etc/passwd", "/etc/passwd", "~/x", "\0")
# Values of those that are right for an option.
RIGHT = {
    "seed": (0, -1), "steps": (), "cfg_zero": (True, 0), "draft": (True,), "context_scale": (-1, 0), "shift": (1e99,),
    "guidance_scale": (-1, 0, 1e99), "memory": (), "stop_below": (), "prompt_cache": (True,), "negative_prompt":
    ("x", "", "../../etc/passwd", "/etc/passwd", "~/x", "\0"), "prompt": ("x", "../../etc/passwd", "/etc/passwd",
    "~/x", "\0"), "src_ref_images": ([], ""), "loras": ([], ""), "loras_high": ([], ""), "loras_low": ([], ""),
    "extend_prompt": (True,), "prompt_extend_model": (), "skip_layers": ([],), "quantize": (),
}  # fmt: skip


def malformed() -> list[tuple[str, dict]]:
    """A name, and what is asked of POST /v1/videos, each wrong."""
    found = []
    for place, option in enumerate(served()):
        for value in WRONG_VALUES[1 + place % 3 :: 3]:  # of each option a third of them
            if not any(value is right or (value == right and type(value) is type(right))
                       for right in RIGHT.get(option.name, ())):  # fmt: skip
                found.append((f"{option.name} {value!r}", {"json": {**ASKED, option.name: value}}))
    bodies = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "a", "prompt": "b"}', b'{"seed": NaN}',
              b"[" * 100_000, b'{"prompt": 5}', b"{}"]  # fmt: skip
    json_kind = {"content-type": "application/json"}
    found += [(f"body {body[:20]!r}", {"content": body, "headers": json_kind}) for body in bodies]
    found += [(f"kind {kind}", {"content": b'{"prompt": "a"}', "headers": {"content-type": kind}})
              for kind in ("text/plain", "application/xml", "multipart/form-data", "multipart/form-data; boundary=")]
    files = [b"", b"no picture", picture()[:50], picture("GIF")[:20], b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50]
    found += [(f"file {data[:10]!r}", {"data": ASKED, "files": {"image": ("a.png", data)}}) for data in files]
    found += [(f"fields {fields}", {"json": {**ASKED, **fields}}) for fields in (
        {"seconds": "4", "num_frames": 5}, {"steps": 2}, {"fps": 3}, {"guidance_scale_2": 3}, {"width": 64},
        {"size": "65x64"}, {"num_frames": 6}, {"model": "nanoo"}, {"quality": "fine"}, {"imge": "x"},
        {"seconds": "long"}, {"last_image": "x"}, {"model": "file:///etc/passwd"}, {"model": "https://evil.example/a/b"},
        {"output": "/tmp/x.mp4"}, {"resume": "x"}, {"loras": ["/etc/passwd:1"]}, {"config": "/etc/passwd"},
        {"image": "library:../x.png"}, {"image": "upload_" + "0" * 24}, {"image": "video_" + "0" * 24},
    )]  # fmt: skip
    return found


def test_malformed_requests(client, studio):
    """Hundreds: each gets one clear line with a 4xx, nothing is written, and the server lives on."""
    cases = malformed()
    assert len(cases) > 200
    before = sorted(path for path in studio.library.folder.rglob("*") if "queue.db" not in path.name)
    count = len(client.get("/v1/videos?limit=100").json()["data"])
    passed = []
    for name, request in cases:
        answer = client.post("/v1/videos", **request)
        if not 400 <= answer.status_code < 500:
            passed.append((name, answer.status_code, answer.text[:100]))
            continue
        error = answer.json()["error"]
        assert error["message"] and "\n" not in error["message"] and error["code"] and error["type"], name
        assert str(studio.library.folder) not in error["message"] and str(Path.home()) not in error["message"], name
    assert not passed, "\n".join(map(str, passed))
    assert sorted(path for path in studio.library.folder.rglob("*") if "queue.db" not in path.name) == before
    assert len(client.get("/v1/videos?limit=100").json()["data"]) == count
    assert client.get("/health").status_code == 200


def test_other_malformed_requests(client):
    for method, path in (
        ("GET", "/v1/videos/x"), ("GET", "/v1/videos?limit=0"), ("GET", "/v1/videos?limit=x"),
        ("GET", "/v1/videos?order=up"),
        ("DELETE", "/v1/videos/x"), ("GET", "/v1/videos?after=x"), ("GET", "/v1/videos?state=x"), ("PUT", "/v1/videos"),
        ("GET", "/v1/uploads/../../queue.db"), ("GET", "/v1/uploads/x"), ("POST", "/v1/uploads"), ("GET", "/nowhere"),
        ("POST", "/v1/models/download"), ("POST", "/v1/plan"), ("GET", "/..%2f..%2fetc/passwd"),
        ("POST", "/v1/videos/x/cancel"), ("POST", "/v1/images/generations"), ("GET", "/v1/library?after=x"),
        ("TRACE", "/"), ("GET", "/v1/videos/" + "x" * 10_000),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], (method, path)




def test_downloads_are_paused_and_go_on(client, studio, workers):
    """By ending their process, which keeps what has arrived."""

    def fetches(order, child):
        pass

    workers.answers["fetcher"] = fetches
    begun = client.post("/v1/models/download", json={"model": "t2v-1.3B"})
    assert begun.status_code == 202 and begun.json()["download"]["state"] == "downloading"
    download = studio.downloads["t2v-1.3B"]
    download._child.say({"event": "download", "repo": "Wan-AI/x", "file": "a", "bytes": 5, "total": 20})
    paused = client.post("/v1/models/pause", json={"model": "t2v-1.3B"}).json()["download"]
    assert (paused["state"], paused["bytes"], paused["total"]) == ("paused", 5, 20)
    first = download._child
    assert not first.is_alive
    client.post("/v1/models/download", json={"model": "t2v-1.3B"})
    assert download._child is not first and download.state == "downloading"
    download._child.say({"event": "error", "message": "no room", "code": 1})
    download._child.die("exit code 1")
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert (rows["t2v-1.3B"]["download"]["state"], rows["t2v-1.3B"]["download"]["error"]) == ("failed", "no room")
    client.post("/v1/models/download", json={"model": "t2v-1.3B"})
    download._child.die("exit code 0")
    assert download.state == "done"
    assert client.post("/v1/models/download", json={"model": "/etc"}).json()["error"]["code"] == "unknown_model"
