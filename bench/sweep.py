"""A finished adapter at several strengths, numbers of steps and guidances, one axis at a time, the base beside it.

Every setting draws the same prompts from the same noise. The guidance axis comes first: the others are walked at the
guidance that suits the adapter best on it. What a setting measured is kept, and a sweep that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from dgpo_plugin.adapters.layers import Update, attached
from dgpo_plugin.adapters.load import base_notes, load_base, match_adapter, read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.folder_lock import HeldFolder, only_process
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.provenance import package_versions
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.models.generate import BATCH_SIZE, fixed_noise, generate
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.text_cache import EncodedTexts

from .base import prompts_of, with_what_is_there, write_gallery
from .claim import with_precision
from .commit import git_hash
from .compare import check_task
from .evaluate import GALLERY_SEED, Evaluator, Subject, headline
from .gather import carried, machine, task_record
from .kept import kept_record
from .measures import load_measures
from .meter import Meter
from .pictures import PICTURES_FILE, Pictures, join, read_pictures, write_pictures
from .plan import kept_folder
from .prompt_sets import VALIDATION, SampledSet, spread, swept_sets
from .records import (
    KEPT_FOLDER,
    MetricRecord,
    PromptSetRecord,
    Sampling,
    added_metrics,
    passes,
    read_record,
    write_record,
)
from .sweep_records import START_FILE, SWEEP_FILE, Axis, Setting, SweepPlan, SweepRecord, read_sweep, sweep_plan_of

SEED = 0
SHOWN, SHOWN_SIZE = 6, 256
"""Prompts in the page's grids, and the longer side of their tiles in pixels at most."""


class Start(BaseModel):
    """What a sweep found before it measured anything; what goes on must find the same.

    Attributes:
        cautions: of the adapter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: dict[str, MetricRecord]
    sets: dict[str, PromptSetRecord]
    precision: str
    width: int
    height: int
    gallery_prompts: list[str]
    cautions: list[str]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep under way."""

    plan: SweepPlan
    folder: Path
    updates: Sequence[Update]
    policy: Policy
    evaluator: Evaluator
    start: Start
    meter: Meter
    held: HeldFolder


def sweep(plan: SweepPlan, folder: Path, meter: Meter) -> SweepRecord:
    """Measure what is missing of a sweep and gather everything.

    Raises:
        UserError: a file that is no adapter of this base, a folder of another sweep, prompts that overlap, or a metric
            that is missing.
    """
    check_task(plan.plan)
    config = plan.plan.base_config()
    # Compiled blocks would not see an adapter that comes and goes.
    model = load_base(config.model.model_copy(update={"compile": False}), best_device())
    file, updates = match_adapter(model, Path(plan.adapter))
    cautions = base_notes(file, model)
    if file.usable.doubt:
        cautions.append(f"The scale is unknown ({file.usable.doubt}): strength 1 is as the file is stored.")
    # An untrained LoRA beside it, which is switched off.
    policy = Policy(model, config.lora, SEED)
    with only_process(folder) as held:
        before = sweep_plan_of(folder)
        _refuse_another(plan, before)
        if before is None:
            write_record(plan, folder / "plan.json")
        evaluator, start = _open(plan, folder, policy, cautions)
        under_way = Sweep(plan, folder, updates, policy, evaluator, start, meter, held)
        with policy.as_reference():
            _walk(under_way)
        return gather_sweep(plan, folder)


def settled(plan: SweepPlan, folder: Path) -> SweepPlan:
    """The plan with what its ``precision: auto`` stands for, here or in the folder that it goes on with.

    Raises:
        UserError: the folder was made for something else.
    """
    before = sweep_plan_of(folder)
    plan = plan.model_copy(update={"plan": with_precision(plan.plan, None if before is None else before.plan)})
    _refuse_another(plan, before)
    return plan


def content_hash(adapter: Path) -> str:
    """What an adapter's file is, whatever its header says.

    Raises:
        UserError: it is no adapter.
    """
    return read_adapter(adapter).content_hash


def sweep_cost(plan: SweepPlan) -> tuple[int, int, int]:
    """Settings, measured pictures and denoiser evaluations of a whole sweep at most, before anything of it is done.

    Raises:
        UserError: a prompt set that is not there.
    """
    sets = swept_sets(plan.plan.task, plan.prompts)
    pictures = sum(len(each.prompts) * each.images for each in sets.values())
    dearest = plan.center(max(plan.guidances))
    settings = {each for axis in ("strength", "steps", "guidance") for each in plan.on_axis(axis, dearest)}
    drawn = pictures + len(shown(sets))
    evaluations = sum(drawn * passes(each.steps, each.guidance) for each in settings)
    return len(settings), len(settings) * pictures, evaluations


