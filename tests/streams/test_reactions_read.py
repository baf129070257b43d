"""Tables of reactions are read as they stand, whatever their columns are called, or refused in words."""

from __future__ import annotations

import csv
import gzip
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from perdure.errors import ConfigError, DataError
from perdure.streams.reactions import ReactionsSpec, Table, published_smiles, read, tasks_of

PUBLISHED = {
    "reaction_no": "Reaction_No",
    "reactant_1": "Reactant_1_Name",
    "reactant_1_short": "Reactant_1_Short_Hand",
    "reactant_2": "Reactant_2_Name",
    "catalyst": "Catalyst_1_Short_Hand",
    "ligand": "Ligand_Short_Hand",
    "base": "Reagent_1_Short_Hand",
    "solvent": "Solvent_1_Short_Hand",
    "yield": "Product_Yield_PCT_Area_UV",
}
FIRST = ("6-chloroquinoline", "2a, Boronic Acid", "Pd(OAc)2", "SPhos", "NaOH", "MeCN")


@pytest.fixture(scope="module")
def suzuki(shared: Path) -> Path:
    return shared / "data" / "suzuki_miyaura.csv.gz"


@pytest.fixture(scope="module")
def joined(suzuki: Path) -> Table:
    return read(ReactionsSpec(file=str(suzuki)))


