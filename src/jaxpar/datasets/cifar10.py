"""CIFAR-10: 60,000 colour photographs of 32 x 32 pixels, in 10 classes."""

from jaxpar.core.cifar import Kind, cifar_images
from jaxpar.core.files import File
from jaxpar.core.images import Colours, image_dataset
from jaxpar.core.types import Dataset

FILES = (
    File(
        dataset="cifar10",
        names=("cifar-10-binary.tar.gz",),
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        checksum="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        instead="digits",
    ),
)
KIND = Kind(
    file=FILES[0],
    folder="cifar-10-batches-bin",
    files=(tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",)),
    counts=(50_000, 10_000),
    classes=10,
    heading=1,
    column="label",
)
COLOURS = Colours((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar10(*, batch: int, seed: int = 0, augment: bool = True, data_dir: str | None = None) -> Dataset:
    """50,000 training images and the 10,000 test images, which are held out.

    Args:
        batch: images per step, over all devices.
        seed: picks the order of the training images, and how each is shifted and mirrored.
        augment: whether they are: padded by 4 pixels, cropped and flipped at random.
        data_dir: folder with the published archive, its unpacked files, or parquet files of encoded images (which needs
            `pip install "jaxpar[images]"`); None: the cache, filled by one download of 170 MB.

    Returns:
        Inputs float32 `[batch, 32, 32, 3]`, each channel less its mean over its deviation; labels int32 `[batch]`. The
        last held-out batch is filled up with zeros of label -1.

    Raises:
        Refused: if the images cannot be had whole, or the batch exceeds the held-out ones.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images; means and deviations of its
    training images; size and checksum of the archive as in TensorFlow Datasets.
    """
    images = cifar_images(KIND, data_dir)
    return image_dataset(images, COLOURS, batch=batch, classes=KIND.classes, seed=seed, augment=augment)
