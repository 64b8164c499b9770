"""The accuracy study's arithmetic on histories made by hand, and the split that its trials are judged on."""

import csv
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import accuracy
import trials

from recipes import RECIPES


def result(recipe, seed, test_acc, seconds):
    history = [{"epoch": i, "test_acc": value, "seconds": seconds} for i, value in enumerate(test_acc, start=1)]
    ends = {"unaugmented_train_accuracy_percent": 90.0 + seed, "test_accuracy_percent": test_acc[-1]}
    kind = {"recipe": recipe, "epochs": len(history), "seed": seed, "data": "some images", "device": "cpu"}
    return kind | {"history": history} | ends


@pytest.fixture
def groups():
    """s9 ends at 80 and 82, so the goal is 81; tuned reaches it in epochs 8 and 12, of 30 seconds each."""
    slow = [70.0] * 78
    return {
        ("s9", 80): [result("s9", 4, [*slow, 79.0, 80.0], 60), result("s9", 5, [*slow, 85.0, 82.0], 60)],
        ("tuned", 12): [result("tuned", 4, [50.0] * 7 + [81.0] * 5, 30), result("tuned", 5, [60.0] * 11 + [83.0], 30)],
    }


def test_accuracy_table(groups):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy.accuracy_table(groups).split("\n")]
    deviation = "1.41"  # of two values that differ by 2, with n - 1 below the root
    assert rows[2] == [
        *("s9", "80", "4, 5", "70.00 ± 0.00", "70.00 ± 0.00", "70.00 ± 0.00"),
        *(f"81.00 ± {deviation}", "94.50 ± 0.71", "1 of 2 do"),
    ]
    assert rows[3] == [
        *("tuned", "12", "4, 5", "70.50 ± 14.85", "", ""),
        *(f"82.00 ± {deviation}", "94.50 ± 0.71", "epoch 10"),
    ]


def test_results_are_read_back_in_groups_of_one_device_and_data_set(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    every = [result for results in groups.values() for result in results]
    for number, one in enumerate([*every, every[0] | {"device": "cuda"}, every[0] | {"data": "other images"}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    assert accuracy.read_results("cpu", "some images") == groups
    assert accuracy.read_results("cuda", "some images") == {("s9", 80): [every[0] | {"device": "cuda"}]}


def test_first_epoch_that_reaches_an_accuracy(groups):
    run = groups["tuned", 12][0]
    assert accuracy.first_reaching(run, 81.0) == 8
    assert accuracy.first_reaching(run, 81.01) is None


def test_times_stand_by_machine_beside_the_plain_loop_of_the_same_processor_threads_and_type(
    groups, tmp_path, monkeypatch
):
    """12 seconds for 10,000 images are 60 for 50,000, so the plain loop's 80 epochs take 80 minutes."""
    monkeypatch.setattr(accuracy, "SPEED", tmp_path)
    for name, dtype, seconds in (
        ("another CPU", "torch.b", 24.0),
        ("the CPU", "torch.a", 36.0),
        ("the CPU", "torch.b", 12.0),
    ):
        measured = {"device": name, "threads": 2, "type": dtype, "train_images": 10_000}
        measured["epoch_seconds"] = {"reference": seconds}
        (tmp_path / f"speed-{name}-{dtype}.json").write_text(json.dumps(measured))
    here = {"processor": "the CPU", "threads": 2, "type": "torch.b", "hyperparameters": {"images": 50_000}}
    for results in groups.values():
        for one in results:
            one |= here | {"threads": 1 if one["recipe"] == "s9" and one["seed"] == 4 else 2}
    assert accuracy.time_table(groups).split("\n") == [
        "| minutes on | s9, 80 epochs | tuned, 12 epochs | plain loop, 80 epochs |",
        "| --- | --- | --- | --- |",
        "| the CPU, 1 thread, b | 80 |  |  |",
        "| the CPU, 2 threads, b | 80 (1.0) | 6 (13.3) | 80 |",
    ]


def test_plot(groups, tmp_path):
    accuracy.plot(groups, tmp_path / "plot.png")
    axis = plt.gcf().axes[0]
    means = [line for line in axis.lines if len(line.get_xdata()) in (80, 12)]
    assert [line.get_ydata()[-1] for line in means] == [81.0, 82.0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "s9, 80 epochs: 81.00 % (2 seeds)",
        "where s9 ends",
        "tuned, 12 epochs: 82.00 % (2 seeds)",
    ]
    assert plt.imread(tmp_path / "plot.png").std() > 0
    plt.close("all")


def test_ship_weights_copies_a_finished_run_and_says_where_it_comes_from(groups, tmp_path, monkeypatch):
    for place in ("ROOT", "RESULTS", "RUNS"):
        (tmp_path / place).mkdir()
        monkeypatch.setattr(accuracy, place, tmp_path / place)
    finished = groups["s9", 80][0]
    (tmp_path / "RESULTS" / "s9-cpu-epochs80-seed4.json").write_text(json.dumps(finished))
    with pytest.raises(SystemExit, match="the weights of s9-cpu-epochs80-seed4 are gone"):
        accuracy.ship_weights("s9", 4, "cpu")
    assert not (tmp_path / "ROOT" / "weights").exists()

    (tmp_path / "RUNS" / "s9-cpu-epochs80-seed4").mkdir()
    (tmp_path / "RUNS" / "s9-cpu-epochs80-seed4" / "last.pt").write_bytes(b"trained")
    summary = tmp_path / "RUNS" / "s9-cpu-epochs80-seed4" / "run.json"
    summary.write_text(json.dumps({"last_test_accuracy_percent": 79.0}))
    with pytest.raises(SystemExit, match="s9-cpu-epochs80-seed4 is of another run"):
        accuracy.ship_weights("s9", 4, "cpu")
    assert not (tmp_path / "ROOT" / "weights").exists()

    summary.write_text(json.dumps({"last_test_accuracy_percent": finished["test_accuracy_percent"]}))
    accuracy.ship_weights("s9", 4, "cpu")
    assert (tmp_path / "ROOT" / "weights" / "s9.pt").read_bytes() == b"trained"
    shipped = json.loads((tmp_path / "ROOT" / "weights" / "s9.json").read_text())
    assert shipped == {key: value for key, value in finished.items() if key != "history"}


@pytest.mark.parametrize("name", trials.CHOSEN)
def test_a_chosen_recipe_is_the_best_of_the_trials_nearest_to_its_length(name):
    recipe = RECIPES[name]
    assert recipe == {"epochs": recipe["epochs"]} | trials.START | trials.TRIALS[trials.CHOSEN[name]]
    with trials.RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_acc"] != "diverged"]
    longest = max(epochs for row in rows if (epochs := int(row["epochs"])) <= recipe["epochs"])
    best = max((row for row in rows if int(row["epochs"]) == longest), key=lambda row: float(row["validation_acc"]))
    assert best["trial"] == trials.CHOSEN[name]


def test_split_is_stratified_and_fixed():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 5000))
    training, validation = trials.split(labels)
    assert np.bincount(labels[validation]).tolist() == [500] * 10
    assert sorted(training + validation) == list(range(50_000))
    assert trials.split(labels)[1] == validation
