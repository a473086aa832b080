"""The model, the data and the training loop. Imported in the job, never at the login node."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, FEATURES = 4, 16


class Net(nn.Module):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def load_data(partition: int) -> tuple[DataLoader, DataLoader]:
    """Return a node's training and test data: points around one centre per class."""
    centres = 2.0 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(partition + 1)
    labels = torch.randint(CLASSES, (512,), generator=own)
    points = centres[labels] + torch.randn(512, FEATURES, generator=own)
    train = TensorDataset(points[:384], labels[:384])
    test = TensorDataset(points[384:], labels[384:])
    return DataLoader(train, batch_size=32), DataLoader(test, batch_size=128)


def train(model: nn.Module, data: DataLoader, epochs: int, lr: float) -> float:
    """Train in place; return the mean loss of the last epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for points, labels in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(points.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(data)


@torch.no_grad()
def test(model: nn.Module, data: DataLoader) -> float:
    """Return the accuracy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    right = sum((model(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in data)
    return right / len(data.dataset)
