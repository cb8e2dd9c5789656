"""Sketched cosines of gradients are the exact ones within the stated error; a division by them waits for them."""

import copy
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_pico_denoiser
from deme_diffusion import cli
from deme_diffusion.analysis import sketch as sketching
from deme_diffusion.analysis.similarity import Gradients, shares, write_similarity
from deme_diffusion.analysis.sketch import cosines, sketch_into
from deme_diffusion.config import SimilaritySettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.division import names_of
from deme_diffusion.divisions import gradient_similarity
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import read_figure
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.objective import denoising_loss
from deme_diffusion.pipeline.estimate import plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.recipes.checks import parse
from deme_diffusion.similarity_file import read_similarity
from deme_diffusion.weights import WEIGHTS_NAME

Values = dict[str, Any]
Splits = dict[SplitName, Split]
FEW = SimilaritySettings(bins=5, num_images=12, sketch=512)
BINS = np.arange(20).reshape(5, 4)


def exact(denoiser: DDPM, split: Split, settings: SimilaritySettings) -> np.ndarray:
    """(K, P) the gradients, one image after another."""
    rows = []
    for timesteps in BINS:
        module = denoiser.student().eval()
        gradients = Gradients(denoiser, module, split, settings, 1)
        for noised in itertools.chain(*(gradients.points(timesteps, i) for i in range(len(gradients.groups)))):
            prediction = denoiser.predict(module, noised.x_t, noised.t, noised.condition)
            denoising_loss(prediction, noised.target).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double().numpy())
    return np.stack(rows)


def sketch_of(gradient: list[torch.Tensor], size: int, seed: int) -> tuple[np.ndarray, float]:
    sketch = np.full(min(size, sum(t.numel() for t in gradient)), np.nan)
    return sketch, sketch_into(sketch, gradient, seed)


def written(path: Path, denoiser: DDPM, split: Split, settings: SimilaritySettings, **more: Any) -> dict[str, Any]:
    results = write_similarity(path, denoiser, split, settings, **{"batch_size": 4, **more})
    with np.load(path) as arrays:
        return {**results, **{name: arrays[name] for name in arrays.files}}


def test_sketched_cosines_are_the_exact_ones_within_the_error(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path
) -> None:
    gradients = exact(pico_denoiser, digits["train"], FEW)
    found = written(tmp_path / "s.npz", pico_denoiser, digits["train"], FEW)
    assert found["error"] == pytest.approx(512**-0.5)
    pairs = np.triu_indices(5, 1)
    off = (found["cosine"] - cosines(gradients))[pairs]
    assert 0 < np.abs(off).max() < 4 * found["error"]
    np.testing.assert_allclose(found["norms"], np.linalg.norm(gradients, axis=1) / 12, rtol=1e-4)
    assert found["edges"].tolist() == [0, 4, 8, 12, 16, 20]
    assert (np.diagonal(found["cosine"]) == 1).all() and (found["cosine"] == found["cosine"].T).all()
    told = shares(found["cosine"], float(found["error"]))
    assert {name: found[name] for name in told} == told
    assert told["mean"] == pytest.approx(found["cosine"][pairs].mean())
    assert told["conflicting"] == pytest.approx((found["cosine"][pairs] < 0).mean())


def test_error_of_a_cosine_is_that_of_many_sketches() -> None:
    torch.manual_seed(0)
    one = torch.randn(3000)
    other = 0.5 * one + torch.randn(3000)
    true = cosines(np.stack([one.numpy(), other.numpy()]).astype(np.float64))[0, 1]
    found = []
    for seed in range(300):
        sketches = np.stack([sketch_of([t[:1000], t[1000:]], 100, seed)[0] for t in (one, other)])
        found.append(cosines(sketches)[0, 1])
    assert np.mean(found) == pytest.approx(true, abs=0.02)
    assert np.std(found) == pytest.approx((1 - true**2) / 10, rel=0.2)  # (1 - c^2) / sqrt(100)


