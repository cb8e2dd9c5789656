"""The planner with a language model: a server on this machine speaks the protocol over HTTP, and fails in its ways."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import test_cli
import test_planner as planning
from deme_diffusion.ablate import read_plan
from deme_diffusion.ablate.opening import open_experiment
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.planner import service
from deme_diffusion.planner.answers import content_of, read_answer
from deme_diffusion.planner.prompting import Prompts, read_paper
from deme_diffusion.planner.service import checked_address, find_service, is_local, retry_after
from deme_diffusion.recipes import Loaded
from test_cli import Deme, Outcome, write_recipe

deme = test_cli.deme  # the fixture
KEY = "sk-test-0123456789abcdef"
TIES = {
    "name": "TIES",
    "ablated_part": "merge method",
    "action": "REPLACE",
    "replacement": ["TIES"],
    "metrics": ["FID"],
}
NO_MERGE = {"name": "No merging", "ablated_part": "merging", "action": "REMOVE", "replacement": [], "metrics": ["FID"]}
FOREIGN = {"name": "Text", "ablated_part": "the tokenizer", "action": "REMOVE", "replacement": [], "metrics": []}


@dataclass
class Reply:
    """What the server does with one request; `body` is sent as it is, `pause` is waited before it."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    drip: float = 0.0
    """Seconds between single bytes."""


@dataclass
class Server:
    """An OpenAI-compatible server with prepared replies; the last one is given again and again."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def next(self) -> Reply:
        return self.replies[min(len(self.requests), len(self.replies)) - 1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(service, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            told.requests.append(json.loads(content))
            told.headers.append({name.lower(): value for name, value in self.headers.items()})
            told.paths.append(self.path)
            reply = told.next()
            stopping.wait(reply.pause)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                for piece in (
                    [reply.body] if not reply.drip else [reply.body[i : i + 1] for i in range(len(reply.body))]
                ):
                    self.wfile.write(piece)
                    self.wfile.flush()
                    if reply.drip and stopping.wait(reply.drip):
                        return
            except OSError:
                pass  # the client has gone

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    told = Server(f"http://127.0.0.1:{listening.server_address[1]}/v1")
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    yield told
    stopping.set()
    listening.shutdown()
    listening.server_close()


def completion(text: str | None, **more: Any) -> Reply:
    message = {"role": "assistant", "content": text}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return Reply(
        json.dumps({**answer, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}).encode()
    )


def records(*entries: dict[str, Any], discussion: str = "Because.") -> str:
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    return f"<discussion>\n{discussion}\n</discussion>\n<predictions>\n{lines}\n</predictions>"


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return Reply(json.dumps({"error": {"message": message, "code": code, "type": code}}).encode(), status, headers)


Asking = Callable[..., Outcome]


@pytest.fixture
def ask(deme: Deme, server: Server, tmp_path: Path, pico_values: dict[str, Any]) -> Asking:
    """`deme plan` with the server, for the pico recipe, into next.md."""
    write_recipe(tmp_path, pico_values)

    def call(*words: object) -> Outcome:
        where = ["--recipe", "pico.yaml", "--model", "m", "--base-url", server.url]
        return deme("plan", *where, *([] if "--out" in words else ["--out", "next.md"]), *words)

    return call


def ablations_of(path: Path, recipe: Recipe) -> list[tuple[str, list[str]]]:
    """The written plan's ablations, after checking that `deme ablate` would run every arm."""
    plan = read_plan(path)
    opened = open_experiment(plan, "next", Loaded(recipe, {}), download=False)
    assert opened.trials and all(trial.case for trial in opened.trials) and not plan.problems
    return [(one.ablated_part, one.replacement) for one in plan.ablations]


# good and dirty answers


def test_a_good_answer_becomes_a_plan_with_its_request_and_answer_beside(
    ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe
) -> None:
    server.replies = [completion(records(TIES, NO_MERGE, discussion="Über <b>merging</b> — 合并."))]
    done = ask("--html", "next.html")
    assert (done.status, done.out.split()) == (0, ["next.md", "next.html"]), done.err
    assert ablations_of(tmp_path / "next.md", pico_recipe) == [("merge method", ["TIES"]), ("merging", [])]
    assert "合并" in read_plan(tmp_path / "next.md").discussion
    page = (tmp_path / "next.html").read_text()
    assert page.count('class="trajectory-box') == 2 and "<b>merging</b>" not in page and "&lt;b&gt;merging" in page

    assert server.paths == ["/v1/chat/completions"] and server.headers[0]["authorization"] == f"Bearer {KEY}"
    request = server.requests[0]
    system, user = (message["content"] for message in request["messages"])
    assert request["model"] == "m" and "<predictions>" in system
    assert "consistency loss" in user and "num_ranges: 2" in user and "Nothing yet." in user
    assert str(tmp_path.parent.parent) not in user  # a folder of this machine is nobody's business
    kept = json.loads((tmp_path / "next.request.json").read_text())
    assert kept["requests"][0]["messages"] == request["messages"]
    answer = json.loads((tmp_path / "next.answer.json").read_text())["answers"][0]
    assert answer["answer"]["choices"][0]["message"]["content"].startswith("<discussion>")
    assert answer["usable"] == ["TIES", "No merging"] and answer["unusable"] == []


