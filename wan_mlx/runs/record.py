"""What is noted of a run, so that only the same run goes on: flags, request, and what weights and sources are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .. import __version__, options, storage
from ..errors import WanError
from ..geometry import WAN_2_1, Geometry
from ..media.write import read_settings
from ..presets import BUNDLED
from ..types import SOURCE_FIELDS, Request
from ..weights.lora import normalise_loras
from .folder import RunFolder

if TYPE_CHECKING:
    from ..pipeline import WanPipeline
    from ..prompts.extend import Extension

# What the same request may say differently of itself once it is made.
NOT_COMPARED = ("versions", "forwards")
# What each kept file makes superfluous: these weights may be gone or different when the run goes on.
ENCODERS = ("text_encoder", "image_encoder", "tokenizer")


def make_record(pipe: WanPipeline, request: Request, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `RunFolder.begin` is to note: a JSON object."""
    fields = request.settings()
    for name in SOURCE_FIELDS:
        fields[name] = _absolute(fields[name])
    fields["src_ref_images"] = [_absolute(name) for name in fields["src_ref_images"]]
    fields["geometry"] = list(astuple(request.geometry))
    sources = [fields[name] for name in SOURCE_FIELDS] + fields["src_ref_images"]
    record = {
        "flags": _normal_flags(flags) | {"seed": request.seed},
        "request": fields,
        "settings": pipe.settings(request),
        "weights": {name: storage.fingerprint(path) for name, path in _weights(pipe).items()},
        "sources": {name: storage.fingerprint(Path(name)) for name in sources if name and Path(name).is_file()},
        "machine": {"wan_mlx": __version__, "mlx": mx.__version__, "device": _device()},
    }
    return json.loads(json.dumps(record))


def seed_of_made(
    pipe: WanPipeline, request: Request, output: Path, any_seed: bool = False, extension: Extension | None = None
) -> int | None:
    """The seed of the video that ``output`` is, if it says of itself that it is what ``request`` asks for, or None.

    ``extension``: the request's prompt is yet to be written out.
    """
    if not output.is_file() or RunFolder(output).path.exists():
        return None
    try:
        made = read_settings(output)
    except ValueError:
        return None
    if extension:
        made = extension.undone(made)
    asked = json.loads(json.dumps(pipe.settings(request)))
    free = {*NOT_COMPARED, *(("seed",) if any_seed else ())}
    same = all(made.get(name) == value for name, value in asked.items() if name not in free)
    return made["seed"] if same else None


def flags_of(record: Mapping[str, Any], defaults: argparse.Namespace) -> argparse.Namespace:
    """The flags that the run was started with; those that came with a later version have their defaults."""
    return argparse.Namespace(**{**vars(defaults), **_tuples(record["flags"])})


def request_of(record: Mapping[str, Any]) -> Request:
    """The request of the run.

    Raises:
        WanError: it is of another version of wan_mlx, which had other fields.
    """
    try:
        fields = _tuples(record["request"])
        return Request(**{**fields, "geometry": Geometry(*fields.get("geometry", astuple(WAN_2_1)))})
    except TypeError as error:
        raise WanError(
            f"the run was begun by wan_mlx {record['machine']['wan_mlx']}, whose requests differ from those of "
            f"{__version__} ({error}); go on with that version, or start anew with --overwrite"
        ) from error


