"""main.py from end to end: what every command leaves behind, says, survives and refuses.

One small world is made once: scans of two tasks, loose scans, another hospital's, and every command
run on them in order (`world`). The tests read what that left, and run more beside it. The network
has one block a stage. Processes are killed in a given call, so nothing depends on speed.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import gradcam
import heads
import main
import simclr

HERE, TESTS = Path(main.__file__).parent, Path(__file__).parent
SCANS, SIZE = ["--data", "scans"], ["--image-size", "32"]
MINE = [*SCANS, "--task", "mine"]
MODEL = ["--model", "runs/probe-mine/classifier.pt"]
PRETRAIN = ["pretrain", *SCANS, *SIZE, "--batch-size", "16", "--epochs"]
FINETUNE = ["finetune", *MINE, "--epochs", "2"]
COMPARE = ["compare", *MINE, "--epochs", "1", "--seeds", "1", "--label-fractions", "0.5", "1"]
# Names that a table, a page or a terminal could take for something else.
NAMES = ["=1+1", "two\nlines", "<b>&amp;|", "\x1b[31m", "a\r=2", "-脑é", os.fsdecode(b"\xff\xfe")]


def shrink(setattr=setattr) -> None:
    """Make network, phantoms, epochs and resampling small."""
    shallow = partial(simclr.ResNet, simclr.BasicBlock, (1, 1, 1, 1), 1)
    setattr(simclr, "ARCHITECTURES", {"resnet18": shallow})
    setattr(data, "PHANTOM_PATIENTS", 3)
    small = {"image_size": 32, "epochs": 1}
    pretraining = small | {"batch_size": 32}
    defaults = {"data": {"image_size": 32}, "pretrain": pretraining, "finetune": small}
    setattr(main, "PHANTOM_DEFAULTS", defaults | {"compare": {"epochs": 1}})
    setattr(heads, "LEAST_STEPS", 2)
    short = make_dataclass("Probing", [("epochs", int, 3)], bases=(heads.Probing,), frozen=True)
    setattr(heads, "Probing", short)
    setattr(gradcam, "STEPS", 3)
    setattr(evaluate, "RESAMPLES", 50)


def plant(folder: str, classes: str, patients=7, slices=2, seed=0) -> None:
    """Random images, brighter from class to class, and a folder for each patient."""
    rng, names = np.random.default_rng(seed), itertools.cycle(NAMES)
    for k, label in enumerate(classes.split()):
        for patient in range(patients):
            home = Path(folder, label, f"sub-{label}{seed}{patient}")
            home.mkdir(parents=True)
            for _ in range(slices):
                pixels = rng.integers(60 * k, 60 * k + 130, (40, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{next(names)}.png")


def run(*words: str) -> str:
    """Run a command that has to succeed; what it says."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        assert main.main(list(words)) == 0, screen.getvalue()
    return screen.getvalue()


def refused(*words: str) -> str:
    """Run a command that has to fail; the one line it says on standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        assert main.main(list(words)) == 2, words
    assert re.fullmatch(r"error: [^\n]+\n", errors.getvalue()), errors.getvalue()
    return errors.getvalue()


def table(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def next_command(said: str) -> list[str]:
    """The words after main.py in the last line that a command printed."""
    assert said.splitlines()[-1].startswith("next: python main.py ")
    return shlex.split(said.splitlines()[-1])[3:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every command has run: what each printed."""
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        os.chdir(tmp_path_factory.mktemp("world"))
        plant("scans/mine", "sick well odd")
        plant("scans/stroke", "Normal Stroke", slices=1, seed=5)
        plant("hospital/mine", "sick well", patients=3, seed=1)
        plant("loose", "x", patients=1, slices=len(NAMES), seed=2)
        Path("loose/broken\n\x1b[31m.png").write_bytes(b"no image")
        yield {
            "data": run("data", *SCANS, *SIZE),
            "pretrain": run(*PRETRAIN, "2"),
            "probe": run("probe", *MINE, "--epochs", "3"),
            "finetune": run(*FINETUNE),
            "scratch": run("finetune", *MINE, *SIZE, "--from-scratch", "--epochs", "1"),
            "compare": run(*COMPARE),
            "evaluate": run("evaluate", *MODEL, "--data", "hospital"),
            "predict": run("predict", *MODEL, "scans/mine", "loose"),
            "explain": run("explain", *MODEL, *SCANS),
            "explain files": run("explain", *MODEL, "loose", "--out", "explained"),
            "embed": run("embed", *SCANS),
        }
    os.chdir(before)


