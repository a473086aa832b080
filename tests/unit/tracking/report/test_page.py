"""The report is one file that says what the events say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from worlds.tracking.events import run_events, write_log

from flwr_hpc.report import main
from flwr_hpc.tracking.redact import redact, redact_text
from flwr_hpc.tracking.report.charts import Curve, gantt, line_chart, nice_step, thin, time_ticks

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects what a page refers to and checks that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str, **want: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in want.items())]


def report(run_dir: Path, events: list[dict[str, Any]], config: str = "") -> str:
    write_log(run_dir / "events.jsonl", events)
    if config:
        (run_dir / "config.yaml").write_text(config)
    assert main([str(run_dir)]) == 0
    return (run_dir / "report.html").read_text()


def test_the_report_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    """It opens on a machine without a network, and from an e-mail."""
    page = Page(text := report(tmp_path, run_events(3, 12)))
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert not [a for _, a in page.tags if a.get("src") or a.get("href")]


def test_the_report_shows_the_numbers(tmp_path: Path) -> None:
    """Losses, totals, failures and every curve and lane are there."""
    text = report(tmp_path, run_events(3, 12))
    page = Page(text)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for facility in summary["facilities"].values():
        assert f"{facility['held_out_loss_last']:.3f}" in text
        assert f"{facility['steps']:,}" in text
    assert "&#39;lm_head.weight&#39; holds NaN" in text
    assert "NODE_FAIL" in text
    assert "resumed once" in text
    assert len(page.all("polyline", **{"data-name": "global"})) == 2
    assert len(page.all("polyline", **{"data-name": "lumi"})) == 4
    phases = {a["class"] for a in page.all("rect") if a.get("data-tip")}
    assert phases == {"queue", "startup", "load", "train", "evaluate", "transfer", "idle"}
    assert len(page.all("line", **{"class": "session"})) == 1


def test_the_report_says_what_codecs_made_of_updates(tmp_path: Path) -> None:
    """Protects the figures by which a codec is chosen; one that leaves nothing out has no error."""
    events = run_events(2, 12)
    assert "codec" not in report(tmp_path, events)
    done = [e for e in events if e["event"] == "order_done"]
    first, other = sorted({e["facility"] for e in done})
    kept, unknown = ([e["metrics"] for e in done if e["facility"] == n] for n in (first, other))
    for number, metrics in enumerate(kept):
        metrics |= {"sent_share": 0.25, "codec_error": 0.05 if number == 1 else 0.02}
    for metrics in unknown:
        metrics["sent_share"] = 0.5
    page = Page(text := report(tmp_path, events))
    told = json.loads((tmp_path / "summary.json").read_text())["facilities"]
    mean = round(0.02 + 0.03 / len(kept), 6)
    errors = {"error_last": 0.02, "error_mean": mean, "error_max": 0.05}
    assert told[first]["codec"] == {"orders": len(kept), "sent_share": 0.25, **errors}
    assert told[other]["codec"] == {"orders": len(unknown), "sent_share": 0.5}
    row = re.sub(r"\s+", " ", text)
    shown = f"<td>25.00 %</td> <td>2.00 %</td><td>{100 * mean:.2f} %</td><td>5.00 %</td>"
    assert shown in row
    assert "<td>50.00 %</td> <td>–</td><td>–</td><td>–</td>" in row  # noqa: RUF001
    assert "codec left out" in text
    lines = [len(page.all("polyline", **{"data-name": name})) for name in (first, other)]
    assert lines == [5, 4]


def test_the_report_says_how_inexact_averaged_adapters_were(tmp_path: Path) -> None:
    """Protects the figure of a run with LoRA; one of whole models has none."""
    events = run_events(2, 3)
    assert "LoRA" not in report(tmp_path, events)
    assert json.loads((tmp_path / "summary.json").read_text())["lora_inexactness"] is None
    versions = [e for e in events if e["event"] == "aggregated"]
    for event, value in zip(versions, (0.5, 0.25, 0.125), strict=True):
        event["lora_inexactness"] = value
    text = report(tmp_path, events)
    assert "12.50%" in text
    assert "mean 29.17%, most 50.00%" in text
    found = json.loads((tmp_path / "summary.json").read_text())["lora_inexactness"]
    assert found == {"last": 0.125, "mean": pytest.approx(0.875 / 3), "max": 0.5, "unknown": None}
    for event in versions:
        event["lora_inexactness_removed"] = 0.08
    assert "8.00% in the mean without the strategy" in report(tmp_path, events)
    for event in versions:
        event |= {"lora_inexactness": None, "lora_inexactness_unknown": "Krum picks one"}
    assert "Krum picks one" in report(tmp_path, events)


def test_positions_in_a_chart_give_back_the_numbers() -> None:
    """The tooltips read values out of the drawn line; that must lose nothing to see."""
    chart = line_chart("version", [Curve("a", 0, [(0, 5.1234), (3, 2.3456)])])
    assert chart
    x, y = map(float, chart.lines[0][2].split()[1].split(","))
    (x0, x1), (y0, y1) = chart.x_range, chart.y_range
    assert x0 + (x - chart.left) / (chart.right - chart.left) * (x1 - x0) == pytest.approx(3)
    value = y0 + (chart.bottom - y) / (chart.bottom - chart.top) * (y1 - y0)
    assert value == pytest.approx(2.3456, abs=5e-4)


def test_one_facility_needs_no_global_curve(tmp_path: Path) -> None:
    """Its own curve is the global one."""
    page = Page(report(tmp_path, run_events(1, 3)))
    assert not page.all("polyline", **{"data-name": "global"})
    assert len(page.all("polyline")) == 4


def test_a_run_that_failed_at_once_says_so(tmp_path: Path) -> None:
    """No order, no curve, and still a page and a summary with the reason."""
    start, end = run_events(2, 0)[0], {"t": 1.0, "s": 3.0, "event": "run_finished"}
    text = report(tmp_path, [start, {**end, "status": "failed", "error": "line 17 <is> bad"}])
    Page(text)
    assert "line 17 &lt;is&gt; bad" in text
    assert "No loss was recorded" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "line 17 <is> bad")


def test_a_run_that_goes_on_can_be_reported(tmp_path: Path) -> None:
    """Whatever the moment at which the log ends."""
    events = run_events(2, 4)
    for cut in range(1, len(events), 7):
        Page(report(tmp_path, events[:cut]))
    assert "running" in (tmp_path / "report.html").read_text()


def test_a_long_run_stays_a_small_file(tmp_path: Path) -> None:
    """Thousands of orders are merged to what can be seen."""
    text = report(tmp_path, run_events(8, 400, progress=5))
    assert len(text) < 1_500_000
    shown = [a for a in Page(text).all("rect") if a.get("data-tip")]
    assert {a["class"] for a in shown} >= {"train", "transfer", "queue", "idle"}


def test_names_and_reasons_cannot_inject_markup(tmp_path: Path) -> None:
    """What a remote site says is text."""
    events = run_events(1, 2, reject_at=None)
    events[3:3] = [{**events[3], "event": "order_failed", "reason": '"><script>alert(1)</script>'}]
    text = report(tmp_path, events, config="x: <script>alert(2)</script>\n")
    assert len(Page(text).all("script")) == 1


def test_secrets_of_the_configuration_are_masked(tmp_path: Path) -> None:
    """A report may be shared, the token in a job's environment may not."""
    config = "env: {HF_TOKEN: hf_abc, N: 1}\ntokenizer: byte\nsetup: ['export WANDB_API_KEY=xyz']\n"
    text = report(tmp_path, run_events(1, 1), config)
    assert "hf_abc" not in text
    assert "xyz" not in text
    assert "tokenizer: byte" in text
    assert redact({"A": {"MY_SECRET": "s", "n": 1}, "b": ["X_TOKEN=t"]}) == {
        "A": {"MY_SECRET": "***", "n": 1}, "b": ["X_TOKEN=***"],
    }  # fmt: skip
    assert redact_text("token: null") == "token: null"


