"""The text of the studies: what comes out of the packages' formats, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sqlite3
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "studies"))

import corpora
import corpora_packages
import corpora_text as text


def test_tidy_removes_what_is_not_text():
    assert text.tidy("\n\na \t\r\n\x02b\u00a0c\n\n\n\nd") == "a\nb c\n\nd\n"


def test_files_are_joined_in_the_order_of_their_names():
    assert text.plain({"b": b"two", "a": b"one"}) == "one\n\ntwo"


def test_wrapped_lines_are_joined_and_paragraphs_are_not():
    assert text.wrapped({"a": b"one\n two\n\n\nthree\nfour"}) == "one two\n\nthree four"


def test_plays_lose_their_marks_and_keep_their_verse():
    play = b"# Play\n\n## ACT I\n\n_Enter A_\n\n**A**  \nTo be,  \n\\--or not __\\[Sings]_  "
    expected = "Play\n\nACT I\n\nEnter A\n\nA\nTo be,\n--or not [Sings]\n"
    assert text.tidy(text.markdown_plays({"p": play})) == expected


def r_vector(strings: list[str | None], version: int) -> bytes:
    """A character vector as R's serialize() writes it."""
    head = b"X\n" + struct.pack(">iii", version, 0x40201, 0x20300)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    out = head + struct.pack(">ii", 16, len(strings))
    for string in strings:
        data = (string or "").encode()
        out += struct.pack(">ii", 0x40009, -1 if string is None else len(data)) + data
    return out


@pytest.mark.parametrize("version", [2, 3])
def test_r_strings_of_both_formats(version):
    strings = ["EMMA", "", "naïve", None]
    assert text.r_strings(r_vector(strings, version)) == ["EMMA", "", "naïve", ""]


def test_other_r_objects_are_refused():
    numbers = b"X\n" + struct.pack(">iiiii", 2, 0x40201, 0x20300, 13, 0)
    with pytest.raises(ValueError, match="not an R character vector"):
        text.r_strings(numbers)
    with pytest.raises(ValueError, match="not an R object"):
        text.r_strings(b"A\n1\n")


def test_every_chunk_of_an_r_database_is_a_novel():
    chunks = b""
    for lines in (["ONE", "", "It was", "_late_."], ["TWO"]):
        data = r_vector(list(lines), 3)
        chunks += struct.pack(">I", len(data)) + zlib.compress(data)
    assert text.r_novels({"Rdata.rdb": chunks}) == "ONE\n\nIt was late.\n\nTWO"


def test_verse_numbers_go_and_chapters_are_apart(tmp_path):
    path = tmp_path / "b.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE Bible(TestamentID, BookID, ChapterID, VerseID, Passage1)")
    rows = [
        (1, 1, 2, 1, "2:1 Third."),
        (1, 1, 1, 2, "1:2 Second, 1:3 with one behind it."),
        (1, 1, 1, 1, "1:1 First."),
    ]
    connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    expected = "First.\nSecond,\nwith one behind it.\n\nThird."
    assert text.sqlite_bible({"x/DATA/Bible.db": path.read_bytes()}) == expected


OSIS = (
    '<chapter sID="a"/><div type="x-p" sID="1"/>In <w lemma="H1">the</w> beginning, '
    "God<note><reference>1:1</reference>Elohim</note><w>made</w> this<note>b</note>, &amp;"
    ' <div type="x-milestone" subType="x-preverse"/>that.<div eID="1" type="x-p"/> '
    '<div type="x-p"/>“Yes<note>c</note>”<chapter eID="a"/>'
    '<chapter sID="b"/><l>Sing,</l>  <l>all.</l>'
)
OSIS_TEXT = "In the beginning, God made this, & that.\n“Yes”\n\nSing,\nall."


def test_osis_notes_leave_a_space_and_milestones_no_break():
    assert text.osis_text(OSIS).strip() == OSIS_TEXT


