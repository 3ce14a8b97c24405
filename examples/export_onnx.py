"""Export a network with BSR through torch.export, and to ONNX, with a free batch size; both give the same numbers."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import wellcond


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )

    # The line that wellcond adds: evaluation predicts each image's statistics.
    wellcond.calibrate(model, [torch.randn(32, 3, 16, 16) for _ in range(8)], batch_size=4)
    model.eval()

    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = model(images)
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images,), dynamic_shapes=sizes)
    differences = {"torch.export": (exported.module()(images) - wanted).abs().max().item()}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), file, dynamo=True, dynamic_shapes=sizes, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    differences["ONNX"] = (torch.from_numpy(found) - wanted[:3]).abs().max().item()
    for name, difference in differences.items():
        print(f"{name}: largest difference {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()