def test_the_key_is_on_no_disk_and_in_no_log_even_where_the_server_sends_it_back(
    ask: Asking, deme: Deme, server: Server, tmp_path: Path
) -> None:
    echo = records(TIES, discussion=f"Your key is {KEY}.")
    server.replies = [error(500, f"Bearer {KEY} is odd"), completion(echo, headers={"Authorization": f"Bearer {KEY}"})]
    done = ask()
    assert done.status == 0 and "[key] is odd" in done.err
    server.replies = [error(401, f"Incorrect API key provided: {KEY}")]
    refused = deme("-v", "plan", "--recipe", "pico.yaml", "--model", "m", "--base-url", server.url, "--out", "b.md")
    assert refused.status == 2 and "Incorrect API key provided: [key]" in refused.err
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) >= 4 and not any(KEY.encode() in text for text in texts)
    assert not any(b"uthorization" in path.read_bytes() for path in tmp_path.glob("*.request.json"))
    assert KEY not in done.err + done.out + refused.err + refused.out


DIRTY = {
    "fences": f"Here you are:\n```json\n{json.dumps(TIES)}\n{json.dumps(NO_MERGE)}\n```\nGood luck!",
    "broken line": records(TIES, NO_MERGE).replace("<predictions>\n", '<predictions>\n{"name": "broken", "action": \n'),
    "array over lines": "Sure.\n" + json.dumps([TIES, NO_MERGE], indent=2) + "\nThat is all.",
    "within an object": json.dumps({"discussion": "x", "ablations": [TIES, NO_MERGE]}, indent=1),
    "bullets": f"1. {json.dumps(TIES)}\n2. {json.dumps(NO_MERGE)},\n",
    "thoughts": f'<think>{{"name": "a", "ablated_part": "EMA", "action": "REMOVE"}}</think>{records(TIES, NO_MERGE)}',
    "unclosed": records(TIES, NO_MERGE).replace("</predictions>", ""),
    "markdown": "### TIES\n- **Ablated Part**: merge method\n- **Action**: REPLACE\n- **Replacement**: TIES\n\n"
    "### No merging\n- **Ablated Part**: merging\n- **Action**: REMOVE\n",
}


@pytest.mark.parametrize("kind", DIRTY)
def test_dirty_answers_are_recovered_line_by_line(kind: str) -> None:
    found = read_answer(DIRTY[kind])
    assert [(one.ablated_part, one.action, one.replacement) for one in found.ablations] == [
        ("merge method", "REPLACE", ["TIES"]),
        ("merging", "REMOVE", []),
    ]
    assert bool(found.problems) == (kind == "broken line")


@pytest.mark.parametrize(
    "text", ["", "No.", "{" * 5000, "[" * 100_000, "\0\ud800", '{"a": ' * 3000, "```", "a" * 2_000_000]
)
def test_no_answer_is_too_dirty_to_read(text: str) -> None:
    assert read_answer(text).ablations == []


