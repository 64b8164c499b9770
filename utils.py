"""What the S9 notebook does around the network: loaders, training and testing, plots - in that order.

A batch goes from file to loss through `image_sets.load_images` (files to one array), `augment.ImageBatches` (array to
augmented, normalised batch) and `train` (batch to loss). The networks are in `models.py`. `from utils import *` hands
on what the notebook needs of the other modules too.
"""

import contextlib
import os
import time

from devices import autocast_dtype, best_device, keep_freed_memory, memory_format

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from torch import optim
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

import epoch
from augment import ImageBatches, InOrder, SeededSampler, as_batch, get_test_transforms, get_train_transforms
from image_sets import CIFAR10_MEAN, CIFAR10_STD, load_images, split_validation
from layers import evaluation_mode, faster_layers
from optimization import fit_fused_state, get_loss, get_optimizer, get_scheduler
from output import in_notebook, save_figure
from parallel import gather, rank, share, share_buffers, unwrap, world_size
from predict import class_names, predict
from receptive_field import post_receptive_field
from recipes import build_model, build_training, get_recipe, run_settings
from runs import Run, load_weights, seed_everything

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "GetCorrectPredCount",
    "Run",
    "autocast_dtype",
    "best_device",
    "build_model",
    "build_training",
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
    "post_progress",
    "post_receptive_field",
    "predict",
    "run_settings",
    "seed_everything",
    "showmisclassifiedsamples",
    "split_validation",
    "test",
    "train",
]

# --- Loaders ---------------------------------------------------------------------------------------------------------


def get_CIFARdataset_with_loader(datasettype, kwargs=None, dataset="cifar10", root=None, transforms=None):
    """Load one split and wrap it in a `DataLoader`.

    Args:
        datasettype: "train" (augmented, shuffled unless kwargs say otherwise) or "test" (neither, unless asked to).
        kwargs: `DataLoader` keyword arguments, such as batch_size, shuffle, num_workers, pin_memory. By default there
            are workers only where a GPU would otherwise wait for data. More workers than cores are not started, and
            they are started anew for every epoch, so that a change of `loader.dataset` reaches them.
        dataset: "cifar10", or "digits" for scikit-learn's handwritten digits, which need no download.
        root: where `image_sets.load_images` looks; by default the environment variable CIFAR10_ROOT, else ./data.
        transforms: an `albumentations.Compose` in place of `get_train_transforms()` or `get_test_transforms()`.

    Returns:
        (class_to_idx, loader): {class name: label}, and a loader of (images float32 (N, 3, 32, 32) normalised, labels
        int64 (N,)). In each process of a `torchrun` it gives that process's share, shuffled by a `DistributedSampler`;
        where accelerate runs the processes, it gives all images, for `prepare` to share out.

    Raises:
        ValueError, TypeError: an unknown split, data set or keyword; images that cannot be used.
        download.DownloadError: no images at hand, and no source of the archive works.

    Example:
        >>> class_to_idx, train_loader = get_CIFARdataset_with_loader("train", {"batch_size": 256})
        >>> images, labels = next(iter(train_loader))
    """
    options = dict(kwargs or {})
    if transforms is None:
        transforms = get_train_transforms() if datasettype == "train" else get_test_transforms()
    data = ImageBatches(load_images(dataset, datasettype, root), transforms)

    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A process makes 90,000 images a second: two are enough for a GPU, and starting them takes seconds unless forked.
    starts = torch.multiprocessing.get_start_method(allow_none=True) or torch.multiprocessing.get_all_start_methods()[0]
    options["num_workers"] = min(options.get("num_workers", 2 if cuda and starts == "fork" else 0), cores)
    options["pin_memory"] = bool(options.get("pin_memory", cuda)) and cuda  # without a GPU it only warns
    options.pop("persistent_workers", None)
    if options.get("batch_size", 1) is not None:
        options.setdefault("collate_fn", as_batch)

    generator = options.get("generator")
    shuffle = options.pop("shuffle", None)
    if shuffle and any(options.get(key) is not None for key in ("sampler", "batch_sampler")):
        raise ValueError("kwargs give shuffle=True beside a sampler or batch_sampler; give one of them")
    if options.get("batch_sampler") is not None:
        options["batch_sampler"] = SeededSampler(options["batch_sampler"], generator)
    else:
        sampler = options.get("sampler")
        if sampler is None:
            shuffle = datasettype == "train" if shuffle is None else shuffle
            if shuffle and world_size() > 1:
                seed = gather(torch.initial_seed())[0] % 2**32  # of one order for all processes
                process, processes = share()
                if processes > 1:
                    sampler = DistributedSampler(data, processes, process, seed=seed)
                else:
                    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
            elif shuffle:
                sampler = RandomSampler(data, generator=generator)
            else:
                sampler = InOrder(data)
        options["sampler"] = SeededSampler(sampler, generator)
    # DataLoader seeds its workers from this generator, once per epoch; from torch's own, that would change everything
    # drawn after it.
    options.setdefault("generator", torch.Generator().manual_seed(torch.initial_seed()))
    return data.class_to_idx, DataLoader(data, **options)


