"""What the S9 notebook does around the network: loaders, training and testing, plots - in that order.

A batch goes from file to loss through `image_sets.load_images` (files to one array), `augment.ImageBatches` (array to
augmented, normalised batch) and `train` (batch to loss).
"""

import contextlib
import os
import signal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from torch import optim
from torch.utils.data import DataLoader, DistributedSampler

import devices
from augment import ImageBatches, data_of, get_test_transforms, get_train_transforms, normalisation
from devices import autocast_dtype, best_device
from epoch import MisclassifiedSamples, Tally, check_first_batch, check_optimizer, class_indices
from image_sets import CIFAR10_MEAN, CIFAR10_STD, load_images, split_validation
from layers import faster_layers
from optimization import get_loss, get_optimizer, get_scheduler
from output import in_notebook, load_weights, save_figure, scrolled
from predict import class_names, post_predictions, predict, probabilities
from receptive_field import post_receptive_field
from recipes import build_model, build_training, get_recipe, run_settings
from runs import Run, seed_everything

__all__ = [
    "CIFAR10_MEAN", "CIFAR10_STD", "GetCorrectPredCount", "Run", "autocast_dtype", "best_device", "build_model",
    "build_training", "get_CIFARdataset_with_loader", "get_image_from_tensor", "get_loss", "get_optimizer",
    "get_recipe", "get_scheduler", "get_test_transforms", "get_train_transforms", "load_weights", "optim",
    "post_accuracyplots", "post_augmentations", "post_confusion_matrix", "post_display", "post_misclassified",
    "post_predictions", "post_progress", "post_receptive_field", "predict", "run_settings", "scrolled",
    "seed_everything", "showmisclassifiedsamples", "split_validation", "test", "train",
]  # fmt: skip

# --- Loaders ---------------------------------------------------------------------------------------------------------


def get_CIFARdataset_with_loader(datasettype, kwargs=None, dataset="cifar10", root=None, transforms=None):
    """(class_to_idx, loader) of one split: {class name: label}, and a `DataLoader`.

    The loader gives (images float32 (N, 3, 32, 32), normalised, labels int64 (N,)), in a `torchrun` a share of them.

    Args:
        datasettype: "train" (augmented, shuffled unless kwargs say otherwise) or "test" (neither, unless asked to).
        kwargs: `DataLoader` keyword arguments. By default there are workers only where a GPU would wait for data, and
            never more than cores; they start anew in every epoch, so that a change of `loader.dataset` reaches them.
        dataset, root: where the images come from, see `image_sets.load_images`, whose errors this raises too.
        transforms: an `albumentations.Compose` in place of `get_train_transforms()` or `get_test_transforms()`.
    """
    options = dict(kwargs or {})
    if transforms is None:
        transforms = get_train_transforms() if datasettype == "train" else get_test_transforms()
    data = ImageBatches(load_images(dataset, datasettype, root), transforms)

    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A process makes 20,000 images a second or more: two serve a GPU, and starting them takes seconds unless forked.
    starts = torch.multiprocessing.get_start_method(allow_none=True) or torch.multiprocessing.get_all_start_methods()[0]
    options["num_workers"] = min(options.get("num_workers", 2 if cuda and starts == "fork" else 0), cores)
    options["pin_memory"] = bool(options.get("pin_memory", cuda)) and cuda  # without a GPU it only warns
    options.pop("persistent_workers", None)
    options.setdefault("worker_init_fn", _leave_interrupts)
    if options.get("sampler") is None and options.get("batch_sampler") is None:
        options.setdefault("shuffle", datasettype == "train")
        if devices.world_size() > 1:
            shares = range(devices.rank(), len(data), devices.world_size())
            options["sampler"] = DistributedSampler(data) if options.pop("shuffle") else shares
    return data.class_to_idx, DataLoader(data, **options)


