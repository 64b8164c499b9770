"""What the S9 notebook does around the network: data, transforms, loaders, training and testing, plots - in that order.

A batch goes from file to loss through `image_sets.load_images` (files to one array), `ImageBatches` (array to
augmented, normalised batch) and `train` (batch to loss). The network itself is in `models.py`, and neither file knows
the other.
"""

import io
import os
import pathlib
import signal
import time
from typing import NamedTuple

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from torch import optim
from torch.utils.data import DataLoader, RandomSampler

from augment import A, ImageBatches, SeededSampler, ShiftScaleRotate, ToTensorV2, as_batch
from checks import check_arguments, check_loss, check_optimization, check_scores, checked_batch
from devices import autocast_dtype, keep_freed_memory, memory_format
from image_sets import CIFAR10_MEAN, CIFAR10_STD, load_images
from optimization import fit_fused_state, get_loss, get_optimizer, get_scheduler
from predict import evaluation_mode, predict
from progress import Tally, progress_bar, report
from recipes import flatten_recipe, get_recipe
from runs import Run, load_weights, seed_everything, write_atomically

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "GetCorrectPredCount",
    "Run",
    "autocast_dtype",
    "flatten_recipe",
    "get_CIFARdataset_with_loader",
    "get_image_from_tensor",
    "get_loss",
    "get_optimizer",
    "get_recipe",
    "get_scheduler",
    "get_test_transforms",
    "get_train_transforms",
    "load_weights",
    "optim",
    "post_accuracyplots",
    "post_augmentations",
    "post_confusion_matrix",
    "post_display",
    "post_misclassified",
    "post_receptive_field",
    "predict",
    "seed_everything",
    "test",
    "train",
]

# --- Data and transforms ---------------------------------------------------------------------------------------------


def get_train_transforms(flip=0.1, shift_scale_rotate=0.1, cutout=0.3, crop_padding=0):
    """Augmentations, by default those of the original run.

    Args:
        flip: probability of a horizontal flip.
        shift_scale_rotate: probability of a shift by up to 10 %, a scale of 0.8 to 1.2 and a rotation by up to 15
            degrees, with reflected border.
        cutout: probability of one 16x16 hole in the mean colour (DeVries & Taylor, arXiv 1708.04552).
        crop_padding: pixels of reflected border of which a random 32x32 crop is cut; 0 for no crop.

    Returns:
        `albumentations.Compose` from uint8 (32, 32, 3), or any (H, W, 3) without a crop, to float32 (3, H, W).

    Raises:
        ValueError: a negative crop_padding, or what is no probability.
    """
    if crop_padding < 0:
        raise ValueError(f"crop_padding is {crop_padding}; it must be a number of pixels, or 0 for no crop")
    crop = [A.Pad(padding=crop_padding, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)]
    return A.Compose(
        [
            A.HorizontalFlip(p=flip),
            ShiftScaleRotate(shift_limit=0.1, scale_limit=0.2, rotate_limit=15, p=shift_scale_rotate),
            *(crop if crop_padding else []),
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(16, 16),
                hole_width_range=(16, 16),
                fill=tuple(round(255 * mean) for mean in CIFAR10_MEAN),
                p=cutout,
            ),
            A.Normalize(CIFAR10_MEAN, CIFAR10_STD),
            ToTensorV2(),
        ]
    )


def get_test_transforms():
    """Normalisation only: an `albumentations.Compose` from uint8 (H, W, 3) to float32 (3, H, W)."""
    return A.Compose([A.Normalize(CIFAR10_MEAN, CIFAR10_STD), ToTensorV2()])


# --- Loaders ---------------------------------------------------------------------------------------------------------