def test_sketch_as_large_as_the_model_is_exact(pico_denoiser: DDPM, digits: Splits, tmp_path: Path) -> None:
    large = FEW.model_copy(update={"sketch": 20_000})
    found = written(tmp_path / "s.npz", pico_denoiser, digits["train"], large)
    assert found["error"] == 0
    np.testing.assert_allclose(found["cosine"], cosines(exact(pico_denoiser, digits["train"], large)), atol=1e-5)


def test_sketch_does_not_depend_on_how_a_gradient_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = sketch_of([gradient], 64, 3)
    monkeypatch.setattr(sketching, "CHUNK", 37)
    parts = sketch_of([gradient[:10].reshape(2, 5), gradient[10:]], 64, 3)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-12)
    assert parts[1] == pytest.approx(whole[1])
    assert not np.allclose(sketch_of([gradient], 64, 4)[0], whole[0])


def test_similarity_is_a_function_of_its_settings_and_not_of_the_batch(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path
) -> None:
    one, again = (written(tmp_path / f"{i}.npz", pico_denoiser, digits["train"], FEW) for i in range(2))
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert (one["cosine"] == again["cosine"]).all()
    other = written(tmp_path / "2.npz", pico_denoiser, digits["train"], FEW, batch_size=12)
    np.testing.assert_allclose(other["cosine"], one["cosine"], atol=1e-5)
    seed = written(tmp_path / "3.npz", pico_denoiser, digits["train"], FEW.model_copy(update={"seed": 1}))
    assert np.abs(seed["cosine"] - one["cosine"]).max() > 1e-3


