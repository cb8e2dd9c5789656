"""Several runs side by side, and the merged model of one in a folder to upload."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import Browser
from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.clean_up import clean, referenced
from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError
from deme_diffusion.figure_file import write_figure
from deme_diffusion.pipeline import exporting
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, load, to_yaml
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.cells import Row
from deme_diffusion.report.compare import MOST_RUNS, comparison, names
from deme_diffusion.report.compare_page import render_comparison
from deme_diffusion.weights import WEIGHTS_NAME, load_state
from test_cli import Deme, deme  # noqa: F401  (fixture)

HOSTILE = "<script>alert(1)</script>"


# contents made by hand


def figure(mean: float | None, seeds: Sequence[int] = (0,), values: Sequence[float] = (), **protocol: Any) -> Any:
    made = {"mean": mean, "spread": 0.1 if values else None, "n": 100, "seeds": list(seeds), "protocol": protocol}
    return {**made, **({"values": list(values)} if values else {})}


def row(model: str, **metrics: Any) -> Row:
    return {"model": model, "metrics": {name.replace("_", " "): f for name, f in metrics.items()}}


def content(folder: str, rows: list[Row], values: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What a page is made of, without pictures."""
    halves = [[[0, 500]], [[500, 1000]]]
    recipe = Recipe.model_validate({"name": "toy", "model": {"pretrained": "base"}, **(values or {})})
    found = {
        "folder": folder, "recipe": "toy", "demonstration": False, "recipe_yaml": to_yaml(recipe), "table": rows,
        "outcome": "merged", "command": "deme run toy", "rerun": f"deme run {folder}", "cost_machine": None,
        "loss_ranges": halves, "figures": [], "grids": {},
        "division": {"num_train_timesteps": 1000, "subsets": halves}, "weights": {"merged": [0.25, 0.75]},
    }  # fmt: skip
    return {**found, **more}


def scored(base: float, merged: float, **protocol: Any) -> list[Row]:
    return [row("base", FD=figure(base, **protocol)), row("merged", FD=figure(merged, **protocol))]


def metric(told: Mapping[str, Any], name: str) -> Any:
    return next(line for line in told["metrics"] if line["metric"] == name)


def cells_of(page: str, name: str) -> list[str]:
    """The cells of one line of the results, their texts; `*` before what is bold."""
    found = re.search(rf'<tr[^>]*><th scope="row" role="rowheader">{re.escape(name)}\b.*?</tr>', page, re.DOTALL)
    assert found, name
    texts = re.findall(r'<td role="cell"[^>]*>(.*?)</td>', found[0], re.DOTALL)
    return [re.sub(r"<[^>]+>", "", text.replace("<b>", "*")) for text in texts]


def test_only_settings_that_differ_are_told() -> None:
    one = content("a", [], {"merge": {"search": "none"}, "description": "one"})
    samplers = [{"num_inference_steps": 20}, {"name": "DDPMScheduler", "num_inference_steps": 50}]
    two = content("b", [], {"merge": {"search": "none"}, "seeds": [0, 1], "evaluate": {"samplers": samplers}})
    told = {entry["key"]: entry["values"] for entry in comparison([one, two])["settings"]}
    assert told["seeds"] == [[0], [0, 1]]
    assert told["evaluate.samplers.0.num_inference_steps"][1] == 20
    assert not {"description", "name", "merge.search"} & told.keys()
    assert comparison([one, one])["settings"] == []
    assert "The recipes have the same settings." in render_comparison([one, {**one, "folder": "b"}])


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert names([content("/x/a", []), content("/x/b", [])]) == ["a", "b"]
    assert names([content("/x/a", []), content("/y/a", [])]) == ["x/a", "y/a"]


def test_difference_is_of_base_and_outcome_and_the_best_is_bold() -> None:
    runs = [content("a", scored(10.0, 9.0, n=100)), content("b", scored(10.0, 8.0, n=100))]
    line = metric(comparison(runs), "FD")
    assert [one["difference"] for one in line["runs"]] == [{"mean": -1, "margin": None}, {"mean": -2, "margin": None}]
    assert line["unlike"] == {}
    minus = "\N{MINUS SIGN}"
    assert cells_of(render_comparison(runs), "FD") == ["10.00", "9.00", f"{minus}1.0", "10.00", "*8.00", f"{minus}2.0"]