def _ignore_interrupts(worker_id):
    """A notebook's stop button reaches the workers too, and the loader could not be used again without them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def get_CIFARdataset_with_loader(datasettype, kwargs=None, dataset="cifar10", root=None, transforms=None):
    """Load one split and wrap it in a `DataLoader`.

    Args:
        datasettype: "train" (augmented, shuffled unless kwargs say otherwise) or "test" (neither, unless asked to).
        kwargs: `DataLoader` keyword arguments, such as batch_size, shuffle, num_workers, pin_memory. By default there
            are workers only where a GPU would otherwise wait for data; more workers than cores are not started.
        dataset: "cifar10", or "digits" for scikit-learn's handwritten digits, which need no download.
        root: where `image_sets.load_images` looks; by default the environment variable CIFAR10_ROOT, else ./data.
        transforms: an `albumentations.Compose` in place of `get_train_transforms()` or `get_test_transforms()`.

    Returns:
        (class_to_idx, loader): {class name: label}, and a loader of (images float32 (N, 3, 32, 32) normalised, in
        channels_last memory; labels int64 (N,)).

    Raises:
        ValueError, TypeError: an unknown split, data set or keyword; images that cannot be used.
        download.DownloadError: no images at hand, and no source of the archive works.
    """
    options = {} if kwargs is None else kwargs
    if not isinstance(options, dict) or not isinstance(options.get("num_workers", 0), int):
        raise TypeError(
            f"kwargs is {kwargs!r}; it must be a dict of DataLoader arguments, such as {{'batch_size': 256}}, and "
            "num_workers in it a whole number"
        )
    options = dict(options)
    if transforms is None:
        transforms = get_train_transforms() if datasettype == "train" else get_test_transforms()
    elif not isinstance(transforms, (A.BaseCompose, A.BasicTransform)):
        raise TypeError(f"transforms is a {type(transforms).__name__}; it must be an albumentations.Compose")
    data = ImageBatches(load_images(dataset, datasettype, root), transforms)

    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options["num_workers"] = min(options.get("num_workers", 4 if cuda else 0), cores)
    options["pin_memory"] = bool(options.get("pin_memory", cuda)) and cuda  # without a GPU it only warns
    if options["num_workers"] > 0:
        options.setdefault("persistent_workers", True)
        options.setdefault("worker_init_fn", _ignore_interrupts)
    if options.get("batch_size", 1) is not None:
        options.setdefault("collate_fn", as_batch)

    generator = options.get("generator")
    shuffle = options.pop("shuffle", None)
    if shuffle and not (options.get("sampler") is options.get("batch_sampler") is None):
        raise ValueError("kwargs give shuffle=True beside a sampler or batch_sampler; give one of them")
    if options.get("batch_sampler") is not None:
        options["batch_sampler"] = SeededSampler(options["batch_sampler"], generator)
    else:
        sampler = options.get("sampler")
        if sampler is None:
            random = datasettype == "train" if shuffle is None else shuffle
            sampler = RandomSampler(data, generator=generator) if random else range(len(data))
        options["sampler"] = SeededSampler(sampler, generator)
    # DataLoader seeds its workers from this generator, once a loader or once an epoch depending on how they are kept.
    # Left to torch's own generator, that would make the number of workers change everything drawn after it.
    options.setdefault("generator", torch.Generator().manual_seed(torch.initial_seed()))
    class_to_idx = {name: index for index, name in enumerate(data.classes)}
    try:
        return class_to_idx, DataLoader(data, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"kwargs {kwargs!r} do not suit a DataLoader: {error}") from None


# --- Training and testing --------------------------------------------------------------------------------------------


def GetCorrectPredCount(pPrediction, pLabels):
    """Number of correct predictions, an int.

    Args:
        pPrediction: class indices (N,) or (N, 1), or scores (N, classes), of which the largest counts.
        pLabels: class indices (N,).
    """
    if not (isinstance(pPrediction, torch.Tensor) and isinstance(pLabels, torch.Tensor)):
        kinds = f"{type(pPrediction).__name__} and {type(pLabels).__name__}"
        raise TypeError(f"GetCorrectPredCount got {kinds}; give tensors")
    if pPrediction.ndim == 2 and pPrediction.shape[1] == 1 and not pPrediction.is_floating_point():
        pPrediction = pPrediction[:, 0]  # of argmax(dim=1, keepdim=True)
    scores = pPrediction.ndim == 2 and pPrediction.shape[1] > 0
    indices = pPrediction.argmax(dim=1) if scores else pPrediction
    if pLabels.ndim != 1 or indices.shape != pLabels.shape or indices.device != pLabels.device:
        raise ValueError(
            f"GetCorrectPredCount got predictions of shape {tuple(pPrediction.shape)} on {pPrediction.device}, labels "
            f"of shape {tuple(pLabels.shape)} on {pLabels.device}; it takes class indices (N,) or scores (N, classes) "
            "and labels (N,) on the same device"
        )
    return indices.eq(pLabels).sum().item()


def _prepare(model, device):
    """The model in the memory format that suits the device, which is told to be fast."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # nearly all batches have one shape, so finding its fastest kernels pays
    return model.to(memory_format=memory_format(device))


