"""The plain PyTorch loop that this project's speed and accuracy are measured against, as a course would write it.

One `Compose` call per image, as many loader workers as cores, float32, NCHW, and `.item()` at every step.
"""

import os

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from augment import get_test_transforms, get_train_transforms


class ImageDataset(Dataset):
    def __init__(self, images, labels, transforms):
        self.images, self.labels, self.transforms = images, labels, transforms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transforms(image=self.images[index])["image"], int(self.labels[index])


def seed_worker(_):
    """Without it, Albumentations 2.0.8 repeats its augmentations every epoch, and accuracy would not be comparable."""
    dataset = torch.utils.data.get_worker_info().dataset
    dataset.transforms.set_random_seed(torch.initial_seed() % 2**32)


def get_loaders(train_set, test_set, device, batch_size=256, transforms=None):
    options = {"batch_size": batch_size, "num_workers": os.cpu_count(), "worker_init_fn": seed_worker}
    options["pin_memory"] = device.type == "cuda"
    train_data = ImageDataset(train_set.images, train_set.labels, transforms or get_train_transforms())
    test_data = ImageDataset(test_set.images, test_set.labels, get_test_transforms())
    return DataLoader(train_data, shuffle=True, **options), DataLoader(test_data, shuffle=False, **options)


def train(model, device, loader, optimizer, criterion, scheduler=None):
    """One epoch; mean loss and accuracy in %. The scheduler is stepped after every batch."""
    model.train()
    loss_sum = correct = seen = 0
    for images, labels in (bar := tqdm(loader, disable=None)):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        predictions = model(images)
        loss = criterion(predictions, labels)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        loss_sum += loss.item() * len(labels)
        correct += predictions.argmax(dim=1).eq(labels).sum().item()
        seen += len(labels)
        bar.set_description(f"loss {loss_sum / seen:.4f} accuracy {100 * correct / seen:.2f}")
    return loss_sum / seen, 100 * correct / seen


def test(model, device, loader, criterion):
    """Mean loss and accuracy in %."""
    model.eval()
    loss_sum = correct = seen = 0
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            predictions = model(images)
            loss_sum += criterion(predictions, labels).item() * len(labels)
            correct += predictions.argmax(dim=1).eq(labels).sum().item()
            seen += len(labels)
    return loss_sum / seen, 100 * correct / seen