def _leave_interrupts(worker):
    """Ctrl-C reaches the workers too; the process that reads their batches ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- Training and testing --------------------------------------------------------------------------------------------


def GetCorrectPredCount(pPrediction, pLabels):
    """How many predictions, class indices (N,) or (N, 1) or scores (N, classes), are right."""
    indices = pPrediction.argmax(dim=1) if pPrediction.ndim == 2 and pPrediction.shape[1] > 1 else pPrediction
    return indices.view_as(pLabels).eq(pLabels).sum().item()  # torch would stretch another shape to fit


@contextlib.contextmanager
def _made_fast(model, device):
    """Let device and layers compute in their fastest way; gives (images, labels) -> (float32 scores, labels there)."""
    cuda, cudnn = device.type == "cuda", torch.backends.cudnn
    dtype, layout, benchmark = autocast_dtype(device), devices.memory_format(model, device), cudnn.benchmark
    if device.type == "cpu":
        devices.keep_freed_memory()
    if cuda and not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
        cudnn.benchmark = True  # nearly all batches have one shape, so that finding its fastest kernels pays

    def forward(images, labels):
        # Safe on CUDA alone: elsewhere memory may be freed while it is still being copied (pytorch issue 189690).
        images, labels = (part.to(device, non_blocking=cuda) for part in (images, labels))
        images = images.to(memory_format=layout) if images.ndim == 4 else images
        half = None if dtype == torch.float32 else dtype  # older versions warn of float32 on an Apple GPU
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            scores = model(images)
        return scores.float(), labels

    try:
        with faster_layers(model, device):
            yield forward
    finally:
        cudnn.benchmark = benchmark


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, scheduler=None, verbose=True
):
    """Train for one epoch and append its mean loss per sample and its accuracy in % to the two lists.

    Computes in `autocast_dtype(device)`. In a `torchrun` gradients and means are over all processes.

    Args:
        model: returns (N, classes) scores or log-probabilities, as the criterion takes them.
        device: where the model is, a `torch.device` or its name.
        train_loader: gives (images float32 (N, channels, H, W), labels int64 (N,) or their probabilities (N, classes)).
        criterion: (scores float32 (N, classes), labels) -> the batch's mean loss.
        scheduler: stepped after every batch. Step one that counts epochs yourself, see `get_scheduler`.
        verbose: whether to print a line at the end.

    Raises:
        ValueError: loader, model, criterion, optimizer and scheduler do not fit each other, or the loader is empty.
        FloatingPointError: a loss that is not finite; names the epoch and the batch.
    """
    device = torch.device(device)
    check_optimizer(model, optimizer, criterion, scheduler, train_loader)
    devices.begin_epoch(model, train_loader)
    # float16 gradients of a mean loss underflow unless they are scaled up.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=autocast_dtype(device) == torch.float16)
    tally = Tally(f"epoch {len(train_losses) + 1} train" if train_losses is not None else "train", train_loader)
    model.train()
    with _made_fast(model, device) as forward, tally.bar:
        for images, labels in train_loader:
            optimizer.zero_grad()
            scores, labels = forward(images, labels)
            if not tally.losses:
                check_first_batch(model, criterion, scores.detach(), labels)
            loss = criterion(scores, labels)
            scaler.scale(loss).backward()
            devices.average_gradients(model)
            scaler.unscale_(optimizer)  # before hooks of the optimizer, which may clip gradients
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
            tally.add(loss, scores.argmax(dim=1), labels)
    tally.read(train_losses, train_acc, verbose)


@torch.inference_mode(False)  # which a caller may be in; lazy parameters made in it could not be trained
@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, verbose=True):
    """Evaluate without gradients and append the mean loss per sample and the accuracy in % to the two lists.

    Arguments and errors are those of `train`. Returns the misclassified samples, a list of (image, true, predicted).
    """
    device = torch.device(device)
    devices.begin_epoch(model, test_loader)
    model = devices.unwrap(model) if devices.world_size() > 1 else model  # numbers of batches may differ
    samples, tally = [], Tally("test", test_loader)
    model.eval()
    with _made_fast(model, device) as forward, tally.bar:
        for images, labels in test_loader:
            scores, labels = forward(images, labels)
            if not tally.losses:
                check_first_batch(model, criterion, scores, labels)
            predictions = scores.argmax(dim=1)
            tally.add(criterion(scores, labels), predictions, labels)
            batch = images.cpu(), class_indices(labels).cpu(), predictions.cpu()
            wrong = batch[1] != batch[2]  # copied one by one, as a view would keep, and save, all of them
            samples += [tuple(map(torch.clone, sample)) for sample in zip(*(part[wrong] for part in batch))]
    tally.read(test_losses, test_acc, verbose)
    everybodys = [sample for share in devices.gather(samples) for sample in share]
    return MisclassifiedSamples(everybodys, getattr(data_of(test_loader), "transforms", None))


test.__test__ = False  # not one of pytest's, in a test file with `from utils import *`


# --- Plots -----------------------------------------------------------------------------------------------------------
# Each returns its Figure, and saves it when given a path. label_map is {class name: label}, as the loaders give it.


def get_image_from_tensor(img, transforms=None):
    """An image float (3, H, W) that transforms, by default get_test_transforms(), normalised, as uint8 (H, W, 3)."""
    mean, std = normalisation(transforms or get_test_transforms())
    pixels = img.detach().cpu().float().numpy().transpose(1, 2, 0) * std + mean
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _image_grid(images, titles, heading, rows, columns, path):
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.1 * rows + 0.5), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image)
        axis.set_title(title, fontsize=10, parse_math=False)  # a name may have a dollar sign
    figure.suptitle(heading, parse_math=False)
    return save_figure(figure, path)


def post_display(train_loader, label_map=None, path=None):
    """16 training samples, as the network sees them, with their labels; the classes are by default the data set's."""
    data, (images, labels) = data_of(train_loader), next(iter(train_loader))
    classes = class_names(data.classes if label_map is None else label_map)
    pictures = [get_image_from_tensor(image, getattr(data, "transforms", None)) for image in images[:16]]
    heading = f"Training samples, augmented: {getattr(data, 'name', '')}"
    return _image_grid(pictures, [classes[label] for label in labels[:16]], heading, 4, 4, path)