def cells(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table of text and give its path."""

    def write(text: str, name: str = "t.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def load(path: Path, labelled: bool = True, **settings: Any) -> Table:
    return read(ReactionsSpec(file=str(path), **{"task_columns": (), **settings}), labelled=labelled)


def sheet(path: Path, lines: Sequence[Sequence[Any]], name: str = "Sheet1") -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason="spreadsheets are in the extra chem")
    book = openpyxl.Workbook(write_only=True)
    page = book.create_sheet(name)
    for line in lines:
        page.append(line)
    book.save(path)
    return path


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        load(path, **settings)
    return str(error.value)


def test_suzuki_is_15_tasks_of_384(joined: Table, suzuki: Path) -> None:
    tasks = tasks_of(joined.rows)
    assert len(tasks) == 15
    assert {len(rows) for rows in tasks.values()} == {384}
    assert joined.facts["tasks"] == dict.fromkeys(tasks, 384)
    assert joined.facts["duplicates"] == {"rows": 0, "smiles_in_task": 0, "smiles_in_several_tasks": 0}
    assert joined.facts["scale"] == "percent"
    assert joined.facts["notes"] == joined.facts["columns"]["left_out"] == []
    # Counted apart, over the raw file.
    raw = cells(suzuki)
    assert [(row.key, row.smiles, row.value) for row in joined.rows] == [
        (r["reaction_no"], r["reaction_smiles"], float(r["yield"]) / 100) for r in raw
    ]
    assert [row.task for row in joined.rows] == [f"{r['reactant_1']} + {r['reactant_2']}" for r in raw]
    assert joined.facts["yield"]["zeros"] == 275
    assert joined.facts["yield"]["mean"] == pytest.approx(0.4011, abs=5e-5)
    # Nothing among the conditions tells the yield or the row.
    assert set(joined.rows[0].fields) == set(PUBLISHED) - {"reaction_no", "yield"}


def test_the_published_spreadsheet_reads_as_the_joined_table(joined: Table, suzuki: Path, tmp_path: Path) -> None:
    """SMILES assembled of names, yields, tasks, keys and conditions of all 5,760 rows, with the paper's columns.

    Blanks for no ligand or base, spaces behind names, and the columns of amounts and of the second measurement are
    as the paper has them.
    """
    lines: list[list[Any]] = [[*PUBLISHED.values(), "Reactant_1_eq", "Product_Yield_Mass_Ion_Count"]]
    for i, row in enumerate(cells(suzuki)):
        cell: dict[str, Any] = {column: row[column] for column in PUBLISHED}
        for column in ("ligand", "base"):
            if cell[column] == "None":
                cell[column] = (None, "None", " ")[i % 3]
        cell["solvent"] += " " * (i % 2)
        cell["reaction_no"], cell["yield"] = int(cell["reaction_no"]), float(cell["yield"])
        lines.append([*cell.values(), 1, 77.5])
    path = sheet(tmp_path / "aap9112_Data_File_S1.xlsx", lines)
    table = read(ReactionsSpec(file=str(path)))
    assert len(table.rows) == 5760
    assert table.rows == joined.rows
    assert table.facts["columns"]["left_out"] == ["Reactant_1_eq", "Product_Yield_Mass_Ion_Count"]


def test_fragments_are_sorted_as_text_and_one_missing_name_shows() -> None:
    """The rule by hand: Cl < N < O < [ in ASCII; no ligand adds nothing. In another order it is another string."""
    fields = dict(zip(("reactant_1", "reactant_2", "catalyst", "ligand", "base", "solvent"), FIRST, strict=True))
    fields["ligand"] = "None"
    left, product = published_smiles(fields).split(">>")
    assert left == (
        "CC#N.CC(=O)O~CC(=O)O~[Pd].CCc1cccc(CC)c1.Cc1ccc2c(cnn2C2CCCCO2)c1B(O)O.Clc1ccc2ncccc2c1.O.[Na+].[OH-]"
    )
    assert product == "Cc1ccc2c(cnn2C2CCCCO2)c1-c1ccc2ncccc2c1"
    with pytest.raises(KeyError):
        published_smiles(fields | {"base": "NaOtBu"})


def test_a_name_that_is_not_known(tmp_path: Path, table: Callable[..., Path]) -> None:
    header = ",".join(PUBLISHED.values())
    row = '1,6-chloroquinoline,"1a, 6-Cl-Q","2a, Boronic Acid",Pd(OAc)2,{},NaOH,MeCN,50'
    message = refusal(table("\n".join([header, row.format("SPhos"), row.format("RuPhos")])))
    assert "t.csv:3: Ligand_Short_Hand is 'RuPhos', of which no SMILES is known" in message
    assert "XPhos" in message
    assert "reaction_smiles" in message
    # With SMILES of its own the same table needs no names.
    rows = load(table(f"{header},SMILES\n{row.format('RuPhos')},C>>N\n")).rows
    assert (rows[0].smiles, rows[0].fields["ligand"]) == ("C>>N", "RuPhos")


@pytest.mark.parametrize(
    ("scale", "cells", "found", "values"),
    [
        ("auto", ["0", "47.6", "100"], "percent", [0.0, 0.476, 1.0]),
        ("auto", ["0", "0.5", "1"], "fraction", [0.0, 0.5, 1.0]),
        (
            "auto",
            ["1.5", "1"],
            None,
            "t.csv:2: yield is 1.5, but a fraction lies between 0 and 1; give yield_scale",
        ),
        ("auto", ["1.6", "1"], "percent", [0.016, 0.01]),
        ("percent", ["0.5", "1"], "percent", [0.005, 0.01]),
        ("fraction", ["0.5", "47.6"], None, "t.csv:3: yield is 47.6, but a fraction lies between 0 and 1"),
        ("auto", ["50", "100.9"], "percent", [0.5, 1.0]),
        (
            "auto",
            ["50", "101.1"],
            None,
            "t.csv:3: yield is 101.1, but a percent lies between 0 and 100; correct it",
        ),
        ("auto", ["50", "-0.1"], None, "t.csv:3: yield is -0.1, but a percent lies between 0 and 100; correct it"),
        ("auto", ["0.5", "-0.0"], "fraction", [0.5, 0.0]),
        ("auto", ["5e1", "+2."], "percent", [0.5, 0.02]),
    ],
)
def test_scale(table: Callable[..., Path], scale: str, cells: list[str], found: str | None, values: Any) -> None:
    """Percent where the largest is above 1.5 (so 1.6, not 1.5): percent / 100; 1 % too much counts as the top."""
    path = table("\n".join(["rxn,yield", *(f"C{'C' * i}>>N,{cell}" for i, cell in enumerate(cells))]))
    if found is None:
        assert values in refusal(path, yield_scale=scale)
        return
    read_in = load(path, yield_scale=scale)
    assert read_in.facts["scale"] == found
    assert [row.value for row in read_in.rows] == pytest.approx(values, abs=1e-15)
    assert read_in.facts["above_full"] == sum(cell == "100.9" for cell in cells)


def test_percent_taken_for_fractions_would_show(suzuki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant, which takes every table for fractions, is stopped: all yields but those up to 1.01."""
    monkeypatch.setattr("perdure.streams.reactions.table.PERCENT_ABOVE", float("inf"))
    with pytest.raises(DataError) as error:
        read(ReactionsSpec(file=str(suzuki)))
    assert "gz:2: yield is 4.76411, but a fraction lies between 0 and 1; give yield_scale percent" in str(
        error.value
    )
    small = sum(float(row["yield"]) <= 1.01 for row in cells(suzuki))
    assert str(error.value).endswith(f"(and {5760 - small - 10} more)")


def test_few_yields_that_make_all_of_them_percent_are_told(table: Callable[..., Path]) -> None:
    lines = ["rxn,yield", *(f"{'C' * i}>>N,0.5" for i in range(1, 40)), "N>>N,57"]
    (note,) = load(table("\n".join(lines))).facts["notes"]
    assert note.startswith("1 of 40 yields are above 1.5, so that all were read as percent")


def test_rows_that_say_nothing_of_their_task_are_told(table: Callable[..., Path]) -> None:
    text = "rxn,yield,pair,ligand\nC>>N,50,a,\n\nN>>N,20,,\nO>>N,7,,x\n"
    read_in = load(table(text), task_columns=("pair",))
    assert [row.task for row in read_in.rows] == ["a", "None", "None"]
    assert read_in.facts["notes"] == ["2 rows (the first in line 4) with nothing under pair: their task is None"]
    read_in = load(table(text), task_columns=("pair", "ligand"))
    assert [row.task for row in read_in.rows] == ["a + None", "None + None", "None + x"]
    (note,) = read_in.facts["notes"]
    assert note == "1 row (line 4) with nothing under pair, ligand: their task is None + None"


@pytest.mark.parametrize("cell", ["", "n/a", "nan", "inf", "1_0", "47,6", "47 %", "1e999"])
def test_a_yield_that_is_no_number(table: Callable[..., Path], cell: str) -> None:
    message = refusal(table(f"rxn;yield\nC>>N;5\n\nN>>N;{cell}\n"))
    what = f"is {cell!r}, which is not a finite number" if cell else "is empty"
    assert f"t.csv:4: yield {what}; write it like 47.6, or remove the row" in message


def test_the_example_of_a_yield_is_of_its_scale_and_a_prediction_needs_none(table: Callable[..., Path]) -> None:
    path = table("rxn,yield\nC>>N,n.d.\n")
    with pytest.raises(DataError, match=r"write it like 0\.476, or remove the row"):
        load(path, yield_scale="fraction")
    with pytest.raises(DataError, match=r"write it like 47\.6, or leave the cell empty"):
        load(path, labelled=False)


def test_all_mistakes_are_told_together(table: Callable[..., Path]) -> None:
    message = refusal(table("rxn,yield\n" + "C>>N,x\n" * 12 + ",3\nC>N,3\nC >>N,3\n"))
    assert message.count("\n") == 11
    assert message.endswith("(and 5 more)")
    message = refusal(table("rxn,yield\n,3\nC>N,-3\nC>>N |f:0.1|,3\n"))
    assert "t.csv:2: rxn is empty" in message
    assert "t.csv:3: rxn is 'C>N'; write reactants>>product" in message
    assert "t.csv:3: yield is -3" in message
    assert "t.csv:4: rxn holds a space" in message


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv", "t.tsv.gz"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_marks_between_columns(table: Callable[..., Path], name: str, mark: str) -> None:
    lines = [["", "rxn", "Solvent", '"a, b; c"', "Yield"], ["0", "C>>N", "DMF", '"x, y; z"', "40"]]
    rows = load(table("\ufeff" + "\r\n".join(map(mark.join, lines)) + "\r\n" + 4 * mark + "\r\n", name)).rows
    assert [dict(row.fields) for row in rows] == [{"Solvent": "DMF", "a, b; c": "x, y; z"}]
    assert rows[0].value == 0.4


def test_columns_by_other_names(table: Callable[..., Path]) -> None:
    text = "Unnamed: 0,step,solvent,GC yield,isolated yield\n0,C.O>>N,DMF,.4,.3\n1,O.C>>N,,.5,.3\n"
    path = table(text)
    settings = {"smiles_column": "step", "yield_column": "GC yield"}
    read_in = load(path, task_columns=("solvent",), **settings)
    assert [(row.task, row.value, dict(row.fields)) for row in read_in.rows] == [
        ("DMF", 0.4, {"solvent": "DMF"}),
        ("None", 0.5, {"solvent": ""}),
    ]
    # Another yield is no condition: trees would read the answer off it.
    assert read_in.facts["columns"]["left_out"] == ["Unnamed: 0", "isolated yield"]
    assert read_in.facts["duplicates"] == {"rows": 0, "smiles_in_task": 0, "smiles_in_several_tasks": 1}
    assert load(path, **settings).facts["duplicates"] == {
        "rows": 0,
        "smiles_in_task": 1,
        "smiles_in_several_tasks": 0,
    }
    assert {row.task for row in load(path, **settings).rows} == {"all"}
    chosen = load(path, condition_columns=("isolated yield",), **settings)
    assert dict(chosen.rows[0].fields) == {"isolated yield": ".3"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"smiles_column": "rx"},
            "smiles_column is 'rx', but there is no such column. The file has: rxn, yield, s.",
        ),
        ({"yield_column": "Yield"}, "yield_column is 'Yield', but there is no such column. The file has: rxn"),
        ({"key_column": "no"}, "key_column is 'no', but there is no such column"),
        ({"task_columns": ("s", "p")}, "task_columns is 'p', but there is no such column"),
        ({"condition_columns": ("p",)}, "condition_columns is 'p', but there is no such column"),
        ({"task_columns": None}, "which rows are one task? Name the columns in which they agree with task_columns"),
        ({"sheet": "one"}, "sheet='one' was given, but text has no sheets"),
    ],
)
def test_columns_that_are_not_there(table: Callable[..., Path], settings: dict[str, Any], words: str) -> None:
    assert words in refusal(table("rxn,yield,s\nC>>N,5,a\n"), **settings)


