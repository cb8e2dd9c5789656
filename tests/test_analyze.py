"""`deme analyze`: the paper's figures through the command and from Python; made once, resumed, drawn without torch."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

import deme_diffusion
from conftest import T, make_pico_denoiser, make_pico_values, save_pipeline
from deme_diffusion import cli
from deme_diffusion.analysis import trajectory
from deme_diffusion.analysis.trajectory import chosen_steps, predicted_clean, reduced, reduction
from deme_diffusion.artefacts import MANIFEST, WORK, Store
from deme_diffusion.clean_up import clean as clean_store
from deme_diffusion.clean_up import referenced
from deme_diffusion.config import FIGURES, SamplerSettings
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.sample import image_seeds, make_scheduler, sample
from deme_diffusion.figure_file import read_figure
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.pipeline import analysing
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.recipes import load
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.drawing import gallery

SMALL = {
    "num_images": 8,
    "landscape_points": 3,
    "plane_points": 2,
    "trajectory_images": 16,
    "similarity_within": "whole",
}
NO_TORCH = """
import sys
def watch(event, arguments):
    if event == "import" and arguments[0] in ("torch", "diffusers"):
        raise SystemExit(f"forbidden: {event} {arguments[0]}")
sys.addaudithook(watch)
from deme_diffusion.cli import main
main()
"""
Deme = Callable[..., tuple[int, str, str]]


def recipe_with(folder: Path, pipeline: Path, **changes: dict[str, Any]) -> Path:
    """A pico recipe in which every figure takes a second or less."""
    values = make_pico_values(pipeline) | {"similarity": {"bins": 4, "num_images": 4}, "analyze": dict(SMALL)}
    for section, more in changes.items():
        values[section] = {**values.get(section, {}), **more}
    (folder / "pico.yaml").write_text(yaml.safe_dump(values))
    return folder / "pico.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Path:
    """The folder of a whole run, all six figures made and drawn; other runs may be made beside it."""
    folder = tmp_path_factory.mktemp("analyze")
    recipe = recipe_with(folder, pico_pipeline)
    return deme_diffusion.run(recipe, out=folder / "runs" / "pico").folder


@pytest.fixture
def deme(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Deme]:
    """The command in this process: (status, stdout, stderr)."""
    root, before = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level

    def call(*words: object) -> tuple[int, str, str]:
        root.handlers = []  # the command sets up logging anew, and would close pytest's
        monkeypatch.setattr(sys, "argv", ["deme", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    yield call
    root.handlers, root.level = handlers, level
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, but not laid out and written, which is what takes seconds."""

    def drawn(draw: Callable[[Any], None], width: float, height: float) -> tuple[bytes, bytes]:
        draw(Figure(figsize=(width, height)))
        return b"<svg/>", b"png"

    monkeypatch.setattr(gallery, "svg_and_png_of", drawn)


def made(runs: Path) -> dict[str, int]:
    """Every finished stage in the store beside some runs, with when it was finished."""
    manifests = (runs / "store").glob(f"*/*/{MANIFEST}")
    return {str(file.parent.relative_to(runs)): file.stat().st_mtime_ns for file in manifests}


def arrays(folder: Path, name: str) -> dict[str, Any]:
    return dict(read_figure(folder / "figures" / f"{name}.npz").arrays)


# -- a run and its figures ------------------------------------------------------------------------


def test_a_run_ends_with_all_six_figures(finished: Path) -> None:
    index = json.loads((finished / "figures/figures.json").read_text())
    assert [entry["kind"] for entry in index] == list(FIGURES)
    for picture in (picture for entry in index for picture in entry["pictures"]):
        assert (finished / picture["svg"]).read_bytes().lstrip().startswith(b"<?xml")
        assert (finished / picture["png"]).read_bytes().startswith(b"\x89PNG")
        assert picture["title"] and picture["caption"] and picture["alt"]
        assert all((finished / file).is_file() for file in picture["data"])
        assert len((finished / picture["svg"]).read_bytes()) < 300_000


