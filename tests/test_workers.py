"""The death of a process: what it was making is made again, what it leaves ends, and only its cause fails."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.running import Findings, run_plan
from deme_diffusion.artefacts import Store
from deme_diffusion.config import RuntimeSettings
from deme_diffusion.errors import MachineError
from deme_diffusion.pipeline import workers
from deme_diffusion.pipeline.workers import Pool

LONGER = Ablation("Steps", "training", "REPLACE", ["longer"], changes={"longer": {"decouple.total_steps": 6}})


def killed(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def in_time(ending: Callable[[], Any], seconds: float = 60.0) -> None:
    """What would wait for ever fails the test in place of stopping it."""
    thread = threading.Thread(target=ending, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(Store(tmp_path / "store"), RuntimeSettings(jobs=2))


def test_the_death_of_an_idle_process_leaves_no_other(pool: Pool) -> None:
    for future in [pool._started().submit(time.sleep, 0.3) for _ in range(2)]:
        future.result()
    first, second = pool._workers()
    killed(first)
    in_time(pool.close)
    assert not second.is_alive() and pool.executor is None
    assert pool._started().submit(os.getpid).result() not in (first.pid, second.pid)
    pool.close()


def test_a_busy_process_may_end_its_stage_after_another_died(pool: Pool, tmp_path: Path) -> None:
    for future in [pool._started().submit(time.sleep, 0.3) for _ in range(2)]:
        future.result()
    first, second = pool._workers()
    pool._started().submit(_busy_for_a_while, str(tmp_path / "checkpoint"))
    until(lambda: any(pool.busy))
    busy, idle = (first, second) if first.pid in pool.busy else (second, first)
    killed(idle)
    in_time(pool.close)
    assert not busy.is_alive()
    assert (tmp_path / "checkpoint").read_text() == "written"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def _busy_for_a_while(path: str) -> None:
    """In a worker: a stage that takes a second for its checkpoint once it is stopped."""
    workers._busy, workers._busy_ids[workers._place] = True, os.getpid()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)
        Path(path).write_text("written")
        raise
    finally:
        workers._busy, workers._busy_ids[workers._place] = False, 0


def test_a_look_ahead_that_kills_its_process_is_at_fault_alone(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_check", _deadly_check)
    monkeypatch.setattr(Pool, "_recipe", lambda self, graph: graph)
    good, deadly, wrong = pool.check([("good", []), ("deadly", []), ("wrong", [])])  # type: ignore[list-item]
    pool.close()
    assert good is None and str(wrong) == "wrong"
    assert isinstance(deadly, MachineError) and "died" in str(deadly)


def _deadly_check(asked: list[tuple[str, list[str]]]) -> list[Exception | None]:
    if any(recipe == "deadly" for recipe, _ in asked):
        os.kill(os.getpid(), signal.SIGKILL)
    return [ValueError(recipe) if recipe == "wrong" else None for recipe, _ in asked]


@pytest.mark.slow
def test_an_experiment_outlives_an_idle_and_a_busy_process(
    pico_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, count, deaths = Pool.make, 0, list[str]()

    def making(self: Pool, graph: Any, node: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:  # nothing is being made before the stage is handed out, or one other stage is
            idle = [worker for worker in self._workers() if worker.pid not in self.busy]
            killed(idle[0])
            deaths.append("idle")
            until(self._broken)
        future = make(self, graph, node)
        if count == 7:
            until(lambda: any(self.busy) or future.done())
            killed(next(worker for worker in self._workers() if worker.pid in self.busy))
            deaths.append("busy")
        return future

    monkeypatch.setattr(Pool, "make", making)
    pico_values["merge"]["search"] = "none"
    pico_values["runtime"]["jobs"] = 2
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(pico_values))
    found: list[Findings] = []
    out = tmp_path / "runs" / "pico"
    in_time(lambda: found.append(run_plan(Plan("", [LONGER]), tmp_path / "pico.yaml", out=out)), 400)
    assert deaths == ["idle", "busy"]
    assert [arm["status"] for arm in found[0].content["ablations"][0]["arms"]] == ["done"]