def test_nothing_to_find(table: Callable[..., Path]) -> None:
    assert "no column of reaction SMILES was found" in (message := refusal(table("a,yield\nC,5\n")))
    assert message.endswith("Name it with smiles_column (--smiles-column). The file has: a, yield.")
    assert "no column of yields was found" in (message := refusal(table("rxn,b\nC,5\n")))
    assert message.endswith("Name it with yield_column (--yield-column). The file has: rxn, b.")


def test_files_that_cannot_be_read(table: Callable[..., Path], tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.csv").endswith("no.csv: no such file. Check the path.")
    assert "not a table of reactions. The name must end in .csv, " in refusal(table("x", "t.xls"))
    assert "not a table of reactions" in refusal(tmp_path)
    for text in ("", "\n \n", "\ufeff"):
        assert "t.csv: empty. Give a table with a header" in refusal(table(text))
    assert "t.csv: holds no rows under its header" in refusal(table("rxn,yield\n,\n"))
    assert "t.csv:2: the header needs a name of its own for every column; check ['rxn']" in refusal(
        table("\nrxn,rxn\nC,5\n")
    )
    assert "t.csv:3: 1 cell, but the header has 2" in refusal(table("rxn,yield\nC,5\nC\n"))
    assert "t.csv:3: 3 cells, but the header has 2" in refusal(table("rxn,yield\nC,5\nC,4,7\n"))
    assert "t.csv:2: not CSV: " in refusal(table('rxn,yield\n"C"x,5\n'))
    path = table("rxn,yield\n")
    path.write_bytes(b"rxn,yield\nC,5\n\xb5,6\n")
    assert "t.csv:3: not UTF-8 (byte 0xb5)" in refusal(path)
    path = table("rxn,yield\nC,5\n", "t.csv.gz")
    path.write_bytes(path.read_bytes()[:-6])
    assert "not a complete gzip file" in refusal(path)
    path.write_bytes(b"rxn")
    assert "not a complete gzip file" in refusal(path)


def test_lines_are_counted_through_quoted_breaks(table: Callable[..., Path]) -> None:
    assert "t.csv:4: yield is 'x'" in refusal(table('rxn,n,yield\nC,"a\nb",5\nN,c,x\n'))


def test_any_spreadsheet(tmp_path: Path) -> None:
    lines = [[None, None, None], ["rxn", "id", "Yield"], ["C>>N", 7.0, 0.5], [None, None, None], ["N>>N", "b", 1]]
    path = sheet(tmp_path / "t.xlsx", lines, name="runs")
    assert [(row.key, row.value) for row in load(path).rows] == [("7", 0.5), ("b", 1.0)]
    assert load(path, sheet="runs").rows == load(path).rows
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "float.xlsx", "w") as archive:  # as other programs write the number seven
        for name, content in members.items():
            archive.writestr(name, content.replace(b"<v>7</v>", b"<v>7.0</v>"))
    assert load(tmp_path / "float.xlsx").rows == load(path).rows
    assert "no sheet 'x'. It has runs." in refusal(path, sheet="x")
    path = sheet(tmp_path / "u.xlsx", [*lines, ["O>>N", 9, "#N/A"]])
    assert "u.xlsx:6: Yield is '#N/A', which is not a finite number" in refusal(path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "not a spreadsheet that can be read (BadZipFile" in refusal(path)
    assert "empty. Give a table" in refusal(sheet(tmp_path / "v.xlsx", []))


def test_without_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ConfigError, match=r'openpyxl; it is in an extra: pip install "perdure\[chem\]". Or save'):
        load(tmp_path / "t.xlsx")


