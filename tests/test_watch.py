"""A run watched from beside: the page says what is on disk, reloads itself until it is final, and disturbs nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from browser import Browser
from conftest import make_pico_values
from deme_diffusion import artefacts
from deme_diffusion.artefacts import MANIFEST, WORK, Artefact, Onlooker, Store
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.watching import Tail, Watched, watch, watched
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.recipes.checks import parse
from test_cli import NO_NETWORK_NO_TORCH, Deme, deme, outside  # noqa: F401  (fixture)

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Path:
    """The folder of a finished pico run; read only."""
    values = make_pico_values(pico_pipeline) | {"description": "<script>alert(1)</script>"}
    run = open_run(Loaded(parse(values, where="test"), {}), out=tmp_path_factory.mktemp("watch") / "runs" / "pico")
    run.execute()
    run.report()
    return run.folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy of it."""
    shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True)
    return open_run(load(str(tmp_path / "runs" / "pico")), download=False)


def stage(run: Run, label: str) -> Node:
    return next(node for node in run.graph.nodes if node.label.startswith(label))


def undone(run: Run, *labels: str) -> list[Node]:
    """The stages of these labels and all that is made from them, taken away."""
    gone: list[Node] = []
    for node in run.graph.nodes:
        if node.label.startswith(labels) or any(parent in gone for parent in node.parents.values()):
            shutil.rmtree(run.store.folder(node.key))
            gone.append(node)
    return gone


