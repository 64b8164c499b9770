"""The tables of benchmarks/accuracy.py, from histories made by hand."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import accuracy


def result(recipe, seed, test_acc, seconds):
    history = [{"epoch": i, "test_acc": value, "seconds": seconds} for i, value in enumerate(test_acc, start=1)]
    ends = {"unaugmented_train_accuracy_percent": 90.0 + seed, "test_accuracy_percent": test_acc[-1]}
    kind = {"recipe": recipe, "epochs": len(history), "seed": seed, "data": "some images", "device": "cpu"}
    where = {"processor": "the CPU", "threads": 2, "type": "torch.b"}
    return kind | where | {"hyperparameters": {"images": 50_000, "seed": seed}, "history": history} | ends


@pytest.fixture
def groups():
    return {
        ("s9", 80): [result("s9", 4, [70.0] * 79 + [80.0], 60), result("s9", 5, [70.0] * 79 + [82.0], 60)],
        ("tuned", 12): [result("tuned", 4, [50.0] * 7 + [81.0] * 5, 30), result("tuned", 5, [60.0] * 11 + [83.0], 30)],
    }


def rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_accuracies(groups):
    deviation = "1.41"  # of two values that differ by 2, with n - 1 below the root
    same = ["70.00 ± 0.00"] * 3
    assert rows(accuracy.accuracy_table(groups))[2:] == [
        ["s9", "80", "4, 5", *same, f"81.00 ± {deviation}", "94.50 ± 0.71"],
        ["tuned", "12", "4, 5", "70.50 ± 14.85", "", "", f"82.00 ± {deviation}", "94.50 ± 0.71"],
    ]


def test_times_beside_the_plain_loop_of_the_same_processor_threads_and_type(groups, tmp_path, monkeypatch):
    """12 seconds for 10,000 images are 60 for 50,000, so the plain loop's 80 epochs take 80 minutes."""
    monkeypatch.setattr(accuracy, "SPEED", tmp_path)
    for name, dtype, seconds in (("another", "torch.b", 24), ("the CPU", "torch.a", 36), ("the CPU", "torch.b", 12)):
        measured = {"device": name, "threads": 2, "type": dtype, "train_images": 10_000}
        measured["epoch_seconds"] = {"reference": seconds}
        (tmp_path / f"speed-{name}-{dtype}.json").write_text(json.dumps(measured))
    assert rows(accuracy.time_table(groups))[2:] == [
        ["the CPU, 2 threads, b", "80 minutes, 1.0 times as fast", "6 minutes, 13.3 times as fast", "80 minutes"]
    ]


def test_results_are_of_one_device_and_data_set(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    every = [result for results in groups.values() for result in results]
    for number, one in enumerate([*every, every[0] | {"device": "cuda"}, every[0] | {"data": "other images"}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    assert accuracy.read_results("cpu", "some images") == groups
    (tmp_path / "0.json").write_text(json.dumps(every[0] | {"hyperparameters": {"images": 50_000, "lr": 1.0}}))
    with pytest.raises(SystemExit, match="has runs of s9, 80 epochs, of different settings; delete the old ones"):
        accuracy.read_results("cpu", "some images")


@pytest.mark.parametrize("now", [{"lr": 0.2, "cutout": 0.3}, {"lr": 0.1}, {"lr": 0.1, "cutout": 0.3, "decay": "all"}])
def test_a_result_of_another_recipe_is_refused(now, tmp_path):
    path = tmp_path / "result.json"
    then = {"lr": 0.1, "cutout": 0.3}
    path.write_text(json.dumps({"hyperparameters": then | {"seed": 4, "images": 50_000, "classes": "cat/dog"}}))
    assert accuracy.read_result(path, then) and accuracy.read_result(tmp_path / "none.json", then) is None
    with pytest.raises(SystemExit, match=r"is of a run with another (lr|cutout|decay); delete it to train again"):
        accuracy.read_result(path, now)