def test_keys_do_not_depend_on_the_order(table: Callable[..., Path]) -> None:
    lines = ["C>>N,5,a", "N>>N,6,a", "C>>N,5,a", "C>>N,7,a"]
    once = load(table("\n".join(["rxn,yield,s", *lines]))).rows
    back = load(table("\n".join(["rxn,yield,s", *lines[::-1]]))).rows
    assert len({row.key for row in once}) == 4
    assert {(row.key, row.smiles, row.value) for row in once} == {(row.key, row.smiles, row.value) for row in back}
    assert once[2].key == f"{once[0].key}-2"  # equal throughout


def test_a_column_that_does_not_name_rows(table: Callable[..., Path]) -> None:
    path = table("id,rxn,yield\n1,C>>N,5\n1,N>>N,6\n,O>>N,6\n4~1,P>>N,6\n")
    read_in = load(path)
    assert read_in.facts["columns"]["key"] is None
    assert (read_in.facts["columns"]["left_out"], dict(read_in.rows[0].fields)) == (["id"], {})
    assert read_in.facts["notes"] == ["id does not name every row apart; a hash of the row does instead"]
    message = refusal(path, key_column="id")
    assert "t.csv:3: id is '1', as in line 2; every row needs a name of its own" in message
    assert "t.csv:4: id is empty; every row" in message
    assert "t.csv:5: id is '4~1', but ~1 marks an augmented copy; every row" in message


