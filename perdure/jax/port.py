"""Copy a Mistral from one layout of files to another, piece by piece: no tensor need fit into memory.

Knows files and bytes; needs numpy and no JAX. A number keeps its bits, whatever its type.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from perdure.errors import ModelError, unknown_name
from perdure.jax.layouts import LAYOUTS, Cut, Key, Layout, keys, name_in, shapes
from perdure.jax.source import FORMAT, KEPT, MANIFEST, OF_LAYOUT, TOGETHER, WEIGHTS, Source, open_source
from perdure.jax.tensors import begin, header_text, parse_header
from perdure.storage import folder, guarded, there

# What stands beside the weights and goes along.
BESIDE = ("*.json", "tokenizer*", "*.model", "*.model.v*", "merges.txt", "vocab.txt", "*.jinja")
SHARD = 5_000_000_000  # bytes of the largest file of a new Hugging Face folder
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

# A tensor of a new file: its name, dtype and shape, and what its bytes are put together from.
Entry = tuple[str, str, tuple[int, ...], Sequence[Cut]]


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its header's text and the tensors in the order of the data."""

    name: str
    header: str
    cuts: Sequence[Cut]


def port(source: Path | str, dest: Path | str, to: str = "jax", say: Callable[[str], None] | None = None) -> Path:
    """Copy the Mistral in the folder `source` to a new folder `dest`.

    Args:
        source: a folder of any layout: Hugging Face's (config.json, model.safetensors or shards), Mistral's own
            (params.json, consolidated*.safetensors), or one that `port` wrote.
        dest: a folder that is not there yet, or empty.
        to: "jax" (what `perdure.jax.load` reads), "huggingface" or "mistral".
        say: told what is being written.

    Returns:
        dest.

    Raises:
        ModelError: a file or a tensor is missing or not as it should be, or the architecture is another.
        StorageError: the disk refused; nothing is left at `dest`.
    """
    source, dest = Path(source), Path(dest)
    if to not in LAYOUTS:
        raise ModelError(unknown_name("layout", to, LAYOUTS))
    if there(dest) and (not dest.is_dir() or any(dest.iterdir())):
        raise ModelError(f"{dest}: there is something here already; give a folder that is not there yet")
    found = open_source(source)
    if found.layout == to:
        raise ModelError(f"{source}: is in the {to} layout already; there is nothing to port")
    layout = cast(Layout, to)
    new, texts = _plan(found, layout)
    with folder(dest) as aside:
        for name in _beside(found, layout):
            shutil.copyfile(source / name, aside / name)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for file in new:
            if say is not None:
                say(f"{dest / file.name}: {_size(file)}")
            with guarded(dest / file.name), (aside / file.name).open("wb") as out:
                begin(out, file.header)
                for cut in file.cuts:
                    for piece in cut.pieces():
                        out.write(piece)
    return dest


def _plan(found: Source, to: Layout) -> tuple[list[NewFile], dict[str, str]]:
    """The files of weights to write, and those that are written as text."""
    if to == "jax":
        return _stacked(found)
    if found.origin.layout == to and found.layout == "jax":
        return _as_it_was(found)
    return _fresh(found, to)


def _stacked(found: Source) -> tuple[list[NewFile], dict[str, str]]:
    config, entries = found.config, []
    for path in shapes(config):
        if not path.startswith("layers."):
            one = found.cuts[path, None]
            entries.append((path, one.stored.dtype, one.stored.shape, [one]))
            continue
        layers = [found.cuts[path, layer] for layer in range(config.num_hidden_layers)]
        dtypes = sorted({cut.stored.dtype for cut in layers})
        if len(dtypes) > 1:
            raise ModelError(f"{found.folder}: {path} has the dtypes {', '.join(dtypes)} in different layers")
        entries.append((path, dtypes[0], (len(layers), *layers[0].stored.shape), layers))
    for name, cut in found.kept.items():
        entries.append((f"{KEPT}{name}", cut.stored.dtype, cut.stored.shape, [cut]))
    manifest = {"format": FORMAT, "kind": "mistral", "config": asdict(config), "origin": asdict(found.origin)}
    return [_file(WEIGHTS, entries, {})], {MANIFEST: json.dumps(manifest, indent=1) + "\n"}


def _as_it_was(found: Source) -> tuple[list[NewFile], dict[str, str]]:
    """The files that the folder was ported from, byte for byte."""
    origin = found.origin
    back = {origin.renamed(name_in(origin.layout, key)): key for key in keys(found.config)}
    new = []
    for name, text in origin.headers.items():
        cuts = []
        for tensor in parse_header(found.folder / name, text).tensors:
            if tensor not in found.kept and tensor not in back:
                raise ModelError(f"{found.folder}: its manifest names {tensor}, which is not here; port it again")
            cuts.append(found.kept[tensor] if tensor in found.kept else _facing(found, back[tensor], origin.layout))
        new.append(NewFile(name, text, cuts))
    return new, dict(origin.texts)


def _fresh(found: Source, to: Layout) -> tuple[list[NewFile], dict[str, str]]:
    """Files as the layout's own tools write them: in shards for Hugging Face, one file for Mistral."""
    entries: list[Entry] = []
    for key in keys(found.config):
        cut = _facing(found, key, to)
        entries.append((name_in(to, key), cut.stored.dtype, cut.stored.shape, [cut]))
    if to == "mistral":
        texts = {"params.json": _json(found.config.to_mistral())}
        return [_file("consolidated.safetensors", entries, {})], texts
    dtype = TORCH_NAMES.get(entries[0][1], "float32")
    texts = {"config.json": _json(found.config.to_huggingface(dtype))}
    shards = list(_shards(entries))
    if len(shards) == 1:
        return [_file("model.safetensors", shards[0], {"format": "pt"})], texts
    new, places = [], {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        new.append(_file(name, shard, {"format": "pt"}))
        places.update({entry[0]: name for entry in shard})
    total = sum(cut.stored.size for entry in entries for cut in entry[3])
    texts[TOGETHER] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return new, texts


def _facing(found: Source, key: Key, to: str) -> Cut:
    """A tensor with its rotary rows as that layout has them; a source's lie in halves."""
    cut = found.cuts[key]
    return cut.turned(key[0], "pairs", found.config.head_dim) if to == "mistral" else cut


def _shards(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        more = sum(cut.stored.size for cut in entry[3])
        if shard and size + more > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += more
    yield shard


def _file(name: str, entries: Sequence[Entry], metadata: dict[str, str]) -> NewFile:
    text = header_text([entry[:3] for entry in entries], metadata)
    return NewFile(name, text, [cut for entry in entries for cut in entry[3]])


def _size(file: NewFile) -> str:
    return f"{sum(cut.stored.size for cut in file.cuts) / 1e6:,.1f} MB"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _beside(found: Source, to: Layout) -> list[str]:
    """Names of the files that go along: tokenizer and settings, no settings of another layout's."""
    foreign: set[str] = set()
    if to != "jax":
        foreign = {name for layout, names in OF_LAYOUT.items() if layout != to for name in names}
        if found.origin.layout == to:
            foreign -= set(found.origin.beside)
    names = sorted(path.name for path in found.folder.iterdir() if path.is_file())
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in BESIDE)
        and not name.endswith(".index.json")
        and name != MANIFEST
        and name not in foreign
    ]
