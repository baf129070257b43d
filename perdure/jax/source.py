"""Open a folder with a Mistral in any layout: its shape, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.errors import ModelError, NewerFormatError
from perdure.jax.config import MistralConfig, read_object
from perdure.jax.layouts import Cut, Key, Layout, keys, name_in, shapes
from perdure.jax.tensors import Header, Stored, read_header

FORMAT = 1
MANIFEST, WEIGHTS = "perdure.json", "weights.safetensors"
TOGETHER = "model.safetensors.index.json"
KEPT = "kept."
# Old checkpoints carry what follows from the settings.
PASSED_ON = ("rotary_emb.inv_freq",)
# Settings that belong to one layout.
OF_LAYOUT = {"huggingface": ("config.json", "generation_config.json"), "mistral": ("params.json",)}
PICKLED = ("*.pth", "*.pt", "*.bin")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a folder was ported from, enough to write its files again byte for byte.

    Attributes:
        layout: "huggingface" or "mistral".
        prefix: what all names of its backbone begin with; Hugging Face's "model." may be missing.
        headers: by file name, the text of the header.
        texts: other files of the weights by name, such as an index of shards.
        beside: names of the settings, of whatever layout, that lay beside the weights.
    """

    layout: Layout
    prefix: str = "model."
    headers: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)

    def renamed(self, name: str) -> str:
        """A name of its layout as this folder has it."""
        return name if self.layout == "mistral" or name == "lm_head.weight" else self.prefix + name[len("model.") :]


@dataclass(frozen=True, slots=True)
class Source:
    """An opened folder.

    Attributes:
        folder: where.
        layout: of the folder.
        config: shape of the model.
        cuts: every tensor by path and layer, rotary rows in halves.
        kept: tensors by name that no model here reads, and that go along.
        origin: what the folder, or the one that it was ported from, was like.
    """

    folder: Path
    layout: Layout
    config: MistralConfig
    cuts: dict[Key, Cut]
    kept: dict[str, Cut]
    origin: Origin


def open_source(folder: Path) -> Source:
    """The model in a folder, whatever its layout.

    Raises:
        ModelError: no layout known here, another architecture, or tensors that are missing or have other shapes.
    """
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "there is no such folder"
        raise ModelError(f"{folder}: {what}; give the folder of a model, with config.json or params.json")
    if (folder / MANIFEST).is_file():
        return _open_ported(folder)
    single, index = folder / "model.safetensors", folder / TOGETHER
    own = sorted(folder.glob("consolidated*.safetensors"))
    if (folder / "config.json").is_file() and (single.is_file() or index.is_file()):
        config = _in(folder / "config.json", MistralConfig.from_huggingface)
        return _open_files(folder, "huggingface", config, *_shards(single, index))
    if (folder / "params.json").is_file() and own:
        return _open_files(folder, "mistral", _in(folder / "params.json", MistralConfig.from_mistral), own, {})
    raise ModelError(f"{folder}: {_what_is_missing(folder)}")


def _in(path: Path, read: Any) -> MistralConfig:
    try:
        config: MistralConfig = read(read_object(path))
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(str(path.parent)) else f"{path.parent}: {text}") from error
    return config


def _what_is_missing(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run code when it is read, and is not read here; take the model's "
            "safetensors files, or convert it where you trust it"
        )
    if (folder / "config.json").is_file():
        return f"has config.json and no weights: model.safetensors is missing, and so is {TOGETHER}"
    if (folder / "params.json").is_file():
        return "has params.json and no weights: consolidated.safetensors is missing"
    return (
        "no model here: it needs config.json and model.safetensors (or its shards and their index), or params.json "
        "and consolidated.safetensors"
    )


