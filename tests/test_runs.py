"""The files of a run, without training: what they say, and which checkpoints a run does not go on from."""

import json
import os

import pytest
import torch
from test_resume import HYPERPARAMETERS, READABLE, files, history

import runs
import utils
from models import Model


def small(root, hyperparameters=HYPERPARAMETERS, model=None, optimizer=None, scheduler=None):
    """A run of a network with one weight, resumed: (run, model, lists)."""
    model = model or torch.nn.Linear(1, 1, bias=False)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    run = runs.Run("small", data="none", root=root)
    return run, model, run.resume(hyperparameters, model, optimizer, scheduler)


def save_small(run, model, lists, test_acc):
    """An epoch that leaves the weight at its number and has the given test accuracy."""
    for values, value in zip(lists, (0.1, 2 / 3, 1e-30, test_acc)):
        values.append(value)
    with torch.no_grad():
        model.weight.fill_(len(lists[0]))
    run.save(*lists)


def start_small(root, test_acc):
    run, model, lists = small(root)
    for value in test_acc:
        save_small(run, model, lists, value)


def test_a_file_that_another_program_keeps_open_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """As a spreadsheet does under Windows, where an open file cannot be replaced."""
    start_small(tmp_path, test_acc=[10.0])
    run, model, lists = small(tmp_path)
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("history.csv"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        save_small(run, model, lists, 20.0)
    assert "history.csv: Permission denied" in capsys.readouterr().out
    assert len(history(tmp_path / "small")) == 1 and runs.load_weights(tmp_path / "small" / "last.pt")["weight"] == 2
    save_small(run, model, lists, 30.0)
    assert [float(row["test_acc"]) for row in history(tmp_path / "small")] == [10.0, 20.0, 30.0]


def test_a_learning_rate_in_a_tensor_is_recorded_as_a_number(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), momentum=0.9)
    run, model, lists = small(tmp_path, model=model, optimizer=optimizer)
    save_small(run, model, lists, 10.0)
    assert history(tmp_path / "small")[0]["lr"] == "0.5"


def test_last_and_best_weights_are_kept(tmp_path):
    start_small(tmp_path, test_acc=[10.0, 30.0, 20.0])
    folder = tmp_path / "small"
    assert runs.load_weights(folder / "last.pt")["weight"].item() == 3
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 2

    run, model, lists = small(tmp_path)  # the best so far is remembered, and the first of equals stays
    save_small(run, model, lists, 30.0)
    assert runs.load_weights(folder / "last.pt")["weight"].item() == 4
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 2
    summary = json.loads((folder / "run.json").read_text())
    assert (summary["epochs_done"], summary["best_epoch"]) == (4, 2)
    assert (summary["best_test_accuracy_percent"], summary["last_test_accuracy_percent"]) == (30.0, 30.0)
    assert summary["hyperparameters"] == HYPERPARAMETERS

    run, model, lists = small(tmp_path)
    save_small(run, model, lists, 31.0)
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 5


def test_pandas_reads_the_history(tmp_path):
    pandas = pytest.importorskip("pandas")
    start_small(tmp_path, test_acc=[10.0, 100 / 3])
    frame = pandas.read_csv(tmp_path / "small" / "history.csv")
    assert {"epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"} <= set(frame.columns)
    assert frame["epoch"].tolist() == [1, 2]
    assert (frame["seconds"] >= 0).all()
    expected = {
        "lr": [0.5, 0.5],
        "train_loss": [0.1, 0.1],
        "train_acc": [2 / 3, 2 / 3],
        "test_loss": [1e-30, 1e-30],
        "test_acc": [10.0, 100 / 3],
    }
    rows = history(tmp_path / "small")
    for column, values in expected.items():
        assert frame[column].tolist() == pytest.approx(values, rel=1e-14)
        assert [float(row[column]) for row in rows] == values  # all digits are there, to compare runs bit for bit