def test_paired_seeds_give_the_difference_its_margin() -> None:
    base = row("base", FD=figure(10.0, [0, 1, 2], [9.0, 10.0, 11.0]))
    merged = row("merged", FD=figure(9.0, [0, 1, 2], [8.1, 9.0, 9.9]))
    difference = metric(comparison([content("a", [base, merged]), content("b", [base])]), "FD")["runs"][0]["difference"]
    assert difference["mean"] == pytest.approx(-1.0)
    assert difference["margin"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # Student's t, 2 degrees


def test_metrics_of_unlike_protocols_are_not_compared_and_the_note_says_why() -> None:
    runs = [content("a", scored(10, 9, n=2000, sampler="DDIM")), content("b", scored(10, 8, n=500, sampler="DDIM"))]
    assert metric(comparison(runs), "FD")["unlike"] == {"n": [2000, 500]}
    page = render_comparison(runs)
    assert "*" not in "".join(cells_of(page, "FD")) and "<sup>a</sup>" in page
    assert "they were not measured alike (FD): n: 2,000 (a), 500 (b)." in page


def test_times_are_compared_on_a_machine_that_is_known_to_be_the_same() -> None:
    rows = [[row("merged", **{"latency": figure(ms, batch=1)})] for ms in (2.0, 1.0)]
    machines = [("2 x A", "2 x A"), ("2 x A", "2 x B"), ("2 x A", None), (None, None)]
    told = []
    for pair in machines:
        runs = [content(n, r, cost_machine=m) for n, r, m in zip("ab", rows, pair, strict=True)]
        told.append(metric(comparison(runs), "latency")["unlike"])
        page = render_comparison(runs)
        assert ("*1.00" in cells_of(page, "latency")) == (pair == machines[0])
        assert ('class="unlike"' in page) == (pair != machines[0])
    assert told == [{}, *({"machine": [one or "unknown" for one in pair]} for pair in machines[1:])]
    assert "(latency): machine: unknown (a,b)" in page
    alone = [content("a", rows[0]), content("b", scored(1, 2))]
    assert metric(comparison(alone), "latency")["unlike"] == {}


def test_metric_that_a_run_lacks_is_a_dash_and_no_reason_not_to_compare() -> None:
    three = [content(name, scored(10, 9 - i, n=1)) for i, name in enumerate("ab")] + [content("c", [row("base")])]
    page = render_comparison(three)
    assert cells_of(page, "FD")[6:] == ["\N{EN DASH}"] * 3 and cells_of(page, "FD")[4] == "*8.00"
    assert "not measured alike" not in page


def test_ensemble_is_compared_where_nothing_is_merged() -> None:
    rows = [row("base", FD=figure(10, n=1)), row("ensemble", FD=figure(7, n=1))]
    runs = [content("a", scored(10, 9, n=1)), content("b", rows, outcome="ensemble", weights={})]
    page = render_comparison(runs)
    assert cells_of(page, "FD")[4] == "*7.00" and "served as a timestep-routed ensemble" in page


def test_losses_by_range_are_told_for_each_run_and_not_mixed() -> None:
    rows = [
        row("base", loss=figure(1.0, n=4), **{"loss [0,500)": figure(2.0), "loss [500,1000)": figure(0.5)}),
        row("merged", loss=figure(0.9, n=4), **{"loss [0,500)": figure(1.9), "loss [500,1000)": figure(0.51)}),
    ]
    whole = [[[0, 100]]]
    other = [row("base", **{"loss [0,100)": figure(4.0)}), row("merged", **{"loss [0,100)": figure(3.0)})]
    division = {"num_train_timesteps": 100, "subsets": whole}
    runs = [content("a", rows), content("b", other, division=division, loss_ranges=whole, weights={"merged": [1.0]})]
    assert [line["metric"] for line in comparison(runs)["metrics"]] == ["loss"]
    page = render_comparison(runs)
    assert "a \N{MINUS SIGN}5.0 % on [0,500), +2.0 % on [500,1000); b \N{MINUS SIGN}25 % on [0,100)" in page
    assert page.count("<td>\N{MINUS SIGN}5.0 %</td>") == 1


@pytest.mark.parametrize("count", [2, MOST_RUNS])
def test_page_keeps_its_budget_and_asks_for_nothing(count: int, tmp_path: Path) -> None:
    runs = []
    for i in range(count):
        folder = tmp_path / f"run {i}"
        (folder / "figures").mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 255, (500, 700, 3), np.uint8)
        Image.fromarray(noise).save(folder / "figures" / "plane.png")
        (folder / "figures" / "plane.svg").write_text("<svg/>" + " " * 400_000)
        told = {"kind": "plane", "name": "plane", "title": HOSTILE, "caption": "c", "alt": '"', "width": 7, "height": 5}
        told |= {"svg": "figures/plane.svg", "png": "figures/plane.png", "data": []}
        runs.append(content(str(folder), scored(10, 9, n=1), figures=[told] if i else []))
    page = render_comparison(runs)
    assert len(page.encode()) <= 5_000_000
    assert 1 <= page.count("data:image/png") <= count - 1  # of noise, which no PNG makes smaller
    assert f"deme analyze &#39;{tmp_path}/run 0&#39; --figure plane" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page
    assert ("To keep this page small" in page) == (count == MOST_RUNS)


