"""Is a trained network a better start for few images of other classes? On classes held out of its training.

    python benchmarks/finetune.py

A network learns five classes of CIFAR-10 by `resnet-quick` with the augmentation of `finetune`. Then N images of each
of the other five are learned, by `finetune` from it, and from scratch in batches of 16 and three times the epochs.
"""

import copy
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from speed import processor

import utils
from output import write_atomically

RESULT = pathlib.Path(__file__).parent / "results" / "finetune.json"
KNOWN, OTHERS = (0, 1, 2, 4, 6), (3, 5, 7, 8, 9)  # airplane, automobile, bird, deer, frog; cat, dog, horse, ship, truck


def of_classes(split, classes, batch_size, per_class=None, seed=0, **options):
    """A loader of the first, or of some, images of some classes, whose labels are their places in the list."""
    _, loader = utils.get_CIFARdataset_with_loader(split, {"batch_size": batch_size}, **options)
    data, order = loader.dataset, np.random.default_rng(seed).permutation(len(loader.dataset))
    index = np.concatenate([order[data.labels[order] == label][:per_class] for label in classes])
    data.images, data.labels = data.images[index], np.searchsorted(classes, data.labels[index])
    return loader


def trained(recipe, classes, per_class=None, seed=1, body=None):
    """(model, accuracy in %) after the recipe's epochs."""
    utils.seed_everything(seed)
    transforms, size = utils.get_train_transforms(**recipe["transforms"]), recipe["batch_size"]
    loader = of_classes("train", classes, size, per_class, seed, transforms=transforms)
    model, device = utils.build_model(recipe | {"weights": None}, len(classes)), utils.best_device()
    if body is not None:
        (body := copy.deepcopy(body)).classifier = model.classifier
        model.load_state_dict(body.state_dict())
    optimizer, scheduler, criterion = utils.build_training(recipe, model.to(device), len(loader))
    for _ in range(recipe["epochs"]):
        utils.train(model, device, loader, optimizer, criterion, scheduler=scheduler)
    utils.test(model, device, of_classes("test", classes, 500), criterion, test_acc=(accuracies := []))
    return model, accuracies[0]


def main():
    finetune = utils.get_recipe("finetune")
    quick = utils.get_recipe("resnet-quick") | {"transforms": finetune["transforms"]}
    scratch = quick | {"batch_size": 16, "epochs": 3 * finetune["epochs"]}
    body, accuracy = trained(quick, KNOWN)
    result = {"processor": processor(utils.best_device()), "recipe": finetune, "accuracy on known classes": accuracy}
    print("\n| images of each class | fine-tuned, % | from scratch, % |\n| --- | --- | --- |")
    for per_class in (20, 50, 100):
        row = {"fine-tuned": [trained(finetune, OTHERS, per_class, seed, body)[1] for seed in (1, 2, 3)]}
        row["from scratch"] = [trained(scratch, OTHERS, per_class, seed)[1] for seed in (1, 2, 3)]
        result[str(per_class)] = row
        cells = (f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in row.values())
        print(f"| {per_class} | {' | '.join(cells)} |", flush=True)
        write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
