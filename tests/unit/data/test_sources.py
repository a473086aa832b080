"""Finding a facility's files, and refusing what cannot be trained on with a message that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data import sources, stdlib_corpus
from flwr_hpc.data.sources import check, resolve
from flwr_hpc.data.stdlib_corpus import NotVisibleError
from flwr_hpc.errors import UserError

TWO = ["a", "b"]


def config(kind: str, *paths: Path | str, **more: object) -> DataConfig:
    return DataConfig(kind=kind, paths={"a": [str(p) for p in paths]}, **more)  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(data: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        check(data, "a", TWO)
    return str(caught.value)


def test_imports_nothing_heavy() -> None:
    """The preflight runs on the login node, which has no torch."""
    code = (
        "import sys, flwr_hpc.data.sources;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy')"
        " if m in sys.modules])"
    )
    root = Path(sources.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "[]"


# --- standard library -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_deal_is_complete_and_disjoint(count: int) -> None:
    """Each package goes to exactly one facility and none goes without."""
    sizes = {name: len(name) * 100 for name in stdlib_corpus.packages()}
    shares = stdlib_corpus.deal(sizes, count)
    assert len(shares) == count
    assert all(shares)
    assert sorted(name for share in shares for name in share) == sorted(sizes)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_deal_is_balanced(count: int) -> None:
    """No facility gets much more text than another."""
    sizes = {
        name: sum(f.stat().st_size for f in files)
        for name, files in stdlib_corpus.packages().items()
    }
    shares = [sum(sizes[name] for name in share) for share in stdlib_corpus.deal(sizes, count)]
    assert max(shares) < 1.3 * min(shares)


def test_deal_separates_kinds_of_code() -> None:
    """The split is non-IID by construction: tables and prose here, network code there."""
    first, second = stdlib_corpus.deal(
        dict.fromkeys(["asyncio", "encodings", "email", "pydoc_data", "newcomer", "idlelib"], 9), 2
    )
    assert first == ["encodings", "pydoc_data", "idlelib"]
    assert second == ["newcomer", "email", "asyncio"]


def test_deal_works_without_the_optional_packages() -> None:
    """Distributions that lack idlelib, tkinter or lib2to3 still get two good shares."""
    names = ["asyncio", "email", "json", "os"]
    assert all(stdlib_corpus.deal(dict.fromkeys(names, 10), 2))


def test_deal_refuses_more_facilities_than_packages() -> None:
    """An empty share would fail much later."""
    with pytest.raises(UserError, match="1 packages cannot be dealt out among 2"):
        stdlib_corpus.deal({"os": 1}, 2)


def test_packages_leave_out_tests_and_installed_packages(tmp_path: Path) -> None:
    """Only the library's own source counts, wherever the distribution puts the rest."""
    for name in (
        "os.py",
        "json/decoder.py",
        "json/__pycache__/x.py",
        "unittest/test/x.py",
        "test/test_os.py",
        "site-packages/torch/x.py",
        "dist-packages/x.py",
        "config-3.11/x.py",
    ):
        write(tmp_path / name, "x = 1\n")
    write(tmp_path / "blank.py", "")
    assert list(stdlib_corpus.packages(tmp_path)) == ["json", "os"]


def test_a_python_without_source_is_told() -> None:
    """A zipped standard library leads to the other kinds of data."""
    with pytest.raises(UserError, match=r"holds no Python source files.*data=text"):
        stdlib_corpus.packages(Path(__file__).parent / "no-such-folder")


def test_stdlib_by_default_is_dealt_out_whatever_the_order() -> None:
    """Every site computes the same split from the same names."""
    one, two = resolve(DataConfig(), "a", TWO), resolve(DataConfig(), "b", TWO)
    assert one == resolve(DataConfig(), "a", ["b", "a"])
    assert not set(one.files) & set(two.files)


def test_stdlib_packages_by_name() -> None:
    """Chosen packages are taken out of the others' shares."""
    data = DataConfig(paths={"a": ["asyncio", "email"]})
    mine = resolve(data, "a", TWO)
    assert {p.parent.name for p in mine.files} <= {"asyncio", "email", "mime"}
    assert not set(mine.files) & set(resolve(data, "b", TWO).files)


