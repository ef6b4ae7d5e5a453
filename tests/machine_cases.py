"""What `test_distributed` computes on one and on several machines: ``machine_cases.py CASE [ARGUMENT]...``.

Prints a JSON object of digests, or of whatever else the case finds; every rank prints the same.
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import wan_mlx  # noqa: F401  before mlx, so that on a Mac float32 means float32

# isort: split
import mlx.core as mx
import numpy as np
from arrays import random_array, randomized
from sampling import SHIFT, SIZES, always, conditioning
from test_execution import CONFIGS, inputs, transformer
from tiny_mlx_model import VAE_CONFIGS, random, random_vae

from wan_mlx import heartbeat
from wan_mlx.caching import EasyCache, MagCache, Spectrum, StepCache, TeaCache
from wan_mlx.caching.residual import MAGCACHE
from wan_mlx.denoise import denoise
from wan_mlx.distributed import Part, open_group
from wan_mlx.errors import Stopped
from wan_mlx.guidance import Guidance
from wan_mlx.models import sequence_parallel, vae_tiling
from wan_mlx.models.animate import AnimateTransformer
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.s2v import MOTION_LATENTS, S2VTransformer
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.models.vae_tiling import LastFrames, decode
from wan_mlx.opened import OpenedModel
from wan_mlx.parallel import Team
from wan_mlx.runs.run import Run
from wan_mlx.runs.together import failing_together
from wan_mlx.schedulers import SOLVERS

STEPS, CUT = 12, 6
CACHES = {
    "none": lambda: StepCache(STEPS),
    "teacache": lambda: TeaCache(STEPS, 0.8, "plain", (0.0, 0.0, 0.0, 1.0, 0.02)),
    "magcache": lambda: MagCache(STEPS, 0.4, 2, 0.2, MAGCACHE["t2v-1.3B"]["ratios"]),
    "easycache": lambda: EasyCache(STEPS, 0.5, 3),
    "spectrum": lambda: Spectrum(STEPS, 2.0, 0.75, "outputs"),
    "spectrum hidden": lambda: Spectrum(STEPS, 2.0, 0.75, "hidden"),
}
GUIDANCE = {"both": Guidance(4.0), "one": Guidance(1.0), "part": Guidance(4.0, range=(0.0, 0.6), skip_layers=(1,))}


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.array(array)).tobytes()).hexdigest()[:16]


def forwards(group) -> dict:
    """Every kind of transformer, divided among all machines and among halves of them."""
    found = {}
    for kind in CONFIGS:
        for grid in ((1, 2, 2), (3, 6, 10)):
            found[f"{kind} {grid}"] = divided(group, Execution(transformer(kind)), inputs(kind, grid))
    ti2v, small = transformer("t2v"), inputs("t2v", (3, 4, 6))
    for frames in (1, 2):
        found[f"given frames {frames}"] = divided(group, Execution(ti2v), small, clean_frames=frames)
    found["pieces"] = divided(group, Execution(ti2v, tokens_at_once=4), small, skip_layers=(1,))
    found["batch"] = divided(group, Execution(ti2v), inputs("t2v", (2, 4, 6), batch=2))

    def blocks(names):
        return (ti2v.block(name) for name in names)

    found["streamed"] = divided(group, Execution(ti2v, blocks), small)
    control = randomized(Transformer(replace(CONFIGS["t2v"], model_type="control", ref_dim=16, in_dim=36)))
    latents, timestep, context = small
    reference, condition = random_array(4, 1, 1, 4, 6, 16), random_array(5, 1, 3, 4, 6, 20)
    given = latents, timestep, context, condition
    for frames in (0, 2):
        named = {"reference": reference, "clean_frames": frames}
        found[f"reference, given frames {frames}"] = divided(group, Execution(control), given, **named)
    return found | speech(group) | animation(group)


def speech(group) -> dict:
    """S2V, which has tokens behind the video's, and hears in each latent frame something else."""
    found, sizes = {}, dict(audio_inject_layers=(0, 2), audio_layers=3, audio_dim=16, audio_tokens=2)
    s2v = randomized(S2VTransformer(replace(CONFIGS["t2v"], model_type="s2v", **sizes)))
    latents, still = random_array(4, 1, 3, 8, 8, 16), random_array(5, 1, 1, 8, 8, 16)
    given = latents, 500.0, random_array(6, 1, 7, 24), still, random_array(7, 1, 3, 12, 16)
    for motion in (None, random_array(8, 1, MOTION_LATENTS, 8, 8, 16)):
        for at_once in (5, 100):
            run = Execution(s2v, tokens_at_once=at_once)
            found[f"s2v {motion is not None} {at_once}"] = divided(group, run, given, motion=motion, pose=latents)
    return found


