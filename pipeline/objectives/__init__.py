"""Stage-I objectives. A file defines:

class Loss(Section)                         its keys under backbones.<name>.loss
class Objective(nn.Module)                  __init__(loss, channels, experts, counts): the stage-I head;
                                            `classifier`: a kind of pipeline.head.Classifier, and `scale`, which
                                            say how its state gives logits; `loss(maps, labels, epoch)` -> scalar
"""
