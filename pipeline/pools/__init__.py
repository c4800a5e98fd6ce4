"""Pool plug-ins: maps (..., C, H, W) -> features (..., C), or (..., C, M) for M numbers a channel. A file defines:

class Options(Section)          its keys under hosts.<name>.pool_options
class Pool                      __init__(options, channels)
    commutes                    True if it acts on each channel alone and has no trainable part: then pooling
                                before fusing gives the same result, and stage II may run on pooled vectors
    linear                      True if it is linear in the maps: then feature mixup commutes with it, too
    numbers                     M, where it is not 1
    initial() -> {name: tensor} what is trained; empty if nothing
    __call__(state, maps)       (..., C, H, W) -> (..., C[, M])
"""