@pytest.fixture
def elsewhere(world, tmp_path, monkeypatch):
    """Run in an empty folder, from which scans and encoder can be read; the world's folder."""
    place = Path.cwd()
    for name in ("scans", "loose"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "runs/pretrain").mkdir(parents=True)
    (tmp_path / "runs/pretrain/encoder.pt").symlink_to(place / "runs/pretrain/encoder.pt")
    monkeypatch.chdir(tmp_path)
    return place


# --- what is left behind -------------------------------------------------------------------------

RESULT = "config.json metrics.json report.md predictions.csv confusion.png roc.png reliability.png"
TRAINED = f"{RESULT} log.jsonl classifier.pt splits.csv curve.png"
LEFT = {
    "data-mine": "config.json splits.csv report.md leak.png",
    "data-stroke": "config.json splits.csv report.md leak.png",
    "pretrain": "config.json log.jsonl checkpoint.pt encoder.pt curve.png",
    "probe-mine": TRAINED,
    "finetune-mine": f"{TRAINED} checkpoint.pt",
    "scratch-mine": f"{TRAINED} checkpoint.pt",
    "compare-mine": "config.json fits.jsonl table.md table.csv label_efficiency.png",
    "evaluate-mine": f"{RESULT} splits.csv",
    "predict-mine": "config.json predictions.csv",
    "explain-mine": "config.json report.md explain.csv index.html",
}
ENCODER = "arch encoder feature_dim image_size mean std epoch config seen"
METRICS = "task classes n n_groups accuracy balanced_accuracy macro_precision macro_recall auroc "
METRICS += "macro_f1 ece nll ci95 per_class confusion_matrix per_group baseline split"
RECORD = "epoch loss lr contrastive_accuracy embedding_std images_per_second seconds"


def test_every_command_writes_every_artifact_with_its_keys(world):
    for folder, names in LEFT.items():
        found = {path.name for path in Path("runs", folder).iterdir()}
        assert {name for name in found if not name.endswith("-map.png")} == set(names.split())
    assert {path.name for path in Path("runs").iterdir()} == {*LEFT, "cache", "features.npz"}
    encoder = torch.load("runs/pretrain/encoder.pt", weights_only=True)
    config = json.loads(Path("runs/pretrain/config.json").read_text())
    assert set(encoder) == set(ENCODER.split()) and encoder["config"] == config
    assert encoder["encoder"]["conv1.weight"].shape == (64, 1, 7, 7)
    assert encoder["seen"].shape == (config["images"], 16) and encoder["seen"].dtype == torch.uint8
    started = config["started"]
    assert started["typed"] == [*PRETRAIN, "2"]
    assert started["versions"]["torch"] == torch.__version__
    log = lines("runs/pretrain/log.jsonl")
    assert set(log[0]) == set(RECORD.split()) and set(log[1]) - set(log[0]) == {"knn_accuracy"}
    for kind, rates in {"probe": 0, "finetune": 1, "scratch": 3}.items():
        model = torch.load(f"runs/{kind}-mine/classifier.pt", weights_only=True)
        assert set(model) >= {*ENCODER.split(), "task", "classes", "head", "head_type"}
        metrics = json.loads(Path(f"runs/{kind}-mine/metrics.json").read_text())
        assert set(metrics) >= set(METRICS.split()) and metrics["classes"] == model["classes"]
        log = lines(f"runs/{kind}-mine/log.jsonl")
        assert set(log[0]) >= {"epoch", "train_loss", "val_loss", "val_accuracy"}
        assert len({record.get("peak_lr") for record in log} - {None}) == rates
    for name, titles in {
        "probe-mine/predictions": "path group label prediction p_odd p_sick p_well",
        "probe-mine/splits": "path label group split pixel_hash",
        "predict-mine/predictions": "path prediction p_odd p_sick p_well",
        "explain-mine/explain": "path group label prediction p_odd p_sick p_well overlay",
    }.items():
        assert " ".join(table(f"runs/{name}.csv")[0]).startswith(titles)
    features = np.load("runs/features.npz")
    assert set(features) == {"features", "paths", "labels", "tasks", "splits"}
    assert features["features"].shape == (len(features["paths"]), 512)


