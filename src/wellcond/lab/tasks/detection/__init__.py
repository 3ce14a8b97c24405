"""Object detection on images annotated as COCO's."""