def test_sword_blocks_are_found_by_their_index():
    files = {}
    for testament, books in (("nt", ["three"]), ("ot", ["one", OSIS])):
        index, blocks = b"", b""
        for book in books:
            data = zlib.compress(book.encode())
            index += struct.pack("<3I", len(blocks), len(data), len(book.encode()))
            blocks += data
        files |= {f"m/{testament}.bzs": index, f"m/{testament}.bzz": blocks}
    assert text.tidy(text.sword_bible(files)) == f"one\n\n{OSIS_TEXT}\n\nthree\n"


@pytest.mark.parametrize(
    ("tagged", "printed"),
    [
        ("``/`` No/at evidence/nn ''/'' ,/, he/pps said/vbd ./.", '"No evidence", he said.'),
        ("Ivan/np Allen/np Jr./np ./.", "Ivan Allen Jr."),
        ("more/ap '/' pro/in '/' letters/nns", "more 'pro' letters"),
        ("Why/wrb ?/. ?/. (/( Ask/vb )/) --/-- so/rb ;/. ;/.", "Why? (Ask) -- so;"),
        ("and/or/cc 1/2/cd", "and/or 1/2"),
    ],
)
def test_tagged_words_are_printed_as_usual(tagged, printed):
    assert text.untagged(tagged) == printed


def test_paragraphs_of_a_tagged_text_are_its_lines():
    files = {"cb01": b"C/x", "ca01": b"\n\tA/x\n\n\n\tB/x\nb/x ./.\n"}
    assert text.tagged_corpus(files) == "A\nB b.\n\nC"


def test_fields_keep_their_names_and_meta_is_left_out():
    country = {
        "Geography": {
            "Area": {"total": {"text": "2  sq km"}, "text": "small"},
            "Climate": {"text": "mild <b>&amp;</b> wet ++ dry"},
        }
    }
    files = {
        "package/africa/ag.json": json.dumps(country).encode(),
        "package/meta/codes.json": b"[]",
        "package/world/xx.json": b'{"Map": {"text": "World"}}',
    }
    assert text.factbook(files) == (
        "total: 2 sq km\nArea: small\nClimate: mild & wet\ndry\n\nMap: World"
    )


def test_split_cuts_at_a_line_end_and_loses_nothing():
    data = b"".join(b"line %06d\n" % i for i in range(200_000))
    train, valid = corpora.split(data)
    assert train + valid == data and train.endswith(b"\n")
    assert len(data) // 50 <= len(valid) < len(data) // 50 + 12
    train, valid = corpora.split(data[:120_000])
    assert 20_000 <= len(valid) < 20_012 and train + valid == data[:120_000]


LINES = "".join(f"line {i}\n" for i in range(5_000))


