"""main.py: both commands from end to end, what they leave behind, and what they refuse."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import heads
import main
import simclr

HERE = Path(main.__file__).parent


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Few, small phantoms, and an empty folder to run in."""
    monkeypatch.setattr(data, "PHANTOM_PATIENTS", 8)
    sizes = {"image_size": 32, "batch_size": 32, "epochs": 2}
    monkeypatch.setattr(main, "PHANTOM_DEFAULTS", sizes)
    monkeypatch.chdir(tmp_path)


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plant(root: Path, task: str = "mine", patients: int = 8, seed: int = 0) -> None:
    """Two classes of random pictures; one to three slices a patient, so that parts differ."""
    rng = np.random.default_rng(seed)
    for class_ in ("sick", "well"):
        for patient in range(patients):
            for i in range(1 + patient % 3):
                path = root / task / class_ / f"sub-{class_}{patient}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)


def pretrained_on_all(tmp_path: Path) -> None:
    """An encoder of the same pictures in a flat folder, so that nothing was held out."""
    flat = tmp_path / "flat" / "all"
    flat.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "scans").rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    main.main(["pretrain", "--data", "flat", "--epochs", "0", "--image-size", "32"])


def refused(capsys, *words: str) -> str:
    """Run a command that must fail; the one line it says."""
    capsys.readouterr()
    assert main.main(list(words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


# --- both commands -----------------------------------------------------------------------------


def test_pretrain_then_probe_writes_every_artifact(capsys):
    assert main.main(["pretrain"]) == 0
    out = capsys.readouterr().out
    assert (
        "source tumor (tumor): 72 of 96 pictures are used" in out
        and "next: python main.py probe --task tumor" in out
    )
    run = Path("runs/phantoms/pretrain")
    assert {p.name for p in run.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "curve.png"
    }  # fmt: skip
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    assert set(records[0]) == {
        "epoch", "loss", "lr", "contrastive_accuracy", "embedding_std", "images_per_second",
        "seconds",
    }  # fmt: skip
    encoder = torch.load(run / "encoder.pt", weights_only=True)
    assert set(encoder) == {
        "arch", "encoder", "feature_dim", "image_size", "mean", "std", "epoch", "config", "seen"
    }  # fmt: skip
    assert encoder["encoder"]["conv1.weight"].shape == (64, 1, 7, 7)
    assert encoder["seen"].shape == (encoder["config"]["pictures"], 16)
    assert encoder["seen"].dtype == torch.uint8 and isinstance(encoder["mean"], float)
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert set(checkpoint) == {
        "encoder", "projection_head", "optimizer", "epoch", "step", "sums", "seconds", "records",
        "best", "config",
    }  # fmt: skip

    assert main.main(["probe", "--task", "tumor", "--epochs", "5"]) == 0
    out = capsys.readouterr().out
    assert "f1-score" in out and "untrained encoder" in out and "raw 32x32 pixels" in out
    run = Path("runs/phantoms/probe-tumor")
    assert {p.name for p in run.iterdir()} == {
        "config.json", "log.jsonl", "classifier.pt", "splits.csv", "predictions.csv",
        "metrics.json", "report.txt", "confusion.png", "curve.png", "roc.png", "reliability.png",
    }  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"] == "tumor" and metrics["leaked"] is False
    assert metrics["classes"] == ["glioma", "meningioma", "notumor", "pituitary"]
    assert set(metrics["ci95"]) == {"accuracy", "balanced_accuracy", "macro_f1", "auroc"}
    assert metrics["ci95"]["accuracy"][0] <= metrics["accuracy"] <= metrics["ci95"]["accuracy"][1]
    assert metrics["baseline"]["n"] == metrics["n"] == np.sum(metrics["confusion_matrix"])
    assert (run / "report.txt").read_text() in out
    config = json.loads((run / "config.json").read_text())
    assert config["phantoms"] is True and len(config["fingerprint"]) == 64


def test_predictions_and_splits_say_what_the_metrics_say():
    """From the written tables alone: the score, and that no group is on two sides."""
    main.main(["pretrain", "--epochs", "0"])
    main.main(["probe", "--task", "stroke", "--epochs", "3"])
    predictions = rows_of("runs/phantoms/probe-stroke/predictions.csv")
    metrics = json.loads(Path("runs/phantoms/probe-stroke/metrics.json").read_text())
    right = [row["label"] == row["prediction"] for row in predictions]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["n_groups"] == len({row["group"] for row in predictions})
    for row in predictions:
        probs = {name: float(row[f"p_{name}"]) for name in metrics["classes"]}
        assert (
            sum(probs.values()) == pytest.approx(1)
            and max(probs, key=probs.get) == row["prediction"]
        )
    splits = rows_of("runs/phantoms/probe-stroke/splits.csv")
    assert list(splits[0]) == ["path", "label", "group", "split", "pixel_hash"]
    assert {r["path"] for r in splits if r["split"] == "test"} == {r["path"] for r in predictions}
    sides: dict[str, set[str]] = {}
    for row in splits:
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(parts) == 1 for parts in sides.values())
    encoder = torch.load("runs/phantoms/pretrain/encoder.pt", weights_only=True)
    seen = {row.numpy().tobytes().hex() for row in encoder["seen"]}
    held = {row["pixel_hash"] for row in splits if row["split"] in ("val", "test")}
    assert held and not held & seen
    assert {row["pixel_hash"] for row in splits if row["split"] == "train"} <= seen


def test_a_classifier_is_all_that_using_it_needs():
    """Encoder and head rebuilt from classifier.pt alone give the written probabilities."""
    main.main(["pretrain", "--epochs", "1"])
    main.main(["probe", "--task", "ms", "--epochs", "3"])
    encoder, checkpoint = simclr.load_encoder(Path("runs/phantoms/probe-ms/classifier.pt"))
    head = heads.CosineMLP(checkpoint["feature_dim"], len(checkpoint["classes"]))
    head.load_state_dict(checkpoint["head"])
    rows = rows_of("runs/phantoms/probe-ms/predictions.csv")[:6]
    squares = [data.fit_square(data.draw_phantom(r["path"])[0], 32) for r in rows]
    h = heads.features_of(encoder, checkpoint, np.stack(squares), torch.device("cpu"))
    probs = heads.probabilities(head, h).numpy()
    written = [[float(row[f"p_{name}"]) for name in checkpoint["classes"]] for row in rows]
    assert np.allclose(probs, written, atol=1e-5)


@pytest.mark.parametrize("task", sorted(data.KNOWN_TASKS))
def test_every_task_of_the_phantoms_can_be_probed(task):
    main.main(["pretrain", "--epochs", "0"])
    assert main.main(["probe", "--task", task, "--epochs", "1"]) == 0


def test_real_folders_go_through_both_commands_and_batches_shrink(tmp_path, capsys, asked):
    plant(tmp_path / "scans", seed=1)
    size = ["--image-size", "32"]
    assert main.main(["pretrain", "--data", "scans", "--epochs", "1", *size]) == 0
    out = capsys.readouterr().out
    assert "the batch shrinks from 512 to 22: 22 pictures are there" in out
    assert "next: python main.py probe --data scans --task mine" in out
    assert main.main(["probe", "--data", "scans", "--task", "mine", "--epochs", "2"]) == 0
    check_choices(Path("runs/probe-mine"), asked)
    assert not (tmp_path / "scans" / "runs").exists()
    assert json.loads(Path("runs/probe-mine/config.json").read_text())["phantoms"] is False
    metrics = json.loads(Path("runs/probe-mine/metrics.json").read_text())
    predictions = rows_of("runs/probe-mine/predictions.csv")
    labels = [metrics["classes"].index(row["label"]) for row in predictions]
    probs = [[float(row[f"p_{name}"]) for name in metrics["classes"]] for row in predictions]
    groups = [row["group"] for row in predictions]
    again = evaluate.group_bootstrap(np.array(labels), np.array(probs), np.array(groups))
    assert metrics["n_groups"] == len(set(groups)) and metrics["ci95"].keys() == again.keys()
    sizes = [
        sum(row["split"] == part for row in rows_of("runs/probe-mine/splits.csv"))
        for part in ("val", "test")
    ]
    assert sizes[0] != sizes[1] == metrics["n"]  # else labels of the wrong part might pass


@pytest.fixture
def passes(monkeypatch):
    """Of all passes through an encoder: (it trains, bf16 autocast is on)."""
    found, forward = set(), simclr.ResNet.forward

    def note(encoder: simclr.ResNet, x: torch.Tensor) -> torch.Tensor:
        found.add((encoder.training, torch.is_autocast_enabled("cpu")))
        return forward(encoder, x)

    monkeypatch.setattr(simclr.ResNet, "forward", note)
    return found


@pytest.mark.parametrize("native", (False, True))
def test_on_either_kind_of_machine_only_steps_of_training_take_bf16(
    native, tmp_path, monkeypatch, passes, asked
):
    """All commands as on a CPU with bf16, and as on one without, whichever this is."""
    monkeypatch.setattr(simclr, "native_bf16", lambda device: (native, "a test says so"))
    monkeypatch.setattr(heads, "LEAST_STEPS", 2)
    plant(tmp_path / "scans")
    few = ["--label-fractions", "1", "--seeds", "1"]
    scans, model = ["--data", "scans"], ["--model", "runs/finetune-mine/classifier.pt"]
    for training in (
        ["pretrain", *scans, "--image-size", "32", "--epochs", "1"],  # looks at neighbours, too
        ["finetune", *SMALL, "--epochs", "1"],
        ["compare", *SMALL, "--epochs", "1", *few],
    ):
        passes.clear()
        assert main.main(training) == 0
        assert passes == {(True, native), (False, False)}, training[0]
    passes.clear()
    assert main.main(["probe", *SMALL, "--epochs", "2"]) == 0
    assert main.main(["evaluate", *model, *scans]) == 0
    assert main.main(["predict", *model, "scans/mine/sick"]) == 0
    assert main.main(["explain", *model, *scans, "--layer", "layer3"]) == 0
    assert main.main(["embed", *scans]) == 0
    assert passes == {(False, False)}
    check_choices(Path("runs/finetune-mine"), asked)
    told = Path("runs/finetune-mine/predictions.csv")
    assert Path("runs/evaluate-mine/predictions.csv").read_bytes() == told.read_bytes()
    for row, other in zip(rows_of("runs/explain-mine/explain.csv"), rows_of(told), strict=True):
        assert row["path"] == other["path"]
        assert float(row["p_sick"]) == pytest.approx(float(other["p_sick"]), abs=1e-5)
    runs = {"pretrain": native, "finetune-mine": native, "compare-mine": native}
    for run, bf16 in (runs | {"probe-mine": False, "evaluate-mine": False}).items():
        config = json.loads(Path("runs", run, "config.json").read_text())
        assert config["precision"] == ("bf16" if bf16 else "fp32"), run


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
def test_a_precision_of_training_can_be_asked_for(precision, tmp_path, monkeypatch, passes, capsys):
    monkeypatch.setattr(simclr, "native_bf16", lambda device: (precision == "fp32", "not asked"))
    plant(tmp_path / "scans")
    how = ["--epochs", "1", "--image-size", "32", "--precision", precision]
    assert main.main(["pretrain", "--data", "scans", *how]) == 0
    assert passes == {(True, precision == "bf16"), (False, False)}
    assert json.loads(Path("runs/pretrain/config.json").read_text())["precision"] == precision
    assert "--precision" in refused(capsys, "probe", *SMALL, "--precision", precision)


def test_no_validation_group_in_a_class_of_two_patients_still_probes(tmp_path):
    plant(tmp_path / "scans", patients=2)
    main.main(["pretrain", "--data", "scans", "--epochs", "0", "--image-size", "32"])
    assert main.main(["probe", "--data", "scans", "--task", "mine", "--epochs", "2"]) == 0


def test_the_split_is_the_same_for_every_seed(tmp_path):
    plant(tmp_path / "scans")
    tables = []
    for seed in ("0", "1"):
        flags = ["--data", "scans", "--seed", seed]
        main.main(["pretrain", *flags, "--epochs", "0", "--image-size", "32", "--restart"])
        main.main(["probe", *flags, "--task", "mine", "--epochs", "1"])
        tables.append(Path("runs/probe-mine/splits.csv").read_text())
    assert tables[0] == tables[1]


def test_data_says_what_is_there_and_its_table_can_be_checked_from_outside(tmp_path, capsys):
    """From the files and splits.csv alone, slowly: hashes, patients, and twins across the parts."""
    plant(tmp_path / "scans")
    plant(tmp_path / "scans", "else", seed=5)
    rng = np.random.default_rng(3)
    for i, path in enumerate(sorted((tmp_path / "scans").rglob("*.png"))[::3]):
        pixels = np.asarray(Image.open(path))
        copy = Image.fromarray(pixels[:, ::-1] if i % 2 else pixels)
        other = rng.choice(sorted(path.parents[1].iterdir()))  # another patient, same class
        copy.save(other / f"copy{i}.jpg", quality=95)
    (tmp_path / "scans" / "notes.txt").write_text("no picture")
    (tmp_path / "scans" / "broken.png").write_bytes(b"")
    for name in ("broken2", "broken3", "broken4", "broken5", "broken6", "broken7"):
        (tmp_path / "scans" / f"{name}.png").write_bytes(b"")  # too many for the others
    assert main.main(["data", "--data", "scans", "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "7 unreadable, 1 other files" in out and "'broken3.png'" in out
    assert "Leak meter" in out and "task mine" in out and "task else" in out
    assert "7 of " in refused(capsys, "pretrain", "--data", "scans", "--image-size", "32")
    for task in ("mine", "else"):
        run = Path(f"runs/data-{task}")
        assert {p.name for p in run.iterdir()} == {"splits.csv", "report.txt", "leak.png"}
        rows = rows_of(run / "splits.csv")
        thumbnails, sides = [], {}
        for row in rows:
            with Image.open(tmp_path / "scans" / row["path"]) as image:
                gray = image.convert("L")
            digest = hashlib.sha256(np.asarray(gray).tobytes()).hexdigest()
            assert row["pixel_hash"] == digest[:32]
            assert row["path"].split("/")[:2] == [task, row["label"]]
            sides.setdefault(row["path"].split("/")[2], set()).add(row["split"])
            t = np.asarray(gray.resize((32, 32), Image.Resampling.BOX)).astype(float)
            thumbnails.append((t - t.mean()) / np.linalg.norm(t - t.mean()))
        assert all(len(parts) == 1 for parts in sides.values())  # of a patient
        assert {row["split"] for row in rows} == {"train", "val", "test"}
        twins = 0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows[:i]):
                cosine = max(
                    (thumbnails[i] * thumbnails[j]).sum(),
                    (thumbnails[i] * thumbnails[j][:, ::-1]).sum(),
                )
                if cosine >= 0.98:
                    twins += 1
                    assert a["split"] == b["split"] and a["group"] == b["group"]
        assert twins >= 4


def test_the_split_is_the_same_in_every_command(tmp_path):
    plant(tmp_path / "scans")
    flags = ["--data", "scans"]
    main.main(["data", *flags, "--out", "before"])  # at 128 pixels
    main.main(["pretrain", *flags, "--epochs", "0", "--image-size", "32"])
    main.main(["probe", *flags, "--task", "mine", "--epochs", "1", "--seed", "3"])
    main.main(["data", *flags, "--task", "mine", "--out", "after"])
    tables = [
        Path(folder, "splits.csv").read_text()
        for folder in ("before/mine", "runs/probe-mine", "after")
    ]
    assert tables[0] == tables[1] == tables[2]


def test_a_folder_without_classes_is_described_and_nothing_is_written(tmp_path, capsys):
    plant(tmp_path / "scans")
    assert main.main(["data", "--data", "scans/mine/sick"]) == 0
    assert "15 readable pictures are of no task" in capsys.readouterr().out
    assert {path.name for path in Path("runs").iterdir()} == {"cache"}


def test_a_pattern_and_resplit_shape_the_split_and_are_remembered(tmp_path, capsys):
    for class_ in ("sick", "well"):
        for i in range(30):
            part = "Testing" if i > 24 else "Training"
            path = tmp_path / "scans" / "mine" / part / class_ / f"{i // 2:02d}{class_}{i % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([i, class_ == "sick"])
            Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
    flags = ["--data", "scans", "--group-pattern", r"/(\d\d)(sick|well)", "--resplit"]
    assert main.main(["pretrain", *flags, "--epochs", "0", "--image-size", "32"]) == 0
    following = capsys.readouterr().out.splitlines()[-1]
    assert "--group-pattern '/(\\d\\d)(sick|well)' --resplit --task mine" in following
    assert main.main(["probe", *flags, "--task", "mine", "--epochs", "1"]) == 0
    config = json.loads(Path("runs/probe-mine/config.json").read_text())
    assert config["group_pattern"] == flags[3] and config["resplit"] is True
    rows = rows_of("runs/probe-mine/splits.csv")
    tested = {row["path"].split("/")[1] for row in rows if row["split"] == "test"}
    assert tested == {"Testing", "Training"} or tested == {"Training"}
    assert "none of the 60 paths" in refused(
        capsys, "data", "--data", "scans", "--group-pattern", "(nobody)"
    )
    assert "no (group)" in refused(capsys, "data", "--group-pattern", "patient")
    assert "no regular expression" in refused(capsys, "data", "--group-pattern", "(")
    # without the pattern the encoder's training patients stand in the test part: refused
    whole = ("probe", "--data", "scans", "--task", "mine", "--resplit")
    assert "--group-pattern" in refused(capsys, *whole)


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """The steps that training takes from now on, and those at which a SIGTERM shall come."""
    shown, steps, stop_at = main.show_step, [], []

    def interrupt(bar: object, run: simclr.Run) -> None:
        shown(bar, run)
        steps.append(run.step)
        if len(steps) in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(main, "show_step", interrupt)
    return steps, stop_at


# --- finetune, compare --------------------------------------------------------------------------


SMALL = ["--data", "scans", "--task", "mine"]


def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patients: int = 8) -> None:
    """Pictures of 32 px, an untrained encoder for them, and short epochs."""
    monkeypatch.setattr(heads, "LEAST_STEPS", 2)
    plant(tmp_path / "scans", patients=patients)
    main.main(["pretrain", "--data", "scans", "--epochs", "0", "--image-size", "32"])


@pytest.fixture
def asked(monkeypatch):
    """What temperatures were fitted to: labels and probabilities, one after the other."""
    found, fit = [], evaluate.fit_temperature
    monkeypatch.setattr(evaluate, "fit_temperature", lambda *x: found.extend(x) or fit(*x))
    return found


def check_choices(run: Path, asked: list[np.ndarray]) -> None:
    """From the files of a run: val pictures, and no others, chose its epoch and its temperature."""
    encoder, head, checkpoint = heads.load_classifier(run / "classifier.pt")
    rows = [row for row in rows_of(run / "splits.csv") if row["split"] == "val"]
    squares = [data.fit_square(data.read_gray(Path("scans", row["path"])), 32) for row in rows]
    how = np.stack(squares), checkpoint["classes"], torch.device("cpu")
    probs = heads.classify(encoder, head, checkpoint, *how)
    labels = np.array([checkpoint["classes"].index(row["label"]) for row in rows])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda r: (r["val_accuracy"], -r["val_loss"]))
    assert best["val_loss"] == pytest.approx(evaluate.negative_log_likelihood(labels, probs), 1e-4)
    assert np.array_equal(asked[0], labels) and np.allclose(asked[1], probs, atol=1e-5)


