"""Pool plug-ins: maps (..., C, H, W) -> features (..., C). A file defines:

class Options(Section)          its keys under hosts.<name>.pool_options
class Pool                      __init__(options, channels)
    commutes                    True if it acts on each channel alone and has no trainable part: then pooling
                                before fusing gives the same result, and stage II may run on pooled vectors
    initial() -> {name: tensor} what is trained; empty if nothing
    __call__(state, maps)       (..., C, H, W) -> (..., C)
"""
