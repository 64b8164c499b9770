"""What the scripts in benchmarks/ print and read, from results made by hand."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import accuracy
import optuna
import search


def result(seed, test_acc):
    history = [{"epoch": i, "test_acc": value, "seconds": 60} for i, value in enumerate(test_acc, start=1)]
    settings = {"seed": seed, "dataset": "some images"}
    return {
        "recipe": "",
        "unaugmented_train_accuracy_percent": 90.0 + seed,
        "hyperparameters": settings,
        "history": history,
    }


def test_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    (tmp_path / "accuracy").mkdir()
    runs = {
        "s9-cpu-epochs80": ([70.0] * 79 + [80.0], [70.0] * 79 + [82.0]),
        "short-cpu-epochs12": ([50.0] * 11 + [81.0],),
    }
    for name, seeds in runs.items():
        for seed, test_acc in enumerate(seeds, start=4):
            (tmp_path / "accuracy" / f"{name}-seed{seed}.json").write_text(json.dumps(result(seed, test_acc)))
    table = accuracy.accuracy_table(accuracy.read_results("cpu", "some images", "accuracy"))
    same = ["70.00 ± 0.00"] * 3  # 1.41 is the deviation of two values that differ by 2, with n - 1 below the root
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")][2:] == [
        ["s9", "80", "4, 5", *same, "81.00 ± 1.41", "94.50 ± 0.71"],
        ["short", "12", "4", "50.00", "", "", "81.00", "94.00"],
    ]


@pytest.mark.parametrize("now", [{"lr": 0.2, "cutout": 0.3}, {"lr": 0.1}, {"lr": 0.1, "cutout": 0.3, "decay": "all"}])
def test_a_result_of_another_recipe_is_refused(now, tmp_path):
    path = tmp_path / "result.json"
    then = {"lr": 0.1, "cutout": 0.3}
    path.write_text(json.dumps({"hyperparameters": then | {"seed": 4, "images": 50_000, "classes": "cat/dog"}}))
    assert accuracy.read_result(path, then) and accuracy.read_result(tmp_path / "none.json", then) is None
    with pytest.raises(SystemExit, match=r"is of a run with another (lr|cutout|decay); delete it to train again"):
        accuracy.read_result(path, now)


def test_a_journal_that_lost_its_last_bytes_goes_on(tmp_path):
    journal = tmp_path / "search.journal"
    study = search.open_study("arms", str(journal))
    for value in (1.0, 2.0):
        study.add_trial(optuna.create_trial(value=value))
    journal.write_bytes(journal.read_bytes()[:-20])  # as of a process that was killed
    study = search.open_study("arms", str(journal))
    study.add_trial(optuna.create_trial(value=3.0))
    values = [trial.value for trial in search.open_study("arms", str(journal)).trials]
    assert values[0] == 1.0 and values[-1] == 3.0
    size = journal.stat().st_size
    search.open_study("arms", str(journal))
    assert journal.stat().st_size == size