def test_finetune_writes_what_a_probe_writes_and_its_classifier_scores_the_same(
    tmp_path, monkeypatch, capsys, asked
):
    pretrained(tmp_path, monkeypatch)
    assert main.main(["finetune", *SMALL, "--epochs", "2"]) == 0
    assert (
        main.main(["finetune", *SMALL, "--epochs", "1", "--from-scratch", "--image-size", "40"])
        == 0
    )
    out = capsys.readouterr().out
    assert "fine-tuned network" in out and "from scratch" in out and "untrained encoder" in out
    runs = Path("runs/finetune-mine"), Path("runs/scratch-mine")
    for run, lrs, size in zip(runs, ([1e-4], [1e-4, 3e-4, 1e-3]), (32, 40), strict=True):
        assert {p.name for p in run.iterdir()} == {
            "config.json", "log.jsonl", "checkpoint.pt", "classifier.pt", "splits.csv",
            "predictions.csv", "metrics.json", "report.txt", "confusion.png", "curve.png",
            "roc.png", "reliability.png",
        }  # fmt: skip
        config = json.loads((run / "config.json").read_text())
        assert config["lrs"] == lrs and config["image_size"] == size
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert len({r["peak_lr"] for r in log}) == len(lrs)
        assert set(log[0]) >= {"epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds"}
        model = torch.load(run / "classifier.pt", weights_only=True)
        assert model["head_type"] == "linear" and model["head"]["weight"].shape == (2, 512)
        assert model["config"]["command"] == "finetune" and model["temperature"] > 0
        words = ["evaluate", "--model", str(run / "classifier.pt"), "--data", "scans"]
        assert main.main(words) == 0
        again = Path("runs/evaluate-mine/predictions.csv").read_text()
        assert again == (run / "predictions.csv").read_text()
    check_choices(runs[0], asked)
    weights = [torch.load(run / "classifier.pt")["encoder"]["conv1.weight"] for run in runs]
    first = torch.load("runs/pretrain/encoder.pt")["encoder"]["conv1.weight"]
    assert not torch.equal(weights[0], first)
    assert (weights[0] - first).abs().max() < 0.01  # four steps of at most 1e-4 from there


