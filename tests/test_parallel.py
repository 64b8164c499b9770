"""Training in two processes, as `torchrun` starts them, is training in one with batches of twice the size.

The network has no batch normalisation, whose statistics would be those of half a batch; all else agrees up to rounding.
"""

import dataclasses
import datetime

import pytest
import torch
from conftest import end_state
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

import image_sets
import parallel
import utils

EPOCHS = 2


def few_images(dataset, split, root):
    """An even number of images to train on, and an odd number to test on."""
    whole, number = image_sets.load_images(dataset, split, root), {"train": 48, "test": 33}[split]
    return dataclasses.replace(whole, images=whole.images[:number], labels=whole.labels[:number])


def train(run, epochs, batch_size, wrapper, **more):
    """What a driver does that is started anew; returns the lists, and the misclassified samples of the last epoch."""
    utils.seed_everything(4)
    options, plain = {"batch_size": batch_size}, utils.get_test_transforms()
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options | more, "digits", transforms=plain)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options, "digits")
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 10), nn.LogSoftmax(1)
    model = wrapper(nn.Sequential(*layers))
    optimizer = utils.get_optimizer(model, lr=0.05, momentum=0.9)
    scheduler = utils.get_scheduler(optimizer, step_size=1, gamma=0.5, steps_per_epoch=len(train_loader))
    lists = run.resume({"seed": 4}, model, optimizer, scheduler)
    for epoch in range(len(lists[0]), epochs):
        torch.rand(parallel.rank())  # whatever else a driver may draw in one of the processes
        train_loader.sampler.set_epoch(epoch)
        utils.train(model, "cpu", train_loader, optimizer, utils.get_loss(), *lists[:2], scheduler)
        mistakes = utils.test(model, "cpu", test_loader, utils.get_loss(), *lists[2:])
        run.save(*lists)
    return lists, mistakes


def one_of_two(rank, folder):
    """Train to the end; train with a stop after every epoch; and save what only two processes can tell."""
    torch.set_num_threads(1)
    utils.load_images, utils.autocast_dtype = few_images, lambda device: torch.float32
    meeting = {"init_method": (folder / "meeting").as_uri(), "timeout": datetime.timedelta(seconds=100)}
    distributed.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    root = folder / f"of-rank-{rank}"  # that of rank 0 should do
    lists, mistakes = train(utils.Run("whole", root=root), EPOCHS, 8, DistributedDataParallel)
    ends = [torch.get_rng_state()]
    for epochs in range(1, EPOCHS + 1):
        train(utils.Run("in-parts", root=root), epochs, 8, DistributedDataParallel)
    ends.append(torch.get_rng_state())

    utils.seed_everything(4)
    _, loader = utils.get_CIFARdataset_with_loader("train", {"batch_size": 8}, "digits")
    loader.dataset.images = loader.dataset.images[:1].repeat(48, axis=0)
    loader.dataset.transforms = utils.get_train_transforms(flip=0.5, shift_scale_rotate=1)
    augmented, _ = next(iter(loader))

    norm = nn.BatchNorm1d(2)
    for values in (norm.running_mean, norm.weight):
        nn.init.constant_(values, rank + 1)
    batch = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)
    batches = [batch] * (2 - rank)  # one more in the first process
    utils.test(norm, "cpu", batches, utils.get_loss("cross_entropy"))

    results = {"lists": lists, "mistakes": [*map(tuple, mistakes)], "ends": ends, "augmented": augmented}
    results["norm"] = [norm.running_mean.tolist(), norm.weight.tolist()]
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(processes, tmp_path_factory):
    """(folder, results of rank 0, results of rank 1)."""
    folder = tmp_path_factory.mktemp("two")
    both = [processes.Process(target=one_of_two, args=(rank, folder)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    return folder, *(utils.load_weights(folder / f"{rank}.pt") for rank in range(2))


def test_the_history_is_that_of_one_process(two, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "load_images", few_images)
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float32)
    sampler = DistributedSampler(range(48), num_replicas=1, rank=0, seed=4)
    lists, mistakes = train(utils.Run("one", root=tmp_path), EPOCHS, 16, lambda model: model, sampler=sampler)
    _, first, second = two
    assert first["lists"] == second["lists"]
    for values, expected in zip(first["lists"], lists):
        assert values == pytest.approx(expected, rel=1e-5)
    # Each of the 33 test images counts once, and between them the processes give the samples that one gives.
    assert 33 * first["lists"][3][-1] / 100 == pytest.approx(33 - len(mistakes))
    found = [image.sum().item() for result in (first, second) for image, _, _ in result["mistakes"]]
    assert sorted(found) == sorted(image.sum().item() for image, _, _ in mistakes)


def test_one_process_writes_the_run_of_the_plain_network_which_goes_on_bit_for_bit(two):
    folder, *results = two
    assert not (folder / "of-rank-1").exists()
    weights = utils.load_weights(folder / "of-rank-0" / "whole" / "last.pt")
    assert set(weights) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert end_state(folder / "of-rank-0" / "in-parts") == end_state(folder / "of-rank-0" / "whole")
    for result in results:  # the random numbers of each process
        whole, in_parts = result["ends"]
        assert in_parts.equal(whole)


def test_another_number_of_processes_is_refused(two):
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the number of processes was 2 and is 1"):
        utils.Run("whole", root=two[0] / "of-rank-0").resume({"seed": 4}, model, utils.get_optimizer(model))


def test_processes_augment_differently(two):
    _, first, second = two
    assert not any(one.equal(other) for one in first["augmented"] for other in second["augmented"])


def test_processes_test_with_the_statistics_of_the_first_and_keep_their_weights(two):
    assert [result["norm"] for result in two[1:]] == [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]]]
