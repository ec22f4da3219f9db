"""Small networks for images, one of each member; smooth, so that rounding stays small."""

from jaxpar.core.recipe import Model

SMOOTH = {"activation": "gelu_tanh"}
NETWORKS = {
    "lenet": Model("lenet", width=24),
    "resnet": Model("resnet", layers=8, width=16, **SMOOTH),
    "unet": Model("unet", layers=2, width=16, **SMOOTH),
    "vgg": Model("vgg", layers=11, width=8, hidden=16, dropout=0.1, **SMOOTH),
    "alexnet": Model("alexnet", width=8, hidden=16, dropout=0.1, **SMOOTH),
    "googlenet": Model("googlenet", width=16, dropout=0.1, **SMOOTH),
}
