"""Labels that are not those of the model: an error with the likely cause, where else there would be a number
that means nothing."""

from __future__ import annotations

from megavit.evaluate.sets.image_set import ImageSet
from megavit.evaluate.sets.imagenet_classes import IMAGENET, NUM_CLASSES, class_of_wnid

_FEWEST_CLASSES = 20  # with fewer, chance is no sign of a mistake
_FEWEST_RIGHT = 5  # that chance must be expected to give, so that a small sample does not decide
_LUCK = 1e-3  # chance alone reaches a larger number of right ones this often
# Their images were chosen because a classifier gets them wrong: a real one may be at chance.
_ADVERSARIAL = ("imagenet-a",)


def check_space(num_outputs: int, images: ImageSet) -> None:
    """ValueError, with the likely cause, if a model with so many outputs cannot have the set's classes."""
    classes = len(images.class_names)
    if num_outputs == classes:
        return
    numbers = f"{images.name} has {classes} classes and the model {num_outputs} outputs"
    wnids = sum(name in class_of_wnid() for name in images.class_names)
    if wnids == classes and num_outputs == NUM_CLASSES:
        raise ValueError(
            f"{numbers}: its class folders are {wnids} of ImageNet's WordNet ids, and their places in this "
            f"folder are not the model's outputs. Read it as what it is (--data_root with imagenet-a, "
            f"imagenet-r, ...; the published folders), which maps by id"
        )
    if images.space == IMAGENET and num_outputs == NUM_CLASSES + 1:
        cause = "one more, so a background class is likely to come first, and every output to be one off"
    elif images.space == IMAGENET:
        cause = "it was not trained on ILSVRC 2012's 1000 classes"
    else:
        cause = "it was trained on other classes"
    raise ValueError(
        f"{numbers}: {cause}. Its own head cannot be scored here; a linear probe, kNN or few-shot can"
    )


def check_not_chance(accuracy: float, num_classes: int, n: int, name: str) -> None:
    """ValueError, with the likely cause, if an accuracy over n images is not above that of guessing among
    `num_classes` (the candidates).

    It is silent where that may be true of a good model or says nothing: fewer than 20 classes, so few images
    that guessing is right less than 5 times, and ImageNet-A, whose images were chosen to be got wrong.
    """
    chance = 1 / num_classes
    if num_classes < _FEWEST_CLASSES or n * chance < _FEWEST_RIGHT or name in _ADVERSARIAL:
        return
    from scipy.stats import binom

    right = round(accuracy * n)
    # P(at least so many right ones by guessing)
    if binom.sf(right - 1, n, chance) > _LUCK:
        raise ValueError(
            f"{name}: {right} of {n} images are right ({accuracy:.3%}), which guessing among {num_classes} "
            f"classes gives as well ({chance:.3%}). The likely cause is that the class numbers of the labels "
            f"and of the model's outputs differ: other class order in the shards or folders that it was "
            f"trained on (classes.txt), or other preprocessing than the export states; or it is untrained"
        )
