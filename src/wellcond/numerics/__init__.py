"""Functions of tensors that know no layer: linear algebra, patches, moments."""