def gather_sweep(plan: SweepPlan, folder: Path) -> SweepRecord:
    """Write sweep.json and pictures.csv.gz of the settings that are there.

    Raises:
        UserError: the guidance axis is not there yet, or a file cannot be read.
    """
    start = read_record(Start, folder / START_FILE, "cannot be read; remove the folder and sweep again")
    crossing = _crossing(plan, folder)
    if crossing is None:
        raise UserError(f"{folder}: the sweep has not come through its guidances yet; the same command goes on with it")
    center, base_guidance = crossing
    wanted = _settings(plan, center)
    there = [each for each in wanted if _file(folder, each).exists()]
    table = join(read_pictures(_file(folder, each)) for each in there)
    metrics, table = carried(start.metrics, table, added_metrics(read_sweep, folder), folder)
    task = task_record(plan.plan).model_copy(update={"prompts_per_tag": _least(plan), "thresholds": []})
    record = SweepRecord(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        preset=plan.plan.preset_name,
        git_hash=git_hash(),
        packages=package_versions(),
        machine=machine(plan.plan),
        task=task,
        sampling=Sampling(
            sampler="euler",
            steps=center.steps,
            guidance=center.guidance,
            guidances=plan.guidances,
            precision=start.precision,
            width=start.width,
            height=start.height,
        ),
        adapter=plan.label,
        adapter_sha256=plan.adapter_sha256,
        cautions=start.cautions,
        axes={axis: plan.values(axis) for axis in ("strength", "steps", "guidance")},
        center=center,
        base_guidance=base_guidance,
        settings=there,
        metrics=metrics,
        sets=start.sets,
        denoiser_evaluations=sum(_pictures(start) * passes(each.steps, each.guidance) for each in there),
        galleries={each.name: f"settings/{each.name}.png" for each in there},
        gallery_prompts=start.gallery_prompts,
        complete=len(there) == len(wanted),
        kept=kept_record(table, folder / KEPT_FOLDER),
    )
    write_pictures(table, folder / PICTURES_FILE)
    write_record(record, folder / SWEEP_FILE)
    return record


def shown(sets: Mapping[str, SampledSet]) -> list[Prompt]:
    """The prompts of the page's grids: of every kind in domain first, one of each out-of-domain set, then others."""
    inside = sets[VALIDATION]
    kinds = [inside.prompts[number] for number in spread(inside.tags, 1)]
    outside = [each.prompts[0] for each in sets.values() if each.role == "out_of_domain"]
    unique = {prompt.text: prompt for prompt in [*kinds[: SHOWN - 2], *outside[:2], *inside.prompts]}
    return list(unique.values())[:SHOWN]


# ---- the run, in order


def _refuse_another(plan: SweepPlan, before: SweepPlan | None) -> None:
    if before is None:
        return
    # Where the adapter lies, and how many cores there are, make no other sweep.
    same = {"plan": before.plan.model_copy(update={"threads": plan.plan.threads})}
    before = before.model_copy(update={**same, "adapter": plan.adapter, "label": plan.label})
    if before == plan:
        return
    changed = [name for name in SweepPlan.model_fields if getattr(before, name) != getattr(plan, name)]
    what = ", ".join("task, model or --keep-pictures" if name == "plan" else name for name in changed)
    raise UserError(
        f"--output: holds a sweep with another {what}; choose another --output, or remove it to start again"
    )


def _open(plan: SweepPlan, folder: Path, policy: Policy, cautions: list[str]) -> tuple[Evaluator, Start]:
    """What every setting is measured by, as it was when the sweep began.

    Raises:
        UserError: a metric is not there, or is another by now.
    """
    file, config, sets = folder / START_FILE, plan.plan.base_config(), swept_sets(plan.plan.task, plan.prompts)
    before = read_record(Start, file, "cannot be read; remove the folder and sweep again") if file.exists() else None
    missing = {name: record.missing for name, record in before.metrics.items() if record.missing} if before else {}
    prompts = prompts_of(plan.plan, sets)
    measures = load_measures(plan.plan.task, config.scoring, prompts, missing=missing, names=list(prompts))
    model, batch = policy.model, config.training.micro_batch_size or BATCH_SIZE
    encoded = EncodedTexts(model, ["", *(prompt.text for each in sets.values() for prompt in each.prompts)])
    steps = plan.plan.task.sampling.steps
    kept = kept_folder(plan.plan, folder)
    evaluator = Evaluator(steps, sets, measures, encoded, batch, [], encoded[[""]], kept=kept)
    if before is None:
        evaluator = with_what_is_there(plan.plan, evaluator, (model.height, model.width))
    start = Start(
        metrics={name: measure.record for name, measure in evaluator.measures.items()},
        sets={name: each.record() for name, each in sets.items()},
        precision=config.model.precision,
        width=model.width,
        height=model.height,
        gallery_prompts=[prompt.text for prompt in shown(sets)],
        cautions=cautions,
    )
    if before is None:
        write_record(start, file)
    elif before != start:
        changed = [name for name in Start.model_fields if getattr(before, name) != getattr(start, name)]
        raise UserError(f"{folder}: the sweep was begun with another {', '.join(changed)}; choose another --output")
    return evaluator, start


