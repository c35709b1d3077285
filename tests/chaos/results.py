"""What a run has written, and what of it is not as in another."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from dgpo_plugin.training.checkpoint import checkpoints

LEFT_OVER = re.compile(r"\..*\.tmp(\.\w+)?|\..*\.gone|\.owner\.json")


def differences(folder: Path, whole: Path) -> dict[str, tuple[object, object]]:
    """What two runs wrote differently, by its name, each as here and as there."""
    here, there = results(folder), results(whole)
    return {name: (here.get(name), there.get(name)) for name in here | there if here.get(name) != there.get(name)}


def results(folder: Path) -> dict[str, object]:
    """What must be the same to the bit, and what must not be there."""
    last = checkpoints(folder)[-1]
    files = [folder / "adapter.safetensors", last / "state.safetensors", *sorted((folder / "samples").iterdir())]
    hashes = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in files}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {
        f"iteration {line['iteration']}": {key: value for key, value in line.items() if "seconds" not in key}
        for line in lines
    }
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if LEFT_OVER.fullmatch(path.name))
    return {**hashes, **values, "lines twice": len(lines) - len(values), "left over": left}
