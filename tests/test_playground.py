"""The playground: a session merges and saves what a run would; what the server refuses; whose request counts."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import make_pico_values
from deme_diffusion.cli import main
from deme_diffusion.config import SamplerSettings
from deme_diffusion.errors import Stopped, UserError
from deme_diffusion.evaluation.sample import sample_batch
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.statistics import Statistics
from deme_diffusion.models.projection import FILE
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.playground import answers, asking, ready, serving
from deme_diffusion.playground.saving import PLAYED, check_name, free_name, save
from deme_diffusion.playground.session import Session, _Watched
from deme_diffusion.playground.worker import Superseded, Ticket, Worker
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weight_files import read_json

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
DDIM, SEEDS = SamplerSettings(num_inference_steps=2), [3, 4, 5]


def finished(folder: Path, values: dict[str, Any]) -> Run:
    run = open_run(Loaded(parse(values, where="test"), {}), out=folder / "pico", command="deme run pico")
    logger = logging.getLogger("deme_diffusion")
    logger.setLevel(logging.ERROR)
    run.execute(lambda graph: list(graph.merged.values()))
    logger.setLevel(logging.NOTSET)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Run:
    values = make_pico_values(pico_pipeline)
    values["decouple"]["learning_rate"] = 1e-2
    return finished(tmp_path_factory.mktemp("play"), values)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Run:
    """With projections of which some fold nowhere."""
    values = make_pico_values(pico_pipeline)
    values["decouple"] |= {"projection": "block", "learning_rate": 1e-2, "use_ema": False}
    values["merge"] |= {"search": "none", "weights": [0.7, 0.6]}
    return finished(tmp_path_factory.mktemp("projected"), values)


@pytest.fixture(scope="module")
def session(run: Run) -> Iterator[Session]:
    opened = Session(run)
    yield opened
    opened.close()


def images(session: Session, values: list[float] | None, *, by_layer: bool = False) -> Any:
    weights = None if values is None else session.weights(values, by_layer)
    return session.sample(weights, DDIM, SEEDS, Ticket())[0]


def served(run: Run, part: Any) -> Any:
    """The same images of a model of the run, without the playground."""
    stages = Stages(run.graph, run.store)
    return sample_batch(stages.denoiser, stages.component(part), DDIM, SEEDS)


# -- what is merged --------------------------------------------------------------------------------


def test_a_one_hot_is_its_expert_and_zero_the_base_bit_for_bit(run: Run, session: Session) -> None:
    ends = [images(session, [1.0, 0.0]), images(session, [0.0, 1.0])]
    for end, expert in zip(ends, run.graph.experts[0], strict=True):
        assert np.array_equal(end, served(run, expert))
    base = served(run, run.graph.base)
    assert np.array_equal(images(session, [0.0, 0.0]), base)
    assert np.array_equal(images(session, None), base)
    assert not np.array_equal(ends[0], ends[1]) and not np.array_equal(ends[0], base)


@pytest.mark.parametrize("name", ["run", "projected"])
def test_the_preset_merged_is_the_runs_merged_pipeline(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    session = Session(run)
    preset = next(one for one in session.presets if one.name == "merged")
    assert not preset.by_layer
    assert np.array_equal(images(session, list(preset.values)), served(run, run.graph.merged[0]))
    session.close()


def test_change_is_the_relative_norm_of_the_merged_task_vector(session: Session) -> None:
    assert session.merge(session.weights([0.0, 0.0]), Ticket()).change == 0.0
    whole = session.merge(session.weights([1.0, 0.0]), Ticket()).change
    half = session.merge(session.weights([0.5, 0.0]), Ticket()).change
    assert whole > 0 and half == pytest.approx(whole / 2, rel=1e-4)


def test_losses_are_those_of_the_models(run: Run, session: Session) -> None:
    told = session.losses(session.weights([1.0, 0.0]), Ticket())
    stages = Stages(run.graph, run.store)
    assert told["base"] == session.noise.losses(stages.denoiser.module)
    expert = session.noise.losses(stages.component(run.graph.experts[0][0]))
    assert told["merged"] == pytest.approx(expert, rel=1e-6)  # kernels differ by where in memory the weights lie
    assert told["merged"] != pytest.approx(told["base"], rel=1e-4)
    assert session.noise.split.name == "search"


def test_a_merge_that_is_not_wanted_any_more_ends_and_the_next_is_whole(run: Run, session: Session) -> None:
    expected = images(session, [1.0, 0.0])
    ticket, session._images = Ticket(), type(session._images)()
    ticket.drop()
    with pytest.raises(Superseded):
        session.sample(session.weights([0.3, 0.3]), DDIM, SEEDS, ticket)
    assert np.array_equal(images(session, [1.0, 0.0]), expected)


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
def test_weights_are_one_finite_number_an_expert(session: Session, values: list[float]) -> None:
    with pytest.raises(UserError, match="weights: "):
        session.weights(values)


# -- saving ----------------------------------------------------------------------------------------

STOCK = """
import sys
sys.modules["deme_diffusion"] = None
import numpy as np, torch
from diffusers import DDIMPipeline
torch.set_num_threads(1)
pipeline = DDIMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
make = lambda seed: pipeline(batch_size=1, generator=torch.Generator().manual_seed(seed), num_inference_steps=2,
                             output_type="np").images[0]
