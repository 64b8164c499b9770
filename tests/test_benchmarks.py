"""What the scripts in benchmarks/ print and read, from results made by hand."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import accuracy
import optuna
import search


def test_the_table_gives_mean_and_deviation_over_the_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    for run, seed, test_acc in [
        ("s9-cpu-epochs80", 4, [*range(1, 80), 80.0]),
        ("s9-cpu-epochs80", 5, [*range(1, 80), 82.0]),
        ("short-cpu-epochs12", 4, [*range(1, 12), 81.0]),
    ]:
        result = {"recipe": "", "unaugmented_train_accuracy_percent": 90.0 + seed}
        result |= {"hyperparameters": {"seed": seed, "dataset": "some"}, "history": [{"test_acc": a} for a in test_acc]}
        (tmp_path / f"{run}-seed{seed}.json").write_text(json.dumps(result))
    table = accuracy.accuracy_table(accuracy.read_results("cpu", "some", "."))
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")][2:] == [
        ["s9", "80", "4, 5", "10.00 ± 0.00", "20.00 ± 0.00", "40.00 ± 0.00", "81.00 ± 1.41", "94.50 ± 0.71"],
        ["short", "12", "4", "10.00", "", "", "81.00", "94.00"],
    ]


@pytest.mark.parametrize("now", [{"lr": 0.2, "cutout": 0.3}, {"lr": 0.1}, {"lr": 0.1, "cutout": 0.3, "decay": "all"}])
def test_a_result_of_another_recipe_is_refused(now, tmp_path):
    path, then = tmp_path / "result.json", {"lr": 0.1, "cutout": 0.3}
    path.write_text(json.dumps({"hyperparameters": then | {"seed": 4, "images": 50_000, "classes": "cat/dog"}}))
    assert accuracy.is_done(path, then) and not accuracy.is_done(tmp_path / "none.json", then)
    with pytest.raises(SystemExit, match=r"lr|cutout|decay"):
        accuracy.is_done(path, now)


def test_a_journal_that_lost_its_last_bytes_goes_on(tmp_path):
    journal = tmp_path / "search.journal"
    for value in (1.0, 2.0, 3.0):
        search.open_study("arms", str(journal)).add_trial(optuna.create_trial(value=value))
        if value == 2:
            journal.write_bytes(journal.read_bytes()[:-20])  # as of a process that was killed
    size = journal.stat().st_size
    values = [trial.value for trial in search.open_study("arms", str(journal)).trials]
    assert values[0] == 1.0 and values[-1] == 3.0 and journal.stat().st_size == size
