"""CIFAR-100: 60,000 colour photographs of 32 x 32 pixels, in 100 classes."""

from jaxpar.core.cifar import Kind, cifar_images
from jaxpar.core.files import File
from jaxpar.core.images import Colours, image_dataset
from jaxpar.core.types import Dataset

FILES = (
    File(
        dataset="cifar100",
        names=("cifar-100-binary.tar.gz",),
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        checksum="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        instead="digits",
    ),
)
KIND = Kind(
    file=FILES[0],
    folder="cifar-100-binary",
    files=(("train.bin",), ("test.bin",)),
    counts=(50_000, 10_000),
    classes=100,
    heading=2,  # one of 20 coarse labels, then the fine one
    column="fine_label",
)
COLOURS = Colours((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def cifar100(*, batch: int, seed: int = 0, augment: bool = True, data_dir: str | None = None) -> Dataset:
    """50,000 training images and the 10,000 test images, which are held out, with their fine labels.

    Args:
        batch: images per step, over all devices.
        seed: picks the order of the training images, and how each is shifted and mirrored.
        augment: whether they are: padded by 4 pixels, cropped and flipped at random.
        data_dir: folder with the published archive, its unpacked files, or parquet files of encoded images (which needs
            `pip install "jaxpar[images]"`); None: the cache, filled by one download of 169 MB.

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