np.save(sys.argv[2], np.stack([make(seed) for seed in (3, 4, 5)]))
"""


def test_a_saved_model_gives_the_sessions_images_in_stock_diffusers(session: Session, tmp_path: Path) -> None:
    weights = session.weights([0.7, -0.2])
    saved = save(session, "by-hand", weights)
    assert saved.folder == session.run.folder / PLAYED / "by-hand" and not saved.unfolded
    subprocess.run([sys.executable, "-c", STOCK, saved.folder, tmp_path / "x.npy"], check=True, cwd=tmp_path)
    found = (np.load(tmp_path / "x.npy") * 255).round().astype(np.uint8)
    ours = np.concatenate([session.sample(weights, DDIM, [seed], Ticket())[0] for seed in SEEDS])
    assert np.array_equal(found.reshape(ours.shape), ours)
    told = read_json(saved.folder / "merge.json")
    assert told["weights"]["values"] == [0.7, -0.2] and told["weights_source"] == "chosen by hand (deme play)"
    card = (saved.folder / "README.md").read_text()
    assert str(session.run.folder.parent) not in card and 'from_pretrained("OWNER/by-hand")' in card
    assert "chosen by hand" in card and "| merged | 0.7 | -0.2 |" in card
    with pytest.raises(UserError, match="exists already; choose another name"):
        save(session, "by-hand", weights)


def test_what_folds_into_no_weight_is_saved_beside_and_said(projected: Run) -> None:
    session = Session(projected)
    saved = save(session, "with.projections", session.weights([0.5, 0.5]))
    assert saved.unfolded == ["down_blocks.0", "down_blocks.1", "mid_block"]
    assert (saved.folder / "unet" / FILE).is_file()
    assert "attach_projection(pipeline.unet" in (saved.folder / "README.md").read_text()
    session.close()


BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "../x",
    "a\\b",
    "x" * 65,
    "a b",
    "tail.",
    "\n",
    "ü",
    "m.safetensors",
    "nul",
    "COM1.x",
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(UserError, match="name "):
        check_name(name)


def test_a_wrong_name_is_answered_by_the_nearest_right_one() -> None:
    with pytest.raises(UserError, match="did you mean 'my-model'"):
        check_name("../my model")
    with pytest.raises(UserError, match="that of a file, where a folder is written; did you mean 'm'"):
        check_name("m.SafeTensors")


def test_the_next_name_is_free(tmp_path: Path) -> None:
    for name in ("by-hand", "by-hand-2"):
        (tmp_path / PLAYED / name).mkdir(parents=True)
    assert free_name(tmp_path) == free_name(tmp_path, "by-hand-2") == "by-hand-3"
    assert free_name(tmp_path, "x" * 64) == "x" * 57


def test_the_command_beside_makes_the_run_of_exactly_the_weights_on_the_page(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two weights give two runs, which find base and experts of the first one; 1e-05 is a word in YAML."""
    values = [[0.1 + 0.2, 0.25], [0.3, 1e-05], [0.3, -0.0]]
    commands = [shlex.split(answers.command(session, session.weights(row))) for row in values]
    assert len({words[-1] for words in commands}) == 3
    for words, row in zip(commands, values, strict=True):
        assert words[:3] == ["deme", "run", str(session.run.folder)] and words[-2] == "--out"
        monkeypatch.setattr("sys.argv", [*words, "--dry-run", "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        done = {stage["label"]: stage["status"] for stage in json.loads(capsys.readouterr().out)["stages"]}
        experts = [label for label in done if label.startswith("expert")]
        assert len(experts) == 2 and all(done[label] == "done" for label in experts)
        made = load(words[2], words[3:-2]).recipe.merge
        assert made.weights == tuple(row) and made.search == "none"


def test_a_method_without_weights_has_one_merged_model(pico_pipeline: Path, tmp_path: Path) -> None:
    values = make_pico_values(pico_pipeline)
    values["decouple"]["learning_rate"] = 1e-2
    values["merge"] |= {"method": "average", "search": "none"}
    session = Session(finished(tmp_path, values))
    told = answers.facts(session, 4)
    assert [preset["name"] for preset in told["presets"]] == ["merged"] and not told["weighted"]
    weights = session.weights(told["presets"][0]["values"])
    assert np.array_equal(
        session.sample(weights, DDIM, SEEDS, Ticket())[0], served(session.run, session.graph.merged[0])
    )
    with pytest.raises(UserError, match="method average takes none"):
        session.weights([0.0, 1.0])
    assert answers.command(session, weights) == ""
    card = (save(session, "plain", weights).folder / "README.md").read_text()
    assert "by hand" not in card and "| merged |" not in card
    session.close()


def test_weights_by_layer_that_a_search_found_are_a_preset_and_in_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"down_blocks.*": (1.0, 0.0), "conv_in.*": (0.25, 0.5)}
    found = MergeWeights((0.0, 0.0), rules), {"source": "gradient, by layer"}
    monkeypatch.setattr(Stages, "weights_of", lambda self, node: found)
    session = Session(run)
    preset = next(one for one in session.presets if one.name == "merged")
    assert preset.by_layer and "by layer" in preset.what
    weights = session.weights(preset.values, preset.by_layer)
    assert weights == found[0] and session.weights(preset.values).rules == {}
    assert not np.array_equal(images(session, [0.0, 0.0], by_layer=True), images(session, None))
    made = load(str(run.folder), shlex.split(answers.command(session, weights))[3:-2]).recipe.merge
    assert MergeWeights(made.weights or (), made.weights_for) == weights
    session.close()


# -- before it opens -------------------------------------------------------------------------------


def test_a_run_without_its_experts_says_what_to_run_first(pico_values: dict[str, Any], tmp_path: Path) -> None:
    run = open_run(Loaded(parse(pico_values, where="test"), {}), out=tmp_path / "pico", download=False)
    with pytest.raises(UserError, match=r"2 of the 3 models .*expert 0 \[0,10\).*; first: deme run pico$"):
        ready.check_ready(run, ["deme", "run", "pico"])


def test_where_the_folder_holds_another_recipe_the_hint_names_another_folder(run: Run) -> None:
    words = ["deme", "run", str(run.folder), "decouple.num_ranges=3"]
    changed = open_run(load(words[2], words[3:]), download=False)
    other = f"{run.folder}-2"
    with pytest.raises(UserError) as told:
        ready.check_ready(changed, words)
    assert str(told.value).endswith(f"first: {' '.join(words)} --out {other}, then: deme play {other}")


def test_a_port_that_is_taken_is_said() -> None:
    with serving.bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert serving.url_of(taken, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--port {port}: taken; give another one, or 0"):
            serving.bound("127.0.0.1", port)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs starlette and uvicorn: pip install 'deme-diffusion\[ui\]'"):
        serving.check_installed()


def test_samplers_are_the_recipes_and_stock_ones_that_can_be_had(run: Run) -> None:
    offered = ready.samplers(run.graph)
    assert list(offered)[:2] == ["DDIM-2", "DDPM-3"] and "DDIM" not in offered
    assert "PNDM" not in offered  # it takes four steps or more
    assert ready.sampler_of(run.graph, "DDPM-3", 5).label == "DDPM-5"
    for label, steps, match in (("DDIM-9", 2, "there are DDIM-2"), ("DDIM-2", 21, "21 steps")):
        with pytest.raises(UserError, match=match):
            ready.sampler_of(run.graph, label, steps)


# -- whose request counts --------------------------------------------------------------------------


class Busy:
    """Work that goes on until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, ticket: Ticket) -> str:
        while not self.go.wait(0.005):
            ticket.tell("busy", 1, 2)
            self.begun.set()
        return "done"


def ended(future: Future[Any]) -> bool:
    return isinstance(future.exception(timeout=10), Superseded)


def test_the_newest_of_a_tag_counts_and_others_are_left_alone() -> None:
    worker, first = Worker(), Busy()
    running = worker.submit("a", first, ["a"])
    assert first.begun.wait(10) and worker.progress("a") == ("busy", 1, 2)
    other = worker.submit("b", lambda ticket: "b", ["b"])
    crowd = [worker.submit("a", lambda ticket, i=i: i, ["a"]) for i in range(50)]
    assert ended(running) and all(ended(one) for one in crowd[:-1])
    assert crowd[-1].result(10) == 49 and other.result(10) == "b"
    worker.close()


def test_closing_ends_what_runs_and_what_waits() -> None:
    worker, first = Worker(), Busy()
    both = [worker.submit("a", first), worker.submit("b", first)]
    assert first.begun.wait(10)
    assert worker.close()
    assert all(map(ended, both)) and worker.progress("a") is None and not worker.gave_up


def test_what_lasts_goes_first_and_is_let_end() -> None:
    worker, first, order = Worker(), Busy(), list[str]()
    running = worker.submit("a", first)
    assert first.begun.wait(10)
    waits = worker.submit("b", lambda ticket: order.append("b"))
    saves = [worker.submit("s", lambda ticket, name=name: order.append(name), lasting=True) for name in "12"]
    assert worker.progress("s") == ("waiting: busy", 1, 2)
    assert worker.stop() and ended(running) and ended(waits)
    assert [one.result(10) for one in saves] == [None, None] and order == ["1", "2"]
    assert worker.close() and not worker.gave_up


def test_what_lasts_is_given_up_when_closed() -> None:
    worker, first = Worker(), Busy()
    saving = worker.submit("s", first, lasting=True)
    assert first.begun.wait(10) and worker.stop() and not saving.done()
    assert worker.close() and worker.gave_up and ended(saving)


def test_a_first_step_that_fails_is_told_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(lambda: 1 // 0)
    assert worker.submit("a", lambda ticket: 1).result(10) == 1 and "ZeroDivisionError" in caplog.text
    worker.close()


def test_a_failure_is_the_requests_own_and_a_crowd_is_refused() -> None:
    worker, first = Worker(), Busy()
    bad = worker.submit("x", lambda ticket: 1 // 0)
    assert isinstance(bad.exception(10), ZeroDivisionError)
    worker.submit("a", first)
    assert first.begun.wait(10)
    with pytest.raises(UserError, match="requests are waiting already"):
        for i in range(20):
            worker.submit(i, first)
    worker.close()


# -- the server ------------------------------------------------------------------------------------


class Client:
    """What a page sends, and what comes back; it names its server, as a page does."""

    def __init__(self, port: int) -> None:
        self.port, self.server = port, ""
        self.server = self.ask("/api/facts")[1].get("server", "")

    def busy(self, kind: str = "samples", page: str = "p") -> str:
        """What the page's work is at; '' of none."""
        told = self.ask(f"/api/progress?page={page}&server={self.server}")[1]
        return str(told[kind][0]) if kind in told else ""

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
        body = {"server": self.server, **body} if isinstance(body, dict) else body
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        sent = {key: value for key, value in {**own, **(headers or {})}.items() if value}
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        text, told = answer.read(), answer.headers
        connection.close()
        return answer.status, json.loads(text) if path.startswith("/api") else text, told


@contextmanager
def running(session: Session, worker: Worker, token: str | None = None) -> Iterator[Client]:
    import uvicorn

    from deme_diffusion.playground.server import make_app

    app = make_app(session, worker, host="127.0.0.1", images=4, token=token)
    with serving.bound("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Client(listening.getsockname()[1])
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(session: Session, worker: Worker) -> Iterator[Client]:
    with running(session, worker) as made:
        yield made


SAMPLES: dict[str, Any] = {"page": "p", "weights": [0.5, 0.5], "sampler": "DDIM-2", "steps": 2, "images": 3, "seed": 3}


def pixels(coded: list[str]) -> Any:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in coded])


def test_the_page_gets_the_sessions_images_to_the_pixel(client: Client, session: Session) -> None:
    status, told, _ = client.ask("/api/samples", SAMPLES)
    assert status == 200 and told["sampler"] == "DDIM-2"
    base, merged = images(session, None)[..., 0], images(session, [0.5, 0.5])[..., 0]
    assert np.array_equal(pixels(told["base"]), base) and np.array_equal(pixels(told["merged"]), merged)
    change = merged.astype(int) - base.astype(int)
    assert np.array_equal(pixels(told["changes"]), (128 + 4 * change).clip(0, 255))
    assert told["difference"] == pytest.approx(np.abs(change).mean())
    assert "'merge.weights=[0.5, 0.5]' --out" in told["command"]
    assert told["command"].startswith("deme run ")
    again = client.ask("/api/samples", {**SAMPLES, "known": told["key"]})[1]
    assert again["base"] is None and again["merged"] == told["merged"]


def test_the_page_is_served_with_a_policy_that_lets_it_ask_nobody_else(client: Client) -> None:
    for path in ("/", "/play.js", "/play.css"):
        status, text, headers = client.ask(path)
        assert status == 200 and text and b"http" not in text.replace(b"http://www.w3.org", b"")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("samples", b"{", "Invalid JSON"),
        ("samples", b"[]", "Input should be an object"),
        ("samples", {**SAMPLES, "weights": [0.5]}, "weights: 1 given for 2 experts"),
        ("samples", json.dumps({**SAMPLES, "server": "s", "weights": [float("nan"), 0]}).encode(), "weights.0: "),
        ("samples", json.dumps({**SAMPLES, "server": "s", "weights": [float("inf"), 0]}).encode(), "weights.0: "),
        ("samples", {**SAMPLES, "weights": [1e9, 0]}, "weights.0: "),
        ("samples", {**SAMPLES, "weights": ["0.5", 0]}, "weights.0: "),
        ("samples", {**SAMPLES, "sampler": "EDMEulerScheduler"}, "sampler: 'EDMEulerScheduler'; there are DDIM-2"),
        ("samples", {**SAMPLES, "steps": 21}, "21 steps"),
        ("samples", {**SAMPLES, "images": 257}, "images: "),
        ("samples", {**SAMPLES, "images": 0}, "images: "),
        ("samples", {**SAMPLES, "seed": -1}, "seed: "),
        ("samples", {**SAMPLES, "page": "../p"}, "page: "),
        ("samples", {**SAMPLES, "more": 1}, "more: "),
        ("save", {"page": "p", "weights": [0, 1], "name": "../../x"}, "name '../../x'"),
        ("samples", b" " * 70000, "more than 65536 bytes"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(client: Client, path: str, body: Any, said: str) -> None:
    status, told, _ = client.ask(f"/api/{path}", body)
    assert status == 400 and said in told["error"] and "\n" not in told["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": "192.168.1.7"}, 421),
        ({"Host": "["}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "[::1]:1", "Origin": "http://[::1]:1"}, 200),
        ({"Origin": "", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_only_pages_of_this_server_may_ask(client: Client, headers: dict[str, str], status: int) -> None:
    assert client.ask("/api/samples", SAMPLES, headers)[0] == status


def test_a_foreign_name_does_not_get_the_page_either(client: Client) -> None:
    assert client.ask("/", None, {"Host": "evil.example"})[0] == 421
    assert client.ask("/api/facts", None, {"Host": "evil.example"})[0] == 421


def test_a_server_of_the_network_is_asked_by_address_and_never_by_a_foreign_name() -> None:
    from deme_diffusion.playground.guard import Guard, Headers

    guard = Guard(None, "0.0.0.0")  # type: ignore[arg-type]
    wrong = [
        guard._wrong("GET", Headers({"host": host})) for host in ("192.168.1.7:7860", "[fe80::1]:1", "evil.example")
    ]
    assert wrong[:2] == [None, None] and wrong[2] is not None


def test_of_many_requests_of_a_page_the_newest_is_answered(client: Client, worker: Worker) -> None:
    busy, answers = Busy(), dict[float, Any]()
    blocked = worker.submit("someone", busy)
    assert busy.begun.wait(10)

    def ask(weight: float) -> None:
        answers[weight] = client.ask("/api/samples", {**SAMPLES, "weights": [weight, 0]})[1]

    threads = [threading.Thread(target=ask, args=(weight,)) for weight in (0.1, 0.2, 0.3)]
    for i, thread in enumerate(threads):
        thread.start()
        while len(answers) < i or not client.busy().startswith("waiting"):
            assert thread.is_alive()
    busy.go.set()
    for thread in threads:
        thread.join(10)
    assert blocked.result(10) == "done"
    assert answers[0.1] == answers[0.2] == {"superseded": True} and len(answers[0.3]["merged"]) == 3


@contextmanager
def slowly(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Each forward pass waits, until the event is set."""
    go, forward = threading.Event(), _Watched.forward

    def slow(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        go.wait(0.05)
        return forward(self, *args, **kwargs)

    session._images.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_Watched, "forward", slow)
        yield go
        go.set()


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def sent(client: Client, body: dict[str, Any]) -> HTTPConnection:
    """A request for samples whose answer is not waited for."""
    headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{client.port}"}
    connection = HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("POST", "/api/samples", json.dumps({"server": client.server, **body}), headers)
    return connection


LONG = {**SAMPLES, "steps": 20, "page": "long"}


def test_a_client_that_went_away_keeps_the_worker_from_nothing(
    client: Client, session: Session, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slowly(session, monkeypatch) as go:
        connection = sent(client, LONG)
        until(lambda: client.busy(page="long"))
        connection.close()
        until(lambda: not worker.busy)
        assert not go.is_set() and not session._images


def test_stop_ends_all_of_a_page_and_of_no_other(
    client: Client, session: Session, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slowly(session, monkeypatch) as go:
        connection = sent(client, LONG)
        until(lambda: client.busy(page="long"))
        assert client.ask("/api/stop", {"page": "other"})[:2] == (200, {}) and worker.busy
        assert client.ask("/api/stop", {"page": "long"})[:2] == (200, {})
        assert json.loads(connection.getresponse().read()) == {"superseded": True}
        until(lambda: not worker.busy)
        assert not go.is_set()


def test_a_change_of_weights_throws_no_base_away_and_a_change_of_seeds_does(
    client: Client, session: Session, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    tell = Ticket.tell
    monkeypatch.setattr(Ticket, "tell", lambda self, *args, **more: (tell(self, *args, **more), told.append(args[0])))
    with slowly(session, monkeypatch) as go:
        first = sent(client, LONG)
        until(lambda: "sampling the base" in told)
        second = sent(client, {**LONG, "weights": [0.3, 0.1]})
        assert json.loads(first.getresponse().read()) == {"superseded": True}
        assert client.busy(page="long") == "waiting: sampling the base"
        go.set()
        assert len(json.loads(second.getresponse().read())["merged"]) == 3
        assert told.count("sampling the base") == told.count("sampling the merged model") == 20
    with slowly(session, monkeypatch) as go:
        told.clear()
        first = sent(client, LONG)
        until(lambda: "sampling the base" in told)
        second = sent(client, {**LONG, "seed": 4})
        assert json.loads(first.getresponse().read()) == {"superseded": True}
        until(lambda: not client.busy(page="long").startswith("waiting"))
        go.set()
        assert len(json.loads(second.getresponse().read())["merged"]) == 3
        assert 20 < told.count("sampling the base") < 40


def test_a_page_of_a_server_before_this_one_is_told_to_load_again(client: Client) -> None:
    for body in ({**SAMPLES, "server": "0" * 16}, {**SAMPLES, "server": ""}):
        status, told, _ = client.ask("/api/samples", body)
        assert status == 409 and told["reload"] and "another run is served here now" in told["error"]
    assert client.ask(f"/api/progress?page=p&server={'0' * 16}")[0] == 409
    status, told, _ = client.ask("/api/samples", json.dumps(SAMPLES).encode())
    assert status == 400 and "server: " in told["error"]


def test_the_key_of_a_base_is_its_own(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking.AskedSamples(server="", **{**SAMPLES, "weights": (0.5, 0.5)})
    key = answers.wanted(session, asked).key
    other = dataclasses.replace(session.graph.base, digest="0" * 16)
    monkeypatch.setattr(session.graph, "base", other)
    assert answers.wanted(session, asked).key != key


def test_an_answer_is_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_BYTES", 3 * 3 * 64)
    told = answers.facts(session, 16)
    assert told["images"] == told["most"]["images"] == 3
    with pytest.raises(UserError, match="images: 4; at most 3 of this size"):
        answers.wanted(session, asking.AskedSamples(server="", **{**SAMPLES, "weights": (0.5, 0.5), "images": 4}))


def test_from_afar_only_the_printed_address_lets_in(session: Session, worker: Worker) -> None:
    with running(session, worker, token="secret") as afar:
        assert afar.ask("/")[0] == afar.ask("/?token=wrong")[0] == afar.ask("/api/facts?token=secret")[0] == 401
        assert afar.ask("/api/samples", SAMPLES)[0] == 401
        status, _, headers = afar.ask("/?token=secret")
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert status == 303 and headers["Location"] == "/" and "HttpOnly" in headers["Set-Cookie"]
        assert afar.ask("/", None, {"Cookie": cookie})[0] == 200
        assert afar.ask("/", None, {"Cookie": cookie + "x"})[0] == 401


def test_the_server_outlives_a_failure(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("two\nlines")

    with monkeypatch.context() as patch:
        patch.setattr(session, "losses", broken)
        status, told, _ = client.ask("/api/loss", {"page": "p", "weights": [0, 1]})
    assert status == 500 and told == {"error": "RuntimeError: two lines"}
    assert client.ask("/api/loss", {"page": "p", "weights": [0, 1]})[0] == 200


def test_saving_by_the_server_names_the_folder_and_refuses_a_name_that_is_taken(client: Client, run: Run) -> None:
    asked = {"page": "p", "weights": [0.25, 0.5], "name": "served"}
    status, told, _ = client.ask("/api/save", asked)
    assert status == 200 and Path(told["folder"]) == run.folder / PLAYED / "served"
    assert (run.folder / PLAYED / "served" / "model_index.json").is_file()
    status, told, _ = client.ask("/api/save", asked)
    assert status == 400 and "exists already" in told["error"]


def test_facts_name_experts_by_their_timesteps_and_begin_at_the_runs_own_weights(client: Client) -> None:
    told = client.ask("/api/facts")[1]
    assert [(one["name"], one["range"]) for one in told["experts"]] == [("expert 0", "[0,10)"), ("expert 1", "[10,20)")]
    assert told["bounds"] == [-0.5, 1.5] and told["presets"][told["start"]]["name"] == "merged"


# -- the command -----------------------------------------------------------------------------------


SLOW = """
import sys, time
from deme_diffusion.playground import saving
write, seconds = saving.record.write, float(sys.argv.pop(1))
def slowly(*args):
    time.sleep(seconds)
    write(*args)
saving.record.write = slowly
from deme_diffusion.cli import main
main()
"""


def test_the_command_tells_its_address_and_waits_for_a_save_at_ctrl_c(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, folder := tmp_path / "pico", symlinks=True, ignore=shutil.ignore_patterns(PLAYED))
    (tmp_path / "store").symlink_to(run.store.root)
    command = [sys.executable, "-c", SLOW, "2", "play", str(folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    client, saved = Client(int(address.rpartition(":")[2])), list[Any]()
    body = {"page": "p", "weights": [0.5, 0.5], "name": "last"}
    saving = threading.Thread(target=lambda: saved.append(client.ask("/api/save", body)))
    saving.start()
    until(lambda: client.busy("save"))
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=30)
    saving.join(10)
    said = "Ctrl-C ends the playground\nwaiting for the save to finish; Ctrl-C again gives up\n"
    assert (process.returncode, rest, told) == (0, "", said)
    assert saved[0][0] == 200 and [path.name for path in (folder / PLAYED).iterdir()] == ["last"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_step_ends_it_and_a_second_one_gives_a_save_up(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """In this process: what a signal does while a step takes long, and while a model is being written."""
    from deme_diffusion.playground.server import make_app

    worker, told, begun = Worker(), list[Any](), threading.Event()

    def write(key: str, *_: Any) -> None:
        begun.set()
        time.sleep(0.05)

    monkeypatch.setattr(Statistics, "see", lambda self, *args: write(*args))
    body: dict[str, Any] = {"page": "p", "weights": [0.5, 0.5], "name": "given-up"}

    def ask(port: int) -> None:
        client = Client(port)
        asked = ("/api/save", body) if times == 2 else ("/api/samples", LONG)
        with suppress(OSError):
            told.append(client.ask(*asked))

    def press(port: int) -> None:
        asking = threading.Thread(target=ask, args=(port,))
        asking.start()
        until(lambda: worker.busy and (times == 1 or begun.is_set()))
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        asking.join(10)

    with serving.bound("127.0.0.1", 0) as listening, slowly(session, monkeypatch):
        presses = threading.Thread(target=press, args=(listening.getsockname()[1],))
        presses.start()
        serving.serve(make_app(session, worker, host="127.0.0.1", images=4), listening, worker)
        assert worker.close() and worker.gave_up == (times == 2)
        presses.join(10)
    if times == 1:
        assert [one[:2] for one in told] == [(200, {"superseded": True})]
    else:
        assert not list((session.run.folder / PLAYED).glob("*given-up*"))
        with pytest.raises(Stopped, match="a save was given up; nothing of it is left"):
            serving._leave(worker, True)
    assert "Traceback" not in caplog.text
