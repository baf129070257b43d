"""Reaction SMILES taken apart and put together: normal form, canonical form, randomised copies, fingerprints.

`A.B~C>D>E` is three parts (reactants, agents, products) of compounds parted by dots; `~` joins the fragments of one
compound, which RDKit does not read, so that every fragment is handed to it alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

from perdure.errors import ConfigError, DataError
from perdure.order import priority

_ARROW = re.compile(r"(?<!-)>")  # `->` is a dative bond
SPELLINGS = 256  # drawn from for each molecule; a reaction has the product of its molecules'


def has_rdkit() -> bool:
    """Whether RDKit is installed."""
    try:
        load_rdkit()
    except ConfigError:
        return False
    return True


def parts(smiles: str) -> list[list[list[str]]]:
    """The parts of a reaction SMILES, of compounds, of fragments; a molecule alone is one part."""
    return [[compound.split("~") for compound in part.split(".")] if part else [] for part in _ARROW.split(smiles)]


def joined(pieces: list[list[list[str]]]) -> str:
    """The reaction SMILES of its parts; `parts` undone."""
    return ">".join(".".join("~".join(compound) for compound in part) for part in pieces)


def normal(smiles: str) -> str:
    """The SMILES with fragments and compounds sorted as text: equal for one reaction listed in two orders."""
    return joined(_sorted(parts(smiles)))


def _sorted(pieces: list[list[list[str]]]) -> list[list[list[str]]]:
    # Sorted as they are written: "C~O" before "CC", which their lists would not be.
    return [sorted((sorted(compound) for compound in part), key="~".join) for part in pieces]


def _changed(smiles: str, change: Callable[[str, int], str]) -> list[list[list[str]]]:
    """The parts with every molecule changed; each is told its number in the reaction, from 1."""
    places = count(1)
    return [[[change(one, next(places)) for one in compound] for compound in part] for part in parts(smiles)]


def canonical(smiles: str) -> str:
    """The SMILES with every molecule in RDKit's canonical form, fragments and compounds sorted as text.

    Raises:
        DataError: a molecule that RDKit cannot read.
        ConfigError: RDKit is not installed.
    """
    return joined(_sorted(_changed(smiles, lambda molecule, _: _canonical(molecule))))


def unreadable(smiles: str) -> str | None:
    """The first molecule of a SMILES that RDKit cannot read, if there is one; needs RDKit."""
    molecules = (one for part in parts(smiles) for compound in part for one in compound)
    return next((one for one in molecules if not _reads(one)), None)


@lru_cache(maxsize=1 << 18)
def _reads(molecule: str) -> bool:
    return _read(molecule) is not None


@lru_cache(maxsize=4096)
def _canonical(molecule: str) -> str:
    chem, _ = load_rdkit()
    return str(chem.MolToSmiles(_parsed(molecule)))


def augment(smiles: str, copies: int, key: str, seed: int) -> list[str]:
    """Randomised reaction SMILES: every molecule written from a random atom on, all in their places.

    Args:
        smiles: of the reaction.
        copies: how many; the first ones are the same for any number. A reaction of very small molecules has few
            spellings, so that copies may equal each other.
        key: of the row: the spellings follow from the seed and the key.
        seed: of the run.

    Raises:
        DataError: a molecule that RDKit cannot read.
        ConfigError: RDKit is not installed.
    """
    return [joined(_spelling(smiles, copy, key, seed)) for copy in range(1, copies + 1)]


def _spelling(smiles: str, copy: int, key: str, seed: int) -> list[list[list[str]]]:
    def change(molecule: str, place: int) -> str:
        return _randomised(molecule, priority(seed, "reactions-augment", copy, place, key=key) % SPELLINGS)

    return _changed(smiles, change)


@lru_cache(maxsize=1 << 16)
def _randomised(molecule: str, number: int) -> str:
    chem, block = load_rdkit()
    parsed = _parsed(molecule)
    with block():
        spelling = str(chem.MolToRandomSmilesVect(parsed, 1, randomSeed=number + 1)[0])
        again = chem.MolFromSmiles(spelling)
        # A spelling that does not lead back (seen with odd valences and stereo) is not used.
        same = again is not None and chem.MolToSmiles(again) == _canonical(molecule)
    return spelling if same else molecule


@lru_cache(maxsize=4096)
def morgan(molecule: str) -> frozenset[int]:
    """The set bits of a molecule's Morgan fingerprint (radius 2, 2,048 bits)."""
    from rdkit.Chem import rdFingerprintGenerator

    parsed = _parsed(molecule)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    return frozenset(generator.GetFingerprint(parsed).GetOnBits())


def load_rdkit() -> tuple[Any, Any]:
    """RDKit's Chem, and the context that keeps its log from the terminal."""
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ConfigError(
            "canonical or randomised SMILES and fingerprints need RDKit; it is in an extra: "
            'pip install "perdure[chem]"'
        ) from error
    return Chem, rdBase.BlockLogs


def _read(molecule: str) -> Any:
    """RDKit's molecule, or None where it reads none."""
    chem, block = load_rdkit()
    with block():
        return chem.MolFromSmiles(molecule) if molecule else None


@lru_cache(maxsize=4096)
def _parsed(molecule: str) -> Any:
    parsed = _read(molecule)
    if parsed is None:
        raise DataError(
            f"SMILES {molecule!r} is no molecule that RDKit reads. Correct it, or leave out canonical and augment, "
            "and give similarity grams."
        )
    return parsed
