"""Sampler plug-ins: laws of drawing training samples. A file defines one function:

    def draw(classes: ClassIndex, streams: (key...) -> Generator, epoch, step, size) -> int64 (size,)

It returns positions into the class-sorted samples. It is a pure function of its arguments, so any step can be drawn
without the ones before it. `pipeline.streams` describes ClassIndex and turns positions into cache rows.
"""