def animation(group) -> dict:
    """Animate, whose frames each look at a face of their own."""
    found, sizes = {}, dict(in_dim=36, image_dim=32, face_layers=(0, 2), face_dims=(16, 2), motion_widths=(2, 2))
    animate = randomized(AnimateTransformer(replace(CONFIGS["t2v"], model_type="animate", **sizes)))
    given = (random_array(4, 1, 4, 6, 10, 16), 500.0, random_array(5, 1, 7, 24), random_array(6, 1, 4, 6, 10, 20),
             random_array(7, 1, 257, 32))  # fmt: skip
    named = {"pose": random_array(8, 1, 3, 6, 10, 16), "face": random_array(9, 1, 3, 3, 48)}
    for at_once in (7, 40, 1000):
        found[f"animate {at_once}"] = divided(group, Execution(animate, tokens_at_once=at_once), given, **named)
    return found


def divided(group, run, arguments, **named) -> str:
    """The digest of a forward, on all machines alike."""
    if group is None:
        return digest(run(*arguments, **named))
    size, found = group.size, []
    halves = [range(size // 2), range(size // 2, size)] if size % 2 == 0 and size > 2 else []
    for ranks, room in ((range(size), 0), (range(size), 5), *((ranks, 0) for ranks in halves)):
        if group.rank in ranks:
            part = Part(group, ranks, lambda length, room=room: room)
            found.append(digest(run(*arguments, among=part, **named)))
    group.most(0)
    assert len(set(found)) == 1, found
    return found[0]


def model() -> Execution:
    return Execution(randomized(Transformer(TransformerConfig(**SIZES, num_layers=2))))


def walks(group, modes: str, caches: str = ",".join(CACHES), guidances: str = ",".join(GUIDANCE)) -> dict:
    """Whole samplings: latents, forwards, and what would be kept."""
    found = {}
    for mode in modes.split(","):
        team = None if group is None else Team(group, mode)
        for cache in caches.split(","):
            for guidance in guidances.split(","):
                steps = list(walk(team, CACHES[cache](), GUIDANCE[guidance]))
                found[f"{cache}, {guidance}"] = [digest(steps[-1].latents), sum(step.forwards for step in steps)]
                if group is None or group.rank == 0:
                    kept = steps[-1].state if not cache.startswith(("teacache", "magcache", "spectrum h")) else {}
                    found[f"{cache}, {guidance}"].append({name: digest(array) for name, array in sorted(kept.items())})
                else:
                    found[f"{cache}, {guidance}"].append(None)
    return found


def walk(team, cache, guidance, first: int = 0, state=None):
    return denoise(always(model(), guidance), conditioning(), SOLVERS["unipc"](STEPS, SHIFT), cache, first, state,
                   team=team)  # fmt: skip


def cut(group, mode: str, folder: str, caches: str) -> dict:
    """Sample half of the way, and keep the state that rank 0 has."""
    team = None if group is None else Team(group, mode)
    for name in caches.split(","):
        for step in walk(team, CACHES[name](), GUIDANCE["both"]):
            if step.index + 1 == CUT:
                if group is None or group.rank == 0:
                    mx.save_safetensors(str(Path(folder) / f"{name}.safetensors"), step.state)
                break
    return {}


def resumed(group, mode: str, folder: str, caches: str) -> dict:
    """Go on from that state: where it ends."""
    team, found = None if group is None else Team(group, mode), {}
    for name in caches.split(","):
        state = mx.load(str(Path(folder) / f"{name}.safetensors"))
        mx.eval(state)  # by this thread
        *_, last = walk(team, CACHES[name](), GUIDANCE["both"], CUT, state)
        found[name] = digest(last.latents)
    return found


def tiles(group) -> dict:
    """Decodes: in a relay, in columns, and in tiles dealt out."""
    found = {}
    for kind, config in VAE_CONFIGS.items():
        run, latents = VAEExecution(random_vae(config)), random(1, 3, 3, 18, 4)
        for tile, relayed in ((None, True), (None, False), ((64, 64), None)):
            last = LastFrames(6)
            frames = list(decode(run, latents, tile, last=last, group=group, relayed=relayed))
            is_first = group is None or group.rank == 0
            assert is_first or not frames
            name = f"{kind} {tile} {relayed}"
            found[name] = [digest(np.concatenate(frames, axis=1)), digest(last.frames)] if is_first else []
    return found


def group_itself(group) -> dict:
    """The collectives' small change."""
    last = group.size - 1
    given = {"zero": mx.array([-0.0, 1.5]), "flags": mx.array([True, False, True]), "none": mx.zeros((0, 4)),
             "half": mx.ones((2, 3), mx.bfloat16), "one": mx.array(3)}  # fmt: skip
    told = group.broadcast(given if group.rank == last else None, last)
    same = all(mx.array_equal(told[name].view(mx.uint8) if told[name].dtype == mx.float32 else told[name],
                              given[name].view(mx.uint8) if told[name].dtype == mx.float32 else given[name])
               for name in given)  # fmt: skip
    values = group.gather_values({"rank": group.rank, "text": "ä" * group.rank})
    return {"same": bool(same), "values": values, "most": group.most(group.rank), "link": group.link.latency < 60}


def small_run(model: str) -> Run:
    """Of the model in a folder: three steps."""
    pipe = wan_mlx.WanPipeline.from_pretrained(model, dtype="float32", progress=False, prompt_cache=False)
    return pipe.run(pipe.request("a red circle", size="32x32", num_frames=5, steps=3, seed=3))


def early(group, model: str, how: str, when: str, pays: bool = False) -> list:
    """A run that rank 0 is asked to end while it handles an event: how it ended, and after how many of these events.
    ``pays``: whether it decodes in a relay."""
    vae_tiling.pays = lambda *given: bool(pays)
    run, count = small_run(model), 0
    try:
        for event in run:
            count += event.kind == when
            if group.rank == 0 and event.kind == when:
                getattr(run, how)()
    except Stopped as stopped:
        time.sleep(2 * (not stopped.agreed))  # what the others do then is no news
        return [stopped.why, count]
    return [run.stopped_after, count]


def unequal_disks(group, model: str) -> str:
    """A run of which rank 1 reads the weights for longer than a GPU may take, where it is GPUs that wait for data."""
    waits, load = heartbeat.WAITS.of, OpenedModel.load_expert
    heartbeat.HANG, heartbeat.LONGER, heartbeat.WAITS.of = 3.0, 1, lambda what: waits("gpu")
    OpenedModel.load_expert = lambda *given: time.sleep(6 * group.rank) or load(*given)
    return digest(small_run(model).video().latents)


def endless(group, silence: str, fails: str = "") -> None:
    """Exchange for ever; with ``fails`` rank 1 gives up, or waits for its "gpu", or all wait for "data", for ever."""
    heartbeat.SILENCE, heartbeat.HANG = float(silence), 3.0
    print("ready", flush=True)
    with failing_together(group):
        if fails == "data" or (fails == "gpu" and group.rank == 1):
            with heartbeat.WAITS.of(fails):
                time.sleep(60)
        for count in range(1_000_000):
            group.most(count)
            if fails == "disk" and group.rank == 1 and count == 20:
                raise OSError("the disk is full")


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    sequence_parallel.HEAD_GROUPS = 2
    case, *arguments = sys.argv[1:]
    print(json.dumps(globals()[case](open_group(), *arguments)))