def test_predictions_and_splits_say_what_the_metrics_say(world):
    """From the tables and scans alone, slowly: scores, hashes, and that nobody is on two sides."""
    for kind in ("probe", "finetune", "scratch"):
        predictions = table(f"runs/{kind}-mine/predictions.csv")
        metrics = json.loads(Path(f"runs/{kind}-mine/metrics.json").read_text())
        correct = [row["label"] == row["prediction"] for row in predictions]
        assert metrics["accuracy"] == pytest.approx(np.mean(correct))
        assert metrics["n_groups"] == len({row["group"] for row in predictions})
        assert metrics["n"] == len(correct) == np.sum(metrics["confusion_matrix"])
        for row in predictions:
            probs = {name: float(row[f"p_{name}"]) for name in metrics["classes"]}
            assert max(probs, key=probs.get) == row["prediction"]
            assert sum(probs.values()) == pytest.approx(1)
        splits, sides = table(f"runs/{kind}-mine/splits.csv"), defaultdict(set)
        for row in splits:
            sides[row["path"].split("/")[2]].add(row["split"])  # the patient's
            sides[row["group"]].add(row["split"])
            gray = np.asarray(Image.open(Path("scans", row["path"])))
            assert row["pixel_hash"] == hashlib.sha256(gray.tobytes()).hexdigest()[:32]
        assert {len(names) for names in sides.values()} == {1}
        tested = {row["path"] for row in splits if row["split"] == "test"}
        assert tested == {row["path"] for row in predictions}
    seen = torch.load("runs/pretrain/encoder.pt", weights_only=True)["seen"]
    seen = {row.numpy().tobytes().hex() for row in seen}
    for row in [*table("runs/data-mine/splits.csv"), *table("runs/data-stroke/splits.csv")]:
        assert (row["pixel_hash"] in seen) == (row["split"] == "train")
    run("probe", *MINE, "--epochs", "1", "--seed", "7", "--out", "seed7")  # it moves no split
    run("data", *MINE, "--image-size", "48", "--out", "at48")
    for place in ("runs/probe-mine", "runs/scratch-mine", "seed7", "at48/mine"):
        found = Path(place, "splits.csv").read_bytes()
        assert found == Path("runs/data-mine/splits.csv").read_bytes()


def test_val_chooses_epoch_and_temperature_and_test_does_not(world, monkeypatch):
    """From the files of a run: which images the chosen epoch's loss and the temperature are of."""
    asked = []
    monkeypatch.setattr(evaluate, "fit_temperature", lambda *both: asked.append(both) or 1.0)
    for words in (["probe", *MINE, "--epochs", "3"], FINETUNE):
        run(*words)
        place = Path(f"runs/{words[0]}-mine")
        labels, probs = asked.pop()
        classes = json.loads((place / "metrics.json").read_text())["classes"]
        val = [row["label"] for row in table(place / "splits.csv") if row["split"] == "val"]
        assert [classes[label] for label in labels] == val
        best = max(lines(place / "log.jsonl"), key=lambda r: (r["val_accuracy"], -r["val_loss"]))
        assert best["val_loss"] == pytest.approx(evaluate.negative_log_likelihood(labels, probs))


