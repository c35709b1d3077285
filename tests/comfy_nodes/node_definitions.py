"""The English locale, from the nodes' own schemas; ``python -m tests.comfy_nodes.node_definitions`` writes it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.comfy_nodes.environment import ROOT, ensure
from tests.comfy_nodes.server import Server

LOCALE = ROOT / "locales" / "en" / "nodeDefs.json"


def node_definitions(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """What ``nodeDefs.json`` says of our nodes, given the server's ``/object_info``."""
    definitions = {}
    for name, info in sorted(object_info.items()):
        if not name.startswith("DGPO"):
            continue
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
        definitions[name] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                key: {"name": key.replace("_", " "), "tooltip": entry[1]["tooltip"]} for key, entry in inputs.items()
            },
            "outputs": {str(n): {"name": label, "tooltip": tooltip} for n, (label, tooltip) in enumerate(outputs)},
        }
    return definitions


def main() -> None:
    ensure()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "custom_nodes").mkdir()
        (Path(folder) / "custom_nodes" / "dgpo-plugin").symlink_to(ROOT)
        server = Server(Path(folder))
        try:
            definitions = node_definitions(server.get("/object_info"))
        finally:
            server.stop()
    LOCALE.write_text(json.dumps(definitions, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
