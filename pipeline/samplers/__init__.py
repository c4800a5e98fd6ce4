"""Sampler plug-ins: laws of drawing training samples. A file defines one function:

    def draw(classes: ClassIndex, streams: (key...) -> Generator, epoch, step, size) -> int64 (size,)

It returns positions into the class-sorted samples. It is a pure function of its arguments, so any step can be drawn
without the ones before it. `size` is that of whole batches; a law without replacement returns fewer at the end of an
epoch. `data.classes` describes ClassIndex, `heads.batches` turns positions into cache rows.
"""