def test_a_stopped_fine_tuning_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    pretrained(tmp_path, monkeypatch)
    command = ["finetune", *SMALL, "--epochs", "3", "--from-scratch", "--lr", "1e-3"]
    steps, stop_at = watched(monkeypatch)
    assert main.main([*command, "--image-size", "32", "--out", "alone"]) == 0
    total = len(steps)
    stop_at.append(total + 3)
    with pytest.raises(SystemExit):
        main.main([*command, "--image-size", "32", "--out", "stopped"])
    assert not Path("stopped/classifier.pt").exists()
    error = refused(capsys, *command, "--image-size", "32", "--out", "stopped", "--seed", "1")
    assert "seed 0 there, 1 here" in error
    assert main.main([*command, "--image-size", "32", "--out", "stopped"]) == 0
    assert "goes on after step" in capsys.readouterr().out and len(steps) == 2 * total
    for name in ("predictions.csv", "report.txt"):
        assert Path("alone", name).read_bytes() == Path("stopped", name).read_bytes()
    models = [torch.load(f"{out}/classifier.pt") for out in ("alone", "stopped")]
    assert all(torch.equal(v, models[1]["encoder"][k]) for k, v in models[0]["encoder"].items())
    before = len(steps)
    assert main.main([*command, "--image-size", "32", "--out", "stopped"]) == 0  # it is finished
    assert len(steps) == before


