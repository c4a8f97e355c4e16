"""Random lives of images of each feature, led by us and by every QEMU that is here, beside a model."""