def _forward(model, device, images, labels, criterion):
    """Loss, float32 scores and labels of one batch, on the device and computed in the type that suits it."""
    # Only CUDA keeps memory that is being copied from being freed (pytorch issue 189690).
    non_blocking = device.type == "cuda"
    labels_on_device = labels.to(device, non_blocking=non_blocking)
    images = images.to(device, non_blocking=non_blocking, memory_format=memory_format(device))
    dtype = autocast_dtype(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        scores = model(images)
    check_scores(scores, labels)
    scores = scores.float()
    loss = criterion(scores, labels_on_device)
    check_loss(loss)
    return loss, scores, labels_on_device


def train(model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, scheduler=None):
    """Train for one epoch and append its mean loss per sample and its accuracy in % to the two lists.

    Computes in `autocast_dtype(device)`, with the model in `memory_format(device)` from then on; prints a line, and
    shows a progress bar in a notebook or a terminal.

    Args:
        model: returns (N, classes) scores or log-probabilities, as the criterion takes them.
        device: where the model is, a `torch.device` or its name.
        train_loader: gives (images float32 (N, channels, H, W), labels int64 (N,)).
        criterion: (scores float32 (N, classes), labels) -> the batch's mean loss.
        scheduler: stepped after every batch, see `get_scheduler`; one that counts epochs, the caller steps.

    Raises:
        ValueError: an empty loader, labels that the model has no class for, a model on another device.
        TypeError: batches that are no pair of tensors, or a scheduler that cannot be stepped after a batch.
        FloatingPointError: a loss that is not finite; names the epoch and the batch.
    """
    train_losses, train_acc = ([] if values is None else values for values in (train_losses, train_acc))
    device = torch.device(device)
    check_arguments(model, device, criterion, train_losses, train_acc)
    check_optimization(model, optimizer, scheduler)
    model = _prepare(model, device)
    model.train()
    epoch = f"epoch {len(train_losses) + 1}"
    # float16 gradients of a mean loss underflow unless they are scaled up.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=autocast_dtype(device) == torch.float16)
    fit_fused_state(optimizer)
    start = time.perf_counter()
    with progress_bar(train_loader, epoch) as bar:
        tally = Tally(epoch, bar)
        for images, labels in map(checked_batch, train_loader):
            optimizer.zero_grad()
            loss, scores, labels = _forward(model, device, images, labels, criterion)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
            tally.add(loss, scores.argmax(dim=1), labels)
        mean_loss, accuracy = tally.read()
    train_losses.append(mean_loss)
    train_acc.append(accuracy)
    report(epoch, "train", mean_loss, accuracy, time.perf_counter() - start, train_loader)


class Misclassified(NamedTuple):
    """A sample that the model got wrong: normalised image float32 (3, H, W) on the CPU, and two class indices.

    The indices have an `item()`, which notebooks written for the original code call.
    """

    image: torch.Tensor
    true: np.int64
    predicted: np.int64


def _read_misclassified(unread):
    """The misclassified samples of a list of batches (images, labels, predictions), which it empties."""
    misclassified = []
    for images, labels, predictions in unread:
        labels, predictions = labels.cpu(), predictions.cpu()
        (indices,) = torch.nonzero(predictions != labels, as_tuple=True)
        misclassified += map(
            Misclassified, images.cpu()[indices], labels[indices].numpy(), predictions[indices].numpy()
        )
    unread.clear()
    return misclassified


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Evaluate without gradients and append the mean loss per sample and the accuracy in % to the two lists.

    Arguments and errors are those of `train`.

    Returns:
        The misclassified samples, a list of (image, true, predicted), in the loader's order.
    """
    test_losses, test_acc = ([] if values is None else values for values in (test_losses, test_acc))
    device = torch.device(device)
    check_arguments(model, device, criterion, test_losses, test_acc)
    model = _prepare(model, device)
    model.eval()
    misclassified, unread = [], []
    start = time.perf_counter()
    with progress_bar(test_loader, "test") as bar:
        tally = Tally("test", bar)
        for images, labels in map(checked_batch, test_loader):
            loss, scores, labels_on_device = _forward(model, device, images, labels, criterion)
            predictions = scores.argmax(dim=1)
            unread.append((images, labels, predictions))
            if tally.add(loss, predictions, labels_on_device):
                misclassified += _read_misclassified(unread)
        mean_loss, accuracy = tally.read()
    misclassified += _read_misclassified(unread)
    test_losses.append(mean_loss)
    test_acc.append(accuracy)
    report("", "test", mean_loss, accuracy, time.perf_counter() - start, test_loader)
    return misclassified


test.__test__ = False  # not one of pytest's, in a test file with `from utils import *`


# --- Plots -----------------------------------------------------------------------------------------------------------
# Each returns its Figure, and saves it when given a path.


def get_image_from_tensor(img):
    """A normalised image, float (3, H, W) on any device, as a uint8 array (H, W, 3); the input is left as it is."""
    if not isinstance(img, torch.Tensor):
        raise TypeError(f"get_image_from_tensor got a {type(img).__name__}; it takes a tensor")
    if img.ndim != 3 or len(img) != 3 or not img.is_floating_point() or not img.isfinite().all():
        values = f", from {img.min()} to {img.max()}" if img.numel() else ""
        raise ValueError(
            f"get_image_from_tensor got {img.dtype} of shape {tuple(img.shape)}{values}; it takes a normalised image, "
            "finite floats (3, H, W)"
        )
    pixels = img.detach().cpu().float().numpy().transpose(1, 2, 0) * CIFAR10_STD + CIFAR10_MEAN
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _finished(figure, path):
    if path is not None:
        path, image = pathlib.Path(path), io.BytesIO()
        figure.savefig(image, format=path.suffix.lstrip(".") or "png", dpi=120)
        write_atomically(path, image.getvalue())
    return figure


def _image_grid(images, titles, heading, rows, columns):
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.1 * rows + 0.5), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
    figure.suptitle(heading)
    return figure


def _class_names(label_map, labels):
    """Class names in the order of their labels, which label_map must name: {name: label}, or {label: name}."""
    if isinstance(label_map, dict) and set(label_map) == set(range(len(label_map))):
        label_map = {name: label for label, name in label_map.items()}
    if not isinstance(label_map, dict) or sorted(label_map.values()) != list(range(len(label_map))):
        raise TypeError(f"label_map is {label_map!r}; it must be a dict of class name to label, from 0 up")
    if labels and max(labels) >= len(label_map):
        raise ValueError(f"label_map names {len(label_map)} classes and there are labels up to {max(labels)}")
    return sorted(label_map, key=label_map.get)


def post_display(train_loader, label_map, path=None):
    """16 training samples, as the network sees them, with their labels; label_map is {class name: label}."""
    images, labels = next(iter(train_loader), (None, None))
    if images is None:
        raise ValueError("the loader is empty; it gave no batch to show")
    labels = labels[:16].tolist()
    classes = _class_names(label_map, labels)
    pictures = [get_image_from_tensor(image) for image in images[:16]]
    titles = [classes[label] for label in labels]
    heading = f"Training samples, augmented: {getattr(train_loader.dataset, 'name', '')}"
    return _finished(_image_grid(pictures, titles, heading, 4, 4), path)


def post_augmentations(train_loader, index=0, path=None):
    """One training image as it is, and under fifteen draws of its augmentations."""
    data = train_loader.dataset
    pictures = [data.images[index], *(get_image_from_tensor(data[index][0]) for _ in range(15))]
    titles = ["as it is", *(f"draw {number}" for number in range(1, 16))]
    heading = f"One image of class {data.classes[data.labels[index]]} under the training transforms: {data.name}"
    return _finished(_image_grid(pictures, titles, heading, 4, 4), path)


def post_accuracyplots(train_losses, test_losses, train_acc, test_acc, title="", path=None):
    """2x2 curves: training and test, loss (mean per sample) and accuracy (%), the best test epoch marked.

    The test panels repeat the training curve, dotted, so that the gap between the two can be read.
    """
    lengths = [len(values) for values in (train_losses, test_losses, train_acc, test_acc)]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"post_accuracyplots got lists of {lengths} epochs; they must be as long as each other, from 1"
        )
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True, sharey="row")
    best = int(np.argmax(test_acc))
    epochs = range(1, len(test_acc) + 1)
    marker = "." if len(epochs) < 30 else None
    rows = [("loss", "loss per sample (nats)", train_losses, test_losses)]
    rows += [("accuracy", "accuracy (%)", train_acc, test_acc)]
    for (left, right), (what, unit, trained, tested) in zip(axes, rows):
        left.plot(epochs, trained, color="tab:blue", marker=marker)
        right.plot(epochs, tested, color="tab:orange", marker=marker)
        right.plot(epochs, trained, color="tab:blue", linestyle=":", marker=marker, label="training")
        label = f"best test epoch: {best + 1}, {test_acc[best]:.2f} %"
        right.plot(best + 1, tested[best], "o", color="black", markersize=5, label=label)
        right.legend()
        for axis, split in ((left, "Training"), (right, "Test")):
            axis.set(title=f"{split} {what}", xlabel="epoch", ylabel=unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    figure.suptitle(title)
    return _finished(figure, path)


def post_misclassified(misclassified, label_map, model, title="", path=None):
    """20 of the samples that `test` returned as wrong, with true and predicted class and the model's confidence.

    They are spread over the list, which is sorted by class if the images are.
    """
    picked = np.linspace(0, len(misclassified) - 1, min(20, len(misclassified)), dtype=int)
    shown = [misclassified[index] for index in picked]
    classes = _class_names(label_map, [label for _, *both in shown for label in both])
    confidences = []
    if shown:
        images = torch.stack([sample[0] for sample in shown]).to(next(model.parameters()).device)
        with evaluation_mode(model), torch.no_grad():
            probabilities = model(images).float().softmax(dim=1).cpu()
        confidences = [float(row[predicted]) for row, (_, _, predicted) in zip(probabilities, shown)]
    titles = [
        f"{classes[predicted]} ({confidence:.0%})\ntrue: {classes[true]}"
        for (_, true, predicted), confidence in zip(shown, confidences)
    ]
    heading = f"{len(misclassified):,} misclassified test images, {len(shown)} of them: {title}"
    return _finished(_image_grid([get_image_from_tensor(s[0]) for s in shown], titles, heading, 4, 5), path)


def post_confusion_matrix(misclassified, test_loader, label_map, title="", path=None):
    """Counts of true class (row) against predicted class (column) in a test, with the accuracy of each class."""
    classes = _class_names(label_map, [label for _, *both in misclassified for label in both])
    wrong = np.zeros((len(classes), len(classes)), dtype=int)
    for _, true, predicted in misclassified:
        wrong[true, predicted] += 1
    totals = np.bincount(torch.cat([labels.cpu() for _, labels in test_loader]), minlength=len(classes))
    if len(totals) > len(classes) or (wrong.sum(axis=1) > totals).any():
        raise ValueError("there are more misclassified samples than the loader gives; pass the loader that was tested")
    matrix = wrong + np.diag(totals - wrong.sum(axis=1))
    share = matrix / np.maximum(totals, 1)[:, None]
    figure, axis = plt.subplots(figsize=(8.5, 7.5), layout="constrained")
    # By the square root, or confusions of a few percent would all look white.
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    for (row, column), count in np.ndenumerate(matrix):
        axis.text(column, row, count, ha="center", va="center", color="white" if share[row, column] > 0.3 else "black")
    accuracies = [f"{name}  {100 * share[label, label]:.1f} %" for label, name in enumerate(classes)]
    axis.set_yticks(range(len(classes)), accuracies)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    axis.set_title(f"Confusion matrix, accuracy {100 * np.trace(matrix) / matrix.sum():.2f} %\n{title}")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return _finished(figure, path)


def post_receptive_field(model, rows, images=None, path=None):
    """What an output sees: the theoretical receptive field layer by layer, and beside it the effective one.

    Args:
        model: the network.
        rows: what `models.receptive_field(model)` returned.
        images: batch (N, 3, H, W) to average over, on the model's device; by default noise of a size that holds the
            whole theoretical field. The effective field is the mean absolute gradient of the centre output of the last
            layer before global pooling with respect to the input (Luo et al., NeurIPS 2016).
    """
    rows = [row for row in rows if row.receptive_field is not None]
    last = dict(model.named_modules()).get(rows[-1].name) if rows else None
    if last is None:
        raise ValueError("rows are not of this model; pass what models.receptive_field(model) returns")
    parameter = next(model.parameters())
    if images is None:
        side = rows[-1].receptive_field + 2 * rows[-1].jump + 1
        images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    images = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = []
    hook = last.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with evaluation_mode(model):
            model(images)
    finally:
        hook.remove()
    (output,) = outputs
    centre = output.shape[-1] // 2
    # A random sign for each channel, or the channels would cancel out.
    signs = torch.randint(0, 2, output.shape[1:2], generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    (gradient,) = torch.autograd.grad((output[:, :, centre, centre] * signs.to(output)).sum(), images)
    field = gradient.abs().mean(dim=(0, 1)).cpu().numpy()

    figure, (growth, effective) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    growth.barh(range(len(rows)), [row.receptive_field for row in rows], color="tab:blue")
    growth.set_yticks(range(len(rows)), [f"{row.name}  {row.kernel}x{row.kernel}" for row in rows], fontsize=8)
    for position, row in enumerate(rows):
        growth.text(row.receptive_field + 1, position, row.receptive_field, va="center", fontsize=8)
    growth.invert_yaxis()
    growth.set(xlabel="receptive field (pixels)", title="Theoretical receptive field, layer by layer")

    shown = effective.imshow(field / field.max(), cmap="magma")
    figure.colorbar(shown, ax=effective, label="mean absolute gradient (largest = 1)")
    ys, xs = np.nonzero(field > 1e-5 * field.max())  # a GPU's convolutions leave rounding errors around it
    left, top, width, height = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
    boxes = [(left, top, width, height, "cyan", f"its whole extent, {width}x{height}")]
    if min(width, height) > 32:
        boxes.append((left + (width - 32) / 2, top + (height - 32) / 2, 32, 32, "white", "an image of 32x32 pixels"))
    for x, y, width, height, color, label in boxes:
        box = plt.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=color, label=label)
        effective.add_patch(box)
    effective.legend(loc="lower right", facecolor="dimgray", labelcolor="white")
    effective.set(
        xlabel="x (pixels)",
        ylabel="y (pixels)",
        title=f"Effective receptive field of the centre output of {rows[-1].name}\n"
        f"theoretical: {rows[-1].receptive_field}x{rows[-1].receptive_field}",
    )
    return _finished(figure, path)
