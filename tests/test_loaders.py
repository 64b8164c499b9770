"""The loaders: contract, what may be changed on them, randomness between epochs and workers, DataLoader arguments."""

import multiprocessing
import os
import pickle
import signal
import sys

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

import utils


def get(split="train", transforms=None, **kwargs):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 64} | kwargs, "digits", transforms=transforms)[1]


def epoch(loader):
    """One epoch as (images, labels), in the order in which they come."""
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def holes(p=1.0, number=1):
    sizes = {"hole_height_range": (4, 4), "hole_width_range": (4, 4), "num_holes_range": (number, number)}
    return A.Compose([A.CoarseDropout(**sizes, fill=255, p=p)])


@pytest.mark.parametrize("split, size", [("train", 1437), ("test", 360)])
def test_contract(split, size):
    class_to_idx, loader = utils.get_CIFARdataset_with_loader(split, {"batch_size": 100}, dataset="digits")
    assert class_to_idx == loader.dataset.class_to_idx == {str(digit): digit for digit in range(10)}
    assert list(loader.dataset.classes) == list(class_to_idx)
    assert len(loader) == -(-size // 100) and len(loader.dataset) == size and loader.batch_size == 100
    images, labels = next(iter(loader))
    assert images.dtype == torch.float32 and images.view(100, -1).shape == (100, 3072)
    assert labels.shape == (100,) and labels.dtype == torch.int64


def test_test_images_are_the_files_normalised_and_in_order(digits):
    images, labels = epoch(get("test"))
    expected = (digits["test"].images / 255 - np.array(utils.CIFAR10_MEAN)) / np.array(utils.CIFAR10_STD)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-5)
    assert np.array_equal(labels, digits["test"].labels)


@pytest.mark.parametrize("split, shuffled", [("train", {}), ("test", {"shuffle": True})])
def test_shuffling_keeps_each_label_with_its_image(digits, split, shuffled):
    loader = get(split, transforms=utils.get_test_transforms(), **shuffled)
    images, labels = epoch(loader)
    known = {image.tobytes(): label for image, label in zip(digits[split].images, digits[split].labels)}
    assert all(known[utils.get_image_from_tensor(image).tobytes()] == label for image, label in zip(images, labels))
    assert np.array_equal(np.bincount(labels), np.bincount(digits[split].labels))
    assert not torch.equal(labels, epoch(loader)[1]) and not np.array_equal(labels, digits[split].labels)
    assert np.array_equal(epoch(get(split, shuffle=False))[1], digits[split].labels)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", [1, 2], ids=["as a batch", "by Albumentations"])
def test_augmentations_differ_between_epochs_batches_and_images(num_workers, number):
    """Albumentations by itself repeats what it draws at the same position of every epoch, in workers."""
    torch.manual_seed(0)
    loader = get(transforms=holes(number=number), shuffle=False, num_workers=num_workers)
    loader.dataset.images = np.zeros_like(loader.dataset.images)
    first, second = epoch(loader)[0], epoch(loader)[0]
    assert (first == second).flatten(1).all(dim=1).float().mean() < 0.01  # 29 * 29 places: 0.1 % by chance
    by_position = first[: 64 * 22].reshape(22, 64, -1)
    assert (by_position[1:] == by_position[0]).all(dim=2).float().mean() < 0.01
    assert len(first.flatten(1).unique(dim=0)) > 600


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_seed(workers):
    def two_epochs(seed, **options):
        torch.manual_seed(seed)
        loader = get(num_workers=workers, **options)
        return [*epoch(loader), *epoch(loader)]

    expected = two_epochs(7)
    for options in ({}, {"persistent_workers": workers > 0}):
        assert all(torch.equal(a, b) for a, b in zip(expected, two_epochs(7, **options)))
    assert not torch.equal(two_epochs(8)[0], expected[0])


def test_what_a_worker_gets_survives_the_way_to_it():
    """Where workers are not forked, as under Windows, they get it pickled."""
    loader = get(transforms=utils.get_test_transforms())
    dataset, collate, _ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    keys = next(iter(loader.batch_sampler))
    batches = [collate(data.__getitems__(keys)) for data in (loader.dataset, dataset)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*batches))


