"""Backbone plug-ins: networks up to their last feature maps. A file defines:

class Options(Section)                      its keys under backbones.<name>.options
def build(options) -> nn.Module             forward(x): (B, 3, H, W) -> a tuple of E maps (B, C, H', W');
                                            attributes `channels` (C) and `experts` (E)
"""
