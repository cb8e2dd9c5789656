"""The playground: a session merges and saves what a run would; what the server refuses; whose request counts."""

from __future__ import annotations

import base64
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
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import make_pico_values
from deme_diffusion.config import SamplerSettings
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.sample import sample_batch
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models.projection import FILE
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.playground import answers, ready, serving
from deme_diffusion.playground.saving import PLAYED, check_name, save
from deme_diffusion.playground.session import Session
from deme_diffusion.playground.worker import Superseded, Ticket, Worker
from deme_diffusion.recipes import Loaded, changed
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


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../x", "a\\b", "x" * 65, "a b", "tail.", "\n", "ü"])
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(UserError, match="name "):
        check_name(name)


def test_a_wrong_name_is_answered_by_the_nearest_right_one() -> None:
    with pytest.raises(UserError, match="did you mean 'my-model'"):
        check_name("../my model")


def test_the_command_beside_makes_the_run_of_the_weights_on_the_page(run: Run) -> None:
    session = Session(run, ["deme", "run", "pico", "decouple.projection=block"])
    assert answers.command(session, session.weights([0.1, 0.25])) == (
        "deme run pico decouple.projection=block merge.search=none 'merge.weights=[0.1, 0.25]' "
        f"--out {run.folder}-played"
    )
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
    settings = dict(word.split("=", 1) for word in shlex.split(answers.command(session, weights))[3:-2])
    made = changed(run.recipe, {key: yaml.safe_load(value) for key, value in settings.items()}).merge
    assert MergeWeights(made.weights or (), made.weights_for) == weights
    session.close()


# -- before it opens -------------------------------------------------------------------------------


def test_a_run_without_its_experts_says_what_to_run_first(pico_values: dict[str, Any], tmp_path: Path) -> None:
    run = open_run(Loaded(parse(pico_values, where="test"), {}), out=tmp_path / "pico", download=False)
    with pytest.raises(UserError, match=r"2 of the 3 models .*expert 0 \[0,10\).*; first: deme run pico"):
        ready.check_ready(run, "deme run pico")


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
    worker.close()
    assert all(map(ended, both)) and worker.progress("a") is None


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
    """What a page sends, and what comes back."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        sent = {key: value for key, value in {**own, **(headers or {})}.items() if value}
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        text, told = answer.read(), answer.headers
        connection.close()
        return answer.status, json.loads(text) if path.startswith("/api") else text, told


@contextmanager
def running(session: Session, worker: Worker) -> Iterator[Client]:
    import uvicorn

    from deme_diffusion.playground.server import make_app

    app = make_app(session, worker, host="127.0.0.1", images=4)
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


SAMPLES = {"page": "p", "weights": [0.5, 0.5], "sampler": "DDIM-2", "steps": 2, "images": 3, "seed": 3}


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
        ("samples", json.dumps({**SAMPLES, "weights": [float("nan"), 0]}).encode(), "weights.0: "),
        ("samples", json.dumps({**SAMPLES, "weights": [float("inf"), 0]}).encode(), "weights.0: "),
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
        while len(answers) < i or client.ask("/api/progress?page=p&kind=samples")[1].get("doing") != "waiting":
            assert thread.is_alive()
    busy.go.set()
    for thread in threads:
        thread.join(10)
    assert blocked.result(10) == "done"
    assert answers[0.1] == answers[0.2] == {"superseded": True} and len(answers[0.3]["merged"]) == 3


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


def test_the_command_tells_its_address_and_ends_well_at_ctrl_c(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, folder := tmp_path / "pico", symlinks=True)
    (tmp_path / "store").symlink_to(run.store.root)
    command = [sys.executable, "-m", "deme_diffusion", "play", str(folder), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert Client(int(address.rpartition(":")[2])).ask("/api/samples", SAMPLES)[0] == 200
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=20)
    assert (process.returncode, rest, told) == (0, "", "Ctrl-C ends the playground\n")
