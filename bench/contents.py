"""What lay at the places that a comparison names when they were first read: what is measured later is of the same.

Its plan has the settings. The base's weights, prompts, a reward's file and the like lie elsewhere, and may be others by
the time that the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.models.base_identity import PartIdentity, compared_part
from dgpo_plugin.prompts.files import prompts_hash
from dgpo_plugin.training.contents import option_values
from dgpo_plugin.training.run import identity_of
from dgpo_plugin.training.trainer import Trainer

from .claim import CONTENTS_FILE, ELSEWHERE, ENTRY_CONTENTS, ContentsChanged
from .evaluate import Evaluator
from .plan import base_file
from .prompt_sets import SampledSet
from .records import read_record, write_record
from .written import AGAIN, read_base


class Contents(BaseModel):
    """What was read, by what it is and its place.

    Attributes:
        base: parts of the untrained model.
        hashes: SHA-256 of everything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, PartIdentity]
    hashes: dict[str, str]

    def changed(self, now: Contents) -> Iterator[str]:
        """What both name and is not the same, for people."""
        for name in sorted({*self.base} & {*now.base}):
            found = compared_part(self.base[name], now.base[name])
            if found.verdict != "the same":
                yield name + (f": {found.detail}" if found.detail else "")
        yield from (name for name in sorted({*self.hashes} & {*now.hashes}) if self.hashes[name] != now.hashes[name])


def hold_to_contents(
    folder: Path,
    trainer: Trainer,
    sets: Mapping[str, SampledSet],
    entry: str | None = None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Find that nothing has changed at the places of a run since they were first read for its comparison or search.

    All processes of a run call it together. What an older version began says nothing, and is believed.

    Args:
        sets: that it is measured on.
        entry: whose run it is; None for the base, which is read first.
        others: hashes of what else is to be the same, by what it is.

    Raises:
        ContentsChanged: names what has.
        UserError: what was written down cannot be read.
    """
    now = _contents(trainer, sets, others or {})

    def hold() -> str:
        shared = folder / CONTENTS_FILE
        own = shared if entry is None else folder / ENTRY_CONTENTS.format(entry)
        for file in {shared, own}:
            if file.exists():
                then = read_record(Contents, file, f"cannot be read; {AGAIN}")
                if changed := "; ".join(then.changed(now)):
                    return changed
        if not own.exists():
            write_record(now, own)
        return ""

    _refuse(folder, trainer.processes.decided_by_main(hold))


def hold_to_metrics(folder: Path, evaluator: Evaluator) -> None:
    """Find that the metrics are those that a comparison's base was measured with, once it is.

    All processes of a run call it together.

    Raises:
        ContentsChanged: names those whose code, package or weights are others.
    """

    def hold() -> str:
        if not base_file(folder).exists():
            return ""
        then, now = read_base(folder).metrics, {name: each.record for name, each in evaluator.measures.items()}
        changed = [
            f"metric {name} (version {then[name].version}, now {now[name].version})"
            for name in sorted({*then} & {*now})
            if not (then[name].missing or now[name].missing)
            and (then[name].version, then[name].weights) != (now[name].version, now[name].weights)
        ]
        return "; ".join(changed)

    _refuse(folder, evaluator.processes.decided_by_main(hold))


def _refuse(folder: Path, changed: str) -> None:
    if changed:
        raise ContentsChanged(f"output {folder}: what it was begun with has changed: {changed}; {ELSEWHERE}")


def _contents(trainer: Trainer, sets: Mapping[str, SampledSet], others: Mapping[str, str]) -> Contents:
    identity, config = identity_of(trainer), trainer.config
    places = dict(option_values(identity.config))
    hashes = {f"prompts.train ({config.prompts.train})": identity.prompts_sha256, **others}
    hashes |= {f"the {name} prompts": prompts_hash(each.prompts) for name, each in sets.items()}
    hashes |= {f"{key} ({places.get(key, '')})": value for key, value in identity.contents.items()}
    own_rewards = [name for label, term in config.judged_by.items() if is_from_file(name := term.name(label))]
    if own_rewards:
        hashes[f"the reward ({', '.join(own_rewards)})"] = identity.rewards_sha256
    base = {f"{config.model.path}'s {name}": part for name, part in identity.base.items()}
    return Contents(base=base, hashes=hashes)
