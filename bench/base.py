"""The untrained base, measured once per comparison, before anything is trained: the rival of every method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dgpo_plugin.adapters.load import load_base, match_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path
from dgpo_plugin.common.folder_lock import HeldFolder, only_process
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.models.generate import BATCH_SIZE
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.trainer import Trainer

from .contents import hold_to_contents
from .evaluate import Evaluator, Subject, make_evaluator
from .measures import Measure, load_measures, try_measures
from .pictures import Pictures, join, read_pictures, write_pictures
from .plan import Plan, base_file, kept_folder
from .prompt_sets import TEST, VALIDATION, SampledSet, check_prompts, sampled_sets
from .records import Sampling, passes, write_record
from .size import BEST_OF
from .written import (
    MISSING_FILE,
    BaseRecord,
    MissingRecord,
    base_is_measured,
    base_pictures_file,
    missing_metrics,
    read_base,
)


def measure_base(plan: Plan, folder: Path) -> None:
    """Measure the untrained base at every guidance and write what was found, its pictures' rows and its gallery.

    The further pictures of best-of-n come last, when the others are written: cells beside it wait for those alone.

    Raises:
        UserError: prompts that are trained on too, a metric that is not there, or an adapter of another base: nothing
            has been trained or measured by then.
    """
    processes = join_processes(plan.base_config().training.process_timeout)
    with only_main(folder / "base", processes):
        if processes.decided_by_main(lambda: base_is_measured(plan, folder)):
            return
        check_prompts(plan.task)
        _check_adapters(plan)
        trainer, sets = build_trainer(plan.base_config()), sampled_sets(plan.task, plan.size)
        hold_to_contents(folder, trainer, sets)
        missing = _tried(plan, folder, trainer)
        evaluator = evaluator_of(plan, trainer, missing=missing, sets=sets, kept=kept_folder(plan, folder))
        with trainer.policy.as_reference():
            if not processes.decided_by_main(base_file(folder).exists):
                gallery = evaluator.gallery(trainer.policy, plan.guidance)
                record, rows = _measured(plan, trainer, evaluator, gallery)
                processes.on_main(lambda: write_gallery(gallery, folder / "base.png"))
                processes.on_main(lambda: _write(record, rows, folder))
            written = processes.decided_by_main(lambda: read_base(folder))
            if plan.best_of_n and not written.best_of_n:
                more = range(evaluator.sets[TEST].images, BEST_OF)
                further = evaluator.measure(trainer.policy, Subject(), TEST, written.guidance, images=more)
                processes.on_main(lambda: _add_further(plan, written, further, folder))


def _write(record: BaseRecord, rows: Pictures, folder: Path) -> None:
    write_pictures(rows, base_pictures_file(folder))
    write_record(record, base_file(folder))


def _add_further(plan: Plan, record: BaseRecord, further: Pictures, folder: Path) -> None:
    """Write further test pictures of the base beside those that every cell has, and that they are there."""
    rows, least = read_pictures(base_pictures_file(folder)), record.sets[TEST].images_per_prompt
    rows = join([rows.where((rows.set != TEST) | (rows.image < least)), further])  # it may have been cut off in between
    changed = {"best_of_n": True, "denoiser_evaluations": _cost(plan, rows)}
    _write(record.model_copy(update=changed), rows, folder)


def _cost(plan: Plan, rows: Pictures) -> int:
    """Denoiser evaluations of drawing some pictures."""
    return sum(passes(plan.task.sampling.steps, each) for each in rows.guidance.tolist())


def _tried(plan: Plan, folder: Path, trainer: Trainer) -> dict[str, str]:
    """What is missing, as found before, or now on a picture of the model's size."""
    file = folder / MISSING_FILE
    if not trainer.processes.decided_by_main(file.exists):
        size = trainer.model.height, trainer.model.width
        measures = with_what_is_there(plan, evaluator_of(plan, trainer, missing={}), size).measures
        found = {name: measure.record.missing for name, measure in measures.items() if measure.record.missing}
        trainer.processes.on_main(lambda: write_record(MissingRecord(metrics=found), file))
    return trainer.processes.decided_by_main(lambda: missing_metrics(folder))


def _check_adapters(plan: Plan) -> None:
    """Find out that the finished adapters of a plan are for its base, without a trainer's own adapter in place.

    Raises:
        UserError: one is for another base, or matches no weight of it.
    """
    if plan.adapters:
        model = load_base(plan.base_config().model, best_device())
        for path in plan.adapters.values():
            match_adapter(model, Path(path))


@contextlib.contextmanager
def only_main(folder: Path, processes: Processes) -> Iterator[HeldFolder | None]:
    """Hold a folder for the block, as :func:`only_process`, for all processes of a run; the first one alone has it."""
    with contextlib.ExitStack() as stack:
        held: list[HeldFolder] = []
        processes.on_main(lambda: held.append(stack.enter_context(only_process(folder))))
        yield held[0] if held else None


