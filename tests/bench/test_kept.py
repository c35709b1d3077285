"""Pictures that are kept: lossless, in places of their own, and what is said of those that are gone or changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_bench.kept import check_kept, expected, keep, kept_name, kept_record, most_megabytes, read_kept
from dgpo_bench.pictures import Pictures, join, read_pictures, write_pictures
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast


def rows(count: int, entry: str = "base", seed: int = -1, name: str = "test") -> Pictures:
    zeros = np.zeros(count, dtype=np.int64)
    return Pictures(
        entry=np.full(count, entry),
        seed=np.full(count, seed, dtype=np.int64),
        checkpoint=zeros,
        guidance=np.full(count, 1.5),
        set=np.full(count, name),
        prompt=np.arange(count, dtype=np.int64),
        image=zeros,
        metrics={"red": np.linspace(0, 1, count)},
    )


def drawn(count: int) -> torch.Tensor:
    """Pictures of noise at 8 bits a channel."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 12, 20), generator=generator).float() / 255


def test_what_is_kept_is_read_back_to_the_bit(tmp_path: Path) -> None:
    kept = keep(rows(3), drawn(3), tmp_path)
    check_kept(kept, tmp_path)
    assert torch.equal(read_kept(kept, [0, 1, 2], tmp_path), drawn(3))
    assert torch.equal(read_kept(kept, [2], tmp_path), drawn(3)[2:])
    record = kept_record(kept, tmp_path)
    assert record is not None
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.webp"))
    assert (record.pictures, record.megabytes) == (3, round(size / 1e6, 3))
    assert size / 1e6 <= most_megabytes(3, 20, 12)  # though noise cannot be made smaller
    assert expected(3, 20, 12).startswith("keeps 3 pictures of 20 x 12 at most")


def test_the_hashes_stand_in_the_table_beside_pictures_that_were_not_kept(tmp_path: Path) -> None:
    table = join([keep(rows(2), drawn(2), tmp_path / "kept"), rows(2, "dgpo", 0)])
    write_pictures(table, tmp_path / "pictures.csv.gz")
    found = read_pictures(tmp_path / "pictures.csv.gz")
    assert found.sha256 is not None
    assert found.sha256.tolist() == (table.sha256.tolist() if table.sha256 is not None else None)
    assert found.kept().tolist() == [0, 1]
    assert list(found.metrics) == ["red"]
    assert found.where(np.array([3, 0])).kept().tolist() == [1]
    write_pictures(rows(2), tmp_path / "none.csv.gz")
    assert read_pictures(tmp_path / "none.csv.gz").sha256 is None


def test_every_row_has_a_place_of_its_own_inside_the_folder(tmp_path: Path) -> None:
    names = ["test", "shapes/out-of-domain", "../../x", "shapes%2Fout-of-domain", "shapes-out-of-domain", "..", "C:x"]
    tables = [rows(2, entry, seed, name) for entry, seed in (("a", 0), ("a", 1), ("a-seed0", -1)) for name in names]
    tables.append(rows(2, "../a", 0))
    places = [kept_name(table, row) for table in tables for row in (0, 1)]
    assert len(set(places)) == len(places)
    for place in places:
        assert (tmp_path / place).resolve().is_relative_to(tmp_path.resolve())
        assert len(Path(place).parts) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"1 missing of 3 \(first: .*0001-0\.webp\)"),
        ("changed", r"1 changed of 3 \(first: .*0001-0\.webp\)"),
        ("both", r"1 missing and 1 changed of 3 \(first: .*0000-0\.webp\)"),
    ],
)
def test_pictures_that_are_gone_or_changed_are_told_in_one_line(damage: str, message: str, tmp_path: Path) -> None:
    kept = keep(rows(3), drawn(3), tmp_path)
    second = tmp_path / kept_name(kept, 1)
    if damage == "missing":
        second.unlink()
    else:  # another picture of the same size
        second.write_bytes((tmp_path / kept_name(kept, 2)).read_bytes())
    if damage == "both":
        (tmp_path / kept_name(kept, 0)).unlink()
    with pytest.raises(UserError, match=message) as raised:
        check_kept(kept, tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"kept picture .*0001-0\.webp: "):
        read_kept(kept, [1], tmp_path)
