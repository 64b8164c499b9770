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
from torch.utils.data import DataLoader, Subset

import utils


def get(split="train", transforms=None, **kwargs):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 64} | kwargs, "digits", transforms=transforms)[1]


def epoch(loader):
    """One epoch as (images, labels), in the order in which they come."""
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def holes(p):
    return A.Compose([A.CoarseDropout((1, 1), (4, 4), (4, 4), fill=255, p=p)])


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_and_labels_are_the_files_normalised_and_in_training_augmented(digits, split):
    class_to_idx, loader = utils.get_CIFARdataset_with_loader(split, {"batch_size": 100, "shuffle": False}, "digits")
    assert class_to_idx == loader.dataset.class_to_idx == {str(digit): digit for digit in range(10)}
    images, labels = epoch(loader)
    assert images.dtype == torch.float32 and images[0].shape == (3, 32, 32) and loader.batch_size == 100
    assert labels.dtype == torch.int64 and np.array_equal(labels, digits[split].labels)
    mean, std = np.array([[0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]])  # as published, red first
    expected = (digits[split].images / 255 - mean) / std
    unchanged = np.isclose(images.permute(0, 2, 3, 1), expected, atol=1e-5).all(axis=(1, 2, 3)).mean()
    assert abs(unchanged - {"train": 0.9 * 0.9 * 0.7, "test": 1}[split]) < {"train": 0.06, "test": 1e-9}[split]


def test_training_images_are_shuffled_anew_each_epoch_with_their_labels(digits):
    def pairs(images, labels):
        return [(np.asarray(image).tobytes(), int(label)) for image, label in zip(images, labels)]

    loader, files = get(transforms=holes(p=0.0)), pairs(digits["train"].images, digits["train"].labels)
    first, second = (pairs(images.permute(0, 2, 3, 1), labels) for images, labels in map(epoch, [loader] * 2))
    assert sorted(first) == sorted(second) == sorted(files) and first != second and files not in (first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("transforms", [utils.get_train_transforms(cutout=1, crop_padding=4), A.GaussNoise(p=1)])
def test_augmentations_follow_the_seed_and_differ_between_epochs_batches_and_images(digits, num_workers, transforms):
    # Albumentations by itself, as with noise, repeats what it draws at the same position of every epoch, in workers.
    def epochs(number, seed):
        torch.manual_seed(seed)
        loader = get(transforms=transforms, shuffle=False, num_workers=num_workers)
        loader.dataset.images, loader.dataset.labels = digits["test"].images[[0] * 640], np.zeros(640, int)
        return torch.stack([epoch(loader)[0].flatten(1) for _ in range(number)])

    first, second = epochs(2, seed=0)
    by_position = first.view(10, 64, -1)
    assert len(first.unique(dim=0)) > 600 and not (first == second).all(dim=1).any()
    assert not (by_position[1:] == by_position[0]).all(dim=2).any()
    assert torch.equal(epochs(1, seed=0)[0], first) and not torch.equal(epochs(1, seed=1)[0], first)


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


@pytest.mark.filterwarnings("error")
def test_labels_may_be_probabilities():
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 8}, "digits")
    loader.dataset.targets = torch.eye(10)[torch.as_tensor(loader.dataset.labels)]
    _, labels = next(iter(loader))
    assert torch.equal(labels, loader.dataset.targets[:8])


def test_kwargs_of_the_original_notebook_without_a_warning(monkeypatch):
    original = {"batch_size": 256, "shuffle": True, "num_workers": 4, "pin_memory": True}
    kwargs = dict(original)
    _, loader = utils.get_CIFARdataset_with_loader("train", kwargs, "digits")
    assert len(epoch(loader)[0]) == 1437 and kwargs == original
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


def test_other_dataloader_arguments():
    assert len(get(drop_last=True)) == 22
    assert [*get(sampler=[4, 2]).batch_sampler] == [[4, 2]]  # though training images are otherwise shuffled
    loader = get(batch_size=1, batch_sampler=[torch.tensor([3, 1, 2]), [7]])
    assert [*map(list, epoch(loader)[1:])] == [loader.dataset.labels[[3, 1, 2, 7]].tolist()]
    shapes = next(iter(get(collate_fn=lambda samples: [(tuple(image.shape), type(label)) for image, label in samples])))
    assert shapes == [((3, 32, 32), int)] * 64


def test_a_single_sample_and_a_subset_of_the_data_set():
    loader = get()
    # As a worker gets them that is not forked, as under Windows.
    data, *_ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    image, label = data[5]
    assert image.shape == (3, 32, 32) and label == loader.dataset.labels[5] and isinstance(label, int)
    assert not all(torch.equal(image, data[5][0]) for _ in range(60))  # a new draw each time
    images, labels = next(iter(DataLoader(Subset(data, torch.tensor([4, 2])), batch_size=2)))  # default collate_fn
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == data.labels[[4, 2]].tolist()


@pytest.mark.parametrize("split, dataset", [("valid", "digits"), ("test", "mnist")])
def test_an_unknown_split_or_data_set_is_refused_with_those_that_there_are(split, dataset):
    with pytest.raises(ValueError, match="'digits', with 'train' and"):
        utils.get_CIFARdataset_with_loader(split, dataset=dataset)
