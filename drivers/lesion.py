"""Norms of residual modules over depth, and lesions of trained networks (paper 003, sections 3.2 and 3.3, appendix C).

    Y_{j+1} = Y_j + G(Y_j),    G = h F,    |G| falls as 1/d with the number d of blocks if the network is one of an ODE.

Networks of several depths are trained on images with the same step size h at every depth (implicit), and with one that
is halved where the blocks are doubled (explicit); or checkpoints of drivers/cifar.py are taken. Then every block is
left out in turn, several are at random, and blocks are shuffled within their stages. Networks that are trained already
are not trained again. Tables, figures 3, 4 and 7, and a picture of the lesions are at the end. Try

    python drivers/lesion.py
    mpirun -n 2 python drivers/lesion.py --depths=4,8 --step_sizes=implicit --epochs=20
    python drivers/lesion.py --depths=5,9,18 --filters=16,32,64 --epochs=160 --eta_max=0.5 --train_images=0 \\
        --test_images=0 --device=cuda
    python drivers/lesion.py --checkpoint=runs/cifar/last_0/checkpoints/update_000160.h5
    python drivers/lesion.py --smoke --out /tmp/lesion
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from studies import lesion
from studies.lesion.options import LesionOptions as Options
from studies.lesion.options import Lesions

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

# It takes the options of a training.
CIFAR = Path(__file__).with_name("cifar.py")
PRESETS = {
    "smoke": {
        "train_images": 100,
        "test_images": 50,
        "depths": (2, 4),
        "filters": (4, 8, 16),
        "epochs": 2,
        "batch_size": 25,
        "draws": 2,
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the trainings and what is done to the networks."""
    here = {"device": options.device, "test_images": options.test_images, "data_dir": options.data_dir}
    given = [lesion.read_trained(path, **here) for path in options.checkpoint]
    trainings, samples = [], [each.options.samples() for each in given]
    for trained, images in zip(given, samples, strict=True):
        trained.options.check(images, comm.size)
    if not given:
        trainings, samples = options.trainings, [options.samples()]
    runs = [recipes.images.prepare(one, samples[0], comm, driver=CIFAR) for one in trainings]
    said = "\n".join(dict.fromkeys(each.said for each in samples))

    def run() -> None:
        if comm.rank == 0:
            print(said, flush=True)
        for each in runs:
            each()
        networks = given or lesion.read_newest(trainings, **here)
        measured = lesion.measure_all(networks, Lesions(draws=options.draws), comm)
        lesion.write_lesions(measured, options.out, comm)

    return run


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
