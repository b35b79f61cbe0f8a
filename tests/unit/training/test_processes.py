"""Several processes do what one does: shares, sums, and the gradients of every objective.

Threads stand in for processes, over a transport that meets at a barrier; the real transport is in
`tests/integration/test_two_processes.py`.
"""

import copy
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from offramp_model.checkpoint import Checkpoint
from offramp_model.tokenizer import TextTokenizer
from offramp_training import processes as module
from offramp_training.__main__ import main
from offramp_training.batches import EncodedRows
from offramp_training.config import make_recipe
from offramp_training.data import load_split
from offramp_training.errors import DataError, RecipeError, TrainingError
from offramp_training.loop import exit_accuracies
from offramp_training.model import build_model
from offramp_training.objectives import OBJECTIVES, Progress, Stage
from offramp_training.objectives.cosee import SignalRange
from offramp_training.objectives.ensemble import diversity
from offramp_training.objectives.row_losses import Distillation, RowLogits
from offramp_training.objectives.row_memory import RowMemory
from offramp_training.optimiser import make_optimiser
from offramp_training.processes import ALONE, DEAL, Group, Processes, own_places, weight
from offramp_training.teacher import last_exit, make_distillation, open_teacher

ROWS, COUNTS = st.integers(1, 70), st.integers(2, 9)