def test_a_fine_tuning_begins_in_one_way_alone(tmp_path, monkeypatch, capsys):
    pretrained(tmp_path, monkeypatch)
    tune = ("finetune", *SMALL)
    main.main(["probe", *SMALL, "--epochs", "1"])
    classifier = ["--encoder", "runs/probe-mine/classifier.pt"]
    assert "is a classifier" in refused(capsys, "compare", *SMALL, *classifier)
    error = refused(capsys, *tune, "--from-scratch", "--init", "imagenet")
    assert "--init and --from-scratch say where to begin" in error
    assert "those of the encoder" in refused(capsys, *tune, "--image-size", "64")
    assert "those of the encoder" in refused(capsys, *tune, "--arch", "resnet50")
    assert "no weights of a resnet18" in refused(capsys, *tune, "--init", "nowhere.pth")
    weights = simclr.resnet18(in_channels=3).state_dict()
    torch.save(weights, "theirs.pth")
    assert main.main([*tune, "--init", "theirs.pth", "--epochs", "1", "--image-size", "32"]) == 0
    config = json.loads(Path("runs/finetune-mine/config.json").read_text())
    assert config["init"] == "theirs.pth" and config["mean"] == 0.449
    run = ["pretrain", "--data", "scans", "--init", "theirs.pth", "--epochs", "0", "--restart"]
    assert main.main([*run, "--image-size", "32"]) == 0
    encoder = torch.load("runs/pretrain/encoder.pt")
    gray = weights["conv1.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(encoder["encoder"]["conv1.weight"], gray) and encoder["mean"] == 0.449


def test_fine_tuning_and_comparing_refuse_a_test_part_that_the_encoder_has_seen(tmp_path, capsys):
    plant(tmp_path / "scans")
    pretrained_on_all(tmp_path)
    for command in ("finetune", "compare"):
        assert "was pretrained on 2 of the 2" in refused(capsys, command, *SMALL)


def test_an_interrupted_comparison_goes_on_with_the_next_fit(tmp_path, monkeypatch, capsys):
    pretrained(tmp_path, monkeypatch, patients=12)
    command = ["compare", *SMALL, "--epochs", "1", "--seeds", "1", "--label-fractions", "0.3", "1"]
    network, fitted = heads.Comparison.fit_network, []

    def counted(self: heads.Comparison, *how: object) -> object:
        if len(fitted) == 2:
            fitted.append("stopped")
            raise KeyboardInterrupt
        fitted.append(how)
        return (yield from network(self, *how))

    monkeypatch.setattr(heads.Comparison, "fit_network", counted)
    assert main.main([*command, "--out", "stopped"]) == 130
    assert not Path("stopped/table.csv").exists()
    assert main.main([*command, "--out", "stopped"]) == 0
    out = capsys.readouterr().out
    assert "10 fits, 6 of them done before" in out and len(fitted) == 2 + 1 + 2
    assert "| 100 %: " in out and "supervised from scratch" in out
    one = [*command[:-3], "--label-fractions", "1"]
    assert main.main([*one, "--out", "alone"]) == 0
    tables = [rows_of(f"{name}/table.csv") for name in ("stopped", "alone")]
    assert len(tables[0]) == 10 and len(tables[1]) == 5
    for row, other in zip(tables[0][5:], tables[1], strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}
    done = len(fitted)
    assert main.main([*one, "--out", "stopped"]) == 0  # fewer: nothing is fitted again
    assert len(rows_of("stopped/table.csv")) == 5 and len(fitted) == done
    error = refused(capsys, *command[:5], "--epochs", "2", "--out", "alone")
    assert "epochs 1 there, 2 here" in error
    # the same encoder at another place is the same; another one at the same place is not
    Path("runs/pretrain/encoder.pt").rename("moved.pt")
    assert main.main([*one, "--out", "alone", "--encoder", "moved.pt"]) == 0
    checkpoint = torch.load("moved.pt")
    checkpoint["encoder"]["conv1.weight"] *= -1
    torch.save(checkpoint, "moved.pt")
    error = refused(capsys, *one, "--out", "alone", "--encoder", "moved.pt")
    assert "other settings: another encoder;" in error
    assert "invalid" in refused(capsys, *command, "--label-fractions", "0")


# --- predict, embed ------------------------------------------------------------------------------


def test_predict_says_of_files_and_folders_what_the_probe_said(tmp_path, capsys):
    trained(tmp_path)
    tested = rows_of("runs/probe-mine/predictions.csv")
    capsys.readouterr()
    one = f"scans/{tested[0]['path']}"
    folder = str(Path("scans", tested[1]["path"]).parent)
    Path(folder, "broken.png").write_bytes(b"")
    words = ["predict", "--model", "runs/probe-mine/classifier.pt"]
    assert main.main([*words, one, folder]) == 0
    out = capsys.readouterr().out
    assert "left out, unreadable" in out and "broken.png" in out
    rows = {row["path"]: row for row in rows_of("runs/predict-mine/predictions.csv")}
    assert list(rows)[0] == one and all(path.startswith(folder) for path in list(rows)[1:])
    for row in tested[:2]:
        found = rows[f"scans/{row['path']}"]
        assert found["prediction"] == row["prediction"]
        for name in ("p_sick", "p_well"):
            assert float(found[name]) == pytest.approx(float(row[name]), abs=1e-5)
        assert any(row["path"] in line and row["prediction"] in line for line in out.splitlines())
    assert "nowhere.png is not there" in refused(capsys, *words, "nowhere.png")
    assert "no picture can be read" in refused(capsys, *words, f"{folder}/broken.png")


def test_explain_shows_what_the_probe_was_not_trained_on_and_measures_it(capsys):
    """Without paths and --data: the phantoms' test part, with labels and known lesions."""
    assert main.main(["pretrain", "--epochs", "0", "--image-size", "64"]) == 0
    assert main.main(["probe", "--task", "tumor", "--epochs", "2"]) == 0
    run, out = Path("runs/phantoms/probe-tumor"), Path("runs/phantoms/explain-tumor")
    asked = ["explain", "--model", str(run / "classifier.pt")]
    assert main.main(asked) == 0
    rows, told = rows_of(out / "explain.csv"), rows_of(run / "predictions.csv")
    assert [row["path"] for row in rows] == [row["path"] for row in told]
    for row, other in zip(rows, told, strict=True):
        assert (row["label"], row["prediction"]) == (other["label"], other["prediction"])
        for class_ in ("glioma", "notumor"):
            assert float(row[f"p_{class_}"]) == pytest.approx(float(other[f"p_{class_}"]), abs=1e-5)
        assert (row["pointing"] == "") == (row["label"] == "notumor")
        assert Image.open(out / row["overlay"]).size[0] > 3 * 192
    page, text = (out / "index.html").read_text(), (out / "report.txt").read_text()
    assert page.count("<figure>") == len(rows) and "Wrong predictions" in page
    assert "not for diagnosis" in page and "hottest point in the lesion (right)" in text
    assert text in capsys.readouterr().out
    first = (out / "explain.csv").read_bytes()
    assert main.main([*asked, "--layer", "layer2", "--out", "second"]) == 0
    assert main.main([*asked, "--out", "third"]) == 0
    assert Path("third/explain.csv").read_bytes() == first
    assert Path("second/explain.csv").read_bytes() != first


def test_explain_takes_files_and_loose_pictures_without_labels(tmp_path, capsys):
    """Names are told as they are; in the page they are text, in a file's name they are harmless."""
    plant(tmp_path / "scans")
    scans = ["--data", "scans", "--epochs"]
    assert main.main(["pretrain", *scans, "0", "--image-size", "32"]) == 0
    assert main.main(["probe", *scans, "2", "--task", "mine"]) == 0
    model = ["--model", "runs/probe-mine/classifier.pt", "--layer", "layer3"]
    plant(tmp_path / "others", seed=1)
    (tmp_path / "loose").mkdir()
    names = ["=1+1.png", "<img src=x>.png", "two\nlines.png", "-x.png", "é.png"]
    for source, name in zip(sorted(Path("others").rglob("*.png"))[:5], names, strict=True):
        shutil.copy(source, tmp_path / "loose" / name)
    assert main.main(["explain", *model, "loose"]) == 0
    rows = rows_of("runs/explain-mine/explain.csv")
    assert sorted(row["path"] for row in rows) == sorted(f"loose/{name}" for name in names)
    assert all(row["label"] == row["pointing"] == "" for row in rows)
    assert all(set(row["overlay"]) <= set("0123456789abcdefghijklmnopqrstuvwxyz-.") for row in rows)
    page = Path("runs/explain-mine/index.html").read_text()
    assert "<img src=x>" not in page and "&lt;img src=x&gt;" in page
    assert "Right" not in page and "Predictions: 5" in page
    assert main.main(["explain", *model, "--data", "loose", "--out", "other"]) == 0
    assert len(rows_of("other/explain.csv")) == 5
    assert "inside loose" in refused(capsys, "explain", *model, "loose", "--out", "loose/run")
    shutil.copytree("scans/mine/sick", "seen")  # loose, and trained on, but for val and test
    assert main.main(["explain", *model, "--data", "seen", "--out", "other"]) == 0
    few = rows_of("other/explain.csv")
    assert 0 < len(few) < 5 and len(list(Path("other").glob("*.png"))) == len(few)  # none is stale
    assert main.main(["explain", *model, "--data", "scans", "--out", "again"]) == 0
    tested = {row["path"] for row in rows_of("runs/probe-mine/predictions.csv")}
    assert {row["path"] for row in rows_of("again/explain.csv")} == tested
    assert "not both" in refused(capsys, "explain", *model, "loose", "--data", "scans")
    assert "nowhere is not there" in refused(capsys, "explain", *model, "nowhere")
    last = refused(capsys, "explain", *model[:2], "--layer", "layer4", "loose")
    assert "of 32 pixels" in last and "--layer layer3" in last


def embedded_splits() -> list[dict[str, str]]:
    main.main(["data", "--data", "scans", "--task", "mine", "--image-size", "32"])
    return rows_of("runs/data-mine/splits.csv")


def test_embed_writes_the_features_of_every_picture_and_their_map(tmp_path, capsys):
    plant(tmp_path / "scans")
    (tmp_path / "scans" / "loose.png").write_bytes(
        next((tmp_path / "scans").rglob("*.png")).read_bytes()
    )
    (tmp_path / "scans" / "broken.png").write_bytes(b"")
    main.main(["pretrain", "--data", "scans", "--epochs", "0", "--image-size", "32"])
    assert main.main(["embed", "--data", "scans", "--out", "here/features.npz"]) == 0
    with np.load("here/features.npz") as file:
        h, paths, labels = file["features"], file["paths"], file["labels"]
        tasks, splits = file["tasks"], file["splits"]
    assert h.shape == (len(paths), 512) and h.dtype == np.float32
    assert paths.dtype.kind == labels.dtype.kind == "U"
    assert len(paths) == len(list((tmp_path / "scans").rglob("*.png"))) - 1
    for path, label in zip(paths, labels, strict=True):
        assert label == (path.split("/")[1] if path.startswith("mine/") else "")
    split = {row["path"]: row["split"] for row in embedded_splits()}
    assert [split.get(path, "") for path in paths] == splits.tolist()
    assert set(tasks) == {"mine", ""}
    assert {p.name for p in Path("here").iterdir()} == {"features.npz", "features.png"}
    encoder, checkpoint = simclr.load_encoder(Path("runs/pretrain/encoder.pt"))
    pixels = data.fit_square(data.read_gray(tmp_path / "scans" / paths[3]), 32)[None]
    expected = heads.features_of(encoder, checkpoint, pixels, torch.device("cpu"))
    assert np.allclose(h[3], expected[0].numpy(), atol=1e-5)
    assert main.main(["embed", "--data", "scans", "--out", "here/features.npz"]) == 0  # once more
    assert "ends in .npz" in refused(capsys, "embed", "--data", "scans", "--out", "here/features")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"")
    bad = ["embed", "--data", "bad", "--encoder", "runs/pretrain/encoder.pt"]
    assert "no picture can be read" in refused(capsys, *bad)


