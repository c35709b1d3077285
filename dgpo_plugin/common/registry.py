"""Names and what stands behind them: one registry for algorithms, rewards, model families, prompt sets and worlds.

A name stands for ``"package.module:Name"``, imported when it is first used. Other installed packages add names through
entry points (groups ``dgpo_plugin.rewards`` and so on), and ``path/to/file.py:name`` works wherever a name does.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from dgpo_plugin.common.errors import UserError, did_you_mean, in_one_line
from dgpo_plugin.common.user_file import import_from_file, is_from_file


@dataclass(frozen=True)
class Entry:
    """What is known of a name before anything is imported.

    Attributes:
        target: ``package.module:Name``.
        about: for people, in a line.
        needs: modules that must be installed besides, by the extra ``extra``.
        package: who brings it, if not this one.
    """

    target: str
    about: str = ""
    needs: tuple[str, ...] = ()
    extra: str = ""
    package: str = ""

    @property
    def missing(self) -> list[str]:
        """Modules of ``needs`` that are not installed."""
        return [module for module in self.needs if find_spec(module) is None]

    @property
    def install(self) -> str:
        """How to get what is missing; empty if nothing is."""
        return f"needs {', '.join(self.missing)}; pip install 'dgpo-plugin[{self.extra}]'" if self.missing else ""


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """Every name of a kind.

    Args:
        kind: what they are names of, as in ``reward``.
        group: of other packages' entry points, as in ``rewards``.
        own: this package's.
        entry: makes what is known of another package's entry point, from its target and its package.
        hint: what could be named instead, for the message about an unknown name.
    """

    def __init__(
        self, kind: str, group: str, own: Mapping[str, E], entry: Callable[..., E], hint: str = "name a file.py:name"
    ) -> None:
        self.kind = kind
        self.group = group
        self._own = own
        self._entry = entry
        self._hint = hint

    def entries(self) -> dict[str, E]:
        """All of them by name: this package's first, in its order.

        Raises:
            UserError: two packages brought one name.
        """
        found = dict(self._own)
        for point in _installed(f"dgpo_plugin.{self.group}", tuple(sys.path)):
            if point.name in found:
                first = found[point.name].package or "dgpo-plugin"
                raise UserError(
                    f"{self.kind} {point.name!r}: {first} and {_package(point)} both bring one of that name; "
                    f"uninstall one of them, or have it renamed"
                )
            found[point.name] = self._entry(target=point.value, about=f"from {point.value}", package=_package(point))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __contains__(self, name: str) -> bool:
        return name in self.entries()

    def get(self, name: str) -> E:
        """What is known of a name.

        Raises:
            UserError: there is none of that name; with the near one.
        """
        if is_from_file(name):
            return self._entry(target=name, about="your own")
        known = self.entries()
        if name not in known:
            raise UserError(f"no {self.kind} {name!r}{did_you_mean(name, known)}; or {self._hint}")
        return known[name]

    def load(self, name: str) -> Any:
        """What a name stands for, imported.

        Raises:
            UserError: as :meth:`get`; it needs a module that is not installed; or it cannot be imported.
        """
        entry = self.get(name)
        if is_from_file(name):
            return import_from_file(name, self.kind)
        if entry.missing:
            raise UserError(f"{self.kind} {name}: {entry.install}")
        try:
            return imported(entry.target)
        except (Exception, SystemExit) as error:  # whatever another package's code raises
            if not entry.package:
                raise
            raise UserError(
                f"{self.kind} {name}: {entry.target} of the package {entry.package} cannot be imported "
                f"({in_one_line(error)}); mend or uninstall it"
            ) from error


def imported(target: str) -> Any:
    """What ``package.module:Name`` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolved(target: Any) -> Any:
    """What a world or another plug-in gives: named as ``package.module:Name``, or as it is."""
    return imported(target) if isinstance(target, str) else target


@functools.lru_cache
def _installed(group: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Other packages' entry points of a group, by name, read once: every package's metadata is opened for them.

    Args:
        _path: ``sys.path``, which they are looked for on.
    """
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
