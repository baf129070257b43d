"""Reaction SMILES: taken apart and put together again, canonical, randomised, with RDKit and without."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.errors import ConfigError, DataError
from perdure.streams.reactions import (
    Reaction,
    ReactionsSpec,
    arrange_tasks,
    augment,
    build,
    canonical,
    has_rdkit,
    normal,
    read,
    similarities,
    tasks_of,
)
from perdure.streams.reactions.chem import joined, parts

SMILES = (
    "CC#N.CC(=O)O~CC(=O)O~[Pd].CCc1cccc(CC)c1.Cc1ccc2c(cnn2C2CCCCO2)c1B(O)O.Clc1ccc2ncccc2c1.O.[Na+].[OH-]"
    ">>Cc1ccc2c(cnn2C2CCCCO2)c1-c1ccc2ncccc2c1"
)
needs_rdkit = pytest.mark.skipif(not has_rdkit(), reason="RDKit is in the extra chem")


@pytest.mark.parametrize(
    ("smiles", "pieces"),
    [
        ("C.O>>N", [[["C"], ["O"]], [], [["N"]]]),
        ("C~O.N>[Pd]>F", [[["C", "O"], ["N"]], [["Pd"]], [["F"]]]),
        ("CCO", [[["CCO"]]]),
        ("N->[Pd].C>>F", [[["N->[Pd]"], ["C"]], [], [["F"]]]),
        (">>N", [[], [], [["N"]]]),
    ],
)
def test_parts(smiles: str, pieces: list[list[list[str]]]) -> None:
    found = parts(smiles)
    assert joined(found) == smiles
    assert found == [[[f.replace("Pd", "[Pd]") if f == "Pd" else f for f in c] for c in p] for p in pieces]


def test_normal_form_is_of_order_alone() -> None:
    assert normal("O.C~B.CC>>N.F") == normal("CC.B~C.O>>F.N") == "B~C.CC.O>>F.N"
    assert normal("C.O>>N") != normal("C>O>N")
    assert normal("C~O>>N") != normal("C.O>>N")
    assert normal(SMILES) == SMILES  # the Suzuki table lists compounds sorted already


@needs_rdkit
def test_canonical_by_hand(capfd: pytest.CaptureFixture[str]) -> None:
    """Ethanol from either end is CCO, pyridine c1ccncc1, and O (79) sorts behind C (67) and c (99) behind both."""
    assert canonical("n1ccccc1.OCC~O>>C(C)O") == "CCO~O.c1ccncc1>>CCO"
    assert canonical(SMILES) == SMILES
    assert canonical("C(C)O") == "CCO"
    with pytest.raises(DataError, match=re.escape("SMILES 'C1CC' is no molecule that RDKit reads. Correct it")):
        canonical("O.C1CC>>N")
    with pytest.raises(DataError, match="SMILES ''"):
        canonical("O..C>>N")
    assert capfd.readouterr() == ("", "")  # RDKit's own log of the error stays away


@needs_rdkit
def test_all_of_suzuki_is_canonical_and_comes_back_from_its_copies(
    shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows in which every compound of the table occurs: the canonical form undoes the randomised one.

    They are 43: 7 quinolines, 4 partners, 1 catalyst, 9 ligands and 2 more of two compounds, 10 of the bases (of
    which K+ also stands with the trifluoroborates), 4 solvents, diethylbenzene, HCl, water and the product.
    """
    from rdkit import Chem

    rows = read(ReactionsSpec(file=str(shared / "data" / "suzuki_miyaura.csv.gz"))).rows
    kept: dict[str, Reaction] = {}
    for row in rows:
        assert canonical(row.smiles) == row.smiles
        for part in parts(row.smiles):
            for compound in part:
                kept.setdefault("~".join(compound), row)
    assert len(kept) == 43
    for row in {row.key: row for row in kept.values()}.values():
        (copy,) = augment(row.smiles, 1, row.key, 7193)
        assert copy != row.smiles
        assert canonical(copy) == row.smiles
        before, after = parts(row.smiles), parts(copy)
        assert [[len(c) for c in p] for p in before] == [[len(c) for c in p] for p in after]
        for one, other in zip(before, after, strict=True):  # each in its place
            for compound, spelt in zip(one, other, strict=True):
                for fragment, spelling in zip(compound, spelt, strict=True):
                    assert Chem.CanonSmiles(spelling) == fragment
    assert capfd.readouterr() == ("", "")


@needs_rdkit
def test_copies_follow_from_seed_and_key() -> None:
    three = augment(SMILES, 3, "7", 1)
    assert len(set(three)) == 3
    assert augment(SMILES, 2, "7", 1) == three[:2]
    assert augment(SMILES, 3, "8", 1) != three != augment(SMILES, 3, "7", 2)
    assert augment(SMILES, 0, "7", 1) == []
    assert augment("O>>N", 2, "7", 1) == ["O>>N", "O>>N"]
    # Equal molecules of one reaction are spelt apart, and all spellings of a small one occur.
    assert any(len(set(copy.split(">>")[0].split("."))) > 1 for copy in augment("CCO.CCO>>N", 9, "7", 1))
    spelt = {copy.split(">>")[0] for copy in augment("CCO>>N", 60, "7", 1)}
    assert spelt == {"CCO", "OCC", "C(C)O", "C(O)C"}
    with pytest.raises(DataError, match="SMILES 'C1CC'"):
        augment("C1CC>>N", 1, "7", 1)