# --- what the loss does not say ----------------------------------------------------------------


def test_pretraining_looks_at_neighbours_and_warns_of_a_collapse(capsys):
    assert main.main(["pretrain", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    log = Path("runs/phantoms/pretrain/log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    assert ["knn_accuracy" in record for record in records] == [False, True]  # the last, at least
    assert f"epoch 2: loss {records[1]['loss']:.3f}, kNN accuracy" in out
    study = heads.load(None, 32, Path("runs/cache"))
    encoder, checkpoint = simclr.load_encoder(Path("runs/phantoms/pretrain/encoder.pt"))
    how = study.pictures, study.task("tumor"), torch.device("cpu")
    again = heads.knn_accuracy(encoder, checkpoint, *how)
    assert again == pytest.approx(records[1]["knn_accuracy"], abs=0.1)
    assert "collapsed" not in out
    run = simclr.pretraining(
        encoder, simclr.Pretraining(batch_size=16), 16, torch.device("cpu"), False
    )
    args = main.build_parser().parse_args(["pretrain"])
    record = {"epoch": 1, "loss": 3.43, "embedding_std": 0.001}
    main.look_at_epoch(args, run, study, record)
    assert "have collapsed" in capsys.readouterr().out
    main.look_at_epoch(args, run, study, record | {"embedding_std": 0.08})
    assert capsys.readouterr().out == ""


# --- evaluate ----------------------------------------------------------------------------------


def trained(tmp_path: Path) -> list[str]:
    plant(tmp_path / "scans", patients=12)
    main.main(["pretrain", "--data", "scans", "--epochs", "0", "--image-size", "32"])
    main.main(["probe", "--data", "scans", "--task", "mine", "--epochs", "2"])
    return ["evaluate", "--model", "runs/probe-mine/classifier.pt"]


def test_on_its_own_data_a_classifier_scores_what_its_probe_did(tmp_path, capsys):
    """Everything it was trained on is left out with its groups; what is left is the test part."""
    words = trained(tmp_path)
    assert main.main([*words, "--data", "scans"]) == 0
    ours, probes = (Path(f"runs/{run}-mine") for run in ("evaluate", "probe"))
    assert (ours / "predictions.csv").read_text() == (probes / "predictions.csv").read_text()
    metrics, before = (json.loads((run / "metrics.json").read_text()) for run in (ours, probes))
    assert metrics["accuracy"] == before["accuracy"] and metrics["ci95"] == before["ci95"]
    assert metrics["baseline"]["balanced_accuracy"] == 0.5  # always the commonest class
    left_out = sum(row["split"] == "dropped" for row in rows_of(ours / "splits.csv"))
    assert f"left out: {left_out} pictures of groups" in capsys.readouterr().out
    assert metrics["split"]["dropped_for_a_group_it_has_seen"] == left_out > 0


def test_elsewhere_classes_are_matched_by_name_and_known_pictures_left_out(tmp_path, capsys):
    words = trained(tmp_path)
    plant(tmp_path / "other", seed=9)
    known = next(r["path"] for r in rows_of("runs/probe-mine/splits.csv") if r["split"] == "train")
    target = tmp_path / "other" / "mine" / known.split("/")[1] / "sub-9" / "known.png"
    for name in ("known.png", "else.png"):  # a second picture of the same person
        target.with_name(name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 40), dtype=np.uint8)).save(
            target.with_name(name)
        )
    target.write_bytes((tmp_path / "scans" / known).read_bytes())
    assert main.main([*words, "--data", "other"]) == 0
    assert "left out: 2 pictures" in capsys.readouterr().out
    dropped = [r for r in rows_of("runs/evaluate-mine/splits.csv") if r["split"] == "dropped"]
    assert {Path(row["path"]).name for row in dropped} == {"known.png", "else.png"}
    plant(tmp_path / "third", seed=11)
    (tmp_path / "third/mine/sick").rename(tmp_path / "third/mine/ill")
    error = refused(capsys, *words, "--data", "third")
    assert "ill, well" in error and "sick, well" in error


def test_twins_that_the_split_drops_are_not_scored_and_are_counted(tmp_path, capsys):
    words = trained(tmp_path)
    plant(tmp_path / "other" / "Training", seed=20)
    plant(tmp_path / "other" / "Testing", seed=21)
    source = next((tmp_path / "other/Testing/mine/sick").rglob("*.png"))
    (tmp_path / "other/Training/mine/sick/twin.png").write_bytes(source.read_bytes())
    assert main.main([*words, "--data", "other"]) == 0
    dropped = [r for r in rows_of("runs/evaluate-mine/splits.csv") if r["split"] == "dropped"]
    assert f"left out: 0 pictures of groups that it was trained on, {len(dropped)} twins" in (
        capsys.readouterr().out
    )
    notes = json.loads(Path("runs/evaluate-mine/metrics.json").read_text())["split"]
    assert notes["dropped_by_the_split"] == len(dropped) > 0
    for class_ in ("sick", "well"):
        (tmp_path / "broken" / "mine" / class_).mkdir(parents=True)
        (tmp_path / "broken" / "mine" / class_ / "1.png").write_bytes(b"")
    assert "no picture of mine is left" in refused(capsys, *words, "--data", "broken")


def test_a_classifier_is_not_scored_on_what_it_was_trained_on_unless_that_is_asked_for(
    tmp_path, capsys
):
    words = trained(tmp_path)
    train = {r["path"] for r in rows_of("runs/probe-mine/splits.csv") if r["split"] == "train"}
    for path in (tmp_path / "scans").rglob("*.png"):
        if str(path.relative_to(tmp_path / "scans")) not in train:
            path.unlink()
    error = refused(capsys, *words, "--data", "scans")
    assert f"trained on {len(train)} of {len(train)}" in error and sorted(train)[0] in error
    assert main.main([*words, "--data", "scans", "--allow-leak"]) == 0
    for name in ("config.json", "metrics.json"):
        assert json.loads(Path(f"runs/evaluate-mine/{name}").read_text())["leaked"] is True
    assert f"LEAKED: {len(train)} test" in Path("runs/evaluate-mine/report.txt").read_text()
    assert "no classifier" in refused(capsys, "evaluate", "--model", "runs/pretrain/encoder.pt")
    assert "no classifier at" in refused(capsys, "evaluate", "--model", "nowhere.pt")


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_help_says_what_is_held_out(command, capsys):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    assert "Held out: " in " ".join(capsys.readouterr().out.split())


# --- refusals ----------------------------------------------------------------------------------


def test_a_leaked_test_part_is_refused_and_with_allow_leak_marked_everywhere(tmp_path, capsys):
    """Pretrained on the same pictures as a flat folder, so that nothing was held out."""
    plant(tmp_path / "scans")
    pretrained_on_all(tmp_path)
    probe = ("probe", "--data", "scans", "--task", "mine", "--epochs", "1")
    assert "the encoder was pretrained on 2 of the 2 test pictures" in refused(capsys, *probe)
    assert main.main([*probe, "--allow-leak"]) == 0
    for name in ("config.json", "metrics.json"):
        assert json.loads(Path(f"runs/probe-mine/{name}").read_text())["leaked"] is True
    assert "LEAKED" in Path("runs/probe-mine/report.txt").read_text()
    red = np.asarray(Image.open("runs/probe-mine/confusion.png")).astype(int)
    assert ((red[..., 0] - red[..., 1] > 120) & (red[..., 2] < 100)).any()  # the caption


def test_one_slice_of_a_tested_patient_makes_all_of_his_slices_leaked(tmp_path, capsys):
    plant(tmp_path / "scans", patients=20)
    main.main(["data", "--data", "scans", "--task", "mine", "--image-size", "32"])
    rows = [row for row in rows_of("runs/data-mine/splits.csv") if row["split"] == "test"]
    groups = [row["group"] for row in rows]
    several = next(row for row in rows if groups.count(row["group"]) > 1)
    plant(tmp_path / "flat", "all", seed=4)
    target = tmp_path / "flat" / "all" / "sick" / "one.png"
    target.write_bytes((tmp_path / "scans" / several["path"]).read_bytes())
    for path in (tmp_path / "flat" / "all" / "well").rglob("*.png"):
        path.rename(tmp_path / "flat" / "all" / "sick" / f"{path.parent.name}-{path.name}")
    main.main(["pretrain", "--data", "flat", "--epochs", "0", "--image-size", "32"])
    error = refused(capsys, "probe", "--data", "scans", "--task", "mine")
    assert f"on {groups.count(several['group'])} of the {len(rows)} test pictures" in error


def test_mistakes_are_one_line_that_says_what_to_do(tmp_path, capsys):
    assert "main.py pretrain" in refused(capsys, "probe", "--task", "tumor")
    assert "not a folder" in refused(capsys, "pretrain", "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no pictures below" in refused(capsys, "pretrain", "--data", "empty")
    main.main(["pretrain", "--epochs", "0"])
    assert "epochs 0 there, 2 here" in refused(capsys, "pretrain")
    assert "found: alzheimer, ms" in refused(capsys, "probe", "--task", "liver")
    assert "--help" in refused(capsys, "probe")
    assert "whole number from 2" in refused(capsys, "pretrain", "--batch-size", "1")
    assert "number from 1e-12 up" in refused(capsys, "pretrain", "--lr", "0")
    (tmp_path / "one").mkdir()
    Image.new("L", (40, 40), 9).save(tmp_path / "one" / "1.png")
    assert "takes at least 2" in refused(capsys, "pretrain", "--data", "one")
    assert "start the command from another folder" in refused(capsys, "pretrain", "--data", ".")
    inside = ("--data", "one", "--out", "one/run")
    assert "inside --data one" in refused(capsys, "pretrain", *inside)
    assert "is a file" in refused(capsys, "pretrain", "--out", "one/1.png")
    assert "is a file" in refused(capsys, "pretrain", "--out", "one/1.png/below")
    wrong = ("--encoder", "runs/phantoms/pretrain/checkpoint.pt")
    assert "encoder.pt is beside it" in refused(capsys, "probe", "--task", "tumor", *wrong)
    assert "lower --lr" in refused(capsys, "pretrain", "--out", "nan", "--lr", "1e30")
    flat = ("probe", "--data", "one", "--task", "one")
    encoder = ("--encoder", "runs/phantoms/pretrain/encoder.pt")
    assert "two or more class folders" in refused(capsys, *flat, *encoder)


def test_a_class_of_one_patient_is_refused_and_never_split_by_picture(tmp_path, capsys):
    plant(tmp_path / "scans")
    for path in sorted((tmp_path / "scans/mine/sick").iterdir())[1:]:
        shutil.rmtree(path)
    for i in range(5):
        target = next((tmp_path / "scans/mine/sick").iterdir()) / f"more{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(target)
    flags = ["--data", "scans"]
    assert main.main(["data", *flags]) == 0
    assert "cannot be probed: class 'sick'" in capsys.readouterr().out
    main.main(["pretrain", *flags, "--epochs", "0", "--image-size", "32"])
    assert "are never split" in refused(capsys, "probe", *flags, "--task", "mine")
    assert not Path("runs/probe-mine").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is missing")
def test_a_missing_device_is_named(capsys):
    assert "no cuda device" in refused(capsys, "pretrain", "--device", "cuda")


# --- stopping, going on, many processes --------------------------------------------------------


def test_a_finished_run_says_so_and_a_new_one_has_to_be_asked_for(capsys):
    command = ["pretrain", "--epochs", "1"]
    assert main.main(command) == 0
    run = Path("runs/phantoms/pretrain")
    times = {path: path.stat().st_mtime_ns for path in (run / "checkpoint.pt", run / "encoder.pt")}
    capsys.readouterr()
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert "it is finished" in out and "next: python main.py probe" in out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    error = refused(capsys, *command, "--seed", "1", "--chunk-size", "8")
    assert "chunk_size None there, 8 here; seed 0 there, 1 here" in error and "--restart" in error
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert main.main([*command, "--seed", "1", "--restart"]) == 0
    assert json.loads((run / "config.json").read_text())["seed"] == 1
    (run / "encoder.pt").unlink()  # what is missing comes back
    assert main.main([*command, "--seed", "1"]) == 0 and (run / "encoder.pt").exists()
    (run / "checkpoint.pt").write_bytes(b"torn")
    assert "cannot be resumed" in refused(capsys, *command)
    assert (run / "checkpoint.pt").read_bytes() == b"torn"
    assert "lower --lr" in refused(capsys, *command, "--restart", "--lr", "1e30")
    assert {path.name for path in run.iterdir()} == {"config.json", "log.jsonl"}  # nothing mixed


def test_a_signal_ends_a_run_after_its_step_and_the_next_start_goes_on(monkeypatch, capsys):
    """Weights and log are those of a run that was never stopped; leftovers are cleared away."""
    command = ["pretrain", "--batch-size", "64", "--epochs", "2"]
    steps, stop_at = watched(monkeypatch)
    main.main([*command, "--out", "alone"])
    total = len(steps)
    stop_at.append(total + 5)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main.main([*command, "--out", "stopped"])
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert f"stopped after step {steps[-1]} of epoch" in out and "goes on from there" in out
    leftover = Path("stopped/.checkpoint.pt.1.tmp")
    leftover.write_bytes(b"half")
    Path("stopped/.mine.tmp").write_bytes(b"")
    assert len(steps) == total + 5 < 2 * total
    after = steps[-1]
    assert main.main([*command, "--out", "stopped"]) == 0
    assert f"goes on after step {after} of" in capsys.readouterr().out
    assert len(steps) == 2 * total  # no step was done twice, none left out
    assert not leftover.exists() and Path("stopped/.mine.tmp").exists()
    weights = [torch.load(f"{out}/encoder.pt")["encoder"] for out in ("alone", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [Path(out, "log.jsonl").read_text().splitlines() for out in ("alone", "stopped")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_runs_survive_kills_and_signals():
    """Real processes; `python tests/survive.py --kills 100` is the long form."""
    command = [sys.executable, str(HERE / "tests" / "survive.py"), "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 kills" in done.stdout and "the same bits" in done.stdout


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """The command on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(HERE / "main.py"), *words, "--data", "scans", "--image-size", "32"]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_processes_share_a_run_and_one_goes_on_with_it(tmp_path, capsys):
    plant(tmp_path / "scans")
    done = torchrun("pretrain", "--epochs", "1", "--batch-size", "10", "--chunk-size", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  source mine (mine)") == done.stdout.count("next: ") == 1
    run = Path("runs/pretrain")
    assert json.loads((run / "config.json").read_text())["processes"] == 2
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1 and len(checkpoint["records"]) == 1
    # as if it had been stopped in its second epoch
    checkpoint["config"]["epochs"] = 2
    simclr.save(checkpoint, run / "checkpoint.pt")
    command = ["pretrain", "--data", "scans", "--image-size", "32", "--batch-size", "10"]
    assert main.main([*command, "--chunk-size", "4", "--epochs", "2"]) == 0
    assert "goes on after step 0 of epoch 2" in capsys.readouterr().out
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    done = torchrun("pretrain", "--batch-size", "7", "--out", "odd")
    assert done.returncode != 0 and done.stderr.count("error: 2 processes cannot share") == 1
    assert "such as 8" in done.stderr and not Path("odd").exists()


# --- from outside ------------------------------------------------------------------------------


def test_without_torchvision_the_command_still_runs_and_a_mistake_exits_with_2(tmp_path):
    """A real process, with a torchvision that fails to import, as a mismatched build does."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torchvision.py").write_text("raise ImportError('mismatched build')")
    scans = tmp_path / "scans"
    plant(scans, patients=3)
    env = os.environ | {"PYTHONPATH": str(broken)}
    words = [sys.executable, str(HERE / "main.py"), "pretrain", "--epochs", "1"]
    words += ["--image-size", "32", "--data"]
    done = subprocess.run([*words, "scans"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/pretrain/encoder.pt").exists()
    done = subprocess.run([*words, "no"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("error: no is not a folder")


def test_importing_the_modules_is_silent_and_draws_no_random_number():
    code = (
        "import torch; before = torch.get_rng_state(); "
        "import data, simclr, evaluate, heads, main; "
        "assert torch.equal(before, torch.get_rng_state())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