class Transport:
    """What `Group` uses of torch.distributed, between threads."""

    ReduceOp = SimpleNamespace(SUM=torch.add, MAX=torch.maximum)

    def __init__(self, count: int) -> None:
        self.count = count
        self.mine = threading.local()
        self.meeting = threading.Barrier(count, timeout=30)
        self.table: dict[int, Any] = {}

    def get_rank(self) -> int:
        rank: int = self.mine.rank
        return rank

    def get_world_size(self) -> int:
        return self.count

    def new_group(self, **_: Any) -> None:
        return None

    def _exchange(self, value: Any) -> list[Any]:
        self.table[self.get_rank()] = value
        self.meeting.wait()
        everyones = [self.table[rank] for rank in range(self.count)]
        self.meeting.wait()
        return everyones

    def all_reduce(self, values: Tensor, how: Any = torch.add) -> None:
        first, *others = self._exchange(values.clone())
        for other in others:
            first = how(first, other)
        values.copy_(first)

    def all_gather_object(self, values: list[Any], value: Any, _group: None) -> None:
        values[:] = self._exchange(value)

    def broadcast_object_list(self, values: list[Any], src: int, group: None) -> None:
        values[:] = self._exchange(list(values))[src]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs the same work in so many processes; what each returns or raises, by rank."""

    def run(count: int, work: Callable[[Processes], Any]) -> list[Any]:
        transport = Transport(count)
        monkeypatch.setattr(module, "distributed", transport)
        found: list[Any] = [None] * count

        def one(rank: int) -> None:
            transport.mine.rank = rank
            try:
                found[rank] = work(Group())
            except TrainingError as error:
                found[rank] = error
            except Exception as error:  # the others would wait for this one
                transport.meeting.abort()
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


# ---- shares --------------------------------------------------------------------------------------


@given(ROWS, COUNTS)
def test_every_row_is_somebodys_and_weights_sum_to_one(rows: int, count: int) -> None:
    shares = [own_places(rows, rank, count).tolist() for rank in range(count)]
    weights = [weight(rows, rank, count) for rank in range(count)]
    assert sum(weights) == pytest.approx(1)
    assert all(share and share == sorted(share) for share in shares)
    if rows < DEAL * count:
        assert shares == [list(range(rows))] * count
        assert len(set(weights)) == 1
    else:
        assert sorted(place for share in shares for place in share) == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= DEAL
    # The mean over the batch is the weighed means over the shares.
    values = [float(place**2) for place in range(rows)]
    means = [sum(values[place] for place in share) / len(share) for share in shares]
    assert sum(w * m for w, m in zip(weights, means, strict=True)) == pytest.approx(
        sum(values) / rows
    )


@given(st.integers(1, 35), COUNTS)
def test_every_other_row_of_a_share_is_a_share_of_every_other_row(pairs: int, count: int) -> None:
    for rank in range(count):
        own = own_places(2 * pairs, rank, count)
        assert own[0::2].remainder(2).eq(0).all()
        assert own[1::2].remainder(2).eq(1).all()
        assert len(own[0::2]) == len(own[1::2])  # so a half is weighed as the whole


# ---- sums and agreement --------------------------------------------------------------------------


def test_gradients_are_summed_in_buckets_and_stay_away_where_nobody_has_one(
    together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKET", 7)

    def work(processes: Processes) -> tuple[list[Tensor | None], float]:
        parameters = [nn.Parameter(torch.ones(*shape)) for shape in ((2, 3), (4,), (9,), (1, 1))]
        for place, parameter in enumerate(parameters):
            if place == processes.rank or place == 2:  # 0 and 1 in one process, 2 in both
                parameter.grad = torch.full_like(parameter, 10.0**processes.rank)
        loss = processes.sum_gradients(parameters, torch.tensor(0.5 + processes.rank))
        return [p.grad for p in parameters], float(loss)

    for gradients, loss in together(2, work):
        assert loss == 2.0
        assert [None if g is None else g.unique().tolist() for g in gradients] == [
            [1.0], [10.0], [11.0], None,
        ]  # fmt: skip
        assert gradients[0].shape == (2, 3)


def test_an_error_of_one_is_everyones(together: Callable[..., list[Any]]) -> None:
    def work(processes: Processes) -> None:
        with processes.agreeing():
            if processes.rank == 1:
                raise DataError("no such file")

    assert [repr(error) for error in together(3, work)] == ["DataError('no such file')"] * 3

    def both(processes: Processes) -> None:
        with processes.agreeing():
            raise RecipeError(f"from {processes.rank}")

    assert {str(error) for error in together(2, both)} == {"from 0"}


def test_the_main_process_decides(together: Callable[..., list[Any]]) -> None:
    assert together(3, lambda processes: processes.mains(processes.rank == 0)) == [True] * 3
    assert together(3, lambda processes: processes.everyones(processes.rank)) == [[0, 1, 2]] * 3
    assert together(3, lambda processes: processes.is_main) == [True, False, False]


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_other_commands_run_in_one_process(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--output", "x"] if command == "sweep" else ["--data", "y"]
    assert main([command, "x", *arguments]) == 2
    assert "2 processes: allowed for fit only" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([command, "x", *arguments]) == 2
    assert capsys.readouterr().err == ""  # the first process of the machine has said it


# ---- what stages do with it ----------------------------------------------------------------------


@pytest.fixture
def rows(backbone: Path, data: Path) -> EncodedRows:
    tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
    return EncodedRows.of(load_split(str(data), "train"), tokenizer, 0)


def make_stages(
    backbone: Path, rows: EncodedRows, batch_size: int, *, distils: bool = False, **options: Any
) -> list[Stage]:
    """All of an objective's stages, over one model without dropout and with heads that differ;
    with soft targets of both kinds, if wanted."""
    table = {
        "model": {"backbone": str(backbone), "max_length": 16},
        "objective": options,
        "loop": {"batch_size": batch_size, "seed": 3},
    }
    recipe = make_recipe(table)
    model = build_model(backbone, recipe.model, ("pleasure", "dread", "craft"), seed=0)
    stages: list[Stage] = recipe.objective.stages(model, recipe)
    for classifier in model.exits.classifiers:
        nn.init.normal_(classifier.weight, std=1.0)
    model.eval()
    for stage in stages:
        stage.optimiser = make_optimiser(stage, recipe.optimiser)
        if distils:
            answers = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(1))
            stage.distillation = Distillation(0.3, 0.4, 2.0, RowLogits(rows.ids, 2 * answers))
    return stages


def descend(
    stages: list[Stage], rows: EncodedRows, places: list[int], processes: Processes
) -> list[dict[str, Tensor]]:
    """Loss and gradients of each loss of each stage, as the loop finds them. Nothing moves but what
    the stages keep."""
    found = []
    for stage in stages:
        stage.processes = processes
        stage.prepare(lambda: rows.in_order(64))
        for loss in stage.losses(rows.batch(places), Progress(1, 5, 10, 1e-3)):
            mine = processes.weigh(loss, len(places))
            mine.backward()  # type: ignore[no-untyped-call]
            total = processes.sum_gradients(list(stage.parameters().values()), mine)
            gradients = {n: p.grad for n, p in stage.parameters().items() if p.grad is not None}
            found.append({"loss": total, **gradients})
            stage.model.zero_grad(set_to_none=True)
    return found


def objectives() -> Iterator[Any]:
    """Options, how many processes, how many rows: unequal shares, equal ones, too few to share."""
    for options in (
        {"name": "joint", "weights": "depth"},
        {"name": "ensemble", "lambda": 1.0},
        {"name": "ensemble", "lambda": 1.0, "min_level": "row"},
        {"name": "cosee", "alpha": 2.0, "eps": 1.0},
        {"name": "cosee", "alpha": 2.0, "eps": 1.0, "signal": "confidence", "osc_norm": "paper"},
        {"name": "consistentee"},
        {"name": "consistentee", "stage3": "alternate"},
    ):
        for count, batch in ((2, 7), (3, 12), (3, 5)):
            yield pytest.param(options, count, batch, id=f"{'-'.join(map(str, options.values()))}-"
                               f"{batch}-over-{count}")  # fmt: skip
    for centring, count, batch in (("mat", 2, 10), ("row", 3, 12), ("mat", 3, 2), ("col", 2, 8)):
        options = {"name": "l2w", "centring": centring, "meta_lr": 1e-2, "negative_weights": "clip"}
        yield pytest.param(options, count, batch, id=f"l2w-{centring}-{batch}-over-{count}")
    for name in OBJECTIVES:
        count, batch = (2, 10) if name == "l2w" else (2, 7)
        options = {"name": name, "distils": True}
        yield pytest.param(options, count, batch, id=f"{name}-distilled-{batch}-over-{count}")


@pytest.mark.parametrize(("options", "count", "batch"), list(objectives()))
def test_shares_together_have_the_gradients_of_the_batch(
    backbone: Path,
    rows: EncodedRows,
    together: Callable[..., list[Any]],
    options: dict[str, Any],
    count: int,
    batch: int,
) -> None:
    places = list(range(20, 20 + batch))
    stages = make_stages(backbone, rows, len(places), **options)
    copies = [copy.deepcopy(stages) for _ in range(count)]
    expected = descend(stages, rows, places, ALONE)
    if options.get("distils"):
        plain = make_stages(backbone, rows, len(places), name=options["name"])
        (labels_only, *_), (mixed, *_) = descend(plain, rows, places, ALONE), expected
        assert not torch.isclose(labels_only["loss"], mixed["loss"])
    assert any(value.ne(0).any() for value in expected[-1].values())

    def work(processes: Processes) -> Any:
        return descend(copies[processes.rank], rows, places, processes)

    for found in together(count, work):
        assert not isinstance(found, Exception), repr(found)
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                torch.testing.assert_close(one[name], value, atol=5e-6, rtol=1e-4)
    if options["name"] == "l2w":
        alone, first, *others = (one[0].state_dict()["network"] for one in (stages, *copies))
        for name, value in first.items():
            # Products of other sizes round otherwise, and Adam steps by the sign of what is tiny.
            torch.testing.assert_close(value, alone[name], atol=1e-4, rtol=1e-4)
            for other in others:  # but all processes have the same network, to the bit
                torch.testing.assert_close(other[name], value, atol=0, rtol=0)


def test_the_main_process_runs_the_teacher_for_all(
    checkpoint: Path,
    data: Path,
    together: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = load_split(str(data), "train").take(range(40))
    table = {"distillation": {"teacher": str(checkpoint), "teacher_weight": 0.5}}
    recipe, opened = open_teacher(make_recipe(table), rows.label_names)
    assert opened is not None
    cpu, ids = torch.device("cpu"), torch.tensor([row.id for row in rows.rows])
    answers, ran = last_exit(opened, rows, cpu), 0

    def watched(*arguments: Any) -> Tensor:
        nonlocal ran
        ran += 1
        return last_exit(*arguments)

    monkeypatch.setattr("offramp_training.teacher.last_exit", watched)

    def work(processes: Processes) -> Distillation:
        # Files may be missing where the main process is not; those that it has count.
        mine = opened if processes.is_main else Checkpoint(data, opened.manifest, {})
        return make_distillation(recipe.distillation, mine, rows, cpu, processes)

    for made in together(3, work):
        assert isinstance(made, Distillation), repr(made)
        assert made.teacher is not None
        assert made.teacher.of(ids).equal(answers)
    assert ran == 1


def test_a_teacher_that_fails_in_the_main_process_fails_in_all(
    checkpoint: Path, data: Path, together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    rows = load_split(str(data), "train").take(range(8))
    gone = shutil.copytree(checkpoint, tmp_path / "gone")
    table = {"distillation": {"teacher": str(gone), "teacher_weight": 0.5}}
    recipe, opened = open_teacher(make_recipe(table), rows.label_names)
    (gone / "exits.safetensors").unlink()

    def work(processes: Processes) -> Distillation:
        cpu = torch.device("cpu")
        return make_distillation(recipe.distillation, opened, rows, cpu, processes)

    for error in together(2, work):
        assert isinstance(error, RecipeError), repr(error)
        assert f"distillation.teacher = {str(gone)!r}: " in str(error)


def test_the_nearest_exit_is_that_of_the_whole_batch(together: Callable[..., list[Any]]) -> None:
    """The first process's own rows would choose another one."""
    pairs = torch.zeros(3, 3, 4)
    pairs[0, 2], pairs[1, 2] = torch.tensor([0.0, 0.0, 5.0, 5.0]), torch.ones(4)

    def work(processes: Processes) -> float:
        return float(diversity(processes.own(pairs), "batch", processes=processes))

    assert together(2, work) == [1.0, 1.0]
    assert float(diversity(pairs, "batch")) == 1.0


