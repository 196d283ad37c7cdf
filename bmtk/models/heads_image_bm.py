"""Image heads.  B images, C channels, H x W pixels, L positions, D width, K labels.

An image trunk returns `last_hidden_state` (B, L, D) in row-major order and has:
- `outputs.pooler_output` (B, D): the input of a classifier (and of VisionTextDualEncoderModel);
- `trunk.output_stride`: pixels per position, along each side;
- `trunk.stem.width` and `trunk.stem.num_prefix_tokens` (see stems_image_bm.py), and a forward that passes
  `bool_masked_pos` and `mask_token` to its stem.
Every loss is a sum over predicted elements / `num_items_in_batch`, as in heads_bm.py.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput, MaskedImageModelingOutput
from transformers.utils import can_return_tuple

from .heads_bm import check_input, classification_loss
from .kaiming_bm import KaimingLinear
from .stems_image_bm import mask_of_size


class LinearClassifier(nn.Sequential):
    """Dropout and one linear layer: (B, D) -> (B, K)."""

    def __init__(self, config):
        super().__init__(nn.Dropout(config.classifier_dropout), nn.Linear(config.hidden_size, config.num_labels))


class FullyConnectedClassifier(nn.Sequential):
    """`classifier_hidden_sizes` layers (dropout, linear, activation), then one more: (B, D * grid^2) -> (B, K)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size * config.pooled_grid**2
        for hidden in config.classifier_hidden_sizes:
            self.extend(
                (nn.Dropout(config.classifier_dropout), KaimingLinear(width, hidden), ACT2FN[config.hidden_act])
            )
            width = hidden
        self.extend((nn.Dropout(config.classifier_dropout), nn.Linear(width, config.num_labels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[-1].bias.dtype))  # a trunk without parameters returns the dtype of its input


class ImageClassificationHead:
    """One label, several labels (`problem_type`) or numbers for a whole image."""

    main_input_name = "pixel_values"
    classifier_class = LinearClassifier

    def __init__(self, config):
        check_input(config, type(self).__name__, "pixels")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.classifier = self.classifier_class(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Logits (B, K); an item of the loss is an image."""
        outputs = self.model(pixel_values=pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MaskedImageModelingHead:
    """Predicts the pixels of masked cells with one linear layer (SimMIM: Xie et al. 2022, arXiv:2111.09886)."""

    main_input_name = "pixel_values"

    def __init__(self, config):
        check_input(config, type(self).__name__, "pixels")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.mask_token = nn.Parameter(torch.zeros(self.model.stem.width))
        self.decoder = nn.Linear(config.hidden_size, self.model.output_stride**2 * config.num_channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskedImageModelingHead):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Reconstruction (B, C, H, W).  `bool_masked_pos` (B, M) is 1 at masked cells of a square grid, row by row.

        The loss is the mean absolute error of the pixels in masked cells; an item of the loss is a masked cell.
        """
        masked = {} if bool_masked_pos is None else {"bool_masked_pos": bool_masked_pos, "mask_token": self.mask_token}
        outputs = self.model(pixel_values=pixel_values, **masked, **kwargs)
        positions = outputs.last_hidden_state[:, self.model.stem.num_prefix_tokens :]
        reconstruction = self.paint(self.decoder(positions), pixel_values)
        loss = None
        if bool_masked_pos is not None:
            hidden = mask_of_size(bool_masked_pos, pixel_values, pixel_values.shape[-2:])
            error = (reconstruction.float() - pixel_values.float()).abs().mean(1, keepdim=True)  # (B, 1, H, W)
            pixels_per_cell = hidden[0].numel() / bool_masked_pos.shape[1]
            count = bool_masked_pos.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = (error * hidden).sum() / pixels_per_cell / count
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def paint(self, patches: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, L, stride^2 * C) -> (B, C, H, W): each position becomes its square of pixels."""
        stride, (height, width) = self.model.output_stride, pixel_values.shape[-2:]
        rows, columns = height // stride, width // stride
        if height % stride or width % stride or patches.shape[1] != rows * columns:
            raise ValueError(
                f"an image of {height} x {width} pixels gives {patches.shape[1]} positions of {stride} x {stride} "
                "pixels, which do not tile it; choose a multiple of the trunk's stride, and paddings that keep sizes"
            )
        tiles = patches.view(patches.shape[0], rows, columns, stride, stride, -1)
        return tiles.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)


__all__ = [
    "FullyConnectedClassifier",
    "ImageClassificationHead",
    "LinearClassifier",
    "MaskedImageModelingHead",
]
