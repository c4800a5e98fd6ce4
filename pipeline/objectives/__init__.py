"""Objective plug-ins: the classifier of stage I and its loss. A file defines:

class Loss(Section)                         its keys under backbones.<name>.loss; may be left out
class Objective(training.objective.Objective)
                                            `__init__(loss, channels, experts, counts)`, the attributes `classifier`
                                            and `scale`, `forward(maps)` and `cost(outputs, labels, epoch)`; of a
                                            `LinearObjective` or `CosineObjective` only `cost`; `first_branch_share`
                                            only if two branches train on a batch each, like `bbn`
"""
