"""The loaders: contract, randomness between epochs and workers, and DataLoader arguments of older notebooks."""

import multiprocessing
import os
import signal
import warnings

import albumentations as A
import numpy as np
import pytest
import torch

import utils

ORIGINAL_KWARGS = {"batch_size": 256, "shuffle": True, "num_workers": 4, "pin_memory": True}


def get(split="train", **kwargs):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 64, **kwargs}, dataset="digits")[1]


def epoch(loader):
    """One epoch as (images, labels), in the order in which they come."""
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def augmented_only(**kwargs):
    """A loader whose images show their augmentation and nothing else: all black but for the holes."""
    transforms = A.Compose([A.CoarseDropout(hole_height_range=(4, 4), hole_width_range=(4, 4), fill=255, p=1)])
    _, loader = utils.get_CIFARdataset_with_loader(
        "train", {"batch_size": 64, "shuffle": False, **kwargs}, dataset="digits", transforms=transforms
    )
    loader.dataset.images = np.zeros_like(loader.dataset.images)
    return loader


@pytest.mark.parametrize("split, size", [("train", 1437), ("test", 360)])
def test_contract(split, size):
    class_to_idx, loader = utils.get_CIFARdataset_with_loader(split, {"batch_size": 100}, dataset="digits")
    assert class_to_idx == {str(digit): digit for digit in range(10)}
    assert len(loader) == -(-size // 100) and len(loader.dataset) == size and loader.batch_size == 100
    images, labels = next(iter(loader))
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (100,) and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_test_images_are_the_files_normalised_and_in_order(digits):
    images, labels = epoch(get("test"))
    pixels = np.stack([utils.get_image_from_tensor(image) for image in images])
    assert np.array_equal(pixels, digits["test"].images) and np.array_equal(labels, digits["test"].labels)


def test_the_test_loader_shuffles_when_asked_to(digits):
    _, labels = epoch(get("test", shuffle=True))
    assert not np.array_equal(labels, digits["test"].labels)
    assert np.array_equal(np.sort(labels), np.sort(digits["test"].labels))


def test_the_training_loader_shuffles_unless_told_not_to(digits):
    orders = [epoch(get())[1], epoch(get())[1], epoch(get(shuffle=False))[1]]
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[2], digits["train"].labels)
    assert all(np.array_equal(np.sort(order), np.sort(digits["train"].labels)) for order in orders)


def test_labels_stay_with_their_images(digits):
    """Shuffled, every image is still the one that the label belongs to."""
    _, loader = utils.get_CIFARdataset_with_loader(
        "train", {"batch_size": 64}, dataset="digits", transforms=utils.get_test_transforms()
    )
    images, labels = epoch(loader)
    known = {image.tobytes(): label for image, label in zip(digits["train"].images, digits["train"].labels)}
    assert all(known[utils.get_image_from_tensor(image).tobytes()] == label for image, label in zip(images, labels))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_augmentations_differ_between_epochs_batches_and_images(num_workers):
    torch.manual_seed(0)
    loader = augmented_only(num_workers=num_workers)
    first, second = epoch(loader)[0], epoch(loader)[0]
    same_place = (first == second).flatten(1).all(dim=1).float().mean()
    assert same_place < 0.01  # 29 * 29 places for a hole: 0.1 % by chance
    by_position = first[: 64 * 22].reshape(22, 64, -1)  # issue 266: the same position in every batch
    assert (by_position[1:] == by_position[0]).all(dim=2).float().mean() < 0.01
    assert len(first.flatten(1).unique(dim=0)) > 600


@pytest.mark.parametrize("options", [{}, {"persistent_workers": False}, {"multiprocessing_context": "spawn"}], ids=str)
def test_same_seed_same_batches_at_any_number_of_workers(options):
    def two_epochs(**kwargs):
        torch.manual_seed(7)
        loader = get(**kwargs)
        return [*epoch(loader), *epoch(loader), torch.rand(1)]  # and torch's generator is left in the same state

    expected = two_epochs(num_workers=0)
    got = two_epochs(num_workers=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    torch.manual_seed(8)
    assert not torch.equal(epoch(get(num_workers=0))[0], expected[0])


def test_kwargs_of_the_original_notebook_without_a_warning(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, labels = epoch(get(**ORIGINAL_KWARGS))
    assert len(images) == len(labels) == 1437
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert get(**ORIGINAL_KWARGS).num_workers == 1  # no more workers than cores


def test_workers_outlive_the_stop_button():
    """Jupyter sends its interrupt to the kernel's whole process group."""
    of_other_tests = multiprocessing.active_children()
    loader = get(num_workers=2)
    images, _ = epoch(loader)
    workers = [child for child in multiprocessing.active_children() if child not in of_other_tests]
    assert len(workers) == loader.num_workers > 0
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        worker.join(0.5)
    assert epoch(loader)[0].shape == images.shape


def test_kwargs_are_not_changed():
    kwargs = dict(ORIGINAL_KWARGS)
    utils.get_CIFARdataset_with_loader("test", kwargs, dataset="digits")
    assert kwargs == ORIGINAL_KWARGS


def test_other_dataloader_arguments():
    assert len(get(drop_last=True)) == 22
    sampler = torch.utils.data.SubsetRandomSampler(range(10))
    assert len(epoch(get(sampler=sampler))[1]) == 10
    batches = [[3, 1, 2], [7]]
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_sampler": batches}, dataset="digits")
    assert [labels.tolist() for _, labels in loader] == [loader.dataset.labels[batch].tolist() for batch in batches]
    collated = next(
        iter(get(collate_fn=lambda samples: [(tuple(image.shape), int(label)) for image, label in samples]))
    )
    assert len(collated) == 64 and collated[0][0] == (3, 32, 32)
    generator = torch.Generator()
    orders = [epoch(get(generator=generator.manual_seed(1)))[0] for _ in range(2)]
    assert torch.equal(*orders)


def test_a_single_sample_and_a_subset_of_the_data_set():
    data = get().dataset
    image, label = data[5]
    assert image.shape == (3, 32, 32) and label == data.labels[5] and isinstance(label, int)
    assert not all(torch.equal(image, data[5][0]) for _ in range(60))  # a new draw each time
    subset = torch.utils.data.Subset(data, [4, 2])
    for workers in (0, 1):  # a user's own loader, with torch's default collate_fn
        images, labels = next(iter(torch.utils.data.DataLoader(subset, batch_size=2, num_workers=workers)))
        assert images.shape == (2, 3, 32, 32) and labels.tolist() == data.labels[[4, 2]].tolist()
        assert labels.dtype == torch.int64
    single, _ = next(iter(get(batch_size=None)))
    assert single.shape == (3, 32, 32)