# --- Training and testing --------------------------------------------------------------------------------------------


def GetCorrectPredCount(pPrediction, pLabels):
    """Number of correct predictions, an int.

    Args:
        pPrediction: class indices (N,) or (N, 1), or scores (N, classes), of which the largest counts.
        pLabels: class indices (N,).

    Raises:
        ValueError: not one prediction for each label, which torch would stretch to fit.
    """
    if pPrediction.ndim == 2 and pPrediction.shape[1] == 1:
        pPrediction = pPrediction[:, 0]  # of argmax(dim=1, keepdim=True), or one output, rounded
    indices = pPrediction.argmax(dim=1) if pPrediction.ndim == 2 else pPrediction
    if pLabels.ndim != 1 or indices.shape != pLabels.shape:
        raise ValueError(
            f"GetCorrectPredCount got predictions of shape {tuple(pPrediction.shape)} and labels of shape "
            f"{tuple(pLabels.shape)}; it takes class indices (N,) or scores (N, classes), and labels (N,)"
        )
    return indices.eq(pLabels).sum().item()


@contextlib.contextmanager
def _made_fast(model, device):
    """While it lasts, the device and the model's layers compute in their fastest way."""
    if device.type == "cpu":
        keep_freed_memory()
    cudnn = torch.backends.cudnn
    benchmark, layout = cudnn.benchmark, memory_format(unwrap(model), device)
    # Nearly all batches have one shape, so that finding its fastest kernels pays.
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = benchmark or (device.type == "cuda" and not deterministic)
    try:
        with faster_layers(model, device):
            yield layout
    finally:
        cudnn.benchmark = benchmark


