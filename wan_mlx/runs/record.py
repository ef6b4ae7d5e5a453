"""The record of a run, so that only the same run goes on: request, model, and the digests of weights and sources."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__, options, storage
from ..errors import WanError
from ..geometry import Geometry
from ..hub.model_folders import find_model
from ..media.preview import PreviewFiles
from ..media.write import read_settings
from ..opened import OpenedModel
from ..option import REQUEST
from ..planning.machine import mlx_version
from ..presets import BUNDLED, MODULE
from ..prompts.extend import Extension
from ..types import Request
from ..weights.lora import file_of, normalise_loras
from .folder import RunFolder

# Settings that may differ once the same request is made.
NOT_COMPARED = ("versions", "forwards", "tokens")
# Superfluous once the conditioning is kept: these weights may be gone or different when the run goes on.
ENCODERS = ("text_encoder", "image_encoder", "audio_encoder", "tokenizer")


def make_record(
    pipe: OpenedModel,
    request: Request,
    asked: Mapping[str, Any],
    overwrite: bool = False,
    previews: PreviewFiles | None = None,
) -> dict[str, Any]:
    """The record for `RunFolder.begin`, a JSON object.

    Args:
        asked: options of the request as they were given; those left to the model are None or not there.
        overwrite: replace the output if it exists.
        previews: kept up to date by the run.
    """
    fields = normal(request.settings()) | {"geometry": list(astuple(request.geometry))}
    sources = [path for path in request.source_files if path.is_file()]
    weights = files_of_weights(pipe, request.interpolate)
    record = {
        "request": fields,
        "steps": request.steps_of_clips,
        "asked": normal(asked) | {"seed": request.seed},
        "model": normal(pipe.opened_with),
        "overwrite": overwrite,
        "preview": previews and {"path": _absolute(str(previews.path)), "every": previews.every},
        "settings": pipe.settings(request),
        "weights": {name: storage.fingerprint(path) for name, path in weights.items()},
        "sources": {_absolute(str(path)): storage.fingerprint(path) for path in sources},
        "machine": _machine(),
    }
    return json.loads(json.dumps(record))


def seed_of_made(
    pipe: OpenedModel, request: Request, output: Path, any_seed: bool = False, extension: Extension | None = None
) -> int | None:
    """The seed of the video that ``output`` is, if its settings are those of ``request``, or None.

    ``extension``: the request's prompt is yet to be written out.
    """
    if not output.is_file() or RunFolder(output).has_begun:
        return None
    try:
        made = read_settings(output)
    except ValueError:
        return None
    if extension:
        made = extension.undone(made)
    lacking = {option.name: option.default for option in options.of(REQUEST)} | {"model_fps": made.get("fps")}
    made = lacking | made  # which an older video lacks
    asked = json.loads(json.dumps(pipe.settings(request)))
    free = {*NOT_COMPARED, *(("seed",) if any_seed else ())}
    same = all(made.get(name) == value for name, value in asked.items() if name not in free)
    return made["seed"] if same else None


def request_of(record: Mapping[str, Any]) -> Request:
    """The request of the run.

    Raises:
        WanError: it is of another version of wan_mlx, which had other fields.
    """
    try:
        fields = _tuples(record["request"])
        return Request(**{**fields, "geometry": Geometry(*fields["geometry"])})
    except TypeError as error:
        raise WanError(
            f"the run was begun by wan_mlx {record['machine']['wan_mlx']}, whose requests differ from those of "
            f"{__version__} ({error}); go on with that version, or start anew with --overwrite"
        ) from error


def model_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the run's model was opened with, for `WanPipeline.from_pretrained`."""
    return _tuples(record["model"])


