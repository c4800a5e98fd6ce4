"""The transforms of the published codes (LDAM-DRW, MiSLAS, GCL, RIDE, H2T), which datasets take as their default."""

from h2t.pipeline.data.images import Transform

#: CIFAR-10 and CIFAR-100 alike.
CIFAR = Transform(size=32, padding=4, flip=True, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])

#: ImageNet-LT and Places-LT, with MiSLAS's colour jitter.
IMAGENET = Transform(
    size=224,
    resize=256,
    area=[0.08, 1.0],
    flip=True,
    jitter=0.4,
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)

#: iNaturalist 2018, which has statistics of its own.
INATURALIST = IMAGENET.model_copy(update={"mean": [0.466, 0.471, 0.380], "std": [0.195, 0.194, 0.192]})
