"""What a session found, as a table for people: Markdown, a verdict per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.training.plan import GIB

from ..throughput import PARTS
from .results import Result, read_results
from .rows import ROWS

WITHIN = 0.10
"""Share of what was planned by which memory may differ, either way, and still be as planned."""
UTILIZATION = 0.5
"""Share of the nominal rate that rollout and training of Stable Diffusion 3.5 Medium aim at."""


def write_table(folder: Path, missing: Iterable[str]) -> str:
    """Write ``gpu.md``, the table of all that is in a session's folder, and return its text.

    Args:
        missing: rows that there was no time for; those that were measured at another time are left out.

    Raises:
        UserError: the folder's results cannot be read.
    """
    results = read_results(folder)
    text = markdown(results, [row.name for row in ROWS], [name for name in missing if name not in results])
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "gpu.md", text)
    return text


def markdown(results: Mapping[str, Result], names: Iterable[str], missing: Iterable[str]) -> str:
    """A session's header and its rows, in the order of ``names``."""
    shown = [results[name] for name in names if name in results]
    gemm = _measured_rate(results)
    lines = _header(shown)
    lines += ["| row | found | memory, GiB: most / planned | verdict |", "|---|---|---|---|"]
    for result in shown:
        lines.append(
            f"| {result.row}: {result.about} | {_found(result, gemm)} | {_memory(result)} | {verdict(result)} |"
        )
    if rest := list(missing):
        lines += ["", f"Not measured, for want of time: {', '.join(rest)}. The same command goes on with them."]
    return "\n".join(lines) + "\n"


def verdict(result: Result) -> str:
    """What a row showed: as planned, worse than planned and by how much, or failed and why."""
    measured = result.measured
    if result.status == "does not fit":
        return f"skipped: `dgpo plan` says {measured['planned_bytes'] / GIB:.1f} GiB"
    if result.anyway:
        refuted = result.status == "measured"
        return "fits, though planned not to" if refuted else "does not fit, as planned"
    if result.status != "measured":
        return f"{result.status}: {result.reason}"
    found = [*_of_memory(measured), *_of_speed(result), *_of_numbers(measured)]
    return "; ".join(found) or "runs"


def _of_memory(measured: Mapping[str, Any]) -> list[str]:
    found = []
    if measured.get("peak_bytes") and measured.get("planned_bytes"):
        off = measured["peak_bytes"] / measured["planned_bytes"] - 1
        if abs(off) <= WITHIN:
            found.append("memory as planned")
        else:
            found.append(f"memory {abs(off):.0%} {'more' if off > 0 else 'less'} than planned")
        if "aim_bytes" in measured:
            aim = measured["aim_bytes"] / GIB
            found.append(
                f"{'within' if measured['peak_bytes'] <= measured['aim_bytes'] else 'not within'} {aim:.0f} GiB"
            )
    return found


def _of_speed(result: Result) -> list[str]:
    nominal = result.device.get("nominal_bf16_tflops")
    if nominal is None or "rollout_tflops" not in result.measured:
        return []
    shares = {part: result.measured[f"{part}_tflops"] / nominal for part in ("rollout", "training")}
    slow = [f"{part} {share:.0%}" for part, share in shares.items() if share < UTILIZATION]
    return (
        [f"below the aim of {UTILIZATION:.0%}: {', '.join(slow)}"] if slow else [f"utilization above {UTILIZATION:.0%}"]
    )


def _of_numbers(measured: Mapping[str, Any]) -> list[str]:
    if "applied_difference" in measured:
        off = measured["applied_difference"]
        return [f"the adapter applied is the adapter trained, to {off:.1e} of its change"]
    if "finite" in measured or "same_bits" in measured:
        found = ["finite" if measured["finite"] else "not finite"] if "finite" in measured else []
        same = measured.get("same_bits")
        return found + ([] if same is None else ["the same bits again" if same else "not the same bits again"])
    if "works" in measured:
        messages = [*([measured["note"]] if "note" in measured else []), *measured["messages"]]
        return ["works" if measured["works"] else "refused: " + "; ".join(messages)]
    return []


