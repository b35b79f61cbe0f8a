"""The protocol of the comparison of objectives: which runs it asks for, and in what order."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loading import ROOT, load
from offramp_training.objectives import OBJECTIVES

PROTOCOL = ROOT / "training" / "bench" / "objectives.toml"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("training/bench/compare_objectives.py")


@pytest.fixture
def protocol(bench: ModuleType) -> Any:
    return bench.Protocol(PROTOCOL)


def put(results: Any, run: Any, auc: float) -> None:
    figures = {"policy": "entropy", "policies": {"entropy": {"auc": auc}}}
    results.write(run, {"settings": run.settings, "selection": figures, "report": figures})


def test_every_run_of_the_protocol_is_a_recipe(protocol: Any) -> None:
    asked = set()
    for data_set, objective in protocol.contests():
        names = protocol.configurations(data_set, objective)
        assert names
        assert objective not in OBJECTIVES or len(names) <= 8
        for name in names:
            for seed in protocol.seeds(data_set):
                run = protocol.run(data_set, objective, name, seed)
                recipe = run.recipe(Path("teacher"))
                asked.add(recipe.objective.name)
                assert recipe.loop.seed == seed
                if run.teacher is not None:
                    assert protocol.run(*run.teacher).data == run.data
    assert asked == set(OBJECTIVES)


def test_objectives_pass_over_the_rows_equally_often(protocol: Any) -> None:
    for data_set in ("sst2", "trec6", "mrpc", "clinc150"):
        epochs = set()
        for objective in OBJECTIVES:
            name = protocol.configurations(data_set, objective)[0]
            recipe = protocol.run(data_set, objective, name, 0).recipe()
            options = recipe.objective
            passes = recipe.loop.epochs
            if objective == "consistentee":
                passes = options.stage1_epochs + options.stage3_epochs
            epochs.add(passes)
        assert len(epochs) == 1


def test_runs_that_are_done_are_not_asked_for_again(
    bench: ModuleType, protocol: Any, tmp_path: Path
) -> None:
    results = bench.Results(tmp_path)
    only = ["trec6/joint"]
    first, *others = list(bench.pending(protocol, results, only))
    put(results, first, 0.5)
    assert [run.name for run in bench.pending(protocol, results, only)] == [
        run.name for run in others
    ]
    changed = json.loads(results.path(first).read_text())
    changed["settings"]["optimiser.lr"] = 0.5
    results.path(first).write_text(json.dumps(changed))
    assert first.name in [run.name for run in bench.pending(protocol, results, only)]


def test_other_seeds_wait_for_a_winner_and_are_its_own(
    bench: ModuleType, protocol: Any, tmp_path: Path
) -> None:
    results, only = bench.Results(tmp_path), ["trec6/joint"]
    runs = list(bench.pending(protocol, results, only))
    first_seed = protocol.seeds("trec6")[0]
    assert {run.seed for run in runs} == {first_seed}
    for place, run in enumerate(runs):
        put(results, run, auc=1.0 if place == 1 else 0.5)
    after = list(bench.pending(protocol, results, only))
    assert {run.configuration for run in after} == {runs[1].configuration}
    assert [run.seed for run in after] == protocol.seeds("trec6")[1:]
