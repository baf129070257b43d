from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from perdure.errors import DataError
from perdure.streams import Limits, read_rows
from perdure.streams.sources import is_hub_name

ROWS = [{"id": "a", "prompt": "2+2=", "answer": "4"}, {"id": "b", "prompt": "Größe?", "answer": "zwei\nZeilen"}]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CSV = 'id,prompt,answer\na,2+2=,4\nb,Größe?,"zwei\nZeilen"\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.jsonl", jsonl(ROWS)), ("d.jsonl.gz", jsonl(ROWS)), ("d.csv", CSV), ("d.csv.gz", CSV), ("D.CSV", CSV)],
)
def test_a_text_file_gives_its_rows_with_their_lines(tmp_path, name, content):
    rows = read_rows(write(tmp_path / name, content))
    assert [row.values for row in rows] == ROWS
    assert [row.place.rsplit(":", 1)[1] for row in rows] == (["1", "2"] if "json" in name else ["2", "3"])
    assert list(rows.origins) == [str(tmp_path / name)]


def test_the_origin_is_the_sha256_of_the_file(tmp_path):
    """`printf '{"a":1}\\n' | sha256sum`."""
    rows = read_rows(write(tmp_path / "d.jsonl", '{"a":1}\n'))
    assert list(rows.origins.values()) == ["e346432021b04179518d9614f3560ccd71354a4ee101ddcb893d6959a9d6301c"]