def _measured_rate(results: Mapping[str, Result]) -> float | None:
    card = results.get("card")
    return card.measured.get("bf16_tflops") if card is not None else None


def _header(shown: list[Result]) -> list[str]:
    if not shown:
        return ["Nothing was measured.", ""]
    device = next((r.device for r in shown if r.device), {})
    state = next((r.state for r in shown if r.state), {})
    what = [str(device.get("device", "?"))]
    if device.get("kind") not in (None, "cpu"):
        what.append(f"{device['memory'] / GIB:.0f} GiB")
    what.append(f"torch {device.get('torch', '?')}")
    if state:
        what.append(f"driver {state['driver']}")
    packages = shown[0].packages
    what += [f"{name} {packages[name]}" for name in ("diffusers", "peft", "transformers") if name in packages]
    lines = [f"{', '.join(what)}; {shown[0].created[:10]}. Random weights of the published shapes.", ""]
    if any(result.rehearsal for result in shown):
        lines = ["**A rehearsal: tiny models on the processor. The numbers mean nothing.**", "", *lines]
    return lines


def _memory(result: Result) -> str:
    measured = result.measured
    if not measured.get("planned_bytes"):
        return ""
    peak = f"{measured['peak_bytes'] / GIB:.1f}" if measured.get("peak_bytes") else "-"
    return f"{peak} / {measured['planned_bytes'] / GIB:.1f}"


def _found(result: Result, gemm: float | None) -> str:
    measured = result.measured
    if result.status != "measured":
        return ""
    nominal = result.device.get("nominal_bf16_tflops")

    def rate(tflops: float) -> str:
        of = [f"{tflops / nominal:.0%} of nominal"] if nominal else []
        of += [f"{tflops / gemm:.0%} of a product's"] if gemm else []
        return f"{tflops:.0f} TFLOP/s" + (f" ({', '.join(of)})" if of else "")

    if "copy_gbs" in measured:
        rates = [
            f"{kind} {measured[f'{kind}_tflops']:.0f}"
            for kind in ("bf16", "fp16", "fp32")
            if f"{kind}_tflops" in measured
        ]
        return f"products: {', '.join(rates)} TFLOP/s; copy {measured['copy_gbs']:.0f} GB/s"
    if "rollout_tflops" in measured:
        parts = ", ".join(f"{part.replace('_', ' ')} {measured[f'{part}_seconds']:.2f}" for part in PARTS)
        rates = [f"{part} {rate(measured[f'{part}_tflops'])}" for part in ("rollout", "training")]
        return f"{measured['seconds']:.2f} s for {measured['images']} images ({parts}); {', '.join(rates)}"
    if "sizes" in measured:
        rows = [_size(row) for row in measured["sizes"]]
        return "; ".join(rows)
    if "forward" in measured and "by_kind" in measured["forward"]:
        return "; ".join(f"{name}: {_kinds(measured[name])}" for name in ("forward", "training"))
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in measured.items())


def _size(row: Mapping[str, Any]) -> str:
    def part(name: str) -> str:
        if name in row:
            return str(row[name])
        milliseconds, gib = row[f"{name}_seconds"] * 1000, row[f"{name}_bytes"] / GIB
        return f"{milliseconds:.0f} ms, {row[f'{name}_tflops']:.0f} TFLOP/s, {gib:.1f} GiB"

    return f"{row['images']}: {part('forward')} / {part('training')}"


def _kinds(profile: Mapping[str, Any]) -> str:
    busy = profile["busy_seconds"]
    if not busy:
        return f"{profile['seconds'] * 1000:.0f} ms"
    shares = sorted(profile["by_kind"].items(), key=lambda item: -item[1])
    return f"{profile['seconds'] * 1000:.0f} ms, busy {busy * 1000:.0f}, {profile['launches']} kernels, " + ", ".join(
        f"{kind} {spent / busy:.0%}" for kind, spent in shares
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    return str(value)