def test_the_order_follows_a_generator_of_the_users_own():
    generator = torch.Generator()
    first, second = (epoch(get(generator=generator.manual_seed(1)))[1] for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, epoch(get(generator=generator))[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_change_of_the_data_set_is_seen_in_the_next_epoch(digits, num_workers):
    loader = get("test", transforms=holes(p=0.0), num_workers=num_workers, persistent_workers=True)
    data, all_images, all_labels = loader.dataset, digits["test"].images, digits["test"].labels
    assert np.array_equal(epoch(loader)[0].permute(0, 2, 3, 1), all_images)
    data.data, data.targets = 255 - all_images[:100], (9 - all_labels[:100]).tolist()  # by torchvision's names
    images, labels = epoch(loader)
    assert np.array_equal(images.permute(0, 2, 3, 1), 255 - all_images[:100]) and len(loader) == 2
    assert np.array_equal(labels, 9 - all_labels[:100]) and labels.dtype == torch.int64
    data.images[:] = 7  # in place, as is the next one
    data.transforms[0].p = 1.0
    assert ((epoch(loader)[0] == 7).sum(dim=(1, 2, 3)) == 3 * (32 * 32 - 4 * 4)).all()
    data.transform = holes(p=0.0)
    assert (epoch(loader)[0] == 7).all()


def test_a_sampler_is_itself():
    sampler = WeightedRandomSampler(torch.eye(360)[0], 40)
    loader = get("test", sampler=sampler)
    assert loader.sampler is sampler
    sampler.weights = torch.eye(360)[7]
    assert epoch(loader)[1].tolist() == [int(loader.dataset.labels[7])] * 40


@pytest.mark.filterwarnings("error")
def test_kwargs_of_the_original_notebook_without_a_warning(monkeypatch):
    original = {"batch_size": 256, "shuffle": True, "num_workers": 4, "pin_memory": True}
    kwargs = dict(original)
    images, labels = epoch(get(**kwargs))
    assert len(images) == len(labels) == 1437 and kwargs == original
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert get(**kwargs).num_workers == 1  # no more workers than cores


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_an_epoch_can_be_started_again_after_the_stop_button():
    """Jupyter sends its interrupt to the kernel's whole process group; the stopped cell's loop stays where it was."""
    of_other_tests = multiprocessing.active_children()
    loader = get(num_workers=2)
    stopped = iter(loader)
    next(stopped), next(stopped)  # one from each worker, so that both have started
    workers = [child for child in multiprocessing.active_children() if child not in of_other_tests]
    assert len(workers) == loader.num_workers > 0
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(epoch(loader)[0]) == 1437 and len([*stopped]) == 21
    del stopped
    assert not [child for child in multiprocessing.active_children() if child not in of_other_tests]


def test_other_dataloader_arguments():
    assert len(get(drop_last=True)) == 22
    batches = [[3, 1, 2], [7]]
    for form in (list, torch.tensor, np.array):
        loader = get("test", batch_size=1, batch_sampler=[form(batch) for batch in batches])
        assert [labels.tolist() for _, labels in loader] == [loader.dataset.labels[batch].tolist() for batch in batches]
    shapes = next(iter(get(collate_fn=lambda samples: [(tuple(image.shape), type(label)) for image, label in samples])))
    assert shapes == [((3, 32, 32), int)] * 64
    assert next(iter(get(batch_size=None)))[0].shape == (3, 32, 32)


def test_a_single_sample_and_a_subset_of_the_data_set():
    data = get().dataset
    image, label = data[5]
    assert image.shape == (3, 32, 32) and label == data.labels[5] and isinstance(label, int)
    assert not all(torch.equal(image, data[5][0]) for _ in range(60))  # a new draw each time
    for indices in ([4, 2], torch.tensor([4, 2])):
        images, labels = next(iter(DataLoader(Subset(data, indices), batch_size=2)))  # with torch's default collate_fn
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == data.labels[[4, 2]].tolist()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"datasettype": "valid"}, ValueError, "'valid'.*'train' and 'test'"),
        ({"dataset": "mnist"}, ValueError, "'mnist'.*'cifar10' and 'digits'"),
        ({"kwargs": {"batchsize": 64}}, TypeError, "batchsize"),
        ({"kwargs": {"sampler": [1, 2], "shuffle": True}}, ValueError, "mutually exclusive with shuffle"),
    ],
)
def test_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        utils.get_CIFARdataset_with_loader(**{"datasettype": "test", "dataset": "digits"} | arguments)