def test_asked_again_nothing_is_computed_and_nothing_drawn(finished: Path, deme: Deme) -> None:
    before = made(finished.parent), {f: f.stat().st_mtime_ns for f in (finished / "figures").iterdir()}
    (finished / "report.html").unlink()
    status, out, _ = deme("analyze", finished, "--json")
    pictures = json.loads(out)
    assert 'id="figures"' in (finished / "report.html").read_text()  # which shows what was drawn
    assert status == 0
    assert {picture["kind"] for picture in pictures} == set(FIGURES)
    assert all(Path(file).is_file() for p in pictures for file in (p["svg"], p["png"], *p["data"]))
    assert before == (made(finished.parent), {f: f.stat().st_mtime_ns for f in (finished / "figures").iterdir()})


def test_figures_are_drawn_again_where_torch_cannot_be_imported(finished: Path) -> None:
    picture = finished / "figures/samples.svg"
    before = picture.read_bytes()
    picture.unlink()
    words = [sys.executable, "-c", NO_TORCH, "analyze", str(finished)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes() == before
    assert str(picture) in done.stdout


@pytest.mark.usefixtures("unrendered")
def test_processes_find_the_stages_of_figures(finished: Path, deme: Deme) -> None:
    """Also of those that the recipe leaves out, and that only the command asks for."""
    other = finished.parent / "two"
    before = made(finished.parent)
    words = [finished.parent.parent / "pico.yaml", "analyze.figures=[]", "analyze.seed=1", "--out", other]
    status, _, err = deme("analyze", *words, "--jobs", 2, "--figure", "trajectory", "--figure", "activations")
    assert status == 0, err
    new = set(made(finished.parent)) - set(before)
    assert sorted(name.split("/")[1] for name in new) == ["activations", "trajectory"]
    assert {entry["kind"] for entry in json.loads((other / "figures/figures.json").read_text())} == {
        "activations",
        "trajectory",
    }
    keep = referenced(finished.parent)
    removed = clean_store(Store(finished.parent / "store"), keep, dry_run=True)
    assert not {str(folder.relative_to(finished.parent)) for folder, _ in removed} & new


@pytest.mark.usefixtures("unrendered")
def test_other_settings_of_figures_may_be_asked_for_in_the_folder_of_a_run(finished: Path, deme: Deme) -> None:
    words = ["analyze", finished, "--figure", "trajectory"]
    before = arrays(finished, "trajectory")
    assert deme(*words, "analyze.trajectory_images=4")[0] == 0
    assert len(arrays(finished, "trajectory")["grid_base"]) == 4
    assert deme(*words, "analyze.trajectory_images=16")[0] == 0
    assert np.array_equal(arrays(finished, "trajectory")["grid_base"], before["grid_base"])
    status, _, err = deme(*words, "decouple.num_ranges=3")
    assert status == 2
    assert "holds another recipe (decouple.num_ranges is 2 there, 3 here)" in err


def test_from_python_the_pictures_come_with_their_files(finished: Path) -> None:
    found = deme_diffusion.analyze(finished, figures=["trajectory"])
    assert [(one.kind, one.name) for one in found] == [("trajectory", "samples"), ("trajectory", "trajectory")]
    assert all(file.is_file() for one in found for file in (one.svg, one.png, *one.data))
    with pytest.raises(UserError, match=r"figure 'plain': there are .*; did you mean 'plane'"):
        deme_diffusion.analyze(finished, figures=["plain"])


@pytest.mark.usefixtures("unrendered")
def test_a_figure_that_cannot_be_made_costs_no_other_and_no_table(
    finished: Path, deme: Deme, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(error: Exception) -> Callable[..., None]:
        def write(*_: Any, **__: Any) -> None:
            raise error

        return write

    monkeypatch.setattr(analysing, "write_activations", broken(ValueError("nothing to see")))
    monkeypatch.setattr(analysing, "write_vectors", broken(UserError("no such vector")))
    folder = finished.parent / "broken"
    settings = ["analyze.figures=[activations,vectors,trajectory]", "analyze.seed=2", "decouple.learning_rate=2e-3"]
    words = ["run", finished.parent.parent / "pico.yaml", *settings]
    status, _, err = deme(*words, "--out", folder)
    said = "activation differences: nothing to see; entries of the task vectors: no such vector"
    assert (status, err.splitlines()[-1]) == (1, f"deme: the figures are not complete, all else is: {said}")
    assert (folder / "table.json").is_file()
    assert "grids and trajectory" in (folder / "report.html").read_text()
    assert [entry["kind"] for entry in json.loads((folder / "figures/figures.json").read_text())] == ["trajectory"]
    monkeypatch.undo()
    assert deme(*words, "--out", folder)[0] == 0
    assert len(json.loads((folder / "figures/figures.json").read_text())) == 3


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("jobs", [1, 2])
def test_figures_that_are_asked_for_are_made_but_for_the_broken_one(finished: Path, deme: Deme, jobs: int) -> None:
    """A file lies where its stage would work, also for the processes."""
    recipe, seed = finished.parent.parent / "pico.yaml", f"analyze.seed={40 + jobs}"
    graph = Graph(load(str(recipe), [seed]).recipe)
    store = Store(finished.parent / "store")
    (node,) = graph.figure("activations")
    store.folder(node.key).mkdir()
    (store.folder(node.key) / WORK).write_text("no folder")
    asked = ["--figure", "activations", "--figure", "trajectory", "--jobs", jobs]
    status, out, err = deme("analyze", recipe, seed, *asked, "--out", finished.parent / f"broken-{jobs}")
    assert (status, err.count("\ndeme: the figures are not complete, all else is: activation differences: ")) == (1, 1)
    assert store.status(graph.figure("trajectory")[0].key) == "done"
    assert "trajectory" in out


@pytest.mark.usefixtures("unrendered")
def test_commands_at_once_keep_each_others_figures(finished: Path) -> None:
    """Both were opened before either noted anything."""
    recipe = load(str(finished.parent.parent / "pico.yaml"), ["analyze.figures=[]"])
    runs = [open_run(recipe, out=finished.parent / "at-once") for _ in range(2)]
    for run in runs:
        run.prepare()
    for run, name in zip(runs, ("trajectory", "vectors"), strict=True):
        run.analyze([name])
    record = json.loads((runs[0].folder / "run.json").read_text())
    assert record["figures_asked"] == ["vectors", "trajectory"]
    assert {entry["stage"] for entry in record["stages"]} >= {"vectors", "trajectory"}
    again = open_run(load(str(runs[0].folder)), download=False)
    assert {picture["kind"] for picture in again.content([])["figures"]} == {"vectors", "trajectory"}


def test_only_figures_that_were_asked_for_are_shown(finished: Path, deme: Deme) -> None:
    """The similarity that a division is made by is none, though its stage is there."""
    folder = finished.parent / "bare"
    words = [finished.parent.parent / "pico.yaml", "analyze.figures=[]", "similarity.num_images=5", "--out", folder]
    status, _, err = deme("similarity", *words)
    assert status == 0, err
    assert open_run(load(str(folder)), download=False).content([])["figures"] == []


@pytest.mark.usefixtures("unrendered")
def test_an_interrupted_figure_is_gone_on_with(finished: Path, deme: Deme, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [finished.parent.parent / "pico.yaml", "analyze.seed=3", "--out", finished.parent / "stopped"]
    asked = ["analyze", *words, "--figure", "activations", "--figure", "trajectory"]

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(analysing, "write_trajectory", stopped)
    assert deme(*asked)[0] == 130
    before = made(finished.parent)
    monkeypatch.undo()
    status, _, err = deme(*asked)
    assert status == 0, err
    after = made(finished.parent)
    assert {name.split("/")[1] for name in set(after) - set(before)} == {"trajectory"}
    assert all(after[name] == before[name] for name in before)


# -- models trained elsewhere ---------------------------------------------------------------------


@pytest.mark.usefixtures("unrendered")
def test_experts_trained_elsewhere_give_the_same_figures(finished: Path, tmp_path: Path, deme: Deme) -> None:
    """As folders of stages, of components, and pipelines; the run's own models under other names."""
    experts = ["--expert", finished / "experts/0", "--expert", finished / "experts/1/unet"]
    words = ["analyze", finished.parent.parent / "pico.yaml", *experts, "--merged", finished / "merged"]
    kinds = ["trajectory", "vectors"]
    asked = [word for kind in kinds for word in ("--figure", kind)]
    status, _, err = deme(*words, *asked, "--out", tmp_path / "runs/own")
    assert status == 0, err
    for kind in kinds:
        ours, theirs = arrays(finished, kind), arrays(tmp_path / "runs/own", kind)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert not list((tmp_path / "runs/store").glob("decouple/*"))


def test_what_cannot_be_drawn_is_one_line_before_anything_is_computed(
    finished: Path, tmp_path: Path, deme: Deme
) -> None:
    recipe, own = finished.parent.parent / "pico.yaml", finished / "experts/0"
    other = tmp_path / "other"
    save_pipeline(make_pico_denoiser(), other)
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [4, 16]}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no figure")
    cases: list[tuple[Sequence[object], str]] = [
        ([recipe, "--figure", "plain"], "figure 'plain': there are similarity, activations"),
        ([recipe, "--expert", own], "analyze.experts: 1 folders for decouple.num_ranges=2; one for each range"),
        (
            [recipe, "--expert", own, "--expert", tmp_path / "no"],
            f"analyze.experts.1: {tmp_path / 'no'}: no such folder",
        ),
        ([recipe, "--expert", tmp_path / "empty", "--expert", own], f"analyze.experts.0: {tmp_path / 'empty'}: no con"),
        (
            [recipe, "--expert", own, "--expert", other],
            f"analyze.experts.1: {other}: another architecture: config.json: block_out_channels is [4, 16], the base's",
        ),
        ([recipe, "--merged", tmp_path / "no"], f"analyze.merged: {tmp_path / 'no'}: no such folder"),
        ([recipe, "analyze.plane_experts=[0, 2]"], "analyze.plane_experts: 2; an expert from 0 to 1"),
        ([recipe, "analyze.similarity_within=[[3, 30]]"], "analyze.similarity_within: [3, 30): two timesteps or more"),
        ([tmp_path / "text.npz"], f"{tmp_path / 'text.npz'}: no figure's data"),
        ([tmp_path / "none.npz"], f"{tmp_path / 'none.npz'}: No such file"),
        ([tmp_path / "text.npz", "--jobs", 2], "--jobs: says nothing of .npz files"),
        ([tmp_path / "text.npz", "seeds=[1]"], "seeds=[1]: no .npz file"),
    ]
    for words, said in cases:
        status, out, err = deme("analyze", *words, *([] if "npz" in str(words[0]) else ["--out", tmp_path / "runs/x"]))
        assert (status, out, err.count("\n")) == (2, "", 1), (words, err)
        assert err.startswith(f"deme: {said}"), err
    assert not (tmp_path / "runs/store").exists()


# -- every kind of run ----------------------------------------------------------------------------


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "changes",
    [
        {"merge": {"method": "none"}},
        {"decouple": {"num_ranges": 1}},
        {"decouple": {"division": "overlapping", "overlap": 0.2}},
        {"decouple": {"division": "random_assignment", "projection": "block"}},
    ],
    ids=["unmerged", "alone", "overlapping", "scattered"],
)
def test_figures_of_every_kind_of_run(tmp_path: Path, pico_pipeline: Path, changes: dict[str, dict[str, Any]]) -> None:
    recipe = recipe_with(tmp_path, pico_pipeline, **changes)
    found = deme_diffusion.analyze(recipe, "decouple.total_steps=2", out=tmp_path / "runs/x")
    assert {one.kind for one in found} == set(FIGURES)
    grids = [name for name in arrays(tmp_path / "runs/x", "trajectory") if name.startswith("grid_")]
    assert grids == ["grid_base", "grid_ensemble", *([] if "merge" in changes else ["grid_merged"])]


@pytest.mark.usefixtures("unrendered")
def test_figures_wait_for_a_division_by_gradients(tmp_path: Path, pico_pipeline: Path, deme: Deme) -> None:
    recipe = recipe_with(tmp_path, pico_pipeline, decouple={"division": "gradient_similarity", "total_steps": 2})
    asked = ["analyze", recipe, "--out", tmp_path / "runs/x", "--figure", "trajectory", "--figure", "vectors"]
    planned = json.loads(deme(*asked, "--dry-run", "--json")[1])
    assert planned["provisional"]
    status, _, err = deme(*asked)
    assert status == 0, err
    settled = json.loads(deme(*asked, "--dry-run", "--json")[1])
    assert not settled["provisional"]
    assert all(stage["status"] == "done" for stage in settled["stages"])
    drawn = {stage["digest"] for stage in planned["stages"] if stage["stage"] in FIGURES}
    assert not drawn & {stage["digest"] for stage in settled["stages"] if stage["stage"] != "similarity"}


def test_digests_tell_how_experts_from_elsewhere_are_named(finished: Path) -> None:
    """Also where no loss is taken in their ranges; and the same said in other words is the same."""
    recipe, ours = finished.parent.parent / "pico.yaml", [str(finished / "experts" / i) for i in "01"]

    def digests(*changes: str, experts: bool = True) -> dict[str, list[str]]:
        given = [f"analyze.experts={json.dumps(ours)}"] if experts else []
        graph = Graph(load(str(recipe), [*given, "evaluate.loss_ranges=2", *changes]).recipe)
        return {name: [node.digest for node in nodes] for name, nodes in graph.figures.items()}

    along, overlapping = "analyze.directions=task_vectors", "decouple.division=overlapping"
    one, other = digests(along), digests(along, overlapping, "decouple.overlap=0.5")
    assert {name for name in FIGURES if one[name] != other[name]} == set(FIGURES) - {"similarity"}
    bare = digests(), digests(overlapping, "decouple.overlap=0.5")
    assert bare[0]["landscape"] == bare[1]["landscape"]  # random directions know no experts
    assert digests("analyze.landscape_radius=0.25", "analyze.plane_experts=[0,1]") == bare[0]
    assert digests(along, "analyze.landscape_radius=1.5") == one != digests(along, "analyze.landscape_radius=0.25")
    assert bare[0]["plane"] != digests("analyze.plane_experts=[1,0]")["plane"]


def test_gradients_are_compared_once_within_each_subset(pico_values: dict[str, Any]) -> None:
    values = {**pico_values, "analyze": {"similarity_within": [[0, 5], [0, 5], [0, T]]}}
    assert len(Graph(parse(values, where="test")).figure("similarity")) == 2


def test_a_run_whose_experts_from_elsewhere_are_gone_can_be_looked_at(
    finished: Path, tmp_path: Path, deme: Deme, caplog: pytest.LogCaptureFixture
) -> None:
    ours = tmp_path / "ours"
    for i in "01":
        shutil.copytree(finished / "experts" / i, ours / i)
    shutil.copytree(finished.parent / "store", tmp_path / "runs/store", symlinks=True)
    given = f"analyze.experts={json.dumps([str(ours / i) for i in '01'])}"
    recipe = load(str(finished.parent.parent / "pico.yaml"), [given, "analyze.figures=[vectors,activations]"])
    run = open_run(recipe, out=tmp_path / "runs" / "gone")
    run.execute(run.required())
    shutil.rmtree(ours)
    status, _, err = deme("report", run.folder)
    assert status == 0, err
    lines = [line for line in err.splitlines() if "not shown of the figures" in line]
    assert len(lines) == 1
    assert "vectors, activations: analyze.experts.0: " in lines[0]
    status, _, err = deme("analyze", run.folder)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("deme: analyze.experts.0: ")
    with pytest.raises(UserError, match="no such folder"):
        open_run(load(str(run.folder)))


def test_arms_of_an_experiment_have_no_figures(pico_values: dict[str, Any]) -> None:
    """Nor are they refused for what only a figure would be: here an expert that one range does not have."""
    values = {**pico_values, "analyze": {"plane_experts": [0, 1]}, "decouple": {"num_ranges": 1}}
    recipe = parse(values, where="test")
    assert not [node for node in Graph(recipe, drawn=()).nodes if node.stage in FIGURES]
    with pytest.raises(UserError, match=r"analyze.plane_experts: 1; an expert from 0 to 0"):
        Graph(recipe)


# -- samples and trajectory -----------------------------------------------------------------------


def test_grids_are_the_images_that_the_table_is_measured_on(finished: Path) -> None:
    grids = arrays(finished, "trajectory")
    for name in ("base", "ensemble", "merged"):
        assert np.array_equal(grids[f"grid_{name}"], np.load(finished / f"figures/{name}.npy"))


def test_a_step_shows_what_the_model_gets_the_clean_image_it_predicts_and_whose_step_it_is(finished: Path) -> None:
    data = read_figure(finished / "figures/trajectory.npz")
    steps = data.arrays["timesteps"]
    assert data.arrays["steps"].tolist() == [0, 1]
    assert data.arrays["experts"].tolist() == [int(t >= T / 2) for t in steps]
    noise = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(image_seeds(0, 0, 1)[0]))
    levels = noise.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0).numpy()
    assert all(np.array_equal(data.arrays[f"x_t_{name}"][0], levels) for name in data.meta["models"])
    assert data.arrays["x_0_base"].shape == (2, 8, 8, 1)
    assert data.meta["changed"]["base"] == 0.0 < data.meta["changed"]["ensemble"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_the_clean_image_is_the_one_that_schedulers_tell(name: str, prediction_type: str) -> None:
    denoiser = make_pico_denoiser(prediction_type=prediction_type)
    settings = SamplerSettings(name=name, num_inference_steps=4)
    scheduler, seen = make_scheduler(denoiser, settings), []

    def look(t: torch.Tensor, x_t: torch.Tensor, prediction: torch.Tensor) -> None:
        x = x_t if not hasattr(scheduler, "sigmas") else look.x  # type: ignore[attr-defined]
        scheduler.scale_model_input(x, t)
        step = scheduler.step(prediction, t, x)
        look.x = step.prev_sample  # type: ignore[attr-defined]
        seen.append((predicted_clean(denoiser, x_t, prediction, t), step.pred_original_sample))

    start = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(5))[None]
    look.x = start * scheduler.init_noise_sigma  # type: ignore[attr-defined]
    sample(denoiser, denoiser.module, settings, [5], seen=look)
    assert len(seen) == 4
    for ours, theirs in seen:
        torch.testing.assert_close(ours.clamp(-1, 1), theirs.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_looking_at_the_steps_changes_no_bit(pico_denoiser: DDPM) -> None:
    settings = SamplerSettings(name="DDPMScheduler", num_inference_steps=5)
    timesteps = list[int]()
    plain = sample(pico_denoiser, pico_denoiser.module, settings, [1, 2])
    seen = sample(
        pico_denoiser, pico_denoiser.module, settings, [1, 2], seen=lambda t, x_t, prediction: timesteps.append(int(t))
    )
    assert torch.equal(plain, seen)
    assert timesteps == [16, 12, 8, 4, 0]


def test_a_schedule_that_ends_without_signal_has_a_clean_image_all_the_same() -> None:
    denoiser = make_pico_denoiser()
    denoiser.scheduler.alphas_cumprod[-1] = 0.0
    x_t, prediction = torch.ones(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    assert torch.equal(predicted_clean(denoiser, x_t, prediction, torch.tensor(T - 1)), torch.zeros_like(x_t))
    assert torch.isfinite(predicted_clean(denoiser, x_t, prediction, torch.tensor(T - 2))).all()


def test_steps_are_spread_evenly_the_first_and_the_last_among_them() -> None:
    assert chosen_steps(3) == [0, 1, 2]
    assert chosen_steps(12) == list(range(12))
    assert chosen_steps(1000)[:2] == [0, 91]
    assert (len(chosen_steps(1000)), chosen_steps(1000)[-1]) == (trajectory.STEPS, 999)


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_reduced_by_a_whole_factor(channels: int) -> None:
    images = np.full((2, 260, 130, channels), 7, np.uint8)
    images[:, :, 65:] = 9
    factor = reduction(images.shape[1:3])
    assert factor == 3
    small = reduced(images, factor)
    assert small.shape == (2, 87, 44, channels)
    assert (small[:, :, :21] == 7).all()
    assert (small[:, :, 22:] == 9).all()
    assert reduced(images, 1) is images
