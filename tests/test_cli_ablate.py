"""`deme ablate`: what a dry run prints, exit statuses, and one line for wrong input."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablations import DDIM, ablation, arm, experiment, sampled
from deme_diffusion.ablate.opening import MOST_ARMS
from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.running import PACKAGED, Findings
from deme_diffusion.ablate.told import why
from deme_diffusion.cli.ablate import _say_findings
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
    assert set(first) == {"name", "ablated_part", "action", "part", "metrics", "measured", "arms"}
    assert (first["name"], first["action"], first["part"]) == ("No merging", "REMOVE", "merging")
    assert first["metrics"] == ["FID", "CLIP score"] == [metric["asked"] for metric in first["measured"]]
    (removed,) = first["arms"]
    assert removed == {"replacement": None, "change": {"merge.method": "none"}, "status": "ready", "reason": "",
                       "nearest": [], "score": 1.0}  # fmt: skip
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


def test_dry_run_for_people_prints_a_plans_text_as_it_is(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    plan = yaml.safe_load(ONE)
    plan["ablations"][0]["name"], plan["ablations"][0]["replacement"][0]["name"] = "[bold red]x :warning:", "[/]"
    (tmp_path / "marked.yaml").write_text(yaml.safe_dump(plan))
    outcome = deme("ablate", "marked.yaml", "--recipe", "pico.yaml", "--dry-run")
    assert outcome.status == 0
    assert "[bold red]x :warning:" in outcome.out and "[/]" in outcome.out


def test_many_comparisons_are_judged_together_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [arm(f"arm {i}", metrics={DDIM: sampled([8.0 + i / 100, 8.3, 8.6])}) for i in range(11)]
    content = experiment(ablation(*arms))
    _say_findings(Findings(tmp_path, content, ("A sentence.",)), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    said = lines[lines.index("A sentence.") + 1]
    assert said.startswith("11 comparisons, each with a 95% interval") and "Holm's correction" in said
    _say_findings(Findings(tmp_path, experiment(ablation(*arms[:2])), ("A sentence.",)), as_json=False)
    assert "Holm" not in capsys.readouterr().out


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
    arms = [arm for ablation in planned["ablations"] for arm in ablation["arms"]]
    assert len(arms) == 9 and {arm["status"] for arm in arms} == {"ready"}, arms
    assert all(arm["change"]["merge.method"] == "none" for arm in arms)
    assert sum("decouple.num_ranges" not in arm["change"] for arm in arms) == 1, "the experts before merging"
    assert not any("total_steps" in path for arm in arms for path in arm["change"]), "at equal budget"


def test_strict_names_the_first_and_counts_the_rest(deme: Deme) -> None:  # noqa: F811
    refusal = deme("ablate", "plan.yaml", "--recipe", "pico.yaml", "--strict").refusal
    assert refusal.startswith("plan.yaml: Steps: as it is: same as baseline") and refusal.endswith("(and 1 more)")


def test_strict_lets_metrics_pass_that_cannot_be_given(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "clip.yaml").write_text(PLAN.split("  - name: Steps")[0])
    outcome = deme("ablate", "clip.yaml", "--recipe", "pico.yaml", "--dry-run", "--strict")
    assert outcome.status == 0 and "CLIP score: not applicable" in outcome.out


@pytest.mark.parametrize(
    "change",
    [{"seeds": [5]}, {"evaluate.num_images": 8}, {"evaluate.sampling_seeds": 2}, {"runtime.device": "cuda"},
     {"name": "other"}, {"data.image_size": 8}, {"extractor.kind": "inception"}],
)  # fmt: skip
def test_arms_that_nothing_could_be_compared_with_are_refused(deme: Deme, tmp_path: Path, change: Any) -> None:  # noqa: F811
    entry = {"name": "Odd", "ablated_part": "x", "action": "REPLACE", "replacement": [{"name": "a", "set": change}]}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({"ablations": [entry]}))
    (arm,) = dry(deme, "odd.yaml")["ablations"][0]["arms"]
    assert arm["status"] == "not_executable" and next(iter(change)) in arm["reason"]
    outcome = deme("ablate", "odd.yaml", "--recipe", "pico.yaml", "--dry-run")
    assert outcome.status == 0 and "without --dry-run this is refused" in outcome.out


def test_equal_arms_and_ablations_are_told(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "twice.yaml").write_text(ONE + ONE.replace("ablations:\n", "").replace("name: Longer", "name: Again"))
    first, second = dry(deme, "twice.yaml")["ablations"]
    assert (first["arms"][0]["reason"], second["arms"][0]["reason"]) == ("", "same as 'longer.a', run once")
    out = deme("ablate", "twice.yaml", "--recipe", "pico.yaml", "--dry-run").out
    assert "ablation 2 (Again) equals ablation 1" in out


def test_one_bad_replacement_leaves_the_others(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "bad.yaml").write_text(PLAN.replace("set: {decouple.total_steps: 4}", "set: [1]"))
    planned = dry(deme, "bad.yaml")
    assert [arm["replacement"] for arm in planned["ablations"][1]["arms"]] == ["longer", "too many experts"]
    (problem,) = planned["problems"]
    assert problem["line"] == PLAN[: PLAN.index("as it is")].count("\n") + 1 and "as it is" in problem["what"]


def test_a_division_that_waits_is_told(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "plan.yaml").write_text(ONE.replace("total_steps: 6", "division: gradient_similarity"))
    planned = dry(deme, "plan.yaml", "similarity.bins=4")
    assert "waits for the similarity" in planned["ablations"][0]["arms"][0]["reason"]
    assert planned["steps"] == {"shared": 8, "independent": 8}


def test_a_long_list_of_what_a_part_takes_is_shown_once_and_short() -> None:
    nearest = [f"method {i}" for i in range(9)]
    said = why(f"merging takes nothing like that; it takes {'; '.join(nearest)}", nearest)
    assert said.endswith("it takes method 0; method 1; method 2; method 3; method 4; 4 more (deme ablate --parts)")
    assert why("not known", nearest) == "not known (nearest: method 0, method 1, method 2, method 3, method 4)"


def test_many_arms_need_permission(
    deme: Deme,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert MOST_ARMS == 500
    for module in ("opening", "told"):
        monkeypatch.setattr(f"deme_diffusion.ablate.{module}.MOST_ARMS", 4)
    replacement = [{"name": f"{i}", "set": {"decouple.total_steps": i}} for i in range(5, 10)]
    entry = {"name": "Many", "ablated_part": "training", "action": "REPLACE", "replacement": replacement}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"ablations": [entry]}))
    assert "--max-arms 5 " in deme("ablate", "many.yaml", "--recipe", "pico.yaml").refusal
    assert "--max-arms 5 " in deme("ablate", "many.yaml", "--recipe", "pico.yaml", "--max-arms", 3).refusal
    outcome = deme("ablate", "many.yaml", "--recipe", "pico.yaml", "--dry-run")
    assert outcome.status == 0 and "--max-arms 5\n" in outcome.out


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


def test_a_plan_may_be_called_as_an_override(deme: Deme, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "a=b.yaml").write_text(ONE)
    assert dry(deme, "a=b.yaml")["ablations"]


def test_a_plans_text_in_place_of_its_name_is_cut(deme: Deme) -> None:  # noqa: F811
    for words in (("x" * 10_000, "--recipe", "pico.yaml"), ("x" * 10_000,), (f"{ONE * 50}\n", "--recipe", "pico.yaml")):
        assert len(deme("ablate", *words).refusal) < 300


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
    # its folder afterwards
    folder = Path("runs/pico/ablations/one")
    (folder / "report.html").unlink()
    again = deme("report", folder)
    assert again.status == 0 and again.out == outcome.out and (folder / "report.html").is_file()
    assert f"deme report {folder}" in deme("report", "runs/pico").refusal
    assert f"deme report {folder}" in deme("run", folder).refusal
    (folder / "ablation.json").write_text("{}")
    assert f"{folder}/ablation.json: " in deme("report", folder).refusal
    (folder / "ablation.json").unlink()
    assert "not finished" in deme("report", folder).refusal


def test_packaged_plans_say_where_they_lie() -> None:
    assert (PACKAGED / "baselines.yaml").is_file()
