"""Sampler plug-ins: how training samples are drawn. Each file defines one function:

    def draw(classes: ClassIndex, streams: (key...) -> Generator, epoch, step, size) -> int64 (size,)

It returns positions in the samples sorted by class. The result depends only on the arguments, so any step can be drawn
without drawing the earlier ones. `size` is the batch size; a sampler without replacement returns fewer positions at the
end of an epoch. With `AT_ONCE = True`, a file says that its law draws everything from `streams(epoch, step)`, by
`choice(n, size=, p=)`, first and at most once, and `integers(high, size=)`: then many steps are drawn at once
(`base.many_streams.ManyGenerators`), to the same result.
`data.classes` defines ClassIndex, and `heads.batches` turns positions into cache rows.
"""
