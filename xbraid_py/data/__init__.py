"""Data sets, one file each: points and features as a `Dataset`, images of digits, and texts."""

from xbraid_py.data import mnist, peaks, text
from xbraid_py.data.dataset import Dataset
from xbraid_py.data.mnist import Batches, Mnist
from xbraid_py.data.text import Corpus

__all__ = ["Batches", "Corpus", "Dataset", "Mnist", "mnist", "peaks", "text"]