def test_stdlib_unknown_package_gets_a_hint() -> None:
    """A misspelt package is named with its nearest neighbour."""
    message = fault(DataConfig(paths={"a": ["asynco"]}))
    assert "data.paths.a: 'asynco' is no package" in message
    assert "Did you mean 'asyncio'?" in message


# --- held out -------------------------------------------------------------------------------


def test_held_out_documents_make_the_fraction() -> None:
    """About the asked share of bytes is held out, by whole documents, on no other side."""
    found = resolve(DataConfig(held_out_fraction=0.1), "a", TWO)
    sizes = [sum(p.stat().st_size for p in part) for part in (found.train, found.held_out)]
    assert found.split == "files"
    assert not set(found.train) & set(found.held_out)
    assert 0.08 <= sizes[1] / sum(sizes) <= 0.1


def test_held_out_choice_depends_on_names_alone(tmp_path: Path) -> None:
    """The same documents in another folder are divided the same way."""
    chosen = []
    for root in (tmp_path / "x", tmp_path / "elsewhere" / "y"):
        for i in range(40):
            write(root / f"{i}.txt", f"document {i}\n" * 10)
        chosen.append({p.name for p in resolve(config("text", root), "a", TWO).held_out})
    assert chosen[0] == chosen[1]
    assert chosen[0]


def test_few_large_documents_are_split_at_their_tails(tmp_path: Path) -> None:
    """A single file is both trained on and held out from."""
    path = write(tmp_path / "book.txt", "word " * 1000)
    found = resolve(config("text", path), "a", TWO)
    assert (found.split, found.train, found.held_out) == ("tail", (path,), ())


def test_named_held_out_files_leave_the_training_files(tmp_path: Path) -> None:
    """A pattern that catches the validation file too does not train on it."""
    for name in ("one", "two", "valid"):
        write(tmp_path / f"{name}.jsonl", '{"text": "x"}\n')
    data = config("jsonl", tmp_path, held_out_paths={"a": [str(tmp_path / "valid.jsonl")]})
    found = resolve(data, "a", TWO)
    assert [p.name for p in found.train] == ["one.jsonl", "two.jsonl"]
    assert [p.name for p in found.held_out] == ["valid.jsonl"]


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    """Holding out everything is a mistake, told as one."""
    path = write(tmp_path / "x.txt", "x")
    assert "nothing is left" in fault(config("text", path, held_out_paths={"a": [str(path)]}))


# --- paths ----------------------------------------------------------------------------------


def test_globs_folders_and_home_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three ways to name files give the same files, each once, sorted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("deep/b.txt", "a.txt", "c.md"):
        write(tmp_path / "d" / name, "text\n")
    wanted = (tmp_path / "d" / "a.txt", tmp_path / "d" / "deep" / "b.txt")
    patterns = (tmp_path / "d", "~/d", tmp_path / "d" / "**" / "*.txt")
    for pattern in patterns:
        assert sources._find(config("text", pattern), "a", TWO, "paths") == wanted
    assert sources._find(config("text", *patterns), "a", TWO, "paths") == wanted


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    """A file whose name looks like a pattern can be named."""
    path = write(tmp_path / "part[1] of 2.txt", "text " * 50)
    assert resolve(config("text", path), "a", TWO).train == (path,)


def test_missing_is_not_visible() -> None:
    """The driver must tell 'not on this machine' from 'wrong', for remote facilities."""
    with pytest.raises(NotVisibleError, match=r"data.paths.a: '/no/such/\*.txt' matches no file"):
        check(config("text", "/no/such/*.txt"), "a", TWO)
    check(config("text", "/no/such/*.txt"), "a", TWO, must_exist=False)
    check(DataConfig(paths={"a": ["asynco"]}), "a", TWO, must_exist=False)


def test_no_paths_at_all() -> None:
    """The message holds the corrected command."""
    message = fault(DataConfig(kind="text"))
    assert "'data.paths.a=[/path/to/files/*]'" in message


def test_folder_without_data(tmp_path: Path) -> None:
    """The suffixes looked for are named."""
    write(tmp_path / "x.md", "text")
    assert "holds no *.txt file" in fault(config("text", tmp_path))


