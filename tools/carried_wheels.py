"""Wheels for a machine that has torch and no network: `python tools/carried_wheels.py PRESENT FOLDER`.

PRESENT lists what that machine has, a package a line (`pip freeze`'s output, or bare names, whose versions are taken to
do). What this project needs beside them is read from the packages that are installed here, in their versions, and
fetched for that machine's Python; torch never is. Together with the tree, which has to be carried too, they must stay
below a limit, so of bitsandbytes, which nobody has to have, only the library for one CUDA is carried, if it is named.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NEVER = {"torch", "torchvision", "torchaudio", "triton"}
OPTIONAL = ("torchao",)
"""Wanted for a measurement of ours, though no dependency of the package."""
BITSANDBYTES = "bitsandbytes==0.50.2"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def read_present(file: Path) -> dict[str, Version | None]:
    """Packages by canonical name, with the version where the list has one."""
    found: dict[str, Version | None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name:
            found[canonicalize_name(name)] = Version(version) if version else None
    return found


def missing(present: dict[str, Version | None], python: str) -> list[str]:
    """``name==version`` of what has to be carried, for a Python such as ``3.12``."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    waiting = [*(distribution("dgpo-plugin").requires or []), *OPTIONAL]
    carried: dict[str, str] = {}
    while waiting:
        need = Requirement(waiting.pop())
        name = canonicalize_name(need.name)
        if name in NEVER or name in carried or (need.marker and not need.marker.evaluate(environment)):
            continue
        if name in present:
            there = present[name]
            if there is None or need.specifier.contains(there, prereleases=True):
                continue
        here = distribution(name)
        carried[name] = here.version
        waiting += here.requires or []
    return [f"{name}=={version}" for name, version in sorted(carried.items())]


def tree_bytes() -> int:
    """Of the files that git tracks or would."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Take the libraries for other GPUs out of bitsandbytes' wheel; ``cuda`` is a version such as ``13.0``."""
    kept = f"libbitsandbytes_cuda{cuda.replace('.', '')}.so"
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as part:
        if f"bitsandbytes/{kept}" not in whole.namelist():
            raise click.ClickException(f"{wheel.name} has no {kept}")
        for item in whole.infolist():
            library = item.filename.startswith("bitsandbytes/lib") and item.filename.endswith(".so")
            if not library or Path(item.filename).name in (kept, "libbitsandbytes_cpu.so"):
                part.writestr(item, whole.read(item))
    smaller.replace(wheel)


@click.command()
@click.argument("present", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--python", default="3.12", show_default=True, help="Of that machine.")
@click.option("--cuda", help="Of that machine's torch, such as 13.0: carries bitsandbytes for it.")
@click.option("--limit", default=64.0, show_default=True, help="MiB of wheels and tree together.")
def main(present: Path, folder: Path, python: str, cuda: str | None, limit: float) -> None:
    """Fetch what a machine lacks."""
    names = missing(read_present(present), python)
    if cuda is not None:
        names.append(BITSANDBYTES)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        fetch += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*fetch, *names], check=True)
    if cuda is not None:
        for wheel in folder.glob("bitsandbytes-*.whl"):
            keep_one_cuda(wheel, cuda)
    wheels = sum(file.stat().st_size for file in folder.glob("*.whl"))
    total = (wheels + tree_bytes()) / 2**20
    for name in names:
        click.echo(name)
    click.echo(f"{len(names)} wheels, {wheels / 2**20:.1f} MiB; with the tree {total:.1f} MiB")
    if total > limit:
        raise click.ClickException(
            f"more than {limit:g} MiB: install the largest on that machine, and list it in {present}"
        )


if __name__ == "__main__":
    main()