def check_given(given: Mapping[str, Any], record: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise ValueError, naming each difference, if flags given beside ``--resume`` are not those of the run.

    Those in ``free`` may differ.
    """
    differences = []
    for name, value in given.items():
        if name in free:
            continue
        stored = record["flags"].get(name)
        if stored is None:  # it was left to the model
            stored = options.value_in(record["request"], name)
        if json.loads(json.dumps(_normal(name, value))) != stored:
            differences.append(f"{options.flag_names()[name]} is {_said(stored)}, {_said(value)} was given")
    _refuse(differences)


def with_dtype(record: Mapping[str, Any], dtype: str, steps_done: int) -> dict[str, Any]:
    """The record of a run that goes on in another dtype, which its settings then tell."""
    settings = {**record["settings"], "dtype": f"{record['settings']['dtype']}, {dtype} from step {steps_done + 1}"}
    return {**record, "flags": {**record["flags"], "dtype": dtype}, "settings": settings}


def check_same(flags: Mapping[str, Any], record: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise ValueError, naming each difference, if these are not the flags that the run was begun with.

    Those in ``free`` may differ.
    """
    stored = record["flags"]
    _refuse(
        f"{options.flag_names()[name]} is {_said(stored.get(name))}, {_said(value)} was given"
        for name, value in _normal_flags(flags).items()
        if name not in free and value != stored.get(name)
    )


def _refuse(differences: Iterable[str]) -> None:
    if differences := list(differences):
        raise ValueError(
            f"the run has other settings: {'; '.join(differences)}; leave them out to go on with it, or start anew "
            "with --overwrite instead of --resume"
        )


def check_identity(record: Mapping[str, Any], pipe: WanPipeline, folder: RunFolder) -> Iterator[str]:
    """Yield what cannot be promised to give the same bytes, in words for the user.

    Raises:
        WanError: weights or sources that are still needed are not those that the run was begun with.
    """
    encoded = folder.is_unfinished
    kinds = ENCODERS * encoded + ("transformer",) * (folder.steps_done == request_of(record).steps_made)
    done = {part.name for part in pipe.checkpoint.parts if part.kind in kinds}
    if "transformer" in kinds:
        done |= {name for name in _weights(pipe) if name.startswith("lora")}
    for name, path in _weights(pipe).items():
        if name not in done and record["weights"].get(name) != storage.fingerprint(path):
            raise WanError(f"{path} is not the file that the run was begun with; put that back, or start anew with "
                           "--overwrite instead of --resume")  # fmt: skip
    for name, known in (() if encoded else record["sources"].items()):
        if not Path(name).is_file() or storage.fingerprint(Path(name)) != known:
            raise WanError(f"{name} is not the file that the run was begun with; put that back, or start anew with "
                           "--overwrite instead of --resume")  # fmt: skip
    now = {"wan_mlx": __version__, "mlx": mx.__version__, "device": _device()}
    for name, value in now.items():
        if record["machine"][name] != value:
            yield f"the run was begun with {name} {record['machine'][name]}, this is {value}: last bits may differ"


def _weights(pipe: WanPipeline) -> dict[str, Path]:
    """Every file that the run reads weights from."""
    draft = {"taehv": pipe.taehv} if pipe.draft else {}
    loras = [*pipe.loras, *(lora for part in pipe.checkpoint.parts for lora in part.loras)]
    return {**pipe.checkpoint.files, **{f"lora {i}": path for i, (path, _) in enumerate(loras)}, **draft}


def _normal_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({name: _normal(name, value) for name, value in flags.items()}))


def _normal(name: str, value: Any) -> Any:
    """A flag's value, as JSON takes it, such that it means the same in another folder."""
    places = {option.key: option.place for option in options.flags()}
    if name == "loras":
        return [f"{_absolute_if_here(str(path))}:{strength!r}" for path, strength in normalise_loras(value)]
    place = places.get(name)
    if place and isinstance(value, tuple):
        return [_absolute(one) for one in value]
    if not place or not isinstance(value, str):
        return value
    return _absolute(value) if place == "file" else _absolute_if_here(value)


def _absolute_if_here(name: str) -> str:
    """A file or folder of this machine as an absolute path; the name of a bundled model or on a hub as it is."""
    return name if name in BUNDLED or not Path(name).expanduser().exists() else _absolute(name)


def _absolute(path: str | None) -> str | None:
    return path and str(Path(path).expanduser().absolute())


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _said(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else f"{value}"


def _device() -> str:
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or mx.default_device())
