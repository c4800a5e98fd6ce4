"""Backbone plug-ins: networks up to their last feature maps. A file defines:

class Options(Section)                      its keys under backbones.<name>.options
def build(options) -> Backbone              a subclass of networks.backbone.Backbone, or any nn.Module with its
                                            attributes `channels` and `experts`; initial weights come from torch's
                                            global generator; its method `alone(x, expert)`, the map of one branch,
                                            is only for objectives whose branches train on a batch each
def weights(options) -> state dict          only if there are pretrained weights for `start: torchvision`
def made_for(options) -> Input              only with `weights`: what they take, if `input` does not state it; images
                                            that are prepared otherwise get a note
"""
