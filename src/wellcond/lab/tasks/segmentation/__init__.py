"""Semantic segmentation: the class of every pixel, on the layouts of Cityscapes, ADE20K, Pascal VOC and GTA5."""