def test_probabilities_of_all_commands_agree_to_the_digit(world):
    run("evaluate", *MODEL, *SCANS, "--out", "own")
    probed = table("runs/probe-mine/predictions.csv")
    assert table("own/predictions.csv") == probed
    predicted = {row["path"]: row for row in table("runs/predict-mine/predictions.csv")}
    explained = {row["path"]: row for row in table("runs/explain-mine/explain.csv")}
    assert list(explained) == [row["path"] for row in probed]
    for row in probed:
        of_files, of_maps = predicted[f"scans/{row['path']}"], explained[row["path"]]
        assert row["prediction"] == of_files["prediction"] == of_maps["prediction"]
        for name in ("p_odd", "p_sick", "p_well"):
            assert row[name] == of_files[name] == f"{float(of_maps[name]):.9g}"


def test_embed_writes_the_split_of_the_pretraining_and_marks_what_it_has_seen(elsewhere):
    """Else scikit-learn on features.npz would be tested on images that were pretrained on."""
    run("embed", *SCANS)
    features = np.load("runs/features.npz")
    now = dict(zip(features["paths"], features["splits"], strict=True))
    splits = {row["path"]: row["split"] for row in table(elsewhere / "runs/data-mine/splits.csv")}
    assert splits.items() <= now.items() and set(now.values()) == {"train", "val", "test"}
    shutil.copytree("scans/mine", "other/mine/Testing")  # now all of it is a test split
    run("embed", "--data", "other", "--out", "other.npz")
    features = np.load("other.npz")
    for path, split in zip(features["paths"], features["splits"], strict=True):
        seen = splits[path.replace("Testing/", "")] == "train"
        assert split == ("pretrain" if seen else "test")
    # Its own pattern (here with a few patients to a group) and --resplit hold.
    how = ["--patient-pattern", "(sub-[a-z]*0[0-3]|sub-[a-z]*)", "--resplit"]
    run("pretrain", *SCANS, *SIZE, "--epochs", "0", *how, "--out", "joined")
    run("data", *MINE, *how, *SIZE, "--out", "joined")
    run("embed", *SCANS, "--encoder", "joined/encoder.pt", "--out", "joined.npz")
    features = np.load("joined.npz")
    now = dict(zip(features["paths"], features["splits"], strict=True))
    joined = {row["path"]: row["split"] for row in table("joined/mine/splits.csv")}
    assert joined.items() <= now.items() and joined != splits


def test_without_data_everything_is_phantoms_and_lies_apart(elsewhere):
    shutil.rmtree("runs")
    model = "--model runs/phantoms/probe-tumor/classifier.pt"
    for words in ("data --task ms", "pretrain", "probe --task tumor", f"explain {model}", "embed"):
        run(*words.split())
    assert "on phantoms" in run("predict", *model.split(), "loose", "--out", "predicted")
    found = {path.name for path in Path("runs/phantoms").iterdir()}
    assert found == {"data-ms", "pretrain", "probe-tumor", "explain-tumor", "features.npz"}
    assert {path.name for path in Path("runs").iterdir()} == {"phantoms", "cache"}
    for row in table("runs/phantoms/explain-tumor/explain.csv"):  # the tumour's place is known
        healthy = row["label"] == "notumor"
        assert healthy == (row["pointing_by_random"] in ("", "nan"))
        assert re.fullmatch(r"tumor/\w+/p\d{4}/\d", row["path"])


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_in_training_steps_alone(elsewhere, monkeypatch, native):
    """On machines that compute it, and on others."""
    monkeypatch.setattr(simclr, "native_bf16", lambda device: (native, "as the test says"))
    forward, kinds = simclr.ResNet.forward, defaultdict(set)

    def watched(network: simclr.ResNet, x: torch.Tensor) -> torch.Tensor:
        h = forward(network, x)
        kinds[network.training].add(h.dtype)
        return h

    monkeypatch.setattr(simclr.ResNet, "forward", watched)
    for words in ([*PRETRAIN, "1"], FINETUNE):
        run(*words, "--out", words[0])
        assert kinds.pop(True) == {torch.bfloat16 if native else torch.float32}
    model = ["--model", "finetune/classifier.pt"]
    run("probe", *MINE, "--epochs", "1")
    run("evaluate", *model, *SCANS)
    run("explain", *model, "loose")
    run("embed", *SCANS)
    assert kinds == {False: {torch.float32}}
    assert table("runs/evaluate-mine/predictions.csv") == table("finetune/predictions.csv")