def test_task_names_of_two_columns_are_never_mixed_up(table: Callable[..., Path]) -> None:
    text = "rxn,yield,p,q\nC,5,a + b,c\nN,5,a,b + c\nO,5,a,b\nS,5,a +,b\nP,5,a,+ b\n"
    tasks = load(table(text), task_columns=("p", "q")).facts["tasks"]
    assert len(tasks) == 5
    assert "a + b" in tasks


def test_rows_without_yields(table: Callable[..., Path]) -> None:
    path = table("rxn,s\nC>>N,a\n")
    read_in = load(path, labelled=False, task_columns=("p",), yield_column="y")
    assert [(row.value, row.task) for row in read_in.rows] == [(None, "all")]
    assert (read_in.facts["scale"], read_in.facts["unlabelled"], read_in.facts["yield"]) == (None, 1, None)
    path = table("rxn,yield,s\nC>>N,,a\nN>>N,40,a\n")
    assert [row.value for row in load(path, labelled=False).rows] == [None, 0.4]
    with pytest.raises(DataError, match="yield is 'x'"):
        load(table("rxn,yield\nC>>N,x\n"), labelled=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"holdout": 1.0},
        {"holdout": -0.1},
        {"holdout": float("nan")},
        {"augment": -1},
        {"order": "backwards"},
        {"yield_scale": "per mille"},
        {"task_columns": ["a", "a"]},
        {"smiles_column": "a", "yield_column": "a"},
        {"yield_column": "a", "condition_columns": ["a"]},
        {"colour": "red"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReactionsSpec(file="t.csv", **settings)