def test_comparison_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    rows = [*scored(12345.678, 9.0, n=1, reference="x" * 200), row("soup", FD=figure(1.0))]
    long = "a-run-of-a-very-long-name-that-goes-on-" * 3
    runs = [content(f"/runs/{HOSTILE.replace('/', '')}", rows), content(f"/runs/{long}", scored(1, 2, n=2))]
    runs += [content(f"/runs/{i}", scored(i, 1, n=1), {"seeds": list(range(i))}) for i in range(1, 7)]
    path = tmp_path / "page.html"
    path.write_text(render_comparison(runs), encoding="utf-8")
    for width in (360, 1440):
        browser.resize(width)
        browser.open(path)
        assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.scripts.length") == 0
    assert HOSTILE.replace("/", "") in browser.run("return document.querySelector('.verdict b').textContent")
    images = browser.run("return [...document.images].map(i => [i.complete, i.naturalWidth > 0, i.alt.length > 0])")
    assert images and all(all(image) for image in images)
    assert browser.errors() == []
    assert [address for address in browser.requests() if not address.startswith(("file:", "data:"))] == []


# real runs


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> list[Path]:
    """The folders of two finished runs in one store: `plain`, and `three` of three experts that are not merged."""
    root = tmp_path_factory.mktemp("compare") / "runs"
    values = make_pico_values(pico_pipeline)
    values["evaluate"] |= {"num_images": 16, "controls": ["all-timesteps"]}
    values["merge"] |= {"search": "none"}
    three = {**values, "decouple": {**values["decouple"], "num_ranges": 3, "total_steps": 3}}
    three["merge"] = {**values["merge"], "method": "none"}
    for name, given in {"plain": values, "three": three}.items():
        run = open_run(Loaded(parse(given, where="test"), {}), out=root / name, command=f"deme run {name}.yaml")
        run.execute()
        run.report()
    return [root / "plain", root / "three"]


@pytest.fixture
def copied(two: list[Path], tmp_path: Path) -> list[Path]:
    shutil.copytree(two[0].parent, tmp_path / "runs", symlinks=True)
    return [tmp_path / "runs" / folder.name for folder in two]


def opened(folder: Path) -> Run:
    run = open_run(load(str(folder)), download=False)
    run.stages = run.recorded()
    return run