# --- what is said --------------------------------------------------------------------------------


def test_reports_name_patients_and_baselines_and_a_log_holds_plain_lines(world):
    for command in ("probe", "finetune", "scratch", "evaluate"):
        text = Path(f"runs/{command}-mine/report.md").read_text()
        assert text in world[command]
        for word in ("per image", "per patient", "sensitivity", "specificity", "groups", "95 %"):
            assert word in text, (command, word)
    assert "untrained encoder, cosine" in world["probe"] and "raw 32x32 pixels" in world["probe"]
    assert "untrained encoder, linear" in world["finetune"] and "scores highest" in world["compare"]
    assert "the patient is known of 56 of 56 images" in world["data"]
    assert "70/15/15 by group" in world["data"] and "patient" in world["predict"]
    assert "not for diagnosis" in world["predict"]
    assert "in the val and test groups\n" in world["pretrain"] and "few steps" in world["pretrain"]
    assert "1 epoch for each" in world["scratch"] and "1 epochs" not in "".join(world.values())
    # A line for each epoch, no carriage return, and a name never more than one line.
    for command, said in world.items():
        assert not [c for c in said if not c.isprintable() and c != "\n"], command
    assert len(re.findall(r"^ *epoch .*loss", world["pretrain"], re.M)) == 2
    assert len(re.findall(r"^ *epoch .*val loss", world["finetune"], re.M)) == 2
    assert r"left out, unreadable: loose/broken\n\x1b[31m.png" in world["predict"]
    assert r"two\nlines.png: " in world["predict"]


def test_names_that_bite_are_text_in_every_table_and_on_the_page(world):
    planted = {f"{name}.png" for name in NAMES}
    for path in [*Path("runs").rglob("*.csv"), Path("explained/explain.csv")]:
        for row in table(path):
            assert None not in row and None not in row.values()  # as many cells as titles
            assert not [c for c in row.values() if re.match(r"[=+@\t\r]|-[^\d.]", c)], path
            assert "path" not in row or row["path"].split("/")[-1] in planted
    assert {path.split("/")[-1] for path in np.load("runs/features.npz")["paths"]} == planted
    page = Path("explained/index.html").read_text(errors="surrogateescape")
    assert "<b>" not in page and "&lt;b&gt;&amp;amp;|.png" in page
    assert page.count("<figure>") == len(NAMES)


def test_the_next_command_works(elsewhere):
    """Each command's last line is typed again, made small; from `data` on to the maps."""
    shutil.rmtree("runs")
    small = {"pretrain": [*SIZE, "--epochs", "1"], "probe": ["--epochs", "2"]}
    words, commands = ["data", *SCANS, *SIZE], []
    while words[0] != "predict":
        commands.append(words[0])
        words = next_command(run(*words, *small.get(words[0], [])))
    assert commands == ["data", "pretrain", "probe", "explain"]
    words = next_command(run("embed", *SCANS))
    run(*words, "--epochs", "2")
    # Loose images, and a class of one patient, are nothing to probe.
    plant("few/mine", "sick", patients=1)
    plant("few/mine", "well")
    said = run("data", "--data", "few", *SIZE, "--out", "survey")
    assert "cannot be probed" in said and "class 'sick'" in said
    for words in (next_command(said), ["pretrain", "--data", "loose"]):
        said = run(*words, *SIZE, "--epochs", "0", "--out", f"of-{words[2]}")
        assert next_command(said)[0] == "embed"
        run(*next_command(said))
    assert "class 'sick'" in refused("probe", "--data", "few", "--encoder", "of-few/encoder.pt")


# --- going on ------------------------------------------------------------------------------------


