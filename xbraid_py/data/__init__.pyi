from . import indian_pines as indian_pines, mnist as mnist, peaks as peaks, text as text
from .dataset import Batches as Batches, Dataset as Dataset
from .image_sets import load_images as load_images
from .images import Augmentation as Augmentation, Images as Images, ImageSets as ImageSets, standardize as standardize
from .mnist import Mnist as Mnist
from .text import Corpus as Corpus
