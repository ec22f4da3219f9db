"""MNIST: 70,000 handwritten digits of 28 x 28 pixels."""

from jaxpar.core.files import File
from jaxpar.core.idx import idx_images
from jaxpar.core.images import Colours, image_dataset
from jaxpar.core.types import Dataset

FROM = "https://storage.googleapis.com/cvdf-datasets/mnist"
PUBLISHED = {  # bytes and SHA-256
    "train-images-idx3-ubyte": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
FILES = tuple(
    File("mnist", (f"mnist-{name}.gz", f"{name}.gz"), f"{FROM}/{name}.gz", size, f"sha256:{digest}", "digits")
    for name, (size, digest) in PUBLISHED.items()
)
COUNTS, SIDE = (60_000, 10_000), 28
COLOURS = Colours((0.1307,), (0.3081,))


def mnist(*, batch: int, seed: int = 0, augment: bool = False, data_dir: str | None = None) -> Dataset:
    """60,000 training images and the 10,000 test images, which are held out.

    Args:
        batch: images per step, over all devices.
        seed: picks the order of the training images, and how each is shifted and mirrored.
        augment: whether they are: padded by 4 pixels, cropped and flipped at random, which makes
            other signs of some digits.
        data_dir: folder with the four files, under the names they were published under; None: the cache, filled by
            downloads of 12 MB.

    Returns:
        Inputs float32 `[batch, 28, 28, 1]`, less their mean over their deviation; labels int32 `[batch]`. The last
        held-out batch is filled up with zeros of label -1.

    Raises:
        Refused: if a file cannot be had or is not the published one, or the batch exceeds the held-out images.

    Source: LeCun, Bottou, Bengio and Haffner 1998, doi:10.1109/5.726791, section III.A; sizes and checksums as in
    TensorFlow Datasets.
    """
    images = idx_images(FILES, COUNTS, SIDE, data_dir)
    return image_dataset(images, COLOURS, batch=batch, classes=10, seed=seed, augment=augment)