def _forward(model, device, images, labels, layout):
    """Float32 scores of one batch, computed in the type that suits the device, and the labels there."""
    # Safe on CUDA alone: elsewhere memory may be freed while it is still being copied (pytorch issue 189690).
    non_blocking = device.type == "cuda"
    labels_on_device = labels.to(device, non_blocking=non_blocking)
    images = images.to(device, non_blocking=non_blocking)
    images = images.to(memory_format=layout) if images.ndim == 4 else images
    dtype = autocast_dtype(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        scores = model(images)
    epoch.check_labels(labels, scores)
    return scores.float(), labels_on_device


def train(
    model,
    device,
    train_loader,
    optimizer,
    criterion,
    train_losses=None,
    train_acc=None,
    scheduler=None,
    verbose=True,
):
    """Train for one epoch and append its mean loss per sample and its accuracy in % to the two lists.

    Computes in `autocast_dtype(device)` and shows a progress bar in a notebook or a terminal. In a `torchrun` the means
    are over all processes.

    Args:
        model: returns (N, classes) scores or log-probabilities, as the criterion takes them.
        device: where the model is, a `torch.device` or its name.
        train_loader: gives (images float32 (N, channels, H, W), labels int64 (N,)).
        criterion: (scores float32 (N, classes), labels) -> the batch's mean loss.
        scheduler: stepped after every batch, see `get_scheduler`. Do not give one that counts epochs; step it yourself.
        verbose: whether to print a line at the end.

    Raises:
        ValueError: an empty loader, labels that the model has no class for, a criterion that takes something else than
            the model returns, an optimizer, scheduler or lists that do not belong here.
        FloatingPointError: a loss that is not finite; names the epoch and the batch.

    Example:
        >>> model, train_losses, train_acc = Model(), [], []
        >>> train(model, "cpu", train_loader, get_optimizer(model), get_loss(), train_losses, train_acc)
    """
    what = "" if train_losses is None else f"epoch {len(train_losses) + 1}"
    train_losses, train_acc = ([] if values is None else values for values in (train_losses, train_acc))
    device = torch.device(device)
    epoch.check_lists([train_losses], [train_acc])
    epoch.check_criterion(criterion)
    epoch.check_optimizer(model, optimizer, criterion)
    epoch.check_scheduler(scheduler, optimizer, train_loader)
    model.train()
    # float16 gradients of a mean loss underflow unless they are scaled up.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=autocast_dtype(device) == torch.float16)
    fit_fused_state(optimizer)
    start = time.perf_counter()
    with _made_fast(model, device) as layout, epoch.batch_bar(train_loader, what or "train") as bar:
        tally = epoch.Tally(what or "train", bar, device)
        for images, labels in map(epoch.checked_batch, train_loader):
            optimizer.zero_grad()
            scores, labels = _forward(model, device, images, labels, layout)
            loss = criterion(scores, labels)
            if not tally.sizes:
                epoch.check_scores(scores, labels, criterion, loss)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # which a fused one would do inside step, behind the hooks that clip gradients
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
                scheduler.stepped_to = epoch.steps_taken(scheduler)
            tally.add(loss, scores.argmax(dim=1), labels)
        mean_loss, accuracy = tally.read()
    train_losses.append(mean_loss)
    train_acc.append(accuracy)
    if verbose:
        epoch.report(what, "train", mean_loss, accuracy, time.perf_counter() - start, train_loader)


@torch.inference_mode(False)  # which a caller may be in; lazy parameters made in it could not be trained
@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, verbose=True):
    """Evaluate without gradients and append the mean loss per sample and the accuracy in % to the two lists.

    Arguments and errors are those of `train`.

    Returns:
        The misclassified samples, a list of (image, true, predicted), in the loader's order; in a `torchrun` those of
        this process.
    """
    test_losses, test_acc = ([] if values is None else values for values in (test_losses, test_acc))
    device = torch.device(device)
    epoch.check_lists([test_losses], [test_acc])
    epoch.check_criterion(criterion)
    if world_size() > 1:  # each process by itself, as their numbers of batches may differ
        model = unwrap(model)
        share_buffers(model)
    model.eval()
    misclassified, unread = epoch.MisclassifiedSamples(), []
    start = time.perf_counter()
    with _made_fast(model, device) as layout, epoch.batch_bar(test_loader, "test") as bar:
        tally = epoch.Tally("test", bar, device)
        for images, labels in map(epoch.checked_batch, test_loader):
            scores, labels_on_device = _forward(model, device, images, labels, layout)
            loss = criterion(scores, labels_on_device)
            if not tally.sizes:
                epoch.check_scores(scores, labels_on_device, criterion, loss)
            predictions = scores.argmax(dim=1)
            unread.append((images, labels, predictions))
            # On a CPU at once, as a loader may fill the memory of its batch again.
            if tally.add(loss, predictions, labels_on_device) or device.type == "cpu":
                misclassified.read(unread)
        mean_loss, accuracy = tally.read()
    misclassified.read(unread)
    test_losses.append(mean_loss)
    test_acc.append(accuracy)
    if verbose:
        epoch.report("", "test", mean_loss, accuracy, time.perf_counter() - start, test_loader)
    return misclassified


test.__test__ = False  # not one of pytest's, in a test file with `from utils import *`


# --- Plots -----------------------------------------------------------------------------------------------------------
# Each returns its Figure, and saves it when given a path. label_map is {class name: label}, as the loaders give it.


def get_image_from_tensor(img):
    """A normalised image, float (3, H, W) on any device, as a uint8 array (H, W, 3); the input is left as it is."""
    pixels = img.detach().cpu().float().numpy().transpose(1, 2, 0) * CIFAR10_STD + CIFAR10_MEAN
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _plain(text):
    """Text that Matplotlib shows as it is, though it has dollar signs."""
    return text.replace("$", r"\$")


def _names(label_map, labels=()):
    """Class names in the order of their labels, as the plots write them; label_map must name each of the labels."""
    classes = [_plain(name) for name in class_names(label_map)]
    if any(label >= len(classes) for label in labels):
        raise ValueError(f"label_map names {len(classes)} classes and there are labels up to {int(max(labels))}")
    return classes


def _image_grid(images, titles, heading, rows, columns):
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.1 * rows + 0.5), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
    figure.suptitle(_plain(heading))
    return figure


