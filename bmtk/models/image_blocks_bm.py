"""Two-dimensional convolution blocks.  B images, C channels, H x W pixels.

Sources: plain, Krizhevsky et al. 2012 and Simonyan & Zisserman 2014, arXiv:1409.1556; basic and bottleneck, He et al.
2015, arXiv:1512.03385, by default with the stride on the 3x3 convolution as in torchvision; ConvNeXt, Liu et al. 2022,
arXiv:2201.03545; stochastic depth, Huang et al. 2016, arXiv:1603.09382.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .trunk_layer_bm import TrunkLayer

POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W), pixel by pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that updates its running statistics once a step, not again in a checkpointed recomputation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # inside a backward
        if not (self.training and recomputed):
            return super().forward(x)
        momentum = 0.0  # leaves the statistics unchanged; everything else as in the first forward
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)


NORMS = {
    "batch_norm": BatchNorm,
    "layer_norm": ChannelLayerNorm,
    "none": lambda channels, eps: nn.Identity(),
}


def build_norm(config, channels: int) -> nn.Module:
    return NORMS[config.norm_type](channels, eps=config.norm_eps)


class ConvNormAct(nn.Sequential):
    """Convolution (biased unless batch norm follows), norm, and unless `act` is False the activation.

    A strided 1x1 convolution slices the pixels first: oneDNN's own writes out of bounds in the backward if the memory
    format is channels last, as it is after a layer norm (github.com/uxlfoundation/oneDNN/issues/6035, open in 2026).
    """

    def __init__(self, config, inputs: int, outputs: int, *, kernel_size=3, stride=1, padding=None, act=True):
        padding = kernel_size // 2 if padding is None else padding
        skips = kernel_size == 1 and padding == 0
        bias = config.norm_type != "batch_norm"  # batch norm subtracts the mean, so a bias before it has no effect
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel_size, stride=1 if skips else stride, padding=padding, bias=bias),
            build_norm(config, outputs),
            ACT2FN[config.hidden_act] if act else nn.Identity(),
        )
        self.every = stride if skips else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.every == 1 else x[..., :: self.every, :: self.every])


class DropPath(nn.Module):
    """Stochastic depth: in training, skip a block's residual branch for some images, and scale up the others."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1, device=x.device).bernoulli_(1 - self.probability)
        return x * (keep / (1 - self.probability)).to(x.dtype)


class PlainBlock(GradientCheckpointingLayer):
    """y = act(norm(conv(x)))."""

    def __init__(self, config, inputs: int, outputs: int, *, kernel_size: int, stride: int, padding: int, drop_path):
        super().__init__()
        self.conv = ConvNormAct(config, inputs, outputs, kernel_size=kernel_size, stride=stride, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class ResidualBlock(GradientCheckpointingLayer):
    """y = act(shortcut(x) + drop_path(body(x))); subclasses build the body."""

    def __init__(self, config, inputs: int, outputs: int, *, kernel_size: int, stride: int, padding: int, drop_path):
        super().__init__()
        self.body = self.build_body(config, inputs, outputs, kernel_size=kernel_size, stride=stride, padding=padding)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = ConvNormAct(config, inputs, outputs, kernel_size=1, stride=stride, act=False)
        self.act = ACT2FN[config.hidden_act]
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.shortcut(x) + self.drop_path(self.body(x)))


class BasicBlock(ResidualBlock):
    """Two convolutions; the first carries the stride."""

    def build_body(self, config, inputs, outputs, *, kernel_size, stride, padding) -> nn.Module:
        shape = {"kernel_size": kernel_size, "padding": padding}
        return nn.Sequential(
            ConvNormAct(config, inputs, outputs, stride=stride, **shape),
            ConvNormAct(config, outputs, outputs, act=False, **shape),
        )


class BottleneckBlock(ResidualBlock):
    """1x1 convolution to outputs / expansion, k x k convolution, 1x1 back; one of the first two strided."""

    def build_body(self, config, inputs, outputs, *, kernel_size, stride, padding) -> nn.Module:
        inner = outputs // config.expansion
        strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
        return nn.Sequential(
            ConvNormAct(config, inputs, inner, kernel_size=1, stride=strides[0]),
            ConvNormAct(config, inner, inner, kernel_size=kernel_size, stride=strides[1], padding=padding),
            ConvNormAct(config, inner, outputs, kernel_size=1, act=False),
        )


class ConvNextBlock(GradientCheckpointingLayer):
    """y = x + drop_path(scale * down(act(up(norm(depthwise(x)))))); its stage downsamples before the first block."""

    def __init__(self, config, inputs: int, outputs: int, *, kernel_size: int, stride: int, padding: int, drop_path):
        super().__init__()
        self.depthwise = nn.Conv2d(outputs, outputs, kernel_size, padding=padding, groups=outputs)
        self.norm = build_norm(config, outputs)
        self.up = nn.Linear(outputs, config.expansion * outputs)
        self.act = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.expansion * outputs, outputs)
        self.layer_scale = nn.Parameter(torch.full((outputs,), float(config.layer_scale_init_value)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x)).movedim(1, -1)  # (B, H, W, C)
        y = self.layer_scale * self.down(self.act(self.up(y)))
        return x + self.drop_path(y.movedim(-1, 1))


BLOCKS = {"plain": PlainBlock, "basic": BasicBlock, "bottleneck": BottleneckBlock, "convnext": ConvNextBlock}


class ImageStage(TrunkLayer):
    """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride): downsampling, `depth` blocks, pooling."""

    def __init__(self, config, index: int, drop_paths: list[float]):
        super().__init__()
        inputs = config.hidden_sizes[index - 1] if index else config.stem_width
        outputs, stride = config.hidden_sizes[index], config.strides[index]
        shape = {"kernel_size": config.kernel_sizes[index], "padding": config.paddings[index]}
        self.downsample = nn.Identity()
        if config.block_type == "convnext" and (inputs != outputs or stride != 1):
            conv = nn.Conv2d(inputs, outputs, stride, stride=stride)
            self.downsample, inputs, stride = nn.Sequential(build_norm(config, inputs), conv), outputs, 1
        self.blocks = nn.ModuleList()
        for drop_path in drop_paths:
            block = BLOCKS[config.block_type]
            self.blocks.append(block(config, inputs, outputs, stride=stride, drop_path=drop_path, **shape))
            inputs, stride = outputs, 1
        pool = config.pool_sizes[index]
        self.pool = POOLS[config.pooling_type](pool, stride=config.pool_stride) if pool > 1 else nn.Identity()
        if config.pools_first:
            self.blocks[-1].conv.insert(1, self.pool)
            self.pool = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return self.pool(x)


def build_stages(config) -> nn.ModuleList:
    """The stages; the probability of stochastic depth grows linearly from 0 to `drop_path_rate` over all blocks."""
    rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
    stages = nn.ModuleList()
    for index, depth in enumerate(config.depths):
        stages.append(ImageStage(config, index, rates[:depth]))
        rates = rates[depth:]
    return stages


__all__ = ["POOLS", "ConvNextBlock", "ConvNormAct", "ImageStage", "build_norm", "build_stages"]