def test_the_place_of_the_model_survives_a_rebuild(tmp_path: Path) -> None:
    """The log does not know it; the summary that the run wrote does."""
    (tmp_path / "summary.json").write_text('{"model": "/m", "status": "old", "note": 1}')
    report(tmp_path, run_events(1, 1))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["model"], summary["status"], summary["note"]) == ("/m", "finished", 1)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"]
)
def test_the_trained_model_is_found(tmp_path: Path, name: str) -> None:
    """The summary says where it lies, once it was written."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("{}")  # without its index
    report(tmp_path, run_events(1, 1))
    assert json.loads((tmp_path / "summary.json").read_text())["model"] is None
    (tmp_path / "model" / name).write_text("{}")
    report(tmp_path, run_events(1, 1))
    model = json.loads((tmp_path / "summary.json").read_text())["model"]
    assert model == str(tmp_path / "model")


@pytest.mark.parametrize("case", ["missing", "no log", "empty log", "parent"])
def test_a_wrong_folder_gets_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Exit code 2 and what to do, no traceback."""
    folder = tmp_path / "runs"
    if case != "missing":
        folder.mkdir()
    if case == "empty log":
        (folder / "events.jsonl").write_text("")
    if case == "parent":
        write_log(folder / "2026-01-01_000000" / "events.jsonl", run_events(1, 1))
    assert main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    expected = {"missing": "no run directory", "empty log": "no event"}
    assert expected.get(case, "not a run directory") in message
    assert (f"python -m flwr_hpc.report {folder}/2026" in message) == (case == "parent")
    assert not (folder / "report.html").exists()


