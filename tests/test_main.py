"""main.py from end to end: what every command leaves behind, says, survives and refuses.

One small world is made once: scans of two tasks, loose scans, another hospital's, and every command
run on them in order (`world`). The tests read what that left, and run more beside it. The network is
a ResNet with one block a stage; processes are killed at a given step, so nothing depends on speed.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import pkgutil
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import fuzz
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
SCANS, SIZE = ["--data", "scans"], ["--image-size", "32"]
MINE = [*SCANS, "--task", "mine"]
MODEL = ["--model", "runs/probe-mine/classifier.pt"]
PRETRAIN = ["pretrain", *SCANS, *SIZE, "--batch-size", "16", "--epochs"]
# Names that a table, a page or a terminal could take for something else.
NAMES = ["=1+1", "two\nlines", "<b>&amp;|", "\x1b[31m", "a\r=2", "-脑é", os.fsdecode(b"\xff\xfe")]


def shrink(setattr=setattr) -> None:
    """Make network, phantoms, epochs and resampling small."""
    shallow = partial(simclr.ResNet, simclr.BasicBlock, (1, 1, 1, 1), 1)
    setattr(simclr, "ARCHITECTURES", {"resnet18": shallow, "resnet50": simclr.resnet50})
    setattr(data, "PHANTOM_PATIENTS", 3)
    setattr(main, "PHANTOM_DEFAULTS", {"image_size": 32, "batch_size": 32, "epochs": 1})
    setattr(heads, "LEAST_STEPS", 2)
    setattr(evaluate, "RESAMPLES", 50)


def plant(folder: Path, classes: str, patients=7, slices=2, seed=0) -> None:
    """Random images, brighter from class to class; people are named after folder and class."""
    rng = np.random.default_rng(seed)
    name = itertools.cycle(NAMES)
    for k, label in enumerate(classes.split()):
        for patient in range(patients):
            home = folder / label / f"sub-{folder.parent.name}{label}{seed}{patient}"
            home.mkdir(parents=True)
            for _ in range(slices):
                pixels = rng.integers(60 * k, 60 * k + 130, (40, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{next(name)}.png")


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
    line = errors.getvalue()
    assert re.fullmatch(r"error: [^\n]+\n", line), line
    return line


def table(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def next_command(said: str) -> list[str]:
    """The words after main.py in the last line that a command printed."""
    last = said.splitlines()[-1]
    assert last.startswith("next: python main.py "), last
    return shlex.split(last)[3:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every command has run; `said` holds what each printed."""
    place, before = tmp_path_factory.mktemp("world"), Path.cwd()
    plant(place / "scans/mine", "sick well odd")
    plant(place / "scans/stroke", "Normal Stroke", slices=1, seed=5)
    plant(place / "hospital/mine", "sick well", patients=3, seed=1)
    plant(place / "loose", "x", patients=1, slices=len(NAMES), seed=2)
    (place / "loose/broken\n\x1b[31m.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        os.chdir(place)
        said = {"data": run("data", *SCANS, *SIZE), "pretrain": run(*PRETRAIN, "2")}
        said["probe"] = run("probe", *MINE, "--epochs", "3")
        said["finetune"] = run("finetune", *MINE, "--epochs", "2")
        said["scratch"] = run("finetune", *MINE, *SIZE, "--from-scratch", "--epochs", "1")
        shares = ["--label-fractions", "0.5", "1"]
        said["compare"] = run("compare", *MINE, "--epochs", "1", "--seeds", "1", *shares)
        said["evaluate"] = run("evaluate", *MODEL, "--data", "hospital")
        said["predict"] = run("predict", *MODEL, "scans/mine", "loose")
        said["explain"] = run("explain", *MODEL, *SCANS)
        said["explain files"] = run("explain", *MODEL, "loose", "--out", "explained")
        said["embed"] = run("embed", *SCANS)
        yield said
    os.chdir(before)


@pytest.fixture
def elsewhere(world, tmp_path, monkeypatch):
    """An empty folder to run in, from which the world's scans can be read."""
    for name in ("scans", "loose", "hospital"):
        (tmp_path / name).symlink_to(Path.cwd() / name)
    monkeypatch.chdir(tmp_path)


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
METRICS = (
    "task classes n n_groups accuracy balanced_accuracy macro_precision macro_recall macro_f1 "
    "auroc ece nll ci95 per_class confusion_matrix per_group baseline split"
)


def test_every_command_writes_every_artifact_with_its_keys(world):
    for folder, names in LEFT.items():
        found = {path.name for path in Path("runs", folder).iterdir()}
        assert {name for name in found if not name.endswith("-map.png")} == set(names.split())
    assert {path.name for path in Path("runs").iterdir()} == {*LEFT, "cache", "features.npz"}
    encoder = torch.load("runs/pretrain/encoder.pt", weights_only=True)
    assert set(encoder) == set(ENCODER.split())
    assert encoder["encoder"]["conv1.weight"].shape == (64, 1, 7, 7)
    config = json.loads(Path("runs/pretrain/config.json").read_text())
    assert config == encoder["config"] and len(config["fingerprint"]) == 64
    assert config["typed"] == [*PRETRAIN, "2"] and config["versions"]["torch"] == torch.__version__
    assert encoder["seen"].shape == (config["images"], 16) and encoder["seen"].dtype == torch.uint8
    record = "epoch loss lr contrastive_accuracy embedding_std images_per_second seconds"
    log = lines("runs/pretrain/log.jsonl")
    assert set(log[0]) == set(record.split()) and set(log[1]) - set(log[0]) == {"knn_accuracy"}
    for kind, lrs in {"probe": 0, "finetune": 1, "scratch": 3}.items():
        place = f"runs/{kind}-mine"
        model = torch.load(f"{place}/classifier.pt", weights_only=True)
        assert set(model) >= {*ENCODER.split(), "task", "classes", "head", "head_type"}
        metrics = json.loads(Path(place, "metrics.json").read_text())
        assert set(metrics) >= set(METRICS.split()) and metrics["classes"] == model["classes"]
        assert set(metrics["ci95"]) == {"accuracy", "balanced_accuracy", "macro_f1", "auroc"}
        log = lines(f"{place}/log.jsonl")
        assert {"epoch", "train_loss", "val_loss", "val_accuracy"} <= set(log[0])
        assert len({record.get("peak_lr") for record in log} - {None}) == lrs
        predictions, splits = table(f"{place}/predictions.csv"), table(f"{place}/splits.csv")
        assert list(predictions[0]) == "path group label prediction p_odd p_sick p_well".split()
        assert list(splits[0]) == ["path", "label", "group", "split", "pixel_hash"]
    assert len(lines("runs/compare-mine/fits.jsonl")) == len(table("runs/compare-mine/table.csv"))
    assert {"path", "label", "prediction", "p_sick", "overlay"} <= set(
        table("runs/explain-mine/explain.csv")[0]
    )
    assert list(table("runs/predict-mine/predictions.csv")[0])[:2] == ["path", "prediction"]
    features = np.load("runs/features.npz")
    assert set(features) == {"features", "paths", "labels", "tasks", "splits"}
    assert features["features"].shape == (len(features["paths"]), 512)


def test_predictions_and_splits_say_what_the_metrics_say(world):
    """From the tables and scans alone, slowly: scores, hashes, and that nobody is on two sides."""
    for run_ in ("probe-mine", "finetune-mine", "scratch-mine"):
        predictions = table(f"runs/{run_}/predictions.csv")
        metrics = json.loads(Path(f"runs/{run_}/metrics.json").read_text())
        correct = [row["label"] == row["prediction"] for row in predictions]
        assert metrics["accuracy"] == pytest.approx(np.mean(correct))
        assert metrics["n_groups"] == len({row["group"] for row in predictions})
        assert metrics["n"] == len(correct) == np.sum(metrics["confusion_matrix"])
        for row in predictions:
            probs = {name: float(row[f"p_{name}"]) for name in metrics["classes"]}
            assert max(probs, key=probs.get) == row["prediction"]
            assert sum(probs.values()) == pytest.approx(1)
        splits = table(f"runs/{run_}/splits.csv")
        sides = defaultdict(set)
        for row in splits:
            sides[row["path"].split("/")[2]].add(row["split"])
            sides[row["group"]].add(row["split"])
            gray = np.asarray(Image.open(Path("scans", row["path"])))
            assert row["pixel_hash"] == hashlib.sha256(gray.tobytes()).hexdigest()[:32]
        assert {len(splits_) for splits_ in sides.values()} == {1}
        tested = {row["path"] for row in splits if row["split"] == "test"}
        assert tested == {row["path"] for row in predictions}
    seen = torch.load("runs/pretrain/encoder.pt", weights_only=True)["seen"]
    seen = {row.numpy().tobytes().hex() for row in seen}
    for task in ("mine", "stroke"):
        for row in table(f"runs/data-{task}/splits.csv"):
            assert (row["pixel_hash"] in seen) == (row["split"] == "train")


def test_the_split_is_the_same_in_every_command_and_for_every_seed(world):
    splits = Path("runs/data-mine/splits.csv").read_bytes()
    run("probe", *MINE, "--epochs", "1", "--seed", "7", "--out", "seed7")
    run("data", *MINE, "--image-size", "48", "--out", "at48")
    for place in ("runs/probe-mine", "runs/scratch-mine", "seed7", "at48/mine"):
        assert Path(place, "splits.csv").read_bytes() == splits
    given_back = run("data", *MINE, *SIZE, "--labels", "at48/mine/splits.csv", "--out", "back")
    assert "images have no row" in given_back  # those of the other task
    assert table("back/mine/splits.csv")[5]["split"] == table("at48/mine/splits.csv")[5]["split"]


def test_val_chooses_epoch_and_temperature_and_test_does_not(world, monkeypatch):
    """From the files of a run: which images the chosen epoch's loss and the temperature are of."""
    asked, fit = [], evaluate.fit_temperature
    monkeypatch.setattr(evaluate, "fit_temperature", lambda *x: asked.append(x) or fit(*x))
    for words in (["probe", *MINE, "--epochs", "3"], ["finetune", *MINE, "--epochs", "2"]):
        run(*words)
        place = Path(f"runs/{words[0]}-mine")
        classifier, checkpoint = heads.load_classifier(place / "classifier.pt")
        val = [row for row in table(place / "splits.csv") if row["split"] == "val"]
        squares = [data.fit_square(data.read_gray(Path("scans", row["path"])), 32) for row in val]
        rows = np.arange(len(val))
        cpu = torch.device("cpu")
        probs = heads.predict_probs(classifier, np.stack(squares), rows, checkpoint, cpu)
        labels = np.array([checkpoint["classes"].index(row["label"]) for row in val])
        best = max(lines(place / "log.jsonl"), key=lambda r: (r["val_accuracy"], -r["val_loss"]))
        assert best["val_loss"] == pytest.approx(evaluate.negative_log_likelihood(labels, probs))
        labels_asked, probs_asked = asked.pop()
        assert np.array_equal(labels_asked, labels) and np.array_equal(probs_asked, probs)


def test_probabilities_of_all_commands_agree_to_the_digit(world):
    run("evaluate", *MODEL, *SCANS, "--out", "own")
    answers = {}
    for row in table("runs/predict-mine/predictions.csv"):
        answers[row["path"].removeprefix("scans/")] = row
    probed = table("runs/probe-mine/predictions.csv")
    for row, scored in zip(probed, table("own/predictions.csv"), strict=True):
        assert row == {**scored, "group": row["group"]}
        assert row.items() >= answers[row["path"]].items() - {("path", f"scans/{row['path']}")}
    explained = {row["path"]: row for row in table("runs/explain-mine/explain.csv")}
    assert explained.keys() == {row["path"] for row in probed}
    for row in probed:
        for key in ("label", "prediction"):
            assert row[key] == explained[row["path"]][key]
        for name in ("p_odd", "p_sick", "p_well"):
            assert f"{float(explained[row['path']][name]):.9g}" == f"{float(row[name]):.9g}"


def test_embed_marks_what_was_pretrained_on_and_writes_that_split(world, elsewhere):
    """The split of the pretraining, with its pattern; on other scans what it has seen is marked."""
    place = Path(os.path.realpath("scans")).parent
    features = np.load(place / "runs/features.npz")
    splits = {row["path"]: row["split"] for row in table(place / "runs/data-mine/splits.csv")}
    assert {"train", "val", "test"} == set(splits.values())
    for path, task, split in zip(*(features[k] for k in ("paths", "tasks", "splits")), strict=True):
        assert task != "mine" or splits[path] == split
    shutil.copytree("scans/mine", "flat/one/mine")  # another split: as if published
    shutil.move("flat/one/mine", "flat/mine/Testing")
    run("embed", "--encoder", str(place / "runs/pretrain/encoder.pt"), "--data", "flat")
    features = np.load("runs/features.npz")
    for path, split in zip(features["paths"], features["splits"], strict=True):
        seen = splits[path.replace("Testing/", "")] == "train"
        assert split == ("pretrain" if seen else "test")
    pattern = ["--patient-pattern", "(sub-[^/]*)[0-3]/", "--resplit"]
    run("pretrain", *SCANS, *SIZE, "--epochs", "0", *pattern)
    run("embed", *SCANS)
    run("probe", *MINE, *pattern, "--epochs", "1")
    config = json.loads(Path("runs/probe-mine/config.json").read_text())
    assert config["patient_pattern"] == pattern[1] and config["resplit"] is True
    features = np.load("runs/features.npz")
    now = dict(zip(features["paths"], features["splits"], strict=True))
    assert {now[row["path"]] == row["split"] for row in table("runs/probe-mine/splits.csv")} == {
        True
    }


def test_without_data_everything_is_phantoms_and_lies_apart(elsewhere):
    run("data", "--task", "stroke")
    run("pretrain")
    run("probe", "--task", "ms", "--epochs", "1")
    model = ["--model", "runs/phantoms/probe-ms/classifier.pt"]
    run("explain", *model)
    run("embed")
    found = {path.name for path in Path("runs/phantoms").iterdir()}
    assert found == {"data-stroke", "pretrain", "probe-ms", "explain-ms", "features.npz"}
    assert {path.name for path in Path("runs").iterdir()} == {"phantoms", "cache"}
    assert json.loads(Path("runs/phantoms/pretrain/config.json").read_text())["phantoms"] is True
    assert {row["pointing"] for row in table("runs/phantoms/explain-ms/explain.csv")} > {""}
    said = run("predict", *model, "loose")
    assert "trained on phantoms: of a real scan its answer means nothing" in said
    assert re.fullmatch(r"ms/lesion/p0\d+/\d", table("runs/phantoms/probe-ms/splits.csv")[0]["path"])


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_in_training_steps_alone(elsewhere, monkeypatch, native):
    """On machines that compute it and on others; probe, evaluate, explain, embed are float32."""
    monkeypatch.setattr(simclr, "native_bf16", lambda device: (native, "as the test says"))
    forward, kinds = simclr.ResNet.forward, defaultdict(set)

    def watched(network: simclr.ResNet, x: torch.Tensor) -> torch.Tensor:
        h = forward(network, x)
        kinds[network.training].add(h.dtype)
        return h

    monkeypatch.setattr(simclr.ResNet, "forward", watched)
    kind = torch.bfloat16 if native else torch.float32
    for words in ([*PRETRAIN, "1"], ["finetune", *MINE, "--epochs", "1"]):
        run(*words)
        assert kinds.pop(True) == {kind} and kinds.pop(False, set()) <= {torch.float32}
    for words in (["probe", *MINE, "--epochs", "1"], ["evaluate", *MODEL, "--data", "hospital"]):
        run(*words)
    run("explain", *MODEL, *SCANS)
    run("embed", *SCANS)
    assert kinds == {False: {torch.float32}}
    run(*PRETRAIN, "1", "--precision", "bf16", "--out", "asked")
    assert kinds[True] == {torch.bfloat16}


# --- what is said --------------------------------------------------------------------------------


def test_reports_name_patients_sensitivity_and_baselines_and_are_printed(world):
    for command in ("probe", "finetune", "scratch", "evaluate"):
        text = Path(f"runs/{command}-mine/report.md").read_text()
        assert text in world[command]
        for word in ("per image", "per patient", "sensitivity", "specificity", "groups", "95 %"):
            assert word in text, (command, word)
    for baseline in ("untrained encoder, cosine", "raw 32x32 pixels, cosine"):
        assert baseline in world["probe"].replace("&#95;", "_")
    assert "untrained encoder, linear" in world["finetune"] and "wins" in world["compare"]
    assert "the patient is known of 56 of 56 images" in world["data"]
    assert "left out, unreadable: loose/broken\\n\\x1b[31m.png" in world["predict"]
    assert "patient" in world["predict"] and "not for diagnosis" in world["predict"]
    assert "sick" in world["data"] and "70/15/15 by group" in world["data"]
    assert "epoch of 2: 1, loss" in world["pretrain"].replace("  ", " ").replace("epoch 1", "")


def test_a_log_holds_a_line_for_each_epoch_and_no_control_character(world):
    for command, said in world.items():
        assert not [c for c in said if not c.isprintable() and c != "\n"], command
    assert len(re.findall(r"^ *epoch .*loss", world["pretrain"], re.M)) == 2
    assert len(re.findall(r"^ *epoch .*val loss", world["finetune"], re.M)) == 2


def test_names_that_bite_are_text_in_every_table_and_on_the_page(world):
    planted = {f"{name}.png" for name in NAMES}
    for path in [*Path("runs").rglob("*.csv"), Path("explained/explain.csv")]:
        for row in table(path):
            assert None not in row.values() and None not in row  # as many cells as titles
            for cell in row.values():
                assert not re.match(r"[=+@\t\r]|-[^\d.]", cell), (path, cell)
            if "path" in row:
                assert row["path"].split("/")[-1] in planted
    assert {path.split("/")[-1] for path in np.load("runs/features.npz")["paths"]} == planted
    page = Path("explained/index.html").read_text(errors="surrogateescape")
    assert "<b>" not in page and "&lt;b&gt;&amp;amp;|.png" in page
    assert page.count("<figure>") == len(NAMES)
    before = Path.cwd()
    os.chdir(next(Path("loose/x").iterdir()))
    run("predict", "--model", str(before / MODEL[1]), "=1+1.png", "--out", str(before / "bare"))
    os.chdir(before)
    assert table("bare/predictions.csv")[0]["path"] == "./=1+1.png"


def test_the_next_command_works(elsewhere):
    """Each command's last line is typed again, made small; from `data` on to the maps."""
    small = {"pretrain": [*SIZE, "--epochs", "1"], "probe": ["--epochs", "2"]}
    words, commands = ["data", *SCANS, *SIZE], []
    while words[0] != "predict":
        commands.append(words[0])
        words = next_command(run(*words, *small.get(words[0], [])))
    assert commands == ["data", "pretrain", "probe", "explain"]
    assert next_command(run("embed", *SCANS))[0] == "probe"
    run(*next_command(run("embed", *SCANS)), "--epochs", "2")
    # Loose images, and a class of one patient, are nothing to probe.
    said = run("pretrain", "--data", "loose", *SIZE, "--epochs", "0", "--out", "of loose")
    assert next_command(said)[0] == "embed"
    run(*next_command(said))
    plant(Path("few/mine"), "sick", patients=1)
    plant(Path("few/mine"), "well")
    said = run("data", "--data", "few", *SIZE, "--out", "few data")
    assert "cannot be probed: class 'sick'" in said
    said = run(*next_command(said), *SIZE, "--epochs", "0", "--out", "of few")
    assert next_command(said)[0] == "embed"
    refusal = refused("probe", "--data", "few", "--encoder", "of few/encoder.pt")
    assert "class 'sick'" in refusal and "never in train and test" in refusal


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
    """kill -9 of real processes: in a step, while a checkpoint is written, and before its rename."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE / 'tests'}")  # of the server
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_main"])
    lives = [("alone", "", 0)]
    for death in ("simclr.training_step 5", "os.fsync 5", "os.replace 5"):
        lives.append(("killed", death, -signal.SIGKILL))
    for out, death, status in [*lives, ("killed", "", 0)]:
        process = server.Process(target=live, args=(os.getcwd(), [*PRETRAIN, "3", "--out", out], death))
        process.start()
        process.join()
        assert process.exitcode == status, (out, death)
    states = [torch.load(f"{out}/checkpoint.pt", weights_only=True) for out in ("alone", "killed")]
    assert same(*(state["weights"] for state in states))
    for i, moments in states[0]["optimizer"]["state"].items():
        assert same(moments, states[1]["optimizer"]["state"][i])
    kept = [torch.load(f"{out}/encoder.pt", weights_only=True) for out in ("alone", "killed")]
    assert same(*(encoder["encoder"] for encoder in kept)) and kept[0]["epoch"] == 3
    logs = [lines(f"{out}/log.jsonl") for out in ("alone", "killed")]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]] and len(logs[0]) == 3


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_stays_may_be_extended_and_is_restarted_when_asked(elsewhere):
    run(*PRETRAIN, "1")
    before = Path("runs/pretrain/encoder.pt").read_bytes()
    said = run(*PRETRAIN, "1")
    assert "goes on after epoch 1" in said and next_command(said)[0] == "probe"
    for flag, value in {"--seed": "1", "--lr": "0.1", "--temperature": "1", "--resplit": ""}.items():
        line = refused(*PRETRAIN, "1", *[flag, value][: 1 + bool(value)])
        name = flag[2:].replace("-", "_")
        assert f"{name} " in line and " there, " in line and "--restart" in line
    assert Path("runs/pretrain/encoder.pt").read_bytes() == before
    run(*PRETRAIN, "3")
    log = lines("runs/pretrain/log.jsonl")
    assert [record["epoch"] for record in log] == [1, 2, 3] and log[2]["lr"] < log[0]["lr"]
    assert "epochs 3 there, 2 here" in refused(*PRETRAIN, "2")
    Path("runs/pretrain/old.csv").write_text("a result of the former run")
    run(*PRETRAIN, "0", "--seed", "1", "--restart")
    found = {path.name for path in Path("runs/pretrain").iterdir()}
    assert found <= set(LEFT["pretrain"].split())
    assert torch.load("runs/pretrain/encoder.pt", weights_only=True)["epoch"] == 0
    run(*PRETRAIN, "1", "--seed", "1")  # an untrained network may be trained on
    assert len(lines("runs/pretrain/log.jsonl")) == 1


def test_a_stopped_fine_tuning_and_comparison_keep_what_is_finished(world, elsewhere, monkeypatch):
    place = Path(os.path.realpath("scans")).parent
    encoder = ["--encoder", str(place / "runs/pretrain/encoder.pt")]
    tune = ["finetune", *MINE, *encoder, "--epochs", "3"]
    run(*tune, "--out", "alone")
    step, count = heads.train_epoch, itertools.count(1)

    def stopping(*arguments: object, **more: object) -> float:
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(heads, "train_epoch", stopping)
        main.main([*tune, "--out", "stopped"])
    assert not Path("stopped/classifier.pt").exists()
    assert "epochs 3 there, 5 here" in refused(*tune, "--epochs", "5", "--out", "stopped")
    assert "goes on after epoch" in run(*tune, "--out", "stopped")
    for name in ("predictions.csv", "log.jsonl", "metrics.json"):
        assert Path("alone", name).read_bytes() == Path("stopped", name).read_bytes()

    compare = ["compare", *MINE, *encoder, "--epochs", "1", "--label-fractions", "0.5", "1"]
    fit, fitted = heads.fit, []

    def counted(*arguments: object) -> dict:
        fitted.append(arguments[1:4])
        if len(fitted) == 4:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(heads, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        main.main([*compare, "--seeds", "1"])
    assert len(lines("runs/compare-mine/fits.jsonl")) == 3
    run(*compare, "--seeds", "1")
    assert len(fitted) == 13 and len(set(fitted)) == 12  # of six methods at two shares
    rows, whole = table("runs/compare-mine/table.csv"), table(place / "runs/compare-mine/table.csv")
    for row, undisturbed in zip(rows, whole, strict=True):
        assert {**row, "seconds": ""} == {**undisturbed, "seconds": ""}
    run(*compare, "--seeds", "1")
    assert len(fitted) == 13  # nothing is fitted again


def test_a_folder_that_another_process_holds_is_refused(world):
    with data.lock_folder(Path("runs/pretrain")), data.lock_folder(Path("runs/predict-mine")):
        assert "another run is writing into runs/pretrain" in refused(*PRETRAIN, "2")
        assert "another run" in refused("predict", *MODEL, "scans/mine", "loose")
    run("predict", *MODEL, "scans/mine", "loose")


def test_evaluate_takes_some_classes_and_never_replaces_another_hospitals_result(world):
    assert {row["label"] for row in table("runs/evaluate-mine/predictions.csv")} == {"sick", "well"}
    metrics = json.loads(Path("runs/evaluate-mine/metrics.json").read_text())
    assert metrics["classes"] == ["odd", "sick", "well"] and metrics["n"] == 12
    plant(Path("second/mine"), "sick odd", patients=2, seed=3)
    before = Path("runs/evaluate-mine/report.md").read_bytes()
    second = ["evaluate", *MODEL, "--data", "second"]
    line = refused(*second)
    assert "results of other settings: fingerprint" in line and "--out" in line
    assert Path("runs/evaluate-mine/report.md").read_bytes() == before
    run(*second, "--out", "of second")
    assert run("evaluate", *MODEL, "--data", "hospital").splitlines()[2:] == (
        world["evaluate"].splitlines()[2:]
    )
    run(*second, "--restart")
    assert Path("runs/evaluate-mine/report.md").read_bytes() != before
    run("evaluate", *MODEL, "--data", "hospital", "--restart")
    plant(Path("third/mine"), "ill well", patients=2, seed=4)
    line = refused("evaluate", *MODEL, "--data", "third")
    assert "'ill', 'well'" in line and "'odd', 'sick', 'well'" in line


# --- real processes ------------------------------------------------------------------------------

PROGRAM = """
import os, runpy, signal, sys
sys.path[:0] = [{here!r}, {tests!r}]
import test_main
test_main.shrink()
{more}
sys.argv[0] = "main.py"
runpy.run_path({here!r} + "/main.py", run_name="__main__")
"""


def program(more: str = "") -> list[str]:
    """What starts main.py with the small network, after a few more lines of code."""
    tests = str(Path(__file__).parent)
    Path("program.py").write_text(PROGRAM.format(here=str(HERE), tests=tests, more=more))
    return [sys.executable, "program.py"]


def test_two_processes_share_a_run_and_one_goes_on_with_it(world, elsewhere):
    launch = [*program(), *PRETRAIN, "1"]
    launch[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: ") == done.stdout.count("the patient is known") == 1
    config = json.loads(Path("runs/pretrain/config.json").read_text())
    assert config["processes"] == 2 and len(lines("runs/pretrain/log.jsonl")) == 1
    run(*PRETRAIN, "1", "--out", "alone")
    losses = [lines(f"{out}/log.jsonl")[0]["loss"] for out in ("alone", "runs/pretrain")]
    assert abs(losses[0] - losses[1]) < 0.3  # batch norm sees half a batch, the loss all of it
    assert "goes on after epoch 1" in run(*PRETRAIN, "2")


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(main, "PROCESSES", 2)
    with pytest.raises(data.UserError, match="--batch-size 7 is no multiple of 2 processes"):
        main.fit_batch(7, 100)
    assert main.fit_batch(64, 31) == 30


def test_ctrl_c_is_one_line_and_status_130_while_importing_and_in_training(world, elsewhere):
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    Path("early/PIL").mkdir(parents=True)
    Path("early/PIL/__init__.py").write_text(f"import os, signal; {stop}")
    environment = os.environ | {"PYTHONPATH": "early"}
    importing = [sys.executable, str(HERE / "main.py")]
    training = program(f"import simclr; simclr.nt_xent = lambda *_: {stop}")
    for command, place in ((importing, environment), (training, os.environ)):
        done = subprocess.run([*command, *PRETRAIN, "1"], env=place, capture_output=True, text=True)
        assert done.returncode == 130
        assert done.stderr.strip().startswith("interrupted; what is finished is kept")
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_closed_pipe_is_quiet(world, elsewhere):
    words = shlex.join([*program(), "data", *SCANS, *SIZE])
    done = subprocess.run(f"{words} | head -1", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1


def test_importing_is_silent_draws_nothing_and_needs_no_torchvision(tmp_path):
    """With a torchvision that fails to import, as one of a mismatched build does."""
    (tmp_path / "torchvision.py").write_text("raise ImportError('mismatched build')")
    code = "import torch; before = torch.get_rng_state(); import main; "
    code += "assert torch.equal(before, torch.get_rng_state()); "
    code += "import sys; sys.exit(main.main(['pretain']))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{HERE}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: no command 'pretain'.*\n", done.stderr)


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "pretain": "no command 'pretain'; did you mean pretrain?",
    "probe --data scans --task min": "no task 'min' here; found: mine, stroke; did you mean mine?",
    "probe --data scans": "--task is needed; found: mine, stroke",
    "probe --data scans --task mine --epochs 0": "probe --epochs 0 trains nothing",
    "pretrain --epoch 3": "pretrain does not know '--epoch'; did you mean --epochs?",
    "compare --seed 1": "compare does not know '--seed'; did you mean --seeds?",
    "predict": "see: python main.py predict --help",
    "predict --model runs/probe-mine/classifier.pt": "give the files or folders",
    "predict --model runs/probe-mine/classifier.pt no.png": "no.png is not there",
    "predict --model no.pt loose": "no classifier at no.pt",
    "predict --model runs/pretrain/encoder.pt loose": "encoder.pt is no classifier.pt",
    "explain --model runs/probe-mine/classifier.pt loose --data scans": "not both",
    "pretrain --image-size 16": "'16' is no whole number from 32 to 1024",
    "pretrain --image-size 2000": "'2000' is no whole number from 32 to 1024",
    "pretrain --batch-size 1": "'1' is no whole number from 2 to",
    "pretrain --epochs 1.5": "'1.5' is no whole number from 0 to",
    "pretrain --seed -1": "'-1' is no whole number from 0 to",
    "pretrain --seed 99999999999999999999": "is no whole number from 0 to",
    "pretrain --lr 0": "'0' is no number from 1e-09 to 1000",
    "pretrain --temperature nan": "'nan' is no number from",
    "compare --label-fractions 0": "'0' is no number from 1e-06 to 1",
    "pretrain --device gpu": "invalid choice: 'gpu'",
    "pretrain --device cuda": "no cuda device",
    "pretrain --init nowhere.pth": "nowhere.pth has no weights of a resnet18",
    "data --data scans --patient-pattern patient": "has no (group)",
    "data --data scans --patient-pattern (": "is no regular expression",
    "data --data scans --patient-pattern (nobody)": "in none of 56 names",
    "data --data nowhere": "nowhere is not a folder",
    "data --data empty": "no images below empty",
    "pretrain --data broken": "6 of 7 images cannot be read",
    "pretrain --data scans --out empty/notes.txt": "empty/notes.txt",
    "pretrain --data scans --out empty/notes.txt/below": "empty/notes.txt",
    "pretrain --data scans --out /proc/nowhere": "/proc/nowhere",
    "embed --data scans --out features.csv": "its name ends in .npz",
    "probe --encoder no.pt": "no.pt cannot be read",
    "probe --data scans --task mine --encoder runs/probe-mine/classifier.pt": "is a classifier",
    "probe --data loose --encoder runs/pretrain/encoder.pt": "--task is needed; found: none",
    "data --data scans --labels empty/notes.txt": "it needs path and label",
}


@pytest.fixture(scope="module")
def mistakes(world):
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("no image")
    Path("broken").mkdir()
    shutil.copy(next(Path("scans/stroke").rglob("*.png")), "broken/good.png")
    for k in range(6):
        Path(f"broken/{k}.png").write_bytes(b"")


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(mistakes, words):
    assert MISTAKES[words] in refused(*words.split())


def test_an_encoder_that_has_seen_test_images_is_refused_with_their_number(world, elsewhere):
    """One slice is enough: the other one of its patient counts, too."""
    place = Path(os.path.realpath("scans")).parent
    tested = [row["path"] for row in table(place / "runs/probe-mine/predictions.csv")]
    Path("flat").mkdir()
    for k, name in enumerate([tested[0], *tested[2:]]):
        shutil.copy(Path("scans", name), f"flat/{k}.png")
    run("pretrain", "--data", "flat", *SIZE, "--epochs", "0")
    for words in (["probe"], ["finetune"], ["compare"]):
        line = refused(*words, *MINE)
        assert "6 of the 6 test images of mine" in line and "<b>" in line


class Harm:
    """Pickled, it creates a file when somebody unpickles it."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("how", ["torn", "text", "pickle", "code", "list"])
def test_a_spoilt_checkpoint_is_one_line_and_runs_nothing(world, tmp_path, how):
    good, file = Path("runs/pretrain/checkpoint.pt").read_bytes(), io.BytesIO()
    torch.save({"weights": Harm()} if how == "code" else [1, 2], file)
    spoilt = {"torn": good[: len(good) // 2], "text": b"<html>404</html>", "list": file.getvalue()}
    spoilt |= {"pickle": pickle.dumps(Harm()), "code": file.getvalue()}
    bad = tmp_path / "bad.pt"
    bad.write_bytes(spoilt[how])
    assert "bad.pt" in refused("probe", *MINE, "--encoder", str(bad))
    assert "bad.pt" in refused("predict", "--model", str(bad), "loose")
    assert "bad.pt" in refused("pretrain", *SCANS, *SIZE, "--init", str(bad))
    shutil.copytree("runs/pretrain", tmp_path / "run")
    (tmp_path / "run/checkpoint.pt").write_bytes(spoilt[how])
    line = refused(*PRETRAIN, "2", "--out", str(tmp_path / "run"))
    assert "checkpoint.pt" in line and "--restart" in line
    assert not Path("harmed").exists()


def test_mutated_files_are_read_or_named(tmp_path):
    """`python tests/fuzz.py --count 10000` does more of the same."""
    outcome = fuzz.fuzz(tmp_path, count=200, seed=0)
    assert outcome["read"] and outcome["named"] and outcome.total() == 200
