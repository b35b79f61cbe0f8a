"""The command line: whole commands, and refusals as one line with exit status 2."""

import json
import shutil
from pathlib import Path

import pytest

from offramp_model.checkpoint import load_checkpoint, update_manifest
from offramp_training.__main__ import main


@pytest.fixture
def recipe(backbone: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"[model]\nbackbone = {str(backbone)!r}\nmax_length = 16\n"
        "[optimiser]\nlr = 2e-3\n[loop]\nepochs = 1\nbatch_size = 16\n",
        encoding="utf-8",
    )
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("offramp-train: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_fit_evaluate_calibrate_inspect(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    settings = ("--set", "data.held_out=30", "--set", "loop.max_train_rows=100")
    fit = ["fit", str(recipe), "--data", str(data), "--objective", "joint", "--output", str(output)]
    assert main([*fit, *settings]) == 0
    capsys.readouterr()
    assert not (tmp_path / "out.fit").exists()
    assert list((output / "tensorboard").iterdir())
    assert "finished checkpoint; allowed with --overwrite" in refused(capsys, *fit, *settings)
    assert main([*fit, *settings, "--overwrite", "--no-calibrate"]) == 0
    assert main(["inspect", str(output)]) == 0
    assert "not calibrated" in capsys.readouterr().out

    rows = [str(output), "--data", str(data)]
    assert "Not evaluated yet" in (output / "README.md").read_text()
    assert main(["calibrate", *rows, "--split", "held_out", "--backend", "torch"]) == 0
    assert "entropy: " in capsys.readouterr().out
    assert "calibrated on 30 rows of `held_out`" in (output / "README.md").read_text()
    assert load_checkpoint(output).manifest.evaluation["split"] == "held_out"
    assert (output / "curve.png").is_file()
    assert main(["calibrate", *rows, "--split", "test", "--dtype", "bfloat16"]) == 0
    assert load_checkpoint(output).manifest.evaluation["split"] == "held_out"
    capsys.readouterr()
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert (
        main(["evaluate", *rows, "--policy", "entropy", "vote", "--policy", "margin", *files]) == 0
    )
    policies = json.loads((tmp_path / "r.json").read_text())["policies"]
    assert list(policies) == ["entropy", "vote", "margin"]
    assert (tmp_path / "r.png").is_file()
    assert main(["inspect", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "100 training rows, 30 held out" in shown
    assert "best at 2x" in shown
    assert "held_out" in shown


def test_a_record_with_a_key_that_did_nothing_is_read(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "point of a sweep")
    manifest = json.loads((copied / "offramp.json").read_text())
    manifest["objective"]["parameters"]["model"]["attention_heads"] = 8
    (copied / "offramp.json").write_text(json.dumps(manifest))
    assert main(["evaluate", str(copied), "--data", str(data), "--policy", "entropy"]) == 0


def test_fit_refuses_before_any_work(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    fit = ("fit", recipe, "--output", output)
    assert "no data: give --data PATH" in refused(capsys, *fit)
    assert "loop.epochs = 0" in refused(capsys, *fit, "--set", "loop.epochs=0")
    assert "unknown key" in refused(capsys, *fit, "--set", "loop.epoch=1")
    assert "has 2 weights; the model has 3 exits" in refused(
        capsys, *fit, "--data", data, "--set", "objective.weights=[1, 2]"
    )
    assert "data.held_out = 900" in refused(
        capsys, *fit, "--data", data, "--set", "data.held_out=900"
    )
    assert not output.exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("do not lose this")
    assert "not empty and not a checkpoint" in refused(
        capsys, "fit", recipe, "--data", data, "--output", full, "--overwrite"
    )
    assert (full / "thesis.txt").exists()


def test_checkpoints_that_are_none(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not an offramp checkpoint" in refused(capsys, "inspect", tmp_path)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    with (damaged / "exits.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert "damaged or was replaced" in refused(capsys, "inspect", damaged)
    rows = ("--data", data, "--split")
    assert "never training rows" in refused(capsys, "calibrate", checkpoint, *rows, "train")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(data / "test.jsonl", elsewhere / "train.jsonl")
    assert "is not the data that the checkpoint came from" in refused(
        capsys, "evaluate", checkpoint, "--data", elsewhere, "--split", "held_out"
    )


def test_unknown_words_are_argparse_errors(checkpoint: Path) -> None:
    for arguments in (["evaluate", str(checkpoint), "--data", "x", "--policy", "luck"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("option", "file", "what"),
    [
        ("--plot", "nowhere/x.png", "cannot be written there"),
        ("--json", "nowhere/x.json", "cannot be written there"),
        ("--json", "", "cannot be written there"),
        ("--plot", "x.gif", "allowed: a name that ends in .png, .svg, .pdf"),
    ],
)
def test_evaluate_refuses_before_it_works(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    file: str,
    what: str,
) -> None:
    monkeypatch.delattr("offramp_training.evaluate.record_exits")
    arguments = ("evaluate", checkpoint, "--data", data, option, tmp_path / file)
    assert what in refused(capsys, *arguments)


def test_labels_that_look_like_markup_are_shown_as_they_are(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    manifest = load_checkpoint(copy).manifest
    model = manifest.model.model_copy(update={"labels": ("[/x]", "[red]", ":dog:")})
    update_manifest(copy, manifest.model_copy(update={"model": model}))
    assert main(["inspect", str(copy)]) == 0
    assert "3: [/x], [red], :dog:" in capsys.readouterr().out


def test_an_interrupted_fit_says_how_to_go_on_and_nothing_else_does(
    recipe: Path,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp_training.fit.fit", interrupt)
    monkeypatch.setattr("offramp_training.evaluate.evaluate_checkpoint", interrupt)
    assert main(["fit", str(recipe), "--output", str(tmp_path / "out")]) == 130
    assert "the same command without --overwrite goes on from there" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), "--data", str(data)]) == 130
    assert capsys.readouterr().err == "offramp-train: interrupted\n"