def _shards(single: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights of a Hugging Face folder, and their index as text by name."""
    if single.is_file():
        return [single], {}
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index}: must say in weight_map which file has which tensor")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: {outside[0]!r} is not a file of this folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index.parent}: of {len(names)} shards {', '.join(missing)} is missing")
    return [index.parent / name for name in names], {index.name: index.read_text(encoding="utf-8")}


def _open_files(
    folder: Path, layout: Layout, config: MistralConfig, files: list[Path], texts: dict[str, str]
) -> Source:
    headers = {path.name: read_header(path) for path in files}
    stored: dict[str, Stored] = {}
    for name, header in headers.items():
        twice = header.tensors.keys() & stored.keys()
        if twice:
            raise ModelError(f"{folder / name}: {min(twice)} is in another file too")
        stored.update(header.tensors)
    bare = layout == "huggingface" and "embed_tokens.weight" in stored
    beside = [name for names in OF_LAYOUT.values() for name in names if (folder / name).is_file()]
    origin = Origin(
        layout, "" if bare else "model.", {name: header.text for name, header in headers.items()}, texts, beside
    )
    names = {key: origin.renamed(name_in(layout, key)) for key in keys(config)}
    cuts = _taken(folder, config, names, stored)
    kept = {}
    for name in stored.keys() - set(names.values()):
        tied_head = config.tie_word_embeddings and name in ("lm_head.weight", "output.weight")
        if not tied_head and not name.endswith(PASSED_ON):
            raise ModelError(f"{folder}: {name} is no tensor of a Mistral; this is another architecture")
        kept[name] = Cut(stored[name])
    if layout == "mistral":
        cuts = {key: cut.turned(key[0], "halves", config.head_dim) for key, cut in cuts.items()}
    return Source(folder, layout, config, cuts, dict(sorted(kept.items())), origin)


def _taken(
    folder: Path, config: MistralConfig, names: Mapping[Key, str], stored: Mapping[str, Stored]
) -> dict[Key, Cut]:
    """Each tensor by key; ModelError names those that are missing or have another shape."""
    missing = [name for name in names.values() if name not in stored]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{folder}: lacks the tensors {', '.join(missing[:3])}{more}")
    wanted = shapes(config)
    for key, name in names.items():
        if stored[name].shape != wanted[key[0]]:
            raise ModelError(
                f"{folder}: {name} has the shape {list(stored[name].shape)}, and the model's settings want "
                f"{list(wanted[key[0]])}"
            )
    return {key: Cut(stored[name]) for key, name in names.items()}


def read_manifest(folder: Path) -> tuple[MistralConfig, Origin, Header]:
    """Shape, origin and header of the weights of a folder that `port` wrote.

    Raises:
        ModelError: it is none, or not whole.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(
            f"{folder}: no {MANIFEST} here, so it is no ported model; make one: perdure port {folder} NEW_FOLDER"
        )
    values = read_object(path)
    if isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise NewerFormatError(f"{path}: format {values['format']} is newer than this perdure reads ({FORMAT})")
    try:
        config, origin = MistralConfig(**values["config"]), Origin(**values["origin"])
        outside = [name for name in (*origin.texts, *origin.headers, *origin.beside) if Path(name).name != name]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: not as port writes it: {error}; port the model again") from error
    if outside:
        raise ModelError(
            f"{path}: {outside[0]!r} is no name of a file in a model's folder; nothing is written there"
        )
    return config, origin, read_header(folder / WEIGHTS)


def _open_ported(folder: Path) -> Source:
    config, origin, header = read_manifest(folder)
    cuts: dict[Key, Cut] = {}
    for key, (path, layer) in ((key, key) for key in keys(config)):
        whole = header.tensors.get(path)
        if whole is None:
            raise ModelError(f"{folder / WEIGHTS}: lacks {path}; port the model again")
        cuts[key] = Cut(whole if layer is None else whole.part(layer))
    kept = {name.removeprefix(KEPT): Cut(s) for name, s in header.tensors.items() if name.startswith(KEPT)}
    return Source(folder, "jax", config, cuts, kept, origin)
