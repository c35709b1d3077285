"""The README's picture of a comparison's page: `python tools/report_picture.py FOLDER [HEIGHT]`.

FOLDER is one that `dgpo-bench report` has drawn; the top of its report.html, as a wide and light screen shows it in
Chromium, becomes docs/report.png. HEIGHT, in pixels, says how far down it goes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dgpo_plugin.common.files import atomic_path

TARGET = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1100, 980
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def picture(page: Path, height: int) -> Image.Image:
    """The top of a page, in a palette of 256 colors: it is text on plain ground, and the repository keeps every one."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser here: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shot = Path(folder) / "page.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}", f"--screenshot={shot}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=300)
        with Image.open(shot) as image:
            return image.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def main(arguments: Sequence[str]) -> None:
    """Draw the picture of a folder's page."""
    if not 1 <= len(arguments) <= 2 or not (Path(arguments[0]) / "report.html").is_file():
        raise SystemExit("usage: python tools/report_picture.py FOLDER [HEIGHT]; FOLDER holds a report.html")
    drawn = picture(Path(arguments[0]) / "report.html", int(arguments[1]) if len(arguments) > 1 else HEIGHT)
    with atomic_path(TARGET) as temporary:
        drawn.save(temporary, optimize=True)
    print(f"{TARGET}: {drawn.width} x {drawn.height}, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
