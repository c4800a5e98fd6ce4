"""Pool plug-ins: maps (..., C, H, W) -> features (..., C), or (..., C, M) for M numbers per channel. A file defines:

class Options(Section)      the keys under hosts.<name>.pool_options; may be left out if there are none
class Pool(pool.Pool)            see h2t.pipeline.networks.pool for what a pool states about itself
"""
