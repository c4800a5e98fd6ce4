"""Few channels: two convolutions with batch norm, maps of 8 channels at a quarter of the input's side."""

from torch import nn

from h2t.pipeline.base.params import Count, Section


class Options(Section):
    """`experts`: parallel branches."""

    experts: Count = 1


class Few(nn.Module):
    """One shared layer, then one layer for each expert."""

    channels = 8

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.shared = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.own = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(experts)
        )

    def forward(self, x):
        """(B, 3, H, W) -> a map (B, 8, H / 4, W / 4) of every expert."""
        x = self.shared(x)
        return tuple(branch(x) for branch in self.own)


def build(options: Options) -> nn.Module:
    """The network with fresh weights from torch's generator."""
    return Few(options.experts)
