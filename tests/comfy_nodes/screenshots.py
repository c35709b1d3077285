"""The front end in a real browser: ``python -m tests.comfy_nodes.screenshots`` takes the pictures in docs/comfyui.

Needs Chromium and npm. Fails if the nodes are not in the menu, a workflow that is dropped in does not run, or the card
is not shown.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from tests.comfy_nodes.environment import PYTHON, ROOT, ensure
from tests.comfy_nodes.server import Server

FRONT_END = "comfyui-frontend-package==1.47.12"
"""What ComfyUI 0.30.0 asks for."""
PLAYWRIGHT = "playwright-core@1.65.1"
SCRIPT = Path(__file__).with_suffix(".cjs")
CROPS = {
    "menu": (0, 0, 1100, 1000),
    "workflow": (0, 0, 2300, 1100),
    "card": (60, 60, 1500, 860),
    "help": (0, 0, 2300, 1200),
}
"""Pixels of the 2300 by 1200 page that are kept."""


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium found"
    ensure()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [PYTHON, "-m", "pip", "download", "--quiet", "--no-deps", FRONT_END, "--dest", folder], check=True
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder / "front")
        subprocess.run(["npm", "install", "--silent", "--prefix", folder, PLAYWRIGHT], check=True)
        (folder / "base" / "custom_nodes").mkdir(parents=True)
        (folder / "base" / "custom_nodes" / "dgpo-plugin").symlink_to(ROOT)
        server = Server(folder / "base", folder / "front" / "comfyui_frontend_package" / "static")
        try:
            workflow = ROOT / "example_workflows" / "dgpo_compare_adapter.json"
            command = ["node", SCRIPT, folder / "node_modules", browser, server.address, workflow, folder]
            subprocess.run([str(word) for word in command], check=True, timeout=300)
        finally:
            server.stop()
        for picture, box in CROPS.items():
            with Image.open(folder / f"{picture}.png") as opened:
                cropped = opened.convert("RGB").crop(box)
            width = min(cropped.width, 2000)
            small = cropped.resize((width, round(cropped.height * width / cropped.width)), Image.Resampling.LANCZOS)
            small.save(ROOT / "docs" / "comfyui" / f"{picture}.png", optimize=True)


if __name__ == "__main__":
    main()