@pytest.mark.parametrize("piece", ["{", '{"a": ', '[{"a": ', '{"a": "', '{"a": [' + "[" * 900])
def test_a_long_answer_without_end_is_read_in_seconds(piece: str, caplog: pytest.LogCaptureFixture) -> None:
    start = time.process_time()
    found = read_answer(f"{records(TIES)}\n" + piece * (210_000 // len(piece)))
    assert time.process_time() - start < 2.0  # a second's fraction, where it took up to eight
    assert [one.replacement for one in found.ablations] == [["TIES"]]
    assert "is not read" in caplog.text


def test_an_answer_of_an_earlier_call_is_never_overwritten(ask: Asking, server: Server, tmp_path: Path) -> None:
    for name in ("request", "answer"):
        (tmp_path / f"q.{name}.json").write_text("paid for")
        refused = ask("--out", "q.md").refusal
        assert f"q.{name}.json of an earlier call" in refused and not server.requests
        assert (tmp_path / f"q.{name}.json").read_text() == "paid for"
        (tmp_path / f"q.{name}.json").unlink()


def test_an_answer_sets_nothing_by_itself(ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe) -> None:
    sly = {**TIES, "set": {"model.pretrained": "evil/model"}, "sets": {"TIES": {"data.path": "/etc"}}}
    server.replies = [completion(records(sly)), completion("I have no more.")]
    assert ask().status == 0
    opened = open_experiment(read_plan(tmp_path / "next.md"), "next", Loaded(pico_recipe, {}), download=False)
    assert [set(trial.arm.change) <= {"merge.method", "merge.search"} for trial in opened.trials] == [True]


# repair


def test_unusable_entries_go_back_once_with_their_errors(
    ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe
) -> None:
    half = {**TIES, "replacement": ["TIES", "magic dust"]}
    server.replies = [completion(records(half, FOREIGN)), completion(records(NO_MERGE, TIES))]
    assert ask().status == 0
    assert ablations_of(tmp_path / "next.md", pico_recipe) == [("merge method", ["TIES"]), ("merging", [])]
    assert len(server.requests) == 2
    roles = [message["role"] for message in server.requests[1]["messages"]]
    back = server.requests[1]["messages"][-1]["content"]
    assert roles == ["system", "user", "assistant", "user"]
    assert "magic dust" in back and "tokenizer" in back and back.count("Error:") == 2 and "- TIES" in back
    assert len(json.loads((tmp_path / "next.request.json").read_text())["requests"]) == 2
    assert len(json.loads((tmp_path / "next.answer.json").read_text())["answers"]) == 2


def test_what_is_unusable_twice_is_left_out_or_fails_where_nothing_else_is_there(
    ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe
) -> None:
    server.replies = [completion(records(TIES, FOREIGN)), completion(records(FOREIGN))]
    done = ask()
    assert done.status == 0 and "left out" in done.err and len(server.requests) == 2
    assert ablations_of(tmp_path / "next.md", pico_recipe) == [("merge method", ["TIES"])]
    server.replies, server.requests[:] = [completion("I would rather talk about tea.")], []
    nothing = ask("--out", "tea.md")
    assert nothing.status == 1 and "proposes nothing that pico can run" in nothing.err
    assert len(server.requests) == 2 and not (tmp_path / "tea.md").exists() and (tmp_path / "tea.answer.json").exists()


def test_a_service_that_fails_in_the_repair_leaves_what_was_usable(
    ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe
) -> None:
    server.replies = [completion(records(TIES, FOREIGN)), error(500, "down")]
    done = ask("--retries", 0)
    assert done.status == 0 and "no second answer" in done.err
    assert ablations_of(tmp_path / "next.md", pico_recipe) == [("merge method", ["TIES"])]


def test_what_was_done_already_is_told_and_not_planned_again(
    ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe
) -> None:
    done = {"merge method": [planning.arm(planning.TIES, [11.0], label="TIES")]}
    planning.write_ablations(tmp_path / "runs/pico/ablations/a", pico_recipe, done, baseline=[10.0])
    server.replies = [completion(records(TIES, NO_MERGE)), completion("Nothing more.")]
    assert ask().status == 0
    assert "merge method: TIES: FD(x) DDIM-2 +1 of 10, with 1 seed" in server.requests[0]["messages"][1]["content"]
    assert "done already" in server.requests[1]["messages"][-1]["content"]
    assert ablations_of(tmp_path / "next.md", pico_recipe) == [("merging", [])]


def test_without_out_it_is_printed_and_kept_below_the_runs(
    ask: Asking, deme: Deme, server: Server, tmp_path: Path
) -> None:
    server.replies = [completion(records(TIES))]
    words = ["plan", "--recipe", "pico.yaml", "--model", "org/m:1", "--base-url", server.url]
    done = [deme(*words) for _ in range(2)]
    assert [one.status for one in done] == [0, 0] and done[0].out.startswith("# Ablation plan for pico")
    assert {path.name for path in (tmp_path / "runs" / "plans").iterdir()} == {
        f"pico-org-m-1{number}.{kind}" for number in ("", "-2") for kind in ("md", "request.json", "answer.json")
    }


# a service that fails


def test_a_429_is_waited_for_as_long_as_it_asks(ask: Asking, server: Server) -> None:
    server.replies = [error(429, "slow down", **{"Retry-After": "0.3"}), completion(records(TIES))]
    start = time.monotonic()
    done = ask()
    assert done.status == 0 and time.monotonic() - start > 0.3 and len(server.requests) == 2
    assert "status 429: slow down; again in 0.3 s (1 of 4)" in done.err


def test_500s_are_given_up_after_the_retries_in_one_line(ask: Asking, server: Server, tmp_path: Path) -> None:
    server.replies = [error(503, "overloaded\nvery")]
    failed = ask("--retries", 2)
    assert failed.status == 1 and len(server.requests) == 3
    assert failed.err.splitlines()[-1] == f"deme: {server.url}: status 503: overloaded very (3 attempts)"
    assert (tmp_path / "next.request.json").exists() and not (tmp_path / "next.md").exists()


@pytest.mark.parametrize("slow", ["hangs", "drips"])
def test_a_server_that_hangs_or_drips_is_left_after_the_time_limit(ask: Asking, server: Server, slow: str) -> None:
    reply = completion(records(TIES))
    server.replies = [Reply(reply.body, pause=5.0) if slow == "hangs" else Reply(reply.body, drip=0.05)]
    start = time.monotonic()
    failed = ask("--timeout", 0.3, "--retries", 1)
    assert failed.status == 1 and "no answer within 0.3 s (2 attempts)" in failed.err
    assert time.monotonic() - start < 8 and len(server.requests) == 2


BAD_ANSWERS = {
    "no JSON": (Reply(b"<html>Welcome</html>"), "answers no JSON object but '<html>Welcome</html>'"),
    "cut JSON": (Reply(b'{"choices": [{"mess'), "answers no JSON object"),
    "a list": (Reply(b"[]"), "answers no JSON object"),
    "empty choices": (Reply(b'{"choices": []}'), "no text in choices[0].message"),
    "null content": (completion(None), "no text in choices[0].message"),
    "odd choices": (Reply(b'{"choices": [3]}'), "no text in choices[0].message"),
    "an error with status 200": (Reply(b'{"error": {"message": "no such luck"}}'), "no such luck"),
    "too much": (completion("x" * 300_000), "an answer of over 0.2 MB"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_an_answer_that_is_none_is_one_line_and_status_1(
    ask: Asking, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(service, "MOST_BYTES", 200_000)
    reply, said = BAD_ANSWERS[kind]
    server.replies = [reply]
    failed = ask("--retries", 0)
    assert failed.status == 1 and said in failed.err and "Traceback" not in failed.err
    assert failed.err.splitlines()[-1].startswith(f"deme: {server.url}: ") and len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "bad key"), "the key was refused: set OPENAI_API_KEY"),
        (error(403, "not yours"), "the key was refused"),
        (error(404, "no model m"), "no model m; look at --model m and --base-url"),
        (error(400, "context length exceeded"), "context length exceeded"),
    ],
)
def test_a_refused_key_name_or_request_is_the_users_and_never_tried_again(
    ask: Asking, server: Server, reply: Reply, said: str
) -> None:
    server.replies = [reply]
    assert said in ask().refusal and len(server.requests) == 1


def test_a_spent_quota_is_not_waited_for(ask: Asking, server: Server) -> None:
    server.replies = [error(429, "you are out of money", "insufficient_quota")]
    failed = ask()
    assert failed.status == 1 and "out of money" in failed.err and len(server.requests) == 1


def test_nobody_at_the_address_fails_after_the_retries(ask: Asking) -> None:
    failed = ask("--base-url", "http://127.0.0.1:9/v1", "--retries", 1)
    assert failed.status == 1 and "cannot be reached: Connection refused (2 attempts)" in failed.err


def test_an_address_of_no_host_is_the_users(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused = ask("--base-url", "https://nowhere.example/v1", "--retries", 0).refusal
    assert refused == "https://nowhere.example/v1: cannot be reached: Name or service not known; look at --base-url"


def test_a_long_and_strange_answer_is_read(ask: Asking, server: Server, tmp_path: Path, pico_recipe: Recipe) -> None:
    much = records(*[{**FOREIGN, "name": f"n{i}"} for i in range(500)], TIES, discussion="# é\ud83d\n### x\n" * 2000)
    server.replies = [completion(records(TIES, discussion="\x1b[31m<script>")), completion("-")]
    assert ask().status == 0 and "\x1b" not in (tmp_path / "next.md").read_text()
    server.replies, server.requests[:] = [completion(much), completion(records(NO_MERGE))], []
    assert ask("--out", "much.md").status == 0
    assert ablations_of(tmp_path / "much.md", pico_recipe) == [("merging", [])]
    assert server.requests[1]["messages"][-1]["content"].count("Error:") == 30


# keys, addresses, prompts


def test_a_local_address_wants_no_key_and_any_other_does(
    ask: Asking, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.replies = [completion(records(TIES))]
    assert ask().status == 0 and server.headers[0]["authorization"] == "Bearer none"
    assert "OPENAI_API_KEY is not set" in ask("--base-url", "https://example.org/v1", "--out", "a.md").refusal
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    assert ask("--key-env", "MY_KEY", "--out", "b.md").status == 0
    assert server.headers[-1]["authorization"] == "Bearer secret-of-mine"
    refused = ask("--key-env", "MY_KEY", "--out", "c.md", "--base-url", "http://example.org/v1").refusal
    assert "https://" in refused and "secret" not in refused
    monkeypatch.setenv("MY_KEY", "two words")
    assert "two" not in ask("--key-env", "MY_KEY", "--out", "c.md").refusal


def test_the_address_may_come_from_the_environment(
    deme: Deme, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_values: dict[str, Any]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    write_recipe(tmp_path, pico_values)
    server.replies = [completion(records(TIES))]
    assert deme("plan", "--recipe", "pico.yaml", "--model", "m", "--out", "next.md").status == 0
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "address", ["example", "ftp://x/v1", "http://", "http://a b/v1", "http://x:99999/v1", "http://me:secret@x/v1", "http://x/v1?key=secret"]
)  # fmt: skip
def test_a_bad_address_is_refused_and_no_secret_in_it_repeated(address: str) -> None:
    with pytest.raises(UserError, match="--base-url") as refused:
        checked_address(address)
    assert "secret" not in str(refused.value)


def test_what_is_local_and_what_a_server_may_ask_to_wait() -> None:
    assert all(
        map(
            is_local,
            ["http://localhost:1/v1", "http://127.0.0.2/", "http://10.0.0.1/v1", "http://[::1]:1/v1", "http://gpu/v1"],
        )
    )
    assert not any(map(is_local, ["https://api.openai.com/v1", "http://8.8.8.8/v1"]))
    assert retry_after({"retry-after": "7.5"}) == 7.5 and retry_after({"retry-after": "-1"}) == 0
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=lambda: 90.0) == 10
    assert [retry_after({"retry-after": text}) for text in ("soon", "inf", "nan")] == [None, None, None]
    assert retry_after({}) is None


def test_prompts_are_files_that_a_user_replaces(ask: Asking, server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "user.md").write_text("{{ count }} of {{ parts | length }}: {{ paper }}")
    (tmp_path / "paper.md").write_text("My method.")
    server.replies = [completion(records(TIES))]
    assert ask("--prompts", "mine", "--paper", "paper.md", "--count", 7).status == 0
    assert server.requests[0]["messages"][1]["content"].startswith("7 of ")
    assert server.requests[0]["messages"][1]["content"].endswith(": My method.")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("user.md", "{{ papers }}", "mine/user.md: 'papers' is undefined; did you mean 'paper'"),
        ("repair.md", "{{ usble }}", "mine/repair.md: 'usble' is undefined; did you mean 'usable'"),
        ("system.md", "a\n{% if %}", "mine/system.md: line 2:"),
        ("system.md", "{{ 1 / 0 }}", "mine/system.md: division by zero"),
        ("other.md", "x", "--prompts mine: none of system.md, user.md, repair.md"),
    ],
)
def test_a_wrong_prompt_is_refused_before_anybody_is_asked(
    ask: Asking, server: Server, tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(text)
    assert said in ask("--prompts", "mine").refusal and not server.requests


@pytest.mark.parametrize("content", [b"%PDF-1.7 \xff\xfe", b"\0\0", b"  ", None])
def test_a_paper_that_is_no_text_is_refused(ask: Asking, server: Server, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "paper.pdf").write_bytes(content)
    assert "paper.pdf" in ask("--paper", "paper.pdf").refusal and not server.requests


def test_the_packaged_prompts_say_the_method_and_take_every_variable() -> None:
    assert "task vector" in read_paper(None) and "0.3" in read_paper(None)
    assert "3" in Prompts().render("user.md", paper="p", parts=[], recipe="r", done=["x"], count=3)


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'deme-diffusion\[lm\]'"):
        find_service("m", "http://localhost:1/v1")


def test_content_in_parts_is_read_and_a_refusal_told() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content_of({"choices": [{"message": {"content": parts}}]}, "x") == "ab"
    with pytest.raises(Exception, match="declines: no"):
        content_of({"choices": [{"message": {"content": None, "refusal": "no"}}]}, "x")
