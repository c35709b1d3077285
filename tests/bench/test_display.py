"""What a person is told while a comparison runs, where output is piped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dgpo_bench import display
from dgpo_bench.display import Display, duration
from dgpo_bench.plan import Event, Forecast

pytestmark = pytest.mark.fast


def test_what_it_will_take_is_said_first_and_kept_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Display(Console(file=out, width=200)) as shown:
        shown.expect(Forecast(runs=2, seconds=600, training=0.91, sampling=0.74))
        now[0] = 30
        shown.listen(Event("dgpo-seed0", 0.05, "iteration 1, reward 0.500", evaluated=False))
        shown.listen(Event("dgpo-seed0", 0.06, "iteration 2, reward 0.500", evaluated=False))
        now[0] = 400  # .5 of a run took 400 s, so the 1.45 left take 1,160: the forecast was wrong
        shown.listen(Event("dgpo-seed0", 0.55, "held-out accuracy 0.700", evaluated=True))
    lines = [line for line in out.getvalue().splitlines() if line]  # old versions of rich end with an empty one
    assert lines == [
        "2 runs, about 10 min here (measured: 0.91 ms per denoiser evaluation in training, 0.74 ms in sampling)",
        "dgpo-seed0               5%  iteration 1, reward 0.500  (about 10 min left)",
        "dgpo-seed0              55%  held-out accuracy 0.700  (about 19 min left)",
    ]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.4, 119, 120, 601)] == ["3 s", "119 s", "2 min", "10 min"]