def test_byte_order_mark_blank_lines_and_crlf_are_accepted(tmp_path):
    rows = read_rows(write(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n  \n{"a": "y"}'))
    assert [(row.values["a"], row.line) for row in rows] == [("x", 1), ("y", 4)]
    assert read_rows(write(tmp_path / "d.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n"))[0].values == {"a": "1", "b": "2"}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    rows = read_rows(tmp_path / "d.parquet")
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == [1, 2]
    with pytest.raises(DataError, match="not a readable parquet"):
        read_rows(write(tmp_path / "bad.parquet", "PAR1 not really"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', r"d\.jsonl:2: not JSON: .* at column"),
        ("d.jsonl", "[1, 2]\n", r"d\.jsonl:1: a list, but every line must be an object"),
        ("d.jsonl", "null\n", r"d\.jsonl:1: null, but"),
        ("d.jsonl", '{"a": NaN}\n', r"d\.jsonl:1: .*NaN is not a JSON value"),
        ("d.jsonl", '{"a": -1e999}\n', r"d\.jsonl:1: .*too large"),
        ("d.jsonl", '{"a": "\\ud800"}\n', r"d\.jsonl:1: .*surrogate"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"d\.jsonl:2: not UTF-8 \(byte 0xff at column 8\)"),
        ("d.jsonl", "[" * 200_000 + "\n", r"d\.jsonl:1: not JSON that can be used"),
        ("d.jsonl", "", "holds no rows"),
        ("d.jsonl", "\n\n", "holds no rows"),
        ("d.csv", "a,b\n", "holds no rows"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", r"d\.csv:3: 3 fields, but the header has 2"),
        ("d.csv", "a,a\n1,2\n", r"d\.csv:1: the header needs a name of its own .*'a'"),
        ("d.csv", 'a,b\n1,"2\n', r"d\.csv:2: not CSV"),
        ("d.txt", "hello", r"must end in \.jsonl"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content))


def test_a_damaged_gzip_file_is_said_to_be_one(tmp_path):
    whole = gzip.compress(jsonl(ROWS * 100).encode())
    for data in (b"not gzip", whole[: len(whole) // 2]):
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a complete gzip file"):
            read_rows(path)


def test_malformed_lines_are_reported_together_up_to_ten(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"a": 1}\n' + "oops\n" * 12)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert [f"d.jsonl:{line}: " in message for line in (2, 11, 12)] == [True, True, False]
    assert "the first 10" in message


def test_a_line_over_the_limit_is_refused_without_reading_it_whole(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"a": 1}\n' + "x" * 5000)
    with pytest.raises(DataError, match=r"d\.jsonl:2: longer than 1000 bytes"):
        read_rows(path, limits=Limits(line_bytes=1000))


def test_a_long_csv_field_is_read_and_the_modules_limit_is_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    assert len(read_rows(write(tmp_path / "d.csv", "a\n" + "x" * 200_000 + "\n"))[0].values["a"]) == 200_000
    assert csv.field_size_limit() == before


def test_save_to_disk_folders_and_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert [row.values for row in read_rows(tmp_path / "one")] == ROWS
    assert len(read_rows(tmp_path / "two")) == 2
    assert len(read_rows(tmp_path / "two", prefer=("test",))) == 1
    test = read_rows(tmp_path / "two", split="test")
    assert test[0].place == f"{tmp_path / 'two'}[test]:1"
    assert len(next(iter(test.origins.values()))) == 16
    with pytest.raises(DataError, match=r"no split 'dev'.*train, test"):
        read_rows(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match="without splits"):
        read_rows(tmp_path / "one", split="dev")


def test_a_folder_of_data_files_as_a_hub_checkout_has_them(tmp_path):
    folder, cache = tmp_path / "tiny", tmp_path / "cache"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "train.jsonl", jsonl(ROWS))
    write(folder / "data" / "test.jsonl", jsonl(ROWS[:1]))
    assert [row.values for row in read_rows(folder, cache_dir=cache)] == ROWS
    assert len(read_rows(folder, split="test", cache_dir=cache)) == 1


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither a folder written by save_to_disk"):
        read_rows(tmp_path)


def test_a_malformed_file_in_a_folder_is_an_error_in_words(tmp_path):
    write(tmp_path / "train.jsonl", '{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON"):
        read_rows(tmp_path, cache_dir=tmp_path / "cache")


def test_a_folder_with_configurations(tmp_path):
    names = ("one", "two")
    card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
    write(tmp_path / "README.md", f"---\nconfigs:\n{card}---\n")
    for name in names:
        write(tmp_path / f"{name}.jsonl", jsonl([{"name": name}]))
    assert read_rows(tmp_path, config="two", cache_dir=tmp_path / "cache")[0].values == {"name": "two"}
    with pytest.raises(DataError, match=r"Config name is missing.*one.*two"):
        read_rows(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("owner/name", True),
        ("owner/name:config", True),
        ("hotpotqa/hotpot_qa:distractor", True),
        ("owner/name.jsonl", False),
        ("owner/name.csv.gz", False),
        ("./owner/name", False),
        ("a/b/c", False),
        ("name", False),
        ("/owner/name", False),
        ("../name", False),
    ],
)
def test_what_looks_like_a_file_is_never_looked_up_on_the_hub(name, hub):
    assert is_hub_name(name) is hub


def test_an_unreachable_hub_is_said_fast_and_in_words(monkeypatch, tmp_path):
    """Under 5 s where `load_dataset` alone retries for 23 s."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    def refuse(self, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"nobody/nothing: not a local path.*cannot be reached.*--data"):
        read_rows("nobody/nothing", cache_dir=tmp_path)
    assert time.perf_counter() - start < 5
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_data_set_downloaded_before_loads_without_a_network(monkeypatch, tmp_path):
    """In the cache of `datasets`, owner/name lies in `owner___name`; here it is put there from a folder."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(self, *args, **kwargs):
        raise OSError("no route to host")

    (tmp_path / "name").mkdir()
    write(tmp_path / "name" / "train.jsonl", jsonl(ROWS))
    read_rows(tmp_path / "name", cache_dir=tmp_path / "cache")
    (tmp_path / "cache" / "name").rename(tmp_path / "cache" / "owner___name")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    rows = read_rows("owner/name", cache_dir=tmp_path / "cache")
    assert [row.values for row in rows] == ROWS


def test_a_local_path_wins_over_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="unknown kind of data file"):
        read_rows("owner/name")
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows("owner/missing.jsonl")


def test_the_shared_files_read_whole(shared):
    assert len(read_rows(shared / "data" / "math_test.jsonl.gz")) == 5000
    assert len(read_rows(shared / "data" / "suzuki_miyaura.csv.gz")) == 5760


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "d.parquet"])
def test_a_file_over_the_limit_is_refused(tmp_path, name):
    """What is compressed counts as long as it is when unpacked."""
    rows = [{"a": "x" * 900} for _ in range(200)]
    if name == "d.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.Table.from_pylist([{"a": "x" * 900 + str(i)} for i in range(200)]),
            tmp_path / name,
            compression="gzip",
        )
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=rf"{name}: more than 50,000 bytes of rows"):
        read_rows(tmp_path / name, limits=Limits(file_bytes=50_000))
    assert len(read_rows(tmp_path / name)) >= 199