def digests(lines: str) -> dict[str, str]:
    parts = corpora.split(text.tidy(lines).encode())
    return {
        part: hashlib.sha256(data).hexdigest()
        for part, data in zip(("train", "valid"), parts, strict=True)
    }


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Two sources whose archives lie in the folder for packages, so that no tool is asked."""
    wheel = corpora.Source(
        package=corpora.Package("pip", "one", "1.0"),
        members="one/*.txt",
        clean=text.plain,
        licence="made here",
        **digests(LINES),
    )
    packed = dataclasses.replace(
        wheel, package=corpora.Package("npm", "@a/two", "2.0"), members="package/?.txt"
    )
    monkeypatch.setattr(corpora, "SOURCES", {"one": wheel, "two": packed})
    packages = tmp_path / "packages"
    (packages / "pip-one==1.0").mkdir(parents=True)
    with zipfile.ZipFile(packages / "pip-one==1.0" / "one-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("one/a.txt", LINES)
        archive.writestr("other.txt", "not this")
    (packages / "npm-@a+two@2.0").mkdir()
    with tarfile.open(packages / "npm-@a+two@2.0" / "a-two-2.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/b.txt")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES.encode()))
    return tmp_path


def test_both_parts_and_the_record_are_written(sources, capsys):
    assert corpora.main(["--out", str(sources)]) == 0
    record = json.loads((sources / "corpora.json").read_text())
    assert list(record) == ["one", "two"]
    assert record["two"]["package"] == {"tool": "npm", "name": "@a/two", "version": "2.0"}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]
    for entry in record.values():
        parts = [(sources / entry[part]["file"]).read_bytes() for part in ("train", "valid")]
        assert b"".join(parts).decode() == LINES
        assert [entry[part]["bytes"] for part in ("train", "valid")] == list(map(len, parts))
    assert not list(sources.rglob("*.partial"))


def test_only_selects_and_the_record_keeps_what_is_there(sources):
    assert corpora.main(["--out", str(sources), "--only", "two"]) == 0
    assert not (sources / "train" / "one.txt").exists()
    assert corpora.main(["--out", str(sources), "--only", "one"]) == 0
    assert list(json.loads((sources / "corpora.json").read_text())) == ["one", "two"]
    with pytest.raises(SystemExit) as error:
        corpora.main(["--out", str(sources), "--only", "three"])
    assert error.value.code == 2


def test_what_is_there_is_not_fetched_again_and_what_is_damaged_is(sources, monkeypatch, capsys):
    assert corpora.main(["--out", str(sources)]) == 0

    def unreachable(*_):
        raise AssertionError("fetched again")

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "archive_of", unreachable)
        assert corpora.main(["--out", str(sources)]) == 0
        assert capsys.readouterr().out.count("there already") == 2
    path = sources / "train" / "one.txt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert corpora.main(["--out", str(sources)]) == 0
    assert path.read_bytes() == whole


def test_another_text_is_refused_by_name_and_the_rest_is_made(sources, monkeypatch, capsys):
    expected = digests(LINES.replace("line 7\n", "line 8\n"))
    other = dataclasses.replace(corpora.SOURCES["one"], **expected)
    monkeypatch.setitem(corpora.SOURCES, "one", other)
    assert corpora.main(["--out", str(sources)]) == 1
    said = capsys.readouterr().err
    assert "train/one.txt has the SHA-256" in said and expected["train"] in said
    assert not (sources / "train" / "one.txt").exists()
    assert not (sources / "valid" / "one.txt").exists()
    assert list(json.loads((sources / "corpora.json").read_text())) == ["two"]


def test_a_broken_archive_is_named(sources, capsys):
    archive = sources / "packages" / "npm-@a+two@2.0" / "a-two-2.0.tgz"
    archive.write_bytes(archive.read_bytes()[:100])
    assert corpora.main(["--out", str(sources), "--only", "two"]) == 1
    assert f"{archive} cannot be read as @a/two 2.0" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["npm", "apt-get", "pip"])
def test_a_missing_tool_is_named_with_its_remedy(monkeypatch, tmp_path, tool):
    monkeypatch.setattr(corpora_packages.shutil, "which", lambda _: None)
    monkeypatch.setattr(corpora_packages.importlib.util, "find_spec", lambda _: None)
    package = corpora.Package(tool, "thing", "1")
    with pytest.raises(corpora.CorpusError, match=f"There is no {tool} here.*Install {tool}"):
        corpora_packages.archive_of(package, tmp_path / "packages")
    assert not (tmp_path / "packages").exists()


def test_a_failing_download_says_why_and_leaves_nothing(monkeypatch, tmp_path):
    script = "import sys; open('half', 'w').close(); sys.exit('no such thing')"
    monkeypatch.setattr(corpora_packages, "command", lambda _: [sys.executable, "-c", script])
    package = corpora.Package("npm", "thing", "1")
    with pytest.raises(corpora.CorpusError, match="did not download thing@1: no such thing"):
        corpora_packages.archive_of(package, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())
    monkeypatch.setattr(
        corpora_packages, "command", lambda _: [sys.executable, "-c", script.split(" sys.exit")[0]]
    )
    assert corpora_packages.archive_of(package, tmp_path / "packages").name == "half"


def test_every_source_has_two_digests_and_a_licence():
    for source in corpora.SOURCES.values():
        assert source.licence
        assert all(len(bytes.fromhex(getattr(source, p))) == 32 for p in ("train", "valid"))
