"""Round a depthwise network's weights to 3 bits by second moments (GPTQ), one matrix for each group, then calibrate."""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wellcond


def network(channels: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stride in (1, 2, 1, 2):
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width * stride, 1, bias=False), nn.BatchNorm2d(width * stride), nn.ReLU()]
        width *= stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int = 0) -> None:
    optimizer, draw = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()


def rounded(weight: Tensor, moment: Tensor, bits: int) -> Tensor:
    (groups, _, width), levels = weight.shape, 2 ** (bits - 1)
    scale = weight.abs().amax(2, keepdim=True).clamp_min(1e-12) / (levels - 0.5)
    damping = 0.01 * moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12).view(-1, 1, 1)
    factor = torch.linalg.cholesky(torch.linalg.inv(moment + damping * torch.eye(width).to(moment)), upper=True)
    rest, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for i in range(width):
        steps = (rest[..., i : i + 1] / scale - 0.5).round().clamp(-levels, levels - 1) + 0.5
        found[..., i : i + 1] = steps * scale
        error = (rest[..., i] - found[..., i]) / factor[:, i, i].view(groups, 1)
        rest[..., i:] -= error.unsqueeze(2) * factor[:, i, i:].unsqueeze(1)
    return found.to(weight.dtype)


def round_weights(model: nn.Module, images: Tensor, bits: int, moments: str = "groups") -> None:
    for name, layer in model.eval().named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.data.unflatten(0, (getattr(layer, "groups", 1), -1)).flatten(2)
            moment = torch.eye(weight.shape[2], dtype=torch.float64).expand(len(weight), -1, -1)
            if moments != "none":  # Rounding to the nearest is GPTQ with white inputs.
                # The line that wellcond adds: E[x xᵀ] of this layer's input, [groups, d, d].
                found = wellcond.second_moments(model, images.split(256), where=lambda n, _, own=name: n == own)
                moment = found[name].matrices()
            if moments == "mean":
                moment = moment.mean(0, keepdim=True).expand(len(weight), -1, -1)
            layer.weight.data.copy_(rounded(weight, moment, bits).view_as(layer.weight))


def main(steps: int = 150, bits: int = 3) -> dict[str, float]:
    data = load_digits()
    images, labels = torch.tensor(data.images).float().unsqueeze(1) / 8 - 1, torch.tensor(data.target)
    torch.manual_seed(0)
    base, scores = network(1, 16), {}
    train(base, images[:1400], labels[:1400], steps)
    for moments in ("float", "none", "mean", "groups"):
        model = copy.deepcopy(base).eval()
        if moments != "float":
            round_weights(model, images[:512], bits, moments)
            wellcond.calibrate(model, images[:1024].split(64), batch_size=64, what="bn")
        with torch.no_grad():
            scores[moments] = (model(images[1400:]).argmax(1) == labels[1400:]).double().mean().item()
    print(" ".join(f"{moments}: {score:.1%}" for moments, score in scores.items()))
    return scores


if __name__ == "__main__":
    main()
