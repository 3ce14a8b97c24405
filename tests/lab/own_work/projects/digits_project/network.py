"""The network."""

from torch import nn


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(2 * width, 10))

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))
