"""ConsistentEE's stages in the real loop: who moves, what is remembered, and resuming anywhere."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from offramp_model.checkpoint import load_checkpoint
from offramp_model.policies import POLICIES
from offramp_model.recorded import record_exits
from offramp_model.tokenizer import TextTokenizer
from offramp_training.batches import Batch, EncodedRows
from offramp_training.config import make_recipe
from offramp_training.data import load_split
from offramp_training.errors import RecipeError
from offramp_training.evaluate import evaluate_checkpoint, print_report
from offramp_training.fit import fit
from offramp_training.inspect import inspect_checkpoint
from offramp_training.loop import Run
from offramp_training.model import MultiExitModel, build_model
from offramp_training.objectives import Progress, consistentee
from offramp_training.objectives.base import Stage
from offramp_training.objectives.reinforce import memorised_exits
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.objectives.row_memory import RowMemory

STAGES = (
    consistentee.WarmUp,
    consistentee.PolicyStage,
    consistentee.JointStage3,
    consistentee.HeadsStage,
)
PROGRESS = Progress(0, 0, 1, 1e-3)


class Killed(Exception):
    pass


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    """Ten batches per stage."""
    recipe_table["objective"] = {
        "name": "consistentee",
        "alpha": 0.1,
        "stage1_epochs": 1,
        "stage1_lr": "recipe",
        "stage1_batch_size": "recipe",
        "stage2_epochs": 2,
        "stage2_lr": 1e-2,
        "stage3_lr": 1e-3,
    }
    return recipe_table


@pytest.fixture
def model(backbone: Path, table: dict[str, Any]) -> MultiExitModel:
    return build_model(backbone, make_recipe(table).model, ("pleasure", "dread", "craft"), 0)


@pytest.fixture
def rows(backbone: Path, data: Path) -> EncodedRows:
    tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
    return EncodedRows.of(load_split(str(data), "train"), tokenizer, 0)


@pytest.fixture
def make_stages(
    model: MultiExitModel, rows: EncodedRows, table: dict[str, Any]
) -> Callable[..., list[Stage]]:
    """The stages of a recipe, with memorised layers counted."""

    def make(**options: Any) -> list[Stage]:
        table["objective"].update(options)
        recipe = make_recipe(table)
        stages: list[Stage] = recipe.objective.stages(model, recipe)
        stages[1].prepare(lambda: rows.in_order(64))
        return stages

    return make


def loss_of(stage: Stage, batch: Batch) -> Tensor:
    (loss,) = stage.losses(batch, PROGRESS)
    return loss


def moved(model: MultiExitModel) -> set[str]:
    """The first parts of the names of the parameters whose gradient is not zero."""
    names = (
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.ne(0).any()
    )
    return {".".join(name.split(".")[:3]) if "exits." in name else "backbone" for name in names}


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "exits.safetensors")


def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Tensor]]]:
    """The weights with which each stage begins, as the loop comes by."""
    taken: list[tuple[str, dict[str, Tensor]]] = []

    def watch(kind: type[Stage]) -> None:
        original = kind.prepare

        def prepare(self: Stage, batches: Any) -> None:
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            taken.append((self.name, state))
            original(self, batches)

        monkeypatch.setattr(kind, "prepare", prepare)

    for kind in STAGES:
        watch(kind)
    return taken


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Which groups of tensors differ in any bit."""
    names = (name for name in before if not before[name].equal(after[name]))
    return {".".join(name.split(".")[:2]) for name in names}


