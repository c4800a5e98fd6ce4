"""Host plug-ins: stage-II methods that H2T plugs into. A file defines:

    class Loss(Section)                     its constants, the keys under hosts.<name>.loss
    class Host(GradientHost)                __init__(loss, classifier, scale, context); see h2t.pipeline.heads.host

or, for a method that is no gradient descent, `class Host(FittedHost)` with `fit(features, labels, stage1) -> state`.
"""