@needs_rdkit
def test_molecules_keep_charge_stereo_isotope_and_atom_maps() -> None:
    for smiles in ("C[C@H](N)C(=O)O", "F/C=C/F", "[13CH4]", "[CH3:1][OH:2]", "CC(C)(C)P(C1=CC=C[CH]1)C(C)(C)C"):
        for copy in augment(f"{smiles}>>O", 8, "k", 0):
            assert canonical(copy) == canonical(f"{smiles}>>O")


@needs_rdkit
def test_likeness_is_rdkits_own() -> None:
    """Tanimoto over the union of two reactants' bits, as RDKit counts it on its own bit vectors."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    pairs = {
        "a": ("Clc1ccc2ncccc2c1", "OB(O)c1ccccc1"),
        "b": ("Brc1ccc2ncccc2c1", "OB(O)c1ccccc1"),
        "c": ("CO", "CN"),
    }
    tasks = {name: [Reaction(name, name, f"{'.'.join(pair)}.O>>S", 0.5, {})] for name, pair in pairs.items()}
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    prints = []
    for one, other in pairs.values():
        bits = generator.GetFingerprint(Chem.MolFromSmiles(one))
        bits |= generator.GetFingerprint(Chem.MolFromSmiles(other))
        prints.append(bits)
    expected = [[DataStructs.TanimotoSimilarity(one, other) for other in prints] for one in prints]
    likeness, _ = similarities(tasks, "morgan")
    assert likeness == expected
    assert expected[0][1] > expected[0][2]


def test_canonical_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("rxn,yield\nOCC.C>>N,5\n")
    spec = ReactionsSpec(file=str(path), task_columns=(), canonical=True)
    if not has_rdkit():
        pytest.skip("RDKit is in the extra chem")
    table = read(spec)
    assert (table.rows[0].smiles, table.facts["canonical"]) == ("C.CCO>>N", True)
    path.write_text("rxn,yield\nOCC.C>>N,5\nC1CC>>N,5\nc1cc>>N,5\n")
    with pytest.raises(DataError) as error:
        read(spec)
    assert "t.csv:3: rxn: SMILES 'C1CC' is no molecule" in str(error.value)
    assert "t.csv:4: rxn: SMILES 'c1cc' is no molecule" in str(error.value)


def test_molecules_that_rdkit_cannot_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    path.write_text("rxn,yield\nOCC.C>>N,5\nC~C1CC>>N,5\nC.c1cc>>N,5\n")
    spec = ReactionsSpec(file=str(path), task_columns=())
    if not has_rdkit():
        pytest.skip("RDKit is in the extra chem")
    assert read(spec).facts["notes"] == []
    table = read(spec, molecules=True)
    assert [row.smiles for row in table.rows] == ["OCC.C>>N", "C~C1CC>>N", "C.c1cc>>N"]
    (note,) = table.facts["notes"]
    assert note.startswith("2 rows hold molecules that RDKit cannot read, the first in line 3: 'C1CC'; kept as")
    path.write_text("rxn,yield\nOCC.C>>N,5\nC1CC>>N,5\n")
    _, facts = build(spec.model_copy(update={"holdout": 0.0}), None, 0)
    (note,) = facts["notes"]
    assert note.startswith("1 row holds a molecule that RDKit cannot read, in line 3: 'C1CC'; kept as")
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert read(spec, molecules=True).facts["notes"] == []


def test_without_rdkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, tasks, splits and similarity do without; what needs it says how to install it."""
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert not has_rdkit()
    path = tmp_path / "t.csv"
    path.write_text("rxn,s,yield\n" + "".join(f"{'P' * i}>>N,{s},{i}\n" for i in range(1, 8) for s in "ab"))
    settings = {"file": str(path), "task_columns": ("s",)}
    tasks, facts = build(ReactionsSpec(**settings, order="similarity"), None, 0)
    assert [task.name for task in tasks] == ["a", "b"]
    assert facts["order"]["measure"] == "Jaccard index of SMILES' runs of 4 characters"
    rows = tasks_of(read(ReactionsSpec(**settings)).rows)
    words = r'need RDKit; it is in an extra: pip install "perdure\[chem\]"'
    with pytest.raises(ConfigError, match=words):
        canonical("PPP>>N")
    with pytest.raises(ConfigError, match=words):
        augment("PPP>>N", 1, "k", 0)
    with pytest.raises(ConfigError, match=words):
        arrange_tasks(rows, "similarity", 0, "morgan")
    for more in ({"canonical": True}, {"augment": 1}):
        with pytest.raises(ConfigError, match=words):
            build(ReactionsSpec(**settings, **more), None, 0)


@needs_rdkit
def test_another_process_spells_alike() -> None:
    code = f"from perdure.streams.reactions import augment; print(*augment({SMILES!r}, 2, '7', 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == augment(SMILES, 2, "7", 1)
    assert done.stderr == ""
