"""`deme ablate`: what a dry run prints, exit statuses, and one line for wrong input."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.running import PACKAGED
from deme_diffusion.errors import MachineError
from deme_diffusion.pipeline import stages as stages_module
from test_cli import NO_NETWORK_NO_TORCH, Deme, deme  # noqa: F401  (a fixture)

PLAN = """\
ablations:
  - name: No merging
    ablated_part: the merging step
    action: REMOVE
    metrics: [FID, CLIP score]
    set: {merge.method: none, merge.search: none}
  - name: Steps
    ablated_part: training length
    action: REPLACE
    replacement:
      - {name: longer, set: {decouple.total_steps: 6}}
      - {name: as it is, set: {decouple.total_steps: 4}}
      - {name: too many experts, set: {decouple.num_ranges: 40}}
"""
ONE = """\
ablations:
  - {name: Longer, ablated_part: training, action: REPLACE, replacement: [{name: a, set: {decouple.total_steps: 6}}]}
"""


@pytest.fixture(autouse=True)
def _inputs(tmp_path: Path, pico_values: dict[str, Any]) -> None:
    pico_values["merge"]["search"] = "none"
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(pico_values))
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "one.yaml").write_text(ONE)


def dry(deme: Deme, *words: object) -> dict[str, Any]:  # noqa: F811
    """The object that a dry run prints."""
    outcome = deme("ablate", *words, "--recipe", "pico.yaml", "--dry-run", "--json")
    assert outcome.status == 0, outcome.err
    value: dict[str, Any] = json.loads(outcome.out)
    return value


def test_dry_run_prints_one_object(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    planned = dry(deme, "plan.yaml")
    assert set(planned) == {"ablations", "steps", "problems"}
    first, second = planned["ablations"]
    assert set(first) == {"name", "ablated_part", "action", "part", "metrics", "arms"}
    assert (first["name"], first["action"], first["part"]) == ("No merging", "REMOVE", "merging")
    assert [metric["asked"] for metric in first["metrics"]] == ["FID", "CLIP score"]
    (removed,) = first["arms"]
    assert set(removed) == {"replacement", "change", "status", "reason", "nearest"}
    assert removed == {"replacement": None, "change": {"merge.method": "none"}, "status": "ready", "reason": "",
                       "nearest": []}  # fmt: skip
    assert [(arm["replacement"], arm["status"]) for arm in second["arms"]] == [
        ("longer", "ready"),
        ("as it is", "same_as_baseline"),
        ("too many experts", "not_executable"),
    ]
    assert "40" in second["arms"][2]["reason"]
    assert planned["steps"] == {"shared": 10, "independent": 14}
    assert not (tmp_path / "runs").exists()


def test_dry_run_for_people_says_what_will_run(deme: Deme) -> None:  # noqa: F811
    outcome = deme("ablate", "plan.yaml", "--recipe", "pico.yaml", "--dry-run", "--seeds", 3)
    assert outcome.status == 0
    for said in ("merge.method=none", "not executable", "same as baseline", "CLIP score", "2 of 4 arms", "3 seeds"):
        assert said in outcome.out, said
    assert "30 steps; as independent runs 42" in outcome.out


def test_overrides_seeds_and_out_choose_the_folder(deme: Deme) -> None:  # noqa: F811
    def folder(*words: object) -> str:
        out = deme("ablate", "plan.yaml", "--recipe", "pico.yaml", *words, "--dry-run").out
        return next(line for line in out.splitlines() if line.startswith("folder: ")).removeprefix("folder: ")

    assert folder() == "runs/pico/ablations/plan"
    assert folder("--out", "there") == "there/ablations/plan"
    changed, seeded = folder("merge.method=average"), folder("--seeds", 2)
    assert changed.startswith("runs/pico+") and seeded.startswith("runs/pico+") and changed != seeded


def test_entries_that_cannot_be_read_are_told_and_the_rest_runs(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "plan.yaml").write_text(f"{PLAN}  - {{name: Odd, ablated_part: x, action: EXPLODE}}\n")
    (problem,) = dry(deme, "plan.yaml")["problems"]
    assert set(problem) == {"line", "what"} and "EXPLODE" in problem["what"]
    assert problem["line"] == PLAN.count("\n") + 1
    assert "EXPLODE" in deme("ablate", "plan.yaml", "--recipe", "pico.yaml", "--dry-run").out
    refusal = deme("ablate", "plan.yaml", "--recipe", "pico.yaml", "--dry-run", "--strict").refusal
    assert "EXPLODE" in refusal and "(and 2 more)" in refusal


def test_dry_run_touches_no_network_and_imports_no_torch(tmp_path: Path) -> None:
    words = ["ablate", "baselines", "--recipe", "digits", "--dry-run", "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", NO_NETWORK_NO_TORCH, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["ablations"]


@pytest.mark.parametrize("recipe", ["digits", "digits-full", "cifar10-small", "cifar10", "lsun-church"])
def test_packaged_baselines_are_ready_at_equal_budget(deme: Deme, recipe: str) -> None:  # noqa: F811
    outcome = deme("ablate", "baselines", "--recipe", recipe, "--dry-run", "--json")
    planned = json.loads(outcome.out)
    arms = planned["ablations"][0]["arms"]
    assert len(arms) == 9 and {arm["status"] for arm in arms} == {"ready"}, arms
    assert all(arm["change"]["merge.method"] == "none" for arm in arms)
    assert sum("decouple.num_ranges" not in arm["change"] for arm in arms) == 1, "the experts before merging"
    assert not any("total_steps" in path for arm in arms for path in arm["change"]), "at equal budget"


def test_strict_names_the_first_and_counts_the_rest(deme: Deme) -> None:  # noqa: F811
    refusal = deme("ablate", "plan.yaml", "--recipe", "pico.yaml", "--strict").refusal
    assert refusal.startswith("plan.yaml: Steps: as it is: same as baseline") and refusal.endswith("(and 1 more)")


def test_many_arms_need_permission(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    replacement = [{"name": f"{i}", "set": {"decouple.total_steps": i}} for i in range(5, 506)]
    entry = {"name": "Many", "ablated_part": "training", "action": "REPLACE", "replacement": replacement}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"ablations": [entry]}))
    assert "--max-arms 501" in deme("ablate", "many.yaml", "--recipe", "pico.yaml").refusal
    assert "--max-arms 501" in deme("ablate", "many.yaml", "--recipe", "pico.yaml", "--max-arms", 500).refusal
    outcome = deme("ablate", "many.yaml", "--recipe", "pico.yaml", "--dry-run")
    assert outcome.status == 0 and "--max-arms 501" in outcome.out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ablations: []\n", "no ablation"),
        ("Some words and nothing else.\n", "no ablation"),
        ("", "no ablation"),
        (PLAN.replace("6", "4").replace("merge.method: none, merge.search: none", "merge.search: none"), "none of its"),
    ],
)
def test_nothing_to_run_is_one_line(deme: Deme, tmp_path: Path, content: str, said: str) -> None:  # noqa: F811
    (tmp_path / "plan.yaml").write_text(content)
    assert said in deme("ablate", "plan.yaml", "--recipe", "pico.yaml").refusal


def test_a_dry_run_of_what_cannot_be_run_is_no_error(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    entry = {"name": "Elsewhere", "ablated_part": "the tokenizer", "action": "REMOVE"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"ablations": [entry]}))
    (arm,) = dry(deme, "plan.yaml")["ablations"][0]["arms"]
    assert arm["status"] == "not_executable" and arm["reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no plan"),
        (("decouple.num_ranges=2", "--recipe", "pico.yaml"), "no plan"),
        (("plan.yaml",), "--recipe"),
        (("baseline", "--recipe", "pico.yaml"), "did you mean 'baselines'"),
        (("nowhere/plan.md", "--recipe", "pico.yaml"), "no such plan"),
        ((".", "--recipe", "pico.yaml"), "a folder"),
        (("plan.yaml", "--recipe", "digit"), "did you mean 'digits'"),
        (("plan.yaml", "--recipe", "pico.yaml", "decouple.num_rages=2"), "num_ranges"),
        (("plan.yaml", "--recipe", "pico.yaml", "--seeds", "0"), "--seeds"),
        (("binary.bin", "--recipe", "pico.yaml"), "binary.bin"),
    ],
)
def test_wrong_input_is_one_line(deme: Deme, tmp_path: Path, words: tuple[str, ...], said: str) -> None:  # noqa: F811
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 10)
    assert said in deme("ablate", *words).refusal


def test_parts_are_listed(deme: Deme) -> None:  # noqa: F811
    outcome = deme("ablate", "--parts")
    assert outcome.status == 0 and all(name in outcome.out for name in PARTS)
    assert [row["part"] for row in json.loads(deme("ablate", "--parts", "--json").out)] == list(PARTS)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Experts of 3 steps fail, until they are mended."""
    train = stages_module.Stages._decouple

    def called(self: Any, node: Any, folder: Path) -> Any:
        if node.steps == 3:
            raise MachineError("no memory left")
        return train(self, node, folder)

    monkeypatch.setattr(stages_module.Stages, "_decouple", called)
    yield lambda: monkeypatch.setattr(stages_module.Stages, "_decouple", train)


def test_a_run_ends_with_1_where_an_arm_failed_and_0_when_it_is_mended(
    deme: Deme,  # noqa: F811
    broken: Callable[[], None],
) -> None:
    outcome = deme("ablate", "one.yaml", "--recipe", "pico.yaml")
    assert outcome.status == 1 and "no memory left" in outcome.out
    assert "Traceback" not in outcome.err
    broken()
    outcome = deme("ablate", "one.yaml", "--recipe", "pico.yaml")
    assert outcome.status == 0, outcome.err
    assert "training: 10 steps; as independent runs 10" in outcome.out
    assert "runs/pico/ablations/one/report.html" in outcome.out
    content = json.loads(deme("ablate", "one.yaml", "--recipe", "pico.yaml", "--json").out)
    assert content["ablations"][0]["arms"][0]["status"] == "done"


def test_packaged_plans_say_where_they_lie() -> None:
    assert (PACKAGED / "baselines.yaml").is_file()