def live(place: str, words: list[str], death: str) -> None:
    """A command in a process of its own, which kills itself in the n-th call of a function."""
    os.chdir(place)
    shrink()
    if death:
        name, n = death.split()
        function, calls = pkgutil.resolve_name(name), itertools.count(1)

        def dying(*arguments: object, **more: object) -> object:
            if next(calls) == int(n):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        module, _, attribute = name.rpartition(".")
        setattr(pkgutil.resolve_name(module), attribute, dying)
    sys.exit(main.main(words))


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(elsewhere, monkeypatch):
    """kill -9 of real processes: in a step, while a file is written, and before it is renamed."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{TESTS}")  # of the server, which imports once for all
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_main"])
    killed, tuned = [*PRETRAIN, "3", "--out", "killed"], [*FINETUNE, "--out", "tuned"]
    deaths = ["simclr.training_step 5", "os.fsync 5", "os.replace 5", ""]
    lives = [(killed, death) for death in deaths]
    for words, death in [*lives, (tuned, "heads.train_epoch 2"), (tuned, "")]:
        process = server.Process(target=live, args=(os.getcwd(), words, death))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if death else 0), death
        assert Path(words[-1], "checkpoint.pt").exists()  # not begun anew each time
    run(*PRETRAIN, "3", "--out", "alone")
    whole, killed = (torch.load(f"{out}/checkpoint.pt") for out in ("alone", "killed"))
    pairs = [(whole["weights"], killed["weights"])]
    for i, state in whole["optimizer"]["state"].items():
        pairs.append((state, killed["optimizer"]["state"][i]))
    whole, killed = (torch.load(f"{out}/encoder.pt") for out in ("alone", "killed"))
    pairs.append((whole["encoder"], killed["encoder"]))
    for a, b in pairs:
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    whole, killed = (lines(f"{out}/log.jsonl") for out in ("alone", "killed"))
    assert [r["loss"] for r in whole] == [r["loss"] for r in killed] and len(whole) == 3
    for name in ("log.jsonl", "predictions.csv", "metrics.json"):
        undisturbed = elsewhere / "runs/finetune-mine" / name
        assert Path("tuned", name).read_bytes() == undisturbed.read_bytes()


def test_a_finished_run_stays_may_be_extended_and_is_restarted_when_asked(elsewhere):
    shutil.rmtree("runs")
    run(*PRETRAIN, "1")
    before = Path("runs/pretrain/encoder.pt").read_bytes()
    with data.lock_folder(Path("runs/pretrain")):
        assert "another run is writing into runs/pretrain" in refused(*PRETRAIN, "1")
    assert next_command(run(*PRETRAIN, "1"))[0] == "probe"
    for words in ("--seed 1", "--lr 0.1", "--temperature 1", "--chunk-size 4", "--resplit"):
        line = refused(*PRETRAIN, "1", *words.split())
        assert words.split()[0][2:].replace("-", "_") in line and "--restart" in line
    assert Path("runs/pretrain/encoder.pt").read_bytes() == before
    run(*PRETRAIN, "3")
    log = lines("runs/pretrain/log.jsonl")
    assert [record["epoch"] for record in log] == [1, 2, 3] and log[2]["lr"] < log[0]["lr"]
    assert "epochs 3, not 2" in refused(*PRETRAIN, "2")
    config = Path("runs/pretrain/config.json")
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "lr": None}))
    assert "lr None, not 0.0005" in refused(*PRETRAIN, "3")
    config.write_text("no config")
    assert "config.json is no config of a run; --restart" in refused(*PRETRAIN, "3")
    config.write_text(whole)
    for content in (b"", before[:1000], before):  # spoilt, torn, another checkpoint
        Path("runs/pretrain/checkpoint.pt").write_bytes(content)
        line = refused(*PRETRAIN, "3")
        assert "checkpoint.pt" in line and "--restart" in line
    probe = ["probe", *MINE, "--epochs"]
    run(*probe, "2")
    Path("runs/probe-mine/notes.txt").write_text("the user's own")
    run(*PRETRAIN, "0", "--seed", "1", "--restart")
    assert torch.load("runs/pretrain/encoder.pt", weights_only=True)["epoch"] == 0
    assert "another encoder" in refused(*probe, "2")
    assert "epochs 2, not 1" in refused(*probe, "1")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(heads, "task_features", interrupt)
        main.main([*probe, "1", "--restart"])
    assert {path.name for path in Path("runs/probe-mine").iterdir()} == {"config.json", "notes.txt"}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_comparison_keeps_its_fits_and_goes_on(elsewhere, monkeypatch):
    fit, fitted = heads.fit, []

    def counted(*arguments: object) -> dict:
        fitted.append(arguments[1:4])
        return interrupt() if len(fitted) == 4 else fit(*arguments)

    monkeypatch.setattr(heads, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        main.main(COMPARE)
    assert len(lines("runs/compare-mine/fits.jsonl")) == 3
    run(*COMPARE)
    run(*COMPARE)  # nothing is left to fit
    assert len(fitted) == 13 and len(set(fitted)) == 12  # six methods at two shares
    whole = table(elsewhere / "runs/compare-mine/table.csv")
    for row, undisturbed in zip(table("runs/compare-mine/table.csv"), whole, strict=True):
        assert {**row, "seconds": ""} == {**undisturbed, "seconds": ""}


def test_evaluate_takes_some_classes_and_never_replaces_another_hospitals_result(world):
    result = Path("runs/evaluate-mine/report.md")
    assert {row["label"] for row in table("runs/evaluate-mine/predictions.csv")} == {"sick", "well"}
    metrics = json.loads(Path("runs/evaluate-mine/metrics.json").read_text())
    assert metrics["classes"] == ["odd", "sick", "well"] and metrics["n"] == 12
    plant("second/mine", "sick odd", patients=2, seed=3)
    before, second = result.read_bytes(), ["evaluate", *MODEL, "--data", "second"]
    line = refused(*second)
    assert "other images" in line and "--out" in line and result.read_bytes() == before
    run(*second, "--restart")
    assert result.read_bytes() != before
    run("evaluate", *MODEL, "--data", "hospital", "--restart")
    run("predict", *MODEL, "loose", "--out", "predicted")
    assert "replaces" not in run("predict", *MODEL, "loose", "--out", "predicted")
    said = run("predict", *MODEL, "second", "--out", "predicted")
    assert "replaces the earlier results in predicted: those of other images" in said
    plant("third/mine", "ill well", patients=2, seed=4)
    line = refused("evaluate", *MODEL, "--data", "third")
    assert "'ill', 'well'" in line and "'odd', 'sick', 'well'" in line


# --- real processes ------------------------------------------------------------------------------

PROGRAM = f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(HERE)!r}, {str(TESTS)!r}]
import simclr, test_main
test_main.shrink()
if "stopped" in sys.argv:
    simclr.nt_xent = lambda *_: os.kill(os.getpid(), signal.SIGINT)
runpy.run_path({str(HERE / "main.py")!r}, run_name="__main__")
"""


