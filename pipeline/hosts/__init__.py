"""Host plug-ins: the stage-II methods that H2T plugs into. A file defines:

class Loss(Section)         its constants, the keys under hosts.<name>.loss; may be left out if there are none
class Host(GradientHost)    made with (loss, classifier, scale, context); see h2t.pipeline.heads.host

A method with a closed-form fit has `class Host(FittedHost)` with `fit(features, labels, stage1) -> state`.
"""