def test_going_on_rewrites_the_same_files(tmp_path):
    start_small(tmp_path, test_acc=[10.0, 20.0])
    before = files(tmp_path / "small")
    for name in READABLE:  # lost, say, in a copy from elsewhere; the checkpoint has it all
        (tmp_path / "small" / name).unlink()
    run = runs.Run("small", data="of who opens it", root=tmp_path)  # not what it was trained on
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run.resume(HYPERPARAMETERS, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2))
    after = files(tmp_path / "small")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name] == after[name], name


def test_a_checkpoint_of_before_it_said_what_made_it_goes_on(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    checkpoint = runs.load_weights(tmp_path / "small" / "checkpoint.pt")
    del checkpoint["made_by"]
    torch.save(checkpoint, tmp_path / "small" / "checkpoint.pt")
    run, model, lists = small(tmp_path)
    assert "threads" not in json.loads((run / "run.json").read_text())  # rather than those of who opens it
    save_small(run, model, lists, 20.0)
    assert json.loads((run / "run.json").read_text())["threads"] == torch.get_num_threads()


def test_a_run_that_was_refused_cannot_be_overwritten(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    before = files(tmp_path / "small")
    model = torch.nn.Linear(1, 1, bias=False)
    run = runs.Run("small", root=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        run.resume(HYPERPARAMETERS | {"seed": 5}, model, torch.optim.SGD(model.parameters(), lr=0.5))
    with pytest.raises(RuntimeError, match="before resume"):
        save_small(run, model, ([], [], [], []), 20.0)
    assert files(tmp_path / "small") == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_new_run_says_that_the_model_comes_from_another(finished, tmp_path, capsys):
    """As when a notebook is given another RUN_NAME, and the cell that makes the model is not run again."""
    if finished:
        start_small(tmp_path, test_acc=[10.0])
    _, model, _ = small(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    capsys.readouterr()
    runs.Run("other", root=tmp_path).resume(HYPERPARAMETERS, model, optimizer)
    assert "a new run from the weights that another run left" in capsys.readouterr().out
    small(tmp_path / "elsewhere")
    assert capsys.readouterr().out.strip().endswith("small: a new run")


def test_lists_that_do_not_follow_the_last_save_are_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    run, model, lists = small(tmp_path)
    before = files(run.folder)
    with pytest.raises(ValueError, match="1, 1, 1, 1 epochs and 1"):
        run.save(*lists)
    with pytest.raises(ValueError, match="1, 2, 2, 2 epochs and 1"):
        save_small(run, model, ([], *lists[1:]), 20.0)
    with pytest.raises(ValueError, match="one entry appended"):
        save_small(run, model, [[0.0, 0.0] for _ in range(4)], 20.0)
    assert files(run.folder) == before


# ---- what must not go on ------------------------------------------------------------------------------------------


def assert_refused(root, named, **changes):
    """A changed run is refused, the message says each of `named`, and neither objects nor files are touched."""
    model = changes.setdefault("model", torch.nn.Linear(1, 1, bias=False))
    optimizer = changes.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    changes.setdefault("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, step_size=2))
    objects = [changes[name] for name in ("model", "optimizer", "scheduler")]
    before = files(root / "small"), torch.get_rng_state(), [repr(thing.state_dict()) for thing in objects]
    with pytest.raises(ValueError) as refusal:
        small(root, **changes)
    message = str(refusal.value)
    for words in (*named, str(root / "small"), "start afresh", "delete"):
        assert words in message, f"{words!r} is not in: {message}"
    assert files(root / "small") == before[0]
    assert torch.get_rng_state().equal(before[1])
    assert [repr(thing.state_dict()) for thing in objects] == before[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.1}, ["lr", "0.05", "0.1"]),
        ({"seed": 5}, ["seed", "4", "5"]),
        ({"batch_size": 64, "dropout": 0.0}, ["batch_size", "32", "64", "dropout", "0.05", "0.0"]),
        ({"nesterov": True}, ["nesterov", "True"]),
        ({"lr": 0.1, "epochs": 9}, ["lr", "0.05", "0.1"]),
    ],
)
def test_other_hyperparameters_are_refused(change, named, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    assert_refused(tmp_path, named, hyperparameters=HYPERPARAMETERS | change)
    _, model, lists = small(tmp_path)  # with the old values it still goes on
    assert lists[3] == [10.0] and model.weight.item() == 1


def test_a_hyperparameter_left_out_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    fewer = {name: value for name, value in HYPERPARAMETERS.items() if name != "dropout"}
    assert_refused(tmp_path, ["dropout", "0.05"], hyperparameters=fewer)


@pytest.mark.parametrize("epochs", [1, 2, 80])
def test_the_number_of_epochs_may_change(epochs, tmp_path, capsys):
    start_small(tmp_path, test_acc=[10.0])
    _, _, lists = small(tmp_path, HYPERPARAMETERS | {"epochs": epochs})
    assert f"going on after epoch 1 of {epochs}" in capsys.readouterr().out
    assert lists == ([0.1], [2 / 3], [1e-30], [10.0])
    assert json.loads((tmp_path / "small" / "run.json").read_text())["hyperparameters"]["epochs"] == epochs


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: torch.nn.Linear(1, 2, bias=False), ["weight", "(1, 1)", "(2, 1)"]),
        (lambda: torch.nn.Linear(1, 1, bias=True), ["bias", "absent", "(1,)"]),
        (lambda: torch.nn.BatchNorm1d(1), ["bias", "absent", "more difference"]),
    ],
    ids=["wider", "one more parameter", "another layer"],
)
def test_another_network_is_refused(network, named, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    assert_refused(tmp_path, [*named, "network"], model=network())


def test_a_changed_layer_is_refused_though_its_weights_would_fit(tmp_path):
    for dilation in ((2, 2), (1, 1)):
        model = Model()
        model.C1[2].conv.dilation = dilation
        run = utils.Run("net", root=tmp_path)
        if dilation == (2, 2):
            run.resume({}, model, utils.get_optimizer(model))
            run.save([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(
        ValueError, match=r"a layer was .*dilation=\(2, 2\).* and is .*48, kernel_size=\(3, 3\), stride"
    ):
        run.resume({}, model, utils.get_optimizer(model))


def test_a_network_that_another_torch_prints_otherwise_is_the_same(tmp_path):
    """As torch 2.14 prints `bias=True` in BatchNorm2d, which 2.6 does not."""
    start_small(tmp_path, test_acc=[10.0])
    path = tmp_path / "small" / "checkpoint.pt"
    checkpoint = runs.load_weights(path)
    checkpoint["network"] = "Linear(another=wording)"
    checkpoint["made_by"]["versions"]["torch"] = "1.13.1"
    torch.save(checkpoint, path)
    assert small(tmp_path)[2][3] == [10.0]


def test_a_change_of_folder_loses_no_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, model, lists = small("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    save_small(run, model, lists, 10.0)
    assert (tmp_path / "runs" / "small" / "checkpoint.pt").exists()


def test_another_optimizer_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    model = torch.nn.Linear(1, 1, bias=False)
    assert_refused(tmp_path, ["SGD", "Adam"], model=model, optimizer=torch.optim.Adam(model.parameters()))


def test_other_groups_of_parameters_are_refused(tmp_path):
    def start(decay):
        model = torch.nn.Linear(1, 1)
        return {"model": model, "optimizer": utils.get_optimizer(model, lr=0.5, weight_decay=0.1, decay=decay)}

    run, model, lists = small(tmp_path, **start("all"))
    save_small(run, model, lists, 10.0)
    assert_refused(tmp_path, ["parameters in the optimizer was 2 and is 1 + 1"], **start("weights"))


def test_another_scheduler_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    assert_refused(tmp_path, ["StepLR", "Cosine"], model=model, optimizer=optimizer, scheduler=cosine)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "PolynomialLR", "OneCycleLR"])
def test_a_schedule_of_another_length_is_refused(name, tmp_path):
    """Its state would bring the old length back: a cosine would rise again after it, others stay at zero."""

    def start(epochs):
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = utils.get_optimizer(model, "SGD", lr=0.5)
        options = {"steps_per_epoch": 10} if name == "OneCycleLR" else {}
        scheduler = utils.get_scheduler(optimizer, name=name, epochs=epochs, **options)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    run, model, lists = small(tmp_path, **start(4))
    save_small(run, model, lists, 10.0)
    assert_refused(tmp_path, ["length of the schedule", "4", "8"], **start(8))
    assert small(tmp_path, **start(4))[2][3] == [10.0]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "not one"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    path = tmp_path / "small" / "checkpoint.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {
        "cut": good[:-10],
        "empty": b"",
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "not one": b"epoch,lr\n",
    }
    path.write_bytes(bad[damage])
    assert_refused(tmp_path, ["checkpoint.pt", "damaged"])
    path.write_bytes(good)
    assert small(tmp_path)[2][3] == [10.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ExponentialLR", {"gamma": 0.5}),
        ("CosineAnnealingLR", {"T_max": 4}),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 10}),
        ("MultiStepLR", {"milestones": [1, 3], "gamma": 0.5}),
        ("LinearLR", {}),
    ],
)
def test_other_schedulers_go_on_as_well(name, options, tmp_path):
    scheduler_class = getattr(torch.optim.lr_scheduler, name)

    def start():
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = utils.get_optimizer(model, "SGD", lr=0.5)
        scheduler = scheduler_class(optimizer, **options)
        return optimizer, scheduler, *small(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)

    rates = []
    for _ in range(4):  # every epoch in another process, as it were
        optimizer, scheduler, run, model, lists = start()
        optimizer.step()
        scheduler.step()
        save_small(run, model, lists, 10.0)
        rates.append(optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.5, momentum=0.9)
    scheduler = scheduler_class(optimizer, **options)
    for rate in rates:
        optimizer.step()
        scheduler.step()
        assert rate == scheduler.get_last_lr()[0]