def post_augmentations(train_loader, index=0, path=None):
    """One training image as it is, and under fifteen draws of its augmentations."""
    data = train_loader.dataset
    draws = [get_image_from_tensor(data[index][0], data.transforms) for _ in range(15)]
    same = sum(np.array_equal(draw, data.images[index]) for draw in draws)
    titles = ["as it is", *(f"draw {number}" for number in range(1, 16))]
    heading = f"{data.name}: one image of class {data.classes[data.labels[index]]}; {same} of 15 draws change nothing"
    return _image_grid([data.images[index], *draws], titles, heading, 4, 4, path)


def post_accuracyplots(train_losses, test_losses, train_acc, test_acc, title="", path=None):
    """2x2 curves: training and test, loss (mean per sample) and accuracy (%); the other of the two is dotted."""
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 6.5), layout="constrained", sharex=True, sharey="row")
    losses, accuracies = ("loss per sample (nats)", train_losses, test_losses), ("accuracy (%)", train_acc, test_acc)
    for row, (unit, *curves) in zip(axes, (losses, accuracies)):
        curves = list(zip(("training", "test"), ("tab:blue", "tab:orange"), curves))
        for axis, own in zip(row, (curves, curves[::-1])):
            for (split, colour, values), style in zip(own, "-:"):
                marker = "." if len(values) < 30 else None
                axis.plot(range(1, len(values) + 1), values, style, color=colour, marker=marker, label=split)
            axis.set(title=f"{own[0][0].capitalize()} {unit.split()[0]}", xlabel="epoch", ylabel=unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle(title, parse_math=False)
    return save_figure(figure, path)


ROW = "{epoch:>3}/{epochs:<3}  {train_loss:10.4f}  {train_acc:6.2f}  {test_loss:9.4f}  {test_acc:6.2f}  {lr:6.2g}"
HEAD = "  epoch  train loss  acc. %  test loss  acc. %      lr       s"


def post_progress(run):
    """The epochs of a run so far: in a notebook a growing table and curves, else a line each; at the end curves.png."""
    history, live = run.history, in_notebook()
    if devices.rank() or not history:
        return
    epochs = run.hyperparameters.get("epochs", len(history))
    left = (epochs - len(history)) * np.mean([row["seconds"] for row in history[-5:]])
    left = f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
    lines = [f"{ROW.format(epochs=epochs, **row)}  {row['seconds']:6.1f}" for row in history]
    if live or len(lines) >= epochs:  # to draw takes a second, too long for every epoch of a log
        curves = [[row[column] for row in history] for column in ("train_loss", "test_loss", "train_acc", "test_acc")]
        figure = post_accuracyplots(*curves, f"{run}, epoch {len(lines)} of {epochs}", run / "curves.png")
        plt.close(figure)  # or a notebook would show it once more at the end of the cell
    if live:
        from IPython.display import display

        every = -(-epochs // 16)  # so that nobody has to scroll
        shown = [line for n, line in enumerate(lines, start=1) if n in (1, len(lines)) or n % every == 0]
        table = "\n".join([HEAD, *shown, left if len(lines) < epochs else ""])
        for part, content in (("table", {"text/plain": table, "text/html": scrolled(table)}), ("curves", figure)):
            display(content, raw=part == "table", display_id=f"{part} of {id(run)}", update=run.displayed)
    else:
        print(*([] if run.displayed else [HEAD]), f"{lines[-1]}   {left}", sep="\n", flush=True)
    run.displayed = True


def post_misclassified(misclassified, label_map, model, title="", path=None):
    """Of the mistakes that `test` returned, the ten that the model is surest of, and ten spread over the rest."""
    rows = probabilities(model, torch.stack([sample[0] for sample in misclassified])) if misclassified else []
    confidences = [float(row[predicted]) for row, (_, _, predicted) in zip(rows, misclassified)]
    order = np.argsort(confidences)[::-1]
    surest, rest = order[:10], np.sort(order[10:])
    picked = [*surest, *rest[np.linspace(0, len(rest) - 1, min(10, len(rest)), dtype=int)]]
    heading = f"{title}: {len(misclassified):,} mistakes".removeprefix(": ")
    heading += ", the ten surest and ten of the rest" if len(misclassified) > 20 else ""
    return showmisclassifiedsamples(misclassified, label_map, heading, path, picked, confidences)


def showmisclassifiedsamples(misclassified, label_map, title="", path=None, picked=None, confidences=None):
    """The first ten of the samples that `test` returned as wrong, or those picked, with true and predicted class."""
    classes, transforms = class_names(label_map), getattr(misclassified, "transforms", None)
    picked, images, titles = range(len(misclassified[:10])) if picked is None else picked, [], []
    for index in picked:
        image, true, wrong = misclassified[index]
        images.append(get_image_from_tensor(image, transforms))
        sure = f" ({confidences[index]:.1%})" if confidences else ""
        titles.append(f"{classes[wrong]}{sure}\ntrue: {classes[true]}")
    return _image_grid(images, titles, title, max(1, -(-len(picked) // 5)), 5, path)


def post_confusion_matrix(misclassified, test_loader, label_map, title="", path=None):
    """Counts of true against predicted class, with accuracies; misclassified is what `test` returned for the loader."""
    if devices.world_size() > 1:  # the loader gives this process's share
        tested = torch.as_tensor(data_of(test_loader).labels)
    else:
        tested = torch.cat([class_indices(labels).cpu() for _, labels in test_loader])
    classes = class_names(label_map)
    totals = np.bincount(tested[tested >= 0], minlength=len(classes))
    wrong = np.zeros((len(classes), len(classes)), dtype=int)
    for _, true, predicted in misclassified:
        wrong[int(true), int(predicted)] += 1
    if (wrong.sum(axis=1) > totals).any():
        raise ValueError("there are more misclassified samples than the loader gives; pass the loader that was tested")
    matrix = wrong + np.diag(totals - wrong.sum(axis=1))
    rate = matrix / np.maximum(totals, 1)[:, None]
    figure, axis = plt.subplots(figsize=(7.5, 7), layout="constrained")
    # By the square root, or confusions of a few percent would all look white.
    image = axis.imshow(rate, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    for (row, column), count in np.ndenumerate(matrix):
        axis.text(column, row, count, ha="center", va="center", color="white" if rate[row, column] > 0.3 else "black")
    accuracies = [f"{name}  {100 * rate[label, label]:.1f} %" for label, name in enumerate(classes)]
    axis.set_yticks(range(len(classes)), accuracies, parse_math=False)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    accuracy = f"accuracy {100 * np.trace(matrix) / matrix.sum():.2f} %"
    axis.set_title(f"Confusion matrix, {accuracy}\n{title}", parse_math=False)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return save_figure(figure, path)
