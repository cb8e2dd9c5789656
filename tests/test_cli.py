"""The command: results on stdout, one line on stderr for wrong input, the exit status, and a fast, offline start."""

import json
import logging
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import T, make_pico_values
from deme_diffusion import cli
from deme_diffusion.artefacts import Key, Store
from deme_diffusion.errors import Interrupted, MachineError
from deme_diffusion.pipeline import run as runs
from deme_diffusion.pipeline.inputs import ASSETS
from deme_diffusion.recipes import PACKAGED, packaged, to_yaml
from deme_diffusion.recipes.schema import SCHEMA

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NO_NETWORK_NO_TORCH = """
import sys
def watch(event, arguments):
    if event.startswith("socket.") or (event == "import" and arguments[0] in ("torch", "diffusers")):
        raise SystemExit(f"forbidden: {event} {arguments}")
sys.addaudithook(watch)
from deme_diffusion.cli import main
main()
"""


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """What was wrong: exit status 2, and one line that is not a traceback."""
        assert (self.status, self.out) == (2, ""), self
        assert self.err.startswith("deme: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("deme: ").strip()


Deme = Callable[..., Outcome]


@pytest.fixture
def deme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Deme]:
    """The command in this process, in an empty folder."""
    root, before = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level

    def call(*words: object) -> Outcome:
        root.handlers = []  # the command sets up logging anew, and would close pytest's
        monkeypatch.setattr(sys, "argv", ["deme", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(int(ended.value.code or 0), *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    yield call
    root.handlers, root.level = handlers, level
    signal.signal(signal.SIGTERM, before)


def outside(*words: str, script: str | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    start = ["-m", "deme_diffusion.cli"] if script is None else ["-c", script]
    return subprocess.run([sys.executable, *start, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


def write_recipe(folder: Path, values: dict[str, Any], name: str = "pico.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Path:
    """A run folder with every stage done; read only (its store is beside it)."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, make_pico_values(pico_pipeline))
    done = outside("run", str(recipe), "--out", str(folder / "runs" / "pico"), "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    models = [row["model"] for row in json.loads(done.stdout)]
    assert models == ["base", "all-timesteps", "ensemble", "merged-uniform", "merged", "training images"]
    return folder / "runs" / "pico"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run and its store, free to be changed."""
    shutil.copytree(finished.parent, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "pico"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the digits base, free to be broken."""
    return Path(shutil.copytree(ASSETS / "digits-base", tmp_path / "base"))


# a fast, offline start


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["recipes"],
        ["run", "digits", "--dry-run"],
        ["run", "digits", "--dry-run", "--json", "model.pretrained=nobody/nothing"],
        ["pretrain", "digits", "--dry-run"],
        ["clean", "--runs", ".", "--dry-run"],
        ["recipes", "--schema"],
        ["sample", "digits", "--model", "base", "--seeds", "0-9", "--images", "images", "--grid", "--dry-run"],
    ],
)
def test_help_recipes_clean_and_dry_runs_import_no_torch_and_open_no_socket(words: list[str], tmp_path: Path) -> None:
    done = outside(*words, script=NO_NETWORK_NO_TORCH, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert not list(tmp_path.iterdir())


def test_the_watch_of_the_test_above_sees_torch_and_sockets(tmp_path: Path) -> None:
    for forbidden in ("import torch", "import socket; socket.socket()"):
        done = outside(script=NO_NETWORK_NO_TORCH.replace("from deme", f"{forbidden}\nfrom deme"), cwd=tmp_path)
        assert done.returncode == 1 and "forbidden: " in done.stderr


def test_help_names_every_command_and_each_has_its_own(deme: Deme) -> None:
    shown = deme("--help")
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert {"run", "pretrain", "extractor", "decouple", "search", "merge", "sample", "evaluate"} <= set(names)
    assert shown.status == 0 and all(f" {name} " in shown.out for name in names)
    for name in names:
        assert f"deme {name}" in deme(name, "--help").out


def test_recipes_are_listed_a_line_each(deme: Deme) -> None:
    listed = deme("recipes")
    assert [line.split()[0] for line in listed.out.splitlines()] == list(packaged())
    assert json.loads(deme("recipes", "--json").out) == packaged()
    assert deme("recipes", "--schema").out == (PACKAGED / SCHEMA).read_text()


# dry runs


def test_dry_run_as_json_has_settings_stages_and_estimates(deme: Deme) -> None:
    shape = ["decouple.num_ranges=2", "decouple.total_steps=200", "evaluate.controls=[all-timesteps]"]
    plan = json.loads(deme("run", "digits", *shape, "merge.search=grid", "--dry-run", "--json").out)
    assert plan["settings"]["decouple"]["num_ranges"] == 2
    stages = [stage["stage"] for stage in plan["stages"]]
    assert stages.count("decouple") == 3 and stages.count("merge") == 2 and stages.count("search") == 1
    assert {stage["status"] for stage in plan["stages"]} == {"missing"}
    assert plan["steps"] == sum(stage["steps"] for stage in plan["stages"]) == 400
    assert plan["seconds"] > 0 and plan["disk_bytes"] > 0 and plan["download"] is None


def test_dry_run_prints_a_recipe_that_can_be_run_and_the_stages(deme: Deme, tmp_path: Path) -> None:
    shape = ["decouple.num_ranges=4", "decouple.total_steps=2400", "evaluate.controls=[all-timesteps]"]
    shown = deme("run", "digits", "seeds=[7]", *shape, "--dry-run").out
    text, _, stages = shown.partition("\n\n")
    write_recipe(tmp_path, yaml.safe_load(text), "again.yaml")
    assert json.loads(deme("run", "again.yaml", "--dry-run", "--json").out)["settings"]["seeds"] == [7]
    assert "expert 3 [750,1000)" in stages and "to do: 4,800 steps" in stages


def test_dry_run_of_a_hub_model_says_what_it_would_download(deme: Deme) -> None:
    plan = json.loads(deme("run", "digits", "model.pretrained=nobody/nothing", "--dry-run", "--json").out)
    assert plan["download"].startswith("nobody/nothing@")
    assert plan["seconds"] is None and plan["disk_bytes"] is None


def test_dry_run_of_one_stage_shows_what_it_needs_and_no_more(deme: Deme) -> None:
    shape = ["decouple.num_ranges=4", "merge.search=least_squares", "evaluate.controls=[]", "seeds=[0]"]
    plan = json.loads(deme("search", "digits", *shape, "--dry-run", "--json").out)
    assert [stage["stage"] for stage in plan["stages"]] == ["decouple"] * 4 + ["search"]
    expert = json.loads(deme("decouple", "digits", *shape, "--expert", "2", "--dry-run", "--json").out)
    assert [stage["label"] for stage in expert["stages"]] == ["expert 2 [500,750)"]
    base = json.loads(deme("pretrain", "digits", "--dry-run", "--json").out)
    assert [stage["label"] for stage in base["stages"]] == ["base"]


# wrong input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digts"], "digts: no such recipe, file or run folder; did you mean 'digits'?; see: deme recipes"),
        (["digits", "decouple.num_rangs=2"], "decouple.num_rangs: unknown key; did you mean 'num_ranges'?"),
        (["digits", "decouple.num_ranges"], "decouple.num_ranges: an override is KEY=VALUE"),
        (["digits", "decouple.num_ranges=1001"], "decouple.num_ranges: 1001 ranges do not fit into 1000 timesteps"),
        (["digits", "decouple.global_prob=1.5"], "digits: decouple.global_prob: Input should be less than"),
        (["digits", "model.family=ddmp"], "digits: model.family: 'ddmp' is not one of ddpm, dit, stable_diffusion, "),
        (["digits", "model.pretrained=nowhere"], "model.pretrained: 'nowhere' is no folder, no hub name"),
        (["digits", "model.pretrained=./no/base"], "model.pretrained: './no/base' is no folder"),
        (["digits", "model.pretrained=packaged:digit-base"], "model.pretrained: nothing is packaged as"),
        (["digits", "extractor.pretrained=packaged:digits-base"], "extractor.pretrained: "),
        (["digits", "merge.sampler.name=DDIMSchedulr"], "merge.sampler: 'DDIMSchedulr' is no sampler of diffusers"),
        (["digits", "merge.sampler.num_inference_steps=1001"], "merge.sampler: 1001 steps of DDIMScheduler, but the"),
        (["digits", "evaluate.samplers=[{name: DDPM}, {name: DDIMScheduler}]"], "evaluate.samplers.0: 'DDPM' is no "),
        (["digits", "--out", "file"], "--out file: a file, where a run needs a folder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_wrong_input_is_one_line_and_starts_nothing(
    deme: Deme, tmp_path: Path, words: list[str], said: str, dry: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert deme("run", *words, *dry).refusal.startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "change", "said"),
    [
        ("pretrain", "model.pretrained=packaged:digits-base", "model.pretrained=packaged:digits-base leaves no base"),
        ("extractor", "extractor.kind=inception", "extractor.kind=inception is never trained; only a classifier is"),
        ("extractor", "extractor.pretrained=packaged:digits-cnn", "extractor.pretrained=packaged:digits-cnn leaves no"),
        ("search", "merge.search=none", "merge.search=none leaves no weights to search"),
        ("merge", "merge.method=none", "merge.method=none leaves nothing to merge"),
    ],
)
def test_commands_with_nothing_to_make_say_so(deme: Deme, tmp_path: Path, command: str, change: str, said: str) -> None:
    assert deme(command, "digits", change).refusal.startswith(f"deme {command}: {said}")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_one_line(
    deme: Deme, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (["run", "digits"], ["sample", base, "--images", "images"], ["sample", "digits", "--model", "base"]):
        seeds = ["--seeds", "0"] if words[0] == "sample" else []
        said = deme("-q", *words, *seeds, "runtime.device=cuda", "runtime.jobs=1").refusal
        assert said.startswith("runtime.device: cuda, but torch ")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("share", ["data.report_fraction=0.4", "data.search_fraction=0.3"])
def test_packaged_models_are_refused_where_a_split_holds_their_training_images(deme: Deme, share: str) -> None:
    said = deme("run", "digits", share, "--dry-run").refusal
    assert said.startswith("model.pretrained: packaged:digits-base was trained on all but 0.4 of digits")
    said = deme("run", "digits", share, "model.pretrained=null", "--dry-run").refusal
    assert said.startswith("extractor.pretrained: packaged:digits-cnn was trained on all but 0.4 of digits")
    anew = ["model.pretrained=null", "extractor.pretrained=null"]
    assert deme("run", "digits", share, *anew, "--dry-run").status == 0
    assert deme("run", "digits", "data.report_fraction=0.2", "--dry-run").status == 0


def test_hub_model_without_network_is_one_line(deme: Deme, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    line = deme("run", "digits", "model.pretrained=nobody/nothing").refusal
    assert line.startswith("model.pretrained: nobody/nothing could not be fetched from the hub (")
    assert line.endswith("give a local folder")


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def cut_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, cut_in_the_header, empty])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_truncated_checkpoint_is_named(deme: Deme, base: Path, damage: Callable[[Path], None], dry: list[str]) -> None:
    damage(base)
    line = deme("run", "digits", f"model.pretrained={base}", *dry).refusal
    assert line.startswith(f"{base / WEIGHTS}: not a whole safetensors file")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("model_index.json", "model.pretrained: {base} has no model_index.json"),
        ("scheduler/scheduler_config.json", "model.pretrained: {base} has no scheduler/scheduler_config.json"),
        ("unet/config.json", "{base}: no unet or transformer with a config.json"),
        (WEIGHTS, "{base}/unet: no safetensors"),
    ],
)
def test_folder_that_is_no_pipeline_says_what_it_lacks(deme: Deme, base: Path, gone: str, said: str) -> None:
    (base / gone).unlink()
    assert deme("run", "digits", f"model.pretrained={base}").refusal.startswith(said.format(base=base))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_train_timesteps": "many"}'])
def test_broken_scheduler_config_is_named(deme: Deme, base: Path, text: str) -> None:
    (base / "scheduler" / "scheduler_config.json").write_text(text)
    assert deme("run", "digits", f"model.pretrained={base}").refusal.startswith(
        f"{base}/scheduler/scheduler_config.json"
    )


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, makes: Path) -> None:
        self.makes = makes

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.makes,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_pickle_in_place_of_weights_is_refused_and_never_unpickled(deme: Deme, base: Path, name: str) -> None:
    exploded = base.parent / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    pickle.loads(bomb)
    exploded.rmdir()  # so it would have gone off
    (base / WEIGHTS).unlink()
    (base / "unet" / name).write_bytes(bomb)
    line = deme("run", "digits", f"model.pretrained={base}").refusal
    assert name in line and ("pickles are never loaded" in line or "not a whole safetensors file" in line)
    assert not exploded.exists()


def test_weights_that_do_not_fit_the_architecture_are_refused(deme: Deme, tmp_path: Path, pico_pipeline: Path) -> None:
    wider = Path(shutil.copytree(pico_pipeline, tmp_path / "wider"))
    config = json.loads((wider / "unet" / "config.json").read_text())
    (wider / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    done = deme("decouple", write_recipe(tmp_path, make_pico_values(wider)), "--expert", "0")
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(f"deme: {wider}/unet: weights do not fit config.json: ")


def test_wrong_model_class_in_worker_processes_is_one_line_without_traceback(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet3DModel"}))
    done = outside("-q", "decouple", "digits", f"model.pretrained={base}", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"deme: {base}/unet: a UNet3DModel, but family ddpm needs a UNet2DModel\n"


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits", "--nosuch"],
        ["nosuch"],
        ["run"],
        ["decouple", "digits", "--expert", "-1"],
        ["decouple", "digits", "--expert", "two"],
        ["run", "digits", "--jobs", "0"],
    ],
)
def test_usage_errors_exit_2(deme: Deme, words: list[str]) -> None:
    done = deme(*words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("deme: ") and "--help" in done.err


def test_expert_out_of_range_says_how_many_there_are(deme: Deme) -> None:
    words = ["decouple", "digits", "decouple.num_ranges=4", "--expert", "4"]
    assert deme(*words).refusal == "--expert 4: the recipe has 4 experts, 0 to 3"
    assert deme(*words, "--dry-run").refusal.startswith("--expert 4")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted: nothing is lost; run the same command again to go on"),
        (Interrupted("base: step 2"), 130, "interrupted: base: step 2; run the same command again to go on"),
        (MachineError("cannot write a:\n disk full"), 1, "cannot write a: disk full"),
        (OSError(28, "No space left on device", "b"), 1, "b: No space left on device"),
    ],
)
def test_status_of_interruptions_and_machine_failures(
    deme: Deme, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(runs.Run, "execute", fail)
    done = deme("run", "digits")
    assert (done.status, done.out, done.err) == (status, "", f"deme: {line}\n")


# runs


def test_run_again_computes_nothing(deme: Deme, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: object) -> None:
        raise AssertionError("a stage was made again")

    monkeypatch.setattr(Store, "produce", compute)
    again = deme("run", copied)
    assert again.status == 0 and "done already" in again.err
    assert str(copied / "report.html") in again.out
    plan = json.loads(deme("run", copied, "--dry-run", "--json").out)
    assert plan["steps"] == 0 and {stage["status"] for stage in plan["stages"]} == {"done"}


def test_report_writes_the_page_of_a_finished_run_again(deme: Deme, copied: Path) -> None:
    (copied / "report.html").unlink()
    before = json.loads((copied / "table.json").read_text())
    assert json.loads(deme("report", copied, "--json").out) == before
    assert (copied / "report.html").stat().st_size > 1000


def test_report_of_an_unfinished_run_says_how_to_finish_it(deme: Deme, copied: Path) -> None:
    shutil.rmtree(copied.parent / "store" / "cost")
    line = deme("report", copied).refusal
    assert line == f"{copied}: a stage is not done (cost of serving); first: deme run {copied}"


def test_report_of_what_is_no_run(deme: Deme, copied: Path) -> None:
    assert deme("report", "nowhere").refusal.startswith("nowhere: no such run folder")
    assert deme("report", copied.parent).refusal == f"{copied.parent}: no recipe.yaml in it, so it is no run folder"
    (copied / "run.json").write_text("{")
    assert deme("report", copied).refusal.startswith(f"{copied}/run.json: ")


def test_out_of_another_recipe_is_refused_and_left_as_it_was(deme: Deme, copied: Path, pico_pipeline: Path) -> None:
    other = write_recipe(copied.parent.parent, {**make_pico_values(pico_pipeline), "seeds": [5]})
    before = (copied / "recipe.yaml").read_bytes(), (copied / "run.json").read_bytes()
    line = deme("run", other, "--out", copied).refusal
    expected = "holds another recipe (seeds is [0] there, [5] here); choose another folder with --out"
    assert line == f"{copied}: {expected}"
    assert ((copied / "recipe.yaml").read_bytes(), (copied / "run.json").read_bytes()) == before


def test_other_runtime_settings_are_not_another_recipe(deme: Deme, copied: Path) -> None:
    again = deme("run", copied, "runtime.logging_steps=7", "--json")
    assert again.status == 0 and len(json.loads(again.out)) == 6


def test_more_steps_than_a_small_model_has_timesteps(deme: Deme, tmp_path: Path, pico_values: dict[str, Any]) -> None:
    pico_values["evaluate"]["samplers"][1]["num_inference_steps"] = T + 1
    line = deme("run", write_recipe(tmp_path, pico_values)).refusal
    assert line == f"evaluate.samplers.1: {T + 1} steps of DDPMScheduler, but the model has {T} timesteps"


def test_one_expert_is_trained_alone_and_printed(deme: Deme, tmp_path: Path, pico_values: dict[str, Any]) -> None:
    made = json.loads(deme("decouple", write_recipe(tmp_path, pico_values), "--expert", "1", "--json").out)
    assert [(entry["label"], entry["stage"]) for entry in made] == [("expert 1 [10,20)", "decouple")]
    assert Path(made[0]["folder"], WEIGHTS).is_file()
    assert len(list(Path("runs/store/decouple").glob("*/manifest.json"))) == 1
    assert yaml.safe_load(Path("runs/pico/recipe.yaml").read_text())["decouple"]["num_ranges"] == 2


# images


def test_images_by_seed_are_png_files_that_grow(deme: Deme, copied: Path, tmp_path: Path) -> None:
    done = deme("sample", copied, "--seeds", "0,2-3", "--images", "images", "--grid")
    assert (done.status, done.out) == (0, "3 images of merged by DDIM-2: images\n")
    pngs = ["seed-00000000.png", "seed-00000002.png", "seed-00000003.png"]
    assert sorted(path.name for path in Path("images").iterdir()) == ["grid.png", "protocol.json", *pngs]
    protocol = json.loads(Path("images/protocol.json").read_text())
    assert protocol["seeds"] == "0,2-3" and protocol["sampler"]["num_inference_steps"] == 2
    again = json.loads(deme("sample", copied, "--seeds", "2-4", "--images", "images", "--json").out)
    assert [Path(file).name for file in again["files"]] == [*pngs[1:], "seed-00000004.png"]
    assert again["seeds"] == [2, 3, 4] and all(Path(file).is_file() for file in again["files"])


def test_images_go_into_the_run_by_model_and_sampler(deme: Deme, copied: Path) -> None:
    words = ["--sampler", "DDIMScheduler", "--steps", "3", "--eta", "1", "--spacing", "trailing", "--format", "npy"]
    assert deme("sample", copied, "--model", "expert-1", "--seeds", "5,1", *words).status == 0
    folder = copied / "images" / "expert-1-DDIM-3-eta1-trailing"
    assert np.load(folder / "images.npy").shape == (2, 8, 8, 1)
    assert json.loads((folder / "seeds.json").read_text()) == [5, 1]
    assert deme("clean", "--runs", copied.parent).out.startswith("0 stages")


def test_images_without_seeds_are_those_of_the_table_named_by_their_seeds(deme: Deme, copied: Path) -> None:
    stored = Store(copied.parent / "store")
    graph = runs.open_run(runs.load(str(copied))).graph
    expected = np.load(stored.folder(graph.samples["base", 0].key) / "images.npy")
    assert deme("sample", copied, "--model", "base", "--images", "all", "--format", "npy").status == 0
    assert np.array_equal(np.load("all/images.npy"), expected) and len(expected) == 16
    seeds = json.loads(Path("all/seeds.json").read_text())
    assert deme("sample", copied, "--model", "base", "--images", "files").status == 0
    assert len(list(Path("files").glob("seed-*.png"))) == 16
    anew = ["--seeds", ",".join(map(str, seeds[:3])), "--images", "anew", "--format", "npy"]
    assert deme("sample", copied, "--model", "base", *anew).status == 0
    assert np.abs(np.load("anew/images.npy").astype(int) - expected[:3]).max() <= 1
    line = deme("sample", copied, "--images", "other", "--steps", "3").refusal
    assert line.startswith("the table has no images of merged by DDIM-3, only of base, all-timesteps, ")
    assert "by DDIM-2, DDPM-3; give --seeds" in line


def test_stages_of_one_model_without_images(deme: Deme, copied: Path) -> None:
    plan = json.loads(deme("sample", copied, "--model", "base", "--dry-run", "--json").out)
    assert [stage["label"] for stage in plan["stages"]] == ["sample base DDIM-2 #0", "sample base DDPM-3 #0"]


def test_images_of_a_plain_pipeline(deme: Deme, copied: Path, tmp_path: Path) -> None:
    merged = copied / "merged"
    words = ["--seeds", "0-2", "--steps", "2", "--images"]
    assert deme("sample", merged, *words, "plain", "runtime.device=cpu").status == 0
    assert deme("sample", copied, *words, "run").status == 0
    for name in ("seed-00000000.png", "seed-00000002.png"):
        assert Path("plain", name).read_bytes() == Path("run", name).read_bytes()
    shown = deme("sample", merged, *words, "new", "--dry-run")
    assert shown.out == "to do: 3 images by DDIM-2 into new\n" and not Path("new").exists()
    assert deme("sample", merged, "--seeds", "0").refusal.endswith("whose images need --seeds and --images")
    assert deme("sample", merged, *words, "new", "--model", "base").refusal.startswith("--model: ")
    assert deme("sample", merged, *words, "new", "seeds=[1]").refusal.startswith("seeds=[1]: ")
    assert deme("sample", merged, *words, "new", "--steps", T + 1).refusal.startswith(f"--sampler: {T + 1} steps")


def test_dry_run_of_images_checks_them_and_samples_nothing(deme: Deme, copied: Path) -> None:
    words = ["--seeds", "0-9", "--images", "images", "--dry-run"]
    assert "to do: 0 steps" in deme("sample", copied, *words).out
    assert deme("sample", copied, *words, "--model", "merget").refusal.endswith("did you mean 'merged'?")
    assert not Path("images").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "5-2"], "--seeds 5-2: '5-2' runs backwards; did you mean '2-5'?"),
        (["--seeds", "a"], "--seeds a: 'a' is no seed"),
        (["--seeds", "-1"], "--seeds -1: '-1' is no seed"),
        (["--seeds", "1,1"], "--seeds 1,1: 1 is there twice"),
        (["--seeds", "0", "--model", "merge"], "--model merge: the run has base, all-timesteps, "),
        (["--model", "ensembl"], "--model ensembl: the run has "),
        (["--seeds", "0", "--format", "pgn"], "Invalid value for '--format': "),
        (["--seeds", "0", "--images", "file"], "--images file: a file, where a folder is needed"),
        (["--seeds", "0", "--images", "."], "--images .: holds files that are not ours; give a new or empty folder"),
        (["--seeds", "0", "--sampler", "DDIM"], "--sampler: 'DDIM' is no sampler of diffusers for discrete schedules; "
                                                "did you mean 'DDIMScheduler'?"),
        (["--seeds", "0", "--sampler", "DDPMScheduler", "--eta", "1"], "--sampler: DDPMScheduler has no eta"),
        (["--seeds", "0", "--eta", "1.5"], "Invalid value for '--eta': "),
        (["--sampler", "DDPMScheduler"], "--sampler: it is for --seeds or --images"),
        (["--grid"], "--grid: it is for --seeds or --images"),
        (["--out", "file", "--seeds", "0"], "--out file: a file, where a run needs a folder"),
    ],
)  # fmt: skip
def test_wrong_requests_for_images_are_one_line_and_write_nothing(
    deme: Deme, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    assert deme("sample", "digits", *words).refusal.startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_of_a_model_that_cannot_be_opened_leave_nothing(deme: Deme, base: Path, tmp_path: Path) -> None:
    cut_short(base)
    assert "not a whole safetensors file" in deme("sample", base, "--seeds", "0", "--images", "images").refusal
    assert not (tmp_path / "images").exists()


# clean


def test_clean_removes_what_no_run_refers_to_and_keeps_the_rest(deme: Deme, copied: Path) -> None:
    store = Store(copied.parent / "store")
    loose = store.produce(Key("merge", 1, {}, {}, 0), lambda folder: {"bytes": (folder / "a").write_bytes(b"12345")})
    (loose.folder / "manifest.json").write_bytes(bytes(1_499_995))
    kept = sorted(path for path in store.root.glob("*/*") if path.is_dir() and path != loose.folder)
    assert len(kept) > 10
    said = f"would remove {loose.folder} (1.5 MB)\n1 stages, 1.5 MB\n"
    assert deme("clean", "--runs", copied.parent, "--dry-run") == Outcome(0, said, "")
    assert loose.folder.is_dir()
    assert deme("clean", "--runs", copied.parent) == Outcome(0, said.replace("would remove", "removed"), "")
    assert sorted(path for path in store.root.glob("*/*") if path.is_dir()) == kept
    assert deme("clean", "--runs", copied.parent).out == "0 stages, 0.0 MB\n"
    shutil.rmtree(copied)
    assert f"\n{len(kept)} stages, " in deme("clean", "--runs", copied.parent).out
    assert not [path for path in store.root.glob("*/*") if path.is_dir()]


def test_clean_of_a_missing_folder_is_refused(deme: Deme) -> None:
    assert deme("clean").refusal == "runs: no such folder"
    assert deme("clean", "--runs", "nowhere").refusal == "nowhere: no such folder"


def test_a_run_that_has_only_begun_keeps_its_finished_stages(
    deme: Deme, tmp_path: Path, pico_values: dict[str, Any]
) -> None:
    deme("decouple", write_recipe(tmp_path, pico_values), "--expert", "0")
    assert deme("clean").out == "0 stages, 0.0 MB\n"
    recipe = runs.open_run(runs.load("runs/pico")).recipe
    assert (tmp_path / "runs" / "pico" / "recipe.yaml").read_text() == to_yaml(recipe)
