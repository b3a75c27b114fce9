"""What the studies of images share: names."""

CLASSES = 10
TITLES = {
    "mnist-5k": "MNIST-5k",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}
