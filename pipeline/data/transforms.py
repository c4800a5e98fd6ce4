"""The transforms of the published codes (LDAM-DRW, MiSLAS, GCL, RIDE, H2T). They are the defaults of the datasets."""

from h2t.pipeline.data.images import Transform

#: For CIFAR-10 and CIFAR-100.
CIFAR = Transform(size=32, padding=4, flip=True, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])

#: For ImageNet-LT and Places-LT, with the colour jitter of MiSLAS.
IMAGENET = Transform(
    size=224,
    resize=256,
    area=[0.08, 1.0],
    flip=True,
    jitter=0.4,
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)

#: For iNaturalist 2018: the same with the mean and standard deviation of its own images.
INATURALIST = IMAGENET.model_copy(update={"mean": [0.466, 0.471, 0.380], "std": [0.195, 0.194, 0.192]})
