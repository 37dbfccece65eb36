"""Data sets: points and features as a `Dataset`, images of digits and of things, texts, and samples of PDEs."""

from xbraid_py.data import mnist, peaks, text
from xbraid_py.data.dataset import Batches, Dataset
from xbraid_py.data.image_sets import load_images
from xbraid_py.data.images import Augmentation, Images, ImageSets, standardize
from xbraid_py.data.mnist import Mnist
from xbraid_py.data.text import Corpus

__all__ = [
    "Augmentation",
    "Batches",
    "Corpus",
    "Dataset",
    "ImageSets",
    "Images",
    "Mnist",
    "load_images",
    "mnist",
    "peaks",
    "standardize",
    "text",
]