def check_same(given: Mapping[str, Any], record: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise ValueError, naming each difference, if the run was asked for with other options.

    Args:
        given: options of the request, or of `WanPipeline.from_pretrained`.
        free: those that may differ.
    """
    stored, flags = {**record["model"], **record["asked"]}, options.flag_names()
    differences = []
    for name, value in normal(given).items():
        before = stored.get(name)
        if before is None and value is not None:  # it was left to the model
            own = _value_in(record["request"], name)
            before = record["settings"].get(name) if own is None else own
        if name not in free and value != before:
            differences.append(f"{flags.get(name, name)} is {_said(name, before)}, {_said(name, value)} was given")
    if differences:
        raise ValueError(
            f"the run has other settings: {'; '.join(differences)}; leave them out to go on with it, or start anew "
            "with --overwrite instead of --resume"
        )


def _value_in(request: Mapping[str, Any], key: str) -> Any:
    """The value of a parsed flag that a request's fields come from; None if they do not tell."""
    option = next(option for option in options.flags() if option.key == key)
    request = {**request, "size": [request["width"], request["height"]]}
    values = [request.get(name) for name in option.sets or (option.name,)]
    return values[0] if not (option.sets and values[0]) else values


def with_dtype(record: Mapping[str, Any], dtype: str, steps_done: int) -> dict[str, Any]:
    """The changes to the record of a run that goes on in another dtype, which its settings then tell."""
    settings = {**record["settings"], "dtype": f"{record['settings']['dtype']}, {dtype} from step {steps_done + 1}"}
    return {"model": {**record["model"], "dtype": dtype}, "settings": settings}


def check_identity(record: Mapping[str, Any], pipe: OpenedModel, folder: RunFolder) -> Iterator[str]:
    """Yield the reasons why the bytes may differ, in words for the user.

    Raises:
        WanError: weights or sources that are still needed are not those that the run was begun with.
    """
    encoded, weights = folder.is_unfinished, files_of_weights(pipe, record["request"].get("interpolate"))
    kinds = ENCODERS * encoded + ("transformer",) * folder.is_sampled
    done = {part.name for part in pipe.checkpoint.parts if part.kind in kinds}
    if "transformer" in kinds:
        done |= {name for name in weights if name.startswith(("lora", MODULE))}
    needed = [(path, record["weights"].get(name)) for name, path in weights.items() if name not in done]
    speech = record["request"].get("audio")  # which goes into the file
    again = not encoded or (record["request"].get("src_root_path") and not folder.is_sampled)  # by each clip
    needed += [(Path(name), known) for name, known in record["sources"].items() if again or name == speech]
    for path, known in needed:
        if not path.is_file() or storage.fingerprint(path) != known:
            raise WanError(f"{path} is not the file that the run was begun with; put that back, or start anew with "
                           "--overwrite instead of --resume")  # fmt: skip
    for name, value in _machine().items():
        if record["machine"][name] != value:
            yield f"the run was begun with {name} {record['machine'][name]}, this is {value}: last bits may differ"


def files_of_weights(pipe: OpenedModel, interpolate: str | None) -> dict[str, Path]:
    """Every file that the run reads weights from."""
    between = {"interpolate": pipe.interpolator(interpolate)} if interpolate else {}
    tiny = {"taehv": pipe.taehv} if pipe.tiny_vae and pipe.taehv else {}
    loras = [*pipe.loras, *(lora for part in pipe.checkpoint.parts for lora in part.loras)]
    indexed = {f"lora {i}": file_of(path) for i, (path, _) in enumerate(loras)}
    return {**pipe.checkpoint.files, **indexed, **tiny, **between}


def normal(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON takes them, such that they mean the same in another folder."""
    places = {option.key: option.place for option in options.flags()}
    return json.loads(json.dumps({name: _normal(name, value, places.get(name)) for name, value in given.items()}))


def _normal(name: str, value: Any, place: str | None) -> Any:
    if name in options.LORAS:
        return [f"{_absolute_if_here(str(path))}:{strength!r}" for path, strength in normalise_loras(value)]
    if place and isinstance(value, tuple | list):
        return [_absolute(str(one)) for one in value]
    if not place or not isinstance(value, str | Path):
        return value
    return _absolute(str(value)) if place == "file" else _absolute_if_here(str(value))


def _absolute_if_here(name: str) -> str:
    """A file or folder of this machine as an absolute path; the name of a bundled model or on a hub as it is."""
    if name in BUNDLED or Path(name).expanduser().exists():
        return name if name in BUNDLED else _absolute(name)
    found = find_model(name)
    return name if found is None else _absolute(str(found))


def _absolute(path: str) -> str:
    return path and str(Path(path).expanduser().absolute())


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _said(name: str, value: Any) -> str:
    several = isinstance(value, tuple | list)
    return ("x" if name in ("size", "vae_tiling") else ",").join(map(str, value)) if several else f"{value}"


def _machine() -> dict[str, str]:
    """The versions and devices on which last bits depend."""
    info = mx.device_info()
    device = str(info.get("device_name") or info.get("architecture") or mx.default_device())
    return {"wan_mlx": __version__, "mlx": mlx_version(), "device": device}
