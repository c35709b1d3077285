"""The kinds of hostile input: how a case is made from a valid one, and what must be so of one that is accepted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from dgpo_plugin.adapters.load import AdapterFile
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.checkpoint import load_checkpoint
from tests.fuzz import seeds
from tests.fuzz.cases import Case, Outcome
from tests.fuzz.mutation import YAML_VALUES, mutated_bytes, mutated_json, mutated_lines

PLANNED = ("model.", "lora.", "training.", "rollout.")
"""Settings that say how large a run is, which ``dgpo plan`` is asked about."""


def times(random: Random) -> range:
    """How often something is done to an input: mostly once, so that it stays nearly valid."""
    return range(random.choice((1, 1, 1, 1, 2, 3)))


def make_yaml(random: Random) -> Case:
    values: Any = seeds.config() if random.random() < 0.8 else seeds.config_on_pairs()
    if random.random() < 0.5:
        for _ in times(random):
            values = mutated_json(values, random)
        text = yaml.safe_dump(values, sort_keys=False) if random.random() < 0.5 else json.dumps(values, indent=1)
        content = text.encode("utf-8", "surrogatepass")
    else:
        text = yaml.safe_dump(values, sort_keys=False)
        for _ in times(random):
            text = mutated_lines(text, random)
        content = text.encode("utf-8", "surrogatepass")
        content = mutated_bytes(content, random) if random.random() < 0.1 else content
    return Case("yaml", "dgpo", ("config", "run.yaml"), {"run.yaml": content})


def make_set(random: Random) -> Case:
    fields = seeds.fields()
    changes = {random.choice(fields): random.choice(YAML_VALUES) for _ in times(random)}
    if random.random() < 0.1:
        key = mutated_bytes(random.choice(fields).encode(), random).decode("utf-8", "replace").replace("\0", "?")
        changes[key] = random.choice(YAML_VALUES)
    planned = all(key.startswith(PLANNED) for key in changes) and random.random() < 0.3
    options = [option for key, value in changes.items() for option in ("--set", f"{key}={value}")]
    command = ("plan", "shapes", "--memory", "8") if planned else ("config", "shapes")
    return Case("set", "dgpo", (*command, *options), {}, {"set": changes} if not planned else {})


def check_config(case: Case, outcome: Outcome, folder: Path) -> str:
    """What is printed must read as the same configuration again, and hold what was set."""
    if case.arguments[0] == "plan":
        return "" if "verdict" in outcome.output else "no verdict"
    again = folder / "again.yaml"
    again.write_text(outcome.output, encoding="utf-8")
    try:
        read = load_config(str(again))
    except UserError as error:
        return f"what was printed cannot be read: {error}"
    options = case.arguments[2:]
    first = load_config(str(folder / case.arguments[1]) if case.files else case.arguments[1], options[1::2])
    if read != first:
        return "what was printed reads as another configuration"
    dumped = first.model_dump(mode="json")
    for key, text in case.expected.get("set", {}).items():
        found: Any = dumped
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, bool) and text not in ("true", "false", "yes", "no", "on", "0", "1", "1.0", '"1"', "'1'"):
            return f"{key}: {text} became {found}"
        if isinstance(found, int | float) and not isinstance(found, bool) and not _same_number(text, found):
            return f"{key}: {text} became {found}"
    return ""


def _same_number(text: str, found: float) -> bool:
    plain = text.strip("'").removeprefix("!!int ")
    try:
        return math.isfinite(found) and math.isclose(float(plain), found, rel_tol=1e-12)
    except ValueError:
        return int(plain, 0) == found if plain[:2] in ("0x", "0b") else False


def make_prompts(random: Random) -> Case:
    suffix, text = random.choice(list(seeds.PROMPTS.items()))
    content = text.encode()
    if suffix in (".json", ".jsonl") and random.random() < 0.6:
        records = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.split("\n")]
        for _ in times(random):
            records = mutated_json(records, random)
        whole = suffix == ".json" or not isinstance(records, list)
        changed = json.dumps(records) if whole else "\n".join(json.dumps(record) for record in records)
        content = changed.encode("utf-8", "surrogatepass")
    else:
        for _ in times(random):
            content = mutated_bytes(content, random)
    if random.random() < 0.05:
        content = content.decode("utf-8", "replace").encode(
            random.choice(("utf-16", "utf-8-sig", "latin-1")), "replace"
        )
    files = {f"p/prompts{suffix}": content, **{f"{n}.png": seeds.picture("PNG") for n in (1, 2)}}
    command = ("score", "1.png", "2.png", "--reward", "brightness", "--prompts", f"p/prompts{suffix}")
    return Case("prompts", "dgpo", (*command, "--output", "scores.json"), files)


def check_scores(case: Case, outcome: Outcome, folder: Path) -> str:
    """Every row has a prompt that stands in the file, and a score that is one."""
    rows = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for row in rows:
        score = row["brightness"]
        if score is None and "have no score" not in outcome.errors:
            return "a picture without a score, and no word of it"
        if score is not None and not 0 <= score <= 1:
            return f"brightness {score}"
        if not row["prompt"].strip():
            return "an empty prompt"
    if case.arguments[-3].endswith(".txt"):
        text = case.files[case.arguments[-3]].decode("utf-8-sig")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if [row["prompt"] for row in rows] != lines:
            return f"prompts {lines} were read as {rows}"
    return ""


def make_pictures(random: Random) -> Case:
    kind = random.choice(seeds.PICTURES)
    content = seeds.picture(kind, random)
    for _ in times(random):
        content = mutated_bytes(content, random)
    if kind == "PNG" and random.random() < 0.3:
        content = seeds.png_of_size(*(random.choice((0, 1, 7, 12000, 2**16, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
    name = f"a.{kind.lower()}"
    command = ("score", name, "--reward", "brightness", "--prompt", "x", "--output", "scores.json")
    return Case("pictures", "dgpo", command, {name: content})


def make_adapter(random: Random) -> Case:
    content = random.choice(seeds.adapters())
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    change = random.random()
    if change < 0.45:
        for _ in times(random):
            header = mutated_json(header, random)
    elif change < 0.6 and "lora_adapter_metadata" in header["__metadata__"]:
        settings = mutated_json(json.loads(header["__metadata__"]["lora_adapter_metadata"]), random)
        header["__metadata__"]["lora_adapter_metadata"] = json.dumps(settings)
    elif change < 0.75:
        at = random.randrange(0, len(data) - 4, 4)
        number = random.choice((math.nan, math.inf, 3e38, 1e-40, -0.0, 1.0))
        data = data[:at] + struct.pack("<f", number) + data[at + 4 :]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    content = struct.pack("<Q", len(text)) + text + data
    if change >= 0.75:
        for _ in times(random):
            content = mutated_bytes(content, random)
    if random.random() < 0.1:
        settings = json.dumps(mutated_json(seeds.PEFT_SETTINGS, random)).encode()
        return Case(
            "adapter", "dgpo", ("inspect", "."), {"adapter_model.safetensors": content, "adapter_config.json": settings}
        )
    return Case("adapter", "dgpo", ("inspect", "a.safetensors"), {"a.safetensors": content})


def check_adapter(case: Case, outcome: Outcome, folder: Path) -> str:
    """A card of printable lines; and numbers that pictures can be drawn with, of the bits that were exported."""
    if not all(line.isprintable() for line in outcome.output.split("\n")):
        return "the card speaks to the terminal"
    file = AdapterFile.read(folder / case.arguments[1])
    try:
        usable = file.usable
    except UserError as error:
        return "" if str(error).isprintable() else "the reason is not printable"
    if not all(bool(tensor.isfinite().all()) for tensor in usable.tensors.values()):
        return "numbers that are not finite"
    stated = file.header.get("modelspec.hash_sha256")
    if "dgpo.original_alpha" in file.header and stated is not None and file.is_as_stated is False:
        return "other bits than were exported"
    return ""


def make_results(random: Random) -> Case:
    files = {f"c/{name}": content for name, content in seeds.comparison().items()}
    what = random.random()
    if what < 0.6:
        values: Any = json.loads(files["c/results.json"])
        for _ in times(random):
            values = mutated_json(values, random)
        files["c/results.json"] = json.dumps(values).encode("utf-8", "surrogatepass")
    elif what < 0.85:
        rows = gzip.decompress(files["c/pictures.csv.gz"]).decode()
        files["c/pictures.csv.gz"] = gzip.compress(mutated_lines(rows, random).encode("utf-8", "surrogatepass"))
    else:
        name = random.choice(sorted(files))
        files[name] = mutated_bytes(files[name], random)
    return Case("results", "dgpo-bench", ("report", "c"), files)


def check_report(case: Case, outcome: Outcome, folder: Path) -> str:
    """A page, and a table of numbers."""
    page = (folder / "c" / "report.html").read_text(encoding="utf-8")
    if "</html>" not in page:
        return "half a page"
    rows = list(csv.reader(io.StringIO((folder / "c" / "curves.csv").read_text(encoding="utf-8"))))
    numbers = [cell for row in rows[1:] for cell in row[2:] if cell]
    return "" if all(math.isfinite(float(cell)) for cell in numbers) else "curves.csv holds no numbers"


def make_reward(random: Random) -> Case:
    text = seeds.reward(random)
    if random.random() < 0.3:
        text = mutated_bytes(text.encode(), random).decode("utf-8", "replace")
    files = {"mine.py": text.encode(), "a.png": seeds.picture("PNG")}
    command = ("score", "a.png", "--reward", "mine.py:score,brightness", "--prompt", "x", "--output", "scores.json")
    return Case("reward", "dgpo", command, files)


def check_reward(case: Case, outcome: Outcome, folder: Path) -> str:
    """A finite number; and the next reward saw the picture as it is."""
    (row,) = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    if not math.isfinite(row["mine.py:score"]):
        return f"scored {row['mine.py:score']}"
    return "" if abs(row["brightness"] - seeds.BRIGHTNESS) < 1e-3 else f"brightness read {row['brightness']}"


def make_checkpoint(random: Random) -> Case:
    files = dict(seeds.run())
    name = random.choice([path for path in files if not path.endswith("adapter.safetensors")])
    if name.endswith(".json") and random.random() < 0.6:
        state: Any = json.loads(files[name])
        for _ in times(random):
            state = mutated_json(state, random)
        files[name] = json.dumps(seeds.signed(state) if random.random() < 0.7 else state).encode(
            "utf-8", "surrogatepass"
        )
    elif name.endswith(".yaml") and random.random() < 0.6:
        files[name] = mutated_lines(files[name].decode(), random).encode("utf-8", "surrogatepass")
    else:
        files[name] = mutated_bytes(files[name], random)
    return Case("checkpoint", "dgpo", ("resume", "r"), files)


def check_checkpoint(case: Case, outcome: Outcome, folder: Path) -> str:
    """What was read is what was written: the last checkpoint's tensors, to the bit."""
    read = load_checkpoint(max((folder / "r" / "checkpoints").iterdir()))
    numbers = {float(tensor.sum()) for named in read.tensors.values() for tensor in named.values()}
    return "" if numbers == {6.0 * read.progress.iteration} or numbers <= {6.0, 12.0} else f"tensors of {numbers}"


Check = Callable[[Case, Outcome, Path], str]
KINDS: dict[str, tuple[Callable[[Random], Case], Check, int]] = {
    "yaml": (make_yaml, check_config, 30),
    "set": (make_set, check_config, 30),
    "prompts": (make_prompts, check_scores, 12),
    "pictures": (make_pictures, check_scores, 12),
    "adapter": (make_adapter, check_adapter, 30),
    "results": (make_results, check_report, 10),
    "reward": (make_reward, check_reward, 10),
    "checkpoint": (make_checkpoint, check_checkpoint, 8),
}
"""How each is made, what it is checked by if it is accepted, and how often it comes."""
