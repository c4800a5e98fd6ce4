"""Stage-I objectives. A file defines:

class Loss(Section)                         its keys under backbones.<name>.loss
class Objective(training.objective.Objective)
                                            __init__(loss, channels, experts, counts): the stage-I head;
                                            `classifier`: a kind of networks.classifier.Classifier, and `scale`, which
                                            say how its state gives logits; `forward(maps)` -> what the loss needs,
                                            `cost(found, labels, epoch)` -> the mean loss, a scalar
"""