def test_a_batch_is_small_and_checkpointing_saves_activations(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    parts, noised = torch.utils.checkpoint.checkpoint, DDPM.noised
    again: list[int] = []

    def counting(denoiser: DDPM, batch: Any, *others: Any) -> Any:
        asked.append(len(batch["image"]))
        return noised(denoiser, batch, *others)

    def anew(*arguments: Any, **options: Any) -> Any:
        again.append(1)
        return parts(*arguments, **options)

    monkeypatch.setattr(DDPM, "noised", counting)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", anew)
    many = FEW.model_copy(update={"num_images": 138, "bins": 1})
    plain = written(tmp_path / "0.npz", pico_denoiser, digits["train"], many, batch_size=512)
    assert asked == [16, 2] * 2 + [16, 1] * 6 and not again  # at borders of groups
    lean = written(tmp_path / "1.npz", pico_denoiser, digits["train"], many, batch_size=9, checkpointing=True)
    assert asked[16:] == [9, 9] * 2 + [9, 8] * 6 and again
    np.testing.assert_allclose(lean["cosine"], plain["cosine"], atol=1e-5)


def test_all_bins_see_the_same_images_and_noise_and_only_t_differs(pico_denoiser: DDPM, digits: Splits) -> None:
    many = FEW.model_copy(update={"num_images": 32})
    gradients = Gradients(pico_denoiser, pico_denoiser.module, digits["train"], many, 12)
    assert gradients.groups == [4] * 8
    first, last = (list(itertools.chain(*(gradients.points(BINS[i], g) for g in range(8)))) for i in (0, 4))
    assert all(torch.equal(one.target, other.target) for one, other in zip(first, last, strict=True))  # the noise
    assert all({*one.t.tolist()} == {0, 1, 2, 3} for one in first)  # each group covers the bin
    assert all({*other.t.tolist()} == {16, 17, 18, 19} for other in last)
    abar = pico_denoiser.scheduler.alphas_cumprod[:, None, None, None]
    clean = [
        torch.cat([(b.x_t - (1 - abar[b.t]).sqrt() * b.target) / abar[b.t].sqrt() for b in x]) for x in (first, last)
    ]
    assert torch.allclose(*clean, atol=1e-4)
    assert len(torch.unique(clean[0].round(decimals=2), dim=0)) == 32  # none twice


def test_no_image_is_taken_twice(pico_denoiser: DDPM, digits: Splits, tmp_path: Path) -> None:
    few = replace(digits["train"], indices=digits["train"].indices[:10])
    found = [
        written(tmp_path / f"{n}.npz", pico_denoiser, few, FEW.model_copy(update={"num_images": n})) for n in (10, 999)
    ]
    assert [one["num_images"] for one in found] == [10, 10]
    assert read_figure(tmp_path / "999.npz").meta["num_images"] == 10
    assert (found[0]["cosine"] == found[1]["cosine"]).all() and (found[0]["cross"] == found[1]["cross"]).all()


def test_gradient_that_is_not_finite_names_the_bin_and_why(digits: Splits, tmp_path: Path) -> None:
    denoiser = make_pico_denoiser()
    noised = denoiser.noised

    def broken(batch: Any, t: torch.Tensor, noise: torch.Tensor) -> Any:
        return noised({"image": torch.where(t[:, None, None, None] >= 8, torch.inf, batch["image"])}, t, noise)

    denoiser.noised = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^similarity: bin \[8,12\): its gradient is not finite, though .*weights are"):
        written(tmp_path / "s.npz", denoiser, digits["train"], FEW, partial=tmp_path / "work")
    assert not (tmp_path / "s.npz").exists()
    del denoiser.noised
    next(denoiser.module.parameters()).data[0] = torch.nan
    with pytest.raises(UserError, match=r"bin \[0,4\): .*not finite, since weights of the model"):
        written(tmp_path / "s.npz", denoiser, digits["train"], FEW)


def test_interrupted_comparison_goes_on_with_the_bins_that_are_left(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "whole.npz", pico_denoiser, digits["train"], FEW)
    counted: list[int] = []
    put = Gradients.put

    def counting(gradients: Gradients, *arguments: Any) -> Any:
        counted.append(1)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return put(gradients, *arguments)

    monkeypatch.setattr(Gradients, "put", counting)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "s.npz", pico_denoiser, digits["train"], FEW, partial=tmp_path / "work")
    assert not (tmp_path / "s.npz").exists()
    written(tmp_path / "s.npz", pico_denoiser, digits["train"], FEW, partial=tmp_path / "work")
    assert len(counted) == 4 + 2  # three done, one broken off, two left
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_what_a_kill_left_is_taken_as_far_as_it_goes(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    written(tmp_path / "whole.npz", pico_denoiser, digits["train"], FEW, partial=work)
    file, cursor = work / sketching.Sketches.DATA, work / sketching.Sketches.CURSOR
    data, saved = file.read_bytes(), cursor.read_text()

    def remade() -> int:
        made: list[int] = []
        put = Gradients.put
        with monkeypatch.context() as patch:
            patch.setattr(Gradients, "put", lambda *arguments: made.append(1) or put(*arguments))
            written(tmp_path / "again.npz", pico_denoiser, digits["train"], FEW, partial=work)
        assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
        return len(made)

    assert remade() == 0
    file.write_bytes(data[: len(data) // 2])  # two bins and a half
    assert remade() == 3
    cursor.write_text(saved[:20])
    assert remade() == 5
    file.unlink()
    assert remade() == 5


def test_what_was_made_another_way_is_not_gone_on_from(
    pico_denoiser: DDPM, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    put = Gradients.put
    monkeypatch.setattr(Gradients, "put", lambda *arguments: made.append(1) or put(*arguments))
    first = FEW.model_copy(update={"bins": 2, "num_images": 4})

    def remade(changed: Values, **options: Any) -> int:
        made.clear()
        settings = first.model_copy(update=changed)
        written(tmp_path / "s.npz", pico_denoiser, digits["train"], settings, partial=tmp_path / "work", **options)
        return len(made)

    assert remade({}) == 2 and remade({}) == 0
    last: Values = {}
    for last in ({"seed": 1}, {"num_images": 5}, {"sketch": 511}):
        assert remade(last) == 2, last
    assert remade(last, subset=[[0, 19]]) == 2
    assert remade(last, subset=[[0, 19]], batch_size=3) == 2
    assert remade(last, subset=[[0, 19]], batch_size=3) == 0


def test_base_is_as_it_was(digits: Splits, tmp_path: Path) -> None:
    denoiser = make_pico_denoiser(dropout=0.5)
    before = {key: value.clone() for key, value in denoiser.module.state_dict().items()}
    one, other = (written(tmp_path / f"{i}.npz", denoiser, digits["train"], FEW) for i in range(2))
    assert (one["cosine"] == other["cosine"]).all()  # dropout is off
    assert all(torch.equal(before[key], value) for key, value in denoiser.module.state_dict().items())
    assert all(p.grad is None for p in denoiser.module.parameters())


# in a run


@pytest.fixture
def values(pico_values: Values) -> Values:
    values = copy.deepcopy(pico_values)
    values["similarity"] = {"bins": 5, "num_images": 8, "sketch": 256}
    values["decouple"] |= {"division": "gradient_similarity", "total_steps": 4}
    values["evaluate"] |= {"controls": []}
    values["merge"] |= {"search": "none"}
    return values


def opened(values: Values, folder: Path, **options: Any) -> Run:
    return open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run pico", **options)


def test_run_compares_gradients_first_and_trains_on_what_they_say(values: Values, tmp_path: Path) -> None:
    run = opened(values, tmp_path / "run", download=False)
    before = plan(run)
    assert before["provisional"] and run.graph.provisional
    waiting = {node.digest for node in run.graph.of_stage("decouple")}
    run.execute()
    assert not run.graph.provisional
    assert not waiting & {node.digest for node in run.graph.nodes}
    similar = run.graph.similarity
    assert similar is not None
    found = read_similarity(run.store.folder(similar.key) / "similarity.npz", 20)
    expected = gradient_similarity(2, found)
    assert (run.graph.division.member == expected.member).all()
    rows, _ = run.report()
    assert {f"loss [{lo},{hi})" for lo, hi in (expected.served(0)[0], expected.served(1)[0])} <= set(rows[0]["metrics"])
    assert load(str(run.folder)).recipe.decouple.division == "gradient_similarity"  # as the user wrote it
    entries = json.loads((run.folder / "run.json").read_text())["stages"]
    assert [entry["stage"] for entry in entries if "seconds" not in entry] == []
    assert "similarity" in {entry["stage"] for entry in entries}

    again = opened(values, tmp_path / "run", download=False)  # known at once; nothing is done twice
    planned = plan(again)
    assert not planned["provisional"] and {stage["status"] for stage in planned["stages"]} == {"done"}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/*/manifest.json")}
    again.execute()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/*/manifest.json")} == times
    values["decouple"] |= {"division": "explicit", "edges": [expected.subset(1)[0][0]]}
    same = Graph(parse(values, where="test"))
    assert [e.digest for e in same.experts[0]] == [e.digest for e in again.graph.experts[0]]


@pytest.mark.slow
def test_processes_know_the_division(values: Values, tmp_path: Path) -> None:
    alone = opened(values, tmp_path / "one" / "run")
    alone.execute(lambda graph: graph.experts[0])
    values["runtime"]["jobs"] = 2
    run = opened(values, tmp_path / "two" / "run")
    experts = run.execute(lambda graph: graph.experts[0])
    assert {expert.digest for expert in experts} == {expert.digest for expert in alone.graph.experts[0]}
    for expert in experts:
        weights = [r.store.folder(expert.key) / "unet" / WEIGHTS_NAME for r in (alone, run)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_placeholder_is_never_taken_for_a_division(values: Values, tmp_path: Path) -> None:
    values["evaluate"]["controls"] = ["all-timesteps"]
    uniform = copy.deepcopy(values)
    uniform["decouple"]["division"] = "uniform"
    waits, plain = Graph(parse(values, where="test")), Graph(parse(uniform, where="test"))
    shared = {node.label for node in waits.nodes} & {
        node.label for node in plain.nodes if node.digest in {other.digest for other in waits.nodes}
    }
    assert "all-timesteps" in shared  # which no division touches
    assert not any(label.startswith(("expert", "merged", "evaluate base", "sample ensemble")) for label in shared)
    assert waits.experts[0][0].label == "expert 0 of a division to come"
    assert Graph(waits.pinned()).similarity.digest == waits.similarity.digest  # type: ignore[union-attr]


def test_more_bins_than_timesteps_or_fewer_than_ranges_are_refused(values: Values) -> None:
    for bins, message in ((21, "similarity.bins: 21 ranges"), (1, "similarity.bins: 1; .*=2 ranges need")):
        with pytest.raises(UserError, match=message):
            Graph(parse({**values, "similarity": {"bins": bins}}, where="test"))


def deme(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["deme", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_commands_of_a_run_that_waits(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(values))
    assert deme(monkeypatch, "run", "pico.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "the division waits for the similarity of gradients" in said and "expert 0 of a division to come" in said
    assert not (tmp_path / "runs").exists()
    assert deme(monkeypatch, "report", "pico.yaml") == 2
    assert deme(monkeypatch, "similarity", "pico.yaml") == 0
    said = capsys.readouterr().out
    assert (
        "similarity.npz: " in said
        and "of pairs conflict on these 8 images" in said
        and " of 5 bins told from noise" in said
    )
    assert not list((tmp_path / "runs" / "store").glob("decouple"))
    assert deme(monkeypatch, "run", "pico.yaml", "--dry-run") == 0
    assert "waits" not in capsys.readouterr().out
    assert deme(monkeypatch, "decouple", "pico.yaml", "--expert", "1") == 0
    assert deme(monkeypatch, "run", "pico.yaml") == 0
    assert deme(monkeypatch, "report", "runs/pico") == 0
    assert "data:image/svg+xml" in (tmp_path / "runs" / "pico" / "report.html").read_text()


def test_one_expert_of_a_division_that_waits(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from deme_diffusion import decouple

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(values))
    assert deme(monkeypatch, "decouple", "pico.yaml", "--expert", "0", "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["label"].startswith("expert 0 [0,")
    experts = decouple("pico.yaml", out="runs/pico")
    assert experts[0].folder.resolve() == (tmp_path / made["folder"]).resolve()
    assert [experts[0].timesteps, experts[1].timesteps][0].startswith("[0,")


def test_images_of_an_expert_that_waits(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    from deme_diffusion import sample

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(values))
    made = [sample("pico.yaml", out="runs/pico", seeds=[3], model=name, format="npy") for name in ("base", "expert-1")]
    assert [list(images.seeds) for images in made] == [[3], [3]]
    run = opened(values, tmp_path / "runs" / "pico")
    assert not run.graph.provisional and run.store.status(run.graph.experts[0][1].key) == "done"
    assert run.store.status(run.graph.experts[0][0].key) == "missing"


# every division, from end to end


@pytest.mark.parametrize(
    "decouple",
    [
        {"division": "overlapping"},
        {"division": "random_boundaries"},
        {"division": "random_assignment"},
        {"division": "log_snr"},
        {"division": "explicit", "edges": [5]},
    ],
)
def test_every_division_trains_serves_and_is_measured(decouple: Values, values: Values, tmp_path: Path) -> None:
    values["decouple"] |= {"division": "uniform", "total_steps": 2, **decouple}
    values["merge"] |= {"search": "least_squares"}
    run = opened(values, tmp_path / "run")
    measured = [node for name, _, node in run.graph.evaluations if name in ("ensemble", "merged")]
    run.execute(measured)
    for node in measured:
        losses = json.loads((run.store.folder(node.key) / "metrics.json").read_text())["losses"]["ranges"]
        assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(run.store.status(node.key) == "done" for node in opened(values, tmp_path / "run").graph.needed(measured))


def test_division_that_is_scattered_is_reported(values: Values, tmp_path: Path) -> None:
    values["decouple"] |= {"division": "random_assignment", "num_ranges": 3, "total_steps": 3}
    run = opened(values, tmp_path / "run")
    run.execute()
    rows, _ = run.report()
    losses = [name for name in rows[0]["metrics"] if name.startswith("loss ")]
    assert losses == [f"loss {name}" for name in names_of([run.graph.division.served(i) for i in range(3)])]
    assert len(set(losses)) == 3 and losses[0].startswith("loss #0 ")
    page = (run.folder / "report.html").read_text()
    assert "data:image/svg+xml" in page and losses[0].removeprefix("loss ") in page
