"""Which prompt belongs to which picture: never another one, and never silently."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.rewards.picture_folders import find_pictures
from dgpo_plugin.rewards.picture_prompts import prompts_of, read_rows
from tests.dgpo_plugin.rewards.test_picture_folders import geneval, picture

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """0.png to 11.png."""
    for number in range(12):
        picture(tmp_path / "out" / f"{number}.png", number)
    return tmp_path / "out"


def paired(folder: Path, prompts: Path) -> list[str]:
    return [prompt.text for prompt in prompts_of(find_pictures([folder]), None, str(prompts))[0]]


TEXTS = [f"prompt {number}" for number in range(12)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n".join(TEXTS)),
        ("p.jsonl", "\n".join(json.dumps({"prompt": text, "tag": "x"}) for text in TEXTS)),
        ("p.json", json.dumps([{"caption": text} for text in TEXTS])),
        ("p.csv", "prompt\n" + "\n".join(TEXTS)),
        ("p.csv", "id,Prompt\r\n" + "".join(f"7,{text}\r\n" for text in TEXTS)),
        ("p.tsv", "text\ttag\n" + "\n".join(f"{text}\tx" for text in TEXTS)),
    ],
)
def test_prompts_in_the_pictures_order(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert paired(folder, tmp_path / name) == TEXTS


FILES = [f"{number}.png" for number in (3, 10, 0, 1, 2, 11, 9, 8, 7, 6, 5, 4)]
SHUFFLED = [f"prompt {name.removesuffix('.png')}" for name in FILES]


def joined(separator: str, header: tuple[str, str], files: list[str], quote: str = "") -> str:
    rows = zip(files, SHUFFLED, strict=True)
    return "\n".join([separator.join(header), *(f"{file}{separator}{quote}{text}{quote}" for file, text in rows)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", joined(",", ("file", "prompt"), FILES)),
        ("p.csv", "\ufeff" + joined(",", ("file", "prompt"), FILES, quote='"')),
        ("p.csv", joined(";", ("File_Name", "Text"), FILES)),
        ("p.csv", joined("\t", ("filename", "caption"), FILES)),
        ("p.tsv", joined("\t", ("image", "prompt"), FILES)),
        ("p.csv", joined(",", ("image_path", "prompt"), [f"/home/jane/out/{file}" for file in FILES])),
        ("p.csv", joined(",", ("path", "prompt"), [f"C:\\out\\{file}" for file in FILES])),
        ("p.csv", joined(",", ("file", "prompt"), [f"./{file}" for file in FILES])),
        ("p.csv", joined(",", ("file", "prompt"), [file.removesuffix(".png") for file in FILES])),
        ("p.csv", joined(",", ("file", "prompt"), FILES).replace("\n", "\r\n") + "\r\n\r\n"),
        ("p.jsonl", "\n".join(json.dumps({"file_name": f, "text": t}) for f, t in zip(FILES, SHUFFLED, strict=True))),
        ("p.json", json.dumps([{"prompt": t, "image": f} for f, t in zip(FILES, SHUFFLED, strict=True)])),
        ("p.json", json.dumps([{"prompt": t, "file": int(f[:-4])} for f, t in zip(FILES, SHUFFLED, strict=True)])),
    ],
)
def test_a_column_of_files_pairs_by_name(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert paired(folder, tmp_path / name) == TEXTS


def test_excels_unicode_text_and_letters_that_macos_takes_apart(tmp_path: Path) -> None:
    picture(tmp_path / "out" / "caf\u0065\u0301.png")
    (tmp_path / "p.tsv").write_bytes("file\tprompt\r\ncaf\u00e9.png\ta caf\u00e9\r\n".encode("utf-16"))
    assert paired(tmp_path / "out", tmp_path / "p.tsv") == ["a caf\u00e9"]


def test_quotes_in_a_table(tmp_path: Path) -> None:
    """Doubled ones in quoted fields; between tabs often bare, and then part of the prompt."""
    (tmp_path / "p.csv").write_text('prompt,n\n"a sign ""STOP"", red",1\n')
    assert read_rows(tmp_path / "p.csv")[0].prompt.text == 'a sign "STOP", red'
    (tmp_path / "p.tsv").write_text('prompt\tn\n"STOP" on a sign\t1\na sign "GO"\t2\n')
    assert [row.prompt.text for row in read_rows(tmp_path / "p.tsv")] == ['"STOP" on a sign', 'a sign "GO"']
    assert read_rows(tmp_path / "p.tsv")[0].prompt.metadata == {"n": "1"}


def test_the_longest_common_end_of_two_paths_tells_pictures_of_one_name(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png"):
        picture(tmp_path / name)
    (tmp_path / "p.csv").write_text("file,prompt\nrun/b/0.png,two\nrun/a/0.png,one\n")
    assert paired(tmp_path / "a", tmp_path / "p.csv") == ["one"]
    assert paired(tmp_path / "b", tmp_path / "p.csv") == ["two"]
    picture(tmp_path / "c" / "0.png")
    with pytest.raises(UserError, match=r"p.csv:2 and .*p.csv:3 both name .*c/0.png; write more of its path"):
        paired(tmp_path / "c", tmp_path / "p.csv")
    (tmp_path / "same.csv").write_text("file,prompt\n0.png,one\n0.png,one\n")
    assert paired(tmp_path / "c", tmp_path / "same.csv") == ["one"]


def test_rows_of_other_pictures_are_said_and_pictures_without_a_row_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(joined(",", ("file", "prompt"), FILES) + "\n12.png,more\n13.png,more\n")
    _, unused = prompts_of(find_pictures([folder]), None, str(tmp_path / "p.csv"))
    assert unused == [f"{tmp_path / 'p.csv'}: 2 of 14 rows are of no picture here (12.png, 13.png)"]
    for number in range(12, 17):
        picture(folder / f"{number}.png")
    with pytest.raises(
        UserError, match=r"3 of 17 pictures have no row \(.*14.png, .*15.png, .*16.png\), the first row"
    ):
        paired(folder, tmp_path / "p.csv")


@pytest.mark.parametrize("count", [1, 10, 13])
def test_another_number_of_prompts_is_refused_with_both_numbers_and_the_first_pair(
    folder: Path, tmp_path: Path, count: int
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {number}" for number in range(count)))
    with pytest.raises(UserError, match=rf"{count} prompts for 12 pictures \(first pair: 'prompt 0' for .*out/0.png\)"):
        paired(folder, tmp_path / "p.txt")


def test_a_pattern_that_the_shell_wrote_out_is_no_order(folder: Path, tmp_path: Path) -> None:
    """0, 1, 10, 11, 2: once 10 of 12 were scored with another's prompt."""
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    written_out = find_pictures(sorted(folder.glob("*.png")))
    with pytest.raises(UserError, match=r"order of letters, .*11.png before .*2.png, .*give their folder"):
        prompts_of(written_out, None, str(tmp_path / "p.txt"))
    assert len(prompts_of(written_out, "one for all", None)[0]) == 12
    (tmp_path / "same.txt").write_text("one\n" * 12)
    assert len(prompts_of(written_out, None, str(tmp_path / "same.txt"))[0]) == 12
    counted = find_pictures([folder / f"{number}.png" for number in range(12)])
    assert [prompt.text for prompt in prompts_of(counted, None, str(tmp_path / "p.txt"))[0]] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"", "holds no prompt"),
        ("p.csv", b"file,prompt\n", "holds no prompt"),
        ("p.csv", b"0.png,a dog\n1.png,a cat\n", "its first line names no prompt, caption, text"),
        ("p.json", b'{"0.png": "a dog", "1.png": "a cat"}', "no object has prompt, caption, text"),
        ("p.csv", b"file,prompt\n0.png,a dog, red\n", "p.csv:2: has 3 fields where the first line has 2"),
        ("p.csv", b"file,prompt\n0.png\n", "p.csv:2: has 1 fields"),
        ("p.csv", b"file,prompt\n0.png,\n", "p.csv:2: has no text under prompt"),
        ("p.csv", b"file,prompt\n0.png,a\n,b\n", "p.csv:3: names no picture under file"),
        ("p.csv", b"prompt,prompt\na,b\n", "two columns of one name"),
        ("p.csv", b'prompt,n\n"a" dog,1\n', "p.csv:2: .*mend its quotes"),
        ("p.csv", b"prompt\n\xff\xe9\n", "not UTF-8 text"),
        ("p.json", b"{", "not JSON"),
        ("p.json", b"[3]", "p.json, object 1: needs an object"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl:2: has no text under prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{\n', "p.jsonl:2: not JSON"),
        ("none.csv", None, "No such file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


# ---- the command


def run(*arguments: str | Path, code: int = 0) -> tuple[list[dict[str, str]], str]:
    """The rows that it prints, and what it says beside."""
    ended = CliRunner().invoke(main, ["score", *map(str, arguments), "--reward", "brightness"])
    assert ended.exit_code == code, ended.output
    return list(csv.DictReader(io.StringIO(ended.stdout))), ended.stderr


def test_scores_stand_beside_their_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(joined(",", ("file", "prompt"), FILES))
    (folder / "notes.txt").write_text("x")
    rows, said = run(folder, "--prompts", tmp_path / "p.csv")
    assert [(Path(row["file"]).name, row["prompt"]) for row in rows] == [(f"{n}.png", f"prompt {n}") for n in range(12)]
    assert [float(row["brightness"]) for row in rows] == pytest.approx([n / 255 for n in range(12)])
    assert said.strip() == f"{folder}: skipped other formats (notes.txt)"


def test_its_own_output_is_a_table_of_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    for name in ("scores.csv", "scores.json"):
        run(folder, "--prompts", tmp_path / "p.txt", "--output", tmp_path / name)
        assert paired(folder, tmp_path / name) == TEXTS


def test_genevals_folders_need_no_prompts(tmp_path: Path) -> None:
    geneval(tmp_path / "out", prompts=3)
    rows, _ = run(tmp_path / "out")
    assert [row["prompt"] for row in rows] == ["bench 0", "bench 0", "bench 1", "bench 1", "bench 2", "bench 2"]
    _, said = run(tmp_path / "out", "--prompt", "x", code=2)
    assert "GenEval's folders bring their prompts; leave them out" in said
    _, said = run(tmp_path / "out", picture(tmp_path / "x.png"), code=2)
    assert "x.png: has no prompt" in said


@pytest.mark.parametrize("broken", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None])
def test_one_broken_picture_is_an_empty_cell(folder: Path, tmp_path: Path, broken: bytes | None) -> None:
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2] if broken is None else broken)
    rows, said = run(folder, "--prompt", "x")
    assert [row["brightness"] == "" for row in rows] == [n == 5 for n in range(12)]
    assert float(rows[6]["brightness"]) == pytest.approx(6 / 255)
    assert said.splitlines()[-1].startswith(f"1 of 12 pictures have no score: {folder / '5.png'}: not a picture")
    run(folder, "--prompt", "x", "--output", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())[5]["brightness"] is None
    for file in folder.iterdir():
        file.write_bytes(b"x")
    _, said = run(folder, "--prompt", "x", "--output", tmp_path / "none.csv", code=2)
    assert "none can be read; the first: " in said
    assert not (tmp_path / "none.csv").exists()
