"""Fashion-MNIST: 70,000 pictures of clothes, of 28 x 28 pixels, in 10 classes."""

from jaxpar.core.files import File
from jaxpar.core.idx import idx_images
from jaxpar.core.images import Colours, image_dataset
from jaxpar.core.types import Dataset

FROM = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
PUBLISHED = {  # bytes and SHA-256
    "train-images-idx3-ubyte": (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}
FILES = tuple(
    File(
        "fashion_mnist",
        (f"fashion-mnist-{name}.gz", f"{name}.gz"),
        f"{FROM}/{name}.gz",
        size,
        f"sha256:{digest}",
        "digits",
    )
    for name, (size, digest) in PUBLISHED.items()
)
COUNTS, SIDE = (60_000, 10_000), 28
COLOURS = Colours((0.2860,), (0.3530,))


def fashion_mnist(*, batch: int, seed: int = 0, augment: bool = False, data_dir: str | None = None) -> Dataset:
    """60,000 training images and the 10,000 test images, which are held out.

    Args:
        batch: images per step, over all devices.
        seed: picks the order of the training images, and how each is shifted and mirrored.
        augment: whether they are: padded by 4 pixels, cropped and flipped at random.
        data_dir: folder with the four files, under the names they were published under; None: the cache, filled by
            downloads of 31 MB.

    Returns:
        Inputs float32 `[batch, 28, 28, 1]`, less their mean over their deviation; labels int32 `[batch]`. The last
        held-out batch is filled up with zeros of label -1.

    Raises:
        Refused: if a file cannot be had or is not the published one, or the batch exceeds the held-out images.

    Source: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; sizes and checksums as in TensorFlow Datasets.
    """
    images = idx_images(FILES, COUNTS, SIDE, data_dir)
    return image_dataset(images, COLOURS, batch=batch, classes=10, seed=seed, augment=augment)
