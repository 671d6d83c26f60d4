"""Small networks, written as torchvision writes its large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class BasicBlockWithIdentities(BasicBlock):
    """Places for dropout, stochastic depth and anti-aliasing that nobody has filled."""

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(inputs, planes, stride, downsample)
        self.drop_block = nn.Identity()
        self.drop_path = nn.Identity()
        self.anti_aliasing = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.drop_block(self.bn1(self.conv1(x)))
        x = self.anti_aliasing(self.relu(x))
        x = self.drop_path(self.anti_aliasing(self.bn2(self.conv2(x))))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.relu(self.anti_aliasing(x))


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck]) -> None:
        super().__init__()
        self.title = f"ResNet of {block.__name__}"
        self.inplanes = 4
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 4, 2)
        self.layer2 = self._make_layer(block, 6, 1, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6 * block.expansion, 5)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int = 1
    ) -> nn.Sequential:
        downsample = None
        outputs = planes * block.expansion
        if stride != 1 or self.inplanes != outputs:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outputs, stride), nn.BatchNorm2d(outputs)
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outputs
        layers += [block(outputs, planes, 1, None) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class VGG(nn.Module):
    title = "VGG"

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for activation in (nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(), nn.SiLU()):
            layers += [nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), activation]
            inputs = 4
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.mean((2, 3)))


class DenseLayer(nn.Module):
    """Takes a tensor or a list of tensors, as that of torchvision."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inputs, 4)
        self.norm2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(4, 2)
        self.drop_rate = 0.0

    def bottleneck(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        new = self.conv2(self.relu2(self.norm2(self.bottleneck(features))))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseNet(nn.Module):
    title = "DenseNet"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(3 + 2 * i) for i in range(2))
        self.norm5 = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm5(torch.cat(features, 1)), inplace=True)
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


class PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolution; the sum comes last."""

    title = "pre-activation"

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(3), conv3x3(3, 4)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), conv3x3(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.bn1(x), 0.1))
        return x + self.conv2(self.bn2(y).relu())


class InlineDownsample(nn.Module):
    """Two BatchNorms in one sum: one takes the other as its residual."""

    title = "inline downsample"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv1x1(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.bn1(self.conv1(x)), self.bn2(self.conv2(x))))


class Forward(nn.Module):
    """A module with one BatchNorm, one ReLU and the forward that is given."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], bn: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3) if bn is None else bn
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.calls: list[Tensor] = []
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)