def test_the_command_is_light() -> None:
    """Help comes without torch, wandb or Flower."""
    code = (
        "import sys, flwr_hpc.report, flwr_hpc.tracking.wandb_writer, flwr_hpc.tracking.live\n"
        "print([m for m in ('torch', 'wandb', 'flwr', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ticks_are_round_numbers() -> None:
    """Axes read well from seconds to weeks."""
    assert nice_step(4.3, 5) == 1
    assert time_ticks(3.2)[0][:3] == [0, 1, 2]
    assert time_ticks(2200)[1:] == (60, "minutes")
    assert time_ticks(20 * 86400)[1:] == (86400, "days")
    for end in (0.01, 0.5, 5, 61, 3601, 1e5, 1e7):
        assert 2 <= len(time_ticks(end)[0]) <= 11


def test_thinning_keeps_start_and_size() -> None:
    """A noisy curve becomes the means over its neighbourhoods."""
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    kept = thin(points, 100)
    assert len(kept) <= 101
    assert kept[0] == points[0]
    assert all(0.4 < y < 0.6 for _, y in kept[1:])
    assert thin(points[:50], 100) == points[:50]


def test_dense_timelines_keep_every_phase_in_proportion() -> None:
    """Where intervals are narrower than a pixel, shares are stacked."""
    intervals = [(i * 1.0, i + f, p) for i in range(1000) for f, p in ((1.0, "train"),)]
    intervals = [
        part
        for s, _, _ in intervals
        for part in ((s, s + 0.75, "train", ""), (s + 0.75, s + 1, "transfer", ""))
    ]
    chart = gantt([("a", [intervals], [])], 1000.0)
    assert chart
    area = {"train": 0.0, "transfer": 0.0}
    for band in chart.rows[0].bands:
        area[band.phase] += band.width * band.height
    assert area["transfer"] / sum(area.values()) == pytest.approx(0.25, abs=0.01)
    assert gantt([("a", [[(0, 5, "idle", "")]], [])], 5.0) is None