def post_display(train_loader, label_map, path=None):
    """16 training samples, as the network sees them, with their labels."""
    images, labels = next(iter(train_loader))
    classes = _names(label_map, labels[:16])
    pictures = [get_image_from_tensor(image) for image in images[:16]]
    titles = [classes[label] for label in labels[:16]]
    heading = f"Training samples, augmented: {getattr(train_loader.dataset, 'name', '')}"
    return save_figure(_image_grid(pictures, titles, heading, 4, 4), path)


def post_augmentations(train_loader, index=0, path=None):
    """One training image as it is, and under fifteen draws of its augmentations."""
    data = train_loader.dataset
    draws = [get_image_from_tensor(data[index][0]) for _ in range(15)]
    same = sum(np.array_equal(draw, data.images[index]) for draw in draws)
    titles = ["as it is", *(f"draw {number}" for number in range(1, 16))]
    heading = f"{data.name}: one image of class {data.classes[data.labels[index]]}; {same} of 15 draws change nothing"
    return save_figure(_image_grid([data.images[index], *draws], titles, heading, 4, 4), path)


def post_accuracyplots(train_losses, test_losses, train_acc, test_acc, title="", path=None):
    """2x2 curves: training and test, loss (mean per sample) and accuracy (%), the epoch of the best accuracy marked.

    The test panels repeat the training curve, dotted, so that the gap between the two can be read.

    Raises:
        ValueError: lists of different lengths, or in another order.
    """
    lists = train_losses, test_losses, train_acc, test_acc = [
        list(values) for values in (train_losses, test_losses, train_acc, test_acc)
    ]
    if len({len(values) for values in lists}) > 1 or not test_acc:
        raise ValueError(
            f"post_accuracyplots got lists of {', '.join(str(len(values)) for values in lists)} epochs; they must be "
            "as long as each other, from 1"
        )
    epoch.check_lists([train_losses, test_losses], [train_acc, test_acc])
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True, sharey="row")
    best = int(np.argmax(test_acc))
    epochs = range(1, len(test_acc) + 1)
    marker = "." if len(epochs) < 30 else None
    rows = [("loss", "loss per sample (nats)", train_losses, test_losses)]
    rows += [("accuracy", "accuracy (%)", train_acc, test_acc)]
    for (left, right), (what, unit, trained, tested) in zip(axes, rows):
        left.plot(epochs, trained, color="tab:blue", marker=marker)
        right.plot(epochs, tested, color="tab:orange", marker=marker, label="test")
        right.plot(epochs, trained, color="tab:blue", linestyle=":", marker=marker, label="training")
        label = f"most accurate in test: epoch {best + 1}, {test_acc[best]:.2f} %"
        right.plot(best + 1, tested[best], "o", color="black", markersize=5, label=label)
        right.legend()
        for axis, split in ((left, "Training"), (right, "Test")):
            axis.set(title=f"{split} {what}", xlabel="epoch", ylabel=unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    figure.suptitle(_plain(title))
    return save_figure(figure, path)


def post_progress(run):
    """The epochs of a run so far: in a notebook a table and the curves, which grow in place, else a line per epoch.

    At the end of the run, in a notebook all along, the curves are in its folder, as curves.png.
    """
    if rank() or not run.history:
        return
    epochs = run.hyperparameters.get("epochs", len(run.history))
    left = (epochs - len(run.history)) * np.mean([row["seconds"] for row in run.history[-5:]]) / 60
    lines = [
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   train loss {row['train_loss']:.4f}  "
        f"accuracy {row['train_acc']:5.2f} %   test loss {row['test_loss']:.4f}  accuracy {row['test_acc']:5.2f} %   "
        f"lr {row['lr']:.4g}   {row['seconds']:.1f} s"
        for row in run.history
    ]
    live = in_notebook()
    if live or len(lines) >= epochs:  # to draw takes a second, too long for every epoch of a log
        columns = [[row[key] for row in run.history] for key in ("train_loss", "test_loss", "train_acc", "test_acc")]
        figure = post_accuracyplots(*columns, title=f"{run}, epoch {len(lines)} of {epochs}", path=run / "curves.png")
        plt.close(figure)  # or a notebook would show it once more at the end of the cell
    if not live:
        print(f"{lines[-1]}, {left:.0f} min left", flush=True)
        return
    from IPython.display import display

    step = -(-epochs // 16)  # so that nobody has to scroll
    shown = [line for number, line in enumerate(lines, start=1) if number in (1, len(lines)) or number % step == 0]
    table = "\n".join([*shown, f"{left:.0f} min left" if len(lines) < epochs else ""])
    for part, content in (("table", {"text/plain": table}), ("curves", figure)):
        handle = f"{part} of {id(run)}"
        new = handle not in run.displays
        run.displays.add(handle)
        display(content, raw=part == "table", display_id=handle, update=not new)


def _confidences(model, samples):
    """The model's probability of the class that it predicted, for each of the misclassified samples."""
    model = unwrap(model)
    parameter = next(model.parameters(), torch.empty(0))
    confidences = []
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(samples), 256):
            images, _, predicted = zip(*samples[start : start + 256])
            scores = model(torch.stack(images).to(parameter)).float()
            confidences += [row[int(label)] for row, label in zip(scores.softmax(dim=1).tolist(), predicted)]
    return confidences


def post_misclassified(misclassified, label_map, model, title="", path=None):
    """20 of the samples that `test` returned as wrong, with true and predicted class and the model's confidence.

    The upper ten are those of the highest confidence, the lower ten are spread over the rest.
    """
    classes = _names(label_map, [label for _, *both in misclassified for label in both])
    confidences = _confidences(model, misclassified)
    order = np.argsort(confidences)[::-1]
    surest, rest = order[:10], np.sort(order[10:])
    picked = [*surest, *rest[np.linspace(0, len(rest) - 1, min(10, len(rest)), dtype=int)]]
    titles, pictures = [], []
    for index in picked:
        image, true, predicted = misclassified[index]
        titles.append(f"{classes[predicted]} ({confidences[index]:.1%})\ntrue: {classes[true]}")
        pictures.append(get_image_from_tensor(image))
    count = f"{len(misclassified):,} mistakes"
    count += ", the ten surest and ten of the rest" if len(misclassified) > 20 else ""
    heading = f"{title}: {count}" if title else count
    return save_figure(_image_grid(pictures, titles, heading, max(1, -(-len(pictures) // 5)), 5), path)


def showmisclassifiedsamples(misclassified, label_map, title="", path=None):
    """The first ten of the samples that `test` returned as wrong, with true and predicted class."""
    shown = misclassified[:10]
    classes = _names(label_map, [label for _, *both in shown for label in both])
    titles = [f"{classes[predicted]}\ntrue: {classes[true]}" for _, true, predicted in shown]
    pictures = [get_image_from_tensor(image) for image, _, _ in shown]
    return save_figure(_image_grid(pictures, titles, title, 2, 5), path)


def post_confusion_matrix(misclassified, test_loader, label_map, title="", path=None):
    """Counts of true class (row) against predicted class (column) in a test, with the accuracy of each class.

    Args:
        misclassified: what `test` returned; of another list of samples, the loader says how many there were in all.

    Raises:
        ValueError: a label_map that does not name all classes; a list of other samples than the loader gives.
    """
    tested = getattr(misclassified, "tested", None)
    if tested is None or misclassified.found != len(misclassified):
        tested, again = (np.bincount(torch.cat([labels.cpu() for _, labels in test_loader])) for _ in range(2))
        if not np.array_equal(tested, again):
            raise ValueError(
                "the loader gives other samples each time, so it cannot say how many of each class were tested; pass "
                "the very list that test returned"
            )
    labels = [label for _, *both in misclassified for label in both]
    classes = _names(label_map, [*labels, *np.flatnonzero(tested)])
    wrong = np.zeros((len(classes), len(classes)), dtype=int)
    for _, true, predicted in misclassified:
        wrong[int(true), int(predicted)] += 1
    totals = np.pad(tested, (0, len(classes) - len(tested)))
    if (wrong.sum(axis=1) > totals).any():
        raise ValueError("there are more misclassified samples than the loader gives; pass the loader that was tested")
    matrix = wrong + np.diag(totals - wrong.sum(axis=1))
    rate = matrix / np.maximum(totals, 1)[:, None]
    figure, axis = plt.subplots(figsize=(8.5, 7.5), layout="constrained")
    # By the square root, or confusions of a few percent would all look white.
    image = axis.imshow(rate, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    for (row, column), count in np.ndenumerate(matrix):
        axis.text(column, row, count, ha="center", va="center", color="white" if rate[row, column] > 0.3 else "black")
    accuracies = [f"{name}  {100 * rate[label, label]:.1f} %" for label, name in enumerate(classes)]
    axis.set_yticks(range(len(classes)), accuracies)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    axis.set_title(f"Confusion matrix, accuracy {100 * np.trace(matrix) / matrix.sum():.2f} %\n{_plain(title)}")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return save_figure(figure, path)