def _walk(sweep: Sweep) -> None:
    """The guidances first, then the strengths and steps at the best of them."""
    plan, folder = sweep.plan, sweep.folder
    first = plan.on_axis("guidance", plan.center(plan.guidances[0]))
    everything = _settings(plan, plan.center(plan.guidances[-1]))  # or another guidance, which costs no more
    sweep.meter.start(_left(sweep, everything))
    for setting in first:
        if not _file(folder, setting).exists():
            _measure(sweep, setting)
    crossing = _crossing(plan, folder)
    assert crossing is not None
    everything = _settings(plan, crossing[0])
    sweep.meter.expect(_left(sweep, everything))
    for setting in everything:
        if not _file(folder, setting).exists():
            _measure(sweep, setting)
            gather_sweep(plan, folder)


def _measure(sweep: Sweep, setting: Setting) -> None:
    """One setting's rows and tiles; the rows are written last, and say that it is done."""
    evaluator, meter = replace(sweep.evaluator, steps=setting.steps), sweep.meter
    subject, rows = Subject(entry=setting.entry), list[Pictures]()
    with attached(sweep.updates, setting.strength):
        for name, of in evaluator.sets.items():
            at_once = max(1, evaluator.batch_size // of.images)
            for start in range(0, len(of.prompts), at_once):
                numbers = range(start, min(start + at_once, len(of.prompts)))
                rows.append(evaluator.measure(sweep.policy, subject, name, setting.guidance, prompts=numbers))
                meter.advance(len(rows[-1]) * passes(setting.steps, setting.guidance))
        tiles = _tiles(sweep, evaluator, setting)
    meter.advance(len(tiles) * passes(setting.steps, setting.guidance))
    sweep.held.check()
    write_gallery(tiles, sweep.folder / "settings" / f"{setting.name}.png")
    table = join(rows)
    write_pictures(table, _file(sweep.folder, setting))
    metric, of = sweep.plan.plan.task.headline_metric, evaluator.sets[VALIDATION]
    value, label = headline(_of_set(table), of, metric, _least(sweep.plan)), sweep.start.metrics[metric].label
    place = f"{setting.entry}, guidance {setting.guidance:g}"
    meter.say(f"{place}: {label} {value:.3f} on {len(table):,} pictures; {meter.rate}")


def _tiles(sweep: Sweep, evaluator: Evaluator, setting: Setting) -> Tensor:
    """The grids' prompts drawn from fixed noise with the weights that are in place, small, (N, 3, H, W)."""
    texts, model = sweep.start.gallery_prompts, sweep.policy.model
    noise = fixed_noise(model, range(len(texts)), GALLERY_SEED)
    pictures = generate(model, texts, noise, setting.steps, setting.guidance, evaluator.batch_size, evaluator.encoded)
    larger = max(pictures.shape[-2:])
    if larger <= SHOWN_SIZE:
        return pictures
    size = [max(1, round(side * SHOWN_SIZE / larger)) for side in pictures.shape[-2:]]
    return functional.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)


def _left(sweep: Sweep, settings: Sequence[Setting]) -> int:
    """Denoiser evaluations of those settings that are not measured yet."""
    missing = [each for each in settings if not _file(sweep.folder, each).exists()]
    return sum(_pictures(sweep.start) * passes(each.steps, each.guidance) for each in missing)


def _pictures(start: Start) -> int:
    """Pictures that are drawn of every setting: those that are measured, and the grids'."""
    return sum(len(each.prompts) * each.images_per_prompt for each in start.sets.values()) + len(start.gallery_prompts)


# ---- what the files say


def _settings(plan: SweepPlan, center: Setting) -> list[Setting]:
    """All settings of a sweep, each once, in the order they are measured in."""
    axes: list[Axis] = ["guidance", "strength", "steps"]
    return list(dict.fromkeys(each for axis in axes for each in plan.on_axis(axis, center)))


def _crossing(plan: SweepPlan, folder: Path) -> tuple[Setting, float] | None:
    """Where the axes cross, and the base's best guidance; None while the guidance axis is not measured.

    Each by the headline on validation prompts; of equal ones the lowest.
    """
    settings = plan.on_axis("guidance", plan.center(plan.guidances[0]))
    if not all(_file(folder, each).exists() for each in settings):
        return None
    task = plan.plan.task
    sign = -1 if task.metric(task.headline_metric).better == "lower" else 1
    inside = swept_sets(task, plan.prompts)[VALIDATION]
    values = {
        each: sign * headline(_of_set(read_pictures(_file(folder, each))), inside, task.headline_metric, _least(plan))
        for each in settings
    }
    ranked = sorted(settings, key=lambda each: (-values[each], each.guidance))
    best = next(each for each in ranked if each.strength)
    return best, next(each for each in ranked if not each.strength).guidance


def _least(plan: SweepPlan) -> int:
    """How many prompts of a kind count for the headline: the task's number, or what the commonest kind has here."""
    tags = swept_sets(plan.plan.task, plan.prompts)[VALIDATION].tags
    return min(plan.plan.task.prompts_per_tag, max(tags.count(tag) for tag in tags))


def _of_set(rows: Pictures) -> Pictures:
    return rows.where(rows.set == VALIDATION)


def _file(folder: Path, setting: Setting) -> Path:
    """Where a setting's rows lie; the file is there once it is measured."""
    return folder / "settings" / f"{setting.name}.csv.gz"