def test_each_stage_moves_its_own_and_no_other_bit(
    tmp_path: Path, data: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = snapshots(monkeypatch)
    table["loop"]["patience"] = 1  # accuracy stands still in stage 2, which must not stop it
    table["loop"]["evaluate_every_steps"] = 2
    table["model"]["pooling"] = "attention"
    made = fit(make_recipe(table), tmp_path / "out", data=str(data), calibrate=False)
    assert [name for name, _ in taken] == ["warm-up", "gates", "joint"]
    start, warm, gated = (state for _, state in taken)
    encoder = {"backbone.embeddings", "backbone.encoder"}
    assert changed(start, warm) == encoder | {"exits.classifiers", "exits.poolings"}
    assert changed(warm, gated) == {"exits.gates"}
    gates = {name for name in warm if name.startswith("exits.gates.")}
    assert gates == {
        f"exits.gates.{gate}.{part}.{kind}"
        for gate in (0, 1)
        for part in ("hidden", "out")
        for kind in ("weight", "bias")
    }
    assert [name for name in gates if warm[name].equal(gated[name])] == []
    final = {
        f"exits.{name}": value for name, value in load_file(made / "exits.safetensors").items()
    }
    assert changed(final, gated) == {"exits.gates", "exits.classifiers", "exits.poolings"}


def test_the_alternate_reading_moves_gates_and_classifiers_in_turn(
    tmp_path: Path, data: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = snapshots(monkeypatch)
    counted: list[dict[int, int]] = []
    original = RowMemory.run

    def run(self: RowMemory, *arguments: Any) -> None:
        original(self, *arguments)
        counted.append(self.histogram())

    monkeypatch.setattr(RowMemory, "run", run)
    table["objective"] |= {"stage3": "alternate", "rounds": 2, "stage3_lr": 1e-2}
    table["model"] |= {"pooling": "attention", "pooler": "shared"}
    fit(make_recipe(table), tmp_path / "out", data=str(data), calibrate=False)
    assert [name for name, _ in taken] == [
        "warm-up", "gates 1 of 2", "alternate 1 of 2", "gates 2 of 2", "alternate 2 of 2",
    ]  # fmt: skip
    states = [state for _, state in taken]
    assert changed(states[1], states[2]) == {"exits.gates"}
    assert changed(states[2], states[3]) == {"exits.classifiers"}
    assert changed(states[3], states[4]) == {"exits.gates"}
    assert len(counted) == 4
    assert all(one == counted[0] for one in counted)  # never counted again
    assert sum(counted[0].values()) == 160


def test_gradients_go_where_the_page_says(
    model: MultiExitModel, rows: EncodedRows, make_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up, gates, joint = make_stages()
    batch = rows.batch(range(32))
    model.train()
    for stage, expected in (
        (warm_up, {"backbone", *(f"exits.classifiers.{e}" for e in range(3))}),
        (gates, {"exits.gates.0", "exits.gates.1"}),
        (
            joint,
            {
                "backbone",
                *(f"exits.classifiers.{e}" for e in range(3)),
                *(f"exits.gates.{e}" for e in range(2)),
            },
        ),
    ):
        model.zero_grad()
        torch.manual_seed(0)
        loss_of(stage, batch).backward()
        assert moved(model) == expected, stage.name
    # Everybody leaves at exit 2: the other heads are not scored, and nothing speaks for a gate.
    monkeypatch.setattr(
        consistentee,
        "sample_exits",
        lambda gates, draws: torch.ones(len(draws), 32, dtype=torch.long),
    )
    model.zero_grad()
    loss_of(joint, batch).backward()
    assert moved(model) == {"backbone", "exits.classifiers.1"}


def test_the_gates_own_gradient_reaches_the_encoder(
    model: MultiExitModel, rows: EncodedRows, make_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = make_stages()[2]
    monkeypatch.setattr(consistentee, "sampled_cross_entropy", lambda ce, exits: 0.0)
    loss_of(joint, rows.batch(range(32))).backward()
    assert moved(model) == {"backbone", "exits.gates.0", "exits.gates.1"}


def test_memorised_layers_are_found_by_id(
    model: MultiExitModel, rows: EncodedRows, backbone: Path
) -> None:
    # Heads that are right by chance, and ids that are not places.
    torch.manual_seed(5)
    for classifier in model.exits.classifiers:
        torch.nn.init.normal_(classifier.weight, std=2.0)
    ids = [7 * (place * 37 % 160) + 3 for place in range(160)]
    renamed = EncodedRows(rows.encodings, ids, rows.labels, rows.pad_id)
    memory = RowMemory()
    model.train()
    memory.run(model, renamed.in_order(64))
    assert model.training
    assert len(memory.histogram()) > 1

    model.eval()
    places = torch.randperm(160)[:40].tolist()
    batch = renamed.batch(places)
    with torch.no_grad():
        logits = model.logits(batch)
    layers = memorised_exits(logits.argmax(-1) == batch.labels) + 1
    assert memory.memorised_layers(batch.ids).equal(layers)
    torch.testing.assert_close(
        memory.cross_entropies(batch.ids),
        exit_cross_entropies(logits, batch.labels),
        atol=1e-5,
        rtol=1e-5,
    )
    states = memory.states(batch.ids)
    again = torch.stack([model.exits.classify(i, state) for i, state in enumerate(states)])
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)

    other = RowMemory()
    other.load_state_dict(memory.state_dict())
    assert other.memorised_layers(batch.ids).equal(layers)
    with pytest.raises(RuntimeError, match="no pass"):
        other.states(batch.ids)
    with pytest.raises(RuntimeError, match="counted after the warm-up"):
        RowMemory().memorised_layers(batch.ids)


def test_a_pass_stands_in_its_own_order_not_in_that_of_a_resume_point(
    model: MultiExitModel, rows: EncodedRows
) -> None:
    memory, resumed = RowMemory(), RowMemory()
    memory.run(model, rows.in_order(64))
    ids = torch.tensor(rows.ids)
    kept = memory.state_dict()
    resumed.load_state_dict({name: values.flip(0) for name, values in kept.items()})
    resumed.run(model, rows.in_order(64))
    for one, other in (
        (resumed.states(ids), memory.states(ids)),
        (resumed.cross_entropies(ids), memory.cross_entropies(ids)),
        (resumed.memorised_layers(ids), memory.memorised_layers(ids)),
    ):
        assert torch.equal(one, other)


def test_two_rows_of_one_id_are_refused(model: MultiExitModel, rows: EncodedRows) -> None:
    twice = EncodedRows(rows.encodings, [0] * len(rows), rows.labels, rows.pad_id)
    with pytest.raises(ValueError, match="two training rows have the same id"):
        RowMemory().run(model, twice.in_order(64))


def test_stage_2_needs_no_encoder(
    model: MultiExitModel, rows: EncodedRows, make_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = make_stages()[1]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(model.backbone, "forward", fail)
    assert loss_of(gates, rows.batch(range(32))).requires_grad
    assert "training rows by memorised layer: " in gates.report()[0]


def test_settings_come_from_the_objective_or_the_recipe(make_stages: Any) -> None:
    warm_up, gates, joint = make_stages(stage3_epochs="recipe", rounds=1)
    assert (warm_up.epochs, warm_up.batch_size, warm_up.lr) == (1, None, None)
    assert (gates.epochs, gates.batch_size, gates.lr) == (2, 32, 1e-2)
    assert (joint.epochs, joint.batch_size, joint.lr) == (2, 16, 1e-3)  # the recipe's two epochs
    assert [stage.keeps_best for stage in (warm_up, gates, joint)] == [True, False, False]


def kill_at(monkeypatch: pytest.MonkeyPatch, batch_number: int) -> None:
    """Whatever stage it is, it raises when asked for the losses of the n-th batch of this run."""
    seen = 0

    def watch(kind: type[Stage]) -> None:
        original = kind.losses

        def losses(self: Stage, *arguments: Any) -> Iterator[Tensor]:
            nonlocal seen
            seen += 1
            if seen == batch_number:
                raise Killed(self.name)
            return original(self, *arguments)

        monkeypatch.setattr(kind, "losses", losses)

    for kind in STAGES:
        watch(kind)


@pytest.mark.parametrize(
    ("options", "precision"),
    [({}, "no"), ({"stage3": "alternate", "stage3_epochs": 1}, "no"), ({}, "bf16")],
    ids=["joint", "alternate", "bf16"],
)
def test_a_run_killed_in_every_stage_ends_with_the_same_bits(
    tmp_path: Path,
    data: Path,
    table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    precision: str,
) -> None:
    table["objective"].update(options)
    table["loop"]["precision"] = precision
    recipe = make_recipe(table)
    whole = fit(recipe, tmp_path / "whole", data=str(data), calibrate=False)
    last = recipe.objective.stage3
    # Points are at every third batch and between stages; ten batches a stage.
    for batch_number, stage in ((5, "warm-up"), (12, "gates"), (8, last), (5, last)):
        with monkeypatch.context() as patch:
            kill_at(patch, batch_number)
            with pytest.raises(Killed, match=stage):
                fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    resumed = fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    one, two = weights(whole), weights(resumed)
    assert one.keys() == two.keys()
    assert [name for name in one if not one[name].equal(two[name])] == []


def test_a_model_with_one_exit_is_refused(
    tmp_path: Path, data: Path, table: dict[str, Any]
) -> None:
    table["model"]["exit_layers"] = [3]
    with pytest.raises(
        RecipeError, match=r"model\.exit_layers = \[3\]; .*allowed: two layers or more"
    ):
        fit(make_recipe(table), tmp_path / "out", data=str(data))
    assert not (tmp_path / "out.fit").exists()


def test_what_fit_writes_has_gates_tables_and_the_natural_point(
    tmp_path: Path, data: Path, table: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    table["objective"]["theta"] = 0.4
    table["model"] |= {"exit_layers": [1, 3], "pooling": "attention", "attention_heads": 2}
    made = fit(make_recipe(table), tmp_path / "out", data=str(data))
    opened = load_checkpoint(made)
    assert (opened.model.gate_hidden, opened.manifest.exit_policy) == (32, "gate")
    assert opened.manifest.exit_threshold == 0.4
    assert {one.policy for one in opened.manifest.calibration} == set(POLICIES)
    stored: Any = opened.manifest.evaluation["policies"]
    assert stored["gate"]["natural"]["threshold"] == 0.4
    assert "natural" not in stored["entropy"]
    card = (made / "README.md").read_text()
    assert "threshold that the exits were trained for, 0.4: speed-up" in card
    assert "exit heads with pooling `attention (2 heads)`, pooler `none`; objective" in card
    report = evaluate_checkpoint(opened, load_split(str(data), "test"), ["gate"])
    natural = report.policies["gate"].natural
    assert natural is not None
    test_rows = opened.tokenizer().encode(load_split(str(data), "test").inputs)
    gate = record_exits(opened.stack(), test_rows).gate
    assert gate is not None
    early = int((gate[0] > 0.4).sum())
    assert natural.exit_counts == (early, 0, 40 - early)
    print_report(report, Console(width=120))
    inspect_checkpoint(made, Console(width=120))
    printed = capsys.readouterr().out
    assert "gate at the threshold it was trained for, 0.4: accuracy" in printed
    assert "pooling attention (2 heads), pooler none, gates 32 wide" in printed


def test_what_time_was_too_short_for_does_not_decide(
    tmp_path: Path,
    data: Path,
    table: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Run, "seconds", property(lambda run: run.position.steps))
    table["loop"]["max_minutes"] = 1 / 60
    made = fit(make_recipe(table), tmp_path / "out", data=str(data))
    manifest = load_checkpoint(made).manifest
    assert manifest.objective.untrained_stages == ("gates", "joint")
    assert (manifest.exit_policy, manifest.exit_threshold) == ("entropy", None)
    stored: Any = manifest.evaluation["policies"]
    assert all("natural" not in one for one in stored.values())
    assert "Not trained for want of time: gates, joint." in (made / "README.md").read_text()
    inspect_checkpoint(made, Console(width=120))
    assert "not trained for want of time: gates, joint" in capsys.readouterr().out


def test_the_policy_learns_to_stop_where_it_pays(
    model: MultiExitModel, rows: EncodedRows, make_stages: Any
) -> None:
    """With a high price of depth every row leaves at once; free depth leaves it to the loss."""
    chances = {}
    for alpha in (0.0, 5.0):
        torch.manual_seed(0)
        stage = make_stages(alpha=alpha)[1]
        stage.memory._memorised.fill_(1)  # every row is easy
        optimiser = torch.optim.AdamW(stage.parameters().values(), lr=1e-2)
        for _ in range(60):
            loss_of(stage, rows.batch(range(64))).backward()
            optimiser.step()
            optimiser.zero_grad()
        states = stage.memory.states(torch.arange(64))
        chances[alpha] = torch.sigmoid(stage.gate_logits(states))[0].mean().item()
    assert chances[5.0] > 0.95
    assert chances[0.0] < chances[5.0] - 0.05