@pytest.mark.parametrize("name", ["checkpoint.pt", "history.csv", "last.pt", "best.pt"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_stop_while_the_epoch_is_being_saved(call, name, tmp_path, monkeypatch):
    """Whatever was written by then, the next start finds whole files and brings them all to the same epoch."""
    start_small(tmp_path, test_acc=[10.0, 20.0])
    whole = getattr(os, call)

    def pressed(*arguments):
        if call == "fsync":
            being_written = os.readlink(f"/proc/self/fd/{arguments[0]}") if os.path.exists("/proc/self/fd") else name
        else:
            being_written = str(arguments[1])
        if name in being_written:
            raise KeyboardInterrupt
        return whole(*arguments)

    run, model, lists = small(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, pressed)
        with pytest.raises(KeyboardInterrupt):
            save_small(run, model, lists, 30.0)
    assert files(tmp_path / "small").keys() == {"checkpoint.pt", *READABLE}, "something half written stays"
    done = 2 if name == "checkpoint.pt" else 3
    run, model, lists = small(tmp_path)
    assert lists[3] == [10.0, 20.0, 30.0][:done]
    assert [float(row["test_acc"]) for row in history(tmp_path / "small")] == lists[3]
    assert runs.load_weights(tmp_path / "small" / "last.pt")["weight"].flatten().tolist() == [done]
    assert runs.load_weights(tmp_path / "small" / "best.pt")["weight"].flatten().tolist() == [done]
    assert model.weight.item() == done


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimizer_goes_on_in_its_own_way_of_computing(tmp_path, name):
    """A checkpoint of a GPU, whose optimizer was fused, on a device where it is not, and back."""
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for epoch, fused in enumerate([True, False, True]):
        model = Model()
        optimizer = utils.get_optimizer(model, name, fused=fused)
        run = utils.Run("run", root=tmp_path)
        lists = run.resume({"epochs": 3}, model, optimizer)
        assert [group["fused"] for group in optimizer.param_groups] == [fused] and len(lists[0]) == epoch
        utils.train(model, "cpu", [(images, labels)], optimizer, utils.get_loss(), *lists[:2])
        utils.test(model, "cpu", [(images, labels)], utils.get_loss(), *lists[2:])
        run.save(*lists)