def test_the_range_of_signals_is_that_of_all_rows(together: Callable[..., list[Any]]) -> None:
    def work(processes: Processes) -> tuple[float, float]:
        seen = SignalRange()
        seen.see(torch.tensor([[0.3, 0.9]]) - 0.2 * processes.rank, processes)
        seen.next_epoch()
        return seen.limits

    for limits in together(2, work):
        assert limits == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize("count", [2, 4])  # of 160 rows, 3 batches of 64: one process has none
def test_a_pass_in_turns_is_the_whole_pass(
    backbone: Path,
    rows: EncodedRows,
    together: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    model = make_stages(backbone, rows, 16)[0].model
    alone = RowMemory()
    alone.run(model, rows.in_order(64))
    copies = [copy.deepcopy(model) for _ in range(count)]

    largest = 0
    reduce = Group.reduce

    def watched(self: Group, values: Tensor, how: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return reduce(self, values, how)

    monkeypatch.setattr(Group, "reduce", watched)
    monkeypatch.setattr(Group, "everyones", None)  # Python values: several copies of the whole

    def work(processes: Processes) -> tuple[RowMemory, list[float]]:
        memory = RowMemory()
        memory.run(copies[processes.rank], rows.in_order(64), processes)
        return memory, exit_accuracies(copies[processes.rank], rows, processes)

    ids, accuracies = torch.tensor(rows.ids), exit_accuracies(model, rows)
    assert len(set(accuracies)) > 1
    for memory, found in together(count, work):
        assert found == accuracies
        assert memory.memorised_layers(ids).equal(alone.memorised_layers(ids))
        assert memory.states(ids).equal(alone.states(ids))
        assert memory.cross_entropies(ids).equal(alone.cross_entropies(ids))
        assert memory.state_dict()["ids"].equal(ids)
    assert 0 < largest <= min(count * 64, 160) * alone.states(ids)[:, 0].numel()
