"""The transforms of torchvision that Flower's examples use, of PIL images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


class InterpolationMode(Enum):
    """What transformers imports where it finds torchvision, and puts into a table."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    """One transform after another."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self._transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self._transforms:
            value = transform(value)
        return value


class ToTensor:
    """An image as channels x height x width between 0 and 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image, dtype=np.float32) / 255
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


class Normalize:
    """Less a mean, over a standard deviation, by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self._mean) / self._std


class RandomCrop:
    """A part of an image of so many pixels, after a border was put around it."""

    def __init__(self, size: int, padding: int = 0) -> None:
        self._size, self._padding = size, padding

    def __call__(self, image: Image.Image) -> Image.Image:
        image = ImageOps.expand(image, self._padding)
        left, top = (int(torch.randint(0, n - self._size + 1, ())) for n in image.size)
        return image.crop((left, top, left + self._size, top + self._size))


class RandomHorizontalFlip:
    """An image or its mirror image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image
