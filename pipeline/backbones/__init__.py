"""Backbone plug-ins: networks up to their last feature maps. A file defines:

class Options(Section)                      its keys under backbones.<name>.options
def build(options) -> nn.Module             forward(x): (B, 3, H, W) -> a tuple of E maps (B, C, H', W');
                                            attributes `channels` (C) and `experts` (E); a part that stays in eval
                                            mode under train() is frozen, batch norm included; `fresh`, if it is
                                            there: prefixes of weights that pretrained ones do not replace
def weights(options) -> state dict          only where there are pretrained weights for `start: torchvision`
"""