def write_gallery(gallery: Tensor, path: Path) -> None:
    """Write the report's pictures, (N, 3, H, W) in [0, 1], as a row."""
    with atomic_path(path) as temporary:
        image_grid(gallery, columns=len(gallery), gap=4).save(temporary)


def evaluator_of(
    plan: Plan,
    trainer: Trainer,
    *,
    missing: Mapping[str, str],
    sets: Mapping[str, SampledSet] | None = None,
    kept: Path | None = None,
) -> Evaluator:
    """The evaluator that measures all cells of a plan alike.

    Args:
        missing: why optional metrics are missing, by name.
        sets: other prompts than the plan's.
        kept: the folder that every measured picture is kept in; None to keep none.

    Raises:
        UserError: a metric that is not optional is not there.
    """
    sets = sampled_sets(plan.task, plan.size) if sets is None else sets
    loaded = {label: member.reward for label, member in trainer.scorer.rewards.members.items()}
    prompts = prompts_of(plan, sets)
    measures = load_measures(plan.task, trainer.config.scoring, prompts, loaded, missing, list(prompts))
    _agree(measures, trainer.processes)
    evaluator = make_evaluator(
        trainer.policy,
        sets,
        measures,
        steps=plan.task.sampling.steps,
        guidance=plan.guidance,
        batch_size=trainer.config.training.micro_batch_size or BATCH_SIZE,
        processes=trainer.processes,
    )
    return replace(evaluator, kept=kept)


def _agree(measures: Mapping[str, Measure], processes: Processes) -> None:
    """Find out whether all processes have the metrics that the first has.

    Raises:
        UserError: one lacks an optional metric that another has.
    """
    lacks = {name for name, measure in measures.items() if measure.record.missing}
    others = processes.decided_by_main(lambda: lacks) ^ lacks
    told = [f"metric {name}: there in one process and missing in another" for name in sorted(others)]
    processes.fail_together(told[0] if told else None)


def prompts_of(plan: Plan, sets: Mapping[str, SampledSet]) -> dict[str, list[Prompt]]:
    """What each metric judges."""
    found = {
        name: [prompt for each in sets.values() if name in each.metrics for prompt in each.prompts]
        for name in plan.task.metric_names()
    }
    return {name: prompts for name, prompts in found.items() if prompts}


def with_what_is_there(plan: Plan, evaluator: Evaluator, size: tuple[int, int]) -> Evaluator:
    """The evaluator without the optional metrics that cannot judge even noise of a picture's height and width.

    Raises:
        UserError: one that is not optional cannot.
    """
    measures, prompts = dict(evaluator.measures), prompts_of(plan, evaluator.sets)
    wrong = evaluator.processes.decided_by_main(lambda: try_measures(measures, prompts, size))
    for name, reason in wrong.items():
        if not plan.task.metric(name).optional:
            raise UserError(f"task {plan.task.name}, metric {name}, tried on two pictures of noise: {reason}")
        record = measures[name].record.model_copy(update={"missing": reason})
        measures[name] = replace(measures[name], record=record)
    return replace(evaluator, measures=measures)


def best_guidance(
    plan: Plan,
    evaluator: Evaluator,
    policy: Policy,
    subject: Subject,
    seen: Pictures | None = None,
    images: int | None = None,
) -> tuple[float, Pictures]:
    """The guidance of a plan that suits the weights in place best on validation prompts, and the pictures there.

    Args:
        seen: what was measured before, and is not drawn again.
        images: of each prompt; None for as many as the validation set says.
    """
    least = plan.least_prompts(VALIDATION)
    return evaluator.best_guidance(policy, subject, plan.guidances, plan.task.headline_metric, least, seen, images)


def best_checkpoint(plan: Plan, evaluator: Evaluator, pictures: Pictures) -> int | None:
    """The best of a cell's checkpoints by its validation pictures at the curves' guidance; None before the first."""
    least = plan.least_prompts(VALIDATION)
    return evaluator.best_checkpoint(pictures, plan.guidance, plan.task.headline_metric, least)


def _measured(plan: Plan, trainer: Trainer, evaluator: Evaluator, gallery: Tensor) -> tuple[BaseRecord, Pictures]:
    policy, subject = trainer.policy, Subject()
    best, validation = best_guidance(plan, evaluator, policy, subject, images=plan.size.base_validation_images)
    rows = [validation, *(evaluator.finished(policy, subject, each, None) for each in plan.guidances)]
    height, width = gallery.shape[-2:]
    table = join(rows)
    sampling = Sampling(
        sampler="euler",
        steps=plan.task.sampling.steps,
        guidance=plan.guidance,
        guidances=plan.guidances,
        precision=trainer.config.model.precision,
        width=width,
        height=height,
    )
    return (
        BaseRecord(
            guidance=best,
            metrics={name: measure.record for name, measure in evaluator.measures.items()},
            sets={name: each.record() for name, each in evaluator.sets.items()},
            sampling=sampling,
            gallery_prompts=[prompt.text for prompt in evaluator.gallery_prompts],
            denoiser_evaluations=_cost(plan, table),
            best_of_n=evaluator.sets[TEST].images >= BEST_OF,
        ),
        table,
    )