def test_two_runs_on_one_page(deme: Deme, two: list[Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "page.html"
    said = deme("report", *two, "--out", out)
    assert said.status == 0 and said.out.startswith("plain: ") and str(out) in said.out
    page = out.read_text(encoding="utf-8")
    assert "decouple.<wbr>num_<wbr>ranges" in page and f"deme run {two[1]}" in page and "deme run three.yaml" in page
    assert page.count("image/png;base64") >= 4 and "timestep-routed ensemble" in page
    told = json.loads(deme("report", *two, "--json").out)
    assert [run["outcome"] for run in told["runs"]] == ["merged", "ensemble"]
    assert len(told["runs"][1]["ranges"]) == 3 and {line["metric"] for line in told["metrics"]} >= {
        "loss",
        "parameters",
    }
    assert metric(told, "loss")["unlike"]["n"][0] != metric(told, "loss")["unlike"]["n"][1]


def test_refusals_of_several(deme: Deme, two: list[Path], copied: list[Path], tmp_path: Path) -> None:  # noqa: F811
    one, other = copied
    assert deme("report", one, other).refusal.startswith("--out is needed with 2 runs")
    assert deme("report", one, other, "--out", "p", "--export", "x").refusal == "--export: of one run, and 2 are given"
    assert deme("report", one, f"{one}/", "--out", "p").refusal.startswith(f"{one}/: named twice")
    assert deme("report", *[one] * 9, "--out", "p").refusal.startswith("9 runs: a page holds at most 8")
    assert deme("report", one, one.parent / "thre", "--out", "p").refusal.endswith("did you mean 'three'?")
    (one / "ablations" / "plan" / "arms").mkdir(parents=True)
    line = deme("report", other, one / "ablations" / "plan", "--out", "p").refusal
    assert line.endswith(f"its baseline is the run {one}") and ": an experiment, no run" in line
    assert deme("report", one / "ablations" / "plan", "--watch").refusal.startswith("--watch: of a run, and ")
    shutil.rmtree(one.parent / "store" / "cost")
    assert deme("report", other, one, "--out", "p").refusal.startswith(
        f"{other}: a stage is not done (cost of serving)"
    )
    assert not Path("p").exists()


def test_exported_model_is_whole_and_loads_in_stock_diffusers(
    deme: Deme,  # noqa: F811
    copied: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "LINKED", 10_000)  # the pico model's weights count as large
    out, run = tmp_path / "to" / "upload", opened(copied[0])
    said = deme("report", copied[0], "--export", out)
    assert said.out.splitlines()[-1] == f"upload: hf upload OWNER/NAME {out}" and "never edit" in said.out
    weights = out / "unet" / WEIGHTS_NAME
    assert {path.name for path in out.iterdir()} == {
        "README.md", "merge.json", "model_index.json", "samples.png", "scheduler", "unet"
    }  # fmt: skip
    stored = run.merged / "unet" / WEIGHTS_NAME
    assert weights.samefile(stored) and not any(path.is_symlink() for path in out.rglob("*"))
    assert not (out / "merge.json").samefile(run.merged / "merge.json")
    assert '"path": "/' in (run.merged / "merge.json").read_text()
    assert '"path"' not in (out / "merge.json").read_text(), "places of this machine"
    card = (out / "README.md").read_text()
    assert "samples.png" in card and '"OWNER/upload"' in card and "FD" in card and card.startswith("---\n")
    with Image.open(out / "samples.png") as grid:  # base and merged, 8 images in a row each
        assert grid.size == (2 * (8 * 9 - 1) * 8 + exporting.GAP, 2 * 9 * 8 - 8)
    state = load_state(stored)
    clean(Store(copied[0].parent / "store"), set(), dry_run=False)
    assert all((state[key] == value).all() for key, value in load_state(weights).items())
    load_it = (
        "import sys; sys.modules['deme_diffusion'] = None\nfrom diffusers import DiffusionPipeline\n"
        f"print(sum(p.numel() for p in DiffusionPipeline.from_pretrained({str(out)!r}).unet.parameters()))"
    )
    loaded = subprocess.run([sys.executable, "-c", load_it], capture_output=True, text=True, timeout=100)
    assert int(loaded.stdout) == sum(value.numel() for value in state.values()), loaded.stderr


def test_export_copies_where_no_link_can_be(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_disk(*_: Any) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(exporting, "LINKED", 0)
    monkeypatch.setattr(os, "link", another_disk)
    run = opened(two[0])
    made = exporting.export_merged(run, tmp_path / "out")
    assert made.linked == [] and "README.md" in made.files
    here, there = tmp_path / "out" / "unet" / WEIGHTS_NAME, run.merged / "unet" / WEIGHTS_NAME
    assert here.read_bytes() == there.read_bytes() and not here.samefile(there)


def test_export_that_fails_leaves_nothing(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> str:
        raise ValueError("no card")

    monkeypatch.setattr(exporting, "model_card", failing)
    with pytest.raises(ValueError, match="no card"):
        exporting.export_merged(opened(two[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_of_an_export(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting.shutil, "copyfile", full)
    with pytest.raises(MachineError, match=r"cannot write .*No space left"):
        exporting.export_merged(opened(two[0]), tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_export_of_a_run_by_a_relative_path_and_through_links(
    copied: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card says nothing of where the run lies; a link at `merged` that leads elsewhere changes nothing."""
    monkeypatch.setattr(exporting, "LINKED", 0)
    store = copied[0].parent / "store"
    store.rename(tmp_path / "elsewhere")
    store.symlink_to(tmp_path / "elsewhere")
    (copied[0] / "merged").unlink()
    (copied[0] / "merged").symlink_to(copied[0] / "base")
    monkeypatch.chdir(copied[0].parent)
    made = exporting.export_merged(opened(Path("plain")), Path("../out"))
    run, out = opened(copied[0]), tmp_path / "out"
    weights = run.store.folder(run.graph.merged[0].key) / "unet" / WEIGHTS_NAME
    assert made.linked and (out / "unet" / WEIGHTS_NAME).samefile(weights)
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "deme run recipe.yaml" in card and "num_ranges" in card


def test_weights_that_were_exported_stay_though_the_store_makes_them_again(
    copied: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LINKED", 0)
    run, out = opened(copied[0]), tmp_path / "out"
    exporting.export_merged(run, out)
    node, before = run.graph.merged[0], (out / "unet" / WEIGHTS_NAME).read_bytes()
    (run.store.folder(node.key) / "manifest.json").unlink()
    run.execute(lambda graph: list(graph.merged.values()))
    again = run.store.folder(node.key) / "unet" / WEIGHTS_NAME
    assert (out / "unet" / WEIGHTS_NAME).read_bytes() == before and not again.samefile(out / "unet" / WEIGHTS_NAME)


def test_refusals_of_export(deme: Deme, copied: list[Path], tmp_path: Path) -> None:  # noqa: F811
    plain, three = copied
    line = deme("report", three, "--export", tmp_path / "new").refusal
    assert line == f"{three}: merge.method=none merges nothing, so there is no model to export"
    assert (
        deme("report", plain, "--export", tmp_path).refusal
        == f"--export {tmp_path}: it exists already; name a new folder"
    )
    among = plain.parent / "upload"
    assert "among the runs" in deme("report", plain, "--export", among).refusal
    assert "within the store" in deme("report", plain, "--export", plain.parent / "store" / "up" / "load").refusal
    assert not among.exists() and deme("report", plain, "--export", plain / "upload").status == 0


# figures that were once asked for


def test_figures_beyond_the_recipe_are_kept_and_shown(copied: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(copied[0])
    (node,) = run.graph.figure("vectors")
    assert node.digest not in {entry["digest"] for entry in opened(copied[0]).content(run.rows())["stages"]}

    def make(folder: Path) -> dict[str, Any]:
        write_figure(folder / "vectors.npz", "vectors", {"names": []}, entries=np.zeros(3))
        return {}

    run.asked = frozenset(["vectors"])
    run.note(node, run.store.produce(node.key, make), reused=False)
    again = opened(copied[0])
    again.prepare()  # as a run does that knows nothing of the figure
    assert ("vectors", node.digest) in referenced(copied[0].parent)
    drawn: list[Any] = []
    monkeypatch.setattr("deme_diffusion.pipeline.evidence.draw_figures", lambda _, data: drawn.append(data) or [])
    content = again.content(again.rows())
    assert list(drawn[0]) == ["vectors"] and node.digest in {entry["digest"] for entry in content["stages"]}