def begin(run: Run, node: Node, **files: str) -> Path:
    """A stage under way that has written so much."""
    folder = run.store.folder(node.key)
    for name, text in {f"{WORK}/seconds.json": '{"seconds": 7}', **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def begun_again(run: Run) -> None:
    """As `deme run` does, which has not ended."""
    run.whole = True
    run.prepare()
    run.whole = False


def page(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


def row(run: Run, label: str) -> str:
    """What the progress says of a stage."""
    found = re.search(rf"<tr[^>]*><th[^>]*>{re.escape(label)}[^<]*</th>.*?</tr>", page(run))
    assert found, label
    return re.sub(r"<[^>]+>", " ", found[0])


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    kept = (path for path in files if path.name != "report.html" and path.parent.name != "figures")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}


def test_finished_run_is_written_once_and_does_not_reload(run: Run) -> None:
    assert watch(run, 1, sleep=lambda _: pytest.fail("there is nothing to wait for")) == "final"
    assert REFRESH not in page(run) and 'id="progress"' not in page(run)


def test_page_of_a_run_that_goes_on(run: Run) -> None:
    gone = undone(run, "expert 1", "sample base DDPM")
    losses = [json.dumps({"step": step, "denoising": 0.5, "own": 1}) for step in (1, 2)]
    begin(run, stage(run, "expert 1"), **{"loss.jsonl": "\n".join(losses) + '\n{"step": 3, "deno'})
    begin(run, stage(run, "sample base DDPM"), **{f"{WORK}/sampled.json": '{"done": 12}'})
    before = everything(run.folder.parent)
    assert watched(run, 3).write() is False
    assert everything(run.folder.parent) == before
    assert f'{REFRESH} content="3">' in page(run)
    assert "running" in row(run, "expert 1 [10,20)") and "2 of 2 steps" in row(run, "expert 1 [10,20)")
    assert "12 of 16 images" in row(run, "sample base DDPM")
    assert "done" in row(run, "expert 0 [0,10)") and "waiting" in row(run, "merged")
    assert len(gone) > 5 and page(run).count('<tr class="waiting">') == len(gone) - 2
    assert "expert 1 [10,20)" in page(run).partition('id="curves"')[2].partition("</section>")[0]


def test_rows_that_are_measured_are_in_the_table(run: Run) -> None:
    undone(run, "expert 1")
    run.merged.unlink()  # as before the run has merged anything
    watched(run, 1).write()
    table = page(run).partition('id="table"')[2].partition("</section>")[0]
    assert 'data-model="all-timesteps"' in table and 'data-model="merged"' not in table
    assert "loss" in table and "latency" not in table
    assert "from_pretrained" not in page(run)


def test_trials_of_a_search_are_shown_as_they_come(run: Run) -> None:
    (search,) = run.graph.searches.values()
    undone(run, search.label)
    trials = [{"objective": "FD", "kind": "value", "values": [i / 8, 0.25], "answer": 9.0 - i} for i in range(3)]
    lost = {"objective": "FD", "kind": "value", "values": [9, 9], "answer": None, "reason": "NaN"}
    lines = "".join(json.dumps(trial) + "\n" for trial in [*trials, lost])
    begin(run, search, **{"search.jsonl": lines + '{"objec'})
    watched(run, 1).write()
    assert "4 evaluations" in row(run, search.label)
    assert "evaluation 3" in page(run) and "7.000" in page(run) and "(chosen)" not in page(run)


def test_cells_of_a_landscape_are_counted(run: Run) -> None:
    run = open_run(load(str(run.folder), ["analyze.figures=[landscape]"]))
    cells = [{"a": [0, 1, 2], "b": [0, 1]}, {"cell": [0, 0], "losses": [1]}, {"cell": [0, 1], "losses": [1]}]
    folder = begin(run, stage(run, "loss landscape"))
    (folder / WORK / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    begun_again(run)
    assert watched(run, 1).write() is False
    assert "2 of 6 cells" in row(run, "loss landscape")


def test_a_run_that_ended_stays_so_whatever_was_asked_of_it_since(run: Run) -> None:
    """Though a figure of it failed, and another command wrote into run.json."""
    run = open_run(load(str(run.folder), ["analyze.figures=[landscape]"]))
    begun_again(run)
    run.execute(lambda graph: list(graph.merged.values()))
    assert watched(run, 1).write() is False
    run.whole = True
    run.report()
    made = open_run(load(str(run.folder)), download=False)
    made.execute(lambda graph: list(graph.merged.values()))
    written = json.loads((run.folder / "run.json").read_text())
    assert written["finished"] == run.ended
    assert watch(made, 1, sleep=lambda _: pytest.fail("there is nothing to wait for")) == "final"
    assert REFRESH not in page(run) and 'id="progress"' not in page(run)


def test_where_nothing_runs_the_watching_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    undone(run, "expert 1")
    folder = begin(run, stage(run, "expert 1"), **{"loss.jsonl": '{"step": 1, "denoising": 1}'})
    rounds: list[float] = []

    def later(_: float) -> None:
        rounds.append(1)
        assert REFRESH in page(run)
        if len(rounds) == 2:
            lock.release()

    lock = FileLock(f"{folder}.lock")
    lock.acquire()
    assert watched(run, 1).write() is False
    monkeypatch.setattr("deme_diffusion.pipeline.watching.STILL", -1.0)
    assert watch(run, 1, sleep=later) == "still"
    assert len(rounds) == 2 and REFRESH not in page(run) and "waiting" in row(run, "expert 1 [10,20)")


def test_figures_alone_that_nobody_makes_leave_a_final_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(load(str(run.folder), ["analyze.figures=[landscape]"]))
    begun_again(run)
    monkeypatch.setattr("deme_diffusion.pipeline.watching.STILL", -1.0)
    assert watch(run, 1, sleep=lambda _: pytest.fail("there is nothing to wait for")) == "still"
    assert REFRESH not in page(run) and 'id="progress"' not in page(run)


def test_watching_ends_with_the_run(run: Run) -> None:
    whole, rounds = run.store.root.with_name("whole"), []
    shutil.copytree(run.store.root, whole)
    gone = undone(run, "expert 1")

    def another(seconds: float) -> None:
        """Each round the run in the other process makes the next stages."""
        assert seconds >= 5 and REFRESH in page(run)
        rounds.append(page(run).count('<tr class="done">'))
        for node in [gone.pop(0) for _ in gone[:6]]:
            folder = run.store.folder(node.key)
            shutil.copytree(whole / folder.relative_to(run.store.root), folder)

    assert watch(run, 5, sleep=another) == "final"
    assert not gone and rounds == sorted(set(rounds)) and REFRESH not in page(run)


def test_ctrl_c_leaves_a_page_that_no_longer_reloads(run: Run) -> None:
    undone(run, "expert 1")

    def interrupted(_: float) -> None:
        assert REFRESH in page(run)
        raise KeyboardInterrupt

    assert watch(run, 1, sleep=interrupted) == "interrupted"
    assert REFRESH not in page(run) and 'id="progress"' in page(run)


def test_what_is_half_written_is_tried_again_and_told_if_it_stays_so(run: Run) -> None:
    undone(run, "cost")
    metrics = next(run.store.root.glob("evaluate/*/metrics.json"))
    text, times = metrics.read_text(), []
    size = len(text)
    metrics.write_text("{" + " " * (size - 1))  # as long as the manifest says

    def mended(_: float) -> None:
        times.append(1)
        if len(times) == 2:
            metrics.write_text(text)
        elif len(times) == 3:
            raise KeyboardInterrupt

    assert watch(run, 1, sleep=mended) == "interrupted"
    metrics.write_text("{" + " " * (size - 1))
    with pytest.raises(ValueError):
        watch(run, 1, sleep=lambda _: None)


def test_onlooker_takes_no_lock_and_mends_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    node = stage(run, "expert 0")
    (run.store.folder(node.key) / MANIFEST).write_text("{")

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(artefacts, "try_lock", refused)
    assert Onlooker(run.store.root).find(node.key) is None
    assert Onlooker(run.store.root).is_held(node.key) is False
    assert (run.store.folder(node.key) / MANIFEST).read_text() == "{"
    assert watched(run, 1).write() is False
    found = Onlooker(run.store.root).find(stage(run, "expert 1").key)
    assert isinstance(found, Artefact) and found.results["weights"]


def test_silent_stage_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    undone(run, "expert 1")
    begin(run, stage(run, "expert 1"))
    monkeypatch.setattr("deme_diffusion.pipeline.watching.QUIET", -1.0)
    watched(run, 1).write()
    assert "0 of 2 steps, silent for 0 min" in row(run, "expert 1 [10,20)")


def test_tail_reads_whole_lines_once_and_begins_anew_where_a_file_shrank(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "loss.jsonl")
    assert tail.read() == []
    tail.path.write_text('{"step": 1}\nbroken\n[1]\n{"step": 2}\n{"st')
    assert tail.read() == [{"step": 1}, {"step": 2}]
    with tail.path.open("a") as file:
        file.write('ep": 3}\n')
    assert [record["step"] for record in tail.read()] == [1, 2, 3]
    tail.path.write_text('{"step": 1}\n')
    assert tail.read() == [{"step": 1}]


def test_run_is_watched_while_another_process_makes_it(pico_pipeline: Path, tmp_path: Path) -> None:
    values = make_pico_values(pico_pipeline)
    made = open_run(Loaded(parse(values, where="test"), {}), out=tmp_path / "runs" / "pico")
    made.prepare()
    seen: list[bool] = []

    def work(_: float) -> None:
        seen.append(REFRESH in page(made))
        made.execute()
        made.report()

    assert watch(open_run(load(str(made.folder))), 1, sleep=work) == "final"
    assert seen == [True] and REFRESH not in page(made) and 'data-model="merged"' in page(made)


def test_reload_and_name_in_a_browser(run: Run, browser: Browser) -> None:
    undone(run, "expert 1")
    watched(run, 1).write()
    browser.resize(360)
    browser.open(run.folder / "report.html")
    assert browser.run("return document.querySelector('.lead').textContent.trim()") == "<script>alert(1)</script>"
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    text = page(run).replace(f'{REFRESH} content="1">', "").replace("<h1>", "<h1>final ")
    (run.folder / "report.html").write_text(text, encoding="utf-8")
    heading: Callable[[Any], bool] = lambda _: "final" in browser.run("return document.querySelector('h1').textContent")  # noqa: E731
    from selenium.webdriver.support.wait import WebDriverWait

    assert WebDriverWait(browser.driver, 10).until(heading)
    assert browser.errors() == []


# the command


def test_report_imports_no_torch_and_computes_nothing(run: Run) -> None:
    for name in ("report.html", "table.json", "model_card.md"):
        (run.folder / name).unlink()
    before = everything(run.store.root)
    for words in (["report", str(run.folder)], ["report", str(run.folder), "--watch"]):
        done = outside(*words, script=NO_NETWORK_NO_TORCH, cwd=run.folder)
        assert done.returncode == 0, done.stderr
    assert all((run.folder / name).is_file() for name in ("report.html", "table.json", "model_card.md"))
    assert everything(run.store.root) == before


def test_missing_figures_do_not_stop_the_report(
    deme: Deme,  # noqa: F811
    run: Run,
) -> None:
    run = open_run(load(str(run.folder), ["analyze.figures=[plane]"]))
    begun_again(run)
    assert deme("report", run.folder).status == 0
    assert "deme analyze" in page(run)
    assert watched(run, 1).write() is False  # the run may be at it


def test_refusals(deme: Deme, run: Run, tmp_path: Path) -> None:  # noqa: F811
    there = run.folder
    assert deme("report", there.parent / "pica", "--watch").refusal.endswith("no such run folder; did you mean 'pico'?")
    assert deme("report", there.parent / "zzzzz").refusal.endswith("no such run folder; beside it there is pico")
    assert deme("report", "digits", "--watch").refusal.startswith("runs/digits: no such run folder")
    assert deme("report", there, "--watch", "--json").refusal.startswith("--watch and --json: ")
    assert deme("report", there, "--watch", "--export", "x").refusal.startswith("--watch and --export: ")
    assert deme("report", there, "--every", "3").refusal == "--every 3: says nothing without --watch"
    assert deme("report", there, "--export", "x", "--out", "y").refusal.startswith("--export and --out: ")
    assert deme("report", there, there, "--watch").refusal == "--watch: of one run, and 2 are given"
    assert deme("report", there, "--out", tmp_path).refusal.startswith(f"--out {tmp_path}: a folder")
    assert "--every" in deme("report", there, "--watch", "--every", "0").refusal
    (there / "run.json").unlink()
    assert deme("report", there, "--watch").refusal.startswith(f"{there}: no run.json in it, so no run has begun")


def test_page_goes_elsewhere_as_well(deme: Deme, run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "sent" / "page.html"
    assert str(out) in deme("report", run.folder, "--out", out).out
    assert json.loads(deme("report", run.folder, "--json", "--out", out).out)
    assert out.read_bytes() == (run.folder / "report.html").read_bytes()


def test_watched_is_evidence_of_a_store_that_is_only_looked_at(run: Run) -> None:
    seen = watched(run)
    assert isinstance(seen, Watched) and isinstance(seen.store, Onlooker) and isinstance(run.store, Store)
    with pytest.raises(UserError):
        open_run(load(str(run.folder / "nothing")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": "abc"}, "seconds of the stage expert 0 [0,10) is 'abc'; a number is expected"),
        ({"steps": [1]}, "steps of the stage expert 0 [0,10) is [1]; a number is expected"),
        ({"digest": None}, ""),
        (None, "stages is dict, where a list of stages is expected"),
    ],
)
def test_a_record_that_was_edited_is_told_or_passed_over(
    deme: Deme,  # noqa: F811
    run: Run,
    change: dict[str, Any] | None,
    said: str,
) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    entry = next(entry for entry in record["stages"] if entry["label"].startswith("expert 0"))
    entry |= change or {}
    (run.folder / "run.json").write_text(json.dumps(record if change else {**record, "stages": {}}))
    done = deme("report", run.folder)
    assert said in done.err if said else done.status == 0
    assert watched(run, 1).write() is True
    run.execute()  # which writes it anew
    assert run.recorded()[stage(run, "expert 0").digest]["seconds"] > 0


def test_only_a_whole_run_is_how_it_was_made(run: Run) -> None:
    values = load(str(run.folder)).recipe
    begun = open_run(Loaded(values, {}), out=run.folder, command="deme run pico.yaml", download=False)
    begun.execute()
    for command, loaded in (
        ("deme analyze pico.yaml", Loaded(values, {})),
        ("deme decouple runs/pico", load(str(run.folder))),
    ):
        other = open_run(loaded, out=run.folder, command=command, download=False)
        other.execute(lambda graph: list(graph.merged.values()))
    again = open_run(load(str(run.folder)), command="deme run runs/pico", download=False)
    again.execute()
    content = again.content(again.rows())
    assert content["command"] == "deme run pico.yaml" == json.loads((run.folder / "run.json").read_text())["command"]
    assert content["rerun"] == f"deme run {run.folder}" and content["folder"] == str(run.folder)
    record = json.loads((run.folder / "run.json").read_text()) | {"command": "deme analyze pico.yaml"}
    (run.folder / "run.json").write_text(json.dumps(record))
    assert again.content(again.rows())["command"] == ""


def test_paths_of_a_page_do_not_depend_on_the_working_directory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent)
    seen = open_run(load("pico"), download=False)
    content = seen.content(seen.rows())
    assert content["merged_path"] == str(run.merged) and content["rerun"] == f"deme run {run.folder}"