def test_empty_file(tmp_path: Path) -> None:
    """An empty file is a mistake upstream."""
    path = write(tmp_path / "x.txt", "")
    assert fault(config("text", path)) == f"facility a: {path} is empty"


def test_blank_file(tmp_path: Path) -> None:
    """So is one of blank lines."""
    assert "nothing but white space" in fault(config("text", write(tmp_path / "x.txt", "\n \n")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    """Permissions are told as such."""
    path = write(tmp_path / "x.txt", "text")
    path.chmod(0)
    assert f"facility a: {path} cannot be read: Permission denied" in fault(config("text", path))


def test_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is told as such."""

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    path = write(tmp_path / "x.txt", "text")
    monkeypatch.setattr(Path, "open", broken)
    assert fault(config("text", path)) == f"facility a: {path} cannot be read: Input/output error"


# --- malformed ------------------------------------------------------------------------------


def test_text_must_be_utf8(tmp_path: Path) -> None:
    """The line and byte are named."""
    path = write(tmp_path / "x.txt", b"one\ntwo\ncaf\xe9\n")
    assert f"facility a: {path}, line 3: not UTF-8 (byte 0xe9 at column 4)" in fault(
        config("text", path)
    )


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "not valid JSON"),
        ('["x"]', "a record must be an object like {...}, found a list"),
        (
            '{"txt": "x"}',
            "needs 'text', or 'prompt' and 'completion', or 'messages'; found 'txt'. Did you mean",
        ),
        ("{}", "found nothing"),
        ('{"text": 3}', "'text' must be a string, found a number"),
        ('{"text": null}', "found nothing"),
        ('{"prompt": "x"}', "'completion' is missing beside the other one"),
        ('{"prompt": "x", "completion": ["y"]}', "'completion' must be a string, found a list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "x", "id": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"text": "x\\ud800y"}', "half of a surrogate pair"),
        ('{"text": "x", "y": ["\\uDFFF"]}', "half of a surrogate pair"),
    ],
)
def test_jsonl_faults(tmp_path: Path, line: str, message: str) -> None:
    """Each kind of fault names facility, file and line."""
    path = write(tmp_path / "x.jsonl", f"{GOOD}\n{line}\n{GOOD}")
    found = fault(config("jsonl", path))
    assert found.startswith(f"facility a: {path}, line 3: ")
    assert message in found


def test_escaped_characters_beyond_16_bits_are_text(tmp_path: Path) -> None:
    """A whole surrogate pair is how JSON escapes them."""
    check(config("jsonl", write(tmp_path / "x.jsonl", r'{"text": "\ud83d\ude00"}')), "a", TWO)


def test_jsonl_column_names_are_settable(tmp_path: Path) -> None:
    """Records with other column names pass once these are configured."""
    path = write(tmp_path / "x.jsonl", json.dumps({"q": "?", "a": "!"}) + "\n")
    check(config("jsonl", path, prompt_key="q", completion_key="a"), "a", TWO)


def test_check_reads_a_bounded_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files do not hold up the start; what lies behind is the job's to find."""
    monkeypatch.setattr(sources, "CHECKED_BYTES", 2**16)
    path = write(tmp_path / "x.jsonl", GOOD * 2**13 + "broken\n")
    data = config("jsonl", path)
    check(data, "a", TWO)
    with pytest.raises(UserError, match="line 8193: not valid JSON"):
        sources.scan(data, "a", path)


def test_parquet_faults(tmp_path: Path) -> None:
    """Not parquet, cut short, wrong column, wrong type, no rows: each in its words."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    write(path, "text")
    assert "is not a parquet file" in fault(config("parquet", path))
    pq.write_table(pa.table({"text": ["x"]}), path)
    write(path, path.read_bytes()[:-2])
    assert "is not a parquet file (or was cut short)" in fault(config("parquet", path))
    write(path, b"PAR1 nonsense PAR1")
    assert "is not a parquet file" in fault(config("parquet", path))
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), path)
    assert "found 'content', 'id'" in fault(config("parquet", path))
    pq.write_table(pa.table({"text": [1]}), path)
    assert "column 'text' must hold strings, found int64" in fault(config("parquet", path))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "is empty: no rows" in fault(config("parquet", path))
    pq.write_table(pa.table({"text": ["x"]}), path)
    check(config("parquet", path), "a", TWO)