def test_two_processes_share_a_run_and_one_goes_on_with_it(elsewhere):
    Path("program.py").write_text(PROGRAM)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    words = [*launch, *PRETRAIN, "1", "--out", "two"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: ") == done.stdout.count("the patient is known") == 1
    assert json.loads(Path("two/config.json").read_text())["started"]["processes"] == 2
    run(*PRETRAIN, "1", "--out", "one")
    one, two = (lines(f"{out}/log.jsonl") for out in ("one", "two"))
    assert abs(one[0]["loss"] - two[0]["loss"]) < 0.3  # batch norm sees half a batch, no loss does
    run(*PRETRAIN, "2", "--out", "two")
    assert lines("two/log.jsonl")[0] == two[0] and len(lines("two/log.jsonl")) == 2


def test_ctrl_c_is_one_line_and_status_130_while_importing_and_in_training(elsewhere):
    Path("PIL").mkdir()
    Path("PIL/__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    Path("program.py").write_text(PROGRAM)
    importing = ([sys.executable, str(HERE / "main.py")], os.environ | {"PYTHONPATH": "."})
    for command, environment in (importing, ([sys.executable, "-P", "program.py"], os.environ)):
        words = [*command, *PRETRAIN, "1", "--out", "stopped"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 130
        assert re.fullmatch("\n?interrupted; what is finished is kept[^\n]*\n", done.stderr)


def test_importing_is_silent_and_draws_nothing_and_a_closed_pipe_is_quiet(elsewhere):
    """With a torchvision that fails to import, as one of a mismatched build does."""
    Path("torchvision.py").write_text("raise ImportError('mismatched build')")
    code = "import torch; before = torch.get_rng_state(); import main; "
    code += "assert torch.equal(before, torch.get_rng_state()); "
    words = ["data", *SCANS, *SIZE, "--out", "piped"]
    code += f"import sys; sys.exit(main.main({words}))"
    environment, (reading, writing) = os.environ | {"PYTHONPATH": f"{HERE}"}, os.pipe()
    os.close(reading)
    how = {"env": environment, "stdout": writing, "stderr": subprocess.PIPE}
    done = subprocess.run([sys.executable, "-c", code], **how)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# --- mistakes ------------------------------------------------------------------------------------


def test_help_states_the_defaults_of_its_own_command(capsys):
    small = main.PHANTOM_DEFAULTS["pretrain"]["epochs"]
    for command, default in {"pretrain": f"200; {small} on phantoms", "probe": "150"}.items():
        with pytest.raises(SystemExit):
            main.main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"passes over the training images [{default}]" in shown


MISTAKES = {
    "pretain": "did you mean pretrain?",
    "probe --data scans --task min": "did you mean mine?",
    "pretrain --epoch 3": "did you mean --epochs?",
    "compare --seed 1": "did you mean --seeds?",
    "probe --data scans": "mine, stroke",
    "probe --data scans --task mine --epochs 0": "--epochs 0 trains nothing",
    "predict": "see: python main.py predict --help",
    "predict --model runs/probe-mine/classifier.pt no.png": "no.png is not there",
    "pretrain --image-size 16": "16 is not from 32 to 1024",
    "pretrain --seed -1": "-1 is not from 0 to",
    "pretrain --lr 0": "0 is not from 1e-09 to 1000",
    "pretrain --device cuda": "no cuda device",
    "data --data scans --patient-pattern patient": "has no (group)",
    "data --data nowhere": "nowhere is not a folder",
    "data --data empty": "no images below empty",
    "pretrain --data broken": "6 of 7 images cannot be read",
    "pretrain --data scans --out empty/notes.txt": "empty/notes.txt",
    "pretrain --data scans --out /proc/nowhere": "/proc/nowhere",
    "embed --data scans --out features.csv": "ends in .npz",
    "probe --encoder no.pt": "no.pt cannot be read",
    "probe --data scans --task mine --encoder runs/probe-mine/classifier.pt": "is a classifier",
    "probe --data scans --task mine --encoder runs/pretrain/checkpoint.pt": "is a checkpoint.pt",
    "predict --model runs/pretrain/encoder.pt loose": "is an encoder.pt, as `pretrain` makes it",
    "predict --model empty/notes.txt loose": "notes.txt cannot be read; expected a classifier.pt",
    "data --data scans --labels empty/notes.txt": "give a .csv or .tsv",
}


def test_a_mistake_is_one_line_that_says_what_is_wrong(world, monkeypatch):
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("empty/notes.txt").write_text("no image")
    shutil.copy(next(Path("scans").rglob("*.png")), "broken/good.png")
    for k in range(6):
        Path(f"broken/{k}.png").write_bytes(b"")
    for words, message in MISTAKES.items():
        assert message in refused(*words.split())
    # An encoder that has seen one image of each tested patient: the others count, too.
    tested = [row["path"] for row in table("runs/probe-mine/predictions.csv")]
    Path("flat").mkdir()
    for k, name in enumerate([tested[0], *tested[2:]]):
        shutil.copy(Path("scans", name), f"flat/{k}.png")
    run("pretrain", "--data", "flat", *SIZE, "--epochs", "0", "--out", "seen")
    for command in ("probe", "finetune", "compare"):
        line = refused(command, *MINE, "--encoder", "seen/encoder.pt")
        assert "6 of the 6 test images of mine" in line and tested[0][:20] in line
    monkeypatch.setattr(simclr, "encode", lambda *_: torch.empty(1 << 46))  # really asked for
    assert "memory" in refused(*PRETRAIN, "1", "--out", "large")
